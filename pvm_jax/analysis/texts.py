"""The texts that are analysed: answers that are given, or ones that the model writes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pvm_jax.analysis.results import AnalysisError, Text
from pvm_jax.analysis.retrieval import pictures
from pvm_jax.data.packing import Encoded, extend
from pvm_jax.data.processor import Processor
from pvm_jax.decoding import complete
from pvm_jax.generate import encode, make_batch
from pvm_jax.models.qwen3_vl import Qwen3VL

LONGEST = 4
"""Bytes of a character, and so the tokens that it may take."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A text as readers see it and as the model does."""

    text: Text
    encoded: Encoded


def read(processor: Processor, samples: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Conversations with their answers: all that the assistant says is measured, but what is marked `"loss": False`.

    Raises:
      AnalysisError: a conversation in which nothing is left to measure.
      DataError: one that cannot be encoded.
    """
    return [_source(processor, sample, processor.encode(sample, targets=True)) for sample in _named(samples)]


def write(
    model: Qwen3VL,
    processor: Processor,
    samples: Sequence[Mapping[str, Any]],
    new_tokens: int,
    *,
    forced: bool = True,
) -> list[Source]:
    """Conversations with the greedy answers of a model, which are measured; all are answered in one batch.

    Args:
      samples: an assistant's turn at the end is left out.
      new_tokens: length of the answers.
      forced: the tokens that end an answer are never chosen, so that each has `new_tokens`; else it may end before.

    Raises:
      AnalysisError: a conversation without a question.
      GenerationError, DataError: see `pvm_jax.generate`.
    """
    questions = [question(sample) for sample in _named(samples)]
    stops = tuple(processor.eos_token_ids)
    banned = [*processor.banned_token_ids.tolist(), *(stops if forced else ())]
    prompts = encode(processor, questions)
    made = complete(
        model,
        make_batch(prompts),
        max_new_tokens=new_tokens,
        stop_token_ids=() if forced else stops,
        banned_token_ids=banned,
    )
    answers = [extend(prompt, made.tokens[row, : made.lengths[row]]) for row, prompt in enumerate(prompts)]
    return [_source(processor, sample, answer) for sample, answer in zip(questions, answers)]


def _named(samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for i, sample in enumerate(samples):
        yield {"id": str(i + 1), **sample}


def question(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation up to the answer that is to be written.

    Raises:
      AnalysisError: nothing stands before it.
    """
    messages = list(sample["messages"])
    if messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages:
        raise AnalysisError(f"sample {sample['id']}: expected a turn for the model to answer, found none")
    return {**sample, "messages": messages}


def ends_answered(sample: Mapping[str, Any]) -> bool:
    """Whether the last turn is the assistant's and says something; data sets have "" where an answer is withheld."""
    last = sample["messages"][-1]
    return last["role"] == "assistant" and ("tool_calls" in last or _says(last["content"]))


def _says(content: Any) -> bool:
    return bool(content.strip()) if isinstance(content, str) else any(_says(p.get("text", "")) for p in content or ())


def _answered(sample: Mapping[str, Any]) -> bool:
    return any(message["role"] == "assistant" for message in sample["messages"])


def _source(processor: Processor, sample: Mapping[str, Any], encoded: Encoded) -> Source:
    name = str(sample["id"])
    columns = np.flatnonzero(encoded.loss_mask).astype(np.int32)
    columns = columns[columns > 0]  # nothing stands before the first token that could predict it
    if not len(columns):
        unmarked = 'all of its answers are marked "loss": false; take the mark from one'
        found = unmarked if _answered(sample) else "found no assistant's turn; add one"
        raise AnalysisError(f"sample {name}: expected an answer to measure, {found}, or have one written")
    is_text = encoded.visual_index < 0
    text = Text(
        name=name,
        ids=encoded.tokens,
        pieces=pieces(processor, encoded.tokens),
        visual_index=encoded.visual_index,
        columns=columns,
        text_before=np.cumsum(is_text, dtype=np.int32)[columns - 1],
        pictures=pictures(processor, sample, encoded),
    )
    return Source(text, encoded)


def pieces(processor: Processor, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """The text of each token, special tokens included; joined they are the text of all.

    Tokens of byte-level vocabularies may end within a character, which decodes to U+FFFD. Such tokens wait for the ones
    that complete it:

        "n", "\\xc3", "\\xb6"  ->  "n", "", "ö"

    No character has more than four bytes: what waits longer has a character that is done, or a U+FFFD that the text
    really has, and leaves as soon as the rest means the same without it.
    """

    def text_of(tokens: Sequence[int]) -> str:
        return processor.decode(tokens, skip_special_tokens=False)

    done: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(int(token))
        done.append("")
        text = text_of(waiting)
        if not text.endswith("\ufffd"):
            done[-1], waiting = text, []
        elif len(waiting) >= LONGEST:
            cuts = range(1, len(waiting))
            count = next((k for k in cuts if text_of(waiting[:k]) + text_of(waiting[k:]) == text), 0)
            if count == 0 and len(waiting) == 2 * LONGEST:  # bytes of nothing
                count = len(waiting)
            if count:
                done[len(done) - len(waiting) + count - 1] = text_of(waiting[:count])
                waiting = waiting[count:]
    if waiting:
        done[-1] = text_of(waiting)
    return tuple(done)
