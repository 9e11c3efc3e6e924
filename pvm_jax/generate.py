"""Answers to conversations: prefill, then a compiled loop of decode steps; Python function and command line.

    python -m pvm_jax.generate --checkpoint=DIR --image=FILE --prompt="What is shown?" [--json]

    out = pvm_jax.generate(model, processor, [{"messages": [...]}], max_new_tokens=64)
    out[0].text, out[0].token_ids, out[0].logprobs, out[0].finish_reason

How it is fast:
  - Prompts are padded on the right to few shapes (`bucket`), so that a second call compiles nothing.
  - One dispatch runs up to `CHUNK` decode steps in a `while` loop on the device and stops early when every row has
    ended. The state (cache, last tokens, random keys) is donated: the cache is updated in place.
  - Attention reads all the slots a cache has, so the cache starts with room for 64 new tokens and doubles that room
    when it is used up: a short answer does not pay for a long limit.
"""

import argparse
import dataclasses
import functools
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Int8, Key

import pvm_jax.sharding
from pvm_jax.checkpoint import CheckpointError
from pvm_jax.config import ConfigError
from pvm_jax.data.batch import Batch
from pvm_jax.data.images import DataError
from pvm_jax.data.packing import PATCHES_PER_TOKEN, Encoded, collate
from pvm_jax.data.processor import Processor
from pvm_jax.hf_weights import WeightsError
from pvm_jax.models import KVCache, Qwen3VL
from pvm_jax.sampling import (
    GenerationError,
    Sampling,
    Switches,
    Values,
    extend_history,
    prompt_history,
    row_keys,
    sample,
)

CHUNK = 64  # decode steps a dispatch, and the room of the first cache


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the answer without special tokens.
      token_ids: with the stop token, if it ended with one.
      logprobs: of each token, under the model's distribution at the temperature of the call, see `sampling.sample`.
      finish_reason: "stop", or "length" if max_new_tokens came first.
      prompt_tokens: length of the prompt, visual tokens included.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


@struct.dataclass
class State:
    """Where a generation stands between two dispatches.

    Attributes:
      cache: holds the prompt and all generated tokens but the last.
      tokens: the last token of each row.
      finished: rows that have produced a stop token. They run on with the others, and what they produce is dropped.
      step: tokens generated so far, the same in every row.
      keys: one random key a row, the same at every step.
      history: which ids each row contains, if a penalty needs it.
    """

    cache: KVCache
    tokens: Int[Array, " B"]
    finished: Bool[Array, " B"]
    step: Int[Array, ""]
    keys: Key[Array, " B"]
    history: Int8[Array, "B V"] | None


@struct.dataclass
class Settings:
    """Inputs of every step that do not change: numbers of the sampler, ids never chosen, ids that end a row."""

    values: Values
    banned: Bool[Array, " V"]
    stop: Int[Array, " stops"]


def generate(
    model: Qwen3VL,
    processor: Processor,
    conversations: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 512,
    temperature: float | int = 0.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    presence_penalty: float | int = 0.0,
    repetition_penalty: float | int = 1.0,
    seed: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] | None = None,
    prompt_length: int | None = None,
    prompt_patches: int | None = None,
) -> list[Generation]:
    """One answer to each conversation, all in one batch.

    A row's answer does not depend on the other rows, nor on padding.

    Args:
      conversations: samples `{"messages": [...]}`, or message lists, that end before the assistant's turn.
      max_new_tokens: per row.
      temperature, top_k, top_p, min_p, presence_penalty, repetition_penalty: see `sampling.Sampling`; the defaults
        are greedy. The checkpoint's generation_config.json is used for its stop tokens only.
      seed: of row i, if a sequence. A number seeds rows 0, 1, ... differently; with a sequence, a row draws the same
        alone and in any batch.
      stop_token_ids: by default the checkpoint's. An empty list: always max_new_tokens.
      prompt_length, prompt_patches: T and P of the prefill; by default `bucket` of the largest prompt. Evaluations
        whose prompts vary pass their largest shape, to compile once.

    Raises:
      GenerationError: a setting out of range, or a model whose logits are not finite.
      DataError: a conversation that cannot be encoded, or is larger than the given shape.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, presence_penalty, repetition_penalty)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    stops = processor.eos_token_ids if stop_token_ids is None else stop_token_ids
    prompts = encode(processor, conversations)
    batch = _collate(prompts, prompt_length, prompt_patches)
    keys = row_keys(seed, len(prompts))

    switches, settings = _settings(model, processor, sampling, stops)
    tokens, logprobs = _run(model, batch, keys, settings, switches, max_new_tokens)
    return [_generation(processor, i, prompt, tokens[i], logprobs[i], stops) for i, prompt in enumerate(prompts)]


def encode(processor: Processor, conversations: Sequence[Mapping[str, Any]]) -> list[Encoded]:
    """Prompts as the model sees them, ending with the opening of the assistant's turn."""
    if isinstance(conversations, Mapping) or not conversations:
        raise GenerationError(
            'conversations: expected a list of {"messages": [...]}, got '
            + ("one of them; put it into a list" if conversations else "none")
        )
    samples = [c if isinstance(c, Mapping) else {"messages": c} for c in conversations]
    samples = [{"id": i, **s} for i, s in enumerate(samples)]
    return [processor.encode(s, add_generation_prompt=True) for s in samples]


def bucket(size: int) -> int:
    """The padded length of a prompt of `size` tokens: a multiple of 16, at most eight lengths per factor of two.

    >>> [bucket(n) for n in (1, 16, 100, 128, 129, 300, 1088, 1200)]
    [16, 16, 112, 128, 144, 320, 1152, 1280]
    """
    step = max(16, 2 ** max(size - 1, 1).bit_length() // 16)
    return -(-max(size, 1) // step) * step


def _collate(prompts: Sequence[Encoded], length: int | None, patches: int | None) -> Batch:
    if length is None:
        length = bucket(max(len(p.tokens) for p in prompts))
    if patches is None:
        patches = PATCHES_PER_TOKEN * bucket(max(len(p.patches) for p in prompts) // PATCHES_PER_TOKEN)
    return collate([[p] for p in prompts], length=length, patches=patches)


def _settings(
    model: Qwen3VL, processor: Processor, sampling: Sampling, stops: Sequence[int]
) -> tuple[Switches, Settings]:
    switches, values = sampling.split()
    banned = np.zeros(model.config.text.vocab_size, bool)
    banned[processor.banned_token_ids] = True
    return switches, Settings(values=values, banned=jnp.asarray(banned), stop=jnp.asarray(stops, jnp.int32))


def _run(
    model: Qwen3VL, batch: Batch, keys: Array, settings: Settings, switches: Switches, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities, [B,n] each; what a row has after its stop token means nothing."""
    graphdef, params = nnx.split(model)
    prompt = batch.tokens.shape[1]
    # The last token is never fed back, so it needs no slot.
    rooms = cache_rooms(max_new_tokens - 1)
    state, token, logprob = _prefill(
        graphdef, params, batch, keys, settings, switches=switches, capacity=prompt + next(rooms, 0)
    )
    tokens, logprobs, generated = [np.asarray(token)[:, None]], [np.asarray(logprob)[:, None]], 1
    while generated < max_new_tokens and not np.asarray(state.finished).all():
        free = state.cache.capacity - prompt - (generated - 1)
        if free == 0:
            state = state.replace(cache=_grow(state.cache, prompt + next(rooms)))
            continue
        limit = min(CHUNK, free, max_new_tokens - generated)
        state, token, logprob, steps = _decode(graphdef, params, state, np.int32(limit), settings, switches=switches)
        steps = int(steps)
        tokens.append(np.asarray(token)[:, :steps])
        logprobs.append(np.asarray(logprob)[:, :steps])
        generated += steps
    return np.concatenate(tokens, axis=1), np.concatenate(logprobs, axis=1)


def cache_rooms(needed: int) -> Iterator[int]:
    """How many new tokens the cache has room for, stage after stage.

    >>> list(cache_rooms(63)), list(cache_rooms(200)), list(cache_rooms(0))
    ([64], [64, 128, 256], [])
    """
    room = CHUNK
    while needed > 0:
        yield room
        if room >= needed:
            return
        room *= 2


@functools.partial(jax.jit, static_argnums=0, static_argnames=("switches", "capacity"))
def _prefill(
    graphdef, params, batch: Batch, keys: Array, settings: Settings, *, switches: Switches, capacity: int
) -> tuple[State, Array, Array]:
    """State after the prompt, and each row's first token with its log-probability."""
    rows, length = batch.tokens.shape
    memory = batch.memory_index.shape[1]
    logging.info("compiling prefill: %d rows of %d tokens, %d visual, cache %d", rows, length, memory, capacity)
    model = nnx.merge(graphdef, params)
    hidden, cache = model.prefill(batch, model.init_cache(rows, capacity, memory))
    real = batch.segment_ids > 0
    last = jnp.sum(real, axis=1) - 1
    vocab = model.config.text.vocab_size
    state = State(
        cache=cache,
        tokens=jnp.zeros((rows,), jnp.int32),
        finished=jnp.zeros((rows,), bool),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        history=prompt_history(batch.tokens, real, vocab) if switches.history else None,
    )
    logits = model.logits(hidden[jnp.arange(rows), last])
    state, logprob = _choose(logits, state, settings, switches)
    return state, state.tokens, logprob


@functools.partial(jax.jit, static_argnums=0, static_argnames="switches", donate_argnums=2)
def _decode(
    graphdef, params, state: State, limit: Int[Array, ""], settings: Settings, *, switches: Switches
) -> tuple[State, Int[Array, "B chunk"], Float[Array, "B chunk"], Int[Array, ""]]:
    """Up to `limit` more tokens a row (at most CHUNK), their log-probabilities, and how many steps were made."""
    rows = state.tokens.shape[0]
    logging.info("compiling decode: %d rows, cache %d", rows, state.cache.capacity)
    model = nnx.merge(graphdef, params)
    put = jax.lax.dynamic_update_slice

    def unfinished(carry):
        state, _, _, steps = carry
        return (steps < limit) & ~state.finished.all()

    def step(carry):
        state, tokens, logprobs, steps = carry
        hidden, cache = model.decode(state.tokens, state.cache)
        state, logprob = _choose(model.logits(hidden), state.replace(cache=cache), settings, switches)
        tokens = put(tokens, state.tokens[:, None], (0, steps))
        return state, tokens, put(logprobs, logprob[:, None], (0, steps)), steps + 1

    empty = jnp.zeros((rows, CHUNK), jnp.int32), jnp.zeros((rows, CHUNK), jnp.float32)
    return jax.lax.while_loop(unfinished, step, (state, *empty, jnp.zeros((), jnp.int32)))


@functools.partial(jax.jit, static_argnames="capacity")
def _grow(cache: KVCache, capacity: int) -> KVCache:
    return cache.grow(capacity)


def _choose(
    logits: Float[Array, "B V"], state: State, settings: Settings, switches: Switches
) -> tuple[State, Float[Array, " B"]]:
    """The next token of every row."""
    keys = state.keys if switches.greedy else jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    tokens, logprobs = sample(logits, keys, settings.banned, state.history, switches, settings.values)
    return state.replace(
        tokens=tokens,
        finished=state.finished | jnp.isin(tokens, settings.stop),
        step=state.step + 1,
        history=extend_history(state.history, tokens) if switches.history else None,
    ), logprobs


def _generation(
    processor: Processor, row: int, prompt: Encoded, tokens: np.ndarray, logprobs: np.ndarray, stops: Sequence[int]
) -> Generation:
    ends = np.flatnonzero(np.isin(tokens, np.asarray(stops, np.int32)))
    count = int(ends[0]) + 1 if len(ends) else len(tokens)
    bad = np.flatnonzero(~np.isfinite(logprobs[:count]))
    if len(bad):
        raise GenerationError(
            f"conversation {row}, token {bad[0]}: expected a finite log-probability, got {logprobs[bad[0]]}; "
            "is the checkpoint damaged, or its range too wide for the dtype?"
        )
    ids = tokens[:count].tolist()
    return Generation(
        text=processor.decode(ids[:-1] if len(ends) else ids),
        token_ids=ids,
        logprobs=logprobs[:count].tolist(),
        finish_reason="stop" if len(ends) else "length",
        prompt_tokens=len(prompt.tokens),
    )


class _CallableModule(types.ModuleType):
    """`pvm_jax.generate(...)`: importing this module binds its name in the package, where users expect the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Generation]:
        return generate(*args, **kwargs)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pvm_jax.generate", description="Answers one question about images or videos.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="Hugging Face directory, native checkpoint or training workdir")
    add("--prompt", required=True, help="the question; images and videos stand before it")
    add("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    add("--video", action="append", default=[], metavar="FILE", help="may be given several times")
    add("--system", help="a system message")
    add("--max_new_tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="0 = greedy, the default")
    add("--top_k", type=int, default=0, help="0 = all tokens, the default")
    add("--top_p", type=float, default=1.0)
    add("--min_p", type=float, default=0.0)
    add("--presence_penalty", type=float, default=0.0, help="subtracted once from the logit of a generated token")
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and computation")
    add("--json", action="store_true", help="print one JSON object: token_ids, text, logprobs, finish_reason, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for what the user can mend."""
    options = vars(_parser().parse_args(argv))
    as_json, checkpoint, dtype = (options.pop(name) for name in ("json", "checkpoint", "dtype"))
    system, prompt = options.pop("system"), options.pop("prompt")
    content = [{"type": kind, kind: file} for kind in ("image", "video") for file in options.pop(kind)]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": [*content, {"type": "text", "text": prompt}]})
    try:
        Sampling(**{field.name: options[field.name] for field in dataclasses.fields(Sampling)})  # before the load
        model, processor = pvm_jax.load(checkpoint, dtype=dtype)
        answer = generate(model, processor, [{"id": "prompt", "messages": messages}], **options)[0]
    except (CheckpointError, ConfigError, DataError, GenerationError, WeightsError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(answer)) if as_json else answer.text)
    return 0


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
