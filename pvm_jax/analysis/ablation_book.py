"""The record of a grid of ablations: which runs are made, and whether another one may stand beside them."""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.analysis.ablation_tables import draw, markdown
from pvm_jax.evals.results import ResultError, write_whole

RUN, DATA, BASE = "<run>", "<data>", "<base>"
"""What stands for the folders of a run, of the data and of a run's own base in commands that are compared."""
Commands = Mapping[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Base:
    """A checkpoint that runs start from; `checksum` as `pvm_jax.checkpoint.checksum` has it."""

    path: str
    checksum: str

    def __str__(self) -> str:
        return f"{self.path} ({self.checksum[:8]})"


def run_key(row: str, seed: int) -> str:
    """The name of a run in the record."""
    return f"{row}/{seed}"


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
        commands: Callable[[int, str | None], Commands],
        conditions: Callable[[], Mapping[str, Any]],
        bases: Mapping[int, Base] | None = None,
    ) -> None:
        """Refuses a row that has runs of another kind.

        Args:
          commands: of the row with a seed and a base (BASE, or None for the grid's own), with RUN and DATA for the
            folders.
          conditions: as in a run's entry; asked for if there is one.
          bases: of the runs to come, by seed; None: the grid's own.
        """
        if row not in self.rows:
            return
        self._compare(row, "configuration", self.rows[row]["config"] or {}, config or {})
        for name, run in self.runs.items():
            if name.rpartition("/")[0] != row:
                continue
            seed, base = int(name.rpartition("/")[2]), run.get("base")
            if (base is None) != (bases is None):
                kinds = {False: "the grid's own base", True: "a base for each seed"}
                self._refuse(row, "kind of base", kinds[base is not None], kinds[bases is not None])
            here = commands(seed, base and BASE)
            if differ := difference([shlex.split(line) for line in run["commands"]], here):
                self._refuse(row, "command", *differ)
            if "conditions" not in run:
                raise ResultError(
                    f"{self.path}: run {name!r} was recorded without `conditions` (dtype, device, evaluation), so that "
                    "nothing can be compared with it; delete it there to have it run again, or name another --out"
                )
            self._compare(row, "setting", run["conditions"], conditions())

    def check_bases(self, bases: Mapping[int, Base]) -> None:
        """Refuses a seed on another base than in the record, and a base of the record with another seed."""
        for name, run in self.runs.items():
            row, _, seed = name.rpartition("/")
            for other, base in bases.items() if "base" in run else ():
                if (int(seed) == other) != (run["base"]["checksum"] == base.checksum):
                    there = Base(**run["base"])
                    self._refuse(row, "base", f"seed {seed} on {there}", f"seed {other} on {base}")

    def _compare(self, row: str, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                self._refuse(row, what, there.get(key), here.get(key), f"{key}: ")

    def _refuse(self, row: str, what: str, there: Any, here: Any, key: str = "") -> None:
        raise ResultError(
            f"{self.path}: row {row!r} was recorded with another {what} ({key}there {there!r}, here {here!r}); "
            "name another --out"
        )

    def add(self, row: str, seed: int, title: str, config: Mapping[str, Any] | None, result: Mapping[str, Any]) -> None:
        self.rows[row] = {"title": title, "config": config}
        self.runs[run_key(row, seed)] = dict(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, [json.dumps({"rows": self.rows, "runs": self.runs}, indent=1) + "\n"])

    def tables(self, order: Sequence[str]) -> str:
        """The table, with the rows in this order; written beside the JSON file, as the picture is."""
        with_runs = {key.rpartition("/")[0] for key in self.runs}
        rows = [name for name in order if name in self.rows and name in with_runs]
        text = markdown({name: self.rows[name]["title"] for name in rows}, self.runs)
        write_whole(self.path.with_suffix(".md"), [text + "\n"])
        draw({name: self.rows[name]["title"] for name in rows}, self.runs, self.path.with_suffix(".png"))
        return text


def difference(there: Sequence[Sequence[str]], here: Commands) -> tuple[str | None, str | None] | None:
    """The first argument that is not the same, as it was there and is here; None if all are.

    RUN, DATA and BASE in `here` stand for any folder that is the same throughout `there`.
    """
    folders: dict[str, str] = {}
    for old, new in itertools.zip_longest(itertools.chain(*there), itertools.chain(*here.values())):
        if old is None or new is None:
            return old, new
        known = new
        for mark, folder in folders.items():
            known = known.replace(mark, folder)
        pattern = re.sub("<(run|data|base)>", r"(?P<\1>.+)", re.escape(known))
        if found := re.fullmatch(pattern, old):
            folders |= {f"<{name}>": folder for name, folder in found.groupdict().items()}
        else:
            return old, known
    return None
