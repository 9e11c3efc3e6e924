"""The program of supervised fine-tuning."""

from collections.abc import Iterator, Mapping
from typing import Any

from pvm_jax.planning.recipe import Recipe, Shape, TrainStep, abstract_batch, train_step
from pvm_jax.planning.topology import PlanError
from pvm_jax.training.freeze import head_trains
from pvm_jax.training.sft import SFT


class _NoBatches:
    """Stands in for a loader where nothing is read."""

    streams = ()

    def steps_per_epoch(self) -> None:
        return None

    def prefetch(self, start: int) -> Iterator[Any]:
        raise NotImplementedError("a plan reads no data")


def programs(recipe: Recipe) -> list[TrainStep]:
    """The optimizer step, on the largest batch."""
    config = recipe.config
    chunk, trains = config["stage"].get("chunk", 128), head_trains(recipe.model, config["freeze"])
    stage, shape = SFT(_NoBatches(), chunk, head_trains=trains), largest_batch(config, recipe.ways)
    batch, blueprint = abstract_batch(recipe, shape), recipe.blueprint(stage)
    return [train_step("SFT step", recipe, stage, blueprint, batch, shape, head_trains=trains, chunk=chunk)]


def largest_batch(config: Mapping[str, Any], ways: int) -> Shape:
    """The largest buckets, and as many rows as a batch can get: `data.rows`, or one a sample, over the mesh.

    Raises:
      PlanError: `data.rows` do not divide.
    """
    data, micro = config["data"], config["micro_batches"]
    streams = [data | {k: v for k, v in own.items() if v is not None} for own in data["streams"].values()] or [data]

    def largest(key: str) -> int:
        return max(max(s[key]) if isinstance(s[key], list | tuple) else s[key] for s in streams)

    multiple = ways * micro
    if any(s["rows"] and s["rows"] % multiple for s in streams):
        raise PlanError(
            f"config.data.rows: expected a multiple of mesh data x fsdp x config.micro_batches = {ways} x {micro}, "
            f"got {[s['rows'] for s in streams]}; change rows, config.mesh or config.micro_batches"
        )
    rows = max(s["rows"] or -(-s["samples"] // multiple) * multiple for s in streams)
    return Shape(rows, largest("length"), largest("patches"), micro)
