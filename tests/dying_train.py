"""`train.py` that kill -9 ends where it hurts: python dying_train.py PLACE CALL STEP FLAGS, the last of them --workdir.

PLACE is decode (a decode loop has been dispatched), reward (a grading child is at work) or update (an optimizer step
has been dispatched); it happens at that place's CALL-th call, once the checkpoint of STEP is on disk.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_rewards
import jax

from pvm_jax import decoding, sharding
from pvm_jax.grading import Grader
from pvm_jax.training import step as steps


def dying(function: Callable, call: int, checkpoint: Path, meanwhile: Callable[[], None] = lambda: None) -> Callable:
    calls = []

    def wrapper(*arguments: Any, **more: Any) -> Any:
        calls.append(0)
        while len(calls) == call and not checkpoint.is_dir():  # it is being written
            time.sleep(0.01)
        result = function(*arguments, **more)  # on the device it goes on, while this thread comes back at once
        if len(calls) == call:
            meanwhile()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


def grade(workdir: Path) -> None:
    """Leaves with a grading child at work."""
    grader = Grader(children=1)
    grader.grade(["1+x"], ["x+1"])  # it has started
    (workdir / "child").write_text(str(grader._children.queue[0].process.pid))
    threading.Thread(target=grader.grade, args=(["9**9**9"], ["x+1"]), daemon=True).start()
    time.sleep(0.2)  # of its CPU limit of 1 s


def main(place: str, call: int, step: str, workdir: Path) -> None:
    checkpoint = workdir / "checkpoints" / step
    make_mesh = sharding.make_mesh
    # One of as many simulated devices as the undisturbed run had: with their number the order of sums changes.
    sharding.make_mesh = lambda **axes: make_mesh(**axes, devices=jax.devices()[:1])
    if place == "decode":
        decoding.decode = dying(decoding.decode, call, checkpoint)
    elif place == "reward":
        grpo_rewards.even = dying(grpo_rewards.even, call, checkpoint, meanwhile=lambda: grade(workdir))
    else:
        compiled = steps.compiled
        steps.compiled = lambda *arguments: dying(compiled(*arguments), call, checkpoint)
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    _, place, call, step, *sys.argv[1:] = sys.argv
    main(place, int(call), step, Path(sys.argv[-1].partition("=")[2]))
