"""Logit lens: what the model would say if it ended after each layer.

The final norm and the unembedding are applied to the hidden state behind every layer. At the last layer that is the
model's distribution, over all of its vocabulary (also ids that generation never chooses).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Logits = Callable[[Array], Array]
"""Hidden states [B,Q,D] as a layer leaves them to fp32 logits [B,Q,V]: final norm, then unembedding."""


def look(logits: Logits, hidden: Float[Array, "L B Q D"], given: Int[Array, "B Q"]) -> dict[str, Array]:
    """The fields of `results.Lens`, as [L,B,Q]; `lens_predicted` [1,B,Q].

    One layer after the other: B * Q * V logits of the last layer, and as many of the one at hand, exist at once.

    Args:
      hidden: behind every layer.
      given: the token that follows in the text.
    """
    final = jax.nn.log_softmax(logits(hidden[-1]))
    predicted = jnp.argmax(final, axis=-1).astype(jnp.int32)

    def one(h: Array) -> dict[str, Array]:
        log_p = jax.nn.log_softmax(logits(h))
        of_predicted, of_given = (_take(log_p, token) for token in (predicted, given))
        return {
            "lens_token": jnp.argmax(log_p, axis=-1).astype(jnp.int32),
            "lens_rank": _rank(log_p, of_predicted),
            "lens_probability": jnp.exp(of_predicted),
            "lens_given_rank": _rank(log_p, of_given),
            "lens_given_probability": jnp.exp(of_given),
            "lens_kl": jnp.sum(jnp.exp(final) * (final - log_p), axis=-1),
        }

    return jax.lax.map(one, hidden) | {"lens_predicted": predicted[None]}


def _take(values: Float[Array, "B Q V"], token: Int[Array, "B Q"]) -> Float[Array, "B Q"]:
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _rank(values: Float[Array, "B Q V"], of: Float[Array, "B Q"]) -> Int[Array, "B Q"]:
    """1 for the largest."""
    return 1 + jnp.sum(values > of[..., None], axis=-1, dtype=jnp.int32)


def settled(token: Int[np.ndarray, "L T"]) -> Int[np.ndarray, " T"]:
    """The first layer from which on the most probable token is the last layer's.

    >>> settled(np.array([[5, 5, 1], [5, 2, 2], [5, 5, 3]])).tolist()
    [0, 2, 2]
    """
    same = token == token[-1]
    unbroken = np.logical_and.accumulate(same[::-1], axis=0)
    return (len(token) - unbroken.sum(axis=0)).astype(np.int32)
