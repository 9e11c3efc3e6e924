"""The texts of prompts: those that lmms-eval (75571cf) asks a `qwen3_vl` with, and this project's own.

Of lmms-eval: images come first, then the text, and `<image>` in it is removed; `<image 1>` stays, as text. In this
project's own prompts an image stands where the question says, else in front.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pvm_jax.data.images import DataError
from pvm_jax.evals.benchmark_rows import mmstar_options
from pvm_jax.evals.questions import Question

Content = list[dict[str, Any]]
"""Parts of a user's turn, as the processor takes them."""

INSTRUCTION = (
    "Think about the question first and put your thoughts between <think> and </think>, then give the final answer "
    "between <answer> and </answer>."
)
"""Asks for the form that reinforcement learning rewards; the same as in configs/grpo.py."""

ONLY_IN_THE_IMAGE = "Answer the question that the image shows."

OWN_TEMPLATE = "{hint}\n{question}\nA. {option}\nB. {option} ..."
"""The form of `question_and_options`; lines without content are left out."""

_LETTER = "Answer with the option's letter from the given choices directly."
_PLACE = re.compile(r"(<image>|<image ?[0-9]+>)")


@dataclasses.dataclass(frozen=True)
class LmmsPrompt:
    """A prompt of lmms-eval.

    Attributes:
      template: its form, for people.
      text: of a question.
      mentioned: whether only images that the text mentions are shown, in order of their numbers.
    """

    template: str
    text: Callable[[Question], str]
    mentioned: bool = False

    def content(self, question: Question, images: Sequence[Any]) -> Content:
        """The user's turn.

        Raises:
          DataError: the text mentions an image that the question does not have.
        """
        text = self.text(question)
        numbers = sorted({int(number) for number in re.findall(r"<image ([0-9]+)>", text)})
        if self.mentioned and numbers:
            if not 0 < numbers[0] <= numbers[-1] <= len(images):
                raise DataError(f"index {question.index}: <image {numbers[-1]}> is named, and there are {len(images)}")
            images = [images[number - 1] for number in numbers]
        return [*map(_image, images), _text(text.replace("<image>", ""))]


def question_and_options(question: Question) -> str:
    """This project's form, `OWN_TEMPLATE`; options that stand in the question's text already are not repeated."""
    options = {} if question.fields.get("options_in_text") else question.options
    lines = [
        question.hint,
        question.text or ONLY_IN_THE_IMAGE,
        *(f"{letter}. {text}" for letter, text in options.items()),
    ]
    return "\n".join(line for line in lines if line)


def in_place(text: str, images: Sequence[Any]) -> Content:
    """Images where `<image 2>` or `<image>` stands (the next one), those without a place in front.

    An image is shown once: where it is named again, or where there is no such image, the tag stays as text.
    """
    left = dict(enumerate(images, start=1))
    parts: Content = []
    for piece in _PLACE.split(text):
        number = re.search("[0-9]+", piece) if _PLACE.fullmatch(piece) else None
        wanted = int(number[0]) if number else min(left, default=0)
        if _PLACE.fullmatch(piece) and wanted in left:
            parts.append(_image(left.pop(wanted)))
        elif parts and parts[-1]["type"] == "text":
            parts[-1] = _text(parts[-1]["text"] + piece)
        elif piece:
            parts.append(_text(piece))
    return [*map(_image, left.values()), *parts]


def shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the user's turn, `<image>` where an image stands."""
    content = next(message["content"] for message in messages if message["role"] == "user")
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in content)


def _image(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _lines(question: Question, mark: str = ". ") -> str:
    return "\n".join(f"{letter}{mark}{text}" for letter, text in question.options.items())


def _mmmu(question: Question) -> str:
    end = "Answer with the option letter only." if question.options else _MMMU_OPEN
    return f"Question: {question.text}\nOptions:\n{_lines(question)}\n{end}"


_MMMU_OPEN = "Please select the correct answer from the options above."  # though an open question has none


def _mmbench(end: str) -> Callable[[Question], str]:
    def text(question: Question) -> str:
        hint = f"{question.hint} " if question.hint else ""
        return f"{hint}{question.text} There are several options:\n{_lines(question)}\n\n{end}"

    return text


def _mmstar(question: Question) -> str:
    text = question.text
    if not question.fields.get("options_in_text"):
        text = f"{text}\n{mmstar_options(question.options)}"
    return f"Question: {text.strip().replace(' Please answer yes or no.', '')}Answer with the option letter only."


def _mmt(question: Question) -> str:
    options = "\n".join(f"{letter}: {text.strip()}" for letter, text in question.options.items())
    end = "Answer the question using a single character from the given options."
    return f"Question: <image>\n{question.text.strip()}\n{options}\n{end}"


def _mathverse(question: Question) -> str:
    """`query_wo` of the hub's files; the TSVs have none, and it is put together as the authors did."""
    if "query_wo" in question.fields:
        return question.fields["query_wo"].strip()
    answer = (
        "the correct option letter, e.g., A, B, C, D." if question.options else "the final value, e.g., 1, 2.5, 300."
    )
    if not question.text:
        return f"According to the question shown in the image, please directly answer the question and provide {answer}"
    return f"Please directly answer the question and provide {answer}\nQuestion: {question.text}".strip()


_MATHVISION = "Answer the question with the option's letter from the given choices directly."


def _mathvision(question: Question) -> str:
    start = f'Please solve the problem step by step and put your answer in one "\\boxed{{}}".{question.text}'
    return f"{start}\nChoices: {_lines(question)}\n{_MATHVISION}" if question.options else start


def _ai2d(question: Question) -> str:
    return f"{question.text}\n{_lines(question)}\n{_LETTER}"


_CHINESE_LETTER = "请直接使用所提供的选项字母作为答案回答。"
_OPTIONS = "A. {option}\nB. {option} ..."
_MMBENCH = "{hint} {question} There are several options:\n" + _OPTIONS + "\n\n"

LMMS: Mapping[str, LmmsPrompt] = {
    "mmmu": LmmsPrompt(
        "Question: {question}\nOptions:\n" + _OPTIONS + "\nAnswer with the option letter only.; of open questions the "
        "last line is: " + _MMMU_OPEN,
        _mmmu,
        mentioned=True,
    ),
    "mmbench_en": LmmsPrompt(_MMBENCH + _LETTER, _mmbench(_LETTER)),
    "mmbench_cn": LmmsPrompt(_MMBENCH + _CHINESE_LETTER, _mmbench(_CHINESE_LETTER)),
    "mmstar": LmmsPrompt(
        "Question: {question}\nOptions: A: {option}, B: {option} ...Answer with the option letter only.", _mmstar
    ),
    "mmt": LmmsPrompt(
        "Question: \n{question}\nA: {option}\nB: {option} ...\n"
        "Answer the question using a single character from the given options.",
        _mmt,
    ),
    "mathverse": LmmsPrompt("{query_wo}", _mathverse),
    "mathvision": LmmsPrompt(
        'Please solve the problem step by step and put your answer in one "\\boxed{}".{question}\nChoices: '
        + _OPTIONS
        + f"\n{_MATHVISION}; of open questions the first line alone",
        _mathvision,
    ),
    "ai2d": LmmsPrompt("{question}\n" + _OPTIONS + f"\n{_LETTER}", _ai2d),
}
"""By benchmark."""
