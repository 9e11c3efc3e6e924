"""Checkpoints on disk: what a directory holds, its parameters as arrays, and models made of them.

Three kinds of directory are models:

    Hugging Face     config.json, tokenizer and processor files, model.safetensors (or shards and their index)
    native           the same files, and params/: an Orbax tree in the grouping of `scan=True`
    training workdir model/ with config, tokenizer and processor files and base.json {"path", "checksum"}, and
                     checkpoints/<step>/trainable: an Orbax tree of what was trained, which lies over the base
                     (checkpoints/<step> alone names that step; the workdir its latest)

A base may be any of the three, or null for a model that was trained from scratch.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pvm_jax import fingerprint, orbax_io, pvm_init, sharding
from pvm_jax.config import ModelConfig, read_json
from pvm_jax.hf_weights import HFWeights
from pvm_jax.model_files import copy_files, new_directory, write_json
from pvm_jax.models.qwen3_vl import Qwen3VL

PARAMS = "params"
BASE = "base.json"


class CheckpointError(ValueError):
    """A directory that is not the model it should be; the message is one sentence that says what to do."""


@runtime_checkable
class Source(Protocol):
    """Parameters on disk, by path."""

    def holds(self, path: str) -> bool: ...

    def shape(self, path: str) -> tuple[int, ...]: ...

    def dtype(self, path: str) -> np.dtype: ...

    def read(self, path: str) -> np.ndarray: ...

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory that `open_checkpoint` recognised.

    Attributes:
      path: as given.
      kind: "hf", "native" or "workdir".
      files: the directory with config.json, tokenizer and processor files.
      config: the model's.
      trainable: a workdir's Orbax tree, else None.
    """

    path: Path
    kind: str
    files: Path
    config: ModelConfig
    trainable: Path | None = None

    def source(self) -> Source:
        """Opens the parameters.

        Raises:
          WeightsError, CheckpointError: they are not what config.json says.
        """
        if self.kind == "hf":
            return HFWeights(self.path, self.config)
        if self.kind == "native":
            return _stored(self.path / PARAMS)
        base = base_of(self)
        return _Overlay(_stored(self.trainable), base.source() if base else None)


def _stored(directory: Path) -> orbax_io.Stored:
    try:
        return orbax_io.Stored(directory)
    except FileNotFoundError:
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:5]) or "an empty directory"
        raise CheckpointError(
            f"{directory}: expected an Orbax tree of parameters with _METADATA, found {found}; was it copied whole?"
        ) from None


class _Overlay:
    """What was trained, over the base it was trained on."""

    def __init__(self, top: orbax_io.Stored, base: Source | None):
        self.top, self.base = top, base

    def _of(self, path: str) -> Source | None:
        return self.top if self.top.holds(path) else self.base

    def holds(self, path: str) -> bool:
        source = self._of(path)
        return source is not None and source.holds(path)

    def shape(self, path: str) -> tuple[int, ...]:
        return self._of(path).shape(path)

    def dtype(self, path: str) -> np.dtype:
        """The base's: training in fp32 does not make a bf16 model an fp32 one."""
        return (self.base if self.base is not None and self.base.holds(path) else self.top).dtype(path)

    def read(self, path: str) -> np.ndarray:
        return self._of(path).read(path)

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        trained = {path: want for path, want in wanted.items() if self.top.holds(path)}
        rest = {path: want for path, want in wanted.items() if path not in trained}
        return self.top.restore(trained) | (self.base.restore(rest) if rest else {})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Finds out which kind of model directory `path` is.

    Raises:
      CheckpointError: it is none, or a workdir without a checkpoint.
      ConfigError: its config.json is no model of ours.
    """
    path = Path(path)
    if not path.is_dir():
        hint = ""
        if not path.is_absolute() and len(path.parts) == 2 and not path.parent.is_dir():
            hint = f"; to use a model of the Hugging Face Hub, download it first: hf download {path} --local-dir DIR"
        got = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected a model directory, found {got}{hint}")
    if (path / PARAMS).is_dir():
        return Checkpoint(path, "native", path, ModelConfig.load(path))
    if (path / "model" / BASE).is_file():
        return _workdir(path, path, _latest_step(path / "checkpoints"))
    if path.parent.name == "checkpoints" and (path.parent.parent / "model" / BASE).is_file():
        return _workdir(path, path.parent.parent, path)
    if (path / "config.json").is_file():
        return Checkpoint(path, "hf", path, ModelConfig.load(path))
    raise CheckpointError(
        f"{path}: expected config.json with safetensors (Hugging Face) or {PARAMS}/ (native), or model/{BASE} "
        f"(training workdir), found {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'an empty directory'}"
    )


def _workdir(path: Path, workdir: Path, step: Path) -> Checkpoint:
    files = workdir / "model"
    trainable = step / "trainable"
    if not trainable.is_dir():
        raise CheckpointError(f"{step}: expected a checkpoint with {trainable.name}/, found none")
    return Checkpoint(path, "workdir", files, ModelConfig.load(files), trainable)


def _latest_step(checkpoints: Path) -> Path:
    steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()] if checkpoints.is_dir() else []
    if not steps:
        raise CheckpointError(f"{checkpoints}: expected the checkpoint of a training step, found none")
    return checkpoints / str(max(steps))


def base_record(path: str | Path | None) -> dict[str, Any]:
    """What a training run writes to model/base.json about the checkpoint that it starts from; None: from scratch."""
    if path is None:
        return {"path": None, "checksum": None}
    return {"path": str(Path(path).absolute()), "checksum": checksum(path)}


def base_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint that a workdir's run started from, or None if it started from scratch.

    Raises:
      CheckpointError: it is gone, or not what it was.
    """
    file = checkpoint.files / BASE
    record = read_json(file)
    if record.get("path") is None:
        return None
    path = Path(record["path"])
    if not path.is_dir():
        raise CheckpointError(
            f"{file}: path: expected the checkpoint that this run was trained on, found nothing at {path}; "
            "put it back, or write its new place here"
        )
    got = checksum(path)
    if got != record.get("checksum"):
        raise CheckpointError(
            f"{file}: checksum: expected {record.get('checksum')} of the checkpoint that this run was trained on, "
            f"got {got} at {path}: its weights are not the same"
        )
    return open_checkpoint(path)


def checksum(of: Checkpoint | str | Path) -> str:
    """A fingerprint of a checkpoint's weights (see `fingerprint`); a workdir's includes its base's, as recorded."""
    checkpoint = of if isinstance(of, Checkpoint) else open_checkpoint(of)
    if checkpoint.kind == "hf":
        return fingerprint.of_safetensors(checkpoint.path)
    if checkpoint.kind == "native":
        return fingerprint.of_orbax(checkpoint.path / PARAMS)
    base = read_json(checkpoint.files / BASE).get("checksum")
    return f"{fingerprint.of_orbax(checkpoint.trainable)} on {base}"


class OneKey(nnx.Rngs):
    """The same key for every parameter of a model whose values are never computed.

    `nnx.Rngs` counts its keys, and each count takes time that grows with what has been traced: 4 s for a model of 36
    layers that are not stacked, instead of 0.4 s.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(config: ModelConfig, **options: Any) -> Qwen3VL:
    """A model of shapes alone, see `nnx.eval_shape`; the options are those of `Qwen3VL`."""
    return nnx.eval_shape(lambda: Qwen3VL(config, rngs=OneKey(0), **options))


def abstract_params(state: nnx.State, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and (with a mesh) sharding of a model's parameters; `state` as `nnx.split` gives it."""
    flat = flatten(state)
    if mesh is None:
        return {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in flat.items()}
    shardings = flatten(sharding.param_shardings(state, mesh))
    return {
        path: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[path].get_value()) for path, v in flat.items()
    }


def flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of an `nnx.State` by name: `{"text/norm": Param(...), ...}`."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def load_params(
    checkpoint: Checkpoint | str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters of any checkpoint, each restored straight into its dtype and sharding.

    Args:
      checkpoint: a directory, or what `open_checkpoint` made of it.
      wanted: see `abstract_params`; any grouping of layers.

    Raises:
      CheckpointError: a wanted parameter is not there or has another shape, or a PVM block can never train.
      WeightsError: the files of a Hugging Face directory are not what its config.json says.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    source = checkpoint.source()
    problems = []
    for path, want in wanted.items():
        if not source.holds(path):
            problems.append(f"{checkpoint.path}: {path}: expected {list(want.shape)}, found no such parameter")
        elif source.shape(path) != tuple(want.shape):
            problems.append(
                f"{checkpoint.path}: {path}: expected shape {list(want.shape)}, got {list(source.shape(path))}"
            )
    if problems:
        raise CheckpointError("\n".join(problems))
    params = source.restore(wanted)
    _refuse_dead_pvm(checkpoint.path, params)
    return params


def _refuse_dead_pvm(path: Path, params: Mapping[str, jax.Array]) -> None:
    problems = []
    for name, gate in params.items():
        block, _, leaf = name.rpartition("/")
        expander = params.get(f"{block}/output_expander")
        if leaf == "gate_alpha" and expander is not None:
            zero = not bool(jnp.any(expander))
            problems += pvm_init.problems(f"{path}: {block}", np.asarray(gate), zero)
    if problems:
        raise CheckpointError("\n".join(problems))


def load_model(
    checkpoint: Checkpoint | str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    scan: bool | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Qwen3VL:
    """The model of a checkpoint with its parameters.

    Args:
      dtype: compute dtype.
      param_dtype: dtype of the parameters; None: `dtype`.
      scan: grouping of the layers; None: False on a CPU, where a scanned group copies its weights at each decode
        step, True on accelerators.
      remat: see `Qwen3VL`.
      mesh: where the parameters go; None: the first device.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    scan = jax.default_backend() != "cpu" if scan is None else scan
    param_dtype = dtype if param_dtype is None else param_dtype
    options = {"dtype": dtype, "param_dtype": param_dtype, "scan": scan, "remat": remat, "mesh": mesh}
    model = abstract_model(checkpoint.config, **options)
    graphdef, state = nnx.split(model)
    params = load_params(checkpoint, abstract_params(state, mesh))
    return nnx.merge(graphdef, fill(state, params))


def fill(state: nnx.State, params: Mapping[str, jax.Array]) -> nnx.State:
    """`state` (of shapes) with the values of `params`, by path."""
    return nnx.map_state(lambda path, v: v.replace(params["/".join(map(str, path))]), state)


def save_native(
    directory: str | Path,
    raw_config: Mapping[str, Any],
    params: Mapping[str, Any],
    files: Path | None = None,
) -> None:
    """Writes a native checkpoint, in one process: all of it, or nothing if it fails.

    Args:
      directory: must not exist.
      raw_config: the content of config.json.
      params: path -> jax.Array, numpy array or `orbax_io.Lazy`, in the grouping of `scan=True`.
      files: a directory whose tokenizer and processor files are copied.

    Raises:
      FileExistsError: `directory` exists.
    """
    with new_directory(Path(directory)) as partial:
        write_json(partial / "config.json", raw_config)
        if files is not None:
            copy_files(files, partial)
        orbax_io.save(partial / PARAMS, params)
