"""Whole samples against transformers' processor, the files of a checkpoint, and the batch."""

import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hf_processor import HFProcessor
from transformers import AutoTokenizer
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

import pvm_jax.data
from pvm_jax.data.chat import load_template
from pvm_jax.data.images import DataError
from pvm_jax.data.processor import Processor, write_limits

ID = tiny.TOKEN_ID


@pytest.fixture(scope="module")
def processor(stock_checkpoint) -> Processor:
    return Processor.from_pretrained(stock_checkpoint)


@pytest.fixture(scope="module")
def hf(stock_checkpoint) -> HFProcessor:
    return HFProcessor(stock_checkpoint)


@pytest.fixture
def own_checkpoint(stock_checkpoint, tmp_path) -> Path:
    """One that a test may change."""
    return shutil.copytree(stock_checkpoint, tmp_path / "checkpoint")


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def ask(*parts) -> dict:
    return {"messages": [tiny.user(*parts)]}


STRANGE_TEXT = [
    "  two spaces, then\n\n\nthree newlines\r\n",
    "\n starts with a newline and ends with one\n",
    "e\u0301 is composed, \u00e9 is the same, \u212b too; \U0001f600\U0001f1e9\U0001f1ea \u4e2d\u6587 \u0627\u0644",
    "tabs\tand 12345 numbers, don't 'll're",
    "<|almost|> <im_end> <| |> < |im_end|>",
    "",
]
CONVERSATIONS = tiny.conversations() | {
    f"strange_{i}": {"messages": [{"role": "system", "content": t}, tiny.user(t, t), tiny.assistant(t)]}
    for i, t in enumerate(STRANGE_TEXT)
}
CONVERSATIONS["two_videos"] = ask(
    [tiny.image(i, 50, 70) for i in range(3)], "then", [tiny.image(i, 33, 200) for i in range(4)], tiny.image(9, 40, 40)
)


# Against transformers.


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_encoded_sample_is_that_of_transformers(processor, hf, name, prompt):
    sample = CONVERSATIONS[name]
    ours = processor.encode(sample, add_generation_prompt=prompt)
    theirs = hf(sample, add_generation_prompt=prompt)
    np.testing.assert_array_equal(ours.tokens, theirs["input_ids"][0])
    expected, following = hf.positions(theirs)
    np.testing.assert_array_equal(ours.positions, expected)
    assert ours.next_position == following
    np.testing.assert_array_equal(ours.visual_index >= 0, theirs["mm_token_type_ids"][0] > 0)


@pytest.mark.parametrize("name", ["image", "two_images", "turns", "video", "two_videos"])
def test_patches_are_those_of_transformers_bit_for_bit(processor, hf, name):
    ours, theirs = processor.encode(CONVERSATIONS[name]), hf(CONVERSATIONS[name])
    # transformers keeps images and videos apart; ours stand in the order of their placeholders.
    is_image = np.repeat(ours.tokens[ours.visual_index >= 0] == ID["<|image_pad|>"], 4)
    for mine, field in ((is_image, "pixel_values"), (~is_image, "pixel_values_videos")):
        assert mine.any() == (field in theirs)
        if mine.any():
            np.testing.assert_array_equal(ours.patches[mine], theirs[field])


def test_vision_indices_are_those_of_transformers(processor, hf):
    sample = CONVERSATIONS["two_images"]
    ours, grid = processor.encode(sample), torch.from_numpy(hf(sample)["image_grid_thw"])
    np.testing.assert_array_equal(ours.patch_coords, get_vision_position_ids(grid, 2).numpy())
    index, weight = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=8, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(ours.pos_index, index.numpy())
    np.testing.assert_array_equal(ours.pos_weight, weight.numpy())
    sizes = grid.prod(dim=1).tolist()
    np.testing.assert_array_equal(ours.patch_segment, np.repeat([1, 2], sizes))


def test_every_video_frame_is_a_segment_of_its_own(processor):
    sample = CONVERSATIONS["video"]  # 5 frames of 4 x 6 patches: 3 temporal patches; then an image of 4 x 4
    e = processor.encode(sample)
    np.testing.assert_array_equal(e.patch_segment, np.repeat([1, 2, 3, 4], [24, 24, 24, 16]))
    np.testing.assert_array_equal(e.patch_coords[:24], e.patch_coords[24:48])
    text = processor.decode(e.tokens, skip_special_tokens=False).replace("<|video_pad|>", "")
    stamps = "".join(f"<{t} seconds><|vision_start|><|vision_end|>" for t in ("0.2", "1.2", "2.0"))
    assert f"user\n<|vision_start|>{stamps}<|vision_end|>what happens?" in text


def test_older_video_markers_are_replaced(processor, stock_checkpoint):
    older = Processor.from_pretrained(stock_checkpoint, video_markers=False)
    text = older.decode(older.encode(CONVERSATIONS["video"]).tokens, skip_special_tokens=False)
    assert "user\n<0.2 seconds><|vision_start|>" in text and "<|vision_end|>what happens?" in text
    assert "<|vision_end|><|vision_end|>" not in text
    image = CONVERSATIONS["image"]
    np.testing.assert_array_equal(older.encode(image).tokens, processor.encode(image).tokens)


@pytest.mark.parametrize("markers", [True, False])
def test_answers_are_learned_wherever_pictures_stand(stock_checkpoint, markers):
    """Also the answer between two pictures and the one behind a video: no shift by what was put in between."""
    encode = Processor.from_pretrained(stock_checkpoint, video_markers=markers)
    moves = [tiny.image(i, 64, 96) for i in range(3)]
    messages = [*CONVERSATIONS["turns"]["messages"], tiny.user("and", moves, "here?"), tiny.assistant("it moves")]
    e = encode.encode({"messages": messages})
    learned = encode.decode(e.tokens[e.loss_mask], skip_special_tokens=False)
    assert learned == "".join(f"{m['content']}<|im_end|>\n" for m in messages if m["role"] == "assistant")


# Files of a checkpoint.


def test_chat_template_from_each_place(own_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(own_checkpoint)
    assert load_template(own_checkpoint, tokenizer) == tiny.CHAT_TEMPLATE
    (own_checkpoint / "chat_template.jinja").unlink()
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template="from tokenizer_config")
    tokenizer = AutoTokenizer.from_pretrained(own_checkpoint)
    assert load_template(own_checkpoint, tokenizer) == "from tokenizer_config"
    (own_checkpoint / "chat_template.jinja").write_text("from jinja")
    assert load_template(own_checkpoint, tokenizer) == "from jinja"
    (own_checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_template(own_checkpoint, tokenizer) == "from json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "the default"}]
    (own_checkpoint / "processor_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_template(own_checkpoint, tokenizer) == "the default"


def test_missing_chat_template_is_named(own_checkpoint):
    (own_checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"expected a chat template in chat_template\.jinja"):
        Processor.from_pretrained(own_checkpoint)


def test_newer_layout_in_one_file(processor, own_checkpoint):
    sections = {
        "image_processor": json.loads((own_checkpoint / "preprocessor_config.json").read_text()),
        "video_processor": json.loads((own_checkpoint / "video_preprocessor_config.json").read_text()),
    }
    (own_checkpoint / "preprocessor_config.json").unlink()
    (own_checkpoint / "video_preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"expected preprocessor_config.json or processor_config.json, found neither"):
        Processor.from_pretrained(own_checkpoint)
    (own_checkpoint / "processor_config.json").write_text(json.dumps(sections))
    newer = Processor.from_pretrained(own_checkpoint)
    assert (newer.images, newer.video) == (processor.images, processor.video)


def test_pixel_limits_can_be_overridden(own_checkpoint):
    p = Processor.from_pretrained(own_checkpoint, min_pixels=1024, max_pixels=4096, video_max_pixels=9216)
    assert (p.images.min_pixels, p.images.max_pixels) == (1024, 4096)
    assert (p.video.pixels.min_pixels, p.video.pixels.max_pixels) == (2048, 9216)
    assert len(p.encode(ask(tiny.image(0, 300, 300))).patches) == 16
    edit_json(own_checkpoint / "preprocessor_config.json", size=None, min_pixels=2048, max_pixels=8192)
    assert Processor.from_pretrained(own_checkpoint).images.max_pixels == 8192
    (own_checkpoint / "video_preprocessor_config.json").unlink()
    assert Processor.from_pretrained(own_checkpoint).video.pixels.max_pixels == 8192


@pytest.mark.parametrize("layout", ["two files", "one for both", "sections"])
def test_pixel_limits_are_kept_in_the_files(own_checkpoint, layout):
    """Also where the files have the older keys, where videos have no file, and in one file of two sections."""
    images, video = (own_checkpoint / f"{kind}preprocessor_config.json" for kind in ("", "video_"))
    edit_json(images, min_pixels=2048, max_pixels=8192)
    if layout != "two files":
        video.unlink()
    if layout == "sections":
        settings = json.loads(images.read_text())
        images.unlink()
        both = {"image_processor": settings, "video_processor": settings | {"fps": 1}}
        (own_checkpoint / "processor_config.json").write_text(json.dumps(both))
    given = Processor.from_pretrained(own_checkpoint, min_pixels=1024, max_pixels=4096, video_max_pixels=9216)
    write_limits(own_checkpoint, given)
    kept = Processor.from_pretrained(own_checkpoint)
    assert (kept.images, kept.video) == (given.images, given.video)
    assert (kept.images.max_pixels, kept.video.pixels.max_pixels) == (4096, 9216)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "preprocessor_config.json",
            {"patch_size": 14},
            r"images: expected patch_size.*\(16, 2, 2\).*got \(14, 2, 2\)",
        ),
        ("preprocessor_config.json", {"patch_size": None}, "preprocessor_config.json: patch_size: expected a positive"),
        ("preprocessor_config.json", {"size": None}, r"size.shortest_edge \(or min_pixels\): expected a positive"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean: expected three numbers"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize: expected true"),
        ("preprocessor_config.json", {"min_pixels": 10**9}, "expected min_pixels <= max_pixels"),
        ("video_preprocessor_config.json", {"num_frames": 8}, "num_frames: expected it unset"),
        ("config.json", {"image_token_id": 3}, "image_token_id: expected a special token"),
    ],
)
def test_files_that_do_not_fit_are_named(own_checkpoint, file, changes, message):
    edit_json(own_checkpoint / file, **changes)
    with pytest.raises(DataError, match=message):
        Processor.from_pretrained(own_checkpoint)


def test_tokenizer_larger_than_the_vocabulary_is_refused(own_checkpoint):
    config = tiny.hf_config()
    config["text_config"]["vocab_size"] = 500
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"token ids below text_config\.vocab_size = 500, the tokenizer has 511"):
        Processor.from_pretrained(own_checkpoint)


def test_token_ids_for_generation(processor, own_checkpoint):
    vision = [ID[f"<|{name}|>"] for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
    assert processor.banned_token_ids.tolist() == sorted(vision + list(range(tiny.TOKENS, tiny.VOCAB)))
    for stated, expected in (([9, 7], (9, 7)), (7, (7,)), (None, (ID["<|im_end|>"],))):
        (own_checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
        assert Processor.from_pretrained(own_checkpoint).eos_token_ids == expected
    (own_checkpoint / "generation_config.json").unlink()
    assert Processor.from_pretrained(own_checkpoint).eos_token_ids == (ID["<|im_end|>"],)


# The batch.


def test_batch_has_one_sample_a_row(processor, hf):
    samples = [CONVERSATIONS[name] for name in ("image", "short", "video", "two_images")]
    batch = processor(samples)
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(batch.tokens[i][batch.segment_ids[i] > 0], hf(sample)["input_ids"][0])
    assert batch.tokens.shape[1] % 16 == 0
    assert batch.patches.shape == (4, 88, 1536)
    assert not batch.patch_segment_ids[1].any() and not batch.loss_weights[:, 0].any()
    np.testing.assert_allclose(batch.loss_weights.sum(axis=1), 1, rtol=1e-6)
    assert processor([CONVERSATIONS["short"]]).patches.shape == (1, 4, 1536)
    assert processor([CONVERSATIONS["short"]], length=100, patches=8).tokens.shape == (1, 100)
    with pytest.raises(
        DataError, match=r"sample \?: expected at most 16 tokens and 88 patches, got \d+ and \d+; raise"
    ):
        processor(samples, length=16, patches=88)


def test_pickled_processor_encodes_the_same(processor):
    again = pickle.loads(pickle.dumps(processor))
    attack = ask("see <|im_end|>", tiny.image(1, 40, 60))
    np.testing.assert_array_equal(again.encode(attack).tokens, processor.encode(attack).tokens)


def test_data_modules_import_neither_jax_nor_torch():
    for file in Path(pvm_jax.data.__file__).parent.glob("*.py"):
        imported = [
            line.split()[1] for line in file.read_text().splitlines() if line.strip().startswith(("import ", "from "))
        ]
        assert not {name.split(".")[0] for name in imported} & {"jax", "flax", "torch", "tensorflow"}, file


def test_encodes_without_torch_and_tensorflow(stock_checkpoint):
    script = """
        import sys
        from PIL import Image
        from pvm_jax.data.processor import Processor
        part = {"type": "image", "image": Image.new("RGB", (40, 40))}
        e = Processor.from_pretrained(sys.argv[1]).encode({"messages": [{"role": "user", "content": [part]}]})
        print(len(e.patches))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(stock_checkpoint)],
        env=tiny.without_torch(1),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "16", result.stderr[-2000:]
