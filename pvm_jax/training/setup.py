"""From a configuration to a model, its parameters and the plug-ins, for `train.py`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from pvm_jax import cli
from pvm_jax.checkpoint import Checkpoint, OneKey, flatten, load_params
from pvm_jax.config import ModelConfig
from pvm_jax.lora import IS_LORA, LoRAConfig
from pvm_jax.models import attention_kernels
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import AnyMesh, param_shardings
from pvm_jax.training.freeze import Arrays, Partition, Table
from pvm_jax.training.stage import Fraction, Objective, Setup, Stage, TrainingError

Evaluate = Callable[[nnx.Module], Mapping[str, Fraction]]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """`config.model`.

    Attributes:
      path: a model directory.
      init: "checkpoint", or "random": only config, tokenizer and processor come from the path.
      random_init: initializer of random matrices: "normal" (N(0, 0.02)) or "fan_in".
      dtype: compute dtype and dtype of frozen parameters; None: float32 on CPUs, bfloat16 on accelerators.
      remat: recompute layers in the backward pass.
      attention: "auto" (by the mesh's platform), "xla", "splash" (TPU) or "cudnn" (CUDA).
      size: the released size that a recipe is for; `pvm_jax.plan` takes its shapes where no path is given, and a run
        those of the path.
      lora: adapters that the model gains, see `add_lora`.
    """

    path: str | None
    init: str = "checkpoint"
    random_init: str = "normal"
    dtype: str | None = None
    remat: bool = False
    attention: str = "auto"
    size: str | None = None
    lora: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.path:
            raise TrainingError("config.model.path: expected a model directory; pass --config.model.path=DIR")
        choices = {
            "init": ("checkpoint", "random"),
            "random_init": ("normal", "fan_in"),
            "attention": attention_kernels.KINDS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise TrainingError(f"config.model.{name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise TrainingError(f"config.model.dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def add_lora(config: ModelConfig, rank: int = 0, alpha: float | None = None, targets: str = "proj") -> ModelConfig:
    """The model with the adapters of `config.model.lora`; as it is where the rank is 0, or where it has the same.

    Args:
      alpha: None: the rank, so that adapters are not scaled.

    Raises:
      TrainingError: they do not fit the model, or it has others.
    """
    if rank == 0:
        return config
    lora = LoRAConfig(rank, float(rank if alpha is None else alpha), targets)
    if problem := lora.problem(config.text.linear_maps, config.text.num_hidden_layers):
        field, message = problem
        raise TrainingError(f"config.model.lora.{field}: {message}")
    if config.lora not in (None, lora):
        there = config.lora
        raise TrainingError(
            f"config.model.lora: expected the checkpoint's own adapters (rank {there.rank}, alpha {there.alpha:g}, "
            f"targets {there.targets!r}) or none, got rank {lora.rank}, alpha {lora.alpha:g}, targets {targets!r}; "
            "leave config.model.lora.rank at 0 to go on with them, or first merge them: "
            "python -m pvm_jax.convert to_hf WORKDIR DIR"
        )
    return dataclasses.replace(config, lora=lora)


class Blueprint:
    """The model of a run before it has values: its parts, and where each parameter lies.

    `platform` is the one to compile for, by default that of the mesh's devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: ModelOptions,
        stage: Objective,
        table: Table,
        mesh: AnyMesh,
        platform: str | None = None,
    ):
        self._config, self._options, self._stage, self._mesh = config, options, stage, mesh
        platform = platform or mesh.devices.flat[0].platform
        self._attention = attention_kernels.choose(options.attention, platform, mesh, options.compute_dtype)
        abstract = nnx.eval_shape(lambda: self._build(OneKey(0)))
        self.partition = Partition(abstract, table)
        if options.init == "random" and self.partition.frozen:
            raise TrainingError(
                f"config.model.init='random' with {len(self.partition.frozen)} frozen parameters, e.g. "
                f"{self.partition.frozen[0]!r}: checkpoints keep what is trained, so they would be lost; "
                "let config.freeze train everything, or start from a checkpoint"
            )
        # The stage's own parameters are small: they lie on every device.
        self.shardings = {
            name: NamedSharding(mesh, PartitionSpec()) for name in (*self.partition.trainable, *self.partition.frozen)
        }
        model = nnx.state(nnx.eval_shape(lambda: self._model(OneKey(0))))
        self._model_names = tuple(flatten(model))
        self.shardings |= {n: v.get_value() for n, v in flatten(param_shardings(model, mesh)).items()}
        trainable = set(self.partition.trainable)
        self.abstract = {
            name: jax.ShapeDtypeStruct(
                variable.shape,
                jnp.float32 if name in trainable else options.compute_dtype,
                sharding=self.shardings[name],
            )
            for name, variable in flatten(nnx.state(abstract)).items()
        }

    def parameters(self, source: Checkpoint, seed: int, names: tuple[str, ...]) -> Arrays:
        """Values of `names`: from the checkpoint, or random by `seed`; made where they lie.

        Parameters that the stage adds, and new adapters, are random in either case.
        """
        from_disk = {n for n in names if n in self._model_names and self._options.init == "checkpoint"}
        if source.config.lora is None:
            new = {n for n in names if IS_LORA.search(n)}
            if stuck := sorted(new - set(self.partition.trainable)):
                raise TrainingError(
                    f"config.model.lora: expected config.freeze to train the new adapters, it freezes {stuck[0]!r}, "
                    "and checkpoints keep what is trained; configs/common.py has LORA_ONLY and PVM_AND_LORA"
                )
            from_disk -= new
        loaded = load_params(source, {n: self.abstract[n] for n in names if n in from_disk}) if from_disk else {}
        made = self._random(seed, tuple(n for n in names if n not in from_disk))
        return {name: loaded.get(name, made.get(name)) for name in names}

    def reference(self, source: Checkpoint, seed: int) -> nnx.Module:
        """The whole model with the values that a run begins with."""
        values = self.parameters(source, seed, (*self.partition.trainable, *self.partition.frozen))
        trainable = {name: values[name] for name in self.partition.trainable}
        return self.partition.merge(trainable, {name: values[name] for name in self.partition.frozen})

    def _random(self, seed: int, names: tuple[str, ...]) -> Arrays:
        if not names:
            return {}

        def values(key: jax.Array) -> Arrays:
            variables = flatten(nnx.state(self._build(nnx.Rngs(key))))
            return {name: variables[name].get_value().astype(self.abstract[name].dtype) for name in names}

        return jax.jit(values, out_shardings={n: self.shardings[n] for n in names})(jax.random.key(seed))

    def _model(self, rngs: nnx.Rngs) -> Qwen3VL:
        options = self._options
        return Qwen3VL(
            self._config,
            rngs=rngs,
            dtype=options.compute_dtype,
            remat=options.remat,
            init=options.random_init,
            attention=self._attention,
            mesh=self._mesh,
        )

    def _build(self, rngs: nnx.Rngs) -> nnx.Module:
        model = self._model(rngs)
        extra = self._stage.make_extra(rngs)
        if extra is not None:
            model.extra = extra
        return model


def plug_in(module: str, function: str, key: str) -> Callable[..., Any]:
    """`function` of the module that a configuration names.

    Raises:
      TrainingError: there is no such module or function.
    """
    found = cli.plug_in(module, key, TrainingError)
    if not hasattr(found, function):
        raise TrainingError(f"{key}: expected a module with a function {function}, and {module!r} has none")
    return getattr(found, function)


def load_stage(setup: Setup, options: Mapping[str, Any]) -> Stage:
    """The stage that `config.stage` describes: its module, and that module's options."""
    options = dict(options)
    return plug_in(options.pop("module"), "make_stage", "config.stage.module")(setup, **options)


def total_steps(steps: int | None, epochs: float, steps_per_epoch: int | None) -> int:
    """`config.steps`, or as many as `config.epochs` takes."""
    if steps is None and steps_per_epoch is None:
        raise TrainingError("config.steps: expected a number, this stage has no epochs")
    total = steps if steps is not None else math.ceil(epochs * steps_per_epoch)
    if total < 1:
        raise TrainingError(f"config.steps: expected at least one step, got {total}")
    return total


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One entry of `config.evals`; runs every `every` steps and after the last one."""

    name: str
    every: int
    evaluate: Evaluate

    @classmethod
    def make(cls, name: str, processor: Any, options: Mapping[str, Any]) -> "Evaluator":
        """`module` and `every` are ours, the rest goes to the module's `make_evaluator(processor, name, **options)`.

        Raises:
          TrainingError: one of the two is missing, or the module is not there.
        """
        options = dict(options)
        for key, what in (
            ("module", "a Python module"),
            ("every", "steps between evaluations, 0: only after the last"),
        ):
            if options.get(key) is None:
                raise TrainingError(f"config.evals.{name}.{key}: expected {what}, found nothing")
        make = plug_in(options.pop("module"), "make_evaluator", f"config.evals.{name}.module")
        return cls(name, options.pop("every"), make(processor, name, **options))

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        results = self.evaluate(model).items()
        return {f"{self.name}/{metric}": float(total) / float(count) for metric, (total, count) in results if count}
