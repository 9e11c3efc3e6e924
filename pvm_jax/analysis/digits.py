"""The paper's figures in miniature: long answers about digit mosaics, of which every token is known beforehand.

    python -m pvm_jax.analysis.digits --data=runs/data/digits/demo/2.2.0 --out=DIR \\
        --model="base=assets/digits_base" --model="base + PVM=runs/demo/pvm,runs/demo-1/pvm"

Several checkpoints of a model are its seeds: curves are means over them, intervals Student's over them. A *read* is the
token that states the digit of a cell, and its cell is one visual token: so what is measured is not only how much
attention falls on the image, but how much on the cell in question, and whether the digit is right.

Four conditions take dilution (more keys) and unseen positions (larger distances) apart:

    long             answers of 490-505 tokens
    long, near text  the same answers, but each token sees only the last 48 of its answer: late positions, few keys
    short            answers of at most 64 tokens
    short, moved     the same, with 440 added to the positions of the answer: late positions, few keys, no text between

DIR holds digits.json (all numbers) and digits.png.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pvm_jax import cli
from pvm_jax.analysis import dilution, figures, files, texts
from pvm_jax.analysis.results import AnalysisError, Text, Trace
from pvm_jax.analysis.texts import Source
from pvm_jax.analysis.tracing import trace
from pvm_jax.checkpoint import load_model, open_checkpoint
from pvm_jax.data.digits_task import GRID
from pvm_jax.data.packing import shift_answers
from pvm_jax.data.processor import Processor
from pvm_jax.data.sources import open_source
from pvm_jax.evals import intervals
from pvm_jax.evals.compare import COLORS
from pvm_jax.evals.digits import EDGES
from pvm_jax.evals.results import versions
from pvm_jax.model_files import new_directory


@dataclasses.dataclass(frozen=True)
class Condition:
    """How texts are read.

    Attributes:
      split: of the data set.
      moved: added to the positions of the answer.
      text_window: see `tracing.trace`.
    """

    split: str
    moved: int = 0
    text_window: int | None = None


CONDITIONS = {
    "long": Condition("test_505"),
    "long, near text": Condition("test_505", text_window=48),
    "short": Condition("test_64"),
    "short, moved": Condition("test_64", moved=440),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text and its reads: places in 0 .. T-1, and the visual token of the cell that each names."""

    source: Source
    reads: np.ndarray
    cells: np.ndarray


def samples(processor: Processor, data: str, split: str, limit: int) -> list[Sample]:
    """The first texts of a split, as many as it has.

    Raises:
      DataError: there is no such data.
      AnalysisError: a row without what only digits have, or an image that the processor gives another size.
    """
    rows = open_source(data, split=split)
    found = []
    for i in range(min(limit, len(rows))):
        row = rows[i]
        about = row.get("metadata", {})
        if not {"cells", "digit_spans"} <= set(about):
            raise AnalysisError(
                f"{rows.describe(i)}: expected metadata with `cells` and `digit_spans`, got {sorted(about)}; "
                "is this a digits data set?"
            )
        (source,) = texts.read(processor, [row])
        grids = [(picture.rows, picture.columns) for picture in source.text.pictures]
        if grids != [(GRID, GRID)]:  # a cell's number would be another visual token's
            raise AnalysisError(
                f"{rows.describe(i)}: expected one image of {GRID} x {GRID} visual tokens, one for each cell, got "
                f"{', '.join(f'{r} x {c}' for r, c in grids) or 'none'}; does the checkpoint limit the size of images?"
            )
        reads = _places(source.text, [end for _, end in about["digit_spans"]], rows.describe(i))
        found.append(Sample(source, reads, np.array(about["cells"])))
    return found


def _places(text: Text, ends: Sequence[int], where: str) -> np.ndarray:
    """Which measured tokens end behind so many characters of the answer."""
    behind = np.cumsum([len(text.pieces[column]) for column in text.columns])
    places = np.searchsorted(behind, ends)
    if places.max() >= len(behind) or (behind[places] != ends).any():
        raise AnalysisError(f"{where}: `digit_spans` do not end where tokens do; was it made for another tokenizer?")
    return places


def measure(path: str, data: str, limit: int) -> dict[str, dict[str, Any]]:
    """By condition the numbers of one checkpoint, see `numbers`."""
    checkpoint = open_checkpoint(path)
    processor = Processor.from_pretrained(checkpoint.files)
    model = load_model(checkpoint, dtype=jnp.dtype("float32"))
    found = {}
    for name, condition in CONDITIONS.items():
        given = samples(processor, data, condition.split, limit)
        sources = [
            dataclasses.replace(s.source, encoded=shift_answers(s.source.encoded, condition.moved)) for s in given
        ]
        traces = trace(model, sources, heads=True, text_window=condition.text_window)
        found[name] = numbers(
            traces, [s.reads for s in given], [s.cells for s in given], text_window=condition.text_window
        )
    return found


def numbers(
    traces: Sequence[Trace],
    reads: Sequence[np.ndarray],
    cells: Sequence[np.ndarray],
    text_window: int | None = None,
) -> dict[str, Any]:
    """What is told of one checkpoint in one condition.

    by_position: a mapping for each bin of positions in the answer that holds a read, means over its tokens:
        count, right        its reads, and how many the model itself would state
        mass, uniform       Omega_V, mean of layers and heads; what attention without preferences would have, over
                            what the token sees
        on_cell             a read's self-attention on its cell, the head that has most in the first bin
        entropy, ratio      of PVM's retrieval from the image, in nats, and of its contribution to the FFN's
        memory_on_cell      a read's PVM weight on its cell, the head that has most in the first bin
        settled             the layer from which on a read's prediction stays
        by_layer            the read token's probability behind each layer (logit lens)
    exponent: of the power law of Omega_V, mean over texts. None if one of them is too short for a fit, and under a
        text window, where the text before a token is not what it sees.
    """
    at = np.concatenate(reads)
    edges = [(low, high) for low, high in itertools.pairwise(EDGES) if ((at >= low) & (at < high)).any()]
    own = np.concatenate([_attention(t, r, c) for t, r, c in zip(traces, reads, cells)], axis=-1)
    memory = None
    if all(t.maps.retrieval is not None for t in traces):
        memory = np.concatenate([_memory(t, r, c) for t, r, c in zip(traces, reads, cells)], axis=-1)
    first = (at >= edges[0][0]) & (at < edges[0][1])
    best = None if memory is None else memory[np.argmax(memory[:, first].mean(1))]
    head = own[np.argmax(own[:, first].mean(1))]
    reading = [_reading(t, r) for t, r in zip(traces, reads)]
    right, settled = (np.concatenate([one[name] for one in reading]) for name in ("right", "settled"))
    by_layer = np.concatenate([one["by_layer"] for one in reading], axis=1)
    every = [_tokens(t, text_window) for t in traces]
    position = np.concatenate([np.arange(len(t.text.columns)) for t in traces])

    def of_tokens(name: str, inside: np.ndarray) -> float | None:
        return None if name not in every[0] else float(np.concatenate([one[name] for one in every])[inside].mean())

    rows = []
    for low, high in edges:
        inside, tokens = (at >= low) & (at < high), (position >= low) & (position < high)
        rows.append(
            {"from": low, "to": high, "count": int(inside.sum()), "right": int(right[inside].sum())}
            | {name: of_tokens(name, tokens) for name in ("mass", "uniform", "entropy", "ratio")}
            | {"on_cell": float(head[inside].mean()), "settled": float(settled[inside].mean())}
            | {"memory_on_cell": None if best is None else float(best[inside].mean())}
            | {"by_layer": by_layer[:, inside].mean(1).tolist()}
        )
    fits = [t.dilution.fit for t in traces]
    exponent = None if text_window is not None or None in fits else dilution.mean_exponent(fits)
    return {
        "texts": len(traces),
        "by_position": rows,
        "exponent": None if exponent is None else dataclasses.asdict(exponent),
    }


def _attention(one: Trace, reads: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Self-attention's weights on the cells that are read, of all heads [L*N,reads]."""
    return one.maps.attention_heads[:, :, reads, cells].reshape(-1, len(reads))


def _memory(one: Trace, reads: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """PVM's weights on them, of all heads [P*R,reads]."""
    return one.maps.retrieval[:, :, reads, cells].reshape(-1, len(reads))


def _reading(one: Trace, reads: np.ndarray) -> dict[str, np.ndarray]:
    lens = one.lens
    return {
        "right": lens.given_rank[-1, reads] == 1,
        "settled": lens.settled[reads],
        "by_layer": lens.given_probability[:, reads],
    }


def _tokens(one: Trace, text_window: int | None = None) -> dict[str, np.ndarray]:
    """Measures of every token of an answer, [T]."""
    prompt = one.text.columns[0]
    seen = one.text.columns if text_window is None else np.minimum(one.text.columns, prompt + text_window)
    found = {
        "mass": one.dilution.visual_mass.mean((0, 1)),
        "uniform": one.text.visual_tokens / seen,
    }
    if one.dilution.pvm_choices is not None:
        found["entropy"] = one.dilution.pvm_entropy.mean((0, 1))
    if one.dilution.pvm_ratio is not None:
        found["ratio"] = one.dilution.pvm_ratio.mean(0)
    return found


# ------------------------------------------------------------------------------------------------ what is shown


def over_seeds(seeds: Sequence[Mapping[str, Any]], name: str, part: int) -> intervals.Mean | None:
    """A number of one bin, mean over seeds; `reads` is the share of right ones."""
    rows = [seed["by_position"][part] for seed in seeds]
    values = [row["right"] / row["count"] if name == "reads" else row[name] for row in rows]
    return None if None in values else intervals.mean(values)


COLUMNS = ("reads", "mass", "on_cell", "memory_on_cell", "entropy", "ratio", "settled")
HEADER = (
    "reads right", "Ω_V", "on the cell: attention", "PVM", "PVM entropy", "PVM / FFN", "settles in layer"
)  # fmt: skip


def table(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: first and last bin of each model and condition, intervals over seeds where there are several."""
    lines = [
        "| model | answers | tokens | " + " | ".join(HEADER) + " | Ω_V ∝ t^a: a |",
        "| --- " * (4 + len(HEADER)) + "|",
    ]
    for model, seeds in models.items():
        for condition in CONDITIONS:
            given = [seed[condition] for seed in seeds]
            parts = given[0]["by_position"]
            fits = [seed["exponent"]["value"] for seed in given if seed["exponent"]]  # all or none
            for part in dict.fromkeys((0, len(parts) - 1)):
                where = f"{parts[part]['from']}-{parts[part]['to'] - 1}"
                cells = [_cell(over_seeds(given, name, part)) for name in COLUMNS]
                a = _cell(intervals.mean(fits)) if part else "-"
                lines.append(f"| {model} | {condition} | {where} | {' | '.join(cells)} | {a} |")
    return "\n".join(lines)


def _cell(mean: intervals.Mean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.value:.3f}" + ("" if mean.low is None else f" ({mean.low:.3f} to {mean.high:.3f})")


def draw(models: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Four panels over the position in long answers; bars are intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.2), dpi=150)
    mass, reads, cell, lens = axes.flat

    def curve(
        one: Any, seeds: Sequence[Any], condition: str, name: str, color: str, aside: float = 1.0, **style: Any
    ) -> None:
        given = [seed[condition] for seed in seeds]
        parts = given[0]["by_position"]
        means = [over_seeds(given, name, i) for i in range(len(parts))]
        if None in means:
            return
        x = [aside * (part["from"] + part["to"]) / 2 for part in parts]
        y = [m.value for m in means]
        error = None if means[0].low is None else [m.high - m.value for m in means]
        faint = colors.to_rgba(color, 0.45)
        one.errorbar(x, y, yerr=error, marker="o", markersize=3, color=color, ecolor=faint, elinewidth=1.2, **style)

    for i, (model, seeds) in enumerate(models.items()):
        color = COLORS[i % len(COLORS)]
        style = {"color": color, "aside": 1 + 0.012 * (i - (len(models) - 1) / 2)}  # bars that can be told apart
        curve(mass, seeds, "long", "mass", **style, label=figures.plain(model))
        curve(reads, seeds, "long", "reads", **style)
        curve(reads, seeds, "long, near text", "reads", **style, linestyle="--")
        curve(cell, seeds, "long", "on_cell", **style)
        curve(cell, seeds, "long", "memory_on_cell", **style, linestyle=":")
        late = np.mean([seed["long"]["by_position"][-1]["by_layer"] for seed in seeds], axis=0)
        lens.plot(range(len(late)), late, marker="o", markersize=3, color=color)
    curve(
        mass, next(iter(models.values())), "long", "uniform", color="#bbbbbb", linestyle=":", label="without preference"
    )
    mass.set(
        xscale="log",
        yscale="log",
        xticks=(25, 50, 100, 200, 400),
        yticks=(0.05, 0.1, 0.2, 0.4),
        title="attention on the image, Ω_V",
    )
    reads.set(ylim=(0, 1.03), title="reads right; dashed: sees the last 48 tokens of its answer")
    cell.set(ylim=(0, 1.03), title="weight on the cell that is read, best head; dotted: PVM")
    lens.set(ylim=(0, 1.03), title="logit lens: probability of late digits", xlabel="layer", xticks=range(len(late)))
    for axis in (mass.xaxis, mass.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    for one in (mass, reads, cell):
        one.set_xlabel("position in the answer (tokens)")
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.title.set_fontsize(10)
    mass.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pvm_jax.analysis.digits", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="TFDS directory of the digits, config demo")
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=DIR,...",
        help="a model and the checkpoints of its seeds",
    )
    add("--limit", type=int, default=48, help="texts of each condition")
    add("--out", required=True, type=Path, help="folder to make")
    options = parser.parse_args(argv)
    try:
        print(run(options.data, options.model, options.limit, options.out))
    except (ValueError, OSError) as error:
        message = cli.sentence(error)
        if message is None and not isinstance(error, OSError):
            raise
        print(f"error: {message or error}", file=sys.stderr)
        return 1
    return 0


def _models(given: Sequence[str]) -> dict[str, list[str]]:
    """By name the checkpoints of each model.

    Raises:
      AnalysisError: one is not NAME=DIR,..., or two have one name.
    """
    models: dict[str, list[str]] = {}
    for one in given:
        name, _, paths = one.partition("=")
        if not (name and paths):
            raise AnalysisError(f"--model={one}: expected NAME=DIR, or NAME=DIR,DIR,... for its seeds")
        if name in models:
            raise AnalysisError(
                f"--model={one}: there is a model {name!r} before it; name its seeds in one, {name}=DIR,DIR"
            )
        models[name] = paths.split(",")
    return models


def run(data: str, given: Sequence[str], limit: int, out: Path) -> str:
    """Measures every checkpoint, writes the folder, and returns the table.

    Args:
      given: "NAME=DIR,..." for each model.

    Raises:
      AnalysisError, CheckpointError, DataError: what was given cannot be used.
    """
    models = _models(given)
    if limit < 1:
        raise AnalysisError(f"--limit: expected at least 1, got {limit}")
    figures.check()
    files.check(out)
    for path in itertools.chain(*models.values()):  # all of them before the first is measured
        processor = Processor.from_pretrained(open_checkpoint(path).files)
        for split in dict.fromkeys(condition.split for condition in CONDITIONS.values()):
            samples(processor, data, split, limit)
    results: dict[str, list[Any]] = {}
    for name, paths in models.items():
        for path in paths:
            print(f"{name}: {path}", file=sys.stderr, flush=True)
            results.setdefault(name, []).append(measure(path, data, limit))
    with new_directory(out) as partial:
        about = {"data": data, "limit": limit, "checkpoints": models, "versions": versions()}
        (partial / "digits.json").write_text(json.dumps(about | {"models": results}, indent=1) + "\n")
        draw(results, partial / "digits.png")
    return table(results)


if __name__ == "__main__":
    sys.exit(main())
