"""Log-probabilities and cross-entropy from hidden states, in sequence chunks.

No `[B,T,V]` array ever exists: each chunk's logits are computed, reduced and, in the backward pass, computed
again (`jax.checkpoint`). Of a prompt full of image tokens nothing is scored at all: the wanted positions of each
row are moved to its front, and chunks in which no row wants anything are skipped at run time. With answers a
third as long as their prompts that is three quarters of the vocabulary projection saved, at the price of two
permutations of the hidden states.

Everything is fp32 from the logits on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.training.stage import Loss

Logits = Callable[[Array], Array]
"""Hidden states [...,D] to fp32 logits [...,V]: `model.logits`."""


class TokenScores(NamedTuple):
    log_probs: Float[Array, "B T"]  # log p(target | hidden); 0 where not wanted
    correct: Bool[Array, "B T"]  # the target is the most probable token; False where not wanted


def next_token(values: Array) -> Array:
    """`values` [B,T] of the token that follows: column t gets column t + 1, the last column 0.

    >>> next_token([[5, 6, 7]])
    [[6, 7, 0]]
    """
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def token_scores(
    logits: Logits,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
    *,
    chunk: int = 128,
    temperature: float = 1.0,
) -> TokenScores:
    """Scores `targets[b,t]` under `softmax(logits(hidden[b,t]) / temperature)` where `wanted`.

    Args:
      logits: the vocabulary projection; called on [B,chunk,D].
      chunk: columns at a time; B * chunk * V fp32 values exist at once.
    """
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    front = jnp.argsort(~wanted, axis=1, stable=True)
    back = jnp.argsort(front, axis=1)

    def in_chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    def score(h: Array, target: Array) -> tuple[Array, Array]:
        z = logits(h).astype(jnp.float32) / temperature
        of_target = jnp.take_along_axis(z, target[..., None], axis=-1)[..., 0]
        return of_target - jax.nn.logsumexp(z, axis=-1), of_target >= jnp.max(z, axis=-1)

    def nothing(_: Array, target: Array) -> tuple[Array, Array]:
        return jnp.zeros(target.shape, jnp.float32), jnp.zeros(target.shape, jnp.bool)

    @jax.checkpoint
    def body(h: Array, target: Array, want: Array) -> tuple[Array, Array]:
        log_probs, correct = jax.lax.cond(want.any(), score, nothing, h, target)
        return jnp.where(want, log_probs, 0), correct & want

    xs = (
        in_chunks(_permute(hidden, front, back)),
        in_chunks(jnp.take_along_axis(targets, front, axis=1)),
        in_chunks(jnp.take_along_axis(wanted, front, axis=1)),
    )
    _, scored = jax.lax.scan(lambda _, x: (None, body(*x)), None, xs)

    def in_place(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :length]
        return jnp.take_along_axis(x, back, axis=1)

    return TokenScores(*map(in_place, scored))


def cross_entropy(
    logits: Logits,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    chunk: int = 128,
) -> Loss:
    """Next-token cross-entropy, weighted by `loss_weights` of the token that is predicted.

    `hidden[:, t]` predicts `tokens[:, t + 1]`. A first token of a packed sample has weight 0, so that no sample is
    predicted from the one before it. The mean per sample is the weights' doing: with 1 / n on each of a sample's n
    targets, `sum / count` is the mean over samples of each one's mean, which is what the paper's recipe computes
    (one sample a device, mean per micro-batch); with 1 on every target it is the mean over tokens.

    Returns:
      The sum of weighted losses, the sum of the weights, and metrics: `accuracy` and `token_loss`, per target.
    """
    weights = next_token(loss_weights)
    wanted = weights > 0
    scores = token_scores(logits, hidden, next_token(tokens), wanted, chunk=chunk)
    targets = jnp.sum(wanted, dtype=jnp.float32)
    metrics = {
        "accuracy": (jnp.sum(scores.correct, dtype=jnp.float32), targets),
        "token_loss": (-jnp.sum(scores.log_probs), targets),
    }
    return Loss(-jnp.sum(weights * scores.log_probs), jnp.sum(weights), metrics)


@jax.custom_vjp
def _permute(x: Float[Array, "B T D"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`x[b, order[b, t]]`; its gradient is the inverse permutation, a gather too (JAX's own would scatter)."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), inverse


def _permute_backward(inverse, g):
    return jnp.take_along_axis(g, inverse[..., None], axis=1), None, None


_permute.defvjp(_permute_forward, _permute_backward)
