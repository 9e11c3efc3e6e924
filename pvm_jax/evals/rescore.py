"""Scores the records of an evaluation again, by the rules of today: no model, no images, nothing is generated.

    python -m pvm_jax.evals.rescore runs/eval-8b/mmstar.json --out=runs/rescored

Verdicts that a judge gave are kept. The new NAME.json says from which version of the protocol to which.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pvm_jax.evals import aggregate, protocols
from pvm_jax.evals.extract import RULES
from pvm_jax.evals.protocols import Task
from pvm_jax.evals.questions import Question, Record
from pvm_jax.evals.results import ResultError, read_records, read_result, versions, write_results
from pvm_jax.grading import Grader, GradingError


def rescore(path: str | Path, rule: str | None = None) -> tuple[dict[str, Any], list[Record], Task]:
    """The result file with the summary of today's verdicts, the records with these, and the task that gave them.

    Args:
      rule: of `extract.RULES`; None: the one that was used.

    Raises:
      ResultError: no result of a benchmark, or records that are not its own.
    """
    path = Path(path)
    result = read_result(path)
    summary = result["summary"]
    if "task" not in summary:
        raise ResultError(f"{path}: expected the result of a benchmark (pvm_jax.evals.harness)")
    task = protocols.task(summary["protocol"], summary["task"]["benchmark"], summary["task"]["random_seed"])
    task = dataclasses.replace(task, seeds=tuple(summary["task"]["seeds"]), rule=rule or summary["task"]["rule"])
    records = read_records(path.with_suffix(".jsonl"))
    found, questions = len({record.index for record in records}), summary["data"]["questions"]
    if found != questions:
        lines = path.with_suffix(".jsonl")
        raise ResultError(f"{lines}: expected records of {questions} questions, as {path.name} says, found {found}")
    with closing(Grader()) as grader:
        records = [_judged_again(task, record, grader) for record in records]
    expected = {(summary["data"]["name"], record.index, seed) for record in records for seed in task.seeds}
    kept = {key: summary[key] for key in ("data", "task", "judge")}
    before = {"version": summary["version"], "rule": summary["task"]["rule"], "score": summary["score"]}
    new = aggregate.aggregate(task, expected, records) | kept | {"rescored_from": before}
    new["task"] = kept["task"] | {"rule": task.rule, "version": task.version}
    return result | {"summary": new, "versions": versions()}, records, task


def _judged_again(task: Task, record: Record, grader: Grader) -> Record:
    if record.completion is None or record.judge:
        return record
    verdict = task.verdict(Question(**record.question), record.completion, grader.grade)
    return dataclasses.replace(record, **dataclasses.asdict(verdict))


def changed(before: Mapping[tuple, bool], records: list[Record]) -> str:
    """How many verdicts differ, in a sentence."""
    now = {record.key: record.right for record in records}
    gained = sum(now[key] and not before[key] for key in now)
    lost = sum(before[key] and not now[key] for key in now)
    return f"{gained} answers count as right that did not, {lost} no longer do, of {len(now)}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Scores the records of an evaluation again.")
    parser.add_argument("file", help="NAME.json of a benchmark that eval.py wrote; NAME.jsonl lies beside it")
    parser.add_argument("--out", required=True, help="folder of the new NAME.json and NAME.jsonl")
    parser.add_argument("--rule", choices=sorted(RULES), help="default: the one that was used")
    options = parser.parse_args(args)
    path = Path(options.file)
    try:
        if path.parent.resolve() == Path(options.out).resolve():
            raise ResultError(f"--out: expected another folder than that of {path}, whose records would be replaced")
        before = {record.key: record.right for record in read_records(path.with_suffix(".jsonl"))}
        result, records, _ = rescore(path, options.rule)
        about = {key: value for key, value in result.items() if key != "summary"}
        target = write_results(options.out, path.stem, about, result["summary"], map(dataclasses.asdict, records))
    except (ResultError, GradingError, OSError) as error:
        sys.exit(f"error: {error}")
    print(aggregate.table(result["summary"]))
    print(f"\n{changed(before, records)}\nresults: {target}")


if __name__ == "__main__":
    main()
