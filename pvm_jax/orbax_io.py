"""Parameters on disk as Orbax trees: written one at a time, restored already sharded and in another grouping.

A parameter is known by its path, e.g. "text/layers/0-2/self_attn/q_proj"; its leading axis counts the layers 0, 1, 2.
Checkpoints hold the groups of `scan=True`, a model may want each layer on its own: `restore` slices and stacks.
"""

import asyncio
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from pvm_jax.hf_names import parse_group

# Chunks on disk: small enough that a host which restores its shards alone reads little else.
_CHUNK_BYTES = 32 * 2**20
# Leaves that are written together; a larger one is written alone.
_BATCH_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter that is made when it is written, so that a model larger than the memory can be saved.

    `fill` writes it into an array of this shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Callable[[np.ndarray], None]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes Lazy leaves in small batches; Orbax's own handler copies all numpy leaves before it writes the first.

    All batches are made in the same memory: the system takes about as long to hand out new memory as to read a file.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        infos = [copy.copy(info) for info in infos]
        context = ts.Context({"file_io_sync": False}, infos[0].ts_context)  # `save` does it once for all files
        for info in infos:
            info.ts_context = context
        batches = list(_batches(values))
        scratch = np.empty(max(sum(_room(values[i]) for i in batch) for batch in batches), np.uint8)
        for batch in batches:
            arrays, used = [], 0
            for i in batch:
                value = values[i]
                arrays.append(scratch[used : used + value.nbytes].view(value.dtype).reshape(value.shape))
                used += _room(value)
                value.fill(arrays[-1])
            futures = await super().serialize(arrays, [infos[i] for i in batch], [args[i] for i in batch])
            for future in futures:
                await asyncio.to_thread(future.result)
        return []

    def memory_size(self, values):
        return [(v.nbytes, v.nbytes) for v in values]


def _room(value: Lazy) -> int:
    """Bytes, rounded up so that the next array begins where any dtype may."""
    return -(-value.nbytes // 64) * 64


def _batches(values: list[Lazy]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for i, value in enumerate(values):
        if batch and size + value.nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += value.nbytes
    if batch:
        yield batch


def save(directory: Path, params: Mapping[str, Lazy | jax.Array | np.ndarray]) -> None:
    """Writes path -> parameter as a tree; `directory` must not exist. When it returns, the disk has everything.

    Nothing is compressed: that would take longer than all the rest, for a fifth of the size of bf16 weights.
    """
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Lazy, _LazyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    tree = _nested({tuple(path.split("/")): value for path, value in params.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    ) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Stored:
    """An Orbax tree of parameters on disk, nested by "/" or flat with "/" in its keys.

    Attributes:
      shapes: path -> shape and dtype of what is stored.
    """

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        with _reader() as reader:
            tree = reader.metadata(self.directory).item_metadata.tree
        self._keys = {"/".join(keys): keys for keys in _flat(tree)}
        flat = {"/".join(keys): value for keys, value in _flat(tree).items()}
        self.shapes = {p: jax.ShapeDtypeStruct(m.shape, m.dtype) for p, m in flat.items()}
        self._layers = {}
        for path in flat:
            if group := parse_group(path):
                prefix, layers, rest = group
                self._layers |= {(prefix, i, rest): (path, i - layers[0]) for i in layers}

    def holds(self, path: str) -> bool:
        """Whether `path` can be made of what is stored."""
        return bool(self._sources(path))

    def shape(self, path: str) -> tuple[int, ...]:
        sources = self._sources(path)
        stored = self.shapes[sources[0][0]].shape
        return stored if path in self.shapes else (len(sources), *stored[1:])

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.shapes[self._sources(path)[0][0]].dtype)

    def read(self, path: str) -> np.ndarray:
        """One parameter, on the host."""
        sources = self._sources(path)
        args = {source: ocp.RestoreArgs(restore_type=np.ndarray) for source, _ in sources}
        arrays = self._restore(args)
        if path in self.shapes:
            return arrays[path]
        return np.stack([arrays[source][i] for source, i in sources])

    def restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Arrays for `wanted`, all of which must be held, each in its dtype and sharding (None: the first device).

        A group that is stored otherwise is restored in the sharding of one of its parts, which must therefore leave
        the axis of layers whole.
        """
        if not wanted:
            return {}
        needed = {path: self._sources(path) for path in wanted}
        users: dict[str, set[str]] = {}
        for path, sources in needed.items():
            for source, _ in sources:
                users.setdefault(source, set()).add(path)
        args = {}
        for source, paths in users.items():
            dtypes = {np.dtype(wanted[p].dtype) for p in paths}
            dtype = dtypes.pop() if len(dtypes) == 1 else self.shapes[source].dtype
            args[source] = ocp.ArrayRestoreArgs(sharding=sharding_of(wanted[min(paths)]), dtype=dtype)
        arrays = self._restore(args)
        result = {}
        for path, want in wanted.items():
            value = self._regroup(path, needed[path], arrays).astype(want.dtype)
            result[path] = jax.device_put(value, sharding_of(want)).block_until_ready()
            for source in {s for s, _ in needed[path]}:
                users[source].discard(path)
                if not users[source]:  # the peak is the model and one group, not the model twice
                    del arrays[source]
        return result

    def _regroup(self, path: str, sources: list[tuple[str, int]], arrays: Mapping[str, jax.Array]) -> jax.Array:
        if path in self.shapes:
            return arrays[path]
        # The place is an operand: with `array[i : i + 1]` every layer would be a program of its own to compile.
        parts = [jax.lax.dynamic_slice_in_dim(arrays[source], i, 1) for source, i in sources]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _sources(self, path: str) -> list[tuple[str, int]]:
        """The stored leaf and the place in it of each layer of `path`; empty if it is not all there."""
        if path in self.shapes:
            return [(path, 0)]
        group = parse_group(path)
        if not group:
            return []
        prefix, layers, rest = group
        found = [self._layers.get((prefix, i, rest)) for i in layers]
        return [] if None in found else found

    def _restore(self, args: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
        item = _nested({self._keys[p]: self.shapes[p] for p in args})
        restore_args = _nested({self._keys[p]: a for p, a in args.items()})
        with _reader() as reader:
            tree = reader.restore(
                self.directory,
                args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
            )
        return {"/".join(keys): value for keys, value in _flat(tree).items()}


def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def sharding_of(want: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return want.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for keys, value in flat.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return tree


def _flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value}
    return flat
