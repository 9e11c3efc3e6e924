"""The numbers of a grid of ablations: what is kept of an evaluation, means over seeds, a table and a picture.

Two intervals, both of 95 %: over seeds (Student's t, of the mean of a row's runs; seeds differ in initial values, in
the order of the data and, if each has its own, in the base), and pooled (Wilson's, all answers of all seeds as if
independent).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.evals.intervals import mean, wilson

Share = Mapping[str, int | float]
"""{"right", "count"}."""

COLUMNS = {
    "reads_late": "reads late",
    "reads": "all reads",
    "blind_late": "late, blind",
    "exact/test_64": "exact, 64",
    "exact/test_128": "128",
    "exact/test_256": "256",
    "exact/test_505": "505",
}
"""Those of `numbers` that the table shows."""


def numbers(summary: Mapping[str, Any]) -> dict[str, Share]:
    """What a table needs of an evaluation's summary (`evals.digits.summarise`).

    Of the split with the longest answers: right reads and other tokens, and the reads of the last positions (`_late`),
    with the backbone as it is and, if that was evaluated, with its view of the image masked (`blind`). Of each split:
    exact match.
    """
    longest = max(summary, key=lambda split: summary[split]["normal"]["tokens"][1])
    found = {"text": summary[longest]["normal"]["text"]}
    for prefix, condition in (("reads", "normal"), ("blind", "vision_masked")):
        if condition in summary[longest]:
            found[prefix] = summary[longest][condition]["reads"]
            found[f"{prefix}_late"] = summary[longest][condition]["by_position"][-1]
    found |= {f"exact/{split}": by["normal"]["exact"] for split, by in summary.items()}
    return {name: {"right": share["right"], "count": share["count"]} for name, share in found.items()}


def over_seeds(shares: Sequence[Share]) -> tuple[float, float | None]:
    """The mean of the shares of several runs and half its interval; None for one run."""
    found = mean([share["right"] / share["count"] for share in shares])
    return found.value, None if found.high is None else found.high - found.value


def pooled(shares: Sequence[Share]) -> tuple[float, float]:
    """Wilson's interval of all runs together."""
    return wilson(sum(share["right"] for share in shares), sum(share["count"] for share in shares))


def markdown(titles: Mapping[str, str], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a row, in the order of `titles`; `runs` by "row/seed"."""
    header = ["row", "", "trains", "seeds", *COLUMNS.values(), "reads late, pooled"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row, title in titles.items():
        own = _runs(row, runs)
        cells = [f"`{row}`", title, f"{own[0]['trainable']:,}", str(len(own))]
        cells += [_cell([run["numbers"][name] for run in own if name in run["numbers"]]) for name in COLUMNS]
        low, high = pooled([run["numbers"]["reads_late"] for run in own])
        lines.append(" | ".join([*cells, f"{low:.3f}-{high:.3f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def _runs(row: str, runs: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for key, run in runs.items() if key.rpartition("/")[0] == row]


def _cell(shares: Sequence[Share]) -> str:
    if not shares:
        return "-"
    value, half = over_seeds(shares)
    return f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"


def draw(titles: Mapping[str, str], runs: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """A PNG: late reads of every row, each seed a tick, the mean with its interval; orange: the backbone is blind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.3 * len(titles)), dpi=150)
    for y, row in enumerate(titles):
        own = _runs(row, runs)
        for name, color, shift in (("reads_late", "#0072b2", -0.12), ("blind_late", "#d55e00", 0.12)):
            shares = [run["numbers"][name] for run in own if name in run["numbers"]]
            if not shares:
                continue
            value, half = over_seeds(shares)
            label = {"reads_late": "backbone sees", "blind_late": "backbone blind"}[name] if y == 0 else None
            style = {"color": color, "marker": "o", "markersize": 4, "elinewidth": 0.8}
            axes.errorbar(value, y + shift, xerr=half, label=label, **style)
            values = [share["right"] / share["count"] for share in shares]
            axes.plot(values, [y + shift] * len(values), "|", color=color, markersize=9, markeredgewidth=1.5)
    axes.axvline(0.1, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(titles)), [title.replace("`", "") for title in titles.values()], fontsize=8)
    axes.set_ylim(len(titles) - 0.5, -0.7)
    axes.set(xlabel="digits read correctly late in the longest answers (chance: 0.1)", xlim=(0, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.8 / (1 + len(titles))), ncols=2)
    figure.tight_layout()
    figure.savefig(out)
    pyplot.close(figure)
