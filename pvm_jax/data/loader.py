"""Batches as a pure function of (seed, step): draw, encode, pack.

    loader = Loader([Stream(source, samples=64, length=(2048, 4096), patches=8192)], processor, seed=0)
    batch, info = loader.batch(17)                 # the same after a restart, on any number of threads
    for batch, info in loader.prefetch(17): ...    # the same batches, made ahead of time
    for batch, info in loader.epoch(): ...         # evaluation: in order, every sample exactly once

Nothing is remembered between calls, so a run that resumes at step 17 needs no data state in its checkpoint.
A sample is never cut: one that fits no bucket is left out and reported, or is an error (`overlong`).
"""

import dataclasses
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pvm_jax.data.batch import Batch
from pvm_jax.data.images import DataError
from pvm_jax.data.order import Schedule, permutation, uniform
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded, collate, shift_answers
from pvm_jax.data.placement import Placement, place
from pvm_jax.data.share import Note, Share, gather, never
from pvm_jax.data.sources import Source

ACTIONS = ("skip", "error")


@dataclasses.dataclass(frozen=True)
class Stream:
    """One source and the shapes of its batches. `length` and `patches` are one bucket or several."""

    source: Source
    samples: int  # of the source's order, in each batch
    length: int | Sequence[int]  # T: tokens a row
    patches: int | Sequence[int]  # P: vision patches a row, a multiple of 4
    rows: int | None = None  # B; None: the fewest that hold the samples, rounded up to `row_multiple`
    vision_masked: float = 0.0  # visual attention dropout: the share of batches whose `vision_masked` is set
    position_shift: int = 0  # answers are moved by 0 to so many positions at random, see `packing.shift_answers`
    start: int = 0  # takes part in steps start <= step < stop
    stop: int | None = None
    name: str = "train"  # for messages

    def __post_init__(self):
        for field in ("length", "patches"):
            value = getattr(self, field)
            buckets = (value,) if isinstance(value, int) else tuple(sorted(value))
            if not buckets or buckets[0] < 1:
                raise DataError(f"stream {self.name!r}: {field} needs positive buckets, got {value}")
            object.__setattr__(self, field, buckets)
        if any(p % PATCHES_PER_TOKEN for p in self.patches):
            raise DataError(f"stream {self.name!r}: patches must be multiples of 4, got {self.patches}")
        for field, least in (
            ("samples", 1),
            ("rows", 1),
            ("start", 0),
            ("position_shift", 0),
            ("stop", self.start + 1),
        ):
            value = getattr(self, field)
            if value is not None and value < least:
                raise DataError(f"stream {self.name!r}: {field} must be at least {least}, got {value}")
        if not 0.0 <= self.vision_masked <= 1.0:
            raise DataError(f"stream {self.name!r}: vision_masked is a share, 0 to 1, got {self.vision_masked}")


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What is in a batch, for logs, for joining per-sample results, and for naming the culprit of a bad step."""

    step: int  # of the run; in `Loader.epoch`, the number of the batch
    stream: str
    epoch: int  # of the batch's first sample
    rows: tuple[tuple[int, ...], ...]  # index in the source of each sample: row by row, in order of segment id
    local_rows: tuple[int, ...]  # which of them the batch beside this holds: all, unless several processes share it
    ids: tuple[str, ...]  # the same samples' ids, flat
    skipped: tuple[tuple[str, str], ...]  # (id, reason) of samples left out
    tokens: int  # that are not padding
    shape: tuple[int, int, int]  # B, T, P
    vision_masked: bool

    @property
    def samples(self) -> int:
        return len(self.ids)

    @property
    def padding(self) -> float:
        """Share of the batch's B * T tokens that is padding."""
        return 1.0 - self.tokens / (self.shape[0] * self.shape[1])


class Loader:
    """Streams of samples in, packed batches of static shape out.

    Args:
      streams: those active at a step take turns, in this order.
      processor: `pvm_jax.data.processor.Processor`, or anything with its `encode`.
      seed: >= 0; decides the order of samples, which batches have vision masked, and shifts of positions.
      loss_normalization: "sample" or "token", see `packing.loss_weights`.
      overlong: a sample that exceeds the largest bucket is left out ("skip") or ends the run ("error").
      bad_rows: the same choice for rows that cannot be read (a missing image, an empty answer, ...).
      pack: False: one sample a row.
      row_multiple: the number of rows is a multiple of this; the mesh's data and fsdp axes must divide B.
      threads: that encode samples; the batches do not depend on it.
      share: of several processes, which rows of `batch` and `prefetch` this one fills; `BatchInfo` is about all rows.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        processor: Any,
        *,
        seed: int,
        loss_normalization: str = "sample",
        overlong: str = "skip",
        bad_rows: str = "error",
        pack: bool = True,
        row_multiple: int = 1,
        threads: int = 2,
        share: Share = Share(),  # noqa: B008  frozen
    ):
        for field, value in (("overlong", overlong), ("bad_rows", bad_rows)):
            if value not in ACTIONS:
                raise DataError(f"{field} must be one of {', '.join(ACTIONS)}; got {value!r}")
        if seed < 0:
            raise DataError(f"seed must not be negative, got {seed}")
        for stream in streams:
            if not len(stream.source):
                raise DataError(f"stream {stream.name!r}: the data set is empty")
            if stream.rows and stream.rows % row_multiple:
                raise DataError(
                    f"stream {stream.name!r}: rows = {stream.rows} is not a multiple of {row_multiple}, "
                    "over which the mesh splits a batch"
                )
        self.streams = tuple(streams)
        self._processor = processor
        self._seed = seed
        self._loss_normalization = loss_normalization
        self._skip_overlong = overlong == "skip"
        self._skip_bad_rows = bad_rows == "skip"
        self._pack = pack
        self._row_multiple = row_multiple
        self._share = share
        self._pool = ThreadPoolExecutor(threads, "encode")
        self._schedule = Schedule([(s.start, s.stop) for s in streams])
        self._permutation = functools.lru_cache(2 * len(streams))(permutation)  # a batch may span two epochs

    def steps_per_epoch(self) -> int:
        """The fewest steps from 0 after which every stream without a `stop` has given each of its samples."""
        return self._schedule.first_step_with([-(-len(s.source) // s.samples) for s in self.streams])

    def batch(self, step: int) -> tuple[Batch, BatchInfo]:
        """The batch of a step: always the same one.

        Raises:
          DataError: no stream is active, a row cannot be used, a sample is over-long and `overlong` is "error", all
            samples of the step were left out, or they do not fit the stream's `rows`.
        """
        return self._batch(step, never)

    def _batch(self, step: int, cancelled: Callable[[], bool]) -> tuple[Batch, BatchInfo]:
        number, turn = self._schedule.turn(step)
        stream = self.streams[number]
        size = len(stream.source)
        places = range(turn * stream.samples, (turn + 1) * stream.samples)
        indices = [int(self._permutation(size, self._seed, number, 0, p // size)[p % size]) for p in places]
        masked = uniform(self._seed, number, 1, turn) < stream.vision_masked
        most = stream.position_shift
        shifts = [int(uniform(self._seed, number, 2, p) * (most + 1)) for p in places] if most else None
        draw = _Draw(stream, indices, step, turn * stream.samples // size, masked, shifts)
        return self._make(draw, self._share, cancelled)

    def epoch(self, stream: int = 0, depth: int = 2) -> Iterator[tuple[Batch, BatchInfo]]:
        """Every sample of a stream exactly once, in the source's order and without shuffling, for evaluation.

        `samples` at a time. The last batch has as many rows as the others if `rows` is set or `pack` is False.
        """
        chosen = self.streams[stream]
        parts = [
            range(i, min(i + chosen.samples, len(chosen.source))) for i in range(0, len(chosen.source), chosen.samples)
        ]
        masked = chosen.vision_masked == 1.0
        return _ahead(
            lambda i: self._make(_Draw(chosen, parts[i], i, 0, masked), Share(), never), range(len(parts)), depth
        )

    def prefetch(self, start: int, stop: int | None = None, depth: int = 2) -> Iterator[tuple[Batch, BatchInfo]]:
        """`batch(start)`, `batch(start + 1)`, ... made up to `depth` steps ahead in a thread.

        An error of a step is raised when that step is asked for. Closing the iterator ends the thread.
        """
        closed = threading.Event()
        steps = itertools.count(start) if stop is None else range(start, stop)
        return _ahead(lambda step: self._batch(step, closed.is_set), steps, depth, closed)

    def _make(self, draw: "_Draw", share: Share, cancelled: Callable[[], bool]) -> tuple[Batch, BatchInfo]:
        samples = self._encode(draw, share.dealt(len(draw.indices)))
        notes = {at: Note.of(sample.id, sample.encoded, sample.reason) for at, sample in samples.items()}
        notes = gather(share, draw.step, notes, cancelled)
        placed = self._place(draw, notes)
        local = tuple(map(int, share.rows(len(placed.rows))))
        mine = [placed.rows[row] for row in local]
        samples |= self._encode(draw, [at for row in mine for at in row if at not in samples])
        batch = collate(
            [[samples[at].encoded for at in row] for row in mine],
            length=placed.length,
            patches=placed.patches,
            loss_normalization=self._loss_normalization,
            vision_masked=draw.masked,
            channels=max(note.channels for note in notes),
        )
        info = BatchInfo(
            step=draw.step,
            stream=draw.stream.name,
            epoch=draw.epoch,
            rows=tuple(tuple(draw.indices[at] for at in row) for row in placed.rows),
            local_rows=local,
            ids=tuple(notes[at].id for row in placed.rows for at in row),
            skipped=tuple((note.id, note.reason) for note in notes if note.reason is not None),
            tokens=sum(note.tokens for note in notes),
            shape=(len(placed.rows), placed.length, placed.patches),
            vision_masked=draw.masked,
        )
        return batch, info

    def _encode(self, draw: "_Draw", places: Sequence[int]) -> dict[int, "_Sample"]:
        made = self._pool.map(lambda at: self._sample(draw, at), places)
        return dict(zip(places, made))

    def _place(self, draw: "_Draw", notes: Sequence[Note]) -> Placement:
        """Which samples of the draw (by their place in it) share a row."""
        stream = draw.stream
        kept = [at for at, note in enumerate(notes) if note.reason is None]
        if not kept:
            raise DataError(f"step {draw.step}: all {len(notes)} samples were left out; the first: {notes[0].reason}")
        rows = stream.rows
        if rows is None and not self._pack:  # the same shape whether or not samples were left out
            rows = -(-stream.samples // self._row_multiple) * self._row_multiple
        sizes = [(notes[at].tokens, notes[at].patches) for at in kept]
        try:
            placed = place(sizes, stream.length, stream.patches, rows, self._row_multiple, self._pack)
        except DataError as error:
            raise DataError(f"stream {stream.name!r}, step {draw.step}: {error}") from None
        return dataclasses.replace(placed, rows=tuple(tuple(kept[i] for i in row) for row in placed.rows))

    def _sample(self, draw: "_Draw", at: int) -> "_Sample":
        """The encoded sample, or the reason why it is left out."""
        stream, index = draw.stream, draw.indices[at]
        where = record_id = stream.source.describe(index)
        try:
            record = stream.source[index]
            record_id = record["id"]
            encoded = self._processor.encode(record)
            encoded = encoded if draw.shifts is None else shift_answers(encoded, draw.shifts[at])
        except DataError as error:
            message = str(error) if where in str(error) else f"{where}: {error}"
            if not self._skip_bad_rows:
                raise DataError(message) from None
            return _Sample(record_id, None, message)
        for count, name, buckets in zip(_size(encoded), ("length", "patches"), (stream.length, stream.patches)):
            if count > buckets[-1]:
                unit = "tokens" if name == "length" else "vision patches"
                message = (
                    f"{where}: sample {record_id} has {count} {unit}, more than the largest bucket of stream "
                    f"{stream.name!r}; raise data.{name} (now {', '.join(map(str, buckets))}), lower max_pixels, or "
                    "let data.overlong be 'skip'"
                )
                if not self._skip_overlong:
                    raise DataError(message)
                return _Sample(record_id, None, message)
        return _Sample(record_id, encoded, None)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """The samples of one batch, before any of them is read."""

    stream: Stream
    indices: Sequence[int]  # in the source
    step: int
    epoch: int
    masked: bool
    shifts: Sequence[int] | None = None  # of each sample's answer


@dataclasses.dataclass(frozen=True)
class _Sample:
    id: str
    encoded: Encoded | None  # None if left out
    reason: str | None


def _size(encoded: Encoded) -> tuple[int, int]:
    return len(encoded.tokens), len(encoded.patches)


def _ahead(
    make: Callable[[int], Any], steps: Iterable[int], depth: int, closed: threading.Event | None = None
) -> Iterator[Any]:
    """make(step) for each step, in order; up to `depth` of them are made in a thread before they are asked for.

    `closed` is set when the iterator is closed, for a `make` that would wait for something.
    """
    steps = iter(steps)
    with ThreadPoolExecutor(1, "batches") as worker:  # leaving the block waits for the batch being made
        pending = deque(worker.submit(make, step) for step in itertools.islice(steps, depth))
        try:
            while pending:
                made = pending.popleft().result()
                pending.extend(worker.submit(make, step) for step in itertools.islice(steps, 1))
                yield made
        finally:
            if closed is not None:
                closed.set()
            for future in pending:
                future.cancel()
