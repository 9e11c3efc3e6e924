"""What GRPO computes from the policy on the devices, apart from sampling: the loss, and a batch's log-probabilities.

Settings and shapes decide it alone, so that a plan can be made of it without prompts, tokenizer or weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool

from pvm_jax.decoding_weights import WEIGHTS
from pvm_jax.sharding import AnyMesh
from pvm_jax.training.losses import TokenScores, next_token, token_scores
from pvm_jax.training.policy_loss import LOSS_TYPES, SCALES, PolicyBatch, policy_loss
from pvm_jax.training.stage import Loss, TrainingError
from pvm_jax.training.step import micro_batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config.stage`, apart from `module`.

    Attributes:
      prompts, completions: of a rollout; completions of each prompt.
      max_new_tokens: of a completion.
      temperature: of sampling and of the scored distribution.
      rewards: ("module:function", weight) pairs, see rewards.py.
      reward_errors: "error" or "zero", what follows when a reward function fails.
      loss_type, epsilon, epsilon_high, beta: see policy_loss.py; epsilon_high None: as epsilon.
      scale: what an advantage is divided by, see `policy_loss.advantages`.
      mask_truncated: completions without an end teach nothing.
      iterations: optimizer steps that learn from one rollout.
      chunk: columns per chunk of the vocabulary projection.
      sampler_weights: how the weights lie while completions are drawn: one of `decoding_weights.WEIGHTS`. The copy
        in the compute dtype is made once a rollout, and lies beside training state and cache.
      sampler_gap: say so when sampler and trainer disagree by more than this, in nats a token.
      samples: completions of each rollout that are written to workdir/completions.
    """

    rewards: Sequence[tuple[str, float]]
    max_new_tokens: int | None
    prompts: int = 8
    completions: int = 8
    temperature: float = 1.0
    reward_errors: str = "error"
    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    scale: str = "group"
    mask_truncated: bool = True
    iterations: int = 1
    chunk: int = 128
    sampler_weights: str = "gathered"
    sampler_gap: float = 0.1
    samples: int = 8

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> "Settings":
        """From the options of a configuration.

        Raises:
          TrainingError: there are others, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise TrainingError(f"config.stage: unknown keys {unknown}; expected some of {sorted(known)}")
        return cls(**options)

    def __post_init__(self):
        least = {"prompts": 1, "completions": 2, "max_new_tokens": 1, "iterations": 1, "chunk": 1, "samples": 0}
        for key, value in least.items():
            given = getattr(self, key)
            if given is None or given < value:
                raise TrainingError(f"config.stage.{key}: expected at least {value}, got {given}")
        choices = (("loss_type", LOSS_TYPES), ("scale", SCALES), ("sampler_weights", WEIGHTS))
        for key, known in choices:
            if getattr(self, key) not in known:
                raise TrainingError(f"config.stage.{key}: expected one of {list(known)}, got {getattr(self, key)!r}")
        if not 0 < self.temperature < math.inf:  # nor NaN, here and below
            raise TrainingError(
                f"config.stage.temperature: expected a number above 0, got {self.temperature}; greedy completions of "
                "a prompt are all the same and teach nothing"
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if not (self.beta >= 0 and self.epsilon > 0 and high > 0):
            raise TrainingError(
                "config.stage: expected epsilon and epsilon_high above 0 and beta of at least 0, got "
                f"{self.epsilon}, {self.epsilon_high} and {self.beta}"
            )


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
    """The stage's `Objective`, and the pass that scores a batch.

    Attributes:
      banned: bool [V], ids that the sampler never chose.
      head_trains: the vocabulary projection is differentiated.
    """

    settings: Settings
    banned: Bool[np.ndarray, " V"]
    head_trains: bool

    def make_extra(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    def loss_fn(self, model: nnx.Module, batch: PolicyBatch) -> Loss:
        settings = self.settings
        scores = self._scores(model, batch, entropy=True)
        loss = policy_loss(
            scores.log_probs,
            batch,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon if settings.epsilon_high is None else settings.epsilon_high,
            beta=settings.beta,
            loss_type=settings.loss_type,
        )
        wanted = next_token(batch.batch.loss_weights) > 0
        entropy = (scores.entropy.sum(), wanted.sum(dtype=np.float32))
        return loss._replace(metrics=loss.metrics | {"entropy": entropy})

    def scoring(self, mesh: AnyMesh, micro_batches: int) -> Callable[..., jax.Array]:
        """`run(graphdef, params, batch)`, compiled: f32 [B,T] log-probabilities, each at its token's own column."""

        def run(graphdef: Any, params: Any, batch: PolicyBatch) -> jax.Array:
            model = nnx.merge(graphdef, params)

            def score(part: jax.Array) -> jax.Array:
                return self._scores(model, micro_batch(batch, part, micro_batches)).log_probs

            taken = jax.lax.map(score, jnp.arange(micro_batches))
            # Row i of part j is row i * parts + j; the log-probability in column t is that of token t + 1.
            rows = taken.swapaxes(0, 1).reshape(-1, taken.shape[-1])
            return jnp.pad(rows[:, :-1], ((0, 0), (1, 0)))

        return jax.jit(run, static_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def _scores(self, model: nnx.Module, batch: PolicyBatch, entropy: bool = False) -> TokenScores:
        tokens, weights = batch.batch.tokens, batch.batch.loss_weights
        return token_scores(
            model.logits_in_loop(self.head_trains),
            model(batch.batch),
            next_token(tokens),
            next_token(weights) > 0,
            chunk=self.settings.chunk,
            temperature=self.settings.temperature,
            banned=jnp.asarray(self.banned),
            entropy=entropy,
            head_trains=self.head_trains,
        )
