"""Training state on disk: `workdir/checkpoints/<step>/`, written by Orbax in the background.

    trainable   flat dictionary, "text/layers/8/pvm_block/gate_alpha" -> array (fp32)
    optimizer   optax state
    meta        JSON: step, seed, data (position), metrics (sums of the unfinished window), config

Frozen weights are not in it: `workdir/model/base.json` says where they are. A step's directory appears under its
name only when it is complete, so that a killed run never resumes from half a checkpoint.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pvm_jax.training.freeze import Arrays
from pvm_jax.training.stage import TrainingError
from pvm_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir; `keep` of them, the newest."""

    def __init__(self, workdir: Path, *, keep: int = 2):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
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
        """Starts writing; returns when `state` may be donated. Waits for the save before it, and raises its error.

        A step that is on disk already (the last one of a finished run) is left as it is.
        """
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(state.optimizer),
                meta=ocp.args.JsonSave({"step": step, **meta}),
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` in the shapes, dtypes and shardings of `abstract`, and its meta.

        Raises:
          TrainingError: the checkpoint holds other parameters than `abstract`.
        """
        trainable = self.restore_trainable(step, abstract.trainable)
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
        return self._manager.restore(step, args=args)["trainable"]

    def wait(self) -> None:
        """Until the last save is on disk; raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
