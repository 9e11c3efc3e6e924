"""Kernels of TPU and CUDA, and blocks of queries, against the reference: values and gradients, on any machine.

Splash attention runs in Pallas's interpreter. cuDNN cannot run here: its blocks and masks are computed with XLA's
product in its place, and the program with cuDNN in it is lowered for CUDA.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh

from pvm_jax.checkpoint import abstract_model, load_model
from pvm_jax.config import ModelConfig
from pvm_jax.data.packing import collate
from pvm_jax.data.processor import Processor
from pvm_jax.models import attention as attention_module
from pvm_jax.models import attention_kernels
from pvm_jax.models.attention import attention, packed_causal_mask
from pvm_jax.models.attention_kernels import Kernels, Rule, attend, choose, memory_rule, packed_causal_rule, retrieve
from pvm_jax.models.pvm import memory_mask
from pvm_jax.sharding import MESH_AXES, make_mesh
from pvm_jax.training.freeze import Partition
from pvm_jax.training.losses import cross_entropy

ROWS, LENGTH, PATCHES = 4, 256, 128
TOLERANCE = 1e-5  # fp32 modules


@pytest.fixture(scope="module", params=["splash", "cudnn"])
def kernels(request):
    """On a mesh with every axis split; tensor = 2 splits heads."""
    return Kernels(request.param, make_mesh(2, 2, 2), interpret=True)


@pytest.fixture(scope="module")
def batch(processor_dir):
    """Packed rows with images in several samples, of which two are under visual attention dropout."""
    encode, named = Processor.from_pretrained(processor_dir).encode, tiny.conversations()
    rows = [["turns", "short"], ["two_images", "short"], ["video"], ["short", "image", "short"]]
    packed = [[encode(named[name]) for name in row] for row in rows]
    batch = collate(packed, length=LENGTH, patches=PATCHES, vision_masked=[False, True, False, True])
    return jax.tree.map(jnp.asarray, batch)


def arrays(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def value_and_gradients(function, *inputs):
    """Of a fixed random projection of `function(*inputs)`."""

    def total(*inputs):
        out = function(*inputs)
        return jnp.sum(out * jax.random.normal(jax.random.key(9), out.shape)), out

    gradients, out = jax.jit(jax.grad(total, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)
    return [out, *gradients]


def agree(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def test_self_attention_over_packed_samples(kernels, batch):
    real, text = batch.segment_ids > 0, batch.visual_index < 0
    mask = packed_causal_mask(batch.segment_ids, ~text, batch.vision_masked)
    rule = packed_causal_rule(kernels, batch.segment_ids, ~text, batch.vision_masked)
    # Where text does not see images, images do not see text: their rows of the reference are not to be had.
    seen = (real & (text | ~batch.vision_masked[:, None]))[..., None, None]
    inputs = arrays((ROWS, LENGTH, 4, 16), (ROWS, 2, LENGTH, 16), (ROWS, 2, LENGTH, 16))
    got = value_and_gradients(lambda *x: attend(*x, rule) * seen, *inputs)
    agree(got, value_and_gradients(lambda *x: attention(*x, mask) * seen, *inputs))


@pytest.mark.parametrize(("kv_heads", "each"), [(2, 2), (1, 4)])
def test_each_device_has_its_heads(kernels, kv_heads, each, monkeypatch):
    """Four query heads over tensor = 2; all of them on every device where the kv heads do not divide, as PVM's one."""
    seen = []
    kernel = attention_kernels._KERNELS[kernels.kind]

    def spy(q, *rest, **options):
        seen.append(q.shape[2])
        return kernel(q, *rest, **options)

    monkeypatch.setitem(attention_kernels._KERNELS, kernels.kind, spy)
    q, k, v = arrays((ROWS, LENGTH, 4, 16), *2 * [(ROWS, kv_heads, LENGTH, 16)])
    ids = jnp.ones((ROWS, LENGTH), int)
    jax.eval_shape(lambda *x: attend(*x, Rule(ids, ids, True, kernels)), q, k, v)
    assert seen == [each]


@pytest.mark.parametrize("kind", ["causal", "all"])
def test_retrieval_from_memory(kernels, batch, kind):
    columns = jnp.broadcast_to(jnp.arange(LENGTH), batch.tokens.shape)
    mask = memory_mask(kind, columns, batch.segment_ids, batch.memory_index, batch.memory_segment_ids)
    rule = memory_rule(
        kernels, kind, batch.segment_ids, batch.visual_index, batch.memory_index, batch.memory_segment_ids
    )
    np.testing.assert_array_equal(rule.sees, mask.any(axis=-1))
    assert 0 < mask.any(axis=-1).mean() < 1
    memory = (ROWS, 1, PATCHES // 4, 16)
    inputs = arrays((ROWS, LENGTH, 2, 16), memory, memory)
    got = value_and_gradients(lambda *x: retrieve(*x, rule), *inputs)
    agree(got, value_and_gradients(lambda *x: retrieve(*x, mask), *inputs))


def test_images_of_a_row(kernels, batch):
    """Head width 72, the large towers'."""
    ids = jnp.asarray(batch.patch_segment_ids)
    inputs = arrays(*[(ROWS, PATCHES, 2, 72), (ROWS, 2, PATCHES, 72), (ROWS, 2, PATCHES, 72)])
    got = value_and_gradients(lambda *x: attend(*x, Rule(ids, ids, False, kernels)), *inputs)
    agree(got, value_and_gradients(lambda *x: attention(*x, ids[:, :, None] == ids[:, None, :]), *inputs))


def test_several_blocks(monkeypatch):
    """Block boundaries: 256 columns in blocks of 128."""
    monkeypatch.setattr(attention_kernels, "_SPLASH_BLOCKS", (128,))
    monkeypatch.setattr(attention_kernels, "_CUDNN_BLOCK", 128)
    ids = jnp.repeat(jnp.array([[1, 2, 3, 0]]), jnp.array([50, 90, 110, 6]), axis=1, total_repeat_length=256)
    inputs = arrays((1, 256, 2, 16), (1, 1, 256, 16), (1, 1, 256, 16))
    mask = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((256, 256), bool))
    want = value_and_gradients(lambda *x: attention(*x, mask), *inputs)
    for kind in ("splash", "cudnn"):
        mesh = make_mesh(devices=jax.devices()[:1])
        rule = Rule(ids, ids, True, Kernels(kind, mesh, interpret=True))
        agree(value_and_gradients(lambda *x, rule=rule: attend(*x, rule), *inputs), want)


@pytest.fixture(scope="module")
def losses(pvm_checkpoint, batch):
    """Loss and PVM's gradients of a whole model, by kernels."""
    model = load_model(pvm_checkpoint, scan=True, remat=True, mesh=make_mesh(2, 2, 2))

    def compute(kernels):
        model.attention = kernels
        partition = Partition(model, (("pvm_block/", True), ("", False)))

        def loss(trainable, frozen):
            model = partition.merge(trainable, frozen)
            total, count, _ = cross_entropy(model.logits, model(batch), batch.tokens, batch.loss_weights, chunk=64)
            return total / count

        return jax.jit(jax.value_and_grad(loss))(*partition.split(model))

    return compute


def test_the_whole_model(losses, kernels):
    got, want = losses(kernels), losses(None)
    np.testing.assert_allclose(got[0], want[0], rtol=TOLERANCE)
    for name, gradient in want[1].items():
        np.testing.assert_allclose(got[1][name], gradient, atol=1e-4 * float(jnp.abs(gradient).max()), err_msg=name)


def test_the_kernel_follows_from_the_platform():
    mesh = make_mesh(1, 8, 1)
    kinds = {platform: choose("auto", platform, mesh) for platform in ("cpu", "tpu", "cuda", "gpu")}
    assert kinds["cpu"] is None and kinds["tpu"] == Kernels("splash", mesh)
    assert kinds["cuda"] == kinds["gpu"] == Kernels("cudnn", mesh)
    assert choose("auto", "cuda", mesh, jnp.float32) is None, "cuDNN has no fp32"
    assert choose("xla", "tpu", mesh) is None and choose("splash", "cpu", mesh).kind == "splash"


def test_sizes_that_do_not_fit_are_said(caplog):
    kernels = Kernels("splash", make_mesh(1, 8, 1))
    assert kernels.fit(8, 128, 256) and not caplog.messages
    assert not kernels.fit(8, 320)
    assert not kernels.fit(4, 128)
    assert "8 rows of 320 use the XLA reference" in caplog.messages[0]
    assert "multiples of 128" in caplog.messages[0]


@pytest.mark.parametrize(
    ("kind", "platform", "target"), [("splash", "tpu", "tpu_custom_call"), ("cudnn", "cuda", "__cudnn$fmha")]
)
def test_lowering_for_accelerators_has_no_square_matrix(monkeypatch, kind, platform, target):
    """16,384 columns on 256 devices, forward and backward; nothing is compiled."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    length, rows = 16384, 64
    kernels = Kernels(kind, AbstractMesh((1, 64, 4), MESH_AXES))
    ids = jnp.zeros((rows, length), jnp.int32)
    keys = jax.ShapeDtypeStruct((rows, 8, length, 128), jnp.bfloat16)
    queries = jax.ShapeDtypeStruct((rows, length, 32, 128), jnp.bfloat16)

    def total(q, k, v):
        return attend(q, k, v, Rule(ids, ids, True, kernels)).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(queries, keys, keys)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert target in text
    assert f"{length}x{length}x" not in text


@pytest.mark.parametrize("kind", ["splash", "cudnn"])
def test_the_backward_pass_keeps_no_square_matrix(kind):
    """Nor the blocks of one, which together are as large."""
    length, mesh = 4096, make_mesh(devices=jax.devices()[:1])
    ids = jnp.zeros((1, length), jnp.int32)
    rule = Rule(ids, ids, True, Kernels(kind, mesh, interpret=True))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, length, 1, 64), *[(1, 1, length, 64)] * 2]]
    traced = jax.make_jaxpr(jax.grad(lambda *x: attend(*x, rule).sum(), argnums=(0, 1, 2)))(*inputs)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[(\d[\d,]*)\]", str(traced))]
    assert length * 64 <= max(sizes) < length**2


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("kind", ["mask", "ids"])
def test_reference_in_blocks_of_queries(kind, platform, monkeypatch):
    """640 queries of two heads per key head, in five blocks, are the same as at once; ids are a mask."""
    choose = lambda *args, **branches: branches[platform](*args)  # noqa: E731
    ids = jnp.repeat(jnp.array([[1, 2, 3], [1, 1, 0]]), jnp.array([250, 330, 60]), axis=1, total_repeat_length=640)
    dense = ids[:, :, None] == ids[:, None, :]
    mask = dense if kind == "mask" else attention_module.SameId(ids, ids)
    inputs = arrays((2, 640, 4, 16), (2, 2, 640, 16), (2, 2, 640, 16))
    want = value_and_gradients(lambda *x: attention(*x, dense), *inputs)
    monkeypatch.setattr(attention_module, "_LONG", 512)
    monkeypatch.setattr(attention_module.jax.lax, "platform_dependent", choose)
    agree(value_and_gradients(lambda *x: attention(*x, mask), *inputs), want)


def test_ids_are_never_a_whole_mask():
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 2, 4096, 16), jnp.float32)
    whole = re.compile(r"\[[\d,]*4096,4096\]")
    by_ids = jax.make_jaxpr(lambda q, k, v, i: attention(q, k, v, attention_module.SameId(i, i)))(x, kv, kv, ids)
    by_mask = jax.make_jaxpr(lambda q, k, v, i: attention(q, k, v, i[:, :, None] == i[:, None]))(x, kv, kv, ids)
    assert whole.search(str(by_mask)) and not whole.search(str(by_ids))


def test_the_vision_tower_never_has_a_whole_mask(batch):
    """4,096 patches of a row with the reference, forward and backward."""
    graphdef, state = nnx.split(abstract_model(ModelConfig.from_hf(tiny.hf_config()), remat=True))
    names = ("patches", "patch_segment_ids", "patch_coords", "pos_index", "pos_weight")
    wide = {name: getattr(batch, name) for name in names}
    wide = {name: jax.ShapeDtypeStruct((1, 4096, *x.shape[2:]), x.dtype) for name, x in wide.items()}

    def total(state, batch):
        return nnx.merge(graphdef, state).encode_images(batch).tokens.sum()

    traced = str(jax.make_jaxpr(jax.grad(total))(state, dataclasses.replace(batch, **wide)))
    assert "4096,128]" in traced or "128,4096]" in traced or "512,4096]" in traced, "scores of a block"
    assert not re.search(r"\[[\d,]*4096,4096\]", traced)
