"""`train.py` on a small checkpoint and a JSONL file: in this process, or as the command line of others."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
from absl import flags

from pvm_jax import cli
from pvm_jax.sharding import make_mesh
from pvm_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SPEEDS = ("tokens_per_second", "samples_per_second", "waiting_for_data", "time/")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A folder with data, and the flags of a run on it."""

    folder: Path
    flags: tuple[str, ...]

    @classmethod
    def write(cls, folder: Path, checkpoint: Path, extra: tuple[str, ...] = ()) -> "Setting":
        """Twelve rows of data, an image each, four in a batch of four rows."""
        rows = []
        for i in range(12):
            tiny.image(i, 32, 64).save(folder / f"{i}.png")
            rows.append({"id": f"row{i}", "prompt": tiny.text(i, 6), "completion": tiny.text(50 + i, 5 + i % 7),
                         "images": [f"{i}.png"]})  # fmt: skip
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        common = (
            "--config=configs/sft.py:4b,smoke",
            f"--config.model.path={checkpoint}",
            f"--config.data.path={folder / 'train.jsonl'}",
            "--config.data.length=(64,)",
            "--config.data.patches=(16,)",
            "--config.data.rows=4",
            "--config.data.samples=4",
            "--config.optimizer.learning_rate=0.01",
        )
        chosen = [flag for flag in extra if flag.startswith("--config=")]
        rest = [flag for flag in extra if flag not in chosen]
        return cls(folder, (*(chosen or common[:1]), *common[1:], *rest))


def run(patch: pytest.MonkeyPatch, setting: Setting, workdir: Path, *arguments: str, devices: int = 1) -> Any:
    """What `train.main` returns, on the first `devices` of the simulated ones."""
    patch.syspath_prepend(str(ROOT))
    import train

    argv = ["train.py", *setting.flags, f"--workdir={workdir}", *arguments]
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", argv)
    patch.setattr(train, "make_mesh", lambda **axes: make_mesh(**axes, devices=jax.devices()[:devices]))
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)  # overrides are defined as they are parsed
    cli.parse(argv)
    return train.main(argv)


def without_speeds(workdir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(SPEEDS)} for line in read_metrics(workdir)]


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]
