"""What a page, a plot and a file say of the same trace: its arrays reduced to curves, and curves to a row of a table.

All outputs are made of these, so that their figures cannot differ.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from pvm_jax.analysis.results import PowerLaw, Trace
from pvm_jax.evals import intervals

SHARE = 0.1
"""Of an answer: what "first" and "last" mean in the table."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One model on all texts.

    Attributes:
      name: as the user calls it.
      about: the checkpoint and what else decides its numbers.
      traces: one a sample.
      words: the text of the tokens that the logit lens shows, by id.
    """

    name: str
    about: Mapping[str, Any]
    traces: Sequence[Trace]
    words: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve over the tokens of an answer.

    Attributes:
      label: "mean", "layer 3".
      fit: of this curve over `Text.text_before`, if it was fitted.
    """

    label: str
    values: Float32[np.ndarray, " T"]
    fit: PowerLaw | None = None


def looks(trace: Trace) -> bool:
    """Whether there is anything to look at."""
    return trace.text.visual_tokens > 0


def mass(trace: Trace) -> list[Line]:
    """Omega_V: mean over layers and heads, then of each layer over its heads. Empty for a text without images."""
    if not looks(trace):
        return []
    found = trace.dilution
    lines = [Line("mean of all layers", found.visual_mass.mean((0, 1)), found.fit)]
    by_layer = enumerate(zip(found.visual_mass, found.fits, strict=True))
    return lines + [Line(f"layer {i}", values.mean(0), fit) for i, (values, fit) in by_layer]


def tvr(trace: Trace) -> list[Line]:
    """Textual dominance: median over layers and heads (a mean is one head's that looks at nothing), then by layer."""
    if not looks(trace):
        return []
    values = trace.dilution.tvr
    lines = [Line("median of all layers", np.median(values, (0, 1)).astype(np.float32))]
    return lines + [Line(f"layer {i}", np.median(v, 0).astype(np.float32)) for i, v in enumerate(values)]


def entropy(trace: Trace) -> list[Line]:
    """Of PVM's retrieval in nats, by PVM layer, mean over its heads; empty where it retrieves from no image."""
    if trace.dilution.pvm_choices is None or trace.pvm_silenced or not looks(trace):
        return []
    by_layer = zip(trace.pvm_layers, trace.dilution.pvm_entropy)
    return [Line(f"layer {layer}", values.mean(0)) for layer, values in by_layer]


def ratio(trace: Trace) -> list[Line]:
    """PVM's contribution relative to the FFN's, by PVM layer; empty where it retrieves from no image."""
    nothing = trace.dilution.pvm_choices is not None and not looks(trace)  # learned slots are always there
    if trace.dilution.pvm_ratio is None or trace.pvm_silenced or nothing:
        return []
    return [Line(f"layer {layer}", values) for layer, values in zip(trace.pvm_layers, trace.dilution.pvm_ratio)]


def uniform(trace: Trace) -> Float32[np.ndarray, " T"]:
    """Entropy in nats of a retrieval that prefers nothing of what it may retrieve from; 0 where that is one or none."""
    return np.log(np.maximum(trace.dilution.pvm_choices, 1)).astype(np.float32)


def entropy_share(trace: Trace) -> Float32[np.ndarray, " T"]:
    """Entropy of PVM's retrieval, mean of its layers, over the uniform one; NaN where there is nothing to choose."""
    most = uniform(trace)
    mean = np.mean([line.values for line in entropy(trace)], axis=0)
    return np.divide(mean, most, out=np.full_like(most, np.nan), where=most > 0)


def settled_by_layer(run: Run) -> Float[np.ndarray, " L"] | None:
    """The share of all tokens whose prediction has settled at each layer."""
    lenses = [trace.lens for trace in run.traces if trace.lens is not None]
    if not lenses:
        return None
    settled = np.concatenate([lens.settled for lens in lenses])
    return (settled <= np.arange(len(lenses[0].rank))[:, None]).mean(1)


def lens_mean(run: Run, field: str) -> Float[np.ndarray, " L"] | None:
    """The mean of `probability` or `kl` over all tokens, by layer."""
    lenses = [trace.lens for trace in run.traces if trace.lens is not None]
    return np.concatenate([getattr(lens, field) for lens in lenses], axis=1).mean(1) if lenses else None


def numbers(trace: Trace) -> dict[str, Any]:
    """What the table says of one trace; None where there is nothing to say."""
    count = len(trace.text.columns)
    few = max(1, round(SHARE * count))
    found: dict[str, Any] = {"tokens": count, "visual_tokens": trace.text.visual_tokens}
    curve = mass(trace)[0].values if looks(trace) else None
    found["mass_first"] = None if curve is None else float(curve[:few].mean())
    found["mass_last"] = None if curve is None else float(curve[-few:].mean())
    dominance = tvr(trace)[0].values[-few:] if looks(trace) else np.array([np.nan])
    found["tvr_last"] = float(np.median(dominance)) if np.isfinite(dominance).all() else None
    fit = trace.dilution.fit
    found["fit"] = None if fit is None else dataclasses.asdict(fit)
    found["no_fit"] = trace.dilution.no_fit
    choices = trace.dilution.pvm_choices
    retrieving = np.ones(count, bool) if choices is None else choices > 0  # a causal memory may come late
    for name, lines in (("entropy", entropy(trace)), ("ratio", ratio(trace))):
        some = lines and retrieving.any()
        found[f"pvm_{name}"] = float(np.mean([line.values[retrieving] for line in lines])) if some else None
    share = entropy_share(trace) if entropy(trace) else np.array([])
    share = share[np.isfinite(share)]
    found["pvm_entropy_share"] = float(share.mean()) if len(share) else None
    found["settled"] = None if trace.lens is None else float(trace.lens.settled.mean())
    found["layers"] = len(trace.dilution.visual_mass)
    return found


HEADER = (
    "run",
    "tokens",
    "Ω_V, first tenth",
    "last tenth",
    "Ω_V ∝ t^a: a (95 %)",
    "TVR, last tenth",
    "PVM entropy / uniform",
    "PVM / FFN",
    "settles in layer",
)


def caveats(runs: Sequence[Run], sample: int) -> list[str]:
    """Sentences about what keeps the runs of a sample from being compared."""
    traces = [(run.name, run.traces[sample]) for run in runs]
    text = traces[0][1].text.name
    found = []
    sizes = {name: trace.text.visual_tokens for name, trace in traces}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        found.append(
            f"{text}: the runs have different numbers of visual tokens ({said}), so that their Ω_V and TVR do not "
            "compare; give all of them the same --min_pixels and --max_pixels, for videos --video_min_pixels and "
            "--video_max_pixels."
        )
    answers = {name: tuple(trace.text.ids[trace.text.columns]) for name, trace in traces}
    if len(set(answers.values())) > 1:
        said = ", ".join(f"{name} {len(answer):,} tokens" for name, answer in answers.items())
        found.append(
            f"{text}: the answers of the runs differ in their tokens ({said}), and Ω_V falls with the length of an "
            "answer; to compare them, give one answer in the data, and checkpoints with one tokenizer."
        )
    return found


def attributed(runs: Sequence[Run], said: Sequence[Sequence[str]]) -> list[str]:
    """Sentences of each run, once, with the names of the runs that they belong to unless these are all."""
    found = []
    for note in dict.fromkeys(itertools.chain(*said)):
        whose = [run.name for run, own in zip(runs, said, strict=True) if note in own]
        found.append(note if len(whose) == len(runs) else f"{', '.join(whose)}: {note}")
    return found


def notes(runs: Sequence[Run]) -> list[str]:
    """What keeps runs from being compared, and what is missing; with the texts it belongs to, unless these are all."""
    texts: dict[str, list[str]] = {}
    for i, trace in enumerate(runs[0].traces):
        for note in attributed(runs, [run.traces[i].notes for run in runs]):
            texts.setdefault(note, []).append(trace.text.name)
    count = len(runs[0].traces)
    said = [note if len(names) == count else f"{', '.join(names)}: {note}" for note, names in texts.items()]
    return [*(note for i in range(count) for note in caveats(runs, i)), *said]


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A row of cells under `HEADER` for each run: means over its texts, or over so many of them as the cell says."""
    return [_row(run.name, [numbers(trace) for trace in run.traces]) for run in runs]


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def _of_texts(count: int) -> str:
    return f"of {count} text{'' if count == 1 else 's'}"


def _row(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(key: str, form: Callable[[float], str] = short) -> str:
        values = [n[key] for n in found if n[key] is not None]
        if not values:
            return "-"
        fewer = "" if len(values) == len(found) else f" ({_of_texts(len(values))})"
        return form(float(np.mean(values))) + fewer

    tokens = str(sum(n["tokens"] for n in found)) + (f" in {len(found)} texts" if len(found) > 1 else "")
    return [
        name,
        tokens,
        mean("mass_first"),
        mean("mass_last"),
        _exponent([n["fit"] for n in found if n["fit"]], len(found)),
        mean("tvr_last"),
        mean("pvm_entropy_share", "{:.2f}".format),
        mean("pvm_ratio"),
        mean("settled", lambda layer: f"{layer:.1f} of {found[0]['layers'] - 1}"),
    ]


def _exponent(fits: Sequence[Mapping[str, float]], texts: int) -> str:
    """One text's with the interval of its fit; of several the mean with Student's interval over the texts."""
    if not fits:
        return "-"
    if len(fits) == 1:
        fewer = "" if texts == 1 else f", {_of_texts(1)}"
        return f"{fits[0]['exponent']:.2f} ({fits[0]['low']:.2f} to {fits[0]['high']:.2f}{fewer})"
    found = intervals.mean([fit["exponent"] for fit in fits])
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f} over {found.count} texts)"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    table = [HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in table
    )
