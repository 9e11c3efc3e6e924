"""Result files: `NAME.json` with the summary and what it was measured on, `NAME.jsonl` with one record per sample."""

import dataclasses
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


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The samples of a benchmark's result, each with the fields of `questions.Record`.

    Raises:
      ResultError: the file is not there, or a line is no record, as where writing was cut short.
    """
    fields = {f.name: f.default for f in dataclasses.fields(Record)}
    records = []
    try:
        lines = Path(path).read_bytes().split(b"\n")  # not splitlines, which breaks at other characters too
    except FileNotFoundError:
        raise ResultError(f"{path}: expected the records of a result, found none; run eval.py again") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ResultError(f"{path}, line {number}: expected a record, but it does not parse; was it cut?") from None
        if not isinstance(record, dict):
            raise ResultError(f"{path}, line {number}: expected a record, found {type(record).__name__}")
        missing = [f for f, default in fields.items() if default is dataclasses.MISSING and f not in record]
        if missing:
            raise ResultError(f"{path}, line {number}: expected a record, found no {', '.join(missing)} in it")
        records.append({f: record.get(f, default) for f, default in fields.items()})
    return records
