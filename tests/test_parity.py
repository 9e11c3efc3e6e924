"""Logits, visual features and positions against transformers; with PVM, against the torch reference of PVM.

Tolerances (matmul precision "highest") are absolute; logits here have a standard deviation of about 2.4.

    fp32   whole model, logits           1e-4      (measured 1e-5 to 2e-5)
           vision blocks, visual tokens  1e-5
           positions, token ids          exact
    bf16   see BF16

A control breaks one mechanism and must miss the fp32 bar by a factor of ten or more.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pvm_reference
import pytest
import tiny
import torch
from flax import nnx

from pvm_jax.checkpoint import load_model
from pvm_jax.data.packing import pack
from pvm_jax.data.processor import Processor
from pvm_jax.models import decoder
from pvm_jax.models.layers import rms_norm
from pvm_jax.models.pvm import PVMBlock
from pvm_jax.models.vision import PatchMerger, VisualTokens

LOGITS, MODULE = 1e-4, 1e-5
CONTROL = 10 * LOGITS
NAMES = tuple(tiny.conversations())
WITH_IMAGES = tuple(name for name in NAMES if name not in ("text", "short"))
SEVERAL_IMAGES = ("two_images", "turns", "video")
LENGTH, PATCHES = 640, 480  # one shape, and so one program a checkpoint, for separate and for packed rows
VARIANTS = {
    "stock": {},
    "pvm_causal": {"tied": False, "pvm_layers": tiny.PVM_LAYERS, "memory_mask": "causal"},
    "pvm_all": {"tied": False, "pvm_layers": tiny.PVM_LAYERS},
}


@tiny.compiled
def encode(model, batch):
    return model.encode_images(batch)


@tiny.compiled
def read(model, batch, visual):
    return model.logits(model(batch, visual=visual))


def logits(model, batch) -> np.ndarray:
    """[B,T,V]. Two programs, so that a control on one side does not compile the other again."""
    return np.asarray(read(model, batch, encode(model, batch)))


@pytest.fixture(scope="module")
def processor(processor_dir):
    return Processor.from_pretrained(processor_dir)


@dataclasses.dataclass
class Side:
    """One checkpoint, loaded by both; transformers' answers are computed once."""

    directory: object
    dtype: str = "float32"

    def __post_init__(self):
        self.model = load_model(self.directory, dtype=self.dtype, scan=True)
        self.torch = pvm_reference.load(self.directory)
        self.inputs = {n: oracle.inputs(self.directory, s) for n, s in tiny.conversations().items()}
        self.expected = {n: oracle.logits(self.torch, i) for n, i in self.inputs.items()}


@pytest.fixture(scope="module")
def sides(checkpoints):
    made = {}

    def get(name: str) -> Side:
        if name not in made:
            made[name] = Side(checkpoints(**VARIANTS[name]))
        return made[name]

    return get


@pytest.fixture(scope="module")
def rows(processor):
    """All conversations, one a row."""
    return processor(list(tiny.conversations().values()), length=LENGTH, patches=PATCHES)


def error(got: np.ndarray, side: Side, name: str) -> float:
    """Largest difference to transformers over one conversation's tokens; `got` is [T,V] and may be padded."""
    expected = side.expected[name]
    return float(np.abs(got[: len(expected)] - expected).max())


def row_errors(side: Side, batch, model=None) -> dict[str, float]:
    got = logits(model or side.model, batch)
    return {name: error(got[i], side, name) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def clean(sides, rows):
    made = {}

    def get(variant: str) -> dict[str, float]:
        if variant not in made:
            made[variant] = row_errors(sides(variant), rows)
        return made[variant]

    return get


def test_inputs_can_reveal_bugs(sides):
    inputs = sides("stock").inputs
    assert inputs["text"]["input_ids"].shape[1] >= 600
    grids = inputs["two_images"]["image_grid_thw"].tolist()
    assert grids[0] != grids[1] and all(h != w for _, h, w in grids)
    assert inputs["video"]["video_grid_thw"].tolist() == [[3, 4, 6]]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_positions_are_exact(sides, rows, name):
    side, row = sides("stock"), NAMES.index(name)
    real = rows.segment_ids[row] > 0
    np.testing.assert_array_equal(rows.tokens[row][real], side.inputs[name]["input_ids"][0])
    np.testing.assert_array_equal(rows.positions[:, row, real], oracle.positions(side.torch, side.inputs[name]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(clean, variant, name):
    assert clean(variant)[name] < LOGITS


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_equal_separate_rows(sides, processor, variant):
    side = sides(variant)
    encoded = {n: processor.encode(s | {"id": n}) for n, s in tiny.conversations().items()}
    order = ("image", "short", "two_images", "turns", "video", "text")
    batch = pack([encoded[n] for n in order], rows=len(NAMES), length=LENGTH, patches=PATCHES)
    assert batch.segment_ids.max(axis=1).tolist() == [5, 1, 0, 0, 0, 0]
    got = logits(side.model, batch)
    for i, name in enumerate(order[:5], start=1):
        assert error(got[0][batch.segment_ids[0] == i], side, name) < LOGITS, name
    assert error(got[1], side, "text") < LOGITS

    for field in ("segment_ids", "patch_segment_ids", "memory_segment_ids"):
        broken = dataclasses.replace(batch, **{field: np.minimum(getattr(batch, field), 1)})
        if field == "memory_segment_ids" and variant == "stock":
            continue
        got = logits(side.model, broken)
        assert error(got[0][batch.segment_ids[0] == 4], side, "turns") > CONTROL, field


def test_layers_on_their_own_equal_scanned_groups(sides, rows):
    side = sides("pvm_causal")
    model = load_model(side.directory, scan=False)
    assert max(row_errors(side, rows, model).values()) < LOGITS


@pytest.mark.parametrize("scan", [True, False])
def test_more_than_ten_layers(checkpoints, processor, scan):
    """Keys of layers sort as text: 11 would run before 2."""
    directory, sample = checkpoints.deep(), tiny.conversations()["two_images"]
    expected = oracle.logits(pvm_reference.load(directory), oracle.inputs(directory, sample))
    got = logits(load_model(directory, dtype="float32", scan=scan), processor([sample]))[0, : len(expected)]
    assert np.abs(got - expected).max() < LOGITS


def test_one_call_equals_two(sides, rows):
    """`model(batch)` encodes the images itself."""
    side = sides("stock")
    got = np.asarray(tiny.compiled(lambda model, batch: model.logits(model(batch)))(side.model, rows))
    assert max(error(got[i], side, name) for i, name in enumerate(NAMES)) < LOGITS


def test_the_public_way_without_jit(sides, processor):
    """`model.logits(model(processor(samples)))`: a numpy batch, straight from the processor."""
    side = sides("stock")
    got = side.model.logits(side.model(processor([tiny.conversations()["short"]])))
    assert error(np.asarray(got[0]), side, "short") < LOGITS


# ---------------------------------------------------------------------------------------- vision tower


@pytest.fixture(scope="module")
def vision_records(sides):
    """transformers' vision blocks on "two_images": the input and output of every block, merged tokens, features."""
    side = sides("stock")
    tower, blocks, hooks = side.torch.model.visual, [], []
    for block in tower.blocks:
        hook = block.register_forward_hook(lambda _, args, out: blocks.append((args[0].numpy(), out.numpy())))
        hooks.append(hook)
    inputs = side.inputs["two_images"]
    with torch.no_grad():
        out = tower(inputs["pixel_values"], inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    return blocks, out.pooler_output.numpy(), [f.numpy() for f in out.deepstack_features]


@pytest.fixture(scope="module")
def two_images(processor):
    return jax.tree.map(jnp.asarray, processor([tiny.conversations()["two_images"]]))


@pytest.mark.parametrize("index", range(4))
def test_each_vision_block(sides, vision_records, two_images, index):
    from pvm_jax.models import rope
    from pvm_jax.models.attention import SameId
    from pvm_jax.models.stack import group_layers

    tower = sides("stock").model.visual
    name = next(n for n in tower.blocks if index in group_layers(n))
    graphdef, params = nnx.split(tower.blocks[name])
    block = nnx.merge(graphdef, jax.tree.map(lambda x: x[index - group_layers(name)[0]], params))
    cos, sin = rope.rope_2d(two_images.patch_coords, tower.config.head_dim)
    ids = two_images.patch_segment_ids
    given, expected = vision_records[0][index]
    got = block(jnp.asarray(given)[None], cos, sin, SameId(ids, ids))[0]
    np.testing.assert_allclose(got, expected, atol=MODULE, rtol=MODULE)


def test_visual_tokens_and_deepstack_features(sides, vision_records, two_images):
    visual = encode(sides("stock").model, two_images)
    _, tokens, features = vision_records
    np.testing.assert_allclose(visual.tokens[0], tokens, atol=MODULE, rtol=MODULE)
    assert len(visual.deepstack) == len(features) == 2
    for got, expected in zip(visual.deepstack, features):
        np.testing.assert_allclose(got[0], expected, atol=MODULE, rtol=MODULE)


# ---------------------------------------------------------------------------------- controls: the batch


def one_dimensional(batch):
    return np.broadcast_to(np.arange(LENGTH, dtype=np.int32), batch.positions.shape)


# field: (how it is broken, the conversations that must then differ)
BROKEN_FIELDS = {
    "positions": (one_dimensional, WITH_IMAGES),
    "patch_segment_ids": (lambda b: np.minimum(b.patch_segment_ids, 1), SEVERAL_IMAGES),
    "patch_coords": (lambda b: b.patch_coords[..., ::-1], WITH_IMAGES),
    "pos_weight": (lambda b: np.eye(4, dtype=np.float32)[np.argmax(b.pos_weight, -1)], WITH_IMAGES),
    "pos_index": (lambda b: b.pos_index[..., [0, 2, 1, 3]], WITH_IMAGES),
    "visual_index": (lambda b: np.where(b.visual_index < 0, -1, b.visual_index[:, ::-1].max() - 1), WITH_IMAGES),
}


@pytest.mark.parametrize("field", BROKEN_FIELDS)
def test_a_broken_batch_is_seen(sides, rows, field):
    side = sides("stock")
    change, affected = BROKEN_FIELDS[field]
    errors = row_errors(side, dataclasses.replace(rows, **{field: change(rows)}))
    for name in NAMES:
        assert errors[name] > CONTROL if name in affected else errors[name] < LOGITS, (name, errors[name])


# ---------------------------------------------------------------------------------- controls: the model


@pytest.mark.parametrize("broken", ["zeroed", "first_zeroed", "swapped"])
def test_deepstack_is_seen(sides, rows, broken):
    side = sides("stock")
    visual = encode(side.model, rows)
    change = {
        "zeroed": jnp.zeros_like,
        "first_zeroed": lambda d: d.at[0].set(0),
        "swapped": lambda d: d[::-1],
    }[broken]
    got = np.asarray(read(side.model, rows, VisualTokens(visual.tokens, change(visual.deepstack))))
    for i, name in enumerate(NAMES):
        e = error(got[i], side, name)
        assert e > CONTROL if name in WITH_IMAGES else e < LOGITS, (name, e)


@contextlib.contextmanager
def set_attribute(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@pytest.mark.parametrize("mergers", ["merger", "deepstack"])
def test_tanh_gelu_in_the_mergers_is_seen(sides, rows, mergers):
    side = sides("stock")
    tower = side.model.visual
    modules = [tower.merger] if mergers == "merger" else list(tower.deepstack_merger_list.values())
    with contextlib.ExitStack() as stack:
        for module in modules:
            assert isinstance(module, PatchMerger) and module.tanh is False
            stack.enter_context(set_attribute(module, "tanh", True))
        errors = row_errors(side, rows)
    assert min(errors[name] for name in WITH_IMAGES) > CONTROL


def run_patched(side: Side, batch) -> np.ndarray:
    """Traces anew, so that monkeypatched methods take effect."""
    program = tiny.compiled(lambda model, batch, visual: model.logits(model(batch, visual=visual)))
    return np.asarray(program(side.model, batch, encode(side.model, batch)))


def test_pvm_query_tap_is_seen(sides, rows, monkeypatch):
    """The branch given the FFN's normalised input instead of the residual."""
    layer_call, block_call = decoder.DecoderLayer.__call__, PVMBlock.__call__
    norms = []

    def layer(self, *args):
        norms.append(self.post_attention_layernorm)
        return layer_call(self, *args)

    monkeypatch.setattr(decoder.DecoderLayer, "__call__", layer)
    monkeypatch.setattr(
        PVMBlock, "__call__", lambda self, h, *rest: block_call(self, rms_norm(h, norms[-1], self.eps), *rest)
    )
    side = sides("pvm_causal")
    got = run_patched(side, rows)
    for i, name in enumerate(NAMES):
        e = error(got[i], side, name)
        assert e > CONTROL if name in WITH_IMAGES else e < LOGITS, (name, e)


def test_pvm_silencing_is_seen(sides, rows, monkeypatch):
    """The branch answering visual queries too."""
    call = PVMBlock.__call__
    monkeypatch.setattr(
        PVMBlock,
        "__call__",
        lambda self, h, memory, mask, is_text: call(self, h, memory, mask, jnp.ones_like(is_text)),
    )
    side = sides("pvm_causal")
    got = run_patched(side, rows)
    assert min(error(got[NAMES.index(name)], side, name) for name in WITH_IMAGES) > CONTROL


def test_memory_masks_are_told_apart(sides, rows):
    """Equal weights, masks exchanged. With one image and no text before it, both masks are the same."""
    causal, everything = sides("pvm_causal"), sides("pvm_all")
    for side, other in ((causal, everything), (everything, causal)):
        got = logits(side.model, rows)
        for name in SEVERAL_IMAGES:
            assert error(got[NAMES.index(name)], other, name) > CONTROL, name


# ------------------------------------------------------------------------------------------------- bf16

# Root-mean-square error over its reference's standard deviation, against fp32 arithmetic on the same bf16 weights,
# and how much larger than transformers' own bf16 error it may be.
BF16 = {"absolute": 2e-2, "relative_to_transformers": 1.25}


def test_bf16_logits(checkpoints, processor, rows):
    side = Side(checkpoints(**VARIANTS["pvm_causal"], dtype="bfloat16"), dtype="bfloat16")
    half = pvm_reference.load(side.directory, torch.bfloat16)
    got = logits(side.model, rows)

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x))))

    for i, name in enumerate(NAMES):
        expected = side.expected[name]
        ours = rms(got[i][: len(expected)] - expected) / expected.std()
        theirs = rms(oracle.logits(half, side.inputs[name]) - expected) / expected.std()
        assert ours < BF16["absolute"], (name, ours)
        assert ours < BF16["relative_to_transformers"] * theirs, (name, ours, theirs)
