"""The page to look at: images with a map that follows the token, the text in colour, and the curves, in one HTML file.

It needs no network and no other file; how its data reach it safely is in `evals.pages`. It stays light: what does not
fit `PAGE_BYTES` and `IMAGE_BYTES` is left out in this order, and the page says so: maps of single layers of
self-attention (evenly spaced ones stay), maps of PVM's heads, the tokens at the end of an answer; images are scaled.
Nothing of that is lost: the files beside the page have every number.

Curves are exact (float32). A map is stored as 255ths of each token's maximum, so that a number read off the page is
within 0.2 % of that maximum.
"""

import base64
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float32

from pvm_jax.analysis import measures
from pvm_jax.analysis.measures import Line, Run
from pvm_jax.analysis.results import Lens, Picture, Text, Trace
from pvm_jax.evals.pages import fill_page, shorten, thumbnail

PAGE_BYTES = 12 * 2**20
"""Of all maps and curves together, as they stand in the page."""
IMAGE_BYTES = 4 * 2**20
"""Of all images together, as they stand in the page."""
IMAGE_SIDES = (640, 480, 320, 200, 120, 64)
"""Longer side of an image in pixels: the first with which all fit; the last is taken in any case."""
TOKENS = 4096
"""Of an answer, at most: the page has an element for each."""
BASE64 = 4 / 3


@dataclasses.dataclass(frozen=True)
class _Map:
    key: str
    label: str
    unit: str
    values: Float32[np.ndarray, "T M"]


def write_page(runs: Sequence[Run], about: str, budget: int = PAGE_BYTES, image_budget: int = IMAGE_BYTES) -> str:
    """The page.

    Args:
      runs: one or several; trace i of each is of sample i.
      about: a sentence below the title.
      budget, image_budget: see the module's docstring; they are shared evenly.
    """
    count = len(runs[0].traces)
    samples = [
        _sample(runs, [run.traces[i] for run in runs], budget // (count * len(runs)), image_budget // count)
        for i in range(count)
    ]
    data = {
        "about": about,
        "names": [run.name for run in runs],
        "header": list(measures.HEADER),
        "rows": measures.table(runs),
        "measured": {run.name: run.about for run in runs},
        "notes": [],
        "samples": samples,
    }
    folder = resources.files(__package__)
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css")}
    script = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("explorer.js", "charts.js"))
    return fill_page(read["page.html"], data, read["page.css"], script)


def _sample(runs: Sequence[Run], traces: Sequence[Trace | None], budget: int, image_budget: int) -> dict[str, Any]:
    text = next(trace.text for trace in traces if trace is not None)
    pictures, side = _pictures(text.pictures, image_budget)
    scaled = [p for p in pictures if max(p["width"], p["height"]) > side]
    notes = []
    if scaled:
        largest = max(max(p["width"], p["height"]) for p in scaled)
        which = scaled[0]["label"] if len(scaled) == 1 else f"{len(scaled)} images"
        notes.append(
            f"{which}: scaled to {side} pixels on the longer side, from up to {largest}, to keep the page light."
        )
    shown, said = [], []
    for run, trace in zip(runs, traces):
        made, cuts = (None, []) if trace is None else _run(trace, run.words, budget)
        shown.append(made)
        said.append([] if trace is None else [*cuts, *trace.notes])
    for note in dict.fromkeys(itertools.chain(*said)):
        whose = [run.name for run, notes_of in zip(runs, said) if note in notes_of]
        notes.append(note if len(whose) == len(runs) else f"{', '.join(whose)}: {note}")
    return {
        "name": text.name,
        "question": shorten(_question(text)),
        "pictures": pictures,
        "notes": notes,
        "runs": shown,
    }


def _question(text: Text) -> str:
    """What stands before the first measured token; visual tokens as the name of their picture."""
    starts = {picture.start: picture.label for picture in text.pictures}
    parts = []
    for piece, visual in zip(text.pieces[: text.columns[0]], text.visual_index):
        parts.append(piece if visual < 0 else f"[{starts[visual]}]" if visual in starts else "")
    return "".join(parts)


def _pictures(pictures: Sequence[Picture], budget: int) -> tuple[list[dict[str, Any]], int]:
    """The pictures as the page has them, and the side that they were scaled to if they were larger."""
    made: list[dict[str, Any]] = []
    for side in IMAGE_SIDES:
        made = [thumbnail(picture.pixels, side) for picture in pictures]
        if sum(len(one["url"]) for one in made) <= budget:
            break
    fields = [{name: getattr(p, name) for name in ("label", "rows", "columns", "start")} for p in pictures]
    return [one | field for one, field in zip(made, fields)], side


def _run(trace: Trace, words: Mapping[int, str], budget: int) -> tuple[dict[str, Any], list[str]]:
    """One run's part of a sample, and sentences about what was left out."""
    text, notes = trace.text, []
    total, layers = len(text.columns), len(trace.dilution.visual_mass)
    visual = text.visual_tokens
    # Half of the budget is for curves (of each layer Omega_V, TVR and four of the lens), half for at least two maps.
    curve = 4 * BASE64 * (6 * layers + 8)
    cell = BASE64 * (visual + 4 + 4 * len(text.pictures))
    count = int(min(total, TOKENS, budget / 2 / curve, budget / 2 / (2 * cell)))
    count = max(count, 1)
    if count < total:
        notes.append(f"The page shows the first {count:,} of {total:,} tokens; analysis.json and the plots have all.")
    maps = list(_maps(trace, int(budget / 2 / (count * cell)))) if trace.maps and visual else []
    of_layers = [m.label for m in maps if m.key.startswith("layer")]
    if trace.maps and visual and len(of_layers) < layers:
        notes.append(f"The page has maps of {len(of_layers)} of {layers} layers of self-attention; maps.npz has all.")

    def lines(found: Sequence[Line]) -> list[dict[str, Any]]:
        return [
            {
                "label": line.label,
                "values": _floats(line.values[:count]),
                "fit": None if line.fit is None else finite(dataclasses.asdict(line.fit)),
            }
            for line in found
        ]

    run = {
        "tokens": [text.pieces[column] for column in text.columns[:count]],
        "gaps": (np.flatnonzero(np.diff(text.columns[:count]) > 1) + 1).tolist(),
        "visual": visual,
        "uniform": measures.uniform(trace),
        "before": _floats(text.text_before[:count]),
        "noFit": trace.dilution.no_fit,
        "mass": lines(measures.mass(trace)),
        "tvr": lines(measures.tvr(trace)),
        "entropy": lines(measures.entropy(trace)),
        "ratio": lines(measures.ratio(trace)),
        "maps": [_encoded(m, count, text.pictures) for m in maps],
        "lens": None if trace.lens is None else _lens(trace.lens, words, count),
    }
    return run, notes


def _maps(trace: Trace, room: int) -> Iterator[_Map]:
    """Up to `room` maps, the most telling first; the first is what the page opens with."""
    maps, every = trace.maps, []
    retrieved = None if trace.pvm_silenced else maps.retrieval
    attention, retrieval = "of the attention", "of the retrieval"
    if retrieved is not None:
        if len(trace.pvm_layers) > 1:
            every.append(_Map("pvm", "PVM, mean of layers and heads", retrieval, retrieved.mean((0, 1))))
        for layer, values in zip(trace.pvm_layers, retrieved):
            every.append(_Map(f"pvm {layer}", f"PVM layer {layer}, mean of heads", retrieval, values.mean(0)))
    every.append(_Map("attention", "self-attention, mean of layers", attention, maps.attention.mean(0)))
    if retrieved is not None:
        for layer, heads in zip(trace.pvm_layers, retrieved):
            for head, values in enumerate(heads):
                every.append(_Map(f"pvm {layer} {head}", f"PVM layer {layer}, head {head}", retrieval, values))
    layers = len(maps.attention)
    free = max(0, min(layers, room - len(every)))
    for layer in np.unique(np.linspace(0, layers - 1, free).round().astype(int)):
        every.append(_Map(f"layer {layer}", f"self-attention, layer {layer}", attention, maps.attention[layer]))
    yield from every[: max(room, 1)]


def _encoded(one: _Map, count: int, pictures: Sequence[Picture]) -> dict[str, str]:
    """The map in 255ths of each token's maximum, and the exact sum of each picture."""
    values = one.values[:count]
    scale = values.max(1)
    parts = np.round(255 * values / np.where(scale > 0, scale, 1)[:, None]).astype(np.uint8)
    sums = np.stack([values[:, picture.start : picture.stop].sum(1) for picture in pictures], 1)
    fields = {"key": one.key, "label": one.label, "unit": one.unit}
    return fields | {"data": _base64(parts), "scale": _floats(scale), "sums": _floats(sums)}


def _lens(lens: Lens, words: Mapping[int, str], count: int) -> dict[str, Any]:
    arrays = {name: getattr(lens, name)[:, :count] for name in ("probability", "rank", "kl", "token")}
    used = {str(token): words.get(int(token), "") for token in np.unique(arrays["token"])}
    encoded = {name: _floats(array) for name, array in arrays.items()}
    return encoded | {"layers": len(lens.rank), "settled": _floats(lens.settled[:count]), "words": used}


def _floats(values: np.ndarray) -> str:
    return _base64(np.asarray(values, "<f4"))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in values.items()}
