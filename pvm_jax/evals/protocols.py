r"""Protocols: what a model is asked, within which limits, and which rule reads its answer. Each has a version.

    lmms_default    prompts, limits and rules of lmms-eval (75571cf) for its model `qwen3_vl`; greedy
    pvm_reasoning   thinking and answer in tags, 16,384 tokens, temperature 0.7, four seeds: as near to the paper as
                    what is known of its evaluation allows (`UNKNOWN_OF_THE_PAPER`)
    plain           question and options as they are; greedy

    task("lmms_default", "ai2d").prompt(question)
    '<image>What eats the fox?\nA. grass\nB. hawk\nAnswer with the option's letter from the given choices directly.'

A prompt, limit or rule that changes gets a new version: its scores do not compare with those before. The texts are
in `prompts.py`, the rules in `extract.py`.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pvm_jax.evals import extract
from pvm_jax.evals.benchmark_rows import KINDS
from pvm_jax.evals.free_answers import Grade
from pvm_jax.evals.prompts import INSTRUCTION, LMMS, OWN_TEMPLATE, Content, in_place, question_and_options, shown
from pvm_jax.evals.questions import Question, Verdict
from pvm_jax.evals.results import ResultError
from pvm_jax.grading import LOST
from pvm_jax.sampling import Sampling

VERSIONS = {"lmms_default": 1, "pvm_reasoning": 1, "plain": 1}

MIN_PIXELS, MAX_PIXELS = 200_704, 1_605_632
"""Limits of an image in lmms-eval's `qwen3_vl`: 256 and 2,048 times 28 x 28."""

UNKNOWN_OF_THE_PAPER = (
    "The prompts are not published, neither the questions' form nor an instruction to think in tags.",
    "Which task variants of lmms-eval were used is not published; with its default limits of 8 to 128 tokens a model "
    "that thinks first would hardly score.",
    "The limit of new tokens is not published; 16,384 is that of the paper's reinforcement learning.",
    "top-p, top-k and penalties beside the temperature of 0.7 are not published; a checkpoint's own generation_config "
    "may have applied (0.8 and 20 for Qwen3-VL Instruct).",
    "The limits of an image's pixels are not published.",
    "Whether a model judged answers, and which one, is not published.",
    "Secondary sources name subsets (MMMU dev, MMBench lite, AI2D lite, MMT emotion, MathVision mini, MathVerse "
    "vision); the release names the benchmarks only, and which rows these are is not published.",
    "Whether MMBench was scored circularly is not published, nor whether MMStar and MMT were over questions or groups.",
    "The seeds of the four runs are not published.",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark under a protocol.

    Attributes:
      benchmark: its kind, a key of KINDS or "file".
      template: the form of the prompt, for people.
      rule: of `extract.RULES`.
      seeds: one answer to each question for every seed.
      min_pixels, max_pixels: of an image; None: as the checkpoint says.
      system: the system turn, "" for none.
      stop: strings at which an answer ends; applied to the finished text, as lmms-eval does.
      headline: the score (see `aggregate`) that stands for the benchmark.
      macro: labels over whose values the mean of shares is a score too.
      random_seed: draws a letter where the rule finds none, as some toolkits do; None: never.
    """

    protocol: str
    version: int
    benchmark: str
    template: str
    rule: str
    max_new_tokens: int
    sampling: Sampling
    seeds: tuple[int, ...]
    min_pixels: int | None
    max_pixels: int | None
    system: str
    stop: tuple[str, ...]
    headline: str
    macro: tuple[str, ...]
    random_seed: int | None
    content: Callable[[Question, Sequence[Any]], Content] = dataclasses.field(repr=False)

    def messages(self, question: Question) -> list[dict[str, Any]]:
        """Chat messages for the processor; reads the question's images.

        Raises:
          DataError: an image that is not there.
        """
        images = list(iter(question.images))  # of the sequence itself `list` would ask its length, which reads them too
        user = {"role": "user", "content": self.content(question, images)}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    def prompt(self, question: Question) -> str:
        """The text of the user's turn, `<image>` where an image stands."""
        return shown(self.messages(question))

    def verdict(self, question: Question, completion: str, grade: Grade | None = None) -> Verdict:
        """What the completion answers; of several right answers any will do.

        Args:
          grade: `grading.Grader().grade`, for answers that take algebra.
        """
        text = extract.final_text(completion)
        for end in self.stop:
            text = text.partition(end)[0]
        lost: list[str] = []

        def watched(given: Sequence[str | None], gold: Sequence[str]) -> Sequence[Any]:
            """`grade`, of which rules see only whether answers are equal."""
            graded = grade(given, gold)
            lost.extend(one.reason for one in graded if one.reason in LOST)
            return graded

        verdict = self._verdict(question, text, grade and watched)
        return dataclasses.replace(verdict, ungraded=lost[0]) if lost and not verdict.right else verdict

    def _verdict(self, question: Question, text: str, grade: Grade | None) -> Verdict:
        found = None
        for answer in json.loads(question.fields.get("answers", "[]")) or [question.answer]:
            verdict = extract.verdict(dataclasses.replace(question, answer=answer), text, self.rule, grade)
            if verdict.right:
                return verdict
            found = found or verdict
        if found.answer is None and question.options and self.random_seed is not None:
            letter = extract.random_letter(question, self.random_seed)
            return Verdict(letter, letter == question.answer)
        return found

    def about(self) -> dict[str, Any]:
        """All that a score depends on, for result files."""
        plain = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("content", "sampling")
        }
        unknown = UNKNOWN_OF_THE_PAPER if self.protocol == "pvm_reasoning" else ()
        return plain | {"sampling": dataclasses.asdict(self.sampling), "unknown_of_the_paper": list(unknown)}


def task(protocol: str, benchmark: str, random_seed: int | None = None) -> Task:
    """The task of a benchmark (`Benchmark.kind`) under a protocol.

    Raises:
      ResultError: there is no such protocol or benchmark, or none for the other.
    """
    if protocol not in VERSIONS:
        raise ResultError(f"protocol {protocol!r} is not known; {_near(protocol, VERSIONS)}")
    if benchmark not in (*KINDS, "file"):
        raise ResultError(f"benchmark {benchmark!r} is not known; {_near(benchmark, (*KINDS, 'file'))}")
    if protocol == "lmms_default" and benchmark == "file":
        raise ResultError("protocol 'lmms_default' has no prompt for other files; take 'plain' or 'pvm_reasoning'")
    made = {"lmms_default": _lmms, "pvm_reasoning": _reasoning, "plain": _plain}[protocol](benchmark)
    return Task(
        protocol=protocol,
        version=VERSIONS[protocol],
        benchmark=benchmark,
        min_pixels=None if protocol == "plain" else MIN_PIXELS,
        max_pixels=None if protocol == "plain" else MAX_PIXELS,
        macro=("l2_category",) if benchmark in ("mmstar", "mmt") else (),
        random_seed=random_seed,
        **made,
    )


def _near(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


_HEADLINES = {"mmbench_en": "circular", "mmbench_cn": "circular", "mmstar": "macro l2_category"}

# benchmark: rule, new tokens, strings that end an answer
_LMMS_LIMITS: Mapping[str, tuple[str, int, tuple[str, ...]]] = {
    "mmmu": ("mmmu", 128, ()),
    "mmbench_en": ("mmbench_static", 1024, ("ASSISTANT:",)),
    "mmbench_cn": ("mmbench_static", 256, ()),
    "mmstar": ("mmstar", 128, ()),
    "mmt": ("mmt", 8, ()),
    "mathverse": ("strict", 16_384, ("</s>", "Q:", "<|im_end|>")),
    "mathvision": ("mathvision", 16_384, ()),
    "ai2d": ("ai2d", 16, ()),
}


def _lmms(benchmark: str) -> dict[str, Any]:
    rule, tokens, stop = _LMMS_LIMITS[benchmark]
    form = LMMS[benchmark]
    return {
        "template": form.template,
        "rule": rule,
        "max_new_tokens": tokens,
        "sampling": Sampling(),
        "seeds": (0,),
        "system": "You are a helpful assistant.",
        "stop": stop,
        "headline": _HEADLINES.get(benchmark, "accuracy"),
        "content": form.content,
    }


def _reasoning(benchmark: str) -> dict[str, Any]:
    headlines = {**_HEADLINES, "mathverse": "vision"}
    return {
        "template": f"{OWN_TEMPLATE}\n{INSTRUCTION}",
        "rule": "strict",
        "max_new_tokens": 16_384,
        "sampling": Sampling(temperature=0.7),
        "seeds": (0, 1, 2, 3),
        "system": "",
        "stop": (),
        "headline": headlines.get(benchmark, "accuracy"),
        "content": lambda question, images: in_place(f"{question_and_options(question)}\n{INSTRUCTION}", images),
    }


def _plain(benchmark: str) -> dict[str, Any]:
    return {
        "template": OWN_TEMPLATE,
        "rule": "strict",
        "max_new_tokens": 1024,
        "sampling": Sampling(),
        "seeds": (0,),
        "system": "",
        "stop": (),
        "headline": _HEADLINES.get(benchmark, "accuracy"),
        "content": lambda question, images: in_place(question_and_options(question), images),
    }
