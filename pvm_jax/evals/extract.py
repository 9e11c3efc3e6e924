r"""What a completion answers, by rules: no model, no network, the same every time.

    verdict(question, "<think>A?</think><answer>(B)</answer>")           -> Verdict("B", True)
    verdict(question, "Either A or B.")                                  -> Verdict(None, False)
    verdict(question, completion, "mmmu")                                 another rule, see `RULES`
    verdict(question, completion, grade=Grader().grade)                   with algebra for answers like "x(x+1)"

Every rule sees `final_text(completion)`: no thinking, and of the last `<answer>` only what is in it. So a rule that
knows nothing of tags judges a model that reasons in tags, and wrapping an answer in them changes no verdict.

An answer that no rule finds is `Verdict(None, False)`: wrong, and counted. None of the rules guesses;
`random_letter` is for whoever has to reproduce a toolkit that does.

choices.py       letters and texts of options
free_answers.py  short texts, numbers and formulas
toolkits.py      what lmms-eval does for single benchmarks

Everything takes time linear in the completion, which may be anything: megabytes, half a surrogate pair, code. Nothing
is evaluated but by `grade`, whose child can be killed.
"""

import random
import re
from collections.abc import Callable, Mapping

from pvm_jax.answers import unboxed
from pvm_jax.evals import choices, free_answers, toolkits
from pvm_jax.evals.free_answers import Grade
from pvm_jax.evals.questions import Question, Verdict

Rule = Callable[[Question, str, Grade | None], Verdict]
"""A rule: question, final text, grader -> verdict."""

_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE)


def verdict(question: Question, completion: str, rule: str = "strict", grade: Grade | None = None) -> Verdict:
    """What the completion answers by a rule, and whether that is right.

    Args:
      rule: a key of `RULES`.
      grade: `grading.Grader().grade`, for equality that takes algebra; None: without it such answers are wrong.
    """
    return RULES[rule](question, final_text(completion), grade)


def final_text(completion: str) -> str:
    """The completion without thinking, and of the last `<answer>` only what is in it.

    >>> final_text("<think>A or B</think> So: <answer> B </answer>")
    'B'
    >>> final_text("A or B</think>B")  # the prompt ended with <think>
    'B'
    >>> final_text("<think>It may be A, but")  # ran out of tokens
    ''
    >>> final_text("<think>It is A <answer>A</answer>")  # forgot a tag, but came to an end
    'A'
    """
    text = _without_thinking(completion)
    tags = list(_ANSWER.finditer(text))
    opening = max((i for i, tag in enumerate(tags) if not tag[1]), default=-1)
    start = tags[opening].end() if opening >= 0 else 0
    end = tags[opening + 1].start() if opening + 1 < len(tags) else len(text)
    return text[start:end].strip()


def random_letter(question: Question, seed: int) -> str:
    """The letter that a toolkit with a random fallback would score; for compatibility only, no rule uses it.

    Depends on the question's index and the seed alone, not on the order or number of questions.
    """
    return random.Random(f"{seed}/{question.index}").choice(list(question.options))


def strict(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    r"""This project's own rule: the last `\boxed{...}`, else the text; an option where there are options, else what
    the text says the answer is."""
    boxed = unboxed(text)
    if not question.options:
        answer = free_answers.find(boxed)
        return Verdict(answer, answer is not None and free_answers.accepts(question.answer, answer, grade))
    letter = choices.find(boxed, question.options, grade)
    if letter is None and boxed != text:
        letter = choices.concluded(text, question.options)  # the box held a result on the way
    return Verdict(letter, letter is not None and letter == question.answer.strip().upper())


def exact(question: Question, text: str, grade: Grade | None = None) -> Verdict:
    """The whole text, but for empty space: where the answer is a text of its own, every word of which counts."""
    answer = " ".join(text.split())
    return Verdict(answer or None, bool(answer) and answer == " ".join(question.answer.split()))


def _without_thinking(text: str) -> str:
    """What is outside of `<think>...</think>`; before a lone `</think>` and after a lone `<think>` is thinking, too."""
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _THINK.finditer(text):
        if tag[1]:
            if not thinking:
                kept.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            kept.append(text[start : tag.start()])
            start, thinking = tag.end(), True
    if not thinking or _ends_with_answer(text[start:]):
        kept.append(text[start:])
    return "".join(kept)


def _ends_with_answer(text: str) -> bool:
    """Whether the last thing in it is a whole `<answer>...</answer>`: then only `</think>` was forgotten."""
    tags = list(_ANSWER.finditer(text))
    opening = max((i for i, tag in enumerate(tags) if not tag[1]), default=len(tags))
    return opening + 1 < len(tags) and not _ANSWER.sub("", text[tags[opening + 1].end() :]).strip()


RULES: Mapping[str, Rule] = {"strict": strict, "exact": exact, **toolkits.RULES}
"""By name; `strict` and `exact` are this project's, the others what lmms-eval does for a benchmark (`toolkits.py`)."""
