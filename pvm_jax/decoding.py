"""Prefill and a compiled loop of decode steps: from a batch of prompts to token ids and log-probabilities.

How it is fast:
  - One dispatch runs up to `CHUNK` decode steps in a `while` loop on the device and stops early when every row has
    ended. The state (cache, last tokens, random keys) is donated: the cache is updated in place.
  - Attention reads all the slots a cache has, so the cache starts with room for 64 new tokens and doubles that room
    when it is used up: a short answer does not pay for a long limit.
  - Several answers to one prompt (`samples`) share its vision pass and its prefill: the cache's rows are repeated.
  - With `compact`, rows that have ended leave the batch whenever half of it has: the rest goes on in a smaller program.
    That is for callers who generate often; each size is compiled once.
  - Programs depend on shapes (rows, prompt, cache) and on `sampling.Switches`; numbers of the sampler, stop tokens
    and max_new_tokens are inputs.
  - A model that lies on a mesh generates there: rows, cache and visual memory are spread over data and fsdp, heads over
    tensor (`cache.cache_shardings`). Rows that do not divide are computed on all devices.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pvm_jax.config import ModelConfig
from pvm_jax.data.batch import Batch
from pvm_jax.models import KVCache, Qwen3VL
from pvm_jax.models.cache import cache_shardings, repeat_cache_rows, take_cache_rows
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
from pvm_jax.sharding import AnyMesh, local_rows, mesh_of, shard_batch, take_rows, ways_of

CHUNK = 64  # decode steps a dispatch, and the room of the first cache


@dataclasses.dataclass(frozen=True)
class Completions:
    """What a batch of prompts was continued with.

    Attributes:
      tokens: i32 [B,n]; behind a row's stop token they mean nothing.
      logprobs: f32 [B,n], see `sampling.sample`.
      lengths: i32 [B], tokens of each row, its stop token included.
      stopped: bool [B], the row ended with a stop token and not for want of room.
    """

    tokens: Int[np.ndarray, "B n"]
    logprobs: Float[np.ndarray, "B n"]
    lengths: Int[np.ndarray, " B"]
    stopped: Bool[np.ndarray, " B"]


def complete(
    model: Qwen3VL,
    batch: Batch,
    sampling: Sampling = Sampling(),  # noqa: B008  frozen
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] = (),
    banned_token_ids: Sequence[int] | Int[np.ndarray, " banned"] = (),
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    compact: bool = False,
) -> Completions:
    """Continues every row of a batch; a row's tokens depend on the row alone.

    Args:
      batch: one prompt a row, padded on the right.
      samples: answers to each prompt; those to prompt i are rows i * samples to (i + 1) * samples - 1.
      compact: drop rows that have ended, by halves, as the module's docstring says.
      stop_token_ids: end a row; none: always max_new_tokens.
      banned_token_ids: are never chosen.
      seed: see `sampling.row_keys`.

    Raises:
      GenerationError: max_new_tokens or seed out of range, or logits that are not finite.
    """
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    switches, settings = make_settings(model, sampling, stop_token_ids, banned_token_ids)
    rows = batch.tokens.shape[0] * samples
    keys = row_keys(seed, rows)
    graphdef, params = nnx.split(model)
    prompt, mesh = batch.tokens.shape[1], mesh_of(params)
    if mesh is not None and batch.tokens.shape[0] % ways_of(mesh) == 0:
        batch = shard_batch(take_rows(batch, local_rows(batch.tokens.shape[0], mesh)), mesh)
    rooms = cache_rooms(max_new_tokens - 1)  # the last token is never fed back, so it needs no slot

    capacity = prompt + next(rooms, 0)
    static = {"switches": switches, "mesh": mesh}
    state, token, logprob = prefill(
        graphdef, params, batch, keys, settings, capacity=capacity, samples=samples, **static
    )
    del batch  # its patches need not lie there while tokens are made
    made = _Made(rows, max_new_tokens)
    made.add(np.asarray(token)[:, None], np.asarray(logprob)[:, None])
    while made.length < max_new_tokens and not (finished := np.asarray(state.finished)).all():
        if compact and (keep := made.keep(finished, ways=ways_of(mesh))) is not None:
            state = take_rows_of_state(graphdef, params, state, keep, mesh=mesh)
        free = state.cache.capacity - prompt - (made.length - 1)
        if free == 0:
            state = state.replace(cache=grow(state.cache, prompt + next(rooms)))
            continue
        limit = np.int32(min(CHUNK, free, max_new_tokens - made.length))
        state, token, logprob, steps = decode(graphdef, params, state, limit, settings, **static)
        made.add(np.asarray(token)[:, : int(steps)], np.asarray(logprob)[:, : int(steps)])
    return _completions(made.tokens[:, : made.length], made.logprobs[:, : made.length], stop_token_ids)


class _Made:
    """What has been generated, by row of the whole batch, while only some of its rows are still computed."""

    def __init__(self, rows: int, limit: int):
        self.tokens = np.zeros((rows, limit), np.int32)
        self.logprobs = np.zeros((rows, limit), np.float32)
        self.length = 0
        self._rows = np.arange(rows)

    def add(self, tokens: Int[np.ndarray, "R n"], logprobs: Float[np.ndarray, "R n"]) -> None:
        columns = slice(self.length, self.length + tokens.shape[1])
        self.tokens[self._rows, columns] = tokens
        self.logprobs[self._rows, columns] = logprobs
        self.length = columns.stop

    def keep(self, finished: Bool[np.ndarray, " R"], ways: int) -> Int[np.ndarray, " half"] | None:
        """Which of the R rows to go on with, unfinished ones first; None while more than half of them are going on.

        Sizes are halves of the first one, as long as they divide over `ways` devices.
        """
        size, needed = len(finished), int((~finished).sum())
        while size % 2 == 0 and (size // 2) % ways == 0 and needed <= size // 2:
            size //= 2
        if size == len(finished):
            return None
        keep = np.argsort(finished, kind="stable")[:size]
        self._rows = self._rows[keep]
        return keep


def make_settings(
    model: Qwen3VL,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    banned_token_ids: Sequence[int] | Int[np.ndarray, " banned"],
) -> tuple[Switches, "Settings"]:
    """The static and the traced inputs of `prefill` and `decode`."""
    switches, values = sampling.split()
    banned = np.zeros(model.config.text.vocab_size, bool)
    banned[np.asarray(banned_token_ids, np.int32)] = True
    return switches, Settings(values, jnp.asarray(banned), jnp.asarray(stop_token_ids, jnp.int32))


def _completions(tokens: np.ndarray, logprobs: np.ndarray, stop_token_ids: Sequence[int]) -> Completions:
    stops = np.isin(tokens, np.asarray(stop_token_ids, np.int32))
    stopped = stops.any(axis=1)
    lengths = np.where(stopped, stops.argmax(axis=1) + 1, tokens.shape[1])
    for row, column in np.argwhere(~np.isfinite(logprobs)):
        if column < lengths[row]:
            raise GenerationError(
                f"row {row}, token {column}: expected a finite log-probability, got {logprobs[row, column]}; "
                "is the checkpoint damaged, or its range too wide for the dtype?"
            )
    return Completions(tokens, logprobs, lengths.astype(np.int32), stopped)


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

    # Not typed as arrays: JAX builds these classes with shapes and other stand-ins as leaves, too.
    cache: KVCache
    tokens: Any  # i32 [B]
    finished: Any  # bool [B]
    step: Any  # i32 []
    keys: Any  # random keys [B]
    history: Any  # i8 [B,V] or None


@struct.dataclass
class Settings:
    """Inputs of every step that do not change: numbers of the sampler, ids never chosen, ids that end a row."""

    values: Values
    banned: Any  # bool [V]
    stop: Any  # i32 [stops]


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


@functools.partial(jax.jit, static_argnums=0, static_argnames=("switches", "capacity", "samples", "mesh"))
def prefill(
    graphdef,
    params,
    batch: Batch,
    keys: Array,
    settings: Settings,
    *,
    switches: Switches,
    capacity: int,
    samples: int = 1,
    mesh: AnyMesh | None = None,
) -> tuple[State, Array, Array]:
    """State after the prompt, and each row's first token with its log-probability; `samples` rows a prompt.

    `mesh`: where the model lies; None: on one device.
    """
    rows, length = batch.tokens.shape
    memory = batch.memory_index.shape[1]
    logging.info("compiling prefill: %d rows of %d tokens, %d visual, cache %d", rows, length, memory, capacity)
    model = nnx.merge(graphdef, params)
    hidden, cache = model.prefill(batch, model.init_cache(rows, capacity, memory))
    real = batch.segment_ids > 0
    last = jnp.sum(real, axis=1) - 1
    vocab = model.config.text.vocab_size
    logits = model.logits(hidden[jnp.arange(rows), last])
    history = prompt_history(batch.tokens, real, vocab) if switches.history else None
    if samples > 1:
        cache = repeat_cache_rows(cache, samples, model.config, model.scan)
        logits, history = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (logits, history))
    state = State(
        cache=cache,
        tokens=jnp.zeros((rows * samples,), jnp.int32),
        finished=jnp.zeros((rows * samples,), bool),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        history=history,
    )
    state, logprob = _choose(logits, state, settings, switches)
    return _spread(state, model, mesh), *_everywhere((state.tokens, logprob), mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("switches", "mesh"), donate_argnums=2)
def decode(
    graphdef,
    params,
    state: State,
    limit: Int[Array, ""],
    settings: Settings,
    *,
    switches: Switches,
    mesh: AnyMesh | None = None,
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
        return _spread(state, model, mesh), tokens, put(logprobs, logprob[:, None], (0, steps)), steps + 1

    empty = jnp.zeros((rows, CHUNK), jnp.int32), jnp.zeros((rows, CHUNK), jnp.float32)
    state, *made = jax.lax.while_loop(unfinished, step, (state, *empty, jnp.zeros((), jnp.int32)))
    return _spread(state, model, mesh), *_everywhere(tuple(made), mesh)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def take_rows_of_state(graphdef, params, state: State, rows: Int[Array, " R"], *, mesh: AnyMesh | None = None) -> State:
    """The state of some rows, to go on with them alone."""
    model = nnx.merge(graphdef, params)
    taken = State(
        cache=take_cache_rows(state.cache, rows, model.config, model.scan, mesh),
        tokens=state.tokens[rows],
        finished=state.finished[rows],
        step=state.step,
        keys=state.keys[rows],
        history=None if state.history is None else state.history[rows],
    )
    return _spread(taken, model, mesh)


def state_shardings(state: State, config: ModelConfig, scan: bool, mesh: AnyMesh) -> State:
    """Where a state lies: its cache as `cache_shardings` says, the rest, which is small, on every device.

    Every part has its place: one that XLA could choose would make the next dispatch another program.

    Args:
      state: arrays, or shapes.
    """
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    return everywhere.replace(cache=cache_shardings(config, scan, state.tokens.shape[0], mesh))


def _spread(state: State, model: Qwen3VL, mesh: AnyMesh | None) -> State:
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_shardings(state, model.config, model.scan, mesh))


def _everywhere(values: tuple[Any, ...], mesh: AnyMesh | None) -> tuple[Any, ...]:
    if mesh is None:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames="capacity")
def grow(cache: KVCache, capacity: int) -> KVCache:
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
