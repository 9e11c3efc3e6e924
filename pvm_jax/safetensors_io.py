"""Directories of safetensors files, read and written tensor by tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header (name ->
dtype, shape, byte range), then the tensors without gaps. Several files come with an index that says which tensor lies
where. Reading maps the files into memory, so that only what is used is read; writing reserves each file first and then
fills in tensors in any order. Both hold one tensor at a time.
"""

import contextlib
import dataclasses
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit
_PIECE_BYTES = 2**17  # what is read and written again right away should still be in the processor's cache


class WeightsError(ValueError):
    """What is wrong with weights; `problems` holds one sentence for each thing, the message one line."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `dtype` is the format's name for it, `start` and `end` are byte offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """All tensors of a directory.

    Attributes:
      entries: name -> Entry, of the files that could be read.
      problems: what is wrong with the files; the caller adds what is wrong with the tensors and raises.
      complete: False if a file could not be read that may have held any tensor.
      lost: tensors that a missing or unreadable file should have held.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        self.problems: list[str] = []
        self.complete = True
        self.lost: set[str] = set()
        self._maps: dict[Path, mmap.mmap] = {}
        if (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
            self._read_index(directory / INDEX)
        elif (directory / SINGLE).is_file():
            self.complete = self._read_file(directory / SINGLE)
        else:
            self.complete = False
            found = sorted(p.name for p in directory.glob("*.safetensors")) + sorted(
                p.name for p in directory.glob("*.bin")
            )
            got = f"got {', '.join(found[:3])}" if found else "found no weights"
            self.problems.append(f"{directory}: expected {SINGLE} or {INDEX}, {got}")

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a read-only view of its file: nothing is read before it is used."""
        entry = self.entries[name]
        if entry.file not in self._maps:
            with entry.file.open("rb") as file:
                self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._maps[entry.file], np.uint8, entry.end - entry.start, entry.start)
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's elements in order, without mapping any page; each array is overwritten by the next.

        Raises:
          WeightsError: the file has become shorter since it was checked.
        """
        entry = self.entries[name]
        buffer = np.empty(min(_PIECE_BYTES, entry.end - entry.start), np.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.end, _PIECE_BYTES):
                piece = left = memoryview(buffer)[: entry.end - start]
                while left:
                    count = file.readinto(left)
                    if not count:
                        missing = entry.end - file.tell()
                        raise WeightsError([f"{entry.file}: {name}: expected {missing} bytes more, the file ends"])
                    left = left[count:]
                yield np.frombuffer(piece, DTYPES[entry.dtype])

    def forget(self) -> None:
        """Gives back the memory of what `read` has shown: else whole files would count as this process's in the end.

        Views stay valid; what they show is read again when it is looked at again.
        """
        for mapped in list(self._maps.values()):
            mapped.madvise(mmap.MADV_DONTNEED)

    def _read_index(self, index: Path) -> None:
        weight_map = _weight_map(index, self.problems)
        self.complete = bool(weight_map)
        for file in sorted(set(weight_map.values())):
            names = {name for name, f in weight_map.items() if f == file}
            if not (self.directory / file).is_file():
                self.problems.append(
                    f"{self.directory / file}: expected this file, which {INDEX} names for {len(names)} tensors, "
                    "found none"
                )
                self.lost |= names
            elif not self._read_file(self.directory / file):
                self.lost |= names
        for name, file in weight_map.items():
            if name not in self.lost and (name not in self.entries or self.entries[name].file.name != file):
                where = self.entries[name].file.name if name in self.entries else "no file"
                self.problems.append(f"{index}: {name}: expected in {file}, found in {where}")
                self.lost.add(name)
        for name in self.entries.keys() - weight_map.keys():
            file = self.entries[name].file.name
            self.problems.append(f"{index}: {name}: found in {file}, but the index does not list it")

    def _read_file(self, file: Path) -> bool:
        """Adds the file's entries; False if they cannot be known."""
        try:
            header, data_start, size = _read_header(file)
            entries = {k: _entry(file, k, v, data_start) for k, v in header.items() if k != "__metadata__"}
        except WeightsError as e:
            self.problems += e.problems
            return False
        end = max((e.end for e in entries.values()), default=data_start)
        if end != size:
            why = "it is truncated, copy it again" if size < end else "something stands behind the tensors"
            self.problems.append(f"{file}: expected {end} bytes, got {size}; {why}")
        for name, entry in entries.items():
            if name in self.entries:
                self.problems.append(f"{file}: {name}: found in {self.entries[name].file.name} too")
            self.entries[name] = entry
        return True


def _weight_map(index: Path, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(f, str) for f in weight_map.values()) and weight_map:
            return weight_map
        problems.append(f"{index}: weight_map: expected tensor names with file names, got other values")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"{index}: expected a JSON object with a weight_map, but it cannot be read ({e!r})")
    return {}


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, offset of the first tensor, size of the file)."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise WeightsError(
                [f"{file}: expected a safetensors header of {length} bytes, got {max(size - 8, 0)}; it is truncated"]
            )
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise WeightsError([f"{file}: expected a JSON header, but it does not parse ({e})"]) from None
    if not isinstance(header, dict):
        raise WeightsError([f"{file}: expected a JSON object as header, got {type(header).__name__}"])
    return header, 8 + length, size


def _entry(file: Path, name: str, raw: Any, data_start: int) -> Entry:
    try:
        dtype, shape, (start, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
        valid = isinstance(dtype, str) and 0 <= start <= end and all(n >= 0 for n in shape)
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise WeightsError([f"{file}: {name}: expected dtype, shape and data_offsets, got {raw!r}"])
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise WeightsError(
            [f"{file}: {name}: expected {math.prod(shape)} elements of {dtype}, got a range of {end - start} bytes"]
        )
    return Entry(file, dtype, shape, data_start + start, data_start + end)


class SafetensorsWriter:
    """Writes tensors, in any order, into files of at most `max_bytes` (one tensor at least); a context.

    Files stay open until its end: a mounted bucket stores a file, whole, whenever it is closed.

    Args:
      directory: exists.
      tensors: name -> (shape, dtype), in the order in which they are laid out.
      max_bytes: tensor bytes per file.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_bytes: int):
        shards = _shards(tensors, max_bytes)
        names = [SINGLE]
        if len(shards) > 1:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        self.entries: dict[str, Entry] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._opened = contextlib.ExitStack()
        for file, shard in zip(names, shards, strict=True):
            self._reserve(directory / file, shard, tensors)
        if len(shards) > 1:
            sizes = [e.end - e.start for e in self.entries.values()]
            index = {
                "metadata": {"total_size": sum(sizes)},
                "weight_map": {name: self.entries[name].file.name for name in sorted(self.entries)},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.close()

    def write(self, name: str, value: np.ndarray) -> None:
        entry = self.entries[name]
        if (value.shape, value.dtype) != (entry.shape, DTYPES[entry.dtype]):
            raise ValueError(f"{name}: declared {entry.shape} {entry.dtype}, got {value.shape} {value.dtype}")
        file = self._files[entry.file]
        file.seek(entry.start)
        file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))

    def _reserve(self, file: Path, shard: list[str], tensors: Mapping) -> None:
        # "pt" is what transformers expects to find; it names the writer's framework, not the content's.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide elements first: every tensor then starts at a multiple of its element's size, as torch requires.
        for name in sorted(shard, key=lambda name: -np.dtype(tensors[name][1]).itemsize):
            shape, dtype = tensors[name]
            end = offset + math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._files[file] = opened = self._opened.enter_context(file.open("wb"))
        opened.write(len(raw).to_bytes(8, "little") + raw)
        opened.truncate(8 + len(raw) + offset)
        for name in shard:
            self.entries[name] = _entry(file, name, header[name], 8 + len(raw))


def _shards(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
