"""Softmax attention, the reference path: plain XLA on every platform.

Masks are boolean, True = may look. Long queries are worked off in blocks, so that the scores of a 4,096-patch image
need [block, S] and not [T, S]; each block is rematerialised in the backward pass.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# More queries than `_LONG` are worked off in blocks of the first of these that divides their number.
_LONG = 1024
_BLOCKS = (512, 384, 256, 128)
# Up to so many queries per key head count as a decode step's, see `_scores`.
_FEW_QUERIES = 16


@struct.dataclass
class SameId:
    """The mask query_ids[t] == key_ids[s], made block by block: it never exists as a whole."""

    query_ids: Array  # integers [B,T]; a row alone within loops
    key_ids: Array  # [B,S]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"] | SameId,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scores and softmax in fp32, result in q's dtype.

    Query head n reads key head n // (N // K). A query that may look at nothing gets the mean of v, which is never
    NaN; callers for whom that matters mask the result.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    q, mask = _by_key_head(q, k, mask)
    block = next((b for b in _BLOCKS if length % b == 0), length)
    if length <= _LONG or block == length:
        out = _attend(q, k, v, mask)
    else:
        out = _attend_blocks(q, k, v, mask, length // block)
    return out.reshape(batch, -1, length, groups, dim).swapaxes(1, 2).reshape(batch, length, heads, dim)


def attention_weights(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], mask: Bool[Array, "#B #T S"]
) -> Float[Array, "B T N S"]:
    """The weights with which `attention` averages v, fp32; a query that may look at nothing gets 0 everywhere.

    They exist as a whole: for a few queries at a time.
    """
    batch, length, heads, _ = q.shape
    rows, grouped = _by_key_head(q, k, mask)
    weights = _exponentials(rows, k, grouped)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(batch, k.shape[1], length, -1, k.shape[2]).swapaxes(1, 2)
    return weights.reshape(batch, length, heads, -1) * mask.any(axis=-1)[:, :, None, None]


def _by_key_head(q: Array, k: Array, mask: Array | SameId) -> tuple[Array, Array | SameId]:
    """q [B,T,N,H] and mask [B,T,S] as [B,K,T*G,H] and [B,T*G,S]: one plain matrix product per key head."""
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(batch, length, -1, groups, dim).swapaxes(1, 2).reshape(batch, k.shape[1], length * groups, dim)
    if isinstance(mask, SameId):
        return q, mask.replace(query_ids=jnp.repeat(mask.query_ids, groups, axis=1))
    return q, jnp.repeat(jnp.broadcast_to(mask, (batch, length, mask.shape[2])), groups, axis=1)


def _exponentials(q: Array, k: Array, mask: Array | SameId) -> Array:
    """q [B,K,Q,H], mask [B,Q,S] -> weights [B,K,Q,S] that are not divided by their sum yet."""
    if isinstance(mask, SameId):
        mask = mask.query_ids[:, :, None] == mask.key_ids[:, None, :]
    scores = _scores(q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))


def _attend(q: Array, k: Array, v: Array, mask: Array | SameId) -> Array:
    """q [B,K,Q,H], mask [B,Q,S] -> [B,K,Q,H]."""
    weights = _exponentials(q, k, mask)
    # Divided behind the product with v: H columns instead of S.
    out = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _scores(q: Array, k: Array) -> Array:
    """q [B,K,Q,H], k [B,K,S,H] -> fp32 [B,K,Q,S].

    XLA:CPU reads the keys twice as fast for one query at a time as for the three or four of a decode step together;
    the barrier keeps it from joining them again.
    """

    def together(q: Array, k: Array) -> Array:
        return jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)

    def one_by_one(q: Array, k: Array) -> Array:
        def one(i: int) -> Array:
            return jnp.einsum("BKSH,BKH->BKS", k, q[:, :, i], preferred_element_type=jnp.float32)

        return jnp.stack([jax.lax.optimization_barrier(one(i)) for i in range(q.shape[2])], axis=2)

    if q.shape[2] > _FEW_QUERIES:
        return together(q, k)
    return jax.lax.platform_dependent(q, k, cpu=one_by_one, default=together)


def _attend_blocks(q: Array, k: Array, v: Array, mask: Array | SameId, blocks: int) -> Array:
    """The same in blocks of queries, one after the other, each recomputed in the backward pass.

    A CPU takes the heads one after the other, too: the scores of one block of one head stay in its cache.
    """
    one_block = jax.checkpoint(_attend)

    def split(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def together(q: Array, k: Array, v: Array, mask: Array | SameId) -> Array:
        def one(block: tuple[Array, Array]) -> Array:
            rows = mask.replace(query_ids=block[1]) if isinstance(mask, SameId) else block[1]
            return one_block(block[0], k, v, rows)

        rows = mask.query_ids if isinstance(mask, SameId) else mask
        return jnp.moveaxis(jax.lax.map(one, (split(q, 2), split(rows, 1))), 0, 2).reshape(q.shape)

    def head_by_head(q: Array, k: Array, v: Array, mask: Array | SameId) -> Array:
        def row(args: tuple) -> Array:
            *heads, mask = args
            mask = jax.tree.map(lambda x: x[None], mask)
            return jax.lax.map(lambda head: together(*(x[None, None] for x in head), mask)[0, 0], tuple(heads))

        return jax.lax.map(row, (q, k, v, mask))

    return jax.lax.platform_dependent(q, k, v, mask, cpu=head_by_head, default=together)


def packed_causal_mask(
    segment_ids: Int[Array, "B T"], is_visual: Bool[Array, "B T"], vision_masked: Bool[Array, " B"]
) -> Bool[Array, "B T T"]:
    """Each token sees the tokens of its own sample up to itself; see `hide_vision` for `vision_masked`.

    segment_ids  1 1 2 2 0        token 0  x . . . .
                                        1  x x . . .
                                        2  . . x . .
                                        3  . . x x .
                                        4  . . . . .   padding: nothing
    """
    length = segment_ids.shape[1]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    causal = jnp.tril(jnp.ones((length, length), bool))
    return same & causal & ~hide_vision(is_visual, is_visual, vision_masked)


def hide_vision(
    visual_query: Bool[Array, "B T"], visual_key: Bool[Array, "B S"], vision_masked: Bool[Array, " B"]
) -> Bool[Array, "B T S"]:
    """True where a text query must not see an image key: rows under visual attention dropout or ablation."""
    return ~visual_query[:, :, None] & visual_key[:, None, :] & vision_masked[:, None, None]
