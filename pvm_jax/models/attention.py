"""Softmax attention, the reference path: plain XLA on every platform.

Masks are boolean, True = may look. Long queries are worked off in blocks, so that the scores of a 4,096-patch image
need [block, S] and not [T, S]; each block is rematerialised in the backward pass.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Keys, values [B,K,S,H] and the mask of who may see them.
Past = tuple[Array, Array, Array]

_BLOCK = 512


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B #T S"],
    past: Past | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, scores and softmax in fp32, result in q's dtype.

    Query head n reads key head n // (N // K). A query that may look at nothing gets the mean of v, which is never
    NaN; callers for whom that matters mask the result.

    Args:
      past: keys, values [B,K,Z,H] and mask [B,T,Z] of earlier tokens. They share the softmax with `k` and `v` but are
        not joined to them: a cache is only read here, so that XLA writes the new keys to it in place afterwards.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[1]
    parts = [(k, v, mask)] if past is None else [past, (k, v, mask)]
    # [B,T,K,G,H] -> [B,K,T*G,H]: one plain matrix product per key head.
    q = q.reshape(batch, length, -1, groups, dim).swapaxes(1, 2).reshape(batch, k.shape[1], length * groups, dim)
    parts = [(k, v, jnp.repeat(_full(m, batch, length), groups, axis=1)) for k, v, m in parts]
    if length <= 2 * _BLOCK or length % _BLOCK:
        out = _attend(q, parts)
    else:
        out = _attend_blocks(q, parts, length // _BLOCK)
    return out.reshape(batch, -1, length, groups, dim).swapaxes(1, 2).reshape(batch, length, heads, dim)


def _full(mask: Array, batch: int, length: int) -> Array:
    return jnp.broadcast_to(mask, (batch, length, mask.shape[2]))


def _attend(q: Array, parts: Sequence[Past]) -> Array:
    """q [B,K,Q,H] against the keys of all parts at once; masks [B,Q,S]."""
    lowest = jnp.finfo(jnp.float32).min
    scores = [
        jnp.where(
            mask[:, None],
            jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1]),
            lowest,
        )
        for k, _, mask in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    ends = np.cumsum([k.shape[2] for k, _, _ in parts])[:-1]
    pieces = jnp.split(weights, ends, axis=-1)
    return sum(jnp.einsum("BKQS,BKSH->BKQH", w, v) for w, (_, v, _) in zip(pieces, parts))


def _attend_blocks(q: Array, parts: Sequence[Past], blocks: int) -> Array:
    """The same in blocks of queries, one after the other, each recomputed in the backward pass."""

    def split(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def one(block):
        q, masks = block
        return _attend(q, [(k, v, m) for (k, v, _), m in zip(parts, masks)])

    out = jax.lax.map(jax.checkpoint(one), (split(q, 2), [split(m, 1) for _, _, m in parts]))
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
