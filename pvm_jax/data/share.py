"""Which part of each batch a process makes, when several processes train together.

The batch of a step is the same whatever the number of processes, packing included:

    1. the samples drawn for the step are dealt out; each process encodes every count-th of them;
    2. the processes tell each other how large their samples are, and which cannot be used: a few bytes a sample;
    3. all of them place all samples into rows in the same way;
    4. each process fills the rows that lie on its own devices. It encodes the samples in them that it has not got.

So each sample is encoded once or twice in the whole cluster, not once in each process, and which samples are bad is
known before any row is chosen.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from pvm_jax.data.packing import Encoded


def never() -> bool:
    return False


def alone(step: int, text: str, cancelled: Callable[[], bool]) -> list[str]:
    """The exchange of a single process."""
    return [text]


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of one process; by default everything.

    Attributes:
      index, count: which process this is, of how many.
      rows: the number of rows of a batch -> those that this process fills, ascending.
      exchange: (step, text, cancelled) -> the texts of all processes by their index; it may raise anything once
        `cancelled()` is true.
    """

    index: int = 0
    count: int = 1
    rows: Callable[[int], Sequence[int]] = range
    exchange: Callable[[int, str, Callable[[], bool]], list[str]] = alone

    def dealt(self, samples: int) -> range:
        """The places in a step's draw that this process encodes first.

        >>> [list(Share(i, 2).dealt(5)) for i in (0, 1)]
        [[0, 2, 4], [1, 3]]
        """
        return range(self.index, samples, self.count)


@dataclasses.dataclass(frozen=True)
class Note:
    """What all processes know of a sample.

    Attributes:
      id: of the sample.
      reason: why it is left out, or None.
      tokens, patches, channels: of the encoded sample, 0 if it is left out.
    """

    id: str
    reason: str | None = None
    tokens: int = 0
    patches: int = 0
    channels: int = 0

    @classmethod
    def of(cls, id: str, encoded: Encoded | None, reason: str | None) -> "Note":
        if encoded is None:
            return cls(id, reason)
        return cls(id, None, len(encoded.tokens), *encoded.patches.shape)


def gather(share: Share, step: int, notes: Mapping[int, Note], cancelled: Callable[[], bool] = never) -> list[Note]:
    """The notes of all samples of a step, in the order of the draw; `notes` are those that were dealt to us."""
    text = json.dumps([[place, *dataclasses.astuple(note)] for place, note in notes.items()])
    everything: dict[int, Note] = {}
    for answer in share.exchange(step, text, cancelled):
        everything |= {place: Note(*fields) for place, *fields in json.loads(answer)}
    return [everything[place] for place in range(len(everything))]
