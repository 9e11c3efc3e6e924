"""Benchmarks on disk -> Questions.

    benchmark = open_benchmark("mmbench_en", "MMBench_DEV_EN.tsv")       # VLMEvalKit's file
    benchmark = open_benchmark("mmmu", "MMMU/", split="validation")      # a folder of the hub's parquet files
    benchmark = open_benchmark("file:charts", "charts.jsonl")            # any other file: question, answer, ...
    benchmark[0].text, benchmark[0].answer, benchmark[0].images[0]       # images are read here, not decoded

Names are `benchmark_rows.KINDS` and `file:NAME`; where the files are: docs/evaluation.md. The layout is recognised by
the columns. Text is in memory, images are read when a question's `images` are looked at.

A row that cannot be used stays in its place: `broken` says why, in a sentence, and the harness counts it. What is
wrong with an image shows when it is asked for: `images` raises DataError, or what decodes it does.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.data.images import DataError
from pvm_jax.data.media import Folder, MediaReader
from pvm_jax.evals import benchmark_rows as rows
from pvm_jax.evals.benchmark_files import Table, is_image, open_tables
from pvm_jax.evals.benchmark_rows import FILE, KINDS, Kind, Layout, Sign
from pvm_jax.evals.questions import Question
from pvm_jax.evals.results import ResultError

FILE_PREFIX = "file:"

_PATH_LENGTH = 64  # characters of an image's cell that is a path; longer ones without a dot are base64
_LOOKED_AT = 200  # questions, to tell benchmarks with the same columns from each other
_IMAGE_COLUMNS = ("decoded_image", "images", "image", "image_path")  # the first that has something gives the images


class Benchmark(Sequence[Question]):
    """The questions of a benchmark, in the order of its files. Safe to use from several threads.

    Attributes:
      name: in results; of "file:charts" it is "charts".
      kind: a key of KINDS, or "file"; what `protocols.task` wants to know.
      layout: "tsv", "parquet" or "file".
      split: the part of it that was asked for; None: all.
      broken: index -> what is wrong with that row, one sentence. Its question has an index, labels, and little else.
      files: path -> sha256.
      checksum: of all files together; of a single file its sha256.
    """

    def __init__(self, name: str, kind: str, layout: str, split: str | None, tables: Sequence[Table], keep: list):
        self.name, self.kind, self.layout, self.split = name, kind, layout, split
        self.files = {str(table.path): table.checksum for table in tables}
        self.checksum = _together(list(self.files.values()))
        self._tables, self._rows = tables, keep
        self._media = [MediaReader([Folder(table.path.parent)]) for table in tables]
        self._questions: list[Question] = []
        self._places: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self._read(FILE if kind == "file" else KINDS[kind])

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, position):
        return self._questions[position]

    def where(self, index: str) -> str:
        """File and row of a question, for messages."""
        table, row = self._rows[self._places[index]]
        return self._tables[table].where(row)

    def _read(self, kind: Kind) -> None:
        for position, (number, row) in enumerate(self._rows):
            table = self._tables[number]
            cells = rows.filled(table.text(row))
            # In a file with indices, the place of a row without one could be another row's.
            has_own = any(column in table.columns for column in rows.INDEX) or table.problem(row)
            index = rows.index_of(cells, f"row {position}" if has_own else str(position))
            if index in self._places:
                raise DataError(
                    f"{table.where(row)}: index {index!r} is that of {self.where(index)} too; every row needs its own"
                )
            self._places[index] = position
            images = _Images(lambda position=position: self._images(position, kind.needs_image))
            problem = table.problem(row)
            try:
                if problem is None:
                    if kind.integers and not index.isdecimal():
                        raise DataError(f"index: expected a whole number, got {index!r}")
                    self._questions.append(rows.read_question(kind, self.layout, cells, index, images))
                    continue
            except DataError as error:
                problem = f"{table.where(row)}, {error}"
            self.broken[index] = problem
            self._questions.append(rows.broken_question(kind, cells, index))

    def _images(self, position: int, needed: bool) -> list[Any]:
        """The images of a row as bytes or paths, in order; a column may name the row that has them."""
        number, row = self._rows[position]
        where = self._tables[number].where(row)
        cells, column = _cells(self._tables[number].images(row))
        if named := self._named(cells):
            number, row = self._rows[self._places[named]]
            cells, column = _cells(self._tables[number].images(row))
            if self._named(cells):
                raise DataError(f"{where}, {column}: expected an image in row {named}, which names another row")
        if needed and not cells:
            raise DataError(f"{where}: expected an image, and the row has none", "missing image")
        media = self._media[number]
        return [media.read("image", _encoded(cell), f"{where}, {column}[{i}]")["image"] for i, cell in enumerate(cells)]

    def _named(self, cells: Sequence[Any]) -> str | None:
        """The index of the row that has the images instead, if that is what the cell says."""
        single = cells[0] if len(cells) == 1 else None
        return single if isinstance(single, str) and single in self._places else None


class _Images(Sequence[Any]):
    """Images that are read from their file whenever they are looked at."""

    def __init__(self, read: Callable[[], list[Any]]):
        self._read = read

    def __len__(self) -> int:
        return len(self._read())

    def __getitem__(self, position):
        return self._read()[position]

    def __iter__(self):
        return iter(self._read())


def open_benchmark(name: str, files: str | Path | Sequence[str | Path], split: str | None = None) -> Benchmark:
    """Opens a benchmark's files.

    Args:
      name: a key of KINDS, or "file:NAME" for any other file of questions.
      files: paths, folders or glob patterns of .tsv, .parquet and .jsonl.
      split: rows of files named after it (`validation-00000-of-00001.parquet`), and rows that have it in a column
        `split`. None: all.

    Raises:
      ResultError: there is no such benchmark.
      DataError: a file that cannot be read or is not what its name says, no rows, two rows with one index, or not a
        single row that can be used.
    """
    kind = benchmark_kind(name)
    tables = open_tables(files)
    kept = _kept(tables, split)
    used = sorted({number for number, _ in kept})
    tables, kept = [tables[number] for number in used], [(used.index(number), row) for number, row in kept]
    layouts = (FILE if kind == "file" else KINDS[kind]).layouts
    names = {_layout(name, layouts, table).name for table in tables}
    if len(names) > 1:
        raise DataError(f"{tables[0].path}: expected files of one layout, got {' and '.join(sorted(names))}")
    benchmark = Benchmark(name.removeprefix(FILE_PREFIX), kind, *names, split, tables, kept)
    if len(benchmark.broken) == len(benchmark):
        first = next(iter(benchmark.broken.values()))
        raise DataError(f"{name}: none of {len(benchmark)} rows can be used; the first: {first}")
    if kind != "file":
        _check_sign(benchmark, KINDS[kind].sign, tables[0].path)
    return benchmark


def benchmark_kind(name: str) -> str:
    """The key of KINDS, or "file", that a name stands for; raises ResultError for one that is not known."""
    if name.startswith(FILE_PREFIX):
        own = name.removeprefix(FILE_PREFIX)
        if not re.fullmatch(r"[\w.-]+", own) or own in KINDS:
            raise ResultError(f"{name}: expected a name of letters, digits, _, . and - that no benchmark has")
        return "file"
    if name not in KINDS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), KINDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(KINDS)}"
        raise ResultError(f"benchmark {name!r} is not known; {hint} Other files are `{FILE_PREFIX}NAME`")
    return name


def _layout(name: str, layouts: Sequence[Layout], table: Table) -> Layout:
    fitting = [layout for layout in layouts if layout.fits(table.columns)]
    of_suffix = [layout for layout in fitting if layout.name == table.path.suffix[1:]]
    if fitting:
        return (of_suffix or fitting)[0]
    forms = [", ".join(one.columns) + (f" without {', '.join(one.absent)}" if one.absent else "") for one in layouts]
    expected = "; or ".join(dict.fromkeys(forms))
    raise DataError(
        f"{table.path}: expected the columns of {name} ({expected}), found {', '.join(table.columns) or 'none'}"
    )


def _kept(tables: Sequence[Table], split: str | None) -> list[tuple[int, int]]:
    """(table, row) of the rows of a split."""
    everything = [(number, row) for number, table in enumerate(tables) for row in range(len(table))]
    if not everything:
        raise DataError(f"{', '.join(str(t.path) for t in tables)}: expected rows, found only a header or nothing")
    if split is None:
        return everything
    named = {n for n, t in enumerate(tables) if t.path.stem == split or t.path.stem.startswith(f"{split}-")}
    kept = [(n, row) for n, row in everything if n in named or tables[n].text(row).get("split") == split]
    if not kept:
        found = {str(tables[n].text(row).get("split")) for n, row in everything if tables[n].text(row).get("split")}
        found |= {t.path.stem.partition("-")[0] for t in tables if "-of-" in t.path.stem}
        raise DataError(
            f"{tables[0].path}: split {split!r} is empty; found {', '.join(sorted(found)) or 'no splits at all'}"
        )
    return kept


def _check_sign(benchmark: Benchmark, sign: Sign | None, path: Path) -> None:
    """Benchmarks with the same columns are told apart by what their questions contain."""
    looked = [question for question in benchmark[:_LOOKED_AT] if question.index not in benchmark.broken]
    if sign is None or not looked:
        return
    count = sum(bool(sign.pattern.search(question.text + "".join(question.options.values()))) for question in looked)
    if (count > len(looked) / 2) != sign.wanted:
        raise DataError(
            f"{path}: expected {benchmark.name}, {'most' if sign.wanted else 'few'} of whose questions have "
            f"{sign.name}; {count} of the first {len(looked)} have"
        )


def _cells(columns: Mapping[str, Any]) -> tuple[list[Any], str]:
    """The entries of a row's images, in order, and the column they are from."""
    filled = rows.filled({name: value for name, value in columns.items() if is_image(name)})
    numbered = sorted((int(n[1]), name) for name in filled if (n := re.fullmatch(r"image_([0-9]+)", name)))
    if numbered:
        return [filled[name] for _, name in numbered], "image_"
    for column in _IMAGE_COLUMNS:
        if column in filled:
            value = rows.literal(filled[column])
            entries = value if isinstance(value, list | tuple) else [value]
            return [e for e in entries if e is not None and e != ""], column
    return [], "image"


def _encoded(cell: Any) -> Any:
    """Long text without a dot is base64, whatever is wrong with it; so a broken image is not taken for a path."""
    if isinstance(cell, str) and len(cell) > _PATH_LENGTH and "." not in cell:
        return {"bytes": cell}
    return cell


def _together(checksums: Sequence[str]) -> str:
    return checksums[0] if len(checksums) == 1 else hashlib.sha256("\n".join(checksums).encode()).hexdigest()
