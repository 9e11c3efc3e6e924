"""Generation where the model lies: the same tokens on a mesh as on one device, cache and visual memory spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from pvm_jax import decoding
from pvm_jax.checkpoint import abstract_model, load_model
from pvm_jax.config import ModelConfig
from pvm_jax.data.processor import Processor
from pvm_jax.decoding_weights import for_decoding
from pvm_jax.evals.scoring import make_scorer
from pvm_jax.generate import encode, make_batch
from pvm_jax.models.cache import cache_shardings, take_cache_rows
from pvm_jax.planning.hlo import Program
from pvm_jax.sampling import Sampling, row_keys
from pvm_jax.sharding import make_mesh

ROWS = 4
SHAPE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def prompts(small_checkpoint):
    """Two rows with an image, two without, of different lengths."""
    processor = Processor.from_pretrained(small_checkpoint, max_pixels=4096)
    questions = [[tiny.user(*([tiny.image(i, 64, 64)] * (i % 2)), tiny.text(i, 4 + 3 * i))] for i in range(ROWS)]
    return make_batch(encode(processor, questions))


@pytest.fixture(scope="module")
def models(small_checkpoint):
    return load_model(small_checkpoint, scan=True), load_model(small_checkpoint, scan=True, mesh=make_mesh(**SHAPE))


def test_a_mesh_generates_what_one_device_generates(models, prompts):
    alone, spread = (decoding.complete(model, prompts, max_new_tokens=5) for model in models)
    np.testing.assert_array_equal(spread.tokens, alone.tokens)
    np.testing.assert_allclose(spread.logprobs, alone.logprobs, atol=1e-5)


def test_gathered_weights_draw_the_same_and_none_is_moved(models, prompts, monkeypatch):
    """As a rollout lays them out: whole over `fsdp`. What a step moves are activations of the device's two rows."""
    alone, spread = models
    drawing = for_decoding(spread)
    shares = {
        "/".join(map(str, path)): x[...].addressable_shards[0].data.size / x[...].size
        for path, x in nnx.to_flat_state(nnx.state(drawing))
    }
    assert min(share for name, share in shares.items() if not name.startswith("visual/")) == 1 / 2, "over `tensor`"
    assert shares["text/embed_tokens"] == 1 / 2 and min(shares.values()) == 1 / 4, "the tower is read once"

    texts, decode = [], decoding.decode

    def recorded(*args, **options):
        texts.append(decode.trace(*args, **options).lower().compile().as_text())
        return decode(*args, **options)

    monkeypatch.setattr(decoding, "decode", recorded)
    want, made = (decoding.complete(model, prompts, max_new_tokens=5) for model in (alone, drawing))
    np.testing.assert_array_equal(made.tokens, want.tokens)
    np.testing.assert_allclose(made.logprobs, want.logprobs, atol=1e-5)
    moved = Program(texts[-1]).collectives()
    assert moved["all-reduce"] > 0 and max(moved.values()) < 16 * 1024, f"layers have 96 KiB: {moved}"


def test_cache_and_memory_are_spread(models, prompts):
    """A quarter of the rows on each device, and of the keys and values one of the two heads."""
    model = models[1]
    mesh = make_mesh(**SHAPE)
    switches, settings = decoding.make_settings(model, Sampling(), (), ())
    graph, params = nnx.split(model)
    keys, limit = row_keys(0, ROWS), np.int32(4)
    prompt = prompts.tokens.shape[1]
    state, *_ = decoding.prefill(
        graph, params, prompts, keys, settings, switches=switches, capacity=prompt + 64, mesh=mesh
    )
    before = jax.tree.map(lambda x: x.sharding, state)
    assert_spread(state)
    state, *_ = decoding.decode(graph, params, state, limit, settings, switches=switches, mesh=mesh)
    assert_spread(state)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, before)
    assert all(jax.tree.leaves(same)), f"what moves is not updated in place: {same}"


def test_answers_to_a_prompt_lie_where_it_does(models, prompts):
    """Four of them move what one moves, but for their tokens: nothing of the cache."""
    model, mesh = models[1], make_mesh(**SHAPE)
    switches, settings = decoding.make_settings(model, Sampling(), (), ())

    def moved(samples: int) -> dict[str, float]:
        given = (*nnx.split(model), prompts, row_keys(0, ROWS * samples), settings)
        static = {"switches": switches, "capacity": 128, "samples": samples, "mesh": mesh}
        return Program(decoding.prefill.lower(*given, **static).compile().as_text()).collectives()

    assert moved(4) == pytest.approx(moved(1), abs=512), "one answer's keys in a layer have 16 KiB"


def test_rows_to_go_on_with_change_devices_a_layer_at_a_time():
    """All layers at once would lie whole on every device."""
    config, mesh, keep = ModelConfig.from_hf(tiny.hf_config()), make_mesh(**SHAPE), jnp.array([5, 2, 7, 4])
    empty, tree = jax.tree.flatten(abstract_model(config, scan=True).init_cache(8, 1024, 4))
    filled = [(100 * jax.random.uniform(jax.random.key(i), x.shape)).astype(x.dtype) for i, x in enumerate(empty)]
    cache = jax.tree.unflatten(tree, filled)
    assert max(x.ndim for x in jax.tree.leaves(cache.keys)) == 5, "several layers in one array"

    @jax.jit
    def take(cache, rows):
        taken = take_cache_rows(cache, rows, config, True, mesh)
        return jax.lax.with_sharding_constraint(taken, cache_shardings(config, True, len(keep), mesh))

    program = take.lower(jax.device_put(cache, cache_shardings(config, True, 8, mesh)), keep).compile()
    of_a_layer = len(keep) * 2 * 1024 * 16 * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * of_a_layer, "keys, then values"
    got = program(jax.device_put(cache, cache_shardings(config, True, 8, mesh)), keep)
    want = take_cache_rows(cache, keep, config, True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(want.memory_slots, cache.memory_slots[keep])


def assert_spread(state: decoding.State) -> None:
    def share(x: jax.Array) -> float:
        return x.addressable_shards[0].data.size / x.size

    for x in jax.tree.leaves((state.cache.keys, state.cache.values)):
        assert share(x) == 1 / 8
    for x in (*jax.tree.leaves(state.cache.memory), state.cache.valid, state.cache.memory_slots):
        assert share(x) == 1 / 4


def test_scores_are_those_of_one_device(models, prompts):
    mesh = make_mesh(**SHAPE)
    order = np.roll(np.arange(ROWS), 1)
    alone, spread = make_scorer(models[0])(prompts, order), make_scorer(models[1], mesh)(prompts, order)
    np.testing.assert_array_equal(np.asarray(spread), np.asarray(alone))
    assert spread.is_fully_replicated
