"""From questions to records: prompts are encoded, put together into batches of few shapes, and answered.

A batch is spread over the mesh, and several answers to a question (`Task.seeds`) share its prefill. What a question is
answered with depends on the question and the seed alone, not on its batch (in fp32 and greedy: to the letter).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from flax import nnx
from jax.sharding import Mesh

from pvm_jax.data.images import DataError
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded, collate
from pvm_jax.data.processor import Processor
from pvm_jax.decoding import complete
from pvm_jax.decoding_weights import for_decoding
from pvm_jax.evals.agreement import Exchange, Note, agreed
from pvm_jax.evals.free_answers import Grade
from pvm_jax.evals.prompts import shown
from pvm_jax.evals.protocols import Task
from pvm_jax.evals.questions import Question, Record, Verdict
from pvm_jax.generate import bucket
from pvm_jax.models.qwen3_vl import Qwen3VL
from pvm_jax.sharding import mesh_of


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of the batches.

    Attributes:
      rows: answers at once, `prompts` times the number of seeds.
      prompt_length, patches: buckets of T and P; empty: see `generate.bucket`, a program for each size that occurs.
      threads: that encode prompts.
    """

    rows: int = 32
    prompt_length: Sequence[int] = ()
    patches: Sequence[int] = ()
    threads: int = 4

    def of(self, prompt: Encoded) -> tuple[int, int]:
        """T and P of the batch that this prompt goes into.

        Raises:
          DataError: it is larger than the largest.
        """
        tokens, patches = len(prompt.tokens), len(prompt.patches)
        length = _smallest("prompt_length", self.prompt_length, tokens) or bucket(tokens)
        room = _smallest("patches", self.patches, patches)
        return length, room or PATCHES_PER_TOKEN * bucket(patches // PATCHES_PER_TOKEN)


def _smallest(name: str, buckets: Sequence[int], needed: int) -> int:
    if not buckets:
        return 0
    if needed > max(buckets):
        raise DataError(f"the prompt needs {name} of {needed}, and the largest is {max(buckets)}")
    return min(size for size in buckets if size >= needed)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as the model gets it, or why it does not."""

    question: Question
    prompt: Encoded | None
    text: str = ""
    error: str | None = None


Shape = tuple[int, int]
"""T and P of a batch."""


def answers(
    model: Qwen3VL,
    processor: Processor,
    benchmark: str,
    task: Task,
    questions: Sequence[Question],
    shapes: Shapes = Shapes(),
    mesh: Mesh | None = None,
    grade: Grade | None = None,
    weights: str = "gathered",
    exchange: Exchange | None = None,
) -> Iterator[list[Record]]:
    """Records of the questions, batch by batch; one for each question and seed of the task, in no particular order.

    Args:
      mesh: over which batches are spread; None: the one that the model lies on, if any. Of several processes each
        passes the same questions and gets all records.
      grade: see `Task.verdict`.
      weights: how they lie meanwhile, see `decoding_weights.WEIGHTS`.
      exchange: between these processes; None: there is one.
    """
    mesh = mesh_of(nnx.state(model)) if mesh is None else mesh
    ways = mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1
    seeds = task.seeds
    prompts = -(-max(shapes.rows // len(seeds), 1) // ways) * ways
    if not questions:
        return  # nothing is drawn: no copy of the weights is made
    model = for_decoding(model, weights)
    for batch in _batches(processor, task, questions, shapes, prompts, exchange):
        if isinstance(batch, Asked):
            yield [make_record(benchmark, task, batch, seed) for seed in seeds]
            continue
        (length, patches), asked = batch
        rows = [*asked, *[asked[-1]] * (prompts - len(asked))]  # padding; its answers are dropped
        made = complete(
            model,
            collate([[one.prompt] for one in rows], length=length, patches=patches),
            task.sampling,
            max_new_tokens=task.max_new_tokens,
            stop_token_ids=processor.eos_token_ids,
            banned_token_ids=processor.banned_token_ids,
            seed=[_row_seed(benchmark, one.question.index, seed) for one in rows for seed in seeds],
            samples=len(seeds),
            compact=True,
        )
        records = []
        for row, (one, seed) in enumerate(itertools.product(asked, seeds)):
            ids = made.tokens[row, : made.lengths[row]]
            stopped = bool(made.stopped[row])
            text = processor.decode(ids[:-1] if stopped else ids)
            finish = "stop" if stopped else "length"
            records.append(make_record(benchmark, task, one, seed, text, len(ids), finish, grade))
        yield records


def _batches(
    processor: Processor,
    task: Task,
    questions: Sequence[Question],
    shapes: Shapes,
    prompts: int,
    exchange: Exchange | None = None,
) -> Iterator[Asked | tuple[Shape, list[Asked]]]:
    """Batches of at most `prompts` questions and their shape; alone, without a shape, those that cannot be asked."""

    def ask(question: Question) -> tuple[Asked, Shape]:
        try:
            messages = task.messages(question)
            prompt = processor.encode({"id": question.index, "messages": messages}, add_generation_prompt=True)
            return Asked(question, prompt, text=shown(messages)), shapes.of(prompt)
        except DataError as error:
            return Asked(question, None, error=str(error)), (0, 0)

    at_once = 1 if exchange is None else prompts  # processes talk once a batch
    waiting: dict[Shape, list[Asked]] = {}
    with ThreadPoolExecutor(shapes.threads, "encode") as pool:
        places = iter(range(len(questions)))
        # While a batch is answered the next one is encoded; more of them would be gigabytes of patches.
        ahead = [pool.submit(ask, questions[i]) for i in itertools.islice(places, prompts)]
        while ahead:
            made = [future.result() for future in ahead[:at_once]]
            ahead = ahead[at_once:] + [pool.submit(ask, questions[i]) for i in itertools.islice(places, at_once)]
            for asked, shape in made if exchange is None else _together(made, exchange):
                if asked.prompt is None:
                    yield asked
                    continue
                waiting.setdefault(shape, []).append(asked)
                if len(waiting[shape]) == prompts:
                    yield shape, waiting.pop(shape)
    yield from waiting.items()


def _together(made: Sequence[tuple[Asked, Shape]], exchange: Exchange) -> Iterator[tuple[Asked, Shape]]:
    """The questions as all processes can ask them."""
    notes = agreed([Note(asked.question.index, *shape, asked.error) for asked, shape in made], exchange)
    for (asked, _), note in zip(made, notes):
        failed = Asked(asked.question, None, error=note.error)
        yield asked if note.error is None else failed, (note.length, note.patches)


def _row_seed(benchmark: str, index: str, seed: int) -> int:
    """Of a row's random key: the same whatever batch the question is in."""
    digest = hashlib.sha256(f"{benchmark}/{index}/{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def make_record(
    benchmark: str,
    task: Task,
    asked: Asked,
    seed: int,
    completion: str | None = None,
    tokens: int = 0,
    finish_reason: str = "",
    grade: Grade | None = None,
) -> Record:
    """The record of one answer to a question, or of none."""
    question = asked.question
    verdict = Verdict(None, False) if completion is None else task.verdict(question, completion, grade)
    fields = dataclasses.asdict(dataclasses.replace(question, images=()))
    del fields["images"]
    return Record(
        benchmark=benchmark,
        protocol=task.protocol,
        index=question.index,
        seed=seed,
        question=fields,
        prompt=asked.text,
        completion=completion,
        tokens=tokens,
        prompt_tokens=0 if asked.prompt is None else len(asked.prompt.tokens),
        finish_reason=finish_reason,
        answer=verdict.answer,
        right=verdict.right,
        error=asked.error,
        ungraded=verdict.ungraded,
    )
