"""Prompts with a solution, for reinforcement learning: rows of published data sets -> messages and what rewards need.

    prompts = open_prompts("MMK12/*.parquet", layout="mmk12", instruction="Think in <think> tags, ...")
    prompts[0].messages, prompts[0].solution           # [{"role": "user", "content": [image, text]}], "12"
    prompts.skipped                                    # {"no answer": 8, "missing image": 2}

A layout says which columns hold the question and the answer; files, images and places are read by `sources.py` and
`records.py`. Every row is looked at once when the data set is opened, so that the prompts are exactly the rows that can
be used: `len(prompts)` is known and no draw fails later but for an image that does not decode.

The solution is text. A number becomes its digits (12.0 is "12"), a list of one entry that entry; `<answer>` tags and
`\\boxed{}` around it are removed. A list of several answers, an object, a truth value and nothing at all are no answer
that a completion can be compared with: such rows are skipped, each counted under its reason.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pvm_jax.answers import final_answer, unboxed
from pvm_jax.data.images import DataError
from pvm_jax.data.records import parsed
from pvm_jax.data.sources import Source, open_source

ACTIONS = ("skip", "error")
_IMAGES = ("images", "image")
_VIDEOS = ("videos", "video")
_ROWS_A_TASK = 256


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a data set has what; of several columns, the first that the row has. A dot leads into an object."""

    prompt: tuple[str, ...]  # text with or without <image>, or chat messages
    solution: tuple[str, ...]
    id: tuple[str, ...]
    needs_image: bool  # a row without one has lost it


LAYOUTS = {
    "mmk12": Layout(("question",), ("answer",), ("id",), needs_image=True),
    "thinklite": Layout(("problem",), ("answer", "ground_truth"), ("id",), needs_image=True),
    "virl39k": Layout(("question", "problem"), ("answer",), ("qid", "id"), needs_image=False),
    "wemath": Layout(("question", "problem"), ("answer",), ("question_id", "idx"), needs_image=True),
    "verl": Layout(("prompt",), ("reward_model.ground_truth",), ("extra_info.index",), needs_image=False),
    "trl": Layout(("prompt",), ("solution", "answer"), ("id",), needs_image=False),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to ask, what is right, and all else the row says."""

    id: str
    messages: list[dict[str, Any]]  # for the processor, with add_generation_prompt=True; images are parts of them
    solution: str
    columns: dict[str, Any]  # the row's other columns, for reward functions


class Prompts:
    """The rows of a source that can be used, by their number among these. Safe to use from several threads.

    Attributes:
      skipped: rows left out, by reason.
      examples: the sentence about the first row of each reason.
    """

    def __init__(
        self,
        source: Source,
        rows: Sequence[int],
        skipped: Mapping[str, int],
        examples: Mapping[str, str],
        *,
        instruction: str = "",
        system: str = "",
    ):
        self._source, self._rows = source, rows
        self._instruction, self._system = instruction, system
        self.skipped, self.examples = dict(skipped), dict(examples)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        record = self._source[self._rows[index]]
        messages, found = record["messages"], record["metadata"]
        if self._instruction:
            messages = [*messages[:-1], _ending_in(messages[-1], self._instruction)]
        if self._system:
            others = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self._system}, *others]
        return Prompt(record["id"], messages, found["solution"], found["columns"])

    def describe(self, index: int) -> str:
        """File and row, for messages."""
        return self._source.describe(self._rows[index])


def open_prompts(
    files: str | Path | Sequence[str | Path],
    *,
    layout: str,
    instruction: str = "",
    system: str = "",
    split: str = "train",
    image_folder: str | Path | Sequence[str | Path] | None = None,
    rename: Mapping[str, str] | None = None,
    bad_rows: str = "skip",
    threads: int = 8,
) -> Prompts:
    """Opens a data set of prompts and looks at every row, without decoding images.

    Args:
      files, split, image_folder, rename: as `sources.open_source` has them.
      layout: one of LAYOUTS.
      instruction: ends the last user turn of every prompt, on a line of its own; "" for none. It is text: `<image>` in
        it is no place of an image.
      system: the system turn of every prompt, instead of the row's own; "" keeps the row's.
      bad_rows: "skip": rows that cannot be used are left out and counted; "error": the first one ends the run.
      threads: that look at rows.

    Raises:
      DataError: no such layout, nothing to read, no row that can be used, or a bad row and `bad_rows` is "error".
    """
    if layout not in LAYOUTS:
        raise DataError(f"layout: expected one of {', '.join(LAYOUTS)}; got {layout!r}")
    if bad_rows not in ACTIONS:
        raise DataError(f"bad_rows must be one of {', '.join(ACTIONS)}; got {bad_rows!r}")
    adapt = _Adapter(layout, LAYOUTS[layout])
    source = open_source(
        files, split=split, image_folder=image_folder, rename=rename, require_answer=False, adapt=adapt
    )
    rows, skipped, examples = [], collections.Counter(), {}
    for row, error in _errors(source, threads):
        if error is None:
            rows.append(row)
        elif bad_rows == "error":
            raise error
        else:
            skipped[error.reason] += 1
            examples.setdefault(error.reason, str(error))
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"no row of the data set can be used ({counts}); the first: {next(iter(examples.values()))}")
    return Prompts(source, rows, skipped, examples, instruction=instruction, system=system)


def reward_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The columns that reward functions get, one entry for each prompt: `solution`, `id` and all that any row has.

    None stands where a row lacks what another has.
    """
    names = dict.fromkeys(itertools.chain.from_iterable(prompt.columns for prompt in prompts))
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return columns | {"solution": [p.solution for p in prompts], "id": [p.id for p in prompts]}


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """A row of a layout -> a row as `records.py` reads it, its solution and other columns under `metadata`."""

    name: str
    layout: Layout

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        asked, prompt = _first(row, self.layout.prompt)
        answered, answer = _first(row, self.layout.solution)
        for found, names, reason in (
            (asked, self.layout.prompt, "no question"),
            (answered, self.layout.solution, "no answer"),
        ):
            if not found:
                raise DataError(
                    f"{where}: expected {' or '.join(names)} with something in it (layout {self.name!r}); the row has "
                    f"{', '.join(row) or 'no columns'}",
                    reason,
                )
        if not isinstance(prompt, str):
            _check_ends_with_user(prompt, f"{where}, {asked}")
        images = _present(_first(row, _IMAGES)[1])
        if self.layout.needs_image and not images:
            raise DataError(f"{where}: expected an image (layout {self.name!r}), and the row has none", "missing image")
        id_column, own_id = _first(row, (*self.layout.id, "id"))
        used = {asked, answered, id_column, *_IMAGES, *_VIDEOS}
        adapted = {
            "prompt": prompt,
            "images": images,
            "metadata": {
                "solution": _solution(answer, f"{where}, {answered}"),
                "columns": {name: value for name, value in row.items() if name not in used},
            },
        }
        adapted |= {name: row[name] for name in _VIDEOS if name in row}
        return adapted | ({"id": own_id} if id_column else {})


def _first(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """Name and value of the first of these columns that has something in it; ("", None) if none has."""
    for name in names:
        value: Any = row
        for key in name.split("."):
            value = parsed(value)
            value = value.get(key) if isinstance(value, Mapping) else None
        if not _is_nothing(value):
            return name, value
    return "", None


def _is_nothing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _present(images: Any) -> list[Any]:
    """The images of a column: one or a list of them, without the empty entries that some data sets have."""
    entries = images if isinstance(images, list | tuple) else [images]
    return [entry for entry in entries if entry is not None and not _is_empty(entry)]


def _is_empty(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        return not (entry.get("bytes") or entry.get("path"))
    return isinstance(entry, str | bytes) and not entry


def _solution(answer: Any, field: str) -> str:
    """The right answer as text; see the module's docstring for what is none."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, list | tuple):
        raise DataError(f"{field}: expected one answer, got {len(answer)}", "several answers")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"{field}: expected text or a number, got {answer!r:.60}", "answer neither text nor number")
    if isinstance(answer, float):
        answer = str(int(answer)) if answer.is_integer() else repr(answer)
    text = str(answer)
    tagged = final_answer(text)
    text = unboxed(text if tagged is None else tagged)
    if not text:
        raise DataError(f"{field}: the answer is empty", "no answer")
    return text


def _check_ends_with_user(messages: Any, field: str) -> None:
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    role = last.get("role") if isinstance(last, Mapping) else None
    if role != "user":
        raise DataError(f"{field}: expected text or messages of which the last is the user's, got {last!r:.60}")


def _ending_in(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": f"{content}\n{text}"}
    return message | {"content": [*content, {"type": "text", "text": f"\n{text}"}]}


def _errors(source: Source, threads: int) -> Iterator[tuple[int, DataError | None]]:
    """Every row of a source in order, with the error that reading it raises."""

    def look(rows: range) -> list[tuple[int, DataError | None]]:
        return [(row, _error(source, row)) for row in rows]

    parts = [range(at, min(at + _ROWS_A_TASK, len(source))) for at in range(0, len(source), _ROWS_A_TASK)]
    with ThreadPoolExecutor(threads, "rows") as pool:
        try:
            for found in pool.map(look, parts):
                yield from found
        finally:
            pool.shutdown(cancel_futures=True)


def _error(source: Source, row: int) -> DataError | None:
    try:
        source[row]
    except DataError as error:
        return error
    return None
