"""The records of an evaluation while it runs: nothing that was generated is lost to a kill, nothing is counted twice.

`NAME.run` says what is being measured; `NAME.jsonl` has one record a line, in the order in which they came, each
batch of them on disk before the next begins. Started again, an evaluation goes on behind the last whole question, if it
is the same one. At the end the file is written again in the order of the benchmark, so that it is the same however
often the evaluation was interrupted.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.evals.questions import Record
from pvm_jax.evals.results import ResultError, read_records, write_whole


class Ledger:
    """Records on disk. Of several processes that share the workdir one writes.

    Attributes:
      records: all that are known, in the order in which they came.
    """

    def __init__(self, workdir: Path, name: str, identity: Mapping[str, Any], seeds: Sequence[int], *, writes: bool):
        """Opens the records of `name`, or begins them.

        Args:
          identity: what decides the outcome, plain JSON values.
          seeds: questions without a record for each of them are asked again.
          writes: this process mends and extends the files; the others must open them after it has.

        Raises:
          ResultError: the workdir holds records of something else, or of no evaluation.
        """
        self.path, self._run = workdir / f"{name}.jsonl", workdir / f"{name}.run"
        self._writes = writes
        identity = json.loads(json.dumps(identity))
        self.records: list[Record] = []
        if self._run.is_file():
            self._check(identity)
            self.records = _whole(read_records(self.path, mend=True), seeds) if self.path.is_file() else []
        elif self.path.exists():
            raise ResultError(f"{self.path}: expected {self._run.name} beside it; choose another workdir, or remove it")
        if writes:
            workdir.mkdir(parents=True, exist_ok=True)
            write_whole(self._run, [json.dumps(identity, indent=1) + "\n"])
            write_records(self.path, self.records)

    def add(self, records: Sequence[Record]) -> None:
        """Appends records; they are on disk when this returns."""
        self.records.extend(records)
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(record) for record in records))
                file.flush()
                os.fsync(file.fileno())

    def replace(self, records: Sequence[Record]) -> None:
        """Puts records in the place of those with the same keys; they are on disk when this returns."""
        new = {record.key: record for record in records}
        self.records = [new.get(record.key, record) for record in self.records]
        if self._writes:
            write_records(self.path, self.records)

    def _check(self, identity: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._run.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultError(f"{self._run}: expected JSON, but it does not parse ({error}); remove it") from None
        differing = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
        if differing:
            shown = "; ".join(f"{k} was {_short(before.get(k))} and is {_short(identity.get(k))}" for k in differing)
            raise ResultError(f"{self._run}: the records there are of another evaluation ({shown}); use a new workdir")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes a file of records, in one go."""
    write_whole(path, (_line(record) for record in records))


def _line(record: Record) -> str:
    # ASCII: a completion may hold halves of surrogate pairs and separators that some readers take for line ends.
    return json.dumps(dataclasses.asdict(record)) + "\n"


def _whole(records: Sequence[Record], seeds: Sequence[int]) -> list[Record]:
    """The records of questions that have one for each seed; those that could not be asked are asked again."""
    if len({record.key for record in records}) < len(records):
        raise ResultError(
            f"{records[0].benchmark}: a question has two records; did two evaluations write to one workdir?"
        )
    answered: dict[str, set[int]] = {}
    for record in records:
        answered.setdefault(record.index, set()).add(record.seed)
    broken = {record.index for record in records if record.completion is None}
    return [r for r in records if r.index not in broken and answered[r.index] == set(seeds)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
