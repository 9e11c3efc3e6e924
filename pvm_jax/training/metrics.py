"""Metrics from (sum, count) pairs to TensorBoard and JSON lines.

A workdir's `metrics.jsonl` has one line per logged step. Each value is the quotient of sums over the steps since
the line before; the sums of an unfinished window are part of the checkpoint. A resumed run removes the lines
beyond its checkpoint and writes them again, so that the file is the one that an unbroken run would have left
(except for the speeds).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pvm_jax.training.stage import Fraction


class Meter:
    """Adds up (sum, count) pairs until they are taken."""

    def __init__(self, sums: Mapping[str, Any] | None = None):
        self._sums = {name: (float(s), float(n)) for name, (s, n) in (sums or {}).items()}

    def add(self, metrics: Mapping[str, Fraction]) -> None:
        for name, (value, count) in metrics.items():
            s, n = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (s + float(value), n + float(count))

    def sums(self) -> dict[str, list[float]]:
        """What has been added, for a checkpoint; `Meter(meter.sums())` goes on from there."""
        return {name: [s, n] for name, (s, n) in self._sums.items()}

    def take(self) -> dict[str, float]:
        """The quotients; the meter is empty afterwards. A metric of count 0 is left out."""
        values = {name: s / n for name, (s, n) in self._sums.items() if n}
        self._sums = {}
        return values


class MetricWriter:
    """Appends to `workdir/metrics.jsonl` and to TensorBoard's event files in `workdir/tensorboard`."""

    def __init__(self, workdir: Path, step: int = 0):
        """`step`: the last step of the checkpoint that the run resumes from; later lines are removed."""
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            _keep_until(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a workdir's `metrics.jsonl`, oldest first; a last line cut off by a kill is left out."""
    lines = []
    for line in (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            lines.append(json.loads(line))
    return lines


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
