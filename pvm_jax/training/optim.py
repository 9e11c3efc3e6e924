"""AdamW with the paper's settings, schedules, and learning-rate multipliers by name.

The defaults are those of the public SFT script, which are Hugging Face's TrainingArguments: betas 0.9 and 0.999,
eps 1e-8, no weight decay, gradients clipped to norm 1, cosine decay after a linear warm-up of a tenth of the
steps. As there, the schedule starts at 0: the first step moves nothing.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import optax

from pvm_jax.models.layers import VECTORS
from pvm_jax.training.stage import TrainingError

SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; `multipliers` are (regular expression, factor) rows, first match wins, 1.0 where none matches."""

    learning_rate: float
    schedule: str = "cosine"
    schedule_steps: int | None = None  # where the cosine ends; None: with the run
    warmup_ratio: float = 0.1  # share of all steps; warmup_steps, where given, wins
    warmup_steps: int | None = None
    floor: float = 0.0  # the cosine ends at floor * learning_rate
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0
    multipliers: Sequence[tuple[str, float]] = ()

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"config.optimizer.schedule: expected one of {list(SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.warmup_ratio <= 1:
            raise TrainingError(
                f"config.optimizer.warmup_ratio: expected a share from 0 to 1, got {self.warmup_ratio} "
                "(config.optimizer.warmup_steps takes a number of steps)"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: step s (from 0) of warm-up W has s / W of the peak; then cosine over steps - W.

    With 100 steps and warm-up 10: step 0 -> 0, 5 -> half the peak, 10 -> the peak, 55 -> half, 99 -> 0.03 %.

    Args:
      steps: of the run; `config.schedule_steps`, where given, wins.
    """
    steps = config.schedule_steps or steps
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * steps)
    peak = config.learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.floor)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def multiplier(config: OptimizerConfig, name: str) -> float:
    """The factor on the learning rate of the parameter `name`."""
    return next((factor for pattern, factor in config.multipliers if re.search(pattern, name)), 1.0)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, names: Sequence[str]
) -> optax.GradientTransformation:
    """AdamW over a flat dictionary of parameters with these names.

    A multiplier scales the whole update of its parameters, decay included, as a parameter group with a learning
    rate of its own does in torch. Clipping looks at all gradients together, before any multiplier.
    """
    for pattern, _ in config.multipliers:
        if not any(re.search(pattern, name) for name in names):
            raise TrainingError(
                f"config.optimizer.multipliers: {pattern!r} matches no trainable parameter, e.g. {names[0]!r}"
            )
    factors = {name: multiplier(config, name) for name in names}
    decayed = {name: not VECTORS.search(name) for name in names}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(lambda updates, _: {name: factors[name] * u for name, u in updates.items()}),
        optax.scale_by_learning_rate(schedule),
    )
