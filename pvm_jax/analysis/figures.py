"""The curves of all texts as PNGs: dilution, PVM's part, and the logit lens over the layers."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.analysis import measures
from pvm_jax.analysis.measures import Line, Run
from pvm_jax.analysis.results import AnalysisError, Trace
from pvm_jax.evals.compare import COLORS

STYLES = ("-", "--", ":", "-.")
"""Of the layers of one run."""


def check() -> None:
    """Raises AnalysisError where plots cannot be drawn; for before anything that takes long."""
    if importlib.util.find_spec("matplotlib") is None:
        raise AnalysisError("the plots need matplotlib, which is not installed; pip install -e '.[demo]'")


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Writes dilution.png, pvm.png and logit_lens.png as far as there is something to draw, and returns their paths."""
    traces = [trace for run in runs for trace in run.traces]
    drawn = []
    if any(map(measures.looks, traces)):
        drawn.append(_figure(folder / "dilution.png", [_mass, _tvr], runs))
    panels = [_entropy] if any(map(measures.entropy, traces)) else []
    panels += [_ratio] if any(map(measures.ratio, traces)) else []
    if panels:
        drawn.append(_figure(folder / "pvm.png", panels, runs))
    if any(trace.lens is not None for trace in traces):
        drawn.append(_figure(folder / "logit_lens.png", [_settled, _probability, _kl], runs))
    return drawn


def _figure(file: Path, panels: Sequence[Callable[[Any, Sequence[Run]], None]], runs: Sequence[Run]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), dpi=150, squeeze=False)
    for one, panel in zip(axes[0], panels):
        panel(one, runs)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8, which="both")
    shown = {line.get_color() for one in axes[0] for line in one.get_lines()}
    names = [(plain(run.name), color) for run, color in _coloured(runs) if color in shown]
    handles = [pyplot.Line2D([], [], color=color, label=name) for name, color in names]
    figure.legend(handles=handles, frameon=False, loc="lower center", ncols=len(handles), fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(file)
    pyplot.close(figure)
    return file


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]


def plain(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _label(axes: Any, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)


def _over_text(axes: Any, title: str) -> None:
    """Logarithmic axes with plain numbers, which matplotlib writes as powers."""
    from matplotlib import ticker

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    _label(axes, title, "text tokens before it, t")


def _over_layers(axes: Any, title: str) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label(axes, title, "layer")


def _mass(axes: Any, runs: Sequence[Run]) -> None:
    """Omega_V over the text tokens before it, with the power laws; exponents in the legend."""
    for run, color in _coloured(runs):
        for trace in filter(measures.looks, run.traces):
            line = measures.mass(trace)[0]
            axes.loglog(trace.text.text_before, line.values, color=color, linewidth=0.8, alpha=0.45)
            if line.fit is not None:
                t = np.geomspace(line.fit.first, line.fit.last, 50)
                label = f"{line.fit.exponent:.2f} ({line.fit.low:.2f} to {line.fit.high:.2f})"
                axes.loglog(t, line.fit.scale * t**line.fit.exponent, "--", color=color, linewidth=1.8, label=label)
    handles, _ = axes.get_legend_handles_labels()
    if 0 < len(handles) <= 8:
        axes.legend(frameon=False, fontsize=7, title="exponent (95 %)", title_fontsize=7)
    _over_text(axes, "$\\Omega_V(t)$, mean of layers and heads")


def _tvr(axes: Any, runs: Sequence[Run]) -> None:
    for run, color in _coloured(runs):
        for trace in filter(measures.looks, run.traces):
            axes.loglog(trace.text.text_before, measures.tvr(trace)[0].values, color=color, linewidth=0.8, alpha=0.45)
    _over_text(axes, "TVR(t), median of layers and heads")


def _entropy(axes: Any, runs: Sequence[Run]) -> None:
    _by_layer(axes, runs, measures.entropy)
    uniform = [measures.uniform(trace) for run in runs for trace in run.traces if measures.entropy(trace)]
    for values in {most.tobytes(): most for most in uniform}.values():
        axes.plot(np.arange(1, len(values) + 1), values, ":", color="#999999", linewidth=1)
    axes.set_ylim(bottom=0)
    _label(axes, "entropy of PVM's retrieval (nats; dotted: uniform)", "token of the answer")


def _ratio(axes: Any, runs: Sequence[Run]) -> None:
    _by_layer(axes, runs, measures.ratio)
    axes.set_ylim(bottom=0)
    _label(axes, "|gate · branch| / |FFN's output|", "token of the answer")


def _by_layer(axes: Any, runs: Sequence[Run], lines: Callable[[Trace], Sequence[Line]]) -> None:
    """A line style for each PVM layer, named where one run has several."""
    named = set()
    for run, color in _coloured(runs):
        for trace in run.traces:
            for i, line in enumerate(lines(trace)):
                label = line.label if line.label not in named else None
                named.add(line.label)
                x = np.arange(1, len(line.values) + 1)
                axes.plot(x, line.values, STYLES[i % 4], color=color, linewidth=0.9, alpha=0.8, label=label)
    if len(named) > 1:
        axes.legend(frameon=False, fontsize=7)


def _along_layers(axes: Any, runs: Sequence[Run], of_run: Callable[[Run], Any], title: str, top: float | None) -> None:
    """A line over the layers for each run that has the values; `top` ends the axis, None where they do."""
    for run, color in _coloured(runs):
        values = of_run(run)
        if values is not None:
            axes.plot(values, color=color, marker="o", markersize=3)
    axes.set_ylim(0, top)
    _over_layers(axes, title)


def _settled(axes: Any, runs: Sequence[Run]) -> None:
    _along_layers(axes, runs, measures.settled_by_layer, "tokens whose prediction has settled", 1.03)


def _probability(axes: Any, runs: Sequence[Run]) -> None:
    _along_layers(
        axes, runs, lambda run: measures.lens_mean(run, "probability"), "probability of the final token", 1.03
    )


def _kl(axes: Any, runs: Sequence[Run]) -> None:
    _along_layers(axes, runs, lambda run: measures.lens_mean(run, "kl"), "KL from the final distribution (nats)", None)
