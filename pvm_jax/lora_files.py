"""Exports of trained LoRA: added to the weights, or as an adapter in the layout of Hugging Face's PEFT.

PEFT's layout, a folder that lies beside the untouched weights:

    adapter_config.json          r, lora_alpha, the full names of the adapted modules, the name of the untouched weights
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [r,in] and lora_B.weight [out,r], fp32

with modules as model.language_model.layers.0.self_attn.q_proj.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pvm_jax import orbax_io
from pvm_jax.checkpoint import Checkpoint, CheckpointError, Source, base_of
from pvm_jax.config import ModelConfig
from pvm_jax.lora import IS_LORA, LoRAConfig
from pvm_jax.model_files import write_json
from pvm_jax.models.stack import group_name
from pvm_jax.safetensors_io import SINGLE, SafetensorsWriter

ADAPTER = "adapter"
"""The folder of the adapter, within that of the weights."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An adapted parameter: its path, its module's name in each of its L layers, and (outputs, inputs)."""

    path: str
    modules: tuple[str, ...]
    size: tuple[int, int]

    def factors(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """A [L,r,in] and B [L,out,r] in fp32."""
        layers, (out, inputs) = len(self.modules), self.size
        a, b = (source.read(f"{self.path}_lora/{leaf}").astype(np.float32, copy=False) for leaf in "ab")
        return a.reshape(layers, -1, inputs), b.reshape(layers, out, -1)


def adapted(config: ModelConfig) -> Iterator[Adapted]:
    """Every adapted parameter, in the grouping of stored checkpoints."""
    sizes = config.text.linear_maps
    for group in config.layer_groups():
        for name in config.lora.modules(group[0]) if config.lora else ():
            modules = tuple(f"model.language_model.layers.{i}.{name}" for i in group)
            yield Adapted(f"text/layers/{group_name(group)}/{name.replace('.', '/')}", modules, sizes[name])


class Merged:
    """Parameters with their adapters added, W + (alpha / rank) B A, computed in fp32.

    Raises:
      CheckpointError: the source lacks an adapter.
    """

    def __init__(self, source: Source, config: ModelConfig):
        self._source = source
        self._adapted = {one.path: one for one in adapted(config)}
        self._lora = config.lora
        names = [f"{path}_lora/{leaf}" for path in self._adapted for leaf in "ab"]
        if missing := [name for name in names if not source.holds(name)]:
            raise CheckpointError("\n".join(f"{name}: expected this adapter, found none" for name in missing))

    def read(self, path: str) -> np.ndarray:
        """One parameter on the host; in fp32 where it is adapted, else as it is stored."""
        value = self._source.read(path)
        if path not in self._adapted:
            return value
        value = value.astype(np.float32)  # a copy; one layer's product at a time beside it
        for layer, a, b in zip(value, *self._adapted[path].factors(self._source), strict=True):
            layer += np.float32(self._lora.scale) * (b @ a).reshape(layer.shape)
        return value


def name_of_base(checkpoint: Checkpoint, folder: Path) -> str:
    """The name under which others find the weights that an adapter belongs to; no path of this machine.

    Of a Hugging Face checkpoint that nothing but LoRA was trained on: its name on the Hub, where it lies in the Hub's
    cache, else that of its directory. (Not `_name_or_path` of its config.json: a fine-tune's has what it started from.)
    Of any other weights: that of the export's own `folder`.

    Raises:
      CheckpointError: a run's base is gone, or not what it was.
    """
    base: Checkpoint | None = checkpoint
    while base and base.kind == "workdir":
        if not all(IS_LORA.search(name) for name in orbax_io.Stored(base.trainable).shapes):
            return folder.absolute().name
        base = base_of(base)
    if base is None or base.kind != "hf":
        return folder.absolute().name
    path = base.path.absolute()
    cached = path.parts[-3].split("--") if path.parent.name == "snapshots" else []  # models--OWNER--NAME
    return "/".join(cached[1:]) if cached[:1] == ["models"] else path.name


def write_peft(source: Source, config: ModelConfig, directory: Path, base: str) -> None:
    """Writes the adapter into `directory`, which must not exist; `base` is the name of its weights."""
    directory.mkdir()
    table = list(adapted(config))
    rank, tensors = config.lora.rank, {}
    for one in table:
        out, inputs = one.size
        for module in one.modules:
            tensors[_tensor(module, "A")] = ((rank, inputs), np.dtype(np.float32))
            tensors[_tensor(module, "B")] = ((out, rank), np.dtype(np.float32))
    size = sum(rank * sum(one.size) * 4 * len(one.modules) for one in table)
    with SafetensorsWriter(directory, tensors, size) as writer:
        for one in table:
            for module, a, b in zip(one.modules, *one.factors(source), strict=True):
                writer.write(_tensor(module, "A"), a)
                writer.write(_tensor(module, "B"), b)
    (directory / SINGLE).rename(directory / "adapter_model.safetensors")
    modules = [module for one in table for module in one.modules]
    write_json(directory / "adapter_config.json", _settings(config.lora, modules, base))


def _tensor(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _settings(lora: LoRAConfig, modules: list[str], base: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        # Full names: the last part alone would also match PVM's own q_proj.
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
