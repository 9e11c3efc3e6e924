"""Choosing the next token: penalties, temperature, top-k, top-p, min-p; and the log-probability of the choice.

The order is that of Hugging Face's `generate`: banned ids, repetition and presence penalty, temperature, top-k,
top-p, min-p; then the largest or a draw. All are pure functions under `jit`; what a call does not use is not
compiled (`Switches`), and changing a number does not recompile (`Values`).

Deviations, each because the other way costs a sort of the whole vocabulary at every step:
  - top-p finds its threshold by bisection over the float's bits, and so keeps all tokens that tie with the last
    one kept (Hugging Face keeps an arbitrary one of them);
  - top-k keeps exactly k tokens (Hugging Face keeps the ties).
The presence penalty, which Hugging Face lacks, is subtracted once from the logit of every id that has been
GENERATED in this row; ids that only stand in the prompt are left alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, Key

# What `history` knows of an id of one row. A generated id counts as repeated too, so one number is enough.
IN_PROMPT, GENERATED = 1, 2


class GenerationError(ValueError):
    """A generation that cannot be done as asked; the sentence names the setting, or the conversation and token."""


class Switches(NamedTuple):
    """What is compiled. `top_k` is a shape and therefore belongs here; 0 means all tokens."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    presence: bool
    repetition: bool

    @property
    def history(self) -> bool:
        """Whether `sample` needs to know which ids a row contains."""
        return self.presence or self.repetition


class Values(NamedTuple):
    """The numbers, fp32 scalars, traced."""

    temperature: Float[Array, ""] | np.float32
    top_p: Float[Array, ""] | np.float32
    min_p: Float[Array, ""] | np.float32
    presence_penalty: Float[Array, ""] | np.float32
    repetition_penalty: Float[Array, ""] | np.float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one call. The defaults are greedy decoding.

    Raises:
      GenerationError: a value out of its range.
    """

    temperature: float | int = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    presence_penalty: float | int = 0.0
    repetition_penalty: float | int = 1.0

    def __post_init__(self):
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise GenerationError(f"top_k: expected a whole number of at least 0 (0 = all tokens), got {self.top_k!r}")
        ranges = {
            "temperature": (0 <= self.temperature < np.inf, "a number of at least 0 (0 = greedy)"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "presence_penalty": (np.isfinite(self.presence_penalty), "a finite number (0 = off)"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "a number above 0 (1 = off)"),
        }
        for field, (valid, expected) in ranges.items():
            if not valid:
                raise GenerationError(f"{field}: expected {expected}, got {getattr(self, field)!r}")

    def split(self) -> tuple[Switches, Values]:
        """The part that selects a program and the part that is its input."""
        greedy = self.temperature == 0
        switches = Switches(
            greedy=greedy,
            top_k=0 if greedy else self.top_k,
            top_p=not greedy and self.top_p < 1,
            min_p=not greedy and self.min_p > 0,
            presence=self.presence_penalty != 0,
            repetition=self.repetition_penalty != 1,
        )
        return switches, Values(*(np.float32(getattr(self, field)) for field in Values._fields))


def row_keys(seed: int | Sequence[int], rows: int) -> Key[Array, " B"]:
    """One random key a row; the draw of step t uses `fold_in(key, t)` and depends on nothing else.

    A sequence gives each row its own seed. A number is one for all, from which every row gets another key.
    """
    seeds = np.asarray(seed, object)
    if seeds.ndim and seeds.shape != (rows,):
        raise GenerationError(f"seed: expected a number or {rows} of them, one for each row, got {seeds.shape}")
    if not all(isinstance(s, int) and 0 <= s < 2**32 for s in seeds.flat):
        raise GenerationError(f"seed: expected whole numbers from 0 to 2**32 - 1, got {seed}")
    if seeds.ndim:
        return jax.vmap(jax.random.key)(jnp.asarray(seeds.astype(np.uint32)))
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(np.uint32(seed)), jnp.arange(rows))


def prompt_history(tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], vocab_size: int) -> Int8[Array, "B V"]:
    """The history of each row before its first generated token: the ids of its prompt, padding left out."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    marks = jnp.where(valid, IN_PROMPT, 0).astype(jnp.int8)
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.int8).at[rows, tokens].max(marks)


def extend_history(history: Int8[Array, "B V"], tokens: Int[Array, "B"]) -> Int8[Array, "B V"]:
    """The history after one more generated token a row."""
    return history.at[jnp.arange(tokens.shape[0]), tokens].set(GENERATED)


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    banned: Bool[Array, "V"],
    history: Int8[Array, "B V"] | None,
    switches: Switches,
    values: Values,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The next token of each row and its log-probability.

    The log-probability is that of the model's own distribution, softmax(logits / temperature) over the ids that
    are not banned (temperature 1 if greedy): before penalties, top-k, top-p and min-p. It is what a policy
    gradient scores again later, and it stays finite whatever the cuts removed.

    Args:
      logits: fp32.
      keys: one per row and step (unused if greedy).
      banned: ids that are never chosen.
      history: what each row contains so far, or None if `switches.history` is False.
    """
    logits = jnp.where(banned, -jnp.inf, logits)
    if not switches.greedy:
        logits = logits / values.temperature
    log_total = jax.nn.logsumexp(logits, axis=-1)

    scores = _penalize(logits, history, switches, values) if switches.history else logits
    if switches.greedy:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        ids = None
        if switches.top_k and switches.top_k < scores.shape[-1]:
            scores, ids = jax.lax.top_k(scores, switches.top_k)
        if switches.top_p:
            scores = _keep_top_p(scores, values.top_p)
        if switches.min_p:
            floor = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(values.min_p)
            scores = jnp.where(scores < floor, -jnp.inf, scores)
        tokens = jax.vmap(jax.random.categorical)(keys, scores)
        if ids is not None:
            tokens = jnp.take_along_axis(ids, tokens[:, None], axis=-1)[:, 0]
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total


def _penalize(
    logits: Float[Array, "B V"], history: Int8[Array, "B V"], switches: Switches, values: Values
) -> Float[Array, "B V"]:
    """Penalties are meant for logits at temperature 1; these are divided by the temperature already (if any).

    The repetition penalty commutes with that division; the presence penalty is divided like the logits.
    """
    if switches.repetition:
        factor = values.repetition_penalty
        logits = jnp.where(history > 0, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    if switches.presence:
        penalty = values.presence_penalty / (1 if switches.greedy else values.temperature)
        logits = jnp.where(history == GENERATED, logits - penalty, logits)
    return logits


def _keep_top_p(scores: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Keeps the fewest most probable tokens whose probabilities reach `top_p` together; the others become -inf.

    With probabilities .5 .3 .1 .1 and top_p = .7 the threshold is .3, and .5 and .3 stay.

    Floats of one sign are ordered like their bits read as integers, so 31 halvings of the integer interval find
    the exact threshold: mass(p >= low) reaches top_p throughout, mass(p >= high) never does.
    """
    probs = jax.nn.softmax(scores, axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(probs, axis=-1, where=bits >= middle[:, None]) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(scores.shape[0], jnp.int32)
    high = jnp.max(bits, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low[:, None], scores, -jnp.inf)
