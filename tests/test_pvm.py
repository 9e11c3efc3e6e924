"""What PVM promises: it starts as the identity and learns; its memory is a value, causal if asked, and complete."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from pvm_jax.checkpoint import load_model
from pvm_jax.config import ModelConfig
from pvm_jax.convert import convert_from_hf
from pvm_jax.data.packing import Encoded, collate, extend
from pvm_jax.data.processor import Processor
from pvm_jax.models.cache import KVCache
from pvm_jax.models.layers import Make
from pvm_jax.models.pvm import PVMBlock, memory_mask
from pvm_jax.models.qwen3_vl import Qwen3VL

LENGTH, PATCHES = 112, 120
LOGITS = 1e-4


@tiny.compiled
def logits(model, batch):
    return model.logits(model(batch))


@pytest.fixture(scope="module")
def processor(processor_dir):
    return Processor.from_pretrained(processor_dir)


@pytest.fixture(scope="module")
def models(checkpoints):
    """Equal weights, "causal" and "all"."""
    return {
        mask: load_model(checkpoints(pvm_layers=tiny.PVM_LAYERS, memory_mask=mask), scan=True)
        for mask in ("causal", "all")
    }


def rows(processor, *samples):
    return processor(list(samples), length=LENGTH, patches=PATCHES)


TURNS = tiny.conversations()["turns"]
SHORT = tiny.conversations()["short"]


# ------------------------------------------------------------------------------------------- the start


@pytest.fixture(scope="module")
def fresh(stock_checkpoint, tmp_path_factory):
    """A stock checkpoint that gained PVM."""
    directory = tmp_path_factory.mktemp("native") / "pvm"
    convert_from_hf(stock_checkpoint, directory, pvm_layers=tiny.PVM_LAYERS, pvm_hidden_size=tiny.PVM_WIDTH)
    return directory


@pytest.mark.parametrize("scan", [True, False])
def test_fresh_pvm_changes_no_bit(stock_checkpoint, fresh, processor, scan):
    logits = tiny.compiled(lambda model, batch: model.logits(model(batch)), tiny.AS_USERS)
    batch = rows(processor, TURNS, SHORT)
    stock, ours = load_model(stock_checkpoint, scan=scan), load_model(fresh, scan=scan)
    assert ours.config.pvm.memory_mask == "causal"
    np.testing.assert_array_equal(logits(ours, batch), logits(stock, batch))


def pvm_gradients(model, batch) -> dict[str, np.ndarray]:
    """Gradients of a next-token loss with respect to the PVM parameters, by path."""
    wanted = nnx.All(nnx.Param, nnx.PathContains("pvm_block"))

    @nnx.jit
    def gradients(model, batch):
        def loss(model):
            logp = jax.nn.log_softmax(model.logits(model(batch))[:, :-1])
            picked = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(picked * batch.loss_weights[:, 1:])

        return nnx.grad(loss, argnums=nnx.DiffState(0, wanted))(model)

    flat = nnx.to_flat_state(gradients(model, batch))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def test_at_the_first_step_the_gate_alone_learns(fresh, processor):
    grads = pvm_gradients(load_model(fresh, scan=True), rows(processor, TURNS, SHORT))
    assert len(grads) == 15 * len(tiny.PVM_LAYERS)
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        assert np.any(grad) == path.endswith("gate_alpha"), path


def test_with_an_open_gate_every_parameter_learns(models, processor):
    grads = pvm_gradients(models["causal"], rows(processor, TURNS, SHORT))
    assert not [path for path, grad in grads.items() if not np.any(grad)]


def test_gate_and_expander_at_zero_are_refused(pvm_checkpoint, tmp_path):
    """Such a block is dead: the gradient of each is a product with the other."""
    directory = tmp_path / "dead"
    shutil.copytree(pvm_checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in ("gate_alpha", "output_expander.weight"):
        tensors[f"model.language_model.layers.4.pvm_block.{name}"][...] = 0
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="can never train: the gradient of each is a product with the other"):
        load_model(directory)


# ------------------------------------------------------------------------------------------- the memory


def other_image(turns: dict) -> dict:
    """The same conversation with another second image of the same size."""
    content = turns["messages"][2]["content"]
    swapped = [{"type": "image", "image": tiny.image(99, 40, 101)} if p["type"] == "image" else p for p in content]
    messages = [*turns["messages"][:2], {"role": "user", "content": swapped}, turns["messages"][3]]
    return {"messages": messages}


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_an_image_and_the_text_before_it(models, processor, mask):
    """The release leaks a later image into earlier text; "causal" does not."""
    batch = rows(processor, TURNS, other_image(TURNS))
    np.testing.assert_array_equal(batch.tokens[0], batch.tokens[1])
    second = int(batch.memory_index[0, (batch.patches[0] != batch.patches[1]).any(-1).argmax() // 4])
    assert 20 < second < 90, "the second image stands in the middle"
    one, two = logits(models[mask], batch)
    before = float(jnp.abs(one - two)[:second].max())
    assert float(jnp.abs(one - two)[second:].max()) > 0.1
    if mask == "causal":
        assert before == 0
    else:
        assert before > 0.01


def split(sample: Encoded, at: int) -> tuple[Encoded, Encoded]:
    """Two turns as two inputs; the second's positions count from where the first one ends."""
    visual = int((sample.visual_index[:at] >= 0).sum())
    patches = 4 * visual

    def part(tokens: slice, pixels: slice, first: int, position: int, **changes) -> Encoded:
        index = sample.visual_index[tokens]
        cut = {f: getattr(sample, f)[tokens] for f in ("tokens", "loss_mask")}
        cut |= {f: getattr(sample, f)[pixels] for f in ("patches", "patch_segment", "patch_coords")}
        cut |= {f: getattr(sample, f)[pixels] for f in ("pos_index", "pos_weight")}
        index = np.where(index >= 0, index - first, -1).astype(np.int32)
        return Encoded(**cut, positions=sample.positions[:, tokens] - np.int32(position), visual_index=index, **changes)

    start = int(sample.positions[:, :at].max()) + 1
    return (
        part(slice(at), slice(patches), 0, 0, next_position=start),
        part(slice(at, None), slice(patches, None), visual, start, next_position=sample.next_position - start),
    )


TEXT_TURNS = {
    "messages": [
        tiny.user(tiny.text(40, 12)),
        tiny.assistant(tiny.text(41, 10)),
        tiny.user(tiny.text(42, 12)),
        tiny.assistant(tiny.text(43, 12)),
    ]
}


@pytest.fixture(scope="module")
def halves(processor):
    """Two conversations of two turns, with two images and with none, each cut before the second question."""

    def cut(sample):
        encoded = processor.encode(sample)
        return split(encoded, int(np.flatnonzero(encoded.tokens == tiny.TOKEN_ID["<|im_start|>"])[2]))

    return [cut(TURNS), cut(TEXT_TURNS)]


@tiny.compiled
def prefill(model, batch, cache):
    return model.prefill(batch, cache)


@tiny.compiled
def decode(model, tokens, cache):
    return model.decode(tokens, cache)


def cached_turns(model, halves, blind: bool = False) -> tuple[list[np.ndarray], KVCache]:
    """Logits of each row's second turn, computed on the cache of the first, and the cache of both."""
    cache = model.init_cache(len(halves), 2 * LENGTH, PATCHES // 2)
    for turn in range(2):
        batch = collate([[row[turn]] for row in halves], length=LENGTH, patches=PATCHES, vision_masked=blind)
        hidden, cache = prefill(model, batch, cache)
    got = model.logits(hidden)
    return [np.asarray(got[i, : len(row[1].tokens)]) for i, row in enumerate(halves)], cache


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_one_pass_and_a_cached_second_turn(models, processor, halves, mask):
    """With "all" the cached first turn could not know the second image, so that one pass must differ."""
    model = models[mask]
    at_once = np.asarray(logits(model, rows(processor, TURNS, TEXT_TURNS)))
    got, cache = cached_turns(model, halves)
    errors = []
    for row, (first, second) in enumerate(halves):
        expected = at_once[row, len(first.tokens) :][: len(second.tokens)]
        errors.append(np.abs(got[row] - expected).max())
    images, text = errors
    assert text < LOGITS
    assert images < LOGITS if mask == "causal" else images > 100 * LOGITS

    joined = sum(len(half.patches) // 4 for half in halves[0])
    assert len(halves[0][1].patches) > 0
    assert (np.asarray(cache.memory_slots) >= 0).sum(axis=1).tolist() == [joined, 0]


def test_a_blind_backbone_is_blind_in_the_cache_too(models, processor, halves):
    """Two turns in a cache and one token more: the logits of one pass with the mask, and not of one without."""
    model, tokens = models["causal"], np.array([5, 6], np.int32)
    got, cache = cached_turns(model, halves, blind=True)
    last = np.asarray(model.logits(decode(model, tokens, cache)[0]))
    answered = [extend(processor.encode(turns), tokens[i : i + 1]) for i, turns in enumerate((TURNS, TEXT_TURNS))]
    blind, sighted = (
        np.asarray(logits(model, collate([[row] for row in answered], length=LENGTH, patches=PATCHES, vision_masked=x)))
        for x in (True, False)
    )
    for row, (first, second) in enumerate(halves):
        end = len(first.tokens) + len(second.tokens)
        np.testing.assert_allclose(got[row], blind[row, len(first.tokens) : end], atol=LOGITS)
        np.testing.assert_allclose(last[row], blind[row, end], atol=LOGITS)
    assert np.abs(last[0] - sighted[0, len(answered[0].tokens) - 1]).max() > 100 * LOGITS


def test_a_row_without_an_image_gets_exactly_nothing(models, processor):
    model = models["causal"]
    batch = rows(processor, TURNS, SHORT)
    opened = np.asarray(logits(model, batch))
    graphdef, state = nnx.split(model)
    closed = nnx.map_state(lambda path, v: v.replace(jnp.zeros_like(v[...])) if path[-1] == "gate_alpha" else v, state)
    shut = np.asarray(logits(nnx.merge(graphdef, closed), batch))
    np.testing.assert_array_equal(opened[1], shut[1])
    assert np.abs(opened[0] - shut[0]).max() > 0.1


# -------------------------------------------------------------------------------------------- the block


def make_block(**changes) -> PVMBlock:
    config = ModelConfig.from_hf(tiny.hf_config(pvm_layers=(1,)))
    block = PVMBlock(Make(nnx.Rngs(0), init="fan_in"), dataclasses.replace(config.pvm, **changes), config.text)
    block.gate_alpha[...] = jnp.ones_like(block.gate_alpha[...])
    return block


@tiny.compiled
def project(block, tokens):
    return block.project(tokens)


@tiny.compiled
def retrieve(block, h, tokens, mask, is_text):
    return block(h, block.project(tokens), mask, is_text)


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_a_query_that_sees_no_memory_gets_exactly_nothing():
    block = make_block()
    mask = jnp.array([[[True] * 6, [False] * 6, [True] * 6]])
    is_text = jnp.array([[True, True, False]])
    out = retrieve(block, normal(1, 1, 3, 64), 1e3 * normal(0, 1, 6, 64), mask, is_text)
    assert jnp.abs(out[0, 0]).max() > 0.1
    np.testing.assert_array_equal(out[0, 1:], 0)


def test_without_silencing_image_tokens_retrieve_as_text_does():
    raw = tiny.hf_config(pvm_layers=(1,))
    assert ModelConfig.from_hf(raw).pvm.silencing
    raw["text_config"]["pvm_silencing"] = False
    assert not ModelConfig.from_hf(raw).pvm.silencing
    mask, h, tokens = jnp.ones((1, 3, 6), bool), normal(1, 1, 3, 64), normal(0, 1, 6, 64)
    as_text = retrieve(make_block(), h, tokens, mask, jnp.ones((1, 3), bool))
    visual = jnp.array([[True, False, False]])
    np.testing.assert_array_equal(retrieve(make_block(silencing=False), h, tokens, mask, visual), as_text)
    assert jnp.abs(as_text).min(axis=-1).max() > 0


def test_retrieval_does_not_depend_on_the_length_of_the_text():
    """A fixed query retrieves the same from 8 and from 800 tokens on; another visual token does change it."""
    block, h, tokens = make_block(), normal(2, 1, 800, 64), normal(3, 1, 7, 64)

    def first_queries(length: int, tokens) -> np.ndarray:
        seen = jnp.ones((1, length, tokens.shape[1]), bool)
        return np.asarray(retrieve(block, h[:, :length], tokens, seen, seen[:, :, 0]))[0, :8]

    few = first_queries(8, tokens)
    np.testing.assert_allclose(first_queries(800, tokens), few, atol=1e-5, rtol=1e-5)
    another = jnp.concatenate([tokens, normal(4, 1, 1, 64)], axis=1)
    assert np.abs(first_queries(8, another) - few).max() > 0.1


def test_slots_ignore_the_image():
    block = make_block(slots=5)
    k, v = project(block, normal(0, 2, 6, 64))
    assert k.shape == v.shape == (2, 1, 5, 16)
    for one, other in zip((k, v), project(block, normal(1, 2, 6, 64))):
        np.testing.assert_array_equal(one, other)


def test_slots_serve_rows_without_an_image(checkpoints, tmp_path, processor):
    """The control of the digits experiment: the branch acts on text-only rows, and no image matters to it."""
    directory = tmp_path / "slots"
    convert_from_hf(checkpoints(), directory, pvm_layers=[5], pvm_hidden_size=tiny.PVM_WIDTH, pvm_slots=3)
    model = load_model(directory, scan=True)
    model.text.layers["5"].pvm_block.gate_alpha[...] = jnp.ones((1, 1))
    batch = jax.tree.map(jnp.asarray, rows(processor, TURNS, SHORT))
    on = logits(model, batch)
    model.text.layers["5"].pvm_block.gate_alpha[...] = jnp.zeros((1, 1))
    off = logits(model, batch)
    assert min(float(jnp.abs(on - off)[i].max()) for i in range(2)) > 0.01


def test_memory_masks():
    """Two packed samples; columns are a v0 b v1 | c v2 d | padding."""
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    masks = {
        kind: np.asarray(
            memory_mask(
                kind,
                jnp.arange(8)[None],
                jnp.asarray(segment_ids),
                jnp.array([[1, 3, 5, -1]]),
                jnp.array([[1, 1, 2, 0]]),
            )
        )[0].astype(int).tolist()
        for kind in ("all", "causal")
    }  # fmt: skip
    none, first = [0, 0, 0, 0], [1, 1, 0, 0]
    assert masks["all"] == [first] * 4 + [[0, 0, 1, 0]] * 3 + [none]
    assert masks["causal"] == [
        none, [1, 0, 0, 0], [1, 0, 0, 0], first, none, [0, 0, 1, 0], [0, 0, 1, 0], none
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------- the sizes


def parameter_count(config: ModelConfig, part: str = "") -> int:
    state = nnx.state(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))), nnx.Param)
    flat = nnx.to_flat_state(state)
    return sum(math.prod(v.shape) for path, v in flat if part in "/".join(map(str, path)))


@pytest.mark.parametrize(("size", "parameters"), [("8B", 27_922_179), ("4B", 22_728_963)])
def test_pvm_parameters_of_the_released_sizes(size, parameters):
    config = ModelConfig.from_hf(released.hf_config(size, pvm=True))
    assert parameter_count(config, "pvm_block") == parameters


@pytest.mark.parametrize("size", ["2B", "4B", "8B", "32B"])
def test_stock_parameters_of_the_released_sizes(size):
    """As many as transformers makes of the same config."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    raw = released.hf_config(size)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(raw))
    expected = sum(p.numel() for p in model.parameters())
    assert parameter_count(ModelConfig.from_hf(raw)) == expected
