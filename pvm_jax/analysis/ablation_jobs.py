"""How a grid's commands run: on their share of the cores, stopped with the grid, in a folder that one grid holds."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pvm_jax.evals.results import ResultError

# XLA:CPU asks for its temporary buffers anew in every step. glibc would hand them back to the system each time, and
# clearing fresh pages of 4 KiB then is a quarter of a step of the tiny model: keep them, in large pages.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "mmap_max=0", "trim_threshold=17179869184", "top_pad=268435456", "arena_max=1")
)
_POLL_SECONDS = 0.1


class Stopped(Exception):
    """The grid was stopped while a command ran."""


def call(
    argv: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    lock: int | None = None,
    stopped: threading.Event | None = None,
) -> int:
    """Runs Python with these arguments and returns its exit status; what it prints goes into the file `log`.

    It is in a process group of its own: a terminal's Ctrl-C reaches the grid alone, which then ends it by SIGTERM.

    Args:
      lock: a file descriptor that it keeps open, see `locked`.
      stopped: ends it with a SIGTERM, which train.py answers by saving, when this is set.

    Raises:
      Stopped: `stopped` is set.
    """
    stopped = stopped or threading.Event()
    if stopped.is_set():
        raise Stopped
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if lock is None else (lock,),
            process_group=0,
        )
    while (status := process.poll()) is None:
        if stopped.wait(_POLL_SECONDS):
            process.terminate()
            process.wait()
            raise Stopped
    return status


def is_full(error: Exception) -> bool:
    """Whether it tells of a full disk, perhaps in the words of a command; nothing else would succeed there either."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


@contextmanager
def locked(file: Path, flag: str) -> Iterator[int]:
    """Holds a file; so do commands that get the file descriptor, even when this process is killed.

    Args:
      flag: what the file stands for, as `--runs=runs/ablation`.

    Raises:
      ResultError: another grid, or a command that one has left behind, holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultError(
                f"{flag}: another grid, or a command that one has left behind, works there; wait for it, or name "
                "another place"
            ) from None
        yield opened.fileno()


def own_cores() -> int:
    """How many cores the calling thread may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shares_of_cores(jobs: int, platform: str) -> list[set[int] | None]:
    """As many cores of this process for each of the jobs; None: any, for one job or where a system cannot bind.

    Raises:
      ResultError: there are fewer cores than jobs, or what computes is not the CPU.
    """
    if jobs == 1:
        return [None]
    if platform != "cpu":
        raise ResultError(f"--jobs: expected 1 where runs compute on one and the same {platform}, got {jobs}")
    if jobs > own_cores():
        raise ResultError(f"--jobs: expected at most one run for each of the {own_cores()} cores here, got {jobs}")
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return [None] * jobs
    cores, each = sorted(os.sched_getaffinity(0)), own_cores() // jobs
    return [set(cores[job * each : (job + 1) * each]) for job in range(jobs)]


def bind(cores: set[int] | None) -> None:
    """Binds the calling thread, and with it the processes that it starts."""
    if cores is not None:
        os.sched_setaffinity(threading.get_native_id(), cores)
