"""A grid of ablations: each row with several seeds, by the ordinary commands, and a table of what came out.

    python -m pvm_jax.analysis.ablation --seeds=0,1,2 --runs=runs/ablation --out=docs/ablation.json
    python -m pvm_jax.analysis.ablation --rows=pvm,lora_all --print         the commands alone, to run by hand
    python -m pvm_jax.analysis.ablation --out=docs/ablation.json --tables   table and picture of what is recorded

A run is one row with one seed. Its commands (convert, train.py, eval.py) run as child processes one after the other;
its numbers, commands and seconds then go into one JSON file, and its checkpoints are deleted. Started again, the grid
goes on with the runs that are not recorded, the first of them from its last checkpoint, or from its beginning where it
has none. Beside the JSON file lie the table (.md) and the picture (.png), drawn again after every run.

Runs of one row are comparable: a grid that would add one with another configuration, other commands (but for the seed
and the folders), another evaluation, or on another kind of device, is refused.

A grid is a Python module (--grid, `configs.digits_ablation` is one) with ROWS, {name: (title, and what it likes)},
`get_config(argument, data)`, `commands(name, seed, run, data, smoke)`, {"convert", "train", "eval": arguments}, and
`evaluation(smoke)`, the configuration of eval.py.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax import cli
from pvm_jax.analysis.ablation_tables import draw, markdown, numbers
from pvm_jax.evals.results import ResultError, read_result, versions, write_whole
from pvm_jax.model_files import check_writable

FREE = re.compile(r"(^|\.)(seed|path)$")
"""Keys that differ from run to run of a row."""
OUT = Path("docs/ablation.json")
RUN, DATA = "<run>", "<data>"
"""What stands for the folders of a run and of the data in commands that are compared."""
Commands = Mapping[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed; all it writes is in `folder`."""

    row: str
    seed: int
    folder: Path
    commands: Commands

    @property
    def key(self) -> str:
        return f"{self.row}/{self.seed}"

    def do(self, environment: Mapping[str, str]) -> dict[str, float | None]:
        """Runs what is left to do; seconds by command, of all attempts together.

        None where that is not known: an attempt was killed together with this process.

        Raises:
          ResultError: a command failed; the message has its last line.
        """
        made = self.folder / "start.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = self._seconds()
        for name, arguments in self.commands.items():
            if name == "convert":
                known = (self.folder / "start").exists() and made.exists()
                if known and made.read_text(encoding="utf-8") == shlex.join(arguments):
                    continue  # it appears as a whole or not at all; train.py itself goes on with its last checkpoint
                self._forget()  # a start by other options, and what was trained from it
            before, began, log = seconds[name], time.monotonic(), self.folder / f"{name}.log"
            self._keep(seconds | {name: None})
            with log.open("w", encoding="utf-8") as file:
                argv = [sys.executable, *arguments[1:]]
                status = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
            seconds[name] = None if before is None else round(before + time.monotonic() - began, 3)
            self._keep(seconds)
            if status:
                raise ResultError(f"{self.key}: {name} ended with status {status}: {_last(log)} (all of it: {log})")
            if name == "convert":
                write_whole(made, [shlex.join(arguments)])
        return seconds

    def _seconds(self) -> dict[str, float | None]:
        """What earlier attempts took; of one that left a log and nothing else it is not known."""
        file = self.folder / "seconds.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        unknown = {name: None if (self.folder / f"{name}.log").exists() else 0.0 for name in self.commands}
        return {name: kept.get(name, unknown[name]) for name in self.commands}

    def _keep(self, seconds: Mapping[str, float | None]) -> None:
        write_whole(self.folder / "seconds.json", [json.dumps(seconds) + "\n"])

    def result(self, seconds: Mapping[str, float | None]) -> dict[str, Any]:
        """The entry of the JSON file."""
        evals = {part: read_result(self.folder / "eval" / f"{part}.json") for part in ("late", "short")}
        about = evals["late"]
        conditions = {"dtype": about["dtype"], "device": about["devices"].partition(" ")[2]}  # "8 cpu": eight of them
        return {
            "commands": [shlex.join(arguments) for arguments in self.commands.values()],
            "conditions": conditions | _of_evaluation({part: result["options"] for part, result in evals.items()}),
            "seconds": dict(seconds),
            "trainable": self._trainable(),
            "versions": versions(),
            "numbers": numbers(evals["late"]["summary"] | evals["short"]["summary"]),
        }

    def _trainable(self) -> int:
        if "train" not in self.commands:
            return 0
        found = re.search(r"([\d,]+) parameters train", (self.folder / "train.log").read_text(encoding="utf-8"))
        return int(found[1].replace(",", ""))

    def clean(self) -> None:
        """Removes the checkpoints; metrics, configuration, logs and results stay."""
        self._forget()
        self._keep(dict.fromkeys(self.commands, 0.0))

    def _forget(self) -> None:
        for path in (self.folder / "start", self.folder / "train" / "checkpoints"):
            shutil.rmtree(path, ignore_errors=True)


def _last(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]


def _of_evaluation(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Flat, without the paths of its data."""
    flat = cli.leaves({"evaluation": json.loads(json.dumps(options))})
    return {key: value for key, value in flat.items() if not FREE.search(key)}


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

    def check(
        self,
        row: str,
        config: Mapping[str, Any] | None,
        commands: Callable[[int], Commands],
        conditions: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Refuses a row that has runs of another kind.

        Args:
          commands: of the row with a seed, with RUN and DATA for the folders.
          conditions: as in a run's entry; asked for if there is one.
        """
        if row not in self.rows:
            return
        self._compare(row, "configuration", self.rows[row]["config"] or {}, config or {})
        for key, run in self.runs.items():
            name, _, seed = key.rpartition("/")
            if name != row:
                continue
            if differ := difference([shlex.split(line) for line in run["commands"]], commands(int(seed))):
                self._refuse(row, "command", *differ)
            if "conditions" not in run:
                raise ResultError(
                    f"{self.path}: run {key!r} was recorded without `conditions` (dtype, device, evaluation), so that "
                    "nothing can be compared with it; delete it there to have it run again, or name another --out"
                )
            self._compare(row, "setting", run["conditions"], conditions())

    def _compare(self, row: str, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                self._refuse(row, what, there.get(key), here.get(key), f"{key}: ")

    def _refuse(self, row: str, what: str, there: Any, here: Any, key: str = "") -> None:
        raise ResultError(
            f"{self.path}: row {row!r} was recorded with another {what} ({key}there {there!r}, here {here!r}); "
            "name another --out"
        )

    def has(self, run: Run) -> bool:
        """Whether it is recorded; what is not trained is with any seed, which its evaluation does not depend on."""
        if "train" in run.commands:
            return run.key in self.runs
        return any(key.rpartition("/")[0] == run.row for key in self.runs)

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


def difference(there: Sequence[Sequence[str]], here: Commands) -> tuple[str | None, str | None] | None:
    """The first argument that is not the same, as it was there and is here; None if all are.

    RUN and DATA in `here` stand for any folder that is the same throughout `there`.
    """
    folders: dict[str, str] = {}
    for old, new in itertools.zip_longest(itertools.chain(*there), itertools.chain(*here.values())):
        if old is None or new is None:
            return old, new
        known = new
        for mark, folder in folders.items():
            known = known.replace(mark, folder)
        if found := re.fullmatch(re.escape(known).replace(RUN, "(?P<run>.+)").replace(DATA, "(?P<data>.+)"), old):
            folders |= {f"<{name}>": folder for name, folder in found.groupdict().items()}
        else:
            return old, known
    return None


@functools.cache
def device() -> tuple[str, str]:
    """Platform and kind of the devices here; asked in a process of its own, which lets go of them."""
    code = "import jax; print(jax.default_backend()); print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise ResultError(f"JAX finds no device: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    platform, kind = done.stdout.splitlines()[-2:]
    return platform, kind


def conditions(grid: Any, smoke: bool) -> dict[str, Any]:
    """Dtype, device and options of the evaluation that a run here has."""
    config = grid.evaluation(smoke).to_dict()
    platform, kind = device()
    dtype = config["dtype"] or ("float32" if platform == "cpu" else "bfloat16")  # as eval.py
    parts = {part: {k: v for k, v in own.items() if k != "module"} for part, own in config["evals"].items()}
    return {"dtype": dtype, "device": kind} | _of_evaluation(parts)


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
    flat = cli.leaves(json.loads(json.dumps(config)))
    return {key: value for key, value in flat.items() if not FREE.search(key)}


def work(grid: Any, planned: Sequence[Run], book: Book, options: argparse.Namespace) -> list[str]:
    """Does the runs that are not recorded; messages of those that failed."""
    smoke = options.smoke
    configs = {run.row: configuration(grid, run, options.data, smoke) for run in planned}
    for row, config in configs.items():
        commands = functools.partial(grid.commands, row, run=RUN, data=DATA, smoke=smoke)
        book.check(row, config, commands, lambda: conditions(grid, smoke))
    left = [run for run in planned if not book.has(run)]
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
        took = ", ".join(f"{name} {'?' if s is None else round(s)} s" for name, s in result["seconds"].items())
        print(f": {took}; {passed / 60:.0f} min so far, about {rest / 60:.0f} left", flush=True)
    return failed


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs a grid of ablations and draws its table.")
    parser.add_argument("--grid", default="configs.digits_ablation", help="Python module with the rows")
    parser.add_argument("--rows", help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", default="runs/data", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="a few steps a run; needs another --out")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--tables", action="store_true", help="draw what is recorded and run nothing")
    options = parser.parse_args(args)
    try:
        failed = _run(options)
    except (ResultError, OSError) as error:
        sys.exit(f"error: {cli.sentence(error) or error}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the first: {failed[0]}")


def _run(options: argparse.Namespace) -> list[str]:
    grid = cli.plug_in(options.grid, "--grid", ResultError)
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
    if options.smoke and options.out.absolute() == OUT.absolute():
        raise ResultError(f"--smoke: expected another --out than {OUT}, which is the record of whole runs")
    if importlib.util.find_spec("matplotlib") is None:
        raise ResultError("the picture needs matplotlib, which is not installed; pip install -e '.[demo]'")
    check_writable(options.out.parent)
    book = Book(options.out)
    failed = [] if options.tables else work(grid, planned, book, options)
    if not book.runs and not failed:
        raise ResultError(f"{options.out}: expected recorded runs, found none")
    if book.runs:
        print(book.tables(list(grid.ROWS)))
    return failed


if __name__ == "__main__":
    main()
