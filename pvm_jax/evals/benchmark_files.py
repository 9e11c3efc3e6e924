"""Files of benchmarks as tables: rows without their images, and the images of a row when asked for.

TSV (VLMEvalKit, images in base64), parquet (Hugging Face) and JSONL. What stays in memory is text; a row's images are
read from the file again, so that a benchmark of several GB needs a few MB. Safe to use from several threads.
"""

import csv
import glob
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pvm_jax.data.images import DataError
from pvm_jax.data.sources import JsonlRows, ParquetRows, RowGroups

SUFFIXES = (".tsv", ".parquet", ".jsonl")

_IMAGE = re.compile(r"image|images|decoded_image|image_path|image_[0-9]+")
_POINTER = b"version https://git-lfs"
_CACHE = 2**29  # bytes of parquet row groups


@runtime_checkable
class Table(Protocol):
    """One file; rows count from 0.

    Attributes:
      columns: of all rows, in order of appearance.
      checksum: sha256 of the file, hexadecimal.
    """

    path: Path
    columns: tuple[str, ...]
    checksum: str

    def __len__(self) -> int: ...

    def text(self, row: int) -> Mapping[str, Any]:
        """The row without its images."""
        ...

    def images(self, row: int) -> Mapping[str, Any]:
        """The row's cells of images, as they stand in the file."""
        ...

    def where(self, row: int) -> str:
        """File and row, for messages."""
        ...

    def problem(self, row: int) -> str | None:
        """Why the row is not one of this file's, in one sentence; None mostly."""
        ...


def open_tables(files: str | Path | Sequence[str | Path]) -> list[Table]:
    """Opens a file, several, a folder of them, or what glob patterns match; in order of name.

    Raises:
      DataError: there is none, or one that cannot be read.
    """
    groups = RowGroups(_CACHE)
    return [_open(path, groups) for path in table_paths(files)]


def table_paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that paths, folders and glob patterns stand for.

    Raises:
      DataError: one stands for none.
    """
    patterns = [files] if isinstance(files, str | Path) else list(files)
    return [path for pattern in patterns for path in _expand(Path(pattern).expanduser())]


def is_image(column: str) -> bool:
    """Whether a column is one of images, by its name."""
    return _IMAGE.fullmatch(column) is not None


def _expand(path: Path) -> list[Path]:
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise DataError(f"no file matches {str(path)!r}")
    paths = []
    for one in found:
        inside = sorted(p for p in one.rglob("*") if p.suffix in SUFFIXES) if one.is_dir() else [one]
        if not inside:
            raise DataError(f"{one}: no {' or '.join(SUFFIXES)} file in this folder")
        paths += inside
    return paths


def _open(path: Path, groups: RowGroups) -> Table:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise DataError(
                f"{path}: this is a Git LFS pointer and not the file itself; download it with `git lfs pull`"
            )
    if path.suffix == ".tsv":
        return TsvTable(path)
    return ParquetTable(path, groups) if path.suffix == ".parquet" else JsonlTable(path)


class TsvTable:
    """A TSV as pandas writes it: UTF-8, cells with tabs, newlines or quotes in double quotes, a header.

    Opening reads the file once, for its text, its checksum and where its rows are.
    """

    def __init__(self, path: Path):
        self.path = path
        csv.field_size_limit(sys.maxsize)  # of the whole process; Python's default is 128 KiB, less than an image
        starts, self._texts, self._widths = [], [], {}
        with open(path, "rb") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, delimiter="\t", strict=True)  # an unclosed quote would swallow the rest
            try:
                self.columns = tuple(next(reader, ()))
                starts.append(lines.position)
                for cells in reader:
                    if not cells:  # an empty line at the end
                        starts[-1] = lines.position
                        continue
                    if len(cells) != len(self.columns):
                        self._widths[len(self._texts)] = len(cells)
                    pairs = zip(self.columns, cells)
                    self._texts.append({name: cell for name, cell in pairs if not is_image(name)})
                    starts.append(lines.position)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{path}: not a TSV in UTF-8, as its name says ({error})") from None
        self._starts = np.array(starts, np.int64)
        self.checksum = lines.digest.hexdigest()

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, row: int) -> Mapping[str, Any]:
        return self._texts[row]

    def images(self, row: int) -> Mapping[str, Any]:
        start, end = map(int, self._starts[row : row + 2])
        with open(self.path, "rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read(end - start))
        cells = next(csv.reader(_Lines(content), delimiter="\t"))
        return {name: cell for name, cell in zip(self.columns, cells) if is_image(name)}

    def where(self, row: int) -> str:
        return f"{self.path} row {row}"

    def problem(self, row: int) -> str | None:
        if row not in self._widths:
            return None
        return (
            f"{self.where(row)}: expected {len(self.columns)} cells as in the header, got {self._widths[row]}; the "
            "file is damaged or not complete"
        )


class _Lines:
    """The lines of a file as text, with the position behind the last one and the checksum of all read so far."""

    def __init__(self, lines: Iterable[bytes]):
        self._bytes = iter(lines)
        self.position = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._bytes)
        first = not self.position
        self.position += len(line)
        self.digest.update(line)
        return line.decode("utf-8-sig" if first else "utf-8")


class _RowsTable:
    """A table whose rows `data.sources` reads."""

    _rows: JsonlRows | ParquetRows
    _texts: list[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self._rows)

    def text(self, row: int) -> Mapping[str, Any]:
        return self._texts[row]

    def images(self, row: int) -> Mapping[str, Any]:
        return {name: value for name, value in self._rows.row(row).items() if is_image(name)}

    def where(self, row: int) -> str:
        return self._rows.where(row)


class ParquetTable(_RowsTable):
    """A parquet file; its text is read at once, images a row group at a time."""

    def __init__(self, path: Path, groups: RowGroups):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._rows = ParquetRows(path, groups)
        try:
            self.columns = tuple(pq.read_schema(path).names)
            self._texts = pq.read_table(path, columns=[n for n in self.columns if not is_image(n)]).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a parquet file that can be read ({error})") from None
        self.checksum = _sha256(path)

    def problem(self, row: int) -> str | None:
        return None


class JsonlTable(_RowsTable):
    """A JSON object a line."""

    def __init__(self, path: Path):
        self.path = path
        self._rows = JsonlRows(path)
        self._texts, self._problems, columns = [], {}, {}
        for index in range(len(self._rows)):
            try:
                row = self._rows.row(index)
            except DataError as error:
                row, self._problems[index] = {}, str(error)
            columns |= dict.fromkeys(row)
            self._texts.append({name: value for name, value in row.items() if not is_image(name)})
        self.columns = tuple(columns)
        self.checksum = _sha256(path)

    def problem(self, row: int) -> str | None:
        return self._problems.get(row)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
