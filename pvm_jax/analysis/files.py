"""What an analysis leaves behind: a folder with every number, plots and the page, complete or not there at all.

analysis.json    the table, and every number that the plots and the page show, but maps; rounded to six digits
maps.npz         the arrays of `results` as they are: run<i>/sample<j>/visual_mass, .../attention, ...
*.png            see `figures`
index.html       see `page`
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvm_jax.analysis import figures, measures
from pvm_jax.analysis.measures import Line, Run
from pvm_jax.analysis.page import finite, write_page
from pvm_jax.analysis.results import AnalysisError, Trace
from pvm_jax.model_files import check_writable, new_directory


def check(folder: Path) -> None:
    """Makes the parent of a folder to be written; for before anything that takes long.

    Raises:
      AnalysisError: there is such a folder, or it cannot be made.
    """
    try:
        if folder.exists():
            raise AnalysisError(f"--out={folder}: expected a folder that is not there yet; remove it or name another")
        check_writable(folder.parent)
    except OSError as error:
        raise AnalysisError(f"--out={folder}: expected a place where a folder can be made ({error})") from None


def write(folder: Path, runs: Sequence[Run], about: str) -> list[str]:
    """Writes all files and returns their names.

    Raises:
      FileExistsError: `folder` exists.
    """
    with new_directory(folder) as partial:
        content = json.dumps(as_json(runs, about), ensure_ascii=True, allow_nan=False)
        (partial / "analysis.json").write_text(content + "\n", encoding="utf-8")
        np.savez_compressed(partial / "maps.npz", **dict(_arrays(runs)))
        figures.draw(runs, partial)
        (partial / "index.html").write_text(write_page(runs, about), encoding="utf-8")
    return sorted(file.name for file in folder.iterdir())


def as_json(runs: Sequence[Run], about: str) -> dict[str, Any]:
    """The content of analysis.json; what is infinite or undefined is null."""
    return {
        "about": about,
        "caveats": [note for i in range(len(runs[0].traces)) for note in measures.caveats(runs, i)],
        "table": {"header": list(measures.HEADER), "rows": measures.table(runs)},
        "runs": [
            {
                "name": run.name,
                **run.about,
                "settled_by_layer": _list(measures.settled_by_layer(run)),
                "lens_probability_by_layer": _list(measures.lens_mean(run, "probability")),
                "lens_kl_by_layer": _list(measures.lens_mean(run, "kl")),
                "words": {str(token): word for token, word in run.words.items()},
                "samples": [_sample(trace) for trace in run.traces],
            }
            for run in runs
        ],
    }


def _sample(trace: Trace) -> dict[str, Any]:
    text = trace.text
    return {
        "name": text.name,
        "numbers": finite({k: finite(n) if isinstance(n, dict) else n for k, n in measures.numbers(trace).items()}),
        "notes": list(trace.notes),
        "pictures": [
            {"label": p.label, "width": p.pixels.width, "height": p.pixels.height}
            | {"rows": p.rows, "columns": p.columns, "start": p.start}
            for p in text.pictures
        ],
        "tokens": [text.pieces[column] for column in text.columns],
        "ids": text.ids[text.columns].tolist(),
        "columns": text.columns.tolist(),
        "text_before": text.text_before.tolist(),
        "visual_mass": _lines(measures.mass(trace)),
        "tvr": _lines(measures.tvr(trace)),
        "pvm_entropy": _lines(measures.entropy(trace)),
        "pvm_ratio": _lines(measures.ratio(trace)),
        "pvm_choices": _list(trace.dilution.pvm_choices),
        "lens": None if trace.lens is None else {name: _list(x) for name, x in vars(trace.lens).items()},
    }


def _lines(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {"label": line.label, "fit": None if line.fit is None else finite(vars(line.fit)), "values": _list(line.values)}
        for line in lines
    ]


def _list(values: np.ndarray | None) -> list[Any] | None:
    """Nested lists of integers, or of floats with six digits."""
    if values is None:
        return None
    if values.ndim > 1:
        return [_list(part) for part in values]
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def _arrays(runs: Sequence[Run]) -> Iterator[tuple[str, np.ndarray]]:
    """Everything that has heads or visual tokens as an axis."""
    for i, run in enumerate(runs):
        for j, trace in enumerate(run.traces):
            found = {name: getattr(trace.dilution, name) for name in ("visual_mass", "tvr", "pvm_entropy", "pvm_ratio")}
            if trace.maps is not None:
                found |= {name: getattr(trace.maps, name) for name in ("attention", "attention_heads", "retrieval")}
            for name, array in found.items():
                if array is not None:
                    yield f"run{i}/sample{j}/{name}", array
