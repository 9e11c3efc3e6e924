"""From prompts to what the policy made of them, and from that to rows to learn from.

All functions here give every process the same result; of a batch to learn from each process then fills its own rows.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pvm_jax.data.packing import Encoded, collate, extend
from pvm_jax.data.placement import place
from pvm_jax.decoding import Completions, complete
from pvm_jax.sampling import Sampling
from pvm_jax.training.optim import NO_DECAY
from pvm_jax.training.policy_loss import PolicyBatch


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Buckets of the two kinds of programs. B of a batch to learn from is a power of two times `multiple`.

    Attributes:
      prompt_lengths: T of the prefill.
      lengths: T of a row to learn from, prompt and completion.
      patches: P of a row of either kind.
      multiple: rows divide by it.
      pack: several completions may share a row.
    """

    prompt_lengths: Sequence[int]
    lengths: Sequence[int]
    patches: Sequence[int]
    multiple: int = 1
    pack: bool = True

    def check(self, prompt: Encoded, max_new_tokens: int) -> str | None:
        """Why this prompt cannot be used, or None."""
        tokens, patches = len(prompt.tokens), len(prompt.patches)
        limits = (
            ("data.prompt_length", tokens, max(self.prompt_lengths)),
            ("data.patches", patches, max(self.patches)),
            ("data.length", tokens + max_new_tokens, max(self.lengths)),
        )
        for key, needed, limit in limits:
            if needed > limit:
                return f"it needs {key} of {needed}, and the largest is {limit}"
        return None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a step or several learn from; completion i answers `prompts[i // group]`."""

    number: int
    prompts: Sequence[Encoded]
    completions: Completions
    advantages: np.ndarray  # f32 [completions]
    masked: np.ndarray  # bool [completions]: they teach nothing
    weights: np.ndarray  # f32 [completions]: of each of its tokens in the loss
    counts: np.ndarray  # f32 [completions]: its share of what the loss is divided by
    old: np.ndarray | None = None  # f32 [B,T]: `PolicyBatch.old` of all rows, where several steps learn from this

    @property
    def group(self) -> int:
        return len(self.advantages) // len(self.prompts)

    def save(self, path: Path) -> None:
        """Writes all but the prompts, `old` included; another file of that name is replaced in one go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        arrays = dataclasses.asdict(self.completions) | {name: getattr(self, name) for name in _ARRAYS}
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, number: int, prompts: Sequence[Encoded]) -> "Rollout":
        with np.load(path, allow_pickle=False) as arrays:
            fields = {field.name: arrays[field.name] for field in dataclasses.fields(Completions)}
            return cls(number, prompts, Completions(**fields), **{name: arrays[name] for name in _ARRAYS})


def file(workdir: Path | None, number: int) -> Path:
    """Where a rollout is kept for a resumed run; without a workdir, under the current one."""
    return (workdir or Path()) / "rollouts" / f"{number:08d}.npz"


def forget(workdir: Path | None, iterations: int, number: int) -> None:
    """Removes the rollouts, of `iterations` steps each, that no checkpoint lies within; `number` stays."""
    checkpoints = (workdir or Path()) / "checkpoints"
    saved = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
    needed = {number} | {step // iterations for step in saved if step % iterations}
    for path in file(workdir, number).parent.glob("*.npz"):
        if int(path.stem) not in needed:
            path.unlink()


_ARRAYS = ("advantages", "masked", "weights", "counts", "old")


def draw(
    model: nnx.Module,
    processor: Any,
    prompts: Sequence[Encoded],
    group: int,
    *,
    temperature: float,
    max_new_tokens: int,
    shapes: Shapes,
    key: Sequence[int],
) -> Completions:
    """`group` completions of each prompt; a completion is a function of weights, prompt, `key` and its number."""
    length = min(t for t in shapes.prompt_lengths if t >= max(len(p.tokens) for p in prompts))
    patches = min(p for p in shapes.patches if p >= max(len(e.patches) for e in prompts))
    seeds = np.random.SeedSequence(tuple(key)).generate_state(len(prompts) * group, np.uint32)
    return complete(
        _for_decoding(model),
        collate([[p] for p in prompts], length=length, patches=patches),
        Sampling(temperature=temperature),
        max_new_tokens=max_new_tokens,
        stop_token_ids=processor.eos_token_ids,
        banned_token_ids=processor.banned_token_ids,
        seed=[int(seed) for seed in seeds],
        samples=group,
        compact=True,
    )


def _for_decoding(model: nnx.Module) -> nnx.Module:
    """The model with its matrices in the compute dtype, so that a decode step reads no more than it needs."""
    if model.dtype == np.float32:
        return model
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, _cast_matrices(params, model.dtype))


@functools.partial(jax.jit, static_argnums=1)  # of the module, so that it is compiled once and not at every rollout
def _cast_matrices(params: Any, dtype: Any) -> Any:
    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        return x if re.search(NO_DECAY, name) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def learning_batch(rollout: Rollout, shapes: Shapes, local_rows: Any) -> tuple[PolicyBatch, tuple[int, ...], int]:
    """Rows to learn from, without `old` and `reference`.

    Completions that teach nothing take no room; their share of the loss's divisor is kept.

    Args:
      local_rows: number of rows -> those that this process fills, see `Share.rows`.

    Returns:
      The batch, the completions in it, row by row, and how many tokens it has that are not padding.
    """
    lengths = rollout.completions.lengths
    kept = [i for i in range(len(lengths)) if not rollout.masked[i]] or [0]
    samples = {
        i: extend(rollout.prompts[i // rollout.group], rollout.completions.tokens[i, : lengths[i]]) for i in kept
    }
    sizes = [(len(samples[i].tokens), len(samples[i].patches)) for i in kept]
    placed = place(sizes, shapes.lengths, shapes.patches, None, shapes.multiple, shapes.pack)
    rows = [[kept[at] for at in row] for row in placed.rows if row]
    total = shapes.multiple
    while total < len(rows):
        total *= 2
    rows += [[] for _ in range(total - len(rows))]

    mine = np.asarray(local_rows(total))
    batch = collate(
        [[samples[i] for i in rows[row]] for row in mine],
        length=placed.length,
        patches=placed.patches,
        loss_normalization="token",
        channels=rollout.prompts[0].patches.shape[1],
    )
    given = {name: np.zeros(batch.tokens.shape, np.float32) for name in ("advantages", "sampled")}
    counts = np.zeros(len(mine), np.float32)
    for at, row in enumerate(mine):
        column = 0
        for i in rows[row]:
            end = column + len(samples[i].tokens)
            answer = slice(end - lengths[i], end)
            batch.loss_weights[at, answer] *= rollout.weights[i]
            given["advantages"][at, answer] = rollout.advantages[i]
            given["sampled"][at, answer] = rollout.completions.logprobs[i, : lengths[i]]
            counts[at] += rollout.counts[i]
            column = end
        if row == 0:
            counts[at] += rollout.counts.sum() - rollout.counts[[i for row in rows for i in row]].sum()
    learned = PolicyBatch(batch, **given, old=None, reference=None, counts=counts)
    return learned, tuple(i for row in rows for i in row), sum(size[0] for size in sizes)
