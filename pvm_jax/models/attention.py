"""Softmax attention, the reference path: plain XLA on every platform.

Masks are boolean, True = may look. Long queries are worked off in blocks, so that the scores of a 4,096-patch image
need [block, S] and not [T, S]; each block is rematerialised in the backward pass.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 512
# Up to so many queries per key head count as a decode step's, see `_scores`.
_FEW_QUERIES = 16


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scores and softmax in fp32, result in q's dtype.

    Query head n reads key head n // (N // K). A query that may look at nothing gets the mean of v, which is never
    NaN; callers for whom that matters mask the result.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    # [B,T,K,G,H] -> [B,K,T*G,H]: one plain matrix product per key head.
    q = q.reshape(batch, length, -1, groups, dim).swapaxes(1, 2).reshape(batch, k.shape[1], length * groups, dim)
    mask = jnp.broadcast_to(mask, (batch, length, mask.shape[2]))
    mask = jnp.repeat(mask, groups, axis=1)
    if length <= 2 * _BLOCK or length % _BLOCK:
        out = _attend(q, k, v, mask)
    else:
        out = _attend_blocks(q, k, v, mask, length // _BLOCK)
    return out.reshape(batch, -1, length, groups, dim).swapaxes(1, 2).reshape(batch, length, heads, dim)


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B,K,Q,H], mask [B,Q,S] -> [B,K,Q,H]."""
    scores = _scores(q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKQS,BKSH->BKQH", weights, v)


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


def _attend_blocks(q: Array, k: Array, v: Array, mask: Array, blocks: int) -> Array:
    """The same in blocks of queries, one after the other, each recomputed in the backward pass."""

    def split(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    one = jax.checkpoint(lambda block: _attend(block[0], k, v, block[1]))
    out = jax.lax.map(one, (split(q, 2), split(mask, 1)))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)


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
