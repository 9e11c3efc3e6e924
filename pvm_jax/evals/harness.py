"""A benchmark put to a model: `config.evals.NAME.module` of eval.py and, as an evaluator, of train.py.

    evals = {"mmstar": {"module": "pvm_jax.evals.harness", "benchmark": "mmstar", "protocol": "pvm_reasoning",
                        "path": "MMStar.tsv"}}

Every record is on disk before the next batch begins (`ledger.py`): an evaluation that was interrupted goes on where it
was, and any number of devices or processes gives the same records. A question that cannot be asked (an image that does
not decode, a prompt that is too long) gets a record that says why; it counts as wrong, and is counted apart.
"""

import dataclasses
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from pvm_jax.data.processor import Processor
from pvm_jax.decoding_weights import WEIGHTS
from pvm_jax.evals import aggregate, agreement, protocols
from pvm_jax.evals.asking import Asked, Shapes, answers, make_record
from pvm_jax.evals.benchmark_files import table_paths
from pvm_jax.evals.benchmarks import Benchmark, benchmark_kind, open_benchmark
from pvm_jax.evals.extract import RULES, final_text
from pvm_jax.evals.judge import Judge
from pvm_jax.evals.ledger import Ledger
from pvm_jax.evals.plugins import Evaluation
from pvm_jax.evals.protocols import Task
from pvm_jax.evals.questions import Question, Record
from pvm_jax.evals.results import ResultError
from pvm_jax.grading import Grader
from pvm_jax.models.qwen3_vl import Qwen3VL

JUDGED: Mapping[str, Callable[[Record], bool]] = {
    "unparsed": lambda record: record.answer is None,
    "wrong": lambda record: not record.right,
    "all": lambda record: True,
}
"""What a judge may be asked about."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`config.evals.NAME`, apart from `module` (and `every` in training).

    Attributes:
      benchmark, path, split: see `benchmarks.open_benchmark`.
      protocol: see `protocols.task`.
      seeds: how many answers to each question; None: as the protocol says.
      limit: the first so many questions; None: all.
      max_new_tokens, temperature, min_pixels, max_pixels, rule: instead of the protocol's; the result says which.
      random_seed: draws a letter where the rule finds none, as some toolkits do; None: such an answer is wrong.
      judge: fields of `judge.Judge`; None, or no base_url: rules alone.
      judge_when: what the judge is asked about: a key of JUDGED.
      rows, prompt_length, patches, threads: see `Shapes`.
      weights: how the model's lie while it answers, see `decoding_weights.WEIGHTS`.
    """

    benchmark: str
    path: str | Sequence[str]
    protocol: str
    split: str | None = None
    seeds: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    rule: str | None = None
    random_seed: int | None = None
    judge: Mapping[str, Any] | None = None
    judge_when: str = "unparsed"
    rows: int = 32
    prompt_length: Sequence[int] = ()
    patches: Sequence[int] = ()
    threads: int = 4
    weights: str = "gathered"

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> "Options":
        """The options of `config.evals.NAME`.

        Raises:
          ResultError: a key that there is not, one that is missing, or a number out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - set(fields)):
            raise ResultError(f"config.evals.{name}: unknown keys {unknown}; expected some of {sorted(fields)}")
        for key in ("benchmark", "path", "protocol"):
            if not given.get(key):
                raise ResultError(f"config.evals.{name}.{key}: expected a value; pass --config.evals.{name}.{key}=...")
        for key in ("seeds", "limit", "max_new_tokens", "rows", "threads"):
            if given.get(key) is not None and given[key] < 1:
                raise ResultError(f"config.evals.{name}.{key}: expected at least 1, got {given[key]}")
        for key, known in (("rule", sorted(RULES)), ("judge_when", list(JUDGED)), ("weights", list(WEIGHTS))):
            if given.get(key) is not None and given[key] not in known:
                raise ResultError(f"config.evals.{name}.{key}: expected one of {known}, got {given[key]!r}")
        judge = {field.name for field in dataclasses.fields(Judge)}
        if unknown := sorted(set(given.get("judge") or ()) - judge):
            raise ResultError(f"config.evals.{name}.judge: unknown keys {unknown}; expected some of {sorted(judge)}")
        return cls(**{key: value for key, value in given.items() if value is not None})

    def make_judge(self) -> Judge | None:
        judge = {key: value for key, value in (self.judge or {}).items() if value is not None}
        return Judge(**{"model": ""} | judge) if judge.get("base_url") else None

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.rows, tuple(self.prompt_length), tuple(self.patches), self.threads)

    def task(self, kind: str) -> Task:
        """The protocol's task, with what these options change."""
        task = protocols.task(self.protocol, kind, self.random_seed)
        changes = {key: getattr(self, key) for key in ("max_new_tokens", "min_pixels", "max_pixels", "rule")}
        if self.seeds is not None:
            changes["seeds"] = tuple(range(self.seeds))
        if self.temperature is not None:
            changes["sampling"] = dataclasses.replace(task.sampling, temperature=self.temperature)
        return dataclasses.replace(task, **{key: value for key, value in changes.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A benchmark that is put to models, one after the other: what `run` and `make_evaluator` share."""

    options: Options
    benchmark: Benchmark
    task: Task
    processor: Processor
    judge: Judge | None

    @classmethod
    def of(cls, name: str, processor: Processor, given: Mapping[str, Any]) -> "Prepared":
        options = Options.of(name, given)
        benchmark = open_benchmark(options.benchmark, options.path, options.split)
        task = options.task(benchmark.kind)
        limits = {"min_pixels": task.min_pixels, "max_pixels": task.max_pixels}
        images = dataclasses.replace(processor.images, **{k: v for k, v in limits.items() if v is not None})
        if not 0 < images.min_pixels <= images.max_pixels:
            raise ResultError(
                f"config.evals.{name}: expected 0 < min_pixels <= max_pixels, got {images.min_pixels} and "
                f"{images.max_pixels} (the protocol's or the checkpoint's where none is given)"
            )
        judge = options.make_judge()
        return cls(options, benchmark, task, dataclasses.replace(processor, images=images), judge)

    @property
    def questions(self) -> Sequence[Question]:
        return self.benchmark[: self.options.limit]

    def answers(
        self,
        model: Qwen3VL,
        mesh: Mesh | None = None,
        known: Container[str] = (),
        exchange: agreement.Exchange | None = None,
    ) -> Iterator[list[Record]]:
        """Records of the questions whose index is not `known`, batch by batch, with the verdicts of rules.

        Args:
          exchange: see `asking.answers`.
        """
        name, broken = self.benchmark.name, self.benchmark.broken
        left = [question for question in self.questions if question.index not in known]
        if exchange:
            asked = [question.index for question in left]
            agreement.check_same(name, self.benchmark.checksum, asked, sorted(broken), exchange)
        for question in left:
            if question.index in broken:
                asked = Asked(question, None, error=broken[question.index])
                yield [make_record(name, self.task, asked, seed) for seed in self.task.seeds]
        whole = [question for question in left if question.index not in broken]
        with closing(Grader()) as grader:
            shapes, weights, grade = self.options.shapes, self.options.weights, grader.grade
            yield from answers(model, self.processor, name, self.task, whole, shapes, mesh, grade, weights, exchange)

    def judged(self, records: Sequence[Record]) -> list[Record]:
        """The records with the judge's verdicts; where it fails, the rule's stays, and the record says why."""
        if self.judge is None:
            return list(records)
        with ThreadPoolExecutor(self.options.threads, "judge") as pool:
            return list(pool.map(self._judged, records))

    def _judged(self, record: Record) -> Record:
        if not final_text(record.completion or "") or not JUDGED[self.options.judge_when](record):
            return record  # where there is nothing to judge, nobody is asked
        said = self.judge(Question(**record.question), record.completion)
        if said.error:
            return dataclasses.replace(record, error=said.error)
        return dataclasses.replace(record, **dataclasses.asdict(said.verdict), error=None, judge=said.model)

    def about(self) -> dict[str, Any]:
        """All that decides the records but the checkpoint, as plain values."""
        benchmark, images = self.benchmark, self.processor.images
        return {
            "data": {
                "name": benchmark.name,
                "layout": benchmark.layout,
                "split": benchmark.split,
                "limit": self.options.limit,
                "questions": len(self.questions),
                "checksum": benchmark.checksum,
            },
            "task": self.task.about() | {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels},
            "judge": self.judge and {"model": self.judge.model, "when": self.options.judge_when},
        }

    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """The scores, and what they are scores of.

        Raises:
          ResultError: a question has no record, or two.
        """
        expected = aggregate.expected_keys(self.benchmark.name, self.questions, self.task.seeds)
        return aggregate.aggregate(self.task, expected, records) | self.about()

    def in_order(self, records: Sequence[Record]) -> list[Record]:
        """As the questions stand in their file."""
        places = {question.index: place for place, question in enumerate(self.questions)}
        return sorted(records, key=lambda record: (places[record.index], record.seed))


def check(name: str, **options: Any) -> None:
    """What is wrong with `config.evals.NAME`, as far as that can be said without reading the questions.

    Raises:
      ResultError, DataError, JudgeError, GradingError: one sentence.
    """
    given = Options.of(name, options)
    task = given.task(benchmark_kind(given.benchmark))
    table_paths(given.path)
    if judge := given.make_judge():
        judge.check()
    if task.rule != "exact":
        with closing(Grader(children=1)) as grader:
            grader.grade(["x+1"], ["1+x"])  # a grader that is not installed says so


def run(evaluation: Evaluation, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """What eval.py calls: asks what is not answered yet; summary, records and table. `options` are `Options`."""
    prepared = Prepared.of(evaluation.name, evaluation.processor, options)
    identity = prepared.about() | {
        key: evaluation.about[key] for key in ("checksum", "dtype") if key in evaluation.about
    }
    if evaluation.writes:  # mends the files that the others then read
        ledger = Ledger(evaluation.workdir, evaluation.name, identity, prepared.task.seeds, writes=True)
    evaluation.barrier(f"records of {evaluation.name} opened")
    if not evaluation.writes:
        ledger = Ledger(evaluation.workdir, evaluation.name, identity, prepared.task.seeds, writes=False)
    evaluation.barrier(f"records of {evaluation.name} read")
    unjudged = [record for record in ledger.records if record.completion is not None and record.error is not None]
    if evaluation.writes and unjudged:  # the judge was not to be had
        ledger.replace(prepared.judged(unjudged))
    progress = _Progress(evaluation.name, len(prepared.questions) * len(prepared.task.seeds), ledger.records)
    known = {record.index for record in ledger.records}
    for records in prepared.answers(evaluation.model, evaluation.mesh, known, agreement.exchange()):
        if evaluation.writes:  # the judge is asked once
            records = prepared.judged(records)
            progress.add(records)
        ledger.add(records)
    evaluation.barrier(f"records of {evaluation.name} judged")  # process 0 alone asks the judge, and may take long
    if all(record.completion is None for record in ledger.records):
        raise ResultError(f"{evaluation.name}: not one question could be asked; the first: {ledger.records[0].error}")
    summary = prepared.summary(ledger.records)
    records = [dataclasses.asdict(record) for record in prepared.in_order(ledger.records)]
    return summary, records, aggregate.table(summary)


def make_evaluator(
    processor: Processor, name: str, **options: Any
) -> Callable[[nnx.Module], dict[str, tuple[float, float]]]:
    """An evaluator for the training loop: scores of `aggregate`, and other shares, as (sum, count).

    `name` is that of its entry in `config.evals`.
    """
    prepared = Prepared.of(name, processor, options)
    exchange = agreement.exchange()

    def evaluator(model: nnx.Module) -> dict[str, tuple[float, float]]:
        records = [record for batch in prepared.answers(model, exchange=exchange) for record in batch]
        if jax.process_index() == 0:  # which logs
            records = prepared.judged(records)
        if exchange:  # without a time limit, as what follows may have one (a checkpoint's, in Orbax)
            exchange("judged")
        summary = prepared.summary(records)
        found = {score: (of["value"], 1.0) for score, of in summary["scores"].items()}
        faults = ("truncated", "unparsed", "broken", "ungraded")
        found |= {fault: (summary[fault]["right"], summary[fault]["count"]) for fault in faults}
        return found | {"tokens": (sum(record.tokens for record in records), len(records))}

    return evaluator


class _Progress:
    """One line a minute at most."""

    def __init__(self, name: str, total: int, known: Sequence[Record]):
        self._name, self._total, self._begun, self._said = name, total, time.monotonic(), 0.0
        self._before, self._done, self._right = len(known), len(known), sum(record.right for record in known)
        if known:
            print(f"{name}: {len(known)} of {total} answers are there already", flush=True)

    def add(self, records: Sequence[Record]) -> None:
        self._done += len(records)
        self._right += sum(record.right for record in records)
        now = time.monotonic()
        if now - self._said < 60 and self._done < self._total:
            return
        self._said = now
        speed = (self._done - self._before) / max(now - self._begun, 1e-9)
        print(
            f"{self._name}: {self._done} of {self._total} answers, {self._right / self._done:.3f} right, "
            f"{speed:.3g} a second, {(self._total - self._done) / speed / 60:.0f} minutes left",
            flush=True,
        )
