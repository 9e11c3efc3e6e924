"""Attention, retrieval and the logit lens as measured, against transformers and PVM's equations in torch.

Tolerances: 1e-5 absolute on masses, maps and probabilities (matmul precision "highest").
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pvm_reference
import pytest
import tiny
import torch
from flax import nnx
from torch.nn import functional as F

from pvm_jax.analysis import dilution, logit_lens, texts, walk
from pvm_jax.analysis.tracing import trace
from pvm_jax.checkpoint import load_model
from pvm_jax.data.processor import Processor
from pvm_jax.models.attention import attention_weights
from pvm_jax.models.decoder import Context
from pvm_jax.models.stack import unstack
from pvm_jax.planning.hlo import Program
from pvm_jax.sharding import batch_shardings, make_mesh

CLOSE = 1e-5
WINDOW = 48
SAMPLES = {
    name: tiny.conversations()[name] | {"id": name} for name in ("image", "two_images", "turns", "video", "short")
} | {
    "text_before": {
        "id": "text_before",
        "messages": [tiny.user(tiny.text(40, 30), tiny.image(41, 75, 141), "what is it?"), tiny.assistant("one two")],
    }
}
WITH_IMAGES = tuple(name for name in SAMPLES if name != "short")


@pytest.fixture(scope="module")
def processor(processor_dir):
    return Processor.from_pretrained(processor_dir)


@pytest.fixture(scope="module")
def model(pvm_checkpoint):
    return load_model(pvm_checkpoint, scan=True)


@pytest.fixture(scope="module")
def sources(processor):
    return texts.read(processor, list(SAMPLES.values()))


@pytest.fixture(scope="module")
def traces(model, sources):
    return {t.text.name: t for t in trace(model, sources, heads=True, rows=len(sources), window=WINDOW)}


@dataclasses.dataclass
class Expected:
    """What torch computes for one conversation, at the queries of its answer (columns - 1)."""

    attention: np.ndarray  # [L,N,T,C] self-attention's weights on all tokens
    hidden: torch.Tensor  # [L,T,D] behind each layer, the last one normed
    residual: dict[int, torch.Tensor]  # PVM layer -> [C,D] what its query is made of
    memory: torch.Tensor  # [M,D]
    visible: np.ndarray  # [T,M]


@pytest.fixture(scope="module")
def oracle_model(pvm_checkpoint):
    return pvm_reference.load(pvm_checkpoint)


@torch.no_grad()
def compute(torch_model, checkpoint, name: str, at: np.ndarray) -> Expected:
    torch_model.model.rope_deltas = None
    inputs = oracle.inputs(checkpoint, SAMPLES[name])
    out = torch_model(**inputs, output_attentions=True, output_hidden_states=True)
    language = torch_model.model.language_model
    seen = (torch_model.memory_columns[None] <= torch_model.columns[:, None]).numpy()[at]
    return Expected(
        attention=np.stack([layer[0].numpy() for layer in out.attentions])[:, :, at],
        hidden=torch.stack([layer[0] for layer in out.hidden_states[1:]])[:, at],
        residual={i: language.layers[i].residual[0] for i in tiny.PVM_LAYERS},
        memory=torch_model.memory,
        visible=seen if torch_model.causal_memory else np.ones_like(seen),
    )


@pytest.fixture(scope="module")
def expected(pvm_checkpoint, oracle_model, traces):
    return functools.cache(lambda name: compute(oracle_model, pvm_checkpoint, name, traces[name].text.columns - 1))


# ------------------------------------------------------------------------------------- self-attention


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_attention_is_that_of_transformers(traces, expected, name):
    got, want = traces[name], expected(name).attention
    visual = got.text.visual_index >= 0
    assert visual.sum() == got.text.visual_tokens > 4
    mass = want[..., visual].sum(axis=-1)
    assert mass.std() > 0.05, "attention that could hide a mistake"
    np.testing.assert_allclose(got.dilution.visual_mass, mass, atol=CLOSE, rtol=0)
    np.testing.assert_allclose(got.dilution.tvr, want[..., ~visual].sum(axis=-1) / mass, rtol=CLOSE)
    np.testing.assert_allclose(got.maps.attention_heads, want[..., visual], atol=CLOSE, rtol=0)
    np.testing.assert_allclose(got.maps.attention, want[..., visual].mean(axis=1), atol=CLOSE, rtol=0)


def test_a_text_keeps_no_others_padding(traces):
    assert len({got.text.visual_tokens for got in traces.values()}) > 2, "which were measured together"
    for got in traces.values():
        for map_of in vars(got.maps).values():
            assert map_of.shape[-1] == got.text.visual_tokens
            assert (map_of if map_of.base is None else map_of.base).nbytes == map_of.nbytes


def test_a_query_next_door_is_another(traces, expected):
    """The comparison above would see an answer that is measured one column too late."""
    got, want = traces["image"], expected("image").attention
    mass = want[..., got.text.visual_index >= 0].sum(axis=-1)
    assert np.abs(got.dilution.visual_mass[..., 1:] - mass[..., :-1]).max() > 100 * CLOSE


def test_text_window_hides_an_answers_own_text(model, sources, expected):
    """In the first layer, whose queries and keys do not depend on what is seen, weights are shared out anew."""
    (source,) = (s for s in sources if s.text.name == "turns")
    near, own = 3, source.text
    (got,) = trace(model, [source], maps=False, lens=False, text_window=near, window=WINDOW)
    places, queries = np.arange(len(own.ids)), own.columns[:, None] - 1
    visible = (own.visual_index >= 0) | (places < own.columns[0]) | (places > queries - near)
    weights = expected("turns").attention[0] * visible
    mass = weights[..., own.visual_index >= 0].sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(got.dilution.visual_mass[0], mass, atol=CLOSE, rtol=0)
    assert np.abs(mass - expected("turns").attention[0][..., own.visual_index >= 0].sum(-1)).max() > 100 * CLOSE


# --------------------------------------------------------------------------------------------- PVM


@torch.no_grad()
def retrieval(block, h: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor) -> np.ndarray:
    """softmax_V(q k^T / sqrt(H)) of PVM's equations; h [T,D] -> [R,T,M]."""
    attn, dim = block.cross_attn, block.head_dim
    q = attn["q_norm"](attn["q_proj"](block.input_norm(block.text_reducer(h))).unflatten(-1, (-1, dim)))
    k = attn["k_norm"](attn["k_proj"](block.vision_reducer(memory)).unflatten(-1, (-1, dim)))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("trh,mrh->rtm", q, k) / dim**0.5
    return torch.nan_to_num(scores.masked_fill(~visible, -torch.inf).softmax(-1)).numpy()


def check_retrieval(got, want: Expected, torch_model) -> None:
    assert got.pvm_layers == tiny.PVM_LAYERS
    for p, i in enumerate(got.pvm_layers):
        block = torch_model.model.language_model.layers[i].pvm_block
        at = torch.from_numpy(got.text.columns - 1).long()
        weights = retrieval(block, want.residual[i][at], want.memory, torch.from_numpy(want.visible))
        np.testing.assert_allclose(got.maps.retrieval[p], weights, atol=CLOSE, rtol=0)
        entropy = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-30)), 0), axis=-1)
        np.testing.assert_allclose(got.dilution.pvm_entropy[p], entropy, atol=10 * CLOSE, rtol=0)
    np.testing.assert_array_equal(got.dilution.pvm_choices, want.visible.sum(axis=-1))


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_retrieval_is_that_of_the_equations(traces, expected, oracle_model, name):
    check_retrieval(traces[name], expected(name), oracle_model)


def test_retrieval_through_the_release_s_memory_mask(checkpoints, processor, expected):
    """With `all`, also from the image of a later turn."""
    checkpoint = checkpoints(pvm_layers=tiny.PVM_LAYERS, memory_mask="all")
    sources = texts.read(processor, [SAMPLES["turns"]])
    (got,) = trace(load_model(checkpoint, scan=True), sources, heads=True, lens=False, window=WINDOW)
    torch_model = pvm_reference.load(checkpoint)
    want = compute(torch_model, checkpoint, "turns", got.text.columns - 1)
    check_retrieval(got, want, torch_model)
    assert got.maps.retrieval[..., ~expected("turns").visible].max() > 0.1, "what `causal` hides"


def test_the_share_of_pvm(traces, expected, oracle_model):
    got, want = traces["turns"], expected("turns")
    at = torch.from_numpy(got.text.columns - 1).long()
    for p, i in enumerate(got.pvm_layers):
        layer = oracle_model.model.language_model.layers[i]
        h = want.residual[i][at]
        with torch.no_grad():
            branch = layer.pvm_block(h, want.memory, torch.from_numpy(want.visible))
            # Without the hook that adds the branch.
            x = pvm_reference.rms(h) * layer.post_attention_layernorm.weight
            ffn = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        ratio = (branch.norm(dim=-1) / ffn.norm(dim=-1)).numpy()
        assert ratio.min() > 0.1
        np.testing.assert_allclose(got.dilution.pvm_ratio[p], ratio, rtol=1e-4)


def test_retrieval_adds_up_to_one_over_what_the_mask_shows(traces, expected):
    for name in WITH_IMAGES:
        maps, visible = traces[name].maps.retrieval, expected(name).visible
        sums = np.where(visible, maps, 0).sum(axis=-1)
        np.testing.assert_allclose(sums, 1, atol=CLOSE, err_msg=name)
        assert not np.where(visible, 0, maps).any(), name
    assert not expected("turns").visible.all(), "an image that comes later would show a hole in the mask"


def test_appended_text_changes_no_retrieval(model, processor, traces):
    """In a whole model: what a token retrieves does not depend, to the bit, on how the text goes on."""
    question, answer = SAMPLES["two_images"]["messages"][:-1], SAMPLES["two_images"]["messages"][-1]["content"]
    longer = {"messages": [*question, tiny.assistant(answer + " and then" + tiny.text(50, 12))]}
    before = traces["two_images"]
    # In the place of the first, so that the program is the same.
    sources = texts.read(processor, [SAMPLES["image"], longer, *list(SAMPLES.values())[2:]])
    after = trace(model, sources, heads=True, rows=len(sources), window=WINDOW)[1]
    same = int(np.cumprod(before.text.ids == after.text.ids[: len(before.text.ids)]).sum())
    keep = int((before.text.columns < same).sum())
    assert keep > 20 and len(after.text.columns) > len(before.text.columns)
    np.testing.assert_array_equal(after.maps.retrieval[:, :, :keep], before.maps.retrieval[:, :, :keep])
    np.testing.assert_array_equal(after.dilution.pvm_entropy[:, :, :keep], before.dilution.pvm_entropy[:, :, :keep])


def test_a_fixed_query_retrieves_the_same_however_long_the_text(model):
    """Theorem 4.1 as the paper states it: the query is held, the text before it grows. The contrast: self-attention.

    Exactly, in one compiled shape: a shorter text has padding before it.
    """
    layer = unstack(model.text.layers["4"])
    block, attn = layer.pvm_block, layer.self_attn
    rng = np.random.default_rng(0)
    query, image = (rng.normal(size=(1, n, 64)).astype(np.float32) for n in (1, 7))
    memory = block.project(jnp.asarray(image))

    @jax.jit
    def retrieve(h, real):
        """Its weights on the image [N,7], and what the branch adds [D]."""
        visible = jnp.broadcast_to(real[..., None], (*real.shape, 7))
        weights = attention_weights(block.queries(h), memory[0], visible)
        return weights[0, -1], block(h, memory, visible, real)[0, -1]

    @jax.jit
    def attend(h, real):
        """Its weights on the image [N,7], without rotation, so that nothing but the number of keys changes."""
        seen, mask = {}, jnp.tril(jnp.ones((1, h.shape[1], h.shape[1]), bool)) & real[:, None]
        cos = jnp.ones((1, h.shape[1], attn.q_norm.shape[-1] // 2))
        attn(h, Context(cos, 0 * cos, mask, mask[:, -1], None, None, seen.update), None)
        return attention_weights(seen["queries"][:, -1:], seen["keys"], mask[:, -1:])[0, 0, :, :7]

    def looked(text: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        h = np.concatenate([rng.normal(size=(1, 900, 64)).astype(np.float32), query], axis=1)
        real = np.arange(901)[None] >= 900 - text
        with_image = np.concatenate([np.ones((1, 7), bool), real], axis=1)
        found = *retrieve(h, real), attend(np.concatenate([image, h], axis=1), with_image)
        return tuple(map(np.asarray, found))

    (short, added, near), *others, (long, also, far) = looked(40), looked(40), looked(300), looked(900)
    for weights, branch in ((long, also), *((weights, branch) for weights, branch, _ in others)):
        np.testing.assert_array_equal(weights, short)
        np.testing.assert_array_equal(branch, added)
    assert np.abs(added).max() > 0.1 and short.max() > 0.2
    assert (far.sum(axis=-1) < 0.2 * near.sum(axis=-1)).all() and near.sum(axis=-1).min() > 0.02


def test_gates_at_zero_are_the_backbone(model, oracle_model, pvm_checkpoint, traces, sources):
    silent = trace(model, sources, heads=True, rows=len(sources), window=WINDOW, silence_pvm=True)
    gates = [oracle_model.model.language_model.layers[i].pvm_block.gate_alpha for i in tiny.PVM_LAYERS]
    opened = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
        oracle_model.model.rope_deltas = None
        out = oracle_model(**oracle.inputs(pvm_checkpoint, SAMPLES["image"]), output_attentions=True)
        for gate, value in zip(gates, opened):
            gate.copy_(value)
    got, visual = silent[0], silent[0].text.visual_index >= 0
    mass = np.stack([layer[0].numpy() for layer in out.attentions])[:, :, got.text.columns - 1][..., visual].sum(-1)
    np.testing.assert_allclose(got.dilution.visual_mass, mass, atol=CLOSE, rtol=0)
    assert got.pvm_silenced and not got.dilution.pvm_ratio.any()
    changed = np.abs(got.dilution.visual_mass - traces["image"].dilution.visual_mass).max(axis=(1, 2))
    first = tiny.PVM_LAYERS[0]
    assert not changed[: first + 1].any() and changed[first + 1 :].min() > 100 * CLOSE


def test_a_checkpoint_without_pvm(stock_checkpoint, sources):
    [got] = trace(load_model(stock_checkpoint, scan=True), sources[:1], lens=False, window=WINDOW)
    assert got.pvm_layers == () and got.lens is None
    assert got.dilution.pvm_entropy is got.dilution.pvm_ratio is got.maps.retrieval is None
    assert any("has no PVM" in note for note in got.notes)


# --------------------------------------------------------------------------------------- logit lens


@tiny.compiled
def logits(model, batch):
    return model.logits(model(batch))


def assert_rank(rank, p, of) -> None:
    """`of` [...] has this rank among `p` [..., V]; tokens as probable but for rounding may stand on either side."""
    above, beside = ((p > of[..., None] * factor).sum(axis=-1) for factor in (1 + CLOSE, 1 - CLOSE))
    assert ((above + 1 <= rank) & (rank <= beside)).all() and (beside - above).mean() < 1.1


def test_the_last_layer_of_the_lens_is_the_model(model, processor, traces):
    batch = processor(list(SAMPLES.values()))
    distribution = np.asarray(jax.nn.softmax(logits(model, batch)))
    for row, got in enumerate(traces.values()):
        p = distribution[row, got.text.columns - 1]
        each, given = np.arange(len(p)), got.text.ids[got.text.columns]
        np.testing.assert_array_equal(got.lens.predicted, p.argmax(axis=1))
        np.testing.assert_array_equal(got.lens.token[-1], p.argmax(axis=1))
        np.testing.assert_allclose(got.lens.probability[-1], p.max(axis=1), atol=CLOSE, rtol=0)
        np.testing.assert_allclose(got.lens.given_probability[-1], p[each, given], atol=CLOSE, rtol=0)
        assert_rank(got.lens.given_rank[-1], p, p[each, given])
        assert (got.lens.rank[-1] == 1).all() and np.abs(got.lens.kl[-1]).max() < CLOSE


@pytest.mark.parametrize("name", ("two_images", "video"))
def test_every_layer_of_the_lens(traces, expected, oracle_model, name):
    got, hidden = traces[name], expected(name).hidden
    norm = oracle_model.model.language_model.norm
    with torch.no_grad():
        normed = torch.stack([*(norm(h) for h in hidden[:-1]), hidden[-1]])
        log_p = oracle_model.lm_head(normed).log_softmax(-1)
    final, token = log_p[-1], torch.from_numpy(got.lens.predicted).long()
    of_token = log_p.gather(-1, token.expand(len(log_p), -1)[..., None])
    np.testing.assert_allclose(got.lens.probability, of_token[..., 0].exp(), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(got.lens.kl, (final.exp() * (final - log_p)).sum(-1), atol=1e-4, rtol=0)
    assert_rank(got.lens.rank, log_p.exp().numpy(), of_token[..., 0].exp().numpy())
    np.testing.assert_array_equal(got.lens.token, log_p.argmax(-1))
    for j, layer in enumerate(got.lens.settled):
        assert (got.lens.token[layer:, j] == got.lens.predicted[j]).all()
        assert layer == 0 or got.lens.token[layer - 1, j] != got.lens.predicted[j]


def test_settled():
    token = np.array([[5, 5, 1, 3], [5, 2, 2, 4], [5, 5, 3, 4]])
    np.testing.assert_array_equal(logit_lens.settled(token), [0, 2, 2, 1])


# ------------------------------------------------------------------------------ windows, mesh, memory


def assert_same(a, b, atol=CLOSE) -> None:
    """All numbers of two traces. Ranks are counts: two logits that are equal up to rounding may change places."""
    for part in ("dilution", "lens", "maps"):
        ours, theirs = getattr(a, part), getattr(b, part)
        for field in dataclasses.fields(ours):
            x, y = getattr(ours, field.name), getattr(theirs, field.name)
            if (
                isinstance(x, np.ndarray) and "rank" in field.name
            ):  # of tokens as probable as each other, rounding decides
                assert np.abs(x - y).max() <= 1 and (x != y).mean() < 0.05
            elif isinstance(x, np.ndarray):
                np.testing.assert_allclose(x, y, atol=atol, rtol=CLOSE, err_msg=f"{part}.{field.name}")


def test_windows_equal_one_pass(model, sources, traces):
    """Three windows, with answers that begin in one and end in another, against a single one; and rows one by one."""
    for got in trace(model, sources[1:3], heads=True, rows=1, window=3 * WINDOW):
        assert len(got.text.ids) > 2 * WINDOW
        assert_same(got, traces[got.text.name])


def test_a_mesh_measures_what_one_device_measures(pvm_checkpoint, sources, traces):
    spread = load_model(pvm_checkpoint, scan=True, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    for got in trace(spread, sources, heads=True, rows=len(sources), window=WINDOW):
        assert_same(got, traces[got.text.name])


def test_a_mesh_gathers_the_head_once(small_checkpoint, processor):
    """Not in every call of the lens, of which there is one for each layer and one for the model's own distribution."""
    mesh = make_mesh(fsdp=8)
    model = load_model(small_checkpoint, scan=True, mesh=mesh)
    graph, params = nnx.split(model)
    rows = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        processor([SAMPLES["image"]] * 8, length=2 * WINDOW),
        batch_shardings(mesh),
    )
    entered, pairs = walk._enter.lower(graph, params, rows, mesh=mesh).out_info
    start, gathered = jax.ShapeDtypeStruct((), jnp.int32), []
    for lens in (False, True):
        wanted = walk.Wanted(lens=lens, maps=False)
        lowered = walk.pass_window.lower(graph, params, entered, pairs, start, length=WINDOW, wanted=wanted, mesh=mesh)
        gathered.append(Program(lowered.compile().as_text()).collectives()["all-gather"])
    head = 4 * model.config.text.vocab_size * model.config.text.hidden_size
    assert gathered[1] - gathered[0] == pytest.approx(head, rel=0.01)


def test_memory_is_linear_in_the_length(small_checkpoint, processor):
    """By the compiled program's own account, and no array of any of the programs has two axes as long as the text."""
    graph, params = nnx.split(load_model(small_checkpoint, scan=True))
    sizes = []
    for length in (2064, 16512):
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), processor([SAMPLES["image"]], length=length)
        )
        enter = walk._enter.lower(graph, params, batch, mesh=None)
        entered, pairs = enter.out_info
        start, wanted = jax.ShapeDtypeStruct((), jnp.int32), walk.Wanted(lens=False)
        passing = walk.pass_window.lower(graph, params, entered, pairs, start, length=WINDOW, wanted=wanted, mesh=None)
        for lowered in (enter, passing):
            assert f"x{length}x" in lowered.as_text() and not re.search(rf"{length}x(\d+x)*{length}", lowered.as_text())
        memory = passing.compile().memory_analysis()
        sizes.append(memory.temp_size_in_bytes + memory.argument_size_in_bytes)
    assert sizes[1] < 8.2 * sizes[0], sizes
    assert sizes[1] < 16512 * WINDOW * 4 * 4 * 8, sizes  # a few times one layer's scores of four heads


def test_fit(traces):
    """The fits of a trace are over text tokens, by layer and of the mean."""
    assert traces["turns"].dilution.fit.last == 92 and traces["turns"].dilution.fit.exponent < 0
    got = traces["image"]
    assert got.dilution.fit is None and got.dilution.no_fit in " ".join(got.notes)
    t = np.arange(10, 400)
    mass = np.stack([np.full((2, 390), 0.3 / t**0.5), np.full((2, 390), 0.1 / t)]).astype(np.float32)
    fits = dilution.fit_masses(t, mass)
    np.testing.assert_allclose([fit.exponent for fit in fits.fits], [-0.5, -1], atol=1e-5)
    assert -1 < fits.fit.exponent < -0.5 and fits.no_fit is None
