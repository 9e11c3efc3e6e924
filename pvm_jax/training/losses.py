"""Log-probabilities and cross-entropy from hidden states, in sequence chunks.

No `[B,T,V]` array ever exists. Each chunk's logits are computed, reduced and, in the backward pass, computed again; the
projection's gradient is added up over the chunks in fp32. Where the projection does not train, the second time is
saved: a log-probability then depends on one hidden state alone, so its gradient, one vector a token, is computed with
it and kept.

Of a prompt full of image tokens nothing is scored at all: the wanted positions of each row are moved to its front,
and chunks in which no row wants anything are skipped at run time. With answers a third as long as their prompts that
is three quarters of the vocabulary projection saved, at the price of two permutations of the hidden states.

Everything is fp32 from the logits on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.training.stage import Loss

Logits = Callable[[Array], Array]
"""Hidden states [...,D] to fp32 logits [...,V]: `model.logits`."""


class TokenScores(NamedTuple):
    log_probs: Float[Array, "B T"]  # log p(target | hidden); 0 where not wanted
    correct: Bool[Array, "B T"]  # the target is the most probable token; False where not wanted
    entropy: Float[Array, "B T"] | None = None  # of the distribution, in nats; has no gradient; 0 where not wanted


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
    banned: Bool[Array, " V"] | None = None,
    entropy: bool = False,
    head_trains: bool = True,
) -> TokenScores:
    """Scores `targets[b,t]` under `softmax(logits(hidden[b,t]) / temperature)` where `wanted`.

    Args:
      logits: the vocabulary projection; called on [B,chunk,D].
      chunk: columns at a time; B * chunk * V fp32 values exist at once.
      banned: ids that the sampler never chose; the distribution is that over the others.
      entropy: also the distribution's entropy.
      head_trains: whether `logits` closes over parameters that are differentiated. False is a third cheaper, and
        JAX raises if it is not true.
    """
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    front = jnp.argsort(~wanted, axis=1, stable=True)
    back = jnp.argsort(front, axis=1)

    def in_chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

    def score(h: Array, target: Array) -> tuple[Array, dict[str, Array]]:
        z = logits(h).astype(jnp.float32) / temperature
        z = z if banned is None else jnp.where(banned, -jnp.inf, z)
        of_target = jnp.take_along_axis(z, target[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(z, axis=-1)
        extra = {"correct": of_target >= jnp.max(z, axis=-1)}
        if entropy:
            extra["entropy"] = jax.lax.stop_gradient(total - _mean_logit(z, total))
        return of_target - total, extra

    xs = (
        in_chunks(_permute(hidden, front, back)),
        in_chunks(jnp.take_along_axis(targets, front, axis=1)),
        in_chunks(jnp.take_along_axis(wanted, front, axis=1)),
    )
    log_probs, extra = (_recomputed if head_trains else _kept)(score, *xs)

    def in_place(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk)[:, :length]
        return jnp.take_along_axis(x, back, axis=1)

    values = {name: in_place(jnp.where(xs[2], value, jnp.zeros_like(value))) for name, value in extra.items()}
    return TokenScores(in_place(jnp.where(xs[2], log_probs, 0)), **values)


def _mean_logit(z: Float[Array, "... V"], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """The expectation of z under softmax(z); ids at minus infinity have no part in it."""
    p = jnp.exp(z - total[..., None])
    return jnp.sum(jnp.where(p > 0, p * z, 0), axis=-1)


def _over_chunks(function: Callable, *xs: Array) -> Any:
    """`function(h, target)` of every chunk in which something is wanted; zeros elsewhere."""

    def chunk(h: Array, target: Array, want: Array) -> Any:
        shapes = jax.eval_shape(function, h, target)

        def nothing(*_: Array) -> Any:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        return jax.lax.cond(want.any(), function, nothing, h, target)

    return jax.lax.scan(lambda _, x: (None, chunk(*x)), None, xs)[1]


def _recomputed(score: Callable, *xs: Array) -> tuple[Array, dict[str, Array]]:
    """The same values; chunks are computed again for their gradients.

    The gradients of what `score` closes over, the vocabulary projection, are added up over the chunks here and not by
    the scan, which would do it in their own dtype: of a hundred sums in bf16 the small terms are lost.
    """
    convertible, closed = jax.closure_convert(score, xs[0][0], xs[1][0])

    @jax.custom_vjp
    def scores(closed: list[Array], *xs: Array) -> tuple[Array, dict[str, Array]]:
        return _over_chunks(lambda h, target: convertible(h, target, *closed), *xs)

    def backward(kept: tuple[Any, ...], cotangents: tuple[Array, Any]) -> tuple[list[Array], Array, None, None]:
        closed, *xs = kept

        def chunk(sums: list[Array], x: tuple[Array, ...]) -> tuple[list[Array], Array]:
            h, target, want, cotangent = x

            def add(sums: list[Array], h: Array) -> tuple[list[Array], Array]:
                _, pull, _ = jax.vjp(lambda closed, h: convertible(h, target, *closed), closed, h, has_aux=True)
                of_closed, of_h = pull(cotangent)
                return [total + g.astype(jnp.float32) for total, g in zip(sums, of_closed, strict=True)], of_h

            return jax.lax.cond(want.any(), add, lambda sums, h: (sums, jnp.zeros_like(h)), sums, h)

        nothing = [jnp.zeros(x.shape, jnp.float32) for x in closed]
        # From the last chunk to the first, as differentiating the loop would.
        sums, of_hidden = jax.lax.scan(chunk, nothing, (*xs, cotangents[0]), reverse=True)
        return [total.astype(x.dtype) for total, x in zip(sums, closed, strict=True)], of_hidden, None, None

    scores.defvjp(lambda closed, *xs: (scores(closed, *xs), (closed, *xs)), backward)
    return scores(closed, *xs)


def _kept(score: Callable, *xs: Array) -> tuple[Array, dict[str, Array]]:
    """The same values; the gradient of each log-probability is computed with it, and kept."""

    def with_gradient(h: Array, target: Array) -> tuple[tuple[Array, dict[str, Array]], Array]:
        log_probs, pull, extra = jax.vjp(lambda h: score(h, target), h, has_aux=True)
        return (log_probs, extra), pull(jnp.ones_like(log_probs))[0]

    @jax.custom_vjp
    def scores(*xs: Array) -> tuple[Array, dict[str, Array]]:
        return _over_chunks(score, *xs)

    def backward(gradients: Array, cotangents: tuple[Array, Any]) -> tuple[Array, None, None]:
        return (gradients * cotangents[0][..., None].astype(gradients.dtype), None, None)

    scores.defvjp(lambda *xs: _over_chunks(with_gradient, *xs), backward)
    return scores(*xs)


def cross_entropy(
    logits: Logits,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
    *,
    chunk: int = 128,
    head_trains: bool = True,
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
    scores = token_scores(logits, hidden, next_token(tokens), wanted, chunk=chunk, head_trains=head_trains)
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
