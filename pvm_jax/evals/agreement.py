"""Processes that evaluate together put the same questions to the model in the same batches, whatever each can read.

Each of them reads files and images on its own, and a network file system may fail in one host alone. Of different
batches the model would make answers to no question, and processes would wait for each other for ever.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from pvm_jax.data.share import never
from pvm_jax.distributed import Cluster
from pvm_jax.evals.results import ResultError

Exchange = Callable[[str], list[str]]
"""A text of this process -> those of all, by their number. All call it as often, in the same order."""


class Note(NamedTuple):
    """What a process knows of a question.

    Attributes:
      length, patches: T and P of the batch that it goes into; 0 if it cannot be asked.
      error: why it cannot; None if it can.
    """

    index: str
    length: int
    patches: int
    error: str | None


_TURNS = itertools.count()  # of this process, in whatever evaluations


def exchange() -> Exchange | None:
    """Between the processes that JAX has joined; None if this is the only one."""
    if jax.process_count() == 1:
        return None
    cluster = Cluster(jax.process_index(), jax.process_count())
    return lambda text: cluster.exchange_of_step(next(_TURNS), text, never, "questions")


def check_same(name: str, checksum: str, asked: Sequence[str], broken: Sequence[str], exchange: Exchange) -> None:
    """That all processes are about to ask the same questions.

    Args:
      checksum: of the benchmark's files.
      asked, broken: indices of questions, in order.

    Raises:
      ResultError: in each of them, if they differ.
    """
    digest = hashlib.sha256(json.dumps([asked, broken]).encode()).hexdigest()
    first, *others = map(json.loads, exchange(json.dumps([len(asked), checksum, digest])))
    for process, other in enumerate(others, 1):
        if other != first:
            raise ResultError(
                f"{name}: expected the same questions in all processes, found {other[0]} to ask in process {process} "
                f"(checksum of the files {other[1][:8]}) and {first[0]} in process 0 ({first[1][:8]}); "
                "let all hosts read the same files and the same workdir, and start again"
            )


def agreed(notes: Sequence[Note], exchange: Exchange) -> list[Note]:
    """What all processes say of the questions of `notes`: one that any of them cannot ask is asked by none.

    Raises:
      ResultError: in each of them, if a question's prompt has another size in some of them.
    """
    said = [[Note(*note) for note in json.loads(text)] for text in exchange(json.dumps([tuple(n) for n in notes]))]
    return [_of_all(told) for told in zip(*said, strict=True)]


def _of_all(told: Sequence[Note]) -> Note:
    """One question's note, of those of all processes."""
    failed = {process: note for process, note in enumerate(told) if note.error is not None}
    if failed:
        process, note = next(iter(failed.items()))
        return note if len(failed) == len(told) else note._replace(error=f"in process {process}: {note.error}")
    for process, note in enumerate(told):
        if note != told[0]:
            raise ResultError(
                f"expected the same prompts in all processes, found question {note.index} (T={note.length}, "
                f"P={note.patches}) in process {process} and {told[0].index} (T={told[0].length}, "
                f"P={told[0].patches}) in process 0; let all hosts read the same files, and start again"
            )
    return told[0]
