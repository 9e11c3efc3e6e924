"""Group-relative policy optimization: advantages and the clipped loss (arXiv 2402.03300, 2503.14476, 2503.20783).

For a completion i of a prompt's group, with the ratio r = p / p_old of a token's probabilities now and when it was
drawn, and advantage A_i, a token costs

    -min(r A_i, clip(r, 1 - epsilon, 1 + epsilon_high) A_i)  +  beta (p_ref / p - log(p_ref / p) - 1)

`loss_type` says over what these are averaged, as in TRL, whose defaults the release uses. With completions of lengths
n_i, of which those that were cut off count as 0 (`mask_truncated`), L the most tokens that a completion may have:

    dapo      sum over all tokens / all tokens of the optimizer step, over micro-batches and hosts
    bnpo      the same by micro-batch, then the mean over micro-batches
    grpo      mean over completions of each one's mean; a masked completion is one with mean 0
    dr_grpo   sum over all tokens / (completions * L)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from pvm_jax.data.batch import Batch
from pvm_jax.training.losses import next_token
from pvm_jax.training.stage import Loss

LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo")
SCALES = ("group", "batch", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Completions to learn from, packed into rows like any sample; every value stands at its token's own column.

    Attributes:
      batch: its `loss_weights` are those of `token_weights`, 0 on prompts, padding and masked completions.
      advantages: f32 [B,T].
      sampled: f32 [B,T], log-probabilities that the sampler drew with.
      old: f32 [B,T], the same by the trainer's own pass over the same weights; None: those of this very pass.
      reference: f32 [B,T], log-probabilities under the reference model, or None.
      counts: f32 [B], the row's share of what the loss is divided by.
    """

    batch: Batch
    advantages: Any
    sampled: Any
    old: Any
    reference: Any
    counts: Any


def advantages(
    rewards: Float32[np.ndarray, " n"], group: int, scale: str = "group", eps: float = 1e-4
) -> Float32[np.ndarray, " n"]:
    """Each reward minus its group's mean, over (standard deviation + eps).

    The deviation is the unbiased one (n - 1), of the group, or of all rewards ("batch"); "none" leaves it out.

    >>> advantages(np.array([1, 0, 0, 1], np.float32), 2, scale="none").tolist()
    [0.5, -0.5, -0.5, 0.5]

    Args:
      rewards: those of a prompt's completions next to each other, `group` a prompt.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {list(SCALES)}, got {scale!r}")
    by_prompt = np.asarray(rewards, np.float64).reshape(-1, group)
    centred = by_prompt - by_prompt.mean(axis=1, keepdims=True)
    # The mean of equal numbers can be off by a rounding, which a division by eps would make an advantage of.
    centred = np.where(np.ptp(by_prompt, axis=1, keepdims=True) > 0, centred, 0)
    if scale == "group":
        centred = centred / (by_prompt.std(axis=1, ddof=1, keepdims=True) + eps)
    elif scale == "batch":
        centred = centred / (by_prompt.std(ddof=1) + eps)
    return centred.ravel().astype(np.float32)


def token_weights(
    lengths: Int[np.ndarray, " n"], masked: Bool[np.ndarray, " n"], loss_type: str, limit: int
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Of each completion: the weight of each of its tokens, and its share of what the loss is divided by.

    >>> lengths, masked = np.array([2, 4]), np.array([False, True])
    >>> [x.tolist() for x in token_weights(lengths, masked, "dapo", 8)]
    [[1.0, 0.0], [2.0, 0.0]]
    >>> [x.tolist() for x in token_weights(lengths, masked, "grpo", 8)]
    [[0.5, 0.0], [1.0, 1.0]]
    >>> [x.tolist() for x in token_weights(lengths, masked, "dr_grpo", 8)]
    [[1.0, 0.0], [8.0, 8.0]]

    Args:
      lengths: tokens of each completion, at least 1.
      masked: completions that teach nothing.
      limit: the most tokens that a completion may have.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: expected one of {list(LOSS_TYPES)}, got {loss_type!r}")
    each = 1 / lengths if loss_type == "grpo" else np.ones(len(lengths))
    shares = {"grpo": np.ones(len(lengths)), "dr_grpo": np.full(len(lengths), limit)}
    counts = shares.get(loss_type, np.where(masked, 0, lengths))
    return np.where(masked, 0, each).astype(np.float32), counts.astype(np.float32)


def policy_loss(
    log_probs: Float[Array, "B T"],
    batch: PolicyBatch,
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float = 0.0,
    loss_type: str = "dapo",
) -> Loss:
    """The loss of one micro-batch.

    Args:
      log_probs: of the tokens that follow, `token_scores` of `next_token(batch.batch.tokens)`.
    """
    weights = next_token(batch.batch.loss_weights)
    wanted = weights > 0
    advantage = next_token(batch.advantages)
    old = jax.lax.stop_gradient(log_probs) if batch.old is None else next_token(batch.old)
    # Where nothing is wanted both are 0: no exponential overflows there.
    difference = jnp.where(wanted, log_probs - old, 0)
    ratio = jnp.exp(difference)
    cost = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high) * advantage)
    metrics = _ratios(ratio, advantage, wanted, epsilon, epsilon_high)
    tokens = jnp.sum(wanted, dtype=jnp.float32)
    if batch.reference is not None:
        further = jnp.where(wanted, next_token(batch.reference) - log_probs, 0)
        divergence = jnp.exp(further) - further - 1
        cost = cost + beta * divergence
        metrics["kl"] = (jnp.sum(divergence), tokens)
    # Both of the weights that drew: what the policy has learned since then is no disagreement.
    gap = jnp.abs(jnp.where(wanted, old - next_token(batch.sampled), 0))
    metrics["sampler_gap"] = (jnp.sum(gap), tokens)
    total, count = jnp.sum(weights * cost), jnp.sum(batch.counts)
    if loss_type == "bnpo":
        some = count > 0
        return Loss(jnp.where(some, total / jnp.where(some, count, 1), 0), jnp.ones(()), metrics)
    return Loss(total, count, metrics)


def _ratios(ratio: Array, advantage: Array, wanted: Array, epsilon: float, epsilon_high: float) -> dict[str, Any]:
    """Shares of tokens whose gradient is clipped away, and how far ratios stray: the mean of |log r|, and extremes."""
    tokens = jnp.sum(wanted, dtype=jnp.float32)
    low = wanted & (ratio < 1 - epsilon) & (advantage < 0)
    high = wanted & (ratio > 1 + epsilon_high) & (advantage > 0)
    # (sum, count) pairs add up over micro-batches: an extreme is the mean over micro-batches of each one's.
    one = jnp.any(wanted).astype(jnp.float32)
    return {
        "clipped_low": (jnp.sum(low, dtype=jnp.float32), tokens),
        "clipped_high": (jnp.sum(high, dtype=jnp.float32), tokens),
        "ratio_max": (jnp.max(jnp.where(wanted, ratio, 0)) * one, one),
        "ratio_min": (jnp.where(one > 0, jnp.min(jnp.where(wanted, ratio, jnp.inf)), 0), one),
    }
