"""Images and videos: equal to transformers', and every kind of damage named."""

import doctest
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from hf_processor import VideoProcessor
from PIL import Image, ImageFile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as hf_video_smart_resize
from transformers.video_utils import VideoMetadata

from pvm_jax.data import images, packing, positions, video
from pvm_jax.data.images import DataError, PixelSettings
from pvm_jax.data.processor import Processor


@pytest.fixture(scope="module")
def processor(stock_checkpoint) -> Processor:
    return Processor.from_pretrained(stock_checkpoint)


def ask(*parts) -> dict:
    return {"messages": [tiny.user(*parts)]}


# Against transformers.


def noise(mode: str, height: int, width: int) -> Image.Image:
    """Noise of any PIL mode, with transparency where the mode has it."""
    rng = np.random.default_rng(height * width)
    if mode == "P+transparency":
        image = tiny.image(1, height, width).convert("P")
        image.info["transparency"] = int(np.asarray(image)[0, 0])
        return image
    if mode in ("P", "1", "CMYK"):
        return tiny.image(1, height, width).convert(mode)
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), rng.integers(0, 256, height * width * bands, np.uint8).tobytes())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "P+transparency", "1", "CMYK"])
@pytest.mark.parametrize("size", [(37, 91), (5, 9), (400, 213)])  # between the limits, scaled up, scaled down
def test_pixels_are_those_of_the_pil_processor_bit_for_bit(stock_checkpoint, mode, size):
    settings = {"image_mean": [0.48, 0.5, 0.4], "image_std": [0.27, 0.5, 0.3]}  # unlike a half, these round
    theirs = Qwen2VLImageProcessorPil.from_pretrained(stock_checkpoint, **settings)
    raw = json.loads((stock_checkpoint / "preprocessor_config.json").read_text()) | settings
    image = noise(mode, *size)
    expected = theirs(images=[image])
    patches, grid = images.process_image(image, PixelSettings.from_hf(raw, "file"))
    np.testing.assert_array_equal(patches, np.asarray(expected["pixel_values"]))
    assert [1, *grid] == np.asarray(expected["image_grid_thw"])[0].tolist()


def test_path_bytes_and_image_give_the_same(processor, tmp_path):
    picture, path = noise("RGBA", 40, 70), tmp_path / "picture.png"
    picture.save(path)
    expected = processor.encode(ask(picture)).patches
    for source in (path, str(path), path.read_bytes()):
        part = {"type": "image", "image": source}
        e = processor.encode({"messages": [{"role": "user", "content": [part]}]})
        np.testing.assert_array_equal(e.patches, expected)


def test_exif_orientation_is_applied(processor):
    picture = tiny.image(1, 40, 90)
    rotated, file = picture.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    rotated.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(
        processor.encode(ask(file.getvalue())).patches, processor.encode(ask(picture)).patches
    )


def test_sizes_are_those_of_transformers():
    rng = np.random.default_rng(0)
    halves = [[48, 80], [80, 48], [16, 16], [1, 200], [112, 112]]  # rounded to even
    for height, width in [*rng.integers(1, 600, (400, 2)).tolist(), *halves]:
        limits = {"factor": 32, "min_pixels": 4096, "max_pixels": 65536}
        if max(height, width) > 200 * min(height, width):
            continue
        assert images.smart_resize(height, width, **limits) == hf_smart_resize(height, width, **limits)


@pytest.mark.parametrize("cap", [False, True])
def test_video_sizes_are_those_of_transformers(stock_checkpoint, cap):
    raw = json.loads((stock_checkpoint / "video_preprocessor_config.json").read_text())
    raw |= {"cap_pixels_per_frame": cap, "max_video_tokens": 6}
    theirs = VideoProcessor(**{k: v for k, v in raw.items() if k not in ("processor_class", "video_processor_type")})
    settings = video.VideoSettings.from_hf(raw, "file")
    rng = np.random.default_rng(1)
    for frames, height, width in zip(
        *(rng.integers(low, high, 200).tolist() for low, high in ((2, 30), (8, 300), (8, 300)))
    ):
        grid = video.frame_size(frames, height, width, settings)
        count = grid[0] // 16 * (grid[1] // 16) * -(-frames // 2)
        assert count == theirs.get_num_of_video_patches(frames, height, width)
        if not cap:
            assert grid == hf_video_smart_resize(
                frames, height, width, 2, 32, raw["size"]["shortest_edge"], raw["size"]["longest_edge"]
            )


@pytest.mark.parametrize("fps", [None, 0.5, 7.3])
def test_sampled_frames_are_those_of_transformers(stock_checkpoint, fps):
    theirs = VideoProcessor.from_pretrained(stock_checkpoint)
    settings = video.VideoSettings.from_hf(
        json.loads((stock_checkpoint / "video_preprocessor_config.json").read_text()), ""
    )
    assert settings.fps == 2
    for total in (1, 3, 4, 5, 17, 100, 3001, 60000):
        for rate in (12.5, 23.976, 30.0):
            expected = theirs.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), fps=fps)
            np.testing.assert_array_equal(video.sample_indices(total, rate, settings, fps), expected)
            stamps = Qwen3VLProcessor._calculate_timestamps(None, expected.tolist(), rate, 2)
            assert video.frame_timestamps(expected.tolist(), rate, 2) == tuple(stamps)


def test_docstring_examples():
    for module in (images, positions, packing, video):
        results = doctest.testmod(module)
        assert results.failed == 0
        assert results.attempted > 0, module
    assert video.sample_indices(90, 30.0, video.VideoSettings(PIXELS)).tolist() == [0, 18, 36, 53, 71, 89]
    assert video.sample_indices(3, 30.0, video.VideoSettings(PIXELS)).tolist() == [0, 1, 2]


PIXELS = PixelSettings(16, 2, 2, 2048, 16384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Bad input: one sentence that names the sample and the part.


def damaged(kind: str, tmp_path: Path):
    """(source, what the sentence says)."""
    jpeg, png = io.BytesIO(), io.BytesIO()
    tiny.image(0, 64, 64).save(jpeg, "JPEG")
    tiny.image(0, 64, 64).save(png, "PNG")
    file = tmp_path / "image.png"
    file.write_bytes(png.getvalue()[:2000])
    flipped = bytearray(png.getvalue())
    flipped[600] ^= 255
    return {
        "truncated jpeg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "the image is truncated or damaged"),
        "truncated file": (file, r"image.png\): the image is truncated or damaged"),
        "damaged png": (bytes(flipped), "the image is truncated or damaged"),
        "empty": (b"", "expected an image, got 0 bytes"),
        "text": (b"not an image", "PIL does not know this format"),
        "missing": (tmp_path / "none.png", r"none.png\): expected an image file, found none"),
        "folder": (tmp_path, r"expected an image file that can be read \(Is a directory\)"),
        "zero size": (Image.new("RGB", (0, 5)), "expected at least 1x1 pixels, got width 0 and height 5"),
        "narrow": (Image.new("RGB", (402, 2)), "expected an aspect ratio of at most 200, got 201.0"),
        "16 bits": (Image.fromarray(np.zeros((4, 4), np.uint16)), "expected 8 bits a channel, got mode I;16"),
        "array": (np.zeros((4, 4, 3), np.uint8), "expected a path, bytes or a PIL image, got ndarray"),
    }[kind]


KINDS = (
    "truncated jpeg",
    "truncated file",
    "damaged png",
    "empty",
    "text",
    "missing",
    "folder",
    "zero size",
    "narrow",
    "16 bits",
    "array",
)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_named(processor, tmp_path, kind):
    source, message = damaged(kind, tmp_path)
    sample = {
        "id": "row 12",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": source}]},
        ],
    }
    with pytest.raises(DataError, match=rf"^sample row 12: messages\[1\].content\[1\].*{message}") as caught:
        processor.encode(sample)
    assert "\n" not in str(caught.value)


def test_truncated_images_are_never_taken_in_silence(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is on"):
        processor.encode(ask(damaged("truncated jpeg", tmp_path)[0]))


# Video files.


def write_video(path: Path, frames: int, fps: int) -> list[Image.Image]:
    """Frames of flat, growing brightness, which survive lossy coding well enough to be told apart."""
    import av

    pictures = [Image.new("RGB", (96, 64), (i * 8, i * 8, i * 8)) for i in range(frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return pictures


def shown(e: packing.Encoded) -> list[int]:
    """Which of those frames a sample has, by their brightness."""
    pixels = (e.patches.reshape(-1, 24, 3, 2, 256) + 1) * 127.5  # [temporal patch, patch, channel, time, pixel]
    return np.round(pixels.mean(axis=(1, 2, 4)) / 8).astype(int).reshape(-1).tolist()


def test_video_file_is_sampled_evenly(processor, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=30, fps=10)
    sample = {"messages": [{"role": "user", "content": [{"type": "video", "video": tmp_path / "clip.mp4"}]}]}
    e = processor.encode(sample)
    assert shown(e) == [0, 6, 12, 17, 23, 29]  # 3 seconds, 2 frames a second
    text = processor.decode(e.tokens)
    assert all(f"<{t:.1f} seconds>" in text for t in (0.3, 1.45, 2.6))
    sample["messages"][0]["content"][0]["fps"] = 4
    assert shown(processor.encode(sample)) == video.sample_indices(30, 10.0, processor.video, 4).tolist()


def test_animated_gif_is_a_video(processor, tmp_path, monkeypatch):
    """Also one whose name would be an address to FFmpeg."""
    pictures = [tiny.image(i, 64, 96).quantize(64) for i in range(6)]
    monkeypatch.chdir(tmp_path)
    pictures[0].save("clip:1.gif", save_all=True, append_images=pictures[1:], duration=500, loop=0)
    e = processor.encode({"messages": [{"role": "user", "content": [{"type": "video", "video": "clip:1.gif"}]}]})
    frames = processor.encode(ask([p.convert("RGB") for p in pictures]))  # 6 frames, 2 a second
    np.testing.assert_array_equal(e.tokens, frames.tokens)
    np.testing.assert_array_equal(e.patches, frames.patches)


def test_bad_video_files_are_named(processor, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=30, fps=10)
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    for name, message in (
        ("cut.mp4", "the video cannot be decoded"),
        ("text.mp4", "the video cannot be decoded"),
        ("none.mp4", "expected a video file, found none"),
        ("http://127.0.0.1:9/a.mp4", "expected a video file, found none"),
    ):
        part = {"type": "video", "video": name if ":" in name else tmp_path / name}
        with pytest.raises(DataError, match=rf"^sample 1: messages\[0\].content\[0\] \(.*{name}\): {message}"):
            processor.encode({"id": 1, "messages": [{"role": "user", "content": [part]}]})


def test_video_shorter_than_it_says_is_an_error(processor, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.avi", frames=30, fps=10)
    whole = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(whole[: len(whole) * 2 // 3])  # an AVI has its frame count in front
    with pytest.raises(DataError, match=r"expected 30 frames, could decode \d+; the video is truncated or damaged"):
        processor.encode(
            {"messages": [{"role": "user", "content": [{"type": "video", "video": tmp_path / "clip.avi"}]}]}
        )
