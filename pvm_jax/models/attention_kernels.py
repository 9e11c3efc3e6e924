"""Fast attention: splash attention (Pallas) on TPU, cuDNN on CUDA GPUs; the reference is `attention.py`.

Neither ever holds a [T,S] matrix of scores or booleans. What a query may see is a rule about ids instead of a mask:

    query t sees key s   if   query_ids[t] == key_ids[s]   and, where causal,   s <= t

Three masks of the model are such rules:

  * packed self-attention: the ids are the samples'. In rows under visual attention dropout, text and image tokens of a
    sample get different ids, so that text does not see images. In these rows image tokens do not see text either, which
    the reference lets them: their hidden states differ, and nothing reads them (text attends to text, PVM's memory
    comes from the vision tower, losses score text). Hidden states of text are the reference's;
  * PVM's memory: keys and values move to the columns where their image tokens stand, and text columns get an id that
    nobody asks for. "All" is the rule without, "causal" the rule with causality;
  * the vision tower: one id per image.

Lengths must be multiples of 128 (configure buckets so) and rows divide over the mesh; where they do not, and in passes
with a cache, the reference is used.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.models.attention import SameId, attention

KINDS = ("auto", "xla", "splash", "cudnn")
MULTIPLE = 128
"""Lengths of which splash attention's blocks are made."""
_SPLASH_BLOCKS = (512, 256, MULTIPLE)
# cuDNN takes a dense mask or none, so that it gets the mask of so many queries at a time.
_CUDNN_BLOCK = 1024
# The key id of what nobody may see; ids of queries are never negative.
_HIDDEN = -1


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which kernel attends in passes without a cache, and the mesh that its arguments lie on.

    Attributes:
      kind: "splash" or "cudnn".
      mesh: rows over `data` and `fsdp`, heads over `tensor`.
      interpret: run Pallas in Python, on any platform (tests).
    """

    kind: str
    mesh: Mesh | AbstractMesh
    interpret: bool = False

    def fit(self, rows: int, *lengths: int) -> bool:
        """Whether a pass of this size can use the kernel; a warning if it cannot."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if rows % ways == 0 and not any(length % MULTIPLE for length in lengths):
            return True
        logging.warning(
            "attention: %d rows of %s use the XLA reference; %s attention needs rows that divide over mesh data x fsdp "
            "= %d, and lengths (config.data.length and patches) that are multiples of %d",
            rows,
            " and ".join(map(str, lengths)),
            self.kind,
            ways,
            MULTIPLE,
        )
        return False


def choose(kind: str, platform: str, mesh: Mesh | AbstractMesh, dtype: DTypeLike = jnp.bfloat16) -> Kernels | None:
    """The kernels of `config.model.attention` on a platform ("tpu", "cuda" or "gpu", "cpu"); None: the reference.

    cuDNN computes in 16 bits only: "auto" with another dtype is the reference.
    """
    if kind == "auto":
        kind = {"tpu": "splash", "cuda": "cudnn", "gpu": "cudnn"}.get(platform, "xla")
        kind = "xla" if kind == "cudnn" and jnp.dtype(dtype).itemsize != 2 else kind
    return None if kind == "xla" else Kernels(kind, mesh)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["query_ids", "key_ids"], meta_fields=["causal", "kernels"]
)
@dataclasses.dataclass(frozen=True)
class Rule:
    """What a query may see; takes the place of a dense mask [B,T,S] in `attend`."""

    query_ids: Int[Array, "B T"]
    key_ids: Int[Array, "B S"]
    causal: bool
    kernels: Kernels


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rule", "visual_index", "sees"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class MemoryRule:
    """What PVM may retrieve; takes the place of a dense mask [B,T,M].

    Attributes:
      rule: over the columns of the tokens.
      visual_index: which visual token stands in each column.
      sees: whether a query sees anything at all.
    """

    rule: Rule
    visual_index: Int[Array, "B T"]
    sees: Bool[Array, "B T"]


def packed_causal_rule(
    kernels: Kernels, segment_ids: Int[Array, "B T"], is_visual: Bool[Array, "B T"], vision_masked: Bool[Array, " B"]
) -> Rule:
    """The rule of `attention.packed_causal_mask`; padding sees padding, which nothing reads."""
    ids = 2 * segment_ids + (is_visual & vision_masked[:, None])
    return Rule(ids, ids, True, kernels)


def memory_rule(
    kernels: Kernels,
    kind: str,
    segment_ids: Int[Array, "B T"],
    visual_index: Int[Array, "B T"],
    memory_index: Int[Array, "B M"],
    memory_segment_ids: Int[Array, "B M"],
) -> MemoryRule:
    """The rule of `pvm.memory_mask` for tokens in columns 0 .. T-1.

    With the first image token of each sample known, `sees` needs no [T,M] matrix:

        tokens  a v0 b | c d        first column of sample 1: 1, of sample 2: none
                                    sees (causal) 0 1 1 | 0 0
    """
    length = segment_ids.shape[1]

    def first_columns(ids: Array, columns: Array) -> Array:
        # Padding of the memory has id 0; padded queries share it, and are shown nothing.
        return jnp.full(length + 1, length).at[ids].min(columns, mode="drop").at[0].set(length)

    first = jax.vmap(first_columns)(memory_segment_ids, memory_index)
    first = jnp.take_along_axis(first, segment_ids, axis=1)
    causal = kind == "causal"
    sees = first <= jnp.arange(length) if causal else first < length
    key_ids = jnp.where(visual_index >= 0, segment_ids, _HIDDEN)
    return MemoryRule(Rule(segment_ids, key_ids, causal, kernels), visual_index, sees)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"] | SameId | Rule,
) -> Float[Array, "B T N H"]:
    """`attention.attention`, by the kernel of a rule. A query that sees nothing gets some finite mean of v."""
    if not isinstance(mask, Rule):
        return attention(q, k, v, mask)
    mesh = mask.kernels.mesh
    split = q.shape[2] % mesh.shape["tensor"] == 0 and k.shape[1] % mesh.shape["tensor"] == 0
    batch, heads = ("data", "fsdp"), "tensor" if split else None
    queries, keys, ids = (
        PartitionSpec(batch, None, heads),
        PartitionSpec(batch, heads),
        PartitionSpec(batch),
    )
    kernel = functools.partial(_KERNELS[mask.kernels.kind], causal=mask.causal, interpret=mask.kernels.interpret)
    # Pallas calls have no partitioning rule of their own: each device runs its rows and heads.
    local = jax.shard_map(
        kernel, mesh=mesh, in_specs=(queries, keys, keys, ids, ids), out_specs=queries, check_vma=False
    )
    return local(q, k, v, mask.query_ids, mask.key_ids)


def retrieve(
    q: Float[Array, "B T N H"], k: Float[Array, "B K M H"], v: Float[Array, "B K M H"], mask: Array | MemoryRule
) -> Float[Array, "B T N H"]:
    """Attention to PVM's memory, 0 where the mask shows nothing."""
    if not isinstance(mask, MemoryRule):
        return attention(q, k, v, mask) * mask.any(axis=-1)[:, :, None, None]
    columns = jnp.maximum(mask.visual_index, 0)[:, None, :, None]
    k, v = (jnp.take_along_axis(x, columns, axis=2) for x in (k, v))
    return attend(q, k, v, mask.rule) * mask.sees[:, :, None, None]


def _dense(query_ids: Array, key_ids: Array, causal: bool, first: Array | int) -> Bool[Array, "B T S"]:
    """The mask of the queries in columns first, first + 1, ..."""
    mask = query_ids[:, :, None] == key_ids[:, None, :]
    if causal:
        columns = first + jnp.arange(query_ids.shape[1])
        mask &= jnp.arange(key_ids.shape[1]) <= columns[:, None]
    return mask


def _splash(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, *, causal: bool, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # 0.4 s, which only a TPU needs to pay

    scale = 1 / math.sqrt(q.shape[-1])
    kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[2], causal, interpret)
    q = (q * scale).astype(q.dtype).swapaxes(1, 2)
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(query_ids, key_ids))
    return out.swapaxes(1, 2)


def _splash_kernel(heads: int, length: int, keys: int, causal: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.CausalMask((length, keys)) if causal else splash.FullMask((length, keys))
    rows, columns = (next(b for b in _SPLASH_BLOCKS if size % b == 0) for size in (length, keys))
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def _cudnn(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, *, causal: bool, interpret: bool) -> Array:
    """Blocks of queries one after the other, each with its dense mask, which the backward pass makes again."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    length = q.shape[1]
    block = next(b for b in (_CUDNN_BLOCK, *_SPLASH_BLOCKS) if length % b == 0)
    implementation = "xla" if interpret else "cudnn"

    @jax.checkpoint
    def one(part: tuple[Array, Array, Array]) -> Array:
        q, ids, first = part
        mask = _dense(ids, key_ids, causal, first)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], length // block, block, *x.shape[2:]), 1, 0)

    out = jax.lax.map(one, (split(q), split(query_ids), jnp.arange(0, length, block)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


_KERNELS = {"splash": _splash, "cudnn": _cudnn}
