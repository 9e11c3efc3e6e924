"""Several results side by side: a table, the same as Markdown and JSON, and a page to look at every sample.

    python -m pvm_jax.evals.report base/mmstar.json pvm/mmstar.json --names="base,base + PVM" --out=report.html \\
        --data=mmstar=MMStar.tsv --markdown=report.md --json=report.json

Results of the same benchmark are compared, and only if one version of one protocol measured them; each benchmark is a
section of its own. All outputs are made of one list of sections, so that their figures cannot differ. The page needs
no network and no other file (`pages`).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.data.images import DataError
from pvm_jax.evals.intervals import interval, percent
from pvm_jax.evals.pages import Images, write_page
from pvm_jax.evals.results import ResultError, read_records, read_result

NEEDED = ("benchmark", "protocol", "version", "samples", "seeds", "metric", "score", "scores", "by", "by_length")
MISSES = ("truncated", "unparsed", "broken", "unjudged", "ungraded")
"""Shares of answers that are wrong for another reason than what they say; a table has those that occur."""
ALWAYS = ("truncated", "unparsed")


@dataclasses.dataclass(frozen=True)
class Run:
    """One result: a model on a benchmark.

    Attributes:
      name: of the model, as the user calls it.
      path: of NAME.json.
      about: what was measured on what: everything in that file but the summary.
      summary: see `aggregate`.
      records: the lines of NAME.jsonl by (index, seed).
    """

    name: str
    path: Path
    about: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: Mapping[tuple[str, int], Mapping[str, Any]]

    @property
    def measured_by(self) -> str:
        return f"{self.summary['protocol']}, version {self.summary['version']}"


@dataclasses.dataclass(frozen=True)
class Section:
    """The runs of one benchmark, with what every output says of them.

    Attributes:
      header, rows: the table, in words.
      pairs: what each pair of runs disagrees on, as sentences.
    """

    benchmark: str
    runs: Sequence[Run]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    pairs: Sequence[str]

    @property
    def title(self) -> str:
        return f"{self.benchmark} ({self.runs[0].measured_by})"


def read_run(path: str | Path, name: str) -> Run:
    """Both files of a result.

    Raises:
      ResultError: one is missing, is no such file or was written in part, or they do not belong together.
    """
    path = Path(path)
    about = read_result(path)
    summary = about.pop("summary")
    missing = [key for key in NEEDED if not isinstance(summary, Mapping) or key not in summary]
    if missing:
        raise ResultError(
            f"{path}: expected the result of a benchmark, found no {', '.join(missing)} in its summary; "
            "results of the digits evaluation are compared by pvm_jax.evals.compare"
        )
    lines = path.with_suffix(".jsonl")
    records: dict[tuple[str, int], Mapping[str, Any]] = {}
    for record in map(dataclasses.asdict, read_records(lines)):
        key = str(record["index"]), record["seed"]
        if key in records:
            raise ResultError(f"{lines}: expected one record of each sample and seed, found two of {key}")
        if record["benchmark"] != summary["benchmark"]:
            raise ResultError(f"{lines}: expected records of {summary['benchmark']}, found {record['benchmark']!r}")
        records[key] = record
    asked = len({index for index, _ in records})
    if asked != summary["samples"] or len(records) != asked * len(summary["seeds"]):
        raise ResultError(
            f"{lines}: expected {summary['samples']} samples with seeds {summary['seeds']}, as {path.name} says, found "
            f"{len(records)} records of {asked}; was the evaluation stopped? Run eval.py again with the same workdir"
        )
    return Run(name, path, about, summary, records)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Runs by benchmark, in the order of their first.

    Raises:
      ResultError: runs of a benchmark that do not compare: protocols, versions or questions differ, or they have the
        same name.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.summary["benchmark"], []).append(run)
    made = []
    for benchmark, group in groups.items():
        _check_comparable(benchmark, group)
        made.append(Section(benchmark, group, *_table(group), _pairs(group)))
    return made


def _check_comparable(benchmark: str, runs: Sequence[Run]) -> None:
    first = runs[0]
    for i, run in enumerate(runs):
        if run.measured_by != first.measured_by:
            raise ResultError(
                f"{benchmark}: expected results of one protocol, found {first.measured_by} in {first.path} and "
                f"{run.measured_by} in {run.path}, whose scores do not compare; report them apart"
            )
        if run.name in [other.name for other in runs[:i]]:
            raise ResultError(f"{benchmark}: expected runs of different names, found {run.name!r} twice; pass --names")
        differing = [key for key, value in _decisive(run).items() if value != _decisive(first)[key]]
        if differing:
            raise ResultError(
                f"{benchmark}: expected runs with the same settings, but {', '.join(differing)} of {run.path} is not "
                f"that of {first.path}; report them apart"
            )
        asked = {index: record["question"] for (index, _), record in first.records.items()}
        for (index, _), record in run.records.items():
            theirs, ours = asked.get(index), record["question"]
            if theirs and any(theirs.get(key) != ours.get(key) for key in ("text", "answer", "options")):
                raise ResultError(
                    f"{benchmark}: expected the same questions in every run, but {index!r} in {run.path} is not that "
                    f"of {first.path}; were they measured on different files?"
                )


def _decisive(run: Run) -> dict[str, Any]:
    """What runs must have in common so that a difference is one of the models; pixels may be a checkpoint's own."""
    task, data = run.summary.get("task", {}), run.summary.get("data", {})
    names = ("rule", "max_new_tokens", "sampling", "seeds", "stop", "random_seed")
    found = {name: task.get(name) for name in names} | {name: data.get(name) for name in ("split", "limit")}
    return found | {"judge": run.summary.get("judge")}


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The header, and a row of cells for each run."""
    metric = runs[0].summary["metric"]
    names = [metric, *dict.fromkeys(n for run in runs for n in run.summary["scores"] if n != metric)]
    misses = [m for m in MISSES if m in ALWAYS or any((run.summary.get(m) or {}).get("right") for run in runs)]
    header = ["run", f"{metric} (95 % interval)", *names[1:], *misses, "seeds", "samples"]
    rows = []
    for run in runs:
        scores = [run.summary["scores"].get(name) for name in names]
        shown = [interval(score) for score in scores]
        shares = [counted(run.summary.get(m)) for m in misses]
        rows.append([run.name, *shown, *shares, _seeds(run, scores[0]), str(run.summary["samples"])])
    return header, rows


def counted(share: Mapping[str, Any] | None) -> str:
    """`1.2 % (18)`: a share and how many that are."""
    return "-" if share is None or share["value"] is None else f"{percent(share['value'])} ({share['right']})"


def _seeds(run: Run, score: Mapping[str, Any] | None) -> str:
    """`1`, or `4, spread 1.2 %`: the standard deviation over seeds."""
    count = len(run.summary["seeds"])
    spread = (score or {}).get("spread")
    return str(count) if count == 1 or spread is None else f"{count}, spread {percent(spread)}"


def _pairs(runs: Sequence[Run]) -> list[str]:
    """How often each two runs both answered the same sample, with the same seed, and only one was right."""
    lines = []
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            common = [key for key in a.records if key in b.records]
            verdicts = [(a.records[key]["right"], b.records[key]["right"]) for key in common]
            line = (
                f"{a.name} and {b.name}: {len(common)} answers to the same questions, {verdicts.count((True, True))} "
                f"right in both, {verdicts.count((True, False))} only in {a.name}, {verdicts.count((False, True))} "
                f"only in {b.name}"
            )
            alone = len(a.records) + len(b.records) - 2 * len(common)
            lines.append(line + (f"; {alone} answers have no counterpart" if alone else ""))
    return lines


def as_text(parts: Iterable[Section]) -> str:
    """Tables for a terminal; characters that would steer it are left out."""
    blocks = []
    for part in parts:
        table = [[printable(cell) for cell in row] for row in (part.header, *part.rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in table
        ]
        blocks.append("\n".join([printable(part.title), *lines, *map(printable, part.pairs)]))
    return "\n\n".join(blocks)


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_markdown(parts: Iterable[Section]) -> str:
    """The same tables, then accuracy by category and by length of the answer."""
    lines = ["# Evaluation", ""]
    for part in parts:
        lines += [f"## {_md(part.title)}", "", *_md_table(part.header, part.rows), ""]
        lines += [line for pair in part.pairs for line in (f"- {_md(pair)}",)] + [""] * bool(part.pairs)
        for title, rows in breakdown(part):
            header = [title, *(run.name for run in part.runs)]
            lines += [*_md_table(header, [[label, *map(_cell, shares)] for label, shares in rows]), ""]
    return "\n".join(lines)


def breakdown(part: Section) -> list[tuple[str, list[tuple[str, list[Mapping[str, Any] | None]]]]]:
    """[(label, [(its value, the share of each run)])]: every label, then the answers' length in tokens."""
    made = []
    for label in dict.fromkeys(label for run in part.runs for label in run.summary["by"]):
        tables = [run.summary["by"].get(label, {}) for run in part.runs]
        values = dict.fromkeys(value for table in tables for value in table)
        made.append((label, [(value, [table.get(value) for table in tables]) for value in values]))
    tables = [{(b["from"], b["to"]): b for b in run.summary["by_length"]} for run in part.runs]
    bins = sorted({key for table in tables for key in table}, key=lambda key: key[0])
    rows = [(_length(*key), [table.get(key) for table in tables]) for key in bins]
    return [*made, ("answer in tokens", rows)] if rows else made


def _length(low: int, high: int | None) -> str:
    return f"from {low}" if high is None else f"{low}-{high - 1}"


def _cell(share: Mapping[str, Any] | None) -> str:
    return "-" if share is None else f"{interval(share)}, n = {share['count']}"


def _md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[_md(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] + ["--:"] * (len(header) - 1))
    return ["| " + " | ".join(row) + " |" for row in lines]


def _md(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    text = printable(" ".join(text.split()))
    for character in "\\`*_[]|":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def as_json(parts: Iterable[Section]) -> list[dict[str, Any]]:
    """The tables in words, and the summaries that they were made of."""
    return [
        {
            "benchmark": part.benchmark,
            "protocol": part.runs[0].summary["protocol"],
            "version": part.runs[0].summary["version"],
            "metric": part.runs[0].summary["metric"],
            "header": list(part.header),
            "rows": [list(row) for row in part.rows],
            "pairs": list(part.pairs),
            "breakdown": [{"label": label, "rows": rows} for label, rows in breakdown(part)],
            "runs": [
                {"name": run.name, "path": str(run.path), "about": run.about, "summary": run.summary}
                for run in part.runs
            ],
        }
        for part in parts
    ]


def read_sections(files: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Section]:
    """Results by benchmark.

    Args:
      files: NAME.json of each; NAME.jsonl lies beside it.
      names: of the runs, one for each file, or one for each folder if several files lie in one; None: the folders'.

    Raises:
      ResultError: files that are no results, or that do not compare.
    """
    return sections([read_run(file, name) for file, name in zip(files, _names(files, names))])


def as_page(parts: Sequence[Section], images: Images | None = None, max_samples: int = 500) -> str:
    """The page; see `pages.write_page`."""
    return write_page(as_json(parts), [[run.records for run in part.runs] for part in parts], images, max_samples)


def _names(files: Sequence[str | Path], names: Sequence[str] | None) -> list[str]:
    folders = [Path(file).resolve().parent for file in files]
    different = list(dict.fromkeys(folders))
    if names is None:
        return [folder.name for folder in folders]
    if len(names) == len(files):
        return list(names)
    if len(names) == len(different):
        return [names[different.index(folder)] for folder in folders]
    raise ResultError(
        f"--names: expected {len(files)} names, one for each file"
        + (f", or {len(different)}, one for each folder" if len(different) != len(files) else "")
        + f", got {len(names)}"
    )


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")


def open_images(given: Sequence[str], split: str | None, parts: Sequence[Section]) -> Images:
    """Images of the questions in benchmark files.

    Args:
      given: `NAME=PATH`, or only a path if there is one benchmark.
      split: of these files, see `open_benchmark`.

    Raises:
      ResultError: a benchmark that is not in the report, or a file that does not hold the questions of its records.
    """
    from pvm_jax.evals.benchmarks import KINDS, open_benchmark  # with pyarrow, which is needed for images only

    found: dict[tuple[str, str], Sequence[Any]] = {}
    for text in given:
        named = [part for part in parts if text.startswith(f"{part.benchmark}=")]
        if not named and len(parts) > 1:
            raise ResultError(f"--data={text}: expected NAME=PATH, NAME one of {', '.join(p.benchmark for p in parts)}")
        part = named[0] if named else parts[0]
        path = text.removeprefix(f"{part.benchmark}=")
        name = part.benchmark if part.benchmark in KINDS else f"file:{part.benchmark}"
        questions = {question.index: question for question in open_benchmark(name, path, split)}
        for run in part.runs:
            for (index, _), record in run.records.items():
                if index not in questions or questions[index].text != record["question"]["text"]:
                    raise ResultError(
                        f"{path}: expected the questions of {run.path}, but {index!r} is "
                        + ("another one" if index in questions else "not there")
                        + "; pass the file that was evaluated, and --split if it has several"
                    )
                found[part.benchmark, index] = questions[index].images
    return lambda benchmark, index: found.get((benchmark, index), ())


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compares results of benchmarks.")
    parser.add_argument("files", nargs="+", metavar="NAME.json", help="result files that eval.py wrote")
    parser.add_argument("--names", help="comma-separated, one for each file or folder; default: the folders' names")
    parser.add_argument("--out", metavar="FILE", help="HTML page to write")
    parser.add_argument("--markdown", metavar="FILE", help="Markdown to write")
    parser.add_argument("--json", metavar="FILE", help="JSON to write")
    parser.add_argument("--data", action="append", default=[], metavar="[NAME=]PATH", help="benchmark, for its images")
    parser.add_argument("--max_samples", type=int, default=500, help="questions of a benchmark on the page")
    parser.add_argument("--split", help="of the files in --data")
    given = parser.parse_args(args)
    try:
        parts = read_sections(given.files, given.names and given.names.split(","))
        if given.out:
            images = open_images(given.data, given.split, parts) if given.data else None
            _write(given.out, as_page(parts, images, given.max_samples))
        if given.markdown:
            _write(given.markdown, as_markdown(parts))
        if given.json:
            _write(given.json, json.dumps(as_json(parts), indent=1) + "\n")
    except (ResultError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(as_text(parts))


if __name__ == "__main__":
    main()
