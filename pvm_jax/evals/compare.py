"""Several results of the digits evaluation side by side: a table, and reads by position as a PNG.

python -m pvm_jax.evals.compare base/digits.json pvm/digits.json --names="base,base + PVM" --out=reads.png
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pvm_jax.evals.digits import show
from pvm_jax.evals.results import ResultError, read_summary

COLORS = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def comparison(results: Mapping[str, Mapping[str, Any]], split: str) -> str:
    """A table with one column per result: reads by position, then every condition, then exact match by split."""
    rows: list[tuple[str, list[str]]] = []
    bins = sorted({(b["from"], b["to"]) for s in results.values() for b in s[split]["normal"]["by_position"]})
    for low, high in bins:
        cells = [_bin(summary[split]["normal"], low, high) for summary in results.values()]
        rows.append((f"reads at tokens {low}-{high - 1}", cells))
    for condition, label in (
        ("normal", "all reads"),
        ("vision_masked", "backbone blind"),
        ("other_memory", "another image's memory"),
    ):
        cells = [_cell(summary[split].get(condition), "reads") for summary in results.values()]
        rows.append((label, cells))
    for name in next(iter(results.values())):
        low, high = next(iter(results.values()))[name]["normal"]["tokens"]
        cells = [_cell(summary.get(name, {}).get("normal"), "exact") for summary in results.values()]
        rows.append((f"exact match, {low}-{high} tokens", cells))
    first = max(len(label) for label, _ in rows) + 2
    widths = [max(len(name), *(len(cells[i]) for _, cells in rows)) + 2 for i, name in enumerate(results)]
    header = " " * first + "".join(f"{name:>{w}}" for name, w in zip(results, widths))
    lines = [label.ljust(first) + "".join(f"{c:>{w}}" for c, w in zip(cells, widths)) for label, cells in rows]
    return "\n".join([f"{split}; shares with 95 % intervals", header, *lines])


def _bin(summary: Mapping[str, Any], low: int, high: int) -> str:
    found = [b for b in summary["by_position"] if (b["from"], b["to"]) == (low, high)]
    return show(found[0]) if found else "-"


def _cell(summary: Mapping[str, Any] | None, name: str) -> str:
    return "-" if summary is None else show(summary[name])


def plot(results: Mapping[str, Mapping[str, Any]], split: str, out: str | Path) -> None:
    """Draws the share of right reads by position in the answer, with 95 % intervals, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    for (name, summary), color in zip(results.items(), itertools.cycle(COLORS)):
        bins = summary[split]["normal"]["by_position"]
        x = [(b["from"] + b["to"]) / 2 for b in bins]
        y = [b["value"] for b in bins]
        error = [[b["value"] - b["low"] for b in bins], [b["high"] - b["value"] for b in bins]]
        axes.errorbar(x, y, yerr=error, label=name, color=color, marker="o", markersize=4, capsize=3)
    axes.axhline(0.1, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.text(0, 0.11, "chance", color="#999999", fontsize=8, va="bottom")
    axes.set(xlabel="position in the answer (tokens)", ylabel="digits read correctly", ylim=(0, 1.03))
    axes.set_title(f"Visual reads in long answers, digits never trained on ({split})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.15))
    figure.tight_layout()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)


def compare(files: Sequence[str], names: Sequence[str] | None, split: str | None, out: str | None) -> str:
    """Reads result files, draws `out` if given, and returns the table.

    Args:
      names: of the results; None: the folders of the files.
      split: None: the one with the longest answers.

    Raises:
      ResultError: a file is no result, or names and files differ in number.
    """
    names = [Path(file).parent.name for file in files] if names is None else list(names)
    if len(names) != len(files) or len(set(names)) != len(names):
        raise ResultError(f"expected a different name for each of {len(files)} files, got {names}; pass --names")
    results = {name: read_summary(file) for name, file in zip(names, files)}
    first = next(iter(results.values()))
    split = split or max(first, key=lambda s: first[s]["normal"]["tokens"][1])
    for name, file in zip(names, files):
        if split not in results[name] or "normal" not in results[name][split]:
            raise ResultError(f"{file}: expected results of split {split!r}, it has {sorted(results[name])}")
    if out:
        plot(results, split, out)
    return comparison(results, split)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compares results of the digits evaluation.")
    parser.add_argument("files", nargs="+", help="digits.json files that eval.py wrote")
    parser.add_argument("--names", help="comma-separated; default: the folders of the files")
    parser.add_argument("--split", help="default: the one with the longest answers")
    parser.add_argument("--out", help="PNG to draw")
    options = parser.parse_args(args)
    try:
        print(compare(options.files, options.names and options.names.split(","), options.split, options.out))
    except ResultError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
