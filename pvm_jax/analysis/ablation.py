"""A grid of ablations: each row with several seeds, by the ordinary commands, and a table of what came out.

    python -m pvm_jax.analysis.ablation --seeds=0,1,2 --runs=runs/ablation --out=docs/ablation.json
    python -m pvm_jax.analysis.ablation --rows=pvm,lora_all --print         the commands alone, to run by hand
    python -m pvm_jax.analysis.ablation --out=docs/ablation.json --tables   table and picture of what is recorded

A run is one row with one seed. Its commands (convert, train.py, eval.py) run as child processes one after the other;
its numbers, commands and seconds then go into one JSON file, and its checkpoints are deleted. Started again, the grid
goes on with the runs that are not recorded, the first of them where it stopped. Beside the JSON file lie the table
(.md) and the picture (.png), drawn again after every run.

A grid is a Python module (--grid, `configs.digits_ablation` is one) with ROWS, {name: (title, and what it likes)},
`get_config(argument, data)`, and `commands(name, seed, run, data, smoke)`, {"convert", "train", "eval": arguments}.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.analysis.ablation_tables import draw, markdown, numbers
from pvm_jax.cli import leaves
from pvm_jax.evals.results import ResultError, read_summary, versions, write_whole

FREE = re.compile(r"(^|\.)(seed|path)$")
"""Keys that differ from run to run of a row."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed; all it writes is in `folder`."""

    row: str
    seed: int
    folder: Path
    commands: Mapping[str, list[str]]

    @property
    def key(self) -> str:
        return f"{self.row}/{self.seed}"

    def do(self, environment: Mapping[str, str]) -> dict[str, float]:
        """Runs what is left to do; seconds by command.

        Raises:
          ResultError: a command failed; the message has its last line.
        """
        seconds = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, arguments in self.commands.items():
            if name == "convert" and (self.folder / "start").exists():
                continue  # it appears as a whole or not at all; train.py itself goes on where it was
            began, log = time.monotonic(), self.folder / f"{name}.log"
            with log.open("w", encoding="utf-8") as file:
                argv = [sys.executable, *arguments[1:]]
                status = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
            if status:
                last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
                raise ResultError(f"{self.key}: {name} ended with status {status}: {last} (all of it: {log})")
            seconds[name] = round(time.monotonic() - began, 1)
        return seconds

    def result(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """The entry of the JSON file."""
        evals = {part: read_summary(self.folder / "eval" / f"{part}.json") for part in ("late", "short")}
        return {
            "commands": [shlex.join(arguments) for arguments in self.commands.values()],
            "seconds": dict(seconds),
            "trainable": self._trainable(),
            "versions": versions(),
            "numbers": numbers(evals["late"] | evals["short"]),
        }

    def _trainable(self) -> int:
        if "train" not in self.commands:
            return 0
        found = re.search(r"([\d,]+) parameters train", (self.folder / "train.log").read_text(encoding="utf-8"))
        return int(found[1].replace(",", ""))

    def clean(self) -> None:
        """Removes the checkpoints; metrics, configuration, logs and results stay."""
        for path in (self.folder / "start", self.folder / "train" / "checkpoints"):
            shutil.rmtree(path, ignore_errors=True)


class Book:
    """The JSON file: {"rows": {name: {"title", "config"}}, "runs": {"name/seed": see `Run.result`}}."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                self.rows, self.runs = content["rows"], content["runs"]
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
                raise ResultError(
                    f"{path}: expected the JSON file of a grid, but it does not read ({error!r})"
                ) from None

    def check(self, row: str, config: Mapping[str, Any] | None) -> None:
        """Refuses a row that has runs of another configuration."""
        if row not in self.rows:
            return
        before, now = (value or {} for value in (self.rows[row]["config"], config))
        if differ := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            key = differ[0]
            raise ResultError(
                f"{self.path}: row {row!r} was recorded with another configuration ({key}: there {before.get(key)!r}, "
                f"here {now.get(key)!r}); name another --out"
            )

    def add(self, run: Run, title: str, config: Mapping[str, Any] | None, result: Mapping[str, Any]) -> None:
        self.rows[run.row] = {"title": title, "config": config}
        self.runs[run.key] = dict(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, [json.dumps({"rows": self.rows, "runs": self.runs}, indent=1) + "\n"])

    def tables(self, order: Sequence[str]) -> str:
        """The table, with the rows in this order; written beside the JSON file, as the picture is."""
        rows = [name for name in order if name in self.rows]
        text = markdown({name: self.rows[name]["title"] for name in rows}, self.runs)
        write_whole(self.path.with_suffix(".md"), [text + "\n"])
        draw({name: self.rows[name]["title"] for name in rows}, self.runs, self.path.with_suffix(".png"))
        return text


def plan(grid: Any, names: Sequence[str], seeds: Sequence[int], runs: Path, data: str, smoke: bool) -> list[Run]:
    """Runs in order: every row with the first seed, then with the second, ... What is not trained has one run."""
    planned = []
    for seed in seeds:
        for name in names:
            folder = runs / f"{name}-{seed}"
            commands = grid.commands(name, seed, str(folder), data, smoke)
            if "train" in commands or seed == seeds[0]:
                planned.append(Run(name, seed, folder, commands))
    return planned


def configuration(grid: Any, run: Run, data: str, smoke: bool) -> dict[str, Any] | None:
    """What all runs of the row share, flat; None where nothing is trained."""
    if "train" not in run.commands:
        return None
    config = grid.get_config(f"{run.row},smoke" if smoke else run.row, data).to_dict()
    flat = leaves(json.loads(json.dumps(config)))
    return {key: value for key, value in flat.items() if not FREE.search(key)}


def work(grid: Any, planned: Sequence[Run], book: Book, options: argparse.Namespace) -> list[str]:
    """Does the runs that are not recorded; messages of those that failed."""
    configs = {run.row: configuration(grid, run, options.data, options.smoke) for run in planned}
    for row, config in configs.items():
        book.check(row, config)
    left = [run for run in planned if run.key not in book.runs]
    print(f"{len(planned)} runs, {len(planned) - len(left)} of them recorded in {book.path}", flush=True)
    cache = str((options.runs / "xla").absolute())
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ}
    failed, began = [], time.monotonic()
    for number, run in enumerate(left, 1):
        print(f"[{number}/{len(left)}] {run.key}", end="", flush=True)
        try:
            result = run.result(run.do(environment))
        except ResultError as error:
            failed.append(str(error))
            print(f": {error}", flush=True)
            continue
        book.add(run, grid.ROWS[run.row][0], configs[run.row], result)
        book.tables(list(grid.ROWS))
        if not options.keep:
            run.clean()
        passed = time.monotonic() - began
        rest = passed / number * (len(left) - number)
        took = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
        print(f": {took}; {passed / 60:.0f} min so far, about {rest / 60:.0f} left", flush=True)
    return failed


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs a grid of ablations and draws its table.")
    parser.add_argument("--grid", default="configs.digits_ablation", help="Python module with the rows")
    parser.add_argument("--rows", help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", default="runs/data", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/ablation.json"))
    parser.add_argument("--smoke", action="store_true", help="a few steps a run")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--tables", action="store_true", help="draw what is recorded and run nothing")
    options = parser.parse_args(args)
    try:
        failed = _run(options)
    except ResultError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the first: {failed[0]}")


def _run(options: argparse.Namespace) -> list[str]:
    try:
        grid = importlib.import_module(options.grid)
    except ModuleNotFoundError as error:
        raise ResultError(f"--grid: expected a Python module, got {options.grid!r} ({error})") from None
    names = options.rows.split(",") if options.rows else list(grid.ROWS)
    if unknown := [name for name in names if name not in grid.ROWS]:
        raise ResultError(f"--rows: expected some of {', '.join(grid.ROWS)}, got {', '.join(unknown)}")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise ResultError(f"--seeds: expected numbers with commas, as in 0,1,2, got {options.seeds!r}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    planned = plan(grid, names, seeds, options.runs, options.data, options.smoke)
    if options.print:
        for run in planned:
            print(f"# {run.key}: {grid.ROWS[run.row][0]}")
            print("\n".join(shlex.join(arguments) for arguments in run.commands.values()))
        return []
    book = Book(options.out)
    failed = [] if options.tables else work(grid, planned, book, options)
    if not book.runs:
        raise ResultError(f"{options.out}: expected recorded runs, found none")
    print(book.tables(list(grid.ROWS)))
    return failed


if __name__ == "__main__":
    main()
