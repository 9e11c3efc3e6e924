"""Random-access data sources: `len(source)` and `source[i]` -> {"id", "messages"}, ready for the processor.

    open_source("train.jsonl", image_folder="pictures")            # or pictures.zip, pictures.tar, "parts/*.zip"
    open_source(["a/*.parquet", "b/*.parquet"], rename={"problem": "question"})
    open_source("~/tensorflow_datasets/digits/demo/2.2.0", split="sft_64")     # TFDS, without TensorFlow

Rows are read where they lie: JSONL by the offsets of its lines, parquet a row group at a time, TFDS by array_record.
What a row may look like is in `records.py`. All of it is safe to use from several threads.
"""

import array
import bisect
import collections
import glob
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pvm_jax.data.images import DataError
from pvm_jax.data.media import Folder, open_places
from pvm_jax.data.records import Adapt, RowReader

SUFFIXES = (".jsonl", ".parquet")


@runtime_checkable
class Source(Protocol):
    """What the loader needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record of a row; DataError if it cannot be used."""
        ...

    def describe(self, index: int) -> str:
        """File and row, for messages."""
        ...


def open_source(
    files: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    image_folder: str | Path | Sequence[str | Path] | None = None,
    rename: Mapping[str, str] | None = None,
    require_answer: bool = True,
    adapt: Adapt | None = None,
) -> "Records":
    """Opens JSONL and parquet files, folders of such files, or TFDS directories, one after the other.

    Args:
      files: paths or glob patterns. A folder that TFDS wrote is read by `tfds.builder_from_directory`.
      split: of TFDS directories, also a part like "train[:90%]"; files have no splits.
      image_folder: what relative image paths start from: folders, .zip or .tar files, or glob patterns of them; the
        first that has the image gives it. None: the folder of the file that names it.
      rename: {column of the data set: field of records.py}.
      require_answer: False for prompts alone.
      adapt: (row, where) -> the row in a form of records.py.
    """
    patterns = [files] if isinstance(files, str | Path) else list(files)
    opened: list[_Rows] = []
    groups = RowGroups()
    for path in itertools.chain.from_iterable(_expand(str(pattern)) for pattern in patterns):
        if path.is_dir():
            opened.append(TfdsRows(path, split))
        else:
            opened.append(JsonlRows(path) if path.suffix == ".jsonl" else ParquetRows(path, groups))
    places = open_places(image_folder) if image_folder else None
    readers = [RowReader(places or [Folder(rows.path.parent)], rename, require_answer, adapt) for rows in opened]
    if not sum(map(len, opened)):
        raise DataError(
            f"the data set is empty: no rows in {', '.join(map(str, patterns)) or 'an empty list of files'}"
        )
    return Records(opened, readers)


class Records:
    """The rows of several files, one after the other, as records."""

    def __init__(self, files: Sequence["_Rows"], readers: Sequence[RowReader]):
        self._files = files
        self._readers = readers
        self._starts = [0, *itertools.accumulate(map(len, files))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = self._locate(index)
        rows = self._files[number]
        return self._readers[number].record(rows.row(row), rows.where(row), f"{rows.name}:{row}")

    def describe(self, index: int) -> str:
        number, row = self._locate(index)
        return self._files[number].where(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


@runtime_checkable
class _Rows(Protocol):
    """The raw rows of one file; rows count from 0."""

    path: Path
    name: str  # begins the ids of rows that have none

    def __len__(self) -> int: ...

    def row(self, index: int) -> Mapping[str, Any]: ...

    def where(self, index: int) -> str: ...


class JsonlRows:
    """A JSON object a line. Opening reads the file once, to find its lines; blank lines are no rows."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        spans, lines, position = array.array("q"), array.array("q"), 0
        with open(path, "rb") as file:
            for line, content in enumerate(file, start=1):
                if not content.isspace():
                    spans.extend((position, position + len(content)))
                    lines.append(line)
                position += len(content)
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> Mapping[str, Any]:
        start, end = map(int, self._spans[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            row = json.loads(content)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.where(index)}: not JSON ({error}); expected one JSON object a line") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)}: expected a JSON object, got a {type(row).__name__}; one object a line, "
                "without a list around them"
            )
        return row

    def where(self, index: int) -> str:
        return f"{self.path} row {index} (line {self._lines[index]})"


class RowGroups:
    """The row groups of parquet files that were read last, as far as they take no more than `limit` bytes together.

    A shuffled order visits row groups at random. Text alone fits whole, whatever the size of its groups; files with
    images inside do not, and are quick with groups of about a hundred rows.
    """

    def __init__(self, limit: int = 2**32):
        self._limit, self._bytes = limit, 0
        self._tables: collections.OrderedDict[tuple[Path, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Path, int]) -> Any | None:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: tuple[Path, int], table: Any) -> None:
        """Keeps a group; the last one is kept whatever its size."""
        with self._lock:
            if key in self._tables:
                return
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > self._limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes


class ParquetRows:
    """A parquet file, read a row group at a time."""

    def __init__(self, path: Path, groups: RowGroups):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.name = path, path.name
        self._lock = threading.Lock()  # a ParquetFile is one cursor
        self._groups = groups
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a parquet file that can be read ({error})") from None
        meta = self._file.metadata
        self._starts = [0, *itertools.accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups))]

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Mapping[str, Any]:
        group = bisect.bisect_right(self._starts, index) - 1
        return self._group(group, index).slice(index - self._starts[group], 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"

    def _group(self, group: int, index: int) -> Any:
        import pyarrow as pa

        key = self.path, group
        table = self._groups.get(key)
        if table is not None:
            return table
        with self._lock:
            table = self._groups.get(key)  # another thread may have read it while this one waited
            if table is None:
                try:
                    table = self._file.read_row_group(group, use_threads=False)
                except (pa.ArrowInvalid, OSError) as error:
                    raise DataError(f"{self.where(index)}: row group {group} is damaged ({error})") from None
                self._groups.put(key, table)
            return table


class TfdsRows:
    """A split of a data set written by TFDS as array_record; never imports TensorFlow."""

    def __init__(self, path: Path, split: str):
        import tensorflow_datasets as tfds

        self.path = path
        self._split = split
        builder = tfds.builder_from_directory(path)
        name = split.partition("[")[0]
        if name not in builder.info.splits:
            raise DataError(f"{path}: no split {name!r}; it has {', '.join(sorted(builder.info.splits))}")
        self.name = f"{builder.info.full_name}:{split}"
        self._features = builder.info.features
        raw = {k: tfds.decode.SkipDecoding() for k, f in self._features.items() if isinstance(f, tfds.features.Image)}
        try:
            self._data = builder.as_data_source(split=split, decoders=raw)
        except ValueError:
            rows = builder.info.splits[name].num_examples
            raise DataError(
                f"{path}: expected a split as in {name}[:10] or {name}[10%:] that holds some of its {rows} rows, got "
                f"{split!r}"
            ) from None

    def __len__(self) -> int:
        return len(self._data)

    def row(self, index: int) -> Mapping[str, Any]:
        return _plain(self._features, self._data[index])

    def where(self, index: int) -> str:
        return f"{self.path} {self._split} row {index}"


def _plain(feature: Any, value: Any) -> Any:
    """A decoded TFDS value as what JSON would have: str for Text, lists for sequences, Python numbers."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(feature[name], value[name]) for name in feature}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict):  # TFDS turns a list of dicts into a dict of lists
            rows = [dict(zip(value, row)) for row in zip(*value.values())]
            return [_plain(inner, row) for row in rows]
        return [_plain(inner, item) for item in value]
    if isinstance(feature, tfds.features.Text):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def _expand(pattern: str) -> list[Path]:
    """The files and TFDS directories that a path, a folder or a glob pattern stands for, in order of name."""
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    if not found:
        raise DataError(f"no file matches {pattern!r}")
    paths: list[Path] = []
    for path in map(Path, found):
        if not path.is_dir() or (path / "features.json").exists():
            inside = [path]
        else:
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
            inside = inside or sorted(p.parent for p in path.rglob("features.json"))
            if not inside:
                raise DataError(f"{path}: no {' or '.join(SUFFIXES)} file and no TFDS data set in this folder")
        paths += inside
    unknown = [p for p in paths if p.is_file() and p.suffix not in SUFFIXES]
    if unknown:
        raise DataError(f"{unknown[0]}: expected {' or '.join(SUFFIXES)}, or a directory that TFDS wrote")
    return paths
