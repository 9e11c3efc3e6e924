"""What every benchmark is reduced to: questions, what was made of each, and the verdict on it.

benchmarks.py   files on disk -> Question
protocols.py    Question -> messages, limits of generation; completion -> Verdict
harness.py      messages -> completions -> Record, one line of NAME.jsonl
aggregate.py    records -> summary, NAME.json
report.py       summaries and records of several runs -> tables and a page
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of a benchmark, before any protocol has made a prompt of it.

    Attributes:
      index: of the row, different in every row of its benchmark.
      text: the question; `<image 1>` stands in it, and in options, where a benchmark says where its images belong.
      answer: the right one: a letter of `options`, or text if there are none.
      options: letter -> text, in order; empty for an open question.
      images: as `data.images` reads them: bytes or paths.
      hint: a text that precedes the question in some benchmarks.
      labels: by which scores are split: category, subject, level, ...
      fields: other columns that a protocol needs, MathVerse's query_wo for one.
    """

    index: str
    text: str
    answer: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Sequence[Any] = ()
    hint: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a completion answers, and whether it is right.

    Attributes:
      answer: a letter of the options, or text; None: no rule found an answer, which is wrong and counted.
      right: never True without an answer.
      ungraded: "timeout" or "crash" where the grader was lost on a wrong answer: it may be right.
    """

    answer: str | None
    right: bool
    ungraded: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """One question answered once: a line of NAME.jsonl, enough to score it again without model or images.

    Attributes:
      benchmark, protocol: names; the protocol's version is in NAME.json.
      index, seed: with the benchmark the key, which occurs once.
      question: the fields of `Question` but `images`.
      prompt: the text of the user's turn, `<image>` where an image stands.
      completion: the whole output; None where there is none.
      tokens, prompt_tokens: of completion and prompt.
      finish_reason: "stop" or "length"; "" without a completion.
      answer, right, ungraded: of the `Verdict`.
      error: why the question could not be asked (an image that does not decode) or judged; None mostly. Such a
        record counts as wrong, and apart.
      judge: the model that gave the verdict, None where a rule did.
    """

    benchmark: str
    protocol: str
    index: str
    seed: int
    question: Mapping[str, Any]
    prompt: str
    completion: str | None
    tokens: int
    prompt_tokens: int
    finish_reason: str
    answer: str | None
    right: bool
    error: str | None = None
    judge: str | None = None
    ungraded: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.index, self.seed
