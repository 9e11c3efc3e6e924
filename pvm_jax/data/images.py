"""Images become patches: numpy and PIL, equal bit for bit to transformers' `Qwen2VLImageProcessorPil`.

One image gives one result, whether it comes as a path, as bytes or as a PIL image: the EXIF orientation is applied
and transparency is laid over white. transformers (5.23) does the first only for paths and the second only for PIL
images, so the equality holds for PIL images without an orientation tag and for files without transparency.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps

MAX_ASPECT_RATIO = 200


class DataError(ValueError):
    """Input that cannot become a batch; the message names the sample or file, what was expected, what arrived.

    `reason` is the kind of mistake in a few words, for counting rows that are left out.
    """

    def __init__(self, message: str, reason: str = "bad row"):
        super().__init__(message)
        self.reason = reason


@runtime_checkable
class Stored(Protocol):
    """A file that lies within another one (`archives.Member`); `str()` of it is its name for messages."""

    def read(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pixels become patches, as written in a checkpoint; areas in pixels after the resize.

    For images the area is H*W of one image, for videos T*H*W of all its frames.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def factor(self) -> int:
        """Height and width are multiples of this: one visual token is factor x factor pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        source: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        default_size: Mapping[str, int] | None = None,
    ) -> "PixelSettings":
        """Reads a (section of a) preprocessor file; `min_pixels` and `max_pixels` override it.

        Raises:
          DataError: a missing or unusable field, named with `source`.
        """
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not raw.get(step, True):
                raise DataError(f"{source}: {step}: expected true (every Qwen3-VL checkpoint has it), got false")
        size = raw.get("size") or default_size or {}
        low = raw.get("min_pixels") or size.get("shortest_edge")
        high = raw.get("max_pixels") or size.get("longest_edge")
        settings = cls(
            patch_size=_positive(raw.get("patch_size"), source, "patch_size"),
            temporal_patch_size=_positive(raw.get("temporal_patch_size"), source, "temporal_patch_size"),
            merge_size=_positive(raw.get("merge_size"), source, "merge_size"),
            min_pixels=_positive(min_pixels or low, source, "size.shortest_edge (or min_pixels)"),
            max_pixels=_positive(max_pixels or high, source, "size.longest_edge (or max_pixels)"),
            mean=_channels(raw.get("image_mean"), source, "image_mean"),
            std=_channels(raw.get("image_std"), source, "image_std"),
            rescale_factor=raw.get("rescale_factor", 1 / 255),
            resample=raw.get("resample", int(Image.Resampling.BICUBIC)),
        )
        if settings.min_pixels > settings.max_pixels:
            raise DataError(
                f"{source}: expected min_pixels <= max_pixels, got {settings.min_pixels} and {settings.max_pixels}"
            )
        return settings


def _positive(value: Any, source: str, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise DataError(f"{source}: {field}: expected a positive integer, got {value!r}")
    return value


def _channels(value: Any, source: str, field: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        raise DataError(f"{source}: {field}: expected three numbers, got {value!r}")
    return tuple(map(float, value))


def open_image(source: Any, where: str = "image") -> Image.Image:
    """An RGB image from a path, the bytes of a file, a file in an archive, or a PIL image; `where` begins every error.

    Raises:
      DataError: missing, empty, truncated or not an image, zero-sized, or deeper than 8 bits a channel.
    """
    name = f"{where} ({source})" if isinstance(source, str | Path | Stored) else where
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError(
            f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so that truncated images would pass as grey areas; "
            "set it to False"
        )
    if isinstance(source, Stored):
        source = source.read()
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise DataError(f"{name}: expected a path, bytes or a PIL image, got {type(source).__name__}")
    if isinstance(source, bytes) and not source:
        raise DataError(f"{name}: expected an image, got 0 bytes")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(image, name)
    except FileNotFoundError:
        raise DataError(f"{name}: expected an image file, found none") from None
    except (IsADirectoryError, PermissionError) as e:
        raise DataError(f"{name}: expected an image file that can be read ({e.strerror})") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{name}: expected an image, but PIL does not know this format") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise DataError(f"{name}: the image is truncated or damaged ({e})") from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise DataError(f"{name}: expected at least 1x1 pixels, got width {image.width} and height {image.height}")
    if image.mode.startswith(("I", "F")):
        # PIL clips these to 255, which would turn most of such an image white.
        raise DataError(f"{name}: expected 8 bits a channel, got mode {image.mode}; convert it to 8 bits first")
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else exif_transpose makes a copy
        image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    where: str = "image",
    frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, frames * height * width within the limits, the shape kept roughly.

    Rounding is Python's (half to even), as in the checkpoint's own preprocessing:

        >>> smart_resize(48, 80, factor=32, min_pixels=1024, max_pixels=65536)
        (64, 64)
        >>> smart_resize(20, 20, factor=32, min_pixels=4096, max_pixels=65536)
        (64, 64)

    The area of a video is judged with its frames rounded to whole temporal patches, but scaled by their true number.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise DataError(
            f"{where}: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.1f} "
            f"(width {width}, height {height}); crop or pad it"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    area = round(frames / temporal_factor) * temporal_factor * rows * columns
    if area > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


@functools.lru_cache(maxsize=8)
def image_values(settings: PixelSettings) -> Float32[np.ndarray, "3 256"]:
    """What each of the 256 byte values becomes, by channel: rescaled in fp64, rounded, normalised in fp32."""
    scaled = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    return (scaled - _column(settings.mean)) / _column(settings.std)


def _column(values: tuple[float, ...]) -> Float32[np.ndarray, "3 1"]:
    return np.array(values, np.float32)[:, None]


def patchify(
    frames: UInt8[np.ndarray, "F height width 3"], settings: PixelSettings, values: Float32[np.ndarray, "3 256"]
) -> Float32[np.ndarray, "P C"]:
    """Cuts frames into flattened patches.

    Patches follow each other in merge-block order (time, block row, block column, row and column in the block), so
    that every merge_size**2 neighbours become one visual token. Inside a patch the order is channel, time, row,
    column; C = 3 * temporal_patch_size * patch_size**2.

    Bytes are moved in runs of a patch's width and looked up afterwards, all at once: several times faster than moving
    floats one by one.

    Args:
      frames: height and width are multiples of `settings.factor`, F of `settings.temporal_patch_size`; or F is 1: a
        still image, which fills the temporal patch with copies of itself.
      values: the float of each byte value, by channel.
    """
    count, height, width, _ = frames.shape
    size, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    t = min(count, size)
    runs = np.ascontiguousarray(frames.transpose(3, 0, 1, 2)).view(f"V{p}")
    cut = runs.reshape(3, count // t, t, height // (p * m), m, p, width // (p * m), m)
    cut = np.ascontiguousarray(cut.transpose(0, 1, 3, 6, 4, 7, 2, 5)).view(np.uint8).reshape(3, -1, t, p * p)
    patches = np.empty((cut.shape[1], 3, size, p * p), np.float32)
    for channel in range(3):
        patches[:, channel] = values[channel].take(cut[channel], mode="clip")  # no byte is out of range
    return patches.reshape(len(patches), -1)


def process_image(
    source: Any, settings: PixelSettings, where: str = "image"
) -> tuple[Float32[np.ndarray, "P C"], tuple[int, int]]:
    """Patches of one image, and its grid (rows, columns) in patches; P = rows * columns."""
    image = open_image(source, where)
    height, width = smart_resize(
        image.height, image.width, settings.factor, settings.min_pixels, settings.max_pixels, where
    )
    image = image.resize((width, height), resample=settings.resample)
    grid = (height // settings.patch_size, width // settings.patch_size)
    return patchify(np.asarray(image)[None], settings, image_values(settings)), grid
