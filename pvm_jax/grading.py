"""Is an answer right? Cheap comparisons first, then algebra in a child process that can be killed.

    verdicts = Grader().grade(["B.", "1+x", "9**9**9"], ["B", "x+1", "2"])
    verdicts[0]                                       # Verdict(correct=True, reason="rule")

The algebra is mathruler's `grade_answer`, the one that the public release of PVM rewards with. It has no time limit,
evaluates text with Python's `eval` and may use all memory, so it runs in a child (`grading_child.py`): spawned, never
forked, without file descriptors or environment of this process, limited in memory and in time, and killed when a pair
takes more than that. That pair is wrong, the next one gets a new child, and nothing of it is seen by the caller but the
reason. Most answers never get there: letters, numbers and equal texts are decided here (`answers.py`).

Where this differs from `grade_answer` alone: "B." and "(B) 12" are the option B; 50% is 0.5 (and, as there, 50);
12 cm is 0.12 m and is not 12 m; an answer longer than `MAX_CHARACTERS` is wrong.
"""

import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pvm_jax.answers import compare, normalized, unboxed

MAX_CHARACTERS = 256
REASONS = ("rule", "algebra", "missing", "unparsable", "timeout", "crash")
"""Who decided, or what went wrong: no answer at all, one too long or that mathruler refuses, or a lost child."""
LOST = ("timeout", "crash")
"""Reasons that say nothing on the answer."""

PATIENCE = 5
"""Wall-clock seconds for each second of CPU time that a pair may take."""

_PROGRAM = Path(__file__).with_name("grading_child.py")
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG")
_START_SECONDS = 120.0  # to import sympy from a slow disk on a busy machine
_PAIRS_PER_CHILD = 8  # a second child is started only when there is work for it
_RENEWED_AFTER = 1000  # pairs; sympy's caches grow


class GradingError(ValueError):
    """The grader cannot work at all; the message is one sentence that says what to do."""


class Verdict(NamedTuple):
    correct: bool
    reason: str  # one of REASONS


class Grader:
    """Grades lists of answers; its children start when first needed. Safe to use from several threads.

    Args:
      seconds: of CPU time that a pair may take. Of wall-clock time it may take `PATIENCE` times as much: what computes
        without end meets the first limit, and what a busy machine keeps waiting is not lost. Both are a "timeout".
      memory: bytes of address space of a child.
      children: at most so many at a time.
    """

    def __init__(self, seconds: float = 1.0, memory: int = 2**30, children: int = 2):
        self._children: queue.LifoQueue[_Child] = queue.LifoQueue()
        self._count = children
        for _ in range(children):
            self._children.put(_Child(seconds, memory))

    def grade(self, given: Sequence[str | None], gold: Sequence[str]) -> list[Verdict]:
        """A verdict for each pair. None stands for a completion without an answer.

        Raises:
          GradingError: mathruler is not installed, or no process can be started and load it within the limits.
        """
        pairs = [(None if a is None else unboxed(a), unboxed(b)) for a, b in zip(given, gold, strict=True)]
        verdicts = {pair: _by_rule(*pair) for pair in pairs}  # completions of a prompt often agree
        left = [pair for pair, verdict in verdicts.items() if verdict is None]
        if left:
            workers = min(self._count, -(-len(left) // _PAIRS_PER_CHILD))
            with ThreadPoolExecutor(workers, "grade") as pool:
                verdicts.update(zip(left, pool.map(self._by_algebra, left)))
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the children; the next `grade` starts new ones."""
        for _ in range(self._count):
            child = self._children.get()
            child.close()
            self._children.put(child)

    def _by_algebra(self, pair: tuple[str, str]) -> Verdict:
        child = self._children.get()
        try:
            return child.grade(*map(normalized, pair))
        finally:
            self._children.put(child)


def _by_rule(given: str | None, gold: str) -> Verdict | None:
    """What needs no child."""
    if given is None:
        return Verdict(False, "missing")
    if not given or not gold or max(len(given), len(gold)) > MAX_CHARACTERS:
        return Verdict(True, "rule") if given and given == gold else Verdict(False, "unparsable")
    same = compare(normalized(given), normalized(gold))
    return None if same is None else Verdict(same, "rule")


class _Lost(Exception):
    """The child is gone; the message is "timeout" or "crash"."""


@dataclasses.dataclass
class _Child:
    """One process and its pipes; started by the first pair, and again after it is lost."""

    seconds: float
    memory: int
    process: subprocess.Popen | None = None
    pairs: int = 0  # graded by this process

    def grade(self, given: str, gold: str) -> Verdict:
        if self.process is None or self.process.poll() is not None or self.pairs >= _RENEWED_AFTER:
            self.close()
            self._start()
        self.pairs += 1
        try:
            pair = json.dumps([given, gold])  # ASCII: also of half a surrogate pair
            reply = self._ask(pair, PATIENCE * self.seconds)
        except _Lost as lost:
            return Verdict(False, str(lost))
        return Verdict(reply["equal"], "algebra") if "equal" in reply else Verdict(False, "unparsable")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        self.pairs = 0
        command = [sys.executable, "-I", "-B", str(_PROGRAM), str(self.seconds), str(self.memory)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                close_fds=True,
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is for the run to handle
            )
            reply = self._ask(None, _START_SECONDS)
        except (_Lost, OSError) as lost:
            raise GradingError(
                f"the grading process could not start within {_START_SECONDS:.0f} s and {self.memory / 2**20:.0f} MiB "
                f"({lost}); to see why, run: echo | {' '.join(command)}"
            ) from None
        if "error" in reply:
            self.close()
            raise GradingError(
                f"grading answers needs mathruler and what it imports ({reply['error']}); "
                "run: pip install -e '.[grade]'"
            )

    def _ask(self, request: str | None, seconds: float) -> dict:
        """Sends a line and waits for one; a child that does not answer in time, or dies, is closed."""
        try:
            if request is not None:
                os.write(self.process.stdin.fileno(), request.encode() + b"\n")  # far below what a pipe holds
            return json.loads(self._line(time.monotonic() + seconds))
        except TimeoutError:
            reason = "timeout"
        except (EOFError, BrokenPipeError, ValueError):  # it ended, or what it wrote is no JSON
            reason = "timeout" if self._ended_by() == signal.SIGPROF else "crash"
        self.close()
        raise _Lost(reason)

    def _ended_by(self) -> int:
        """The signal that ended the process; 0 if it ended otherwise, or goes on without its pipe."""
        try:
            return -min(self.process.wait(0.5), 0)
        except subprocess.TimeoutExpired:
            return 0

    def _line(self, deadline: float) -> bytes:
        line, ready = b"", select.poll()
        ready.register(self.process.stdout.fileno(), select.POLLIN)
        while not line.endswith(b"\n"):
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            if not (part := os.read(self.process.stdout.fileno(), 4096)):
                raise EOFError
            line += part
        return line
