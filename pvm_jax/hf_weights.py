"""The weights of a Hugging Face directory, checked against the table of names and read as our parameters."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from pvm_jax import pvm_init
from pvm_jax.config import ModelConfig
from pvm_jax.hf_names import Tensor, leaves, parse_group
from pvm_jax.orbax_io import sharding_of
from pvm_jax.safetensors_io import DTYPES, SafetensorsReader, WeightsError

_EMBEDDING = "model.language_model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class MadePVM:
    """PVM for a checkpoint that has none, see `pvm_init`."""

    seed: int
    method: str


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One tensor and the shape of our parameter (of one layer of it)."""

    tensor: Tensor
    shape: tuple[int, ...]
    made: tuple[int, str] | None  # (layer, name in the PVM block) where the tensor is not read but made


class HFWeights:
    """Parameters of a Hugging Face directory, in any grouping of layers.

    Args:
      directory: safetensors files.
      config: the model to read, with PVM's fields.
      made: None, or how to fill PVM blocks that the files do not have.
      keep_dtypes: also require the layers of a group, which become one array, to agree in dtype.

    Raises:
      WeightsError: everything that is wrong with the files and their tensors, one sentence each.
    """

    def __init__(self, directory: Path, config: ModelConfig, made: MadePVM | None = None, keep_dtypes: bool = False):
        self.directory = directory
        self._reader = SafetensorsReader(directory)
        self._made = made
        self._units: dict[str | tuple[str, int, str], _Unit] = {}
        # One layer per leaf here, so that any group can be put together.
        for leaf in leaves(config, scan=True):
            group = parse_group(leaf.path)
            for n, tensor in enumerate(leaf.tensors):
                key = (group[0], group[1][n], group[2]) if group else leaf.path
                new = (group[1][n], tensor.name.partition(".pvm_block.")[2]) if leaf.pvm and made else None
                self._units[key] = _Unit(tensor, leaf.shape[1:] if leaf.stacked else leaf.shape, new)
        problems = [*self._reader.problems, *self._tensor_problems(config)]
        if keep_dtypes:
            problems += self._mixed_dtypes(config)
        # Values can be looked at once all tensors are there.
        problems = problems or [*self._head_problems(config), *self._pvm_problems(config)]
        if problems:
            raise WeightsError(problems)

    def holds(self, path: str) -> bool:
        return None not in self._of(path)

    def shape(self, path: str) -> tuple[int, ...]:
        units = self._of(path)
        return (len(units), *units[0].shape) if parse_group(path) else units[0].shape

    def dtype(self, path: str) -> np.dtype:
        return self._stored_dtype(self._of(path)[0])

    def read(self, path: str, dtype: np.dtype | None = None) -> np.ndarray:
        """One parameter, on the host; `dtype` None keeps the files'."""
        whole = tuple(slice(None) for _ in self.shape(path))
        return self._part(path, whole, np.dtype(dtype or self.dtype(path)))

    def pieces(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The elements of a parameter in order, as `dtype`; each array may be overwritten by the next."""
        for unit in self._of(path):
            pieces = [self._tensor(unit)] if unit.made else self._reader.pieces(unit.tensor.name)
            for piece in pieces:
                yield piece.astype(dtype, copy=False)

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Arrays for `wanted`, all of which must be held, each in its dtype and sharding (None: the first device).

        Each host reads the shards of its own devices alone.
        """
        return {
            path: jax.make_array_from_callback(
                self.shape(path),
                sharding_of(want),
                lambda index, path=path, want=want: self._part(path, index, np.dtype(want.dtype)),
            )
            for path, want in wanted.items()
        }

    def _part(self, path: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        value = np.empty([len(range(n)[i]) for n, i in zip(self.shape(path), index, strict=True)], dtype)
        self._fill(path, index, value)
        return value

    def _fill(self, path: str, index: tuple[slice, ...], value: np.ndarray) -> None:
        units = self._of(path)
        if parse_group(path):
            units, index = units[index[0]], index[1:]
        else:
            value = value[None]
        for row, unit in zip(value, units, strict=True):
            if row.shape == unit.shape and not unit.made:
                flat, start = row.reshape(-1), 0
                for piece in self._reader.pieces(unit.tensor.name):
                    flat[start : start + piece.size] = piece
                    start += piece.size
            else:
                row[...] = self._tensor(unit)[index]
                self._reader.forget()

    def _stored_dtype(self, unit: _Unit) -> np.dtype:
        """That of the files; PVM is made in the embedding's."""
        return DTYPES[self._reader.entries[_EMBEDDING if unit.made else unit.tensor.name].dtype]

    def _tensor(self, unit: _Unit) -> np.ndarray:
        if unit.made:
            layer, name = unit.made
            value = pvm_init.initial(self._made.seed, layer, name, unit.tensor.shape, self._made.method)
        else:
            value = self._reader.read(unit.tensor.name)
        return value.reshape(unit.shape)

    def _of(self, path: str) -> list[_Unit | None]:
        group = parse_group(path)
        if not group:
            return [self._units.get(path)]
        prefix, layers, rest = group
        return [self._units.get((prefix, i, rest)) for i in layers]

    def _tensor_problems(self, config: ModelConfig) -> list[str]:
        entries = self._reader.entries
        expected = {unit.tensor.name: unit for unit in self._units.values() if not unit.made}
        found = []
        for name, unit in expected.items():
            entry = entries.get(name)
            if entry is None:
                if self._reader.complete and name not in self._reader.lost:
                    found.append(
                        f"{self.directory}: {name}: expected a tensor of {list(unit.tensor.shape)}, found none"
                    )
                    if name == _HEAD:
                        found[-1] += "; if its head is the embedding, set tie_word_embeddings to true in config.json"
                continue
            where = f"{entry.file}: {name}"
            if entry.shape != unit.tensor.shape and not _is_scalar_gate(name, entry.shape):
                found.append(f"{where}: expected shape {list(unit.tensor.shape)}, got {list(entry.shape)}")
            if entry.dtype not in DTYPES:
                found.append(f"{where}: expected a dtype of {', '.join(DTYPES)}, got {entry.dtype}")
        for name, entry in entries.items():
            if name in expected or (name == _HEAD and config.tie_word_embeddings):
                continue
            hint = ""
            if ".pvm_block." in name:
                hint = "; does text_config.pvm_layers in config.json name this layer?"
            found.append(f"{entry.file}: {name}: expected no such tensor, got one of {list(entry.shape)}{hint}")
        return found

    def _mixed_dtypes(self, config: ModelConfig) -> list[str]:
        found = []
        for leaf in leaves(config):
            entries = {t.name: self._reader.entries[t.name] for t in leaf.tensors if t.name in self._reader.entries}
            common = Counter(entry.dtype for entry in entries.values()).most_common(1)
            for name, entry in entries.items():
                if entry.dtype != common[0][0]:
                    found.append(
                        f"{entry.file}: {name}: expected {common[0][0]} as in the layers that it is stored with, "
                        f"got {entry.dtype}; choose one with --dtype"
                    )
        return found

    def _head_problems(self, config: ModelConfig) -> list[str]:
        """A tied head may be in the files too, if it is the embedding."""
        if not config.tie_word_embeddings or _HEAD not in self._reader.entries:
            return []
        head, embedding = self._reader.entries[_HEAD], self._reader.entries[_EMBEDDING]
        if (head.dtype, head.shape) == (embedding.dtype, embedding.shape):
            a, b = (self._reader.read(name).view(np.uint8) for name in (_HEAD, _EMBEDDING))
            if np.array_equal(a, b):
                return []
        return [
            f"{head.file}: {_HEAD}: expected the values of {_EMBEDDING}, because config.json says "
            "tie_word_embeddings, got others; set it to false if the model has a head of its own"
        ]

    def _pvm_problems(self, config: ModelConfig) -> list[str]:
        found = []
        for layer in config.pvm.layers if config.pvm and not self._made else ():
            block = f"model.language_model.layers.{layer}.pvm_block"
            gate, expander = f"{block}.gate_alpha", f"{block}.output_expander.weight"
            found += pvm_init.problems(
                f"{self._reader.entries[gate].file}: {block}",
                self._reader.read(gate),
                not np.any(self._reader.read(expander)),
            )
        return found


def _is_scalar_gate(name: str, shape: tuple[int, ...]) -> bool:
    """The release's gate has one element; files hold it with or without an axis."""
    return name.endswith(".gate_alpha") and shape == ()
