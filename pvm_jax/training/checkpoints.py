"""Training state on disk: `workdir/checkpoints/<step>/`, written by Orbax in the background, sharded.

    trainable   flat dictionary, "text/layers/8/pvm_block/gate_alpha" -> array (fp32)
    optimizer   optax state
    meta        JSON: metrics (sums of the unfinished window), and what must be the same when the run goes on: rows (of
                each data set) and steps (of the whole run)
    files.json  size and CRC-32 of the files of these

Frozen weights are not in it: `workdir/model/base.json` says where they are. A step's directory appears under its
name only when it is complete, so that a killed run never resumes from half a checkpoint; and before a run resumes,
`set_aside_damaged` compares what is there with files.json. Each process writes its own shards; any number of
processes and any mesh reads them.
"""

import contextlib
import functools
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pvm_jax.distributed import PATIENCE
from pvm_jax.training.freeze import Arrays
from pvm_jax.training.stage import TrainingError
from pvm_jax.training.step import TrainState

FILES = "files.json"
_READERS = 8  # threads that read files; zlib lets others run
_LATE = "_CHECKPOINT_METADATA"  # Orbax writes the time into it when all other files are finished


class CheckpointLost(TrainingError):
    """A checkpoint that could not be written or read; names it, the reason and what is left."""


class Checkpoints:
    """The checkpoints of one workdir; `keep` of them, the newest."""

    def __init__(self, workdir: Path, *, keep: int = 2):
        self._directory = (workdir / "checkpoints").resolve()
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # Others wait while process 0 reads all of a checkpoint for its list of files.
                async_options=ocp.AsyncOptions(timeout_secs=int(PATIENCE), post_finalization_callback=self._list_files),
            ),
            item_handlers={
                "trainable": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing; returns when `state` may be donated. Waits for the save before it.

        A step that is on disk already (the last one of a finished run) is left as it is.

        Raises:
          CheckpointLost: this save could not begin, or the one before it failed.
        """
        if step == self._manager.latest_step():
            return
        self.wait()
        self._saving = step
        with self._failing("written"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(state.trainable),
                    optimizer=ocp.args.StandardSave(state.optimizer),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` in the shapes, dtypes and shardings of `abstract`, and its meta.

        Raises:
          TrainingError: the checkpoint holds other parameters than `abstract`.
          CheckpointLost: it cannot be read.
        """
        trainable = self.restore_trainable(step, abstract.trainable)
        with self._failing("read", step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    optimizer=ocp.args.StandardRestore(abstract.optimizer), meta=ocp.args.JsonRestore()
                ),
            )
        count = jax.device_put(jnp.asarray(step, abstract.step.dtype), abstract.step.sharding)
        state = TrainState(step=count, trainable=trainable, optimizer=restored["optimizer"])
        return state, restored["meta"]

    def restore_trainable(self, step: int, abstract: Arrays) -> Arrays:
        """The trainable parameters of `step` alone."""
        with self._failing("read", step):
            stored = {name: array.shape for name, array in self._manager.item_metadata(step)["trainable"].items()}
        expected = {name: array.shape for name, array in abstract.items()}
        differ = sorted(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))
        if differ:
            first = differ[0]
            raise TrainingError(
                f"{self._manager.directory / str(step)}: expected the trainable parameters of this configuration, "
                f"but {len(differ)} differ, e.g. {first!r}: expected {expected.get(first, 'none')}, "
                f"found {stored.get(first, 'none')}"
            )
        args = ocp.args.Composite(trainable=ocp.args.StandardRestore(abstract))
        with self._failing("read", step):
            return self._manager.restore(step, args=args)["trainable"]

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
          CheckpointLost: it failed.
        """
        with self._failing("written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, and no more after it."""
        with self._failing("written"):
            self._manager.close()

    def _list_files(self) -> None:
        """Orbax's call when all is written and the directory is about to get its name."""
        if jax.process_index() == 0:
            partial = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_files_list(next(partial, self._directory / str(self._saving)))

    @contextlib.contextmanager
    def _failing(self, verb: str, step: int | None = None) -> Iterator[None]:
        """Turns what TensorStore and Orbax raise (any of ValueError, OSError, RuntimeError, ...) into a sentence."""
        try:
            yield
        except Exception as error:
            failed = self._directory / str(self._saving if step is None else step)
            intact = [s for s in complete_steps(self._directory) if s != int(failed.name)]
            left = f"the checkpoint of step {max(intact)} is intact" if intact else "there is no other checkpoint"
            raise CheckpointLost(f"{failed} could not be {verb} ({_reason(error)}); {left}") from error


def _reason(error: BaseException) -> str:
    """The one line of a nested error that says what went wrong."""
    text = str(error)
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "no space left on the device: free some and start the run again"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"


def complete_steps(directory: Path) -> list[int]:
    """Steps whose directories have their final name, ascending."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def write_files_list(directory: Path) -> None:
    """files.json of a checkpoint."""
    found = (path for path in directory.rglob("*") if path.is_file() and path != directory / _LATE)
    files = {path.relative_to(directory).as_posix(): path for path in found}
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_size_and_sum, files.values())
        (directory / FILES).write_text(json.dumps(dict(zip(files, sums)), indent=0) + "\n", encoding="utf-8")


def damage(directory: Path) -> str | None:
    """The first thing in a checkpoint that is not as it was written, in a sentence that names the file.

    A checkpoint without files.json was written before there was one, and is taken as it is.
    """
    if not (directory / FILES).is_file():
        return None
    for file in (directory / FILES, directory / _LATE):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, FileNotFoundError):
            return f"{file} is no JSON"
    listed = json.loads((directory / FILES).read_text(encoding="utf-8"))
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            problems = pool.map(lambda name: _difference(directory / name, *listed[name]), listed)
            return next((problem for problem in problems if problem), None)
        finally:
            pool.shutdown(cancel_futures=True)


def _difference(file: Path, size: int, checksum: int) -> str | None:
    """What a file has otherwise than it was written, or None."""
    if not file.is_file():
        return f"{file} is missing"
    got = _size_and_sum(file)
    if got[0] != size:
        return f"{file} has {got[0]} bytes instead of {size}"
    return None if got[1] == checksum else f"{file} does not hold what was written"


def set_aside_damaged(workdir: Path) -> list[str]:
    """Renames the newest checkpoints that are damaged to `<step>.damaged`, down to the first that is whole.

    To be called by one process, before any opens `Checkpoints`. Returns a warning for each.

    Raises:
      TrainingError: none is whole, now or at an earlier start. A run that began again would remove what may still be
        of use: `model/` and the lines of metrics.jsonl.
    """
    warnings = []
    directory = workdir / "checkpoints"
    for step in reversed(complete_steps(directory)):
        problem = damage(directory / str(step))
        if problem is None:
            break
        target = _free_name(directory / f"{step}.damaged")
        (directory / str(step)).rename(target)
        warnings.append(f"{problem}: the checkpoint of step {step} is damaged, now called {target.name}, and not used")
    damaged = sorted(directory.glob("*.damaged*"))
    if damaged and not complete_steps(directory):
        reasons = "".join(f" ({warning})" for warning in warnings[:1])
        raise TrainingError(
            f"{directory}: expected a checkpoint that is whole, and there are only {', '.join(p.name for p in damaged)}"
            f"{reasons}; bring back the files of one from a copy and rename it to its step, choose another --workdir, "
            "or remove these to begin again from step 0"
        )
    return warnings


def _free_name(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}{n or ''}") for n in range(1000))
    return next(candidate for candidate in candidates if not candidate.exists())


def _size_and_sum(file: Path) -> tuple[int, int]:
    checksum = 0
    with file.open("rb") as f:
        for piece in iter(functools.partial(f.read, 2**22), b""):
            checksum = zlib.crc32(piece, checksum)
        return f.tell(), checksum
