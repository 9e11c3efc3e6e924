"""What a training stage supplies; the loop, optimizer, checkpoints, metrics and evaluators are shared.

A stage is an input pipeline plus a loss, never a second trainer. Supervised fine-tuning reads its batches from
files (`sft.py`); a reinforcement-learning stage samples them from the policy and returns the same `Batch`
inside a larger pytree, with advantages beside it.

A stage lives in a module of its own that has

    def make_stage(setup: Setup, **options) -> Stage

`config.stage.module` names that module and the other keys of `config.stage` become the options, so that a new
stage needs no change to `train.py`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx

from pvm_jax.config import ModelConfig
from pvm_jax.data.share import Share

Fraction = tuple[Any, Any]
"""A metric as (sum, count). Micro-batches, devices and hosts add both up; the division happens once, at the end."""


class TrainingError(ValueError):
    """A run that cannot start or go on; the message is one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What `train.py` hands to `make_stage`."""

    model_config: ModelConfig
    processor: Any  # pvm_jax.data.processor.Processor
    data: Mapping[str, Any]  # config.data as a plain dictionary
    seed: int
    row_multiple: int = 1  # the rows of a batch divide by it: mesh data x fsdp x config.micro_batches
    freeze: Sequence[tuple[str, bool]] = (("", True),)  # see freeze.py; by default everything trains
    share: Share = Share()  # noqa: RUF009  frozen; of several processes, which rows of a batch this one makes
    # For stages that run the model themselves:
    workdir: Path | None = None
    mesh: Any = None
    micro_batches: int = 1
    reference: Callable[[], nnx.Module] | None = None  # the model as config.model.path holds it


@dataclasses.dataclass(frozen=True)
class StageBatch:
    """One optimizer step's worth of data, still on the host.

    `batch` is a pytree of numpy arrays: a `Batch`, or a dataclass that holds one. The rows stand on the first
    axis of every leaf, except in `positions`, where they stand on the second ([3,B,T]). Of several processes each
    gives the rows that are its own (`Setup.share.rows`); all the other fields are about the whole batch.
    `ids` name the samples in the message of a non-finite loss. `tokens` counts those that are not padding.
    With a `label` (the stream, say) the loss is logged under that name too. `metrics` are the host's own. A metric of
    the step that exceeds its entry of `bounds` is reported. `seconds` are those that `next_batch` spent on something
    else than data, by name.
    """

    batch: Any
    ids: tuple[str, ...]
    tokens: int
    label: str = ""
    metrics: dict[str, Fraction] = dataclasses.field(default_factory=dict)
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class Stopwatch:
    """`with watch("rollout"): ...` adds to `watch.seconds["rollout"]`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


class Loss(NamedTuple):
    """`sum / count` is the loss; both are scalars, summed over the rows that `loss_fn` was given."""

    sum: jax.Array
    count: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


@runtime_checkable
class Objective(Protocol):
    """What of a stage the devices compute. It needs neither data nor weights: plans are made of it."""

    def make_extra(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Trainable parameters of the stage's own, e.g. heads that are dropped after training; usually None.

        The loop attaches them as `model.extra`: `loss_fn` finds them there, the freezing table and checkpoints
        call them `extra/...`, and exports leave them out.
        """
        ...

    def loss_fn(self, model: nnx.Module, batch: Any) -> Loss:
        """The loss of one micro-batch; pure, traced under `jax.jit` and `jax.grad`."""
        ...


@runtime_checkable
class Stage(Objective, Protocol):
    """One kind of training."""

    steps_per_epoch: int | None
    """Optimizer steps that see each sample once; None where there is no such thing (config.steps decides)."""

    data_rows: Mapping[str, int]
    """How many rows each data set has, by name: a run goes on with as many only, since their order depends on it."""

    def next_batch(self, step: int, policy: Callable[[], nnx.Module]) -> StageBatch:
        """The batch of `step`, a pure function of (seed, step) and, for stages that sample, of the policy.

        `policy()` is the model with its current weights. Resuming at step k calls `next_batch(k)` first.
        """
        ...

    def close(self) -> None:
        """Ends the threads of the input pipeline."""
        ...
