"""Rows of published benchmarks -> Question, and which columns tell a benchmark's file from another's.

Every benchmark has two published layouts: a TSV for VLMEvalKit and parquet files on the Hugging Face hub. They name
the same things differently (`l2-category`, `L2-category`, `l2_category`); a row is read by names, whatever its file.

`nan` and nothing at all are how both layouts write an empty cell. Other words that pandas takes for one ("None", "NA",
"null") are text here: they are options of some questions.
"""

import ast
import dataclasses
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pvm_jax.data.images import DataError
from pvm_jax.evals.questions import Question

INDEX = ("index", "sample_index", "id", "question_id", "qid")
_L2 = ("l2_category", "l2-category", "L2-category")
_LETTERS = tuple(string.ascii_uppercase)
_CHOICES = re.compile(r"\n\s*(?:Choices?|Options?):\s*\n?(?=\(?A\)?\s*[.:])", re.IGNORECASE)
_CHOICE = re.compile(r"(?:^|\n|, )\(?([A-Z])\)?\s*[.:] ?")

Row = Mapping[str, Any]
"""Cells by column, without the empty ones."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published form of a benchmark: the columns that all its files have, and some that none has."""

    name: str
    columns: tuple[str, ...]
    absent: tuple[str, ...] = ()

    def fits(self, columns: Sequence[str]) -> bool:
        return set(self.columns) <= set(columns) and not set(self.absent) & set(columns)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Something that most questions of a benchmark have, or few."""

    name: str
    pattern: re.Pattern[str]
    wanted: bool = True


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a benchmark is read.

    Attributes:
      labels: name of the label -> columns that may hold it; the first that does counts.
      fields: columns that protocols need beside the question.
      needs_image: whether a row without an image has lost it.
      sign: what tells it from benchmarks with the same columns.
      integers: whether an index is a number, as circular evaluation needs it.
      adapt: what is peculiar to it: (row, layout's name) -> row.
    """

    layouts: tuple[Layout, ...]
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fields: tuple[str, ...] = ()
    needs_image: bool = True
    sign: Sign | None = None
    integers: bool = False
    adapt: Callable[[Row, str], Row] = lambda row, layout: row


def _mmmu(row: Row, layout: str) -> Row:
    """The subject stands in `validation_Art_Theory_3`; several right answers are a list."""
    subject = re.fullmatch(r"[a-z]+_(.+)_[0-9]+", str(row.get("id", "")))
    answer = row.get("answer")
    if answer == "?":  # of the test split, not published
        row = {**row, "answer": ""}
    if isinstance(answer, str) and answer.startswith("["):
        row = _several({**row, "answer": literal(answer)}, layout)
    return row if subject is None else {**row, "subject": subject[1]}


def _several(row: Row, layout: str) -> Row:
    """A list of answers: any of them is right."""
    answers = row.get("answer")
    if not isinstance(answers, list):
        return row
    if not answers:
        return {**row, "answer": ""}
    return {**row, "answer": answers[0], "answers": json.dumps([_text(a) for a in answers], ensure_ascii=False)}


def _mmstar(row: Row, layout: str) -> Row:
    """The hub's question ends in its options, which become options if putting them back gives the same text."""
    question = str(row.get("question", ""))
    stem, options = _split_choices(question)
    if layout != "parquet":
        return {**row, "question": stem}
    if question.strip() == f"{stem}\n{mmstar_options(options)}".strip():
        return {**row, "question": stem, "options": options}
    return {**row, "options": options or _letters(4), "options_in_text": "true"}


def mmstar_options(options: Mapping[str, str]) -> str:
    """How MMStar writes options into its questions."""
    return "Options: " + ", ".join(f"{letter}: {text}" for letter, text in options.items())


def _mathverse(row: Row, layout: str) -> Row:
    """Options stand in the question; of a question that only the image shows, in `question_for_eval`."""
    metadata = literal(row.get("metadata"))
    extra = {k: v for k, v in metadata.items() if k in ("subject", "subfield")} if isinstance(metadata, Mapping) else {}
    whole = str(row.get("question_for_eval") or row.get("question", ""))
    _, options = _split_choices(whole)
    answer = str(row.get("answer", "")).strip()
    if row.get("question_type") == "free-form":
        options = {}
    elif not options and row.get("question_type") == "multi-choice":
        options = _letters(max(4, _LETTERS.index(answer) + 1 if answer in _LETTERS else 0))
    kind = {"question_type": "multi-choice" if options else "free-form"} | dict(row)
    return {"question": "", **kind, **extra, "options": options, "options_in_text": "true" if options else None}


def _letters(count: int) -> dict[str, str]:
    """Options whose texts are not known: the letter stands for itself."""
    return {letter: letter for letter in _LETTERS[:count]}


def _ai2d(row: Row, layout: str) -> Row:
    """The hub's answer counts options from 0."""
    if layout != "parquet":
        return row
    answer = _text(row.get("answer", ""))
    count = len(_listed(row.get("options"), "options"))
    if not answer.isdecimal() or int(answer) >= count:
        raise DataError(f"answer: expected the number of one of {count} options, from 0, got {answer!r}")
    return {**row, "answer": _LETTERS[int(answer)]}


_MMBENCH = (
    Layout("tsv", ("index", "question", "hint", "A", "B", "answer", "category", "l2-category", "image"), ("F",)),
    Layout("parquet", ("index", "question", "hint", "A", "B", "answer", "category", "L2-category", "image"), ("F",)),
)
_CHINESE = Sign("Chinese characters", re.compile("[\u4e00-\u9fff]"))
_TAGS = Sign("`<image 1>`", re.compile("<image [0-9]>"))
_CATEGORIES = {"category": ("category",), "l2_category": _L2}
_MMT = ("index", "question", "A", "B", "E", "answer", "category", "l2-category", "image")

KINDS: Mapping[str, Kind] = {
    "mmmu": Kind(
        layouts=(
            Layout("tsv", ("index", "question", "A", "B", "answer", "category", "image")),
            Layout("parquet", ("id", "question", "options", "answer", "question_type", "image_1")),
        ),
        labels={
            "subject": ("subject", "category"),
            "difficulty": ("topic_difficulty",),
            "question_type": ("question_type",),
        },
        fields=("answers",),
        sign=_TAGS,
        adapt=_mmmu,
    ),
    "mmbench_en": Kind(_MMBENCH, _CATEGORIES, sign=dataclasses.replace(_CHINESE, wanted=False), integers=True),
    "mmbench_cn": Kind(_MMBENCH, _CATEGORIES, sign=_CHINESE, integers=True),
    "mmstar": Kind(
        layouts=(
            Layout("tsv", ("index", "question", "A", "B", "C", "D", "answer", "category", "l2_category", "image")),
            Layout("parquet", ("index", "question", "image", "answer", "category", "l2_category"), absent=("A",)),
        ),
        labels=_CATEGORIES,
        fields=("options_in_text",),
        adapt=_mmstar,
    ),
    "mmt": Kind(
        (Layout("tsv", _MMT), Layout("parquet", _MMT)), _CATEGORIES, sign=dataclasses.replace(_TAGS, wanted=False)
    ),
    "mathverse": Kind(
        layouts=(
            Layout("tsv", ("index", "question", "question_for_eval", "answer", "problem_version", "image")),
            Layout("parquet", ("sample_index", "question", "query_wo", "answer", "problem_version", "image")),
        ),
        labels={name: (name,) for name in ("problem_version", "question_type", "subject", "subfield")},
        fields=("query_wo", "query_cot", "question_for_eval", "problem_index", "options_in_text"),
        needs_image=False,
        adapt=_mathverse,
    ),
    "mathvision": Kind(
        layouts=(
            Layout("tsv", ("index", "question", "choices", "answer", "image")),
            Layout("parquet", ("id", "question", "options", "answer", "decoded_image")),
        ),
        labels={"subject": ("subject", "category"), "level": ("level",)},
    ),
    "ai2d": Kind(
        layouts=(
            Layout("tsv", ("index", "question", "A", "B", "answer", "image"), absent=_L2),
            Layout("parquet", ("question", "options", "answer", "image"), absent=("decoded_image", "question_type")),
        ),
        adapt=_ai2d,
    ),
}
"""The eight benchmarks by name."""

FILE = Kind(
    layouts=(Layout("file", ("question", "answer")),),
    labels={name: (name,) for name in ("category", "subject", "level", "difficulty", "split")} | {"l2_category": _L2},
    fields=("answers",),
    needs_image=False,
    adapt=_several,
)
"""Any other file of the same shape."""


def filled(row: Row) -> dict[str, Any]:
    """The cells that are not empty."""
    return {name: value for name, value in row.items() if not _is_empty(value)}


def index_of(row: Row, default: str) -> str:
    """What tells the row from others of its benchmark."""
    return next((_text(row[name]) for name in INDEX if name in row), default)


def read_question(kind: Kind, layout: str, row: Row, index: str, images: Sequence[Any]) -> Question:
    """The question of a row; the sentence of a DataError begins with a column, the caller knows file and row."""
    row = filled(kind.adapt(row, layout))
    text = _text(row.get("question", ""))
    options = _options(row)
    if "answers" in row:
        row["answers"] = json.dumps([_answer({"answer": a}, options) for a in json.loads(row["answers"])])
    if not text and not row.get("question_for_eval"):
        raise DataError("question: expected text, the cell is empty")
    return Question(
        index=index,
        text=text,
        answer=_answer(row, options),
        options=options,
        images=images,
        hint=_text(row.get("hint", "")),
        labels=_labels(kind, row),
        fields={name: _text(row[name]) for name in kind.fields if name in row},
    )


def broken_question(kind: Kind, row: Row, index: str) -> Question:
    """What can be said of a row that is no question, so that it is counted like the others."""
    return Question(index, _text(row.get("question", "")), _text(row.get("answer", "")), labels=_labels(kind, row))


def _labels(kind: Kind, row: Row) -> dict[str, str]:
    found = {label: next((row[c] for c in columns if c in row), None) for label, columns in kind.labels.items()}
    return {label: _text(value) for label, value in found.items() if value is not None}


def _options(row: Row) -> dict[str, str]:
    """Letter -> text, from a list, a list in a string, or the columns A, B, ..."""
    name = next((name for name in ("options", "choices") if name in row), None)
    if name is None:
        return {letter: _text(row[letter]) for letter in _LETTERS if letter in row}
    if isinstance(row[name], Mapping):
        return {letter: _text(value) for letter, value in row[name].items() if not _is_empty(value)}
    return dict(zip(_LETTERS, _listed(row[name], name)))


def _listed(value: Any, column: str) -> list[str]:
    entries = [] if _is_empty(value) else literal(value)
    if not isinstance(entries, list | tuple) or len(entries) > len(_LETTERS):
        raise DataError(f"{column}: expected a list of at most 26 options, got {value!r:.60}")
    return [_text(entry) for entry in entries]


def _answer(row: Row, options: Mapping[str, str]) -> str:
    """A letter of the options; without options the answer as text."""
    answer = _text(row.get("answer", "")).strip()
    if not answer:
        raise DataError("answer: expected one, the cell is empty; splits whose answers are not published have none")
    if not options:
        return answer
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", answer)
    if letter and letter[1].upper() in options:
        return letter[1].upper()
    same = [key for key, text in options.items() if text.strip() == answer]
    if len(same) != 1:
        raise DataError(f"answer: expected one of the options {', '.join(options)}, got {answer!r:.60}")
    return same[0]


def _split_choices(question: str) -> tuple[str, dict[str, str]]:
    r"""A question that ends in its choices -> the question before them, and the choices.

    >>> _split_choices("What?\nOptions: A: a cat, B: a dog, not a cat")
    ('What?', {'A': 'a cat', 'B': 'a dog, not a cat'})
    """
    heads = list(_CHOICES.finditer(question))
    if not heads:
        return question, {}
    listed = question[heads[-1].end() :]
    marks: list[re.Match[str]] = []
    for mark in _CHOICE.finditer(listed):  # "A:" in the text of an option is none of the next letter
        if mark[1] == _LETTERS[len(marks)]:
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    options = {mark[1]: listed[mark.end() : end].strip() for mark, end in zip(marks, ends)}
    return question[: heads[-1].start()], options if len(options) > 1 else {}


def literal(value: Any) -> Any:
    """A list or a dict written into a string, as Python or as JSON writes it; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "(")):
        return value
    for parse in (ast.literal_eval, json.loads):
        try:
            return parse(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return value


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and math.isnan(value))
