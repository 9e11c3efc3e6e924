"""What the plans of all stages are made of: a recipe, its model's shapes, the training step."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.planning.topology import PlanError
from pvm_jax.presets import hf_config
from pvm_jax.sharding import AnyMesh, batch_shardings
from pvm_jax.training.freeze import Arrays
from pvm_jax.training.optim import OptimizerConfig, make_optimizer, make_schedule
from pvm_jax.training.setup import Blueprint, ModelOptions, add_lora
from pvm_jax.training.stage import Objective
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

    def blueprint(self, objective: Objective) -> Blueprint:
        """The model's parts, as `train.py` has them on accelerators."""
        model = dict(self.config["model"])
        model["path"] = model["path"] or "-"
        model["dtype"] = model["dtype"] or "bfloat16"
        return Blueprint(self.model, ModelOptions(**model), objective, self.config["freeze"], self.mesh, self.platform)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The largest batch that a configuration allows."""

    rows: int
    length: int
    patches: int
    micro_batches: int = 1

    def __str__(self) -> str:
        micro = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{self.rows} rows of {self.length:,} tokens and {self.patches:,} patches{micro}"


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes that lie on each device while a program runs, and are none of its arguments."""

    weights: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer


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
    resident: Resident = Resident()

    @property
    def only_pvm(self) -> bool:
        return all("/pvm_block/" in name for name in self.state.trainable)

    def describe(self) -> str:
        return str(self.shape)

    def trace(self) -> Any:
        """Traced as `train.py` would trace it: `.lower()` compiles for the mesh's devices, and with
        `lowering_platforms=` an abstract mesh is lowered for a platform."""
        return compiled(self.update, self.state, self.recipe.mesh).trace(self.state, self.frozen, self.batch)


@dataclasses.dataclass(frozen=True)
class Inference:
    """A program that learns nothing, ready to be traced.

    Attributes:
      what: the size of its input, in words.
      function, arguments, options: a compiled function, and what it is called with, as shapes with shardings.
      weights, cache, batch: those among its arguments and results.
      gathers: its layers' weights are split over fsdp.
      tokens: of a device, which go through the layers at once.
      scored: those of them whose logits exist at once.
    """

    name: str
    recipe: Recipe
    what: str
    function: Callable
    arguments: tuple
    options: Mapping[str, Any]
    weights: Any = ()
    gathers: bool = True
    cache: Any = ()
    batch: Any = ()
    tokens: int = 0
    scored: int = 0
    resident: Resident = Resident()

    def describe(self) -> str:
        return self.what

    def trace(self) -> Any:
        """See `TrainStep.trace`."""
        return self.function.trace(*self.arguments, **self.options)


Step = TrainStep | Inference


def on_device(arrays: Sequence[Any]) -> int:
    """Bytes of one device's shards; what has no sharding lies on every device."""
    shards = [x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in arrays]
    return sum(math.prod(shard) * x.dtype.itemsize for x, shard in zip(arrays, shards, strict=True))


def train_step(
    name: str,
    recipe: Recipe,
    objective: Objective,
    blueprint: Blueprint,
    batch: Any,
    shape: Shape,
    **fields: Any,
) -> TrainStep:
    """The step of an objective on batches of this shape; `fields` are those of `TrainStep` that are left."""
    config, mesh = recipe.config, recipe.mesh
    adamw = OptimizerConfig(**config["optimizer"])
    schedule = make_schedule(adamw, config["steps"] or 1000)  # the number of steps changes no shape
    optimizer = make_optimizer(adamw, schedule, blueprint.partition.trainable)
    trainable = {n: blueprint.abstract[n] for n in blueprint.partition.trainable}
    return TrainStep(
        name=name,
        recipe=recipe,
        shape=shape,
        update=make_update(objective, blueprint.partition, optimizer, schedule, shape.micro_batches),
        state=abstract_state(optimizer, trainable, mesh),
        frozen={n: blueprint.abstract[n] for n in blueprint.partition.frozen},
        batch=batch,
        **fields,
    )


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The sizes of `config.model.path`, or of `config.model.size` with new PVM blocks where no path is given, and LoRA.

    Raises:
      PlanError: neither is given.
      ConfigError: the path has no config.json of ours.
    """
    path, size = config["model"]["path"], config["model"]["size"]
    if path:
        return add_lora(ModelConfig.load(path), **config["model"]["lora"])
    if not size:
        raise PlanError("config.model: expected a path with a config.json, or a released size; pass one of them")
    return add_lora(ModelConfig.from_hf(hf_config(size, pvm=True), f"size {size}"), **config["model"]["lora"])


def abstract_batch(recipe: Recipe, shape: Shape) -> Batch:
    """Shapes and shardings of a batch on the mesh."""
    shardings = batch_shardings(recipe.mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        host_batch(recipe.model, shape),
        shardings,
    )


def host_batch(model: ModelConfig, shape: Shape) -> Batch:
    """Shapes of a batch that lies nowhere yet."""
    rows, length, patches = shape.rows, shape.length, shape.patches
    i32, f32 = jnp.int32, jnp.float32
    fields = {
        "tokens": ((rows, length), i32),
        "positions": ((3, rows, length), i32),
        "segment_ids": ((rows, length), i32),
        "loss_weights": ((rows, length), f32),
        "visual_index": ((rows, length), i32),
        "patches": ((rows, patches, model.vision.patch_dim), f32),
        "patch_segment_ids": ((rows, patches), i32),
        "patch_coords": ((rows, patches, 2), i32),
        "pos_index": ((rows, patches, 4), i32),
        "pos_weight": ((rows, patches, 4), f32),
        "memory_segment_ids": ((rows, patches // model.vision.merge_unit), i32),
        "memory_index": ((rows, patches // model.vision.merge_unit), i32),
        "vision_masked": ((rows,), jnp.bool_),
    }
    return Batch(**{name: jax.ShapeDtypeStruct(*field) for name, field in fields.items()})
