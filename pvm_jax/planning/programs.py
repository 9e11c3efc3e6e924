"""The programs of a run, of shapes alone: what `train.py` would compile, without weights, data or devices."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.planning.topology import PlanError
from pvm_jax.presets import hf_config
from pvm_jax.sharding import AnyMesh, batch_shardings
from pvm_jax.training.freeze import Arrays, trains
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.setup import Blueprint, ModelOptions
from pvm_jax.training.sft import SFT
from pvm_jax.training.stage import Stage
from pvm_jax.training.step import TrainState, abstract_state, compiled, make_update


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides a run's programs.

    Attributes:
      config: the resolved configuration, plain values.
      model: sizes of the model.
      mesh: of a topology's devices, or abstract.
      platform: "tpu" or "cuda".
    """

    config: Mapping[str, Any]
    model: ModelConfig
    mesh: AnyMesh
    platform: str

    @property
    def ways(self) -> int:
        """Devices over which rows are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The largest batch that a configuration allows."""

    rows: int
    length: int
    patches: int
    micro_batches: int


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One optimizer step, ready to be traced.

    Attributes:
      update: see `training.step.make_update`.
      state, frozen, batch: its arguments, as shapes with shardings.
    """

    name: str
    recipe: Recipe
    shape: Shape
    update: Callable
    state: TrainState
    frozen: Arrays
    batch: Any
    head_trains: bool
    chunk: int

    def trace(self) -> Any:
        """Traced as `train.py` would trace it: `.lower()` compiles for the mesh's devices, and with
        `lowering_platforms=` an abstract mesh is lowered for a platform."""
        return compiled(self.update, self.state, self.recipe.mesh).trace(self.state, self.frozen, self.batch)


class _NoBatches:
    """Stands in for a loader where nothing is read."""

    streams = ()

    def steps_per_epoch(self) -> None:
        return None

    def prefetch(self, start: int) -> Iterator[Any]:
        raise NotImplementedError("a plan reads no data")


def sft_programs(recipe: Recipe) -> list[TrainStep]:
    """The step of supervised fine-tuning."""
    config = recipe.config
    head = "text/embed_tokens" if recipe.model.tie_word_embeddings else "lm_head"
    chunk, head_trains = config["stage"].get("chunk", 128), trains(head, config["freeze"])
    stage = SFT(_NoBatches(), chunk, head_trains=head_trains)
    return [train_step("SFT step", recipe, stage, head_trains=head_trains, chunk=chunk)]


PROGRAMS: dict[str, Callable[[Recipe], list[TrainStep]]] = {"pvm_jax.training.sft": sft_programs}
"""By `config.stage.module`; a new stage adds its own."""


def programs(recipe: Recipe) -> list[TrainStep]:
    """The programs of a run.

    Raises:
      PlanError: the stage has not registered any.
    """
    module = recipe.config["stage"]["module"]
    if module not in PROGRAMS:
        raise PlanError(f"config.stage.module: expected one of {list(PROGRAMS)}, which have plans, got {module!r}")
    return PROGRAMS[module](recipe)


def train_step(name: str, recipe: Recipe, stage: Stage, *, head_trains: bool, chunk: int) -> TrainStep:
    """The step of a stage whose batch is a `Batch`."""
    config, mesh = recipe.config, recipe.mesh
    shape = largest_batch(config, recipe.ways)
    model = dict(config["model"])
    model["path"] = model["path"] or "-"
    model["dtype"] = model["dtype"] or "bfloat16"  # what train.py takes on accelerators
    blueprint = Blueprint(recipe.model, ModelOptions(**model), stage, config["freeze"], mesh, recipe.platform)
    adamw = OptimizerConfig(**config["optimizer"])
    schedule = make_schedule(adamw, config["steps"] or 1000)  # the number of steps changes no shape
    optimizer = make_optimizer(adamw, schedule, blueprint.partition.trainable)
    trainable = {n: blueprint.abstract[n] for n in blueprint.partition.trainable}
    return TrainStep(
        name=name,
        recipe=recipe,
        shape=shape,
        update=make_update(stage, blueprint.partition, optimizer, schedule, shape.micro_batches),
        state=abstract_state(optimizer, trainable, mesh),
        frozen={n: blueprint.abstract[n] for n in blueprint.partition.frozen},
        batch=abstract_batch(recipe, shape),
        head_trains=head_trains,
        chunk=chunk,
    )


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The sizes of `config.model.path`, or of `config.model.size` with new PVM blocks where no path is given.

    Raises:
      PlanError: neither is given.
      ConfigError: the path has no config.json of ours.
    """
    path, size = config["model"]["path"], config["model"]["size"]
    if path:
        return ModelConfig.load(path)
    if not size:
        raise PlanError("config.model: expected a path with a config.json, or a released size; pass one of them")
    return ModelConfig.from_hf(hf_config(size, pvm=True), f"size {size}")


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


def abstract_batch(recipe: Recipe, shape: Shape) -> Batch:
    """Shapes and shardings of a batch."""
    rows, length, patches = shape.rows, shape.length, shape.patches
    i32, f32 = jnp.int32, jnp.float32
    fields = {
        "tokens": ((rows, length), i32),
        "positions": ((3, rows, length), i32),
        "segment_ids": ((rows, length), i32),
        "loss_weights": ((rows, length), f32),
        "visual_index": ((rows, length), i32),
        "patches": ((rows, patches, recipe.model.vision.patch_dim), f32),
        "patch_segment_ids": ((rows, patches), i32),
        "patch_coords": ((rows, patches, 2), i32),
        "pos_index": ((rows, patches, 4), i32),
        "pos_weight": ((rows, patches, 4), f32),
        "memory_segment_ids": ((rows, patches // recipe.model.vision.merge_unit), i32),
        "memory_index": ((rows, patches // recipe.model.vision.merge_unit), i32),
        "vision_masked": ((rows,), jnp.bool_),
    }
    shardings = batch_shardings(recipe.mesh)
    return Batch(
        **{n: jax.ShapeDtypeStruct(s, dtype, sharding=getattr(shardings, n)) for n, (s, dtype) in fields.items()}
    )
