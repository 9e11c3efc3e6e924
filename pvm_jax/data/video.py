"""Videos become patches and timestamps: numpy and PIL, PyAV for files.

A video is a list of frames, taken as they are (sample them first), or a file, from which frames are sampled evenly.
What agrees with transformers (5.23), `Qwen3VLVideoProcessor` and `Qwen3VLProcessor`:

- which frames are sampled, the size they are resized to, the order of patches, the timestamps: exactly;
- pixels of frames that need no resize: bit for bit (rescaling is fused into the normalisation there, which differs
  from images in the last bit);
- resized pixels: transformers resizes video with torchvision only; here every frame goes through the bicubic resize
  of PIL, as images do. The two differ by at most a few of 255 levels.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from PIL import Image

from pvm_jax.data.images import DataError, PixelSettings, Stored, open_image, patchify, smart_resize

FRAMES_FPS = 24.0  # of a list of frames that comes without a rate, as in transformers
DEFAULT_SIZE = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}  # Qwen3VLVideoProcessor's own


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """`fps` frames a second are sampled from a file, at least `min_frames`, at most `max_frames`, none invented.

    With `cap_pixels_per_frame` a short video may not spend the whole budget on its few frames.
    """

    pixels: PixelSettings
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768  # of one frame, if capped

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], source: str, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> "VideoSettings":
        """Reads `video_preprocessor_config.json` or the `video_processor` section; the limits are on T*H*W."""
        if raw.get("num_frames") is not None:
            raise DataError(f"{source}: num_frames: expected it unset (fps decides), got {raw['num_frames']!r}")
        return cls(
            pixels=PixelSettings.from_hf(raw, source, min_pixels, max_pixels, DEFAULT_SIZE),
            fps=float(raw.get("fps") or cls.fps),
            min_frames=raw.get("min_frames") or cls.min_frames,
            max_frames=raw.get("max_frames") or cls.max_frames,
            cap_pixels_per_frame=bool(raw.get("cap_pixels_per_frame")),
            max_video_tokens=raw.get("max_video_tokens") or cls.max_video_tokens,
        )


@dataclasses.dataclass(frozen=True)
class VideoPatches:
    """One video: `grid` (rows, columns) in patches is the same for all its len(timestamps) temporal patches."""

    patches: Float32[np.ndarray, "P C"]
    grid: tuple[int, int]
    timestamps: tuple[float, ...]  # seconds


def sample_indices(
    total: int, video_fps: float, settings: VideoSettings, fps: float | int | None = None
) -> Int[np.ndarray, " F"]:
    """Which of `total` frames are looked at, evenly from the first to the last.

    With the usual settings (2 a second, 4 to 768), 3 seconds of 30 frames give 0, 18, 36, 53, 71, 89, and a video of
    3 frames gives all three.
    """
    count = int(total / video_fps * (fps or settings.fps))
    count = min(max(count, settings.min_frames), settings.max_frames, total)
    return np.linspace(0, total - 1, count).round().astype(int)


def frame_timestamps(indices: Sequence[int], fps: float, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds of each temporal patch: halfway between its first and its last frame. The last index is repeated.

    >>> frame_timestamps([0, 5, 10], fps=10.0, temporal_patch_size=2)
    (0.25, 1.0)
    """
    size = temporal_patch_size
    padded = [*indices, *[indices[-1]] * (-len(indices) % size)]
    seconds = [int(i) / fps for i in padded]
    return tuple((seconds[i] + seconds[i + size - 1]) / 2 for i in range(0, len(seconds), size))


def frame_size(frames: int, height: int, width: int, settings: VideoSettings, where: str = "video") -> tuple[int, int]:
    """Height and width that every frame is resized to; the limits are on frames * height * width."""
    pixels, factor = settings.pixels, settings.pixels.factor
    if frames < pixels.temporal_patch_size:
        raise DataError(
            f"{where}: expected at least {pixels.temporal_patch_size} frames, got {frames}; give one frame as an image"
        )
    max_pixels = pixels.max_pixels
    if settings.cap_pixels_per_frame:
        share = min(settings.max_video_tokens * factor**2, max_pixels // frames)
        max_pixels = max(share, int(pixels.min_pixels * 1.05)) * frames
    if height < factor or width < factor:  # a frame smaller than one visual token is enlarged first
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return smart_resize(height, width, factor, pixels.min_pixels, max_pixels, where, frames, pixels.temporal_patch_size)


@functools.lru_cache(maxsize=8)
def video_values(settings: PixelSettings) -> Float32[np.ndarray, "3 256"]:
    """What each byte value becomes, by channel: the rescaling is folded into mean and standard deviation, in fp32."""
    scale = np.float32(1 / settings.rescale_factor)
    mean, std = (np.array(v, np.float32)[:, None] * scale for v in (settings.mean, settings.std))
    return (np.arange(256, dtype=np.float32) - mean) / std


def read_video(
    source: str | Path | Stored, settings: VideoSettings, fps: float | int | None = None, where: str = "video"
) -> tuple[list[Image.Image], list[int], float]:
    """Sampled frames of a file (also an animated GIF), their indices, and the file's frames per second.

    Raises:
      DataError: missing, not a video, damaged, or shorter than it says.
    """
    import av  # here, so that hosts without FFmpeg can still train on images

    name = f"{where} ({source})"
    if isinstance(source, Stored):
        content: str | bytes = source.read()
    elif Path(source).is_file():
        content = f"file:{os.path.abspath(source)}"  # or FFmpeg would take what stands before a colon for a protocol
    else:
        raise DataError(f"{name}: expected a video file, found none")
    try:
        with _open(content) as container:
            if not container.streams.video:
                raise DataError(f"{name}: expected a video, found no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate
            # Containers without an index (GIF, some WebM) do not know their length: count by decoding once more.
            total = stream.frames or _count_frames(content)
            if not rate or not total:
                raise DataError(f"{name}: expected frames and a frame rate, got {total} frames at {rate} a second")
            indices = sample_indices(total, float(rate), settings, fps).tolist()
            wanted, frames, seen = set(indices), [], 0
            for seen, frame in enumerate(container.decode(stream), start=1):
                if seen - 1 in wanted:
                    frames.append(frame.to_image())
                if seen > indices[-1]:
                    break
    except av.FFmpegError as e:
        raise DataError(f"{name}: the video cannot be decoded ({e})") from None
    if len(frames) != len(indices):
        raise DataError(f"{name}: expected {total} frames, could decode {seen}; the video is truncated or damaged")
    return frames, indices, float(rate)


def read_frames(
    source: str | Path | Stored | Sequence[Any],
    settings: VideoSettings,
    fps: float | int | None = None,
    where: str = "video",
) -> tuple[list[Image.Image], list[int], float]:
    """The frames of a file or a list that are looked at, their indices, and the frames per second; see `process_video`.

    Raises:
      DataError: they cannot be read.
    """
    if fps is not None and not fps > 0:
        raise DataError(f"{where}: fps: expected a positive number, got {fps!r}")
    if isinstance(source, str | Path | Stored):
        return read_video(source, settings, fps, where)
    frames = [open_image(frame, f"{where}: frame {i}") for i, frame in enumerate(source)]
    return frames, list(range(len(frames))), float(fps or FRAMES_FPS)


def _open(content: str | bytes) -> Any:
    import av

    return av.open(io.BytesIO(content) if isinstance(content, bytes) else content)


def _count_frames(content: str | bytes) -> int:
    with _open(content) as container:
        return sum(1 for _ in container.decode(video=0))


def process_video(
    source: str | Path | Stored | Sequence[Any],
    settings: VideoSettings,
    fps: float | int | None = None,
    where: str = "video",
) -> VideoPatches:
    """Patches, grid and timestamps of one video.

    Args:
      source: a file, also in an archive, or a list of frames (paths, bytes or PIL images of one size).
      fps: of a file: frames to sample a second (default: the checkpoint's); of a list: the rate at which its frames
        were taken (default: 24).
    """
    frames, indices, rate = read_frames(source, settings, fps, where)
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise DataError(f"{where}: expected frames of one size, got (width, height) {sorted(sizes)}")
    if not frames:
        raise DataError(f"{where}: expected frames, got none")
    pixels = settings.pixels
    width, height = frames[0].size
    height, width = frame_size(len(frames), height, width, settings, where)
    resized = [np.asarray(frame.resize((width, height), resample=pixels.resample)) for frame in frames]
    resized += [resized[-1]] * (-len(resized) % pixels.temporal_patch_size)
    return VideoPatches(
        patches=patchify(np.stack(resized), pixels, video_values(pixels)),
        grid=(height // pixels.patch_size, width // pixels.patch_size),
        timestamps=frame_timestamps(indices, rate, pixels.temporal_patch_size),
    )
