"""Parameters on disk as Orbax trees: written piece by piece, restored already sharded and in another grouping.

A parameter is known by its path, e.g. "text/layers/0-2/self_attn/q_proj"; its leading axis counts the layers 0, 1, 2.
Checkpoints hold the groups of `scan=True`, a model may want each layer on its own: `restore` slices and stacks.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from pvm_jax.hf_names import parse_group

# A chunk is a file, small enough that a host which restores some layers or rows alone reads little else. Columns are
# not cut, so that a chunk is a run of bytes of the parameter; a host whose mesh cuts them reads whole chunks, and keeps
# its part of each.
_CHUNK_BYTES = 32 * 2**20
# Files that are written at a time: while the disk works on some, the others are copied.
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter that is made while it is written, so that a model larger than the memory can be saved.

    `pieces` gives arrays whose bytes, one after another, are those of the parameter in this dtype (C order). An array
    may be overwritten when the next one is asked for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes Lazy leaves as uncompressed Zarr arrays, piece by piece and several at a time.

    Orbax's own handler copies all arrays before it writes the first, and TensorStore writes a chunk in one call, which
    takes two to five times as long per byte as writing it in pieces that stay in the processor's cache.
    """

    async def serialize(self, values, infos, args=None):
        for info in infos:
            await info.await_path_creation()
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for done in [pool.submit(_write, v, Path(i.parent_dir) / i.name) for v, i in zip(values, infos)]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
        return []

    def memory_size(self, values):
        return [(v.nbytes, v.nbytes) for v in values]


def _write(value: Lazy, directory: Path) -> None:
    """A Zarr array (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html); the disk has its chunks on return."""
    chunk = _chunk_shape(value.shape, value.dtype.itemsize)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "metadata": {"shape": value.shape, "chunks": chunk, "compressor": None},
    }
    ts.open(spec, dtype=ts.dtype(value.dtype), create=True).result()
    left, pieces = memoryview(b""), iter(value.pieces())
    for place in np.ndindex(*(-(-n // c) for n, c in zip(value.shape, chunk))):
        inside = (min(c, n - i * c) for n, c, i in zip(value.shape, chunk, place))
        missing = math.prod(inside) * value.dtype.itemsize
        with (directory / (".".join(map(str, place)) or "0")).open("wb", buffering=0) as file:
            while missing:
                left = left or _bytes(next(pieces, None))
                if not left:
                    raise ValueError(f"{directory.name}: expected pieces of {value.nbytes} bytes, they end before")
                count = file.write(left[:missing])
                left, missing = left[count:], missing - count
            file.truncate(math.prod(chunk) * value.dtype.itemsize)  # the format pads the last chunk
            os.fsync(file.fileno())
    if left or next(pieces, None) is not None:
        raise ValueError(f"{directory.name}: expected pieces of {value.nbytes} bytes, there are more")


def _bytes(array: np.ndarray | None) -> memoryview:
    return memoryview(b"" if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Of runs of whole trailing axes, at most `_CHUNK_BYTES` each, evenly sized.

    >>> _chunk_shape((28, 6144, 2048), 2)  # one layer
    (1, 6144, 2048)
    >>> _chunk_shape((151_936, 2048), 2)  # 19 chunks instead of 18 full ones and a rest
    (7997, 2048)
    """
    chunk = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        fit = _CHUNK_BYTES // (math.prod(chunk) * itemsize)
        if fit < shape[axis]:
            count = -(-shape[axis] // max(fit, 1))
            chunk[axis] = -(-shape[axis] // count)
            break
        chunk[axis] = shape[axis]
    return tuple(chunk)


def save(directory: Path, params: Mapping[str, Lazy | jax.Array | np.ndarray]) -> None:
    """Writes path -> parameter as a tree; `directory` must not exist. When it returns, the disk has everything.

    Nothing is compressed: that would take longer than all the rest, for a fifth of the size of bf16 weights. Each
    array is a folder of its own, readable by anything that knows Zarr.
    """
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Lazy, _LazyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    tree = _nested({tuple(path.split("/")): value for path, value in params.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False, use_ocdbt=False)
    handler.finalize = lambda directory: None  # it would look for OCDBT files to merge, and warn that there are none
    with ocp.Checkpointer(handler) as checkpointer:
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
        # Of the handler: a Checkpointer looks for its own file, too, and warns where a manager has written the tree.
        tree = ocp.PyTreeCheckpointHandler().metadata(self.directory).tree
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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(
                self.directory,
                args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
            )
        return {"/".join(keys): value for keys, value in _flat(tree).items()}


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
