"""The page to look at: images with a map that follows the token, the text in colour, and the curves, in one HTML file.

It needs no network and no other file; how its data reach it safely is in `evals.pages`. It stays light: what does not
fit `PAGE_BYTES` and `IMAGE_BYTES` is left out in this order, and the page says so: maps of single layers of
self-attention (evenly spaced ones stay), maps of PVM's heads and layers, the maps of tokens between every k-th one, and
the tokens at the end of an answer; images are scaled. Nothing of that is lost: the files beside the page have every
number. Traces share the room by need: what a short answer leaves is there for the long ones.

Means over layers and PVM's curves are exact (float32); those of single layers and of the lens are within 0.05 %. A map
is stored as 255ths of each token's maximum, so that a number read off the page is within 0.2 % of that maximum.
"""

import base64
import dataclasses
import hashlib
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
TOKENS = 8192
"""Of an answer, at most: the page has an element for each."""
CURVES = 0.75
"""The share of `PAGE_BYTES` that curves may take from maps before answers are cut."""
BASE64 = 4 / 3
EXPONENT = 127 - 40
"""The smallest of `_halves`, as a float32 has it."""


@dataclasses.dataclass(frozen=True)
class _Map:
    key: str
    label: str
    unit: str
    values: Float32[np.ndarray, "places M"]


@dataclasses.dataclass(frozen=True)
class _Room:
    """What the page has of a trace.

    Attributes:
      tokens: of the answer, from the first.
      every: one token in so many has maps, and so do the first and the last.
      maps: how many.
    """

    tokens: int
    every: int
    maps: int

    @property
    def places(self) -> np.ndarray:
        """The tokens that have maps."""
        return np.unique(np.append(np.arange(0, self.tokens, self.every), self.tokens - 1))


def write_page(runs: Sequence[Run], about: str, budget: int = PAGE_BYTES, image_budget: int = IMAGE_BYTES) -> str:
    """The page.

    Args:
      runs: one or several; trace i of each is of sample i.
      about: a sentence below the title.
      budget, image_budget: see the module's docstring; samples share the latter evenly.
    """
    samples = list(zip(*[run.traces for run in runs]))
    rooms = _rooms(samples, budget)
    data = {
        "about": about,
        "names": [run.name for run in runs],
        "header": list(measures.HEADER),
        "rows": measures.table(runs),
        "measured": {run.name: run.about for run in runs},
        "samples": [_sample(runs, i, rooms[i], image_budget // len(samples)) for i in range(len(samples))],
    }
    folder = resources.files(__package__)
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css")}
    script = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("explorer.js", "charts.js"))
    return fill_page(read["page.html"], data, read["page.css"], script)


# ---- What there is room for -------------------------------------------------------------------------------------


def _rooms(samples: Sequence[Sequence[Trace]], budget: int) -> list[list[_Room]]:
    """By sample and run. The runs of a sample have maps at the same tokens, so that they can be looked at together."""
    traces = [trace for sample in samples for trace in sample]
    wanted = [min(len(trace.text.columns), TOKENS) for trace in traces]
    needs = [count * _curve_bytes(trace) for count, trace in zip(wanted, traces)]
    given = _shares(needs, CURVES * budget)
    counts = [
        count if room >= need else max(1, int(room / _curve_bytes(trace)))
        for count, need, room, trace in zip(wanted, needs, given, traces)
    ]
    needs = [count * _cell_bytes(trace) * _map_count(trace) for count, trace in zip(counts, traces)]
    given = _shares(needs, budget - sum(given))
    left = iter(zip(traces, counts, given))
    rooms = []
    for sample in samples:
        mine = [next(left) for _ in sample]
        every = max(_every(*one) for one in mine)
        rooms.append([_room(*one, every) for one in mine])
    return rooms


def _shares(needs: Sequence[float], budget: float) -> list[float]:
    """What each gets: all that it needs, or as much as every other that needs more than there is."""
    given = [0.0] * len(needs)
    for done, place in enumerate(sorted(range(len(needs)), key=lambda place: needs[place])):
        given[place] = min(needs[place], budget / (len(needs) - done))
        budget -= given[place]
    return given


def _curve_bytes(trace: Trace) -> float:
    """Of a token: 16 bits of six curves for each layer, 32 of the others."""
    return BASE64 * (12 * len(trace.dilution.visual_mass) + 16 + 4 * (2 * len(trace.pvm_layers) + 1))


def _cell_bytes(trace: Trace) -> float:
    """Of a token in a map: its visual tokens, their maximum, and the sum of each picture."""
    return BASE64 * (trace.text.visual_tokens + 4 + 4 * len(trace.text.pictures))


def _retrieval(trace: Trace) -> Float32[np.ndarray, "P R T M"] | None:
    return None if trace.maps is None or trace.pvm_silenced else trace.maps.retrieval


def _pvm_maps(trace: Trace) -> int:
    """How many maps of PVM `_maps` would give: of each head, of each layer, and of several layers together."""
    retrieved = _retrieval(trace)
    layers, heads = (0, 0) if retrieved is None else retrieved.shape[:2]
    return layers * (heads + 1) + (layers > 1)


def _map_count(trace: Trace) -> int:
    """How many maps `_maps` would give."""
    if trace.maps is None or not measures.looks(trace):
        return 0
    return len(trace.maps.attention) + 1 + _pvm_maps(trace)


def _every(trace: Trace, tokens: int, given: float) -> int:
    """So that the first maps have room, of self-attention and of PVM."""
    first = min(_map_count(trace), 1 if _retrieval(trace) is None else 2)
    fits = (k for k in range(1, tokens) if first * _cell_bytes(trace) * len(_Room(tokens, k, 0).places) <= given)
    return next(fits, tokens) if first else 1


def _room(trace: Trace, tokens: int, given: float, every: int) -> _Room:
    places = len(_Room(tokens, every, 0).places)
    fits = int(given / (places * _cell_bytes(trace)) + 1e-9)
    return _Room(tokens, every, min(_map_count(trace), max(1, fits)))


# ---- Samples ----------------------------------------------------------------------------------------------------


def _sample(runs: Sequence[Run], place: int, rooms: Sequence[_Room], image_budget: int) -> dict[str, Any]:
    traces = [run.traces[place] for run in runs]
    images, places, side = _images([picture for trace in traces for picture in trace.text.pictures], image_budget)
    scaled = [one for one in images if max(one["width"], one["height"]) > side]
    notes = measures.caveats(runs, place)
    if scaled:
        largest = max(max(one["width"], one["height"]) for one in scaled)
        which = scaled[0]["label"] if len(scaled) == 1 else f"{len(scaled)} images"
        notes.append(
            f"{which}: scaled to {side} pixels on the longer side, from up to {largest}, to keep the page light."
        )
    shown, said = [], []
    for run, trace, room in zip(runs, traces, rooms):
        made, cuts = _run(trace, run.words, room, places)
        shown.append(made)
        said.append([*cuts, *trace.notes])
    notes += measures.attributed(runs, said)
    return {
        "name": traces[0].text.name,
        "questions": _questions(runs, traces),
        "images": images,
        "notes": notes,
        "runs": shown,
    }


def _questions(runs: Sequence[Run], traces: Sequence[Trace]) -> list[dict[str, str]]:
    """What was asked, once for all runs to which it is the same (chat templates may differ)."""
    asked: dict[str, list[str]] = {}
    for run, trace in zip(runs, traces):
        asked.setdefault(shorten(_question(trace.text)), []).append(run.name)
    return [{"runs": ", ".join(names) if len(asked) > 1 else "", "text": text} for text, names in asked.items()]


def _question(text: Text) -> str:
    """What stands before the first measured token; visual tokens as the name of their picture."""
    starts = {picture.start: picture.label for picture in text.pictures}
    parts = []
    for piece, visual in zip(text.pieces[: text.columns[0]], text.visual_index):
        parts.append(piece if visual < 0 else f"[{starts[visual]}]" if visual in starts else "")
    return "".join(parts)


def _pixels(picture: Picture) -> tuple[tuple[int, int], bytes]:
    """What tells images apart."""
    return picture.pixels.size, hashlib.sha256(picture.pixels.tobytes()).digest()


def _images(pictures: Sequence[Picture], budget: int) -> tuple[list[dict[str, Any]], dict[Any, int], int]:
    """The images of all runs, each once, which of them is which, and the side that larger ones were scaled to.

    Grids are the runs' own: each model gets an image in the size that its checkpoint says.
    """
    distinct = {_pixels(picture): picture for picture in pictures}
    made: list[dict[str, Any]] = []
    for side in IMAGE_SIDES:
        made = [thumbnail(picture.pixels, side) for picture in distinct.values()]
        if sum(len(one["url"]) for one in made) <= budget:
            break
    made = [one | {"label": picture.label} for one, picture in zip(made, distinct.values())]
    return made, {key: i for i, key in enumerate(distinct)}, side


def _run(
    trace: Trace, words: Mapping[int, str], room: _Room, images: Mapping[Any, int]
) -> tuple[dict[str, Any], list[str]]:
    """One run's part of a sample, and sentences about what was left out."""
    text, count = trace.text, room.tokens
    maps = list(_maps(trace, room)) if room.maps else []

    def lines(found: Sequence[Line], exact: int) -> list[dict[str, Any]]:
        return [
            {
                "label": line.label,
                **({"values": _floats(line.values[:count])} if i < exact else {"halves": _halves(line.values[:count])}),
                "fit": None if line.fit is None else finite(dataclasses.asdict(line.fit)),
            }
            for i, line in enumerate(found)
        ]

    entropy, ratio = measures.entropy(trace), measures.ratio(trace)
    run = {
        "tokens": [text.pieces[column] for column in text.columns[:count]],
        "gaps": (np.flatnonzero(np.diff(text.columns[:count]) > 1) + 1).tolist(),
        "visual": text.visual_tokens,
        "uniform": _floats(measures.uniform(trace)[:count]) if entropy else "",
        "before": _floats(text.text_before[:count]),
        "noFit": trace.dilution.no_fit,
        "mass": lines(measures.mass(trace), 1),
        "tvr": lines(measures.tvr(trace), 1),
        "entropy": lines(entropy, len(entropy)),
        "ratio": lines(ratio, len(ratio)),
        "pictures": [
            {name: getattr(p, name) for name in ("label", "rows", "columns", "start")} | {"image": images[_pixels(p)]}
            for p in text.pictures
        ],
        "every": room.every,
        "maps": [_encoded(one, text.pictures) for one in maps],
        "lens": None if trace.lens is None else _lens(trace.lens, words, count),
    }
    return run, list(_cuts(trace, room, maps))


def _cuts(trace: Trace, room: _Room, maps: Sequence[_Map]) -> Iterator[str]:
    """Sentences about what is not on the page."""
    total, layers = len(trace.text.columns), len(trace.dilution.visual_mass)
    if room.tokens < total:
        yield f"The page shows the first {room.tokens:,} of {total:,} tokens; analysis.json and the plots have all."
    if not measures.looks(trace):
        return
    if trace.maps is None:
        yield "There are no maps over the image: they were not measured."
        return
    if room.every > 1:
        yield (
            f"One token in {room.every} has maps, and so do the first and the last; any other shows the nearest one's. "
            "maps.npz has all."
        )
    of_layers = [one for one in maps if one.key.startswith("layer")]
    if len(of_layers) < layers:
        yield f"The page has maps of {len(of_layers)} of {layers} layers of self-attention; maps.npz has all."
    of_pvm, all_of_pvm = sum(one.key.startswith("pvm") for one in maps), _pvm_maps(trace)
    if of_pvm < all_of_pvm:
        yield f"The page has {of_pvm} of {all_of_pvm} maps of PVM, of its layers and heads; maps.npz has all."


def _maps(trace: Trace, room: _Room) -> Iterator[_Map]:
    """As many maps as there is room for, the most telling first; the first is what the page opens with."""
    retrieved, every = _retrieval(trace), []
    own = trace.maps.attention[:, room.places]
    attention, retrieval = "of the attention", "of the retrieval"
    if retrieved is not None:
        retrieved = retrieved[:, :, room.places]
        for layer, values in zip(trace.pvm_layers, retrieved):
            every.append(_Map(f"pvm {layer}", f"PVM layer {layer}, mean of heads", retrieval, values.mean(0)))
        if len(trace.pvm_layers) > 1:
            every.insert(0, _Map("pvm", "PVM, mean of layers and heads", retrieval, retrieved.mean((0, 1))))
    every.insert(min(len(every), 1), _Map("attention", "self-attention, mean of layers", attention, own.mean(0)))
    if retrieved is not None:
        for layer, heads in zip(trace.pvm_layers, retrieved):
            for head, values in enumerate(heads):
                every.append(_Map(f"pvm {layer} {head}", f"PVM layer {layer}, head {head}", retrieval, values))
    free = max(0, min(len(own), room.maps - len(every)))
    for layer in np.unique(np.linspace(0, len(own) - 1, free).round().astype(int)):
        every.append(_Map(f"layer {layer}", f"self-attention, layer {layer}", attention, own[layer]))
    yield from every[: room.maps]


def _encoded(one: _Map, pictures: Sequence[Picture]) -> dict[str, str]:
    """The map in 255ths of each token's maximum, and the exact sum of each picture."""
    scale = one.values.max(1)
    parts = np.round(255 * one.values / np.where(scale > 0, scale, 1)[:, None]).astype(np.uint8)
    sums = np.stack([one.values[:, picture.start : picture.stop].sum(1) for picture in pictures], 1)
    fields = {"key": one.key, "label": one.label, "unit": one.unit}
    return fields | {"data": _base64(parts), "scale": _floats(scale), "sums": _floats(sums)}


def _lens(lens: Lens, words: Mapping[int, str], count: int) -> dict[str, Any]:
    """Tokens as places in the list of words, in 16 bits wherever these suffice."""
    used, places = np.unique(lens.token[:, :count], return_inverse=True)
    places = places.reshape(lens.token[:, :count].shape)
    return {
        **{name: _halves(getattr(lens, name)[:, :count]) for name in ("probability", "rank", "kl")},
        "layers": len(lens.rank),
        "settled": _floats(lens.settled[:count]),
        "token": _base64(places.astype("<u2" if len(used) <= 2**16 else "<u4")),
        "words": [words.get(int(token), "") for token in used],
    }


def _floats(values: np.ndarray) -> str:
    return _base64(np.asarray(values, "<f4"))


def _halves(values: np.ndarray) -> str:
    """Numbers from 0 on in 16 bits: of a float32 six bits of the exponent and ten of the mantissa, rounded.

    0 stands for what is below 2^-40, the largest two codes for infinity and NaN.
    """
    given = np.maximum(np.asarray(values, "<f4"), 0)
    limited = np.clip(np.nan_to_num(given), 2.0**-40, 2.0**23).astype("<f4")
    codes = ((limited.view("<u4") + 2**12) >> 13) - (EXPONENT << 10)
    codes = np.where(given < 2.0**-40, 0, np.where(np.isinf(given), 2**16 - 2, codes))
    return _base64(np.where(np.isnan(given), 2**16 - 1, codes).astype("<u2"))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in values.items()}
