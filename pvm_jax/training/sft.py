"""Supervised fine-tuning: packed batches of conversations, cross-entropy on the answers.

The paper's recipe weighs every sample alike (`data.loss_normalization="sample"`): one sample a device, the mean
over its answer's tokens, then the mean over devices. Over ragged answers that is not the mean over tokens
(`"token"`). Visual attention dropout (`data.vision_masked`, a share of a stream's batches) is an addition of this
project, 0 in the paper's recipe.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from absl import logging
from flax import nnx

from pvm_jax.data.loader import BatchInfo, Loader, Stream
from pvm_jax.data.records import renaming
from pvm_jax.data.sources import open_source
from pvm_jax.training.freeze import head_trains
from pvm_jax.training.losses import cross_entropy
from pvm_jax.training.stage import Loss, Setup, Stage, StageBatch, TrainingError

STREAM_KEYS = frozenset(field.name for field in dataclasses.fields(Stream)) - {"source", "name"}
SOURCE_KEYS = frozenset(("split", "image_folder", "rename"))
LOADER_KEYS = frozenset(("loss_normalization", "overlong", "bad_rows", "pack", "threads"))


def make_stage(setup: Setup, *, chunk: int = 128) -> Stage:
    """The stage of `config.stage.module = "pvm_jax.training.sft"`."""
    return SFT(make_loader(setup), chunk, head_trains=head_trains(setup.model_config, setup.freeze))


@runtime_checkable
class Batches(Protocol):
    """What SFT needs of a `Loader`; what it yields for a batch goes to `loss_fn`."""

    streams: tuple[Stream, ...]

    def steps_per_epoch(self) -> int | None: ...

    def prefetch(self, start: int) -> Iterator[tuple[Any, BatchInfo]]: ...


class SFT:
    """Batches of a loader, next-token loss on `Batch.loss_weights`."""

    def __init__(self, loader: Batches, chunk: int = 128, *, head_trains: bool = True):
        self._loader = loader
        self._chunk = chunk
        self._head_trains = head_trains
        self._ahead: Iterator[tuple[Any, BatchInfo]] | None = None
        self._next_step = -1
        self.steps_per_epoch = loader.steps_per_epoch()
        self.data_rows = {stream.name: len(stream.source) for stream in loader.streams}

    def make_extra(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return None

    def next_batch(self, step: int, policy: Callable[[], nnx.Module]) -> StageBatch:
        """`loader.batch(step)`, made ahead of time where steps follow each other."""
        if self._ahead is None or step != self._next_step:
            self.close()
            self._ahead = self._loader.prefetch(step)
        batch, info = next(self._ahead)
        self._next_step = step + 1
        for sample, reason in info.skipped:
            logging.warning("step %d leaves out %s: %s", step, sample, reason)
        cells = info.shape[0] * info.shape[1]
        return StageBatch(
            batch=batch,
            ids=info.ids,
            tokens=info.tokens,
            label=info.stream if len(self._loader.streams) > 1 else "",
            metrics={
                "padding": (cells - info.tokens, cells),
                "skipped_samples": (len(info.skipped), len(info.skipped) + info.samples),
            },
        )

    def loss_fn(self, model: nnx.Module, batch: Any) -> Loss:
        return cross_entropy(
            model.logits_in_loop(self._head_trains),
            model(batch),
            batch.tokens,
            batch.loss_weights,
            chunk=self._chunk,
            head_trains=self._head_trains,
        )

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def make_loader(setup: Setup) -> Loader:
    """The loader that `config.data` describes.

    `data` itself is one stream; with `data.streams` each entry is one, and what an entry leaves open it takes from
    `data`:

        data.path = "train.jsonl"; data.samples = 64
        data.streams = {"short": {"length": 65}, "long": {"length": 257, "samples": 8}}
    """
    data = dict(setup.data)
    streams = data.pop("streams", None) or {"train": {}}
    _refuse_unknown("config.data", data, STREAM_KEYS | SOURCE_KEYS | LOADER_KEYS | {"path"})
    opened = []
    for name, own in streams.items():
        _refuse_unknown(f"config.data.streams.{name}", own, STREAM_KEYS | SOURCE_KEYS | {"path"})
        values = data | {key: value for key, value in own.items() if value is not None}
        if not values.get("path"):
            raise TrainingError(
                "config.data.path: expected JSONL or parquet files or a TFDS directory, found nothing; "
                "pass --config.data.path=FILE"
            )
        source = open_source(values["path"], **_chosen(values, SOURCE_KEYS))
        opened.append(stream := Stream(source=source, name=name, **_chosen(values, STREAM_KEYS)))
        if stream.samples < setup.row_multiple and setup.share.index == 0:
            logging.warning(
                "stream %r: a step has %d samples for %d rows (mesh data x fsdp x micro_batches), and the others stay "
                "empty; fewer micro_batches, a larger mesh.tensor or more data.samples would fill them",
                name,
                stream.samples,
                setup.row_multiple,
            )
    return Loader(
        opened,
        setup.processor,
        seed=setup.seed,
        row_multiple=setup.row_multiple,
        share=setup.share,
        **_chosen(data, LOADER_KEYS),
    )


def _chosen(values: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """The keys that are set; a `rename` of pairs becomes a dictionary."""
    chosen = {key: value for key, value in values.items() if key in keys and value is not None}
    return chosen | ({"rename": renaming(chosen["rename"])} if "rename" in chosen else {})


def _refuse_unknown(where: str, values: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise TrainingError(f"{where}: unknown keys {unknown}; expected some of {sorted(known)}")
