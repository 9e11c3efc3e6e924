"""SFT with labels on the visual tokens: how the tiny digits base learns to see.

A model trained from scratch on answers alone learns to write them (next cell, running total) and leaves the digits to
chance for a long time: nothing tells the vision tower what a visual token should hold. Here each merged visual token
also predicts its label and its place from linear heads; the heads are `model.extra` and are dropped after training.
Not a part of the paper, which starts from a pretrained Qwen3-VL.

Labels come with a row's metadata: `"labels": [7, 3, ...]`, one class per visual token of the sample, -1 = none.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from pvm_jax.data.batch import Batch
from pvm_jax.data.loader import BatchInfo, Loader
from pvm_jax.training.losses import cross_entropy
from pvm_jax.training.sft import SFT, make_loader
from pvm_jax.training.stage import Loss, Setup, Stage, TrainingError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledBatch:
    """A batch and what its visual tokens should say."""

    batch: Batch
    labels: Any  # i32 [B,M,3]: class, row and column; -1 = none
    weight: Any  # f32 [B]: of the auxiliary loss at this step, the same in every row


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """Options of the auxiliary loss.

    Attributes:
      classes: labels are 0 .. classes - 1.
      side: a labelled image has side x side visual tokens.
      weight, late_weight: of the auxiliary loss before step `late_step` and from then on.
      place_weight: of row and column, relative to the class.
    """

    classes: int
    side: int
    weight: float = 0.5
    late_weight: float = 0.1
    late_step: int = 0
    place_weight: float = 0.3


def make_stage(setup: Setup, *, chunk: int = 128, **options: Any) -> Stage:
    """The stage of `config.stage.module = "pvm_jax.training.visual_labels"`; options are those of `Auxiliary`."""
    auxiliary = Auxiliary(**options)
    loader = LabelledLoader(make_loader(setup), auxiliary)
    return VisualLabels(loader, auxiliary, setup.model_config.text.hidden_size, chunk)


class Heads(nnx.Module):
    """Linear readings of a visual token: class, row and column."""

    def __init__(self, rngs: nnx.Rngs, width: int, auxiliary: Auxiliary):
        def head(outputs: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (outputs, width)))

        self.label = head(auxiliary.classes)
        self.row, self.column = head(auxiliary.side), head(auxiliary.side)


class VisualLabels(SFT):
    """Next-token loss plus the loss of the heads on the visual tokens."""

    def __init__(self, loader: "LabelledLoader", auxiliary: Auxiliary, width: int, chunk: int = 128):
        super().__init__(loader, chunk)
        self._auxiliary = auxiliary
        self._width = width

    def make_extra(self, rngs: nnx.Rngs) -> nnx.Module | None:
        return Heads(rngs, self._width, self._auxiliary)

    def loss_fn(self, model: nnx.Module, batch: LabelledBatch) -> Loss:
        """sum / count is the text's loss plus `weight` times the mean over labelled visual tokens."""
        rows = batch.batch
        visual = model.encode_images(rows)
        hidden = model(rows, visual=visual)
        text = cross_entropy(model.logits_in_loop(), hidden, rows.tokens, rows.loss_weights, chunk=self._chunk)
        heads, tokens, place = model.extra, visual.tokens, self._auxiliary.place_weight
        read, correct, count = head_loss(tokens, heads.label, batch.labels[..., 0])
        row, _, _ = head_loss(tokens, heads.row, batch.labels[..., 1])
        column, _, _ = head_loss(tokens, heads.column, batch.labels[..., 2])
        mean = (read + place * (row + column)) / jnp.maximum(count, 1)
        metrics = text.metrics | {"label_accuracy": (correct, count)}
        return Loss(text.sum + jnp.mean(batch.weight) * mean * text.count, text.count, metrics)


def head_loss(
    tokens: Float[Array, "B M D"], head: nnx.Param | Float[Array, "K D"], labels: Int[Array, "B M"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Over the tokens whose label is not -1: summed cross-entropy, how many are right, how many there are."""
    logits = jnp.einsum("BMD,KD->BMK", tokens.astype(jnp.float32), head[...])
    labelled = labels >= 0
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    right = labelled & (jnp.argmax(logits, axis=-1) == labels)
    return (
        -jnp.sum(jnp.where(labelled, log_probs, 0)),
        jnp.sum(right, dtype=jnp.float32),
        jnp.sum(labelled, dtype=jnp.float32),
    )


class LabelledLoader:
    """A loader whose batches carry labels; what SFT needs of a `Loader`."""

    def __init__(self, loader: Loader, auxiliary: Auxiliary):
        self._loader = loader
        self._auxiliary = auxiliary
        self._sources = {stream.name: stream.source for stream in loader.streams}
        self.streams = loader.streams

    def steps_per_epoch(self) -> int | None:
        return self._loader.steps_per_epoch()

    def prefetch(self, start: int) -> Iterator[tuple[LabelledBatch, BatchInfo]]:
        ahead = self._loader.prefetch(start)
        try:
            for batch, info in ahead:
                yield self.labelled(batch, info), info
        finally:
            ahead.close()

    def labelled(self, batch: Batch, info: BatchInfo) -> LabelledBatch:
        """Joins the labels of each sample to its visual tokens."""
        auxiliary, source = self._auxiliary, self._sources[info.stream]
        labels = np.full((*batch.memory_segment_ids.shape, 3), -1, np.int32)
        for row, number in enumerate(info.local_rows):
            for segment, index in enumerate(info.rows[number], start=1):
                record = source[index]
                given = record.get("metadata", {}).get("labels")
                where = np.flatnonzero(batch.memory_segment_ids[row] == segment)
                if given is None or len(given) != len(where) or len(given) != auxiliary.side**2:
                    raise TrainingError(
                        f"{source.describe(index)}: expected metadata with `labels` for {auxiliary.side} x "
                        f"{auxiliary.side} visual tokens, got {given} for {len(where)}"
                    )
                labels[row, where] = with_places(given, auxiliary.side)
        weight = auxiliary.weight if info.step < auxiliary.late_step else auxiliary.late_weight
        return LabelledBatch(batch, labels, np.full(len(labels), weight, np.float32))


def with_places(labels: Sequence[int], side: int) -> Int32[np.ndarray, "M 3"]:
    """Class, row and column of each visual token; -1 for all three where there is no label.

    >>> with_places([7, -1, 3, 5], side=2).tolist()
    [[7, 0, 0], [-1, -1, -1], [3, 1, 0], [5, 1, 1]]
    """
    places = np.arange(len(labels))
    table = np.stack([np.asarray(labels), places // side, places % side], axis=1).astype(np.int32)
    table[table[:, 0] < 0] = -1
    return table
