"""Evaluation on digit mosaics: does the model still read the image late in a long answer?

Answers are teacher-forced. A *read* is the one token that states the digit of a cell; nothing in the text before it
tells. Per split and condition: the share of reads that are right, by position in the answer (tokens, the first is 0);
the share of all other answer tokens (`text`); and exact match, which is what greedy decoding would score (see
`scoring`): every token up to the end of the turn is right. Intervals are Wilson's, 95 %; reads of one answer are
counted as if they were independent.

Conditions:
    normal          the model as it is
    vision_masked   the backbone's text does not attend to image tokens; only PVM can see
    other_memory    PVM reads another sample's image, the backbone its own; only for models with PVM on images
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pvm_jax.data.batch import Batch
from pvm_jax.data.images import DataError
from pvm_jax.data.loader import BatchInfo, Loader, Stream
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import Source, open_source
from pvm_jax.evals.intervals import share
from pvm_jax.evals.plugins import Evaluation
from pvm_jax.evals.scoring import Scorer, make_scorer
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import mesh_of

CONDITIONS = ("normal", "vision_masked", "other_memory")
EDGES = (0, 56, 140, 210, 294, 392, 512)
"""Positions at which the bins of reads begin and end, in answer tokens."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is evaluated and how.

    Attributes:
      path: the TFDS directory of the mosaics.
      splits: of that data set.
      conditions: some of `CONDITIONS`.
      samples: a batch; at least 2, since `other_memory` takes another sample's image.
      length, patches: buckets of the batch, see `Stream`.
      limit: at most so many samples a split; None: all.
    """

    path: str
    splits: Sequence[str]
    conditions: Sequence[str] = CONDITIONS
    samples: int = 16
    length: Sequence[int] = (320, 576)
    patches: Sequence[int] = (144,)
    limit: int | None = None

    def __post_init__(self):
        unknown = sorted(set(self.conditions) - set(CONDITIONS))
        if unknown:
            raise DataError(f"conditions: expected some of {list(CONDITIONS)}, got {unknown}")
        if self.samples < 2:
            raise DataError(f"samples: expected at least 2 (other_memory needs another image), got {self.samples}")


def evaluate(
    model: Qwen3VL, processor: Processor, protocol: Protocol, mesh: Mesh | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary (see `summarise`) and one record per sample and condition.

    Args:
      mesh: over which batches are spread; None: the one that the model lies on, if any. Batches that do not divide
        are filled up with empty rows.
    """
    mesh = mesh_of(nnx.state(model)) if mesh is None else mesh
    ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    rows = -(-protocol.samples // ways) * ways
    pvm = model.config.pvm
    has_memory = pvm is not None and not pvm.slots
    conditions = [c for c in protocol.conditions if c != "other_memory" or has_memory]
    scorer = make_scorer(model, mesh)
    records = []
    for split in protocol.splits:
        part = split if protocol.limit is None else f"{split}[:{protocol.limit}]"
        source = open_source(protocol.path, split=part)
        stream = Stream(source, protocol.samples, tuple(protocol.length), tuple(protocol.patches), name=split)
        loader = Loader([stream], processor, seed=0, pack=False, overlong="error", row_multiple=rows)
        for batch, info in loader.epoch():
            answers = [_answer(source, info, batch, row, processor) for row in range(len(info.ids))]
            for condition in conditions:
                right = _score(scorer, batch, len(answers), condition)
                for answer, row in zip(answers, right):
                    records.append({"split": split, "condition": condition, **answer.record(row)})
    return summarise(records), records


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Where the answer of a sample stands in its row."""

    id: str
    columns: np.ndarray  # of the answer's tokens, the end of the turn included
    reads: np.ndarray  # positions in the answer of the tokens that read a digit

    def record(self, right: np.ndarray) -> dict[str, Any]:
        right = right[self.columns]
        text = np.delete(right, self.reads)
        return {
            "id": self.id,
            "tokens": len(self.columns) - 1,
            "exact": bool(right.all()),
            "read_positions": self.reads.tolist(),
            "reads_right": right[self.reads].astype(int).tolist(),
            "text_right": int(text.sum()),
            "text_count": len(text),
        }


def _answer(source: Source, info: BatchInfo, batch: Batch, row: int, processor: Processor) -> _Answer:
    """Finds the answer in its row: the targets of the loss, up to the first token that ends a turn."""
    (index,) = info.rows[row]
    record = source[index]
    where = source.describe(index)
    spans = record.get("metadata", {}).get("digit_spans")
    if not spans:
        raise DataError(f"{where}: expected metadata with `digit_spans`, found none; is this a digits data set?")
    text = record["messages"][-1]["content"]
    text = text if isinstance(text, str) else "".join(part["text"] for part in text)
    encoded = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    by_end = {end: i for i, (_, end) in enumerate(encoded["offset_mapping"])}
    reads = [by_end.get(end) for _, end in spans]

    targets = np.flatnonzero(batch.loss_weights[row] > 0)
    ends = np.flatnonzero(np.isin(batch.tokens[row, targets], processor.eos_token_ids))
    ids = encoded["input_ids"]
    if None in reads or not len(ends) or batch.tokens[row, targets[: ends[0]]].tolist() != ids:
        raise DataError(
            f"{where}: the answer's tokens do not fit its `digit_spans`; was it made for another tokenizer?"
        )
    return _Answer(record["id"], targets[: ends[0] + 1], np.array(reads))


def _score(scorer: Scorer, batch: Batch, samples: int, condition: str) -> np.ndarray:
    """Which tokens are right [B,T]; row i of the first `samples` takes the memory of row i + 1 in `other_memory`."""
    order = np.arange(len(batch.tokens))
    if condition == "other_memory":
        if samples < 2:
            raise DataError("other_memory: the last batch holds one sample; choose `samples` that leaves another there")
        order[:samples] = np.roll(order[:samples], -1)
    masked = np.full(len(order), condition == "vision_masked")
    return np.asarray(scorer(dataclasses.replace(batch, vision_masked=masked), order))


def summarise(records: Sequence[Mapping[str, Any]], edges: Sequence[int] = EDGES) -> dict[str, Any]:
    """{split: {condition: {"samples", "tokens": [shortest, longest], "exact", "reads", "text", "by_position": [...]}}}.

    Shares are those of `intervals.share`; `by_position` has one more entry, `from` and `to`, for each bin that any
    read falls in.
    """
    groups: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["split"]][record["condition"]].append(record)
    return {split: {c: _summary(rows, edges) for c, rows in by.items()} for split, by in groups.items()}


def _summary(rows: list[Mapping[str, Any]], edges: Sequence[int]) -> dict[str, Any]:
    positions = np.concatenate([row["read_positions"] for row in rows])
    right = np.concatenate([row["reads_right"] for row in rows])
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (positions >= low) & (positions < high)
        if inside.any():
            bins.append({"from": low, "to": high} | share(int(right[inside].sum()), int(inside.sum())))
    return {
        "samples": len(rows),
        "tokens": [min(row["tokens"] for row in rows), max(row["tokens"] for row in rows)],
        "exact": share(sum(row["exact"] for row in rows), len(rows)),
        "reads": share(int(right.sum()), len(right)),
        "text": share(sum(row["text_right"] for row in rows), sum(row["text_count"] for row in rows)),
        "by_position": bins,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text: one line per split and condition, then the reads of the longest split by position."""
    lines = [f"{'split':<10}{'condition':<15}{'answers':>8}{'tokens':>10}{'exact match':>22}{'reads':>22}{'text':>8}"]
    for split, by in summary.items():
        for condition, s in by.items():
            tokens = "{}-{}".format(*s["tokens"])
            lines.append(
                f"{split:<10}{condition:<15}{s['samples']:>8}{tokens:>10}{show(s['exact']):>22}"
                f"{show(s['reads']):>22}{s['text']['value']:>8.4f}"
            )
    longest = max(summary, key=lambda split: max(s["tokens"][1] for s in summary[split].values()))
    lines += ["", f"reads by position in the answer, {longest}"]
    for condition, s in summary[longest].items():
        shown = "  ".join(f"{b['from']}-{b['to']}: {b['value']:.3f}" for b in s["by_position"])
        lines.append(f"{condition:<15}{shown}")
    return "\n".join(lines)


def show(s: Mapping[str, Any]) -> str:
    """A share with its interval, `0.940 (0.925-0.952)`."""
    return "-" if s["value"] is None else f"{s['value']:.3f} ({s['low']:.3f}-{s['high']:.3f})"


def run(evaluation: Evaluation, **options: Any) -> tuple[dict, list[dict], str]:
    """What `eval.py` calls: summary, records and text of a result; `options` are those of `Protocol`."""
    summary, records = evaluate(evaluation.model, evaluation.processor, Protocol(**options), evaluation.mesh)
    return summary, records, table(summary)


def make_evaluator(
    processor: Processor, name: str, **options: Any
) -> Callable[[nnx.Module], dict[str, tuple[float, float]]]:
    """An evaluator for the training loop: metrics as (sum, count) by `split/condition/metric`.

    `name`, that of its entry in `config.evals`, is in no message here.
    """
    protocol = Protocol(**options)

    def evaluator(model: nnx.Module) -> dict[str, tuple[float, float]]:
        summary, _ = evaluate(model, processor, protocol)
        return {
            f"{split}/{condition}/{metric}": (float(s[metric]["right"]), float(s[metric]["count"]))
            for split, by in summary.items()
            for condition, s in by.items()
            for metric in ("exact", "reads", "text")
        }

    return evaluator
