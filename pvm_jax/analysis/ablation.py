"""A grid of ablations: each row with several seeds, by the ordinary commands, and a table of what came out.

    python -m pvm_jax.analysis.ablation --seeds=0,1,2 --jobs=2 --runs=runs/ablation --out=docs/ablation.json
    python -m pvm_jax.analysis.ablation --rows=pvm,lora_all --print         the commands alone, to run by hand
    python -m pvm_jax.analysis.ablation --out=docs/ablation.json --tables   table and picture of what is recorded
    python -m pvm_jax.analysis.ablation --rows=base,pvm --seeds=0,1 --bases=runs/base-0-hf,runs/base-1-hf --out=...
                                                                            each seed on a base of its own

A run is one row with one seed. Its commands (convert, train.py, eval.py) run as child processes one after the other;
its numbers, commands and seconds then go into one JSON file, and its checkpoints are deleted. With --jobs=N so many
runs are made at a time, each bound to its share of the cores: on a CPU two runs on a core each take less time than one
after the other on both. Started again, the grid goes on with the runs that are not recorded, those that were begun from
their last checkpoint (Ctrl-C and SIGTERM have train.py save one), or from their beginning where they have none. Beside
the JSON file lie the table (.md) and the picture (.png), drawn again after every run.

Runs of one row are comparable: a grid that would add one with another configuration, other commands (but for the seed
and the folders), another evaluation, on another kind of device, or on another base, is refused, and so is a record with
rows that the grid does not have. The number of cores, over which sums are divided, changes a few answers of a run, and
so may XLA_FLAGS; they are recorded and not compared.

A grid is a Python module (--grid, `configs.digits_ablation` is one) with ROWS, {name: (title, and what it likes)};
BASE, the checkpoint that runs start from; `get_config(argument, data)`; `commands(name, seed, run, data, smoke, base)`,
which gives {"convert", "train", "eval": arguments} (`base` None: BASE); and `evaluation(smoke)`, the configuration of
eval.py, with the evaluations `late` and `short`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pvm_jax import cli
from pvm_jax.analysis.ablation_book import DATA, RUN, Base, Book, Commands, run_key
from pvm_jax.analysis.ablation_jobs import ALLOCATOR, bind, call, is_full, locked, own_cores, shares_of_cores
from pvm_jax.analysis.ablation_tables import numbers
from pvm_jax.evals.results import ResultError, read_result, versions, write_whole
from pvm_jax.model_files import check_writable

FREE = re.compile(r"(^|\.)(seed|path)$")
"""Keys that differ from run to run of a row."""
OUT = Path("docs/ablation.json")


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed; all it writes is in `folder`.

    Attributes:
      base: what it starts from; None: the grid's own base.
      own: the checksum of that.
    """

    row: str
    seed: int
    folder: Path
    commands: Commands
    base: Base | None = None
    own: str | None = None

    @property
    def key(self) -> str:
        return run_key(self.row, self.seed)

    def do(
        self, environment: Mapping[str, str], lock: int | None = None, stopped: threading.Event | None = None
    ) -> dict[str, float | None]:
        """Runs what is left to do; seconds by command, of all attempts together.

        None where that is not known: an attempt was killed together with this process.

        Args:
          lock, stopped: see `ablation_jobs.call`.

        Raises:
          ResultError: a command failed; the message has its last line.
          Stopped: see `ablation_jobs.call`.
        """
        made, from_what = self.folder / "start.txt", self.base.checksum if self.base else self.own
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = self._seconds()
        for name, arguments in self.commands.items():
            if name == "convert":
                wanted = f"{shlex.join(arguments)}\n{from_what}\n"
                known = (self.folder / "start").exists() and made.exists()
                if known and made.read_text(encoding="utf-8") == wanted:
                    continue  # it appears as a whole or not at all; train.py itself goes on with its last checkpoint
                self._forget()  # a start by other options or from another base, and what was trained from it
            before, began, log = seconds[name], time.monotonic(), self.folder / f"{name}.log"
            self._keep(seconds | {name: None})
            status = call(arguments[1:], log, environment, lock, stopped)
            seconds[name] = None if before is None else round(before + time.monotonic() - began, 3)
            self._keep(seconds)
            if status:
                raise ResultError(f"{name} ended with status {status}: {_last(log)} (all of it: {log})")
            if name == "convert":
                write_whole(made, [wanted])
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
        conditions |= {} if self.base else {"base": self.own}
        return {
            "commands": [shlex.join(arguments) for arguments in self.commands.values()],
            "conditions": conditions | _of_evaluation({part: result["options"] for part, result in evals.items()}),
            "seconds": dict(seconds),
            "cores": own_cores(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "trainable": self._trainable(),
            "versions": versions(),
            "numbers": numbers(evals["late"]["summary"] | evals["short"]["summary"]),
        } | ({} if self.base is None else {"base": dataclasses.asdict(self.base)})

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


def plan(
    grid: Any,
    names: Sequence[str],
    seeds: Sequence[int],
    runs: Path,
    data: str,
    smoke: bool,
    bases: Mapping[int, Base] | None = None,
) -> list[Run]:
    """Runs in order: every row with the first seed, then with the second, ...

    What is not trained does not depend on the seed: on one base it has one run.

    Args:
      bases: what the runs of each seed start from; None: the grid's own base, for all.
    """
    planned = []
    for seed in seeds:
        base = bases[seed] if bases else None
        for name in names:
            folder = runs / (f"{name}-{seed}-{base.checksum[:8]}" if base else f"{name}-{seed}")
            commands = grid.commands(name, seed, str(folder), data, smoke, base and base.path)
            if "train" in commands or base or seed == seeds[0]:
                planned.append(Run(name, seed, folder, commands, base))
    return planned


def configuration(grid: Any, run: Run, data: str, smoke: bool) -> dict[str, Any] | None:
    """What all runs of the row share, flat; None where nothing is trained."""
    if "train" not in run.commands:
        return None
    config = grid.get_config(f"{run.row},smoke" if smoke else run.row, data).to_dict()
    flat = cli.leaves(json.loads(json.dumps(config)))
    return {key: value for key, value in flat.items() if not FREE.search(key)}


def work(grid: Any, planned: Sequence[Run], book: Book, options: argparse.Namespace, lock: int) -> list[str]:
    """Does the runs that are not recorded; messages of those that failed or, on a full disk, were not begun.

    Args:
      lock: see `ablation_jobs.locked`.
    """
    from pvm_jax.checkpoint import checksum  # and with it JAX

    smoke = options.smoke
    own = None if options.bases else checksum(grid.BASE)
    here = {} if options.bases else {"base": own}
    book.check_bases(options.bases or {})
    configs = {run.row: configuration(grid, run, options.data, smoke) for run in planned}
    for row, config in configs.items():

        def commands(seed: int, base: str | None, row: str = row) -> Commands:
            return grid.commands(row, seed, RUN, DATA, smoke, base)

        book.check(row, config, commands, lambda: conditions(grid, smoke) | here, options.bases)
    # On one base, what is not trained is recorded with any seed.
    known = {key.rpartition("/")[0] for key in book.runs}
    left = [
        dataclasses.replace(run, own=own)
        for run in planned
        if run.key not in book.runs and ("train" in run.commands or run.base or run.row not in known)
    ]
    print(f"{len(planned)} runs, {len(planned) - len(left)} of them recorded in {book.path}", flush=True)
    cores = shares_of_cores(options.jobs, device()[0] if options.jobs > 1 else "cpu")
    failed, began, stopped = [], time.monotonic(), threading.Event()

    def do(run: Run) -> dict[str, Any]:
        print(f"{run.key} ...", flush=True)
        cache = str((options.runs / f"xla-{own_cores()}").absolute())  # a program is compiled for a number of cores
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "GLIBC_TUNABLES": ALLOCATOR, **os.environ}
        return run.result(run.do(environment, lock, stopped))

    def keep(run: Run, result: Mapping[str, Any], number: int) -> None:
        book.add(run.row, run.seed, grid.ROWS[run.row][0], configs[run.row], result)
        book.tables(list(grid.ROWS))
        if not options.keep:
            run.clean()
        passed = time.monotonic() - began
        rest = passed / number * (len(left) - number)
        took = ", ".join(f"{name} {'?' if s is None else round(s)} s" for name, s in result["seconds"].items())
        print(
            f"[{number}/{len(left)}] {run.key}: {took}; {passed / 60:.0f} min so far, about {rest / 60:.0f} left",
            flush=True,
        )

    pool = ThreadPoolExecutor(options.jobs, "ablation", initializer=lambda: bind(cores.pop()))
    try:
        futures = {pool.submit(do, run): run for run in left}
        for number, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                keep(run, future.result(), number)
            except CancelledError:
                failed.append(f"{run.key}: not begun")
            except (ResultError, OSError) as error:
                failed.append(f"{run.key}: {cli.sentence(error) or error}")
                print(f"[{number}/{len(left)}] {failed[-1]}", flush=True)
                if is_full(error):  # nothing else is begun, what runs is waited for
                    for waiting in futures:
                        waiting.cancel()
    except BaseException:  # Ctrl-C, a bug: what runs is ended, and can go on later
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs a grid of ablations and draws its table.")
    parser.add_argument("--grid", default="configs.digits_ablation", help="Python module with the rows")
    parser.add_argument("--rows", help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", default="runs/data", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--bases", help="comma-separated checkpoints, one for each of --seeds; default: the grid's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--smoke", action="store_true", help="a few steps a run; needs another --out")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--tables", action="store_true", help="draw what is recorded and run nothing")
    options = parser.parse_args(args)
    try:
        failed = _run(options)
    except (ValueError, OSError) as error:
        message = cli.sentence(error) or (str(error) if isinstance(error, OSError) else None)
        if message is None:
            raise
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the first: {failed[0]}")


def _run(options: argparse.Namespace) -> list[str]:
    grid = cli.plug_in(options.grid, "--grid", ResultError)
    if lacks := [name for name in ("ROWS", "BASE") if not hasattr(grid, name)]:
        raise ResultError(
            f"--grid: expected a module with {' and '.join(lacks)}, as configs.digits_ablation, got {options.grid}"
        )
    names = list(grid.ROWS) if options.rows is None else options.rows.split(",")
    if unknown := [name for name in names if name not in grid.ROWS]:
        raise ResultError(f"--rows: expected some of {', '.join(grid.ROWS)}, got {', '.join(map(repr, unknown))}")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise ResultError(f"--seeds: expected numbers with commas, as in 0,1,2, got {options.seeds!r}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for flag, given in (("rows", names), ("seeds", seeds)):
        if len(set(given)) < len(given):
            raise ResultError(f"--{flag}: expected each once, got {','.join(map(str, given))}")
    if options.jobs < 1:
        raise ResultError(f"--jobs: expected 1 or more, got {options.jobs}")
    options.bases = _bases(options.bases, seeds)
    planned = plan(grid, names, seeds, options.runs, options.data, options.smoke, options.bases)
    if options.print:
        for run in planned:
            print(f"# {run.key}: {grid.ROWS[run.row][0]}")
            print("\n".join(shlex.join(arguments) for arguments in run.commands.values()))
        return []
    if options.out.suffix != ".json":
        raise ResultError(f"--out: expected a name that ends in .json (tables lie beside it), got {options.out}")
    if options.smoke and options.out.absolute() == OUT.absolute():
        raise ResultError(f"--smoke: expected another --out than {OUT}, which is the record of whole runs")
    if importlib.util.find_spec("matplotlib") is None:
        raise ResultError("the picture needs matplotlib, which is not installed; pip install -e '.[demo]'")
    check_writable(options.out.parent)
    with ExitStack() as held:
        held.enter_context(locked(options.out.with_name(f".{options.out.name}.lock"), f"--out={options.out}"))
        if not options.tables:
            lock = held.enter_context(locked(options.runs / "lock", f"--runs={options.runs}"))
        book = Book(options.out)
        if unknown := book.rows.keys() - grid.ROWS.keys():
            raise ResultError(
                f"{options.out}: expected rows of {options.grid}, found {', '.join(sorted(unknown))}; it is another "
                "grid's record; name another --out"
            )
        failed = [] if options.tables else work(grid, planned, book, options, lock)
        if not book.runs and not failed:
            raise ResultError(f"{options.out}: expected recorded runs, found none")
        if book.runs:
            print(book.tables(list(grid.ROWS)))
    return failed


def _bases(text: str | None, seeds: Sequence[int]) -> dict[int, Base] | None:
    """What the runs of each seed start from.

    Raises:
      ResultError, CheckpointError: not one Hugging Face directory for each seed.
    """
    if text is None:
        return None
    from pvm_jax.checkpoint import checksum, open_checkpoint  # and with it JAX

    paths = text.split(",")
    if len(paths) != len(seeds) or not all(paths):
        raise ResultError(f"--bases: expected one checkpoint for each of {len(seeds)} seeds, got {text!r}")
    for path in paths:
        if (kind := open_checkpoint(path).kind) != "hf":
            raise ResultError(f"--bases: {path}: expected a Hugging Face directory (convert to_hf), got a {kind} one")
    bases = {seed: Base(path, checksum(path)) for seed, path in zip(seeds, paths)}
    if len({base.checksum for base in bases.values()}) < len(bases):
        raise ResultError(f"--bases: expected another base for each seed, got the same weights twice in {text}")
    return bases


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: commands save and end
    main()
