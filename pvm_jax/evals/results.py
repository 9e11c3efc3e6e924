"""Result files: `NAME.json` with the summary and what it was measured on, `NAME.jsonl` with one record per sample."""

import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pvm_jax.evals.questions import Record


class ResultError(ValueError):
    """A result file that cannot be used, or an evaluation that cannot be run; one sentence that says what to do."""


def write_results(
    workdir: str | Path,
    name: str,
    about: Mapping[str, Any],
    summary: Mapping[str, Any],
    records: Iterable[Mapping[str, Any]],
) -> Path:
    """Writes both files and returns the path of the summary, which is written last and replaced in one go."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(workdir / f"{name}.jsonl", (json.dumps(record) + "\n" for record in records))
    target = workdir / f"{name}.json"
    write_whole(target, [json.dumps({**about, "summary": summary}, indent=1) + "\n"])
    return target


def versions() -> dict[str, str]:
    """Of the packages that decide what a checkpoint answers."""
    names = ("pvm-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "transformers", "tokenizers")
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    return {name: installed.get(name, "not installed") for name in names}


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Writes a file that is either the old one or all of the new one, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file: the summary and what it was measured on.

    Raises:
      ResultError: it is not there, or no such file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: expected a result file that eval.py wrote, found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: expected JSON, but it does not parse ({error})") from None
    if not isinstance(content, dict) or "summary" not in content:
        raise ResultError(f"{path}: expected a result file that eval.py wrote, found no `summary` in it")
    return content


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary of a result file; raises like `read_result`."""
    return read_result(path)["summary"]


def read_records(path: str | Path, *, mend: bool = False) -> list[Record]:
    """The records of a file.

    Args:
      mend: a last line that was not written to its end is left out.

    Raises:
      ResultError: it is not there, or a line is no record; file and line are named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultError(f"{path}: expected the records that eval.py wrote, found no file") from None
    except UnicodeDecodeError as error:
        raise ResultError(f"{path}: expected UTF-8 text ({error})") from None
    lines = text.split("\n")
    if mend or not lines[-1]:
        lines.pop()
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: str, where: str) -> Record:
    try:
        return Record(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise ResultError(f"{where}: expected a record of an evaluation ({error})") from None
