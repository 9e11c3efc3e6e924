"""From prompts to what the policy made of them, and from that to rows to learn from.

All functions here give every process the same result; of a batch to learn from each process then fills its own rows.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from pvm_jax.data.packing import Encoded, collate, extend
from pvm_jax.data.placement import place
from pvm_jax.decoding import Completions, complete
from pvm_jax.decoding_weights import for_decoding
from pvm_jax.sampling import Sampling
from pvm_jax.training.policy_loss import PolicyBatch
from pvm_jax.training.rewards import Scores
from pvm_jax.training.stage import TrainingError


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

    @classmethod
    def make(cls, data: Mapping[str, Any], multiple: int) -> "Shapes":
        """From `config.data`."""
        buckets = (tuple(sorted(data[key])) for key in ("prompt_length", "length", "patches"))
        return cls(*buckets, multiple=multiple, pack=data["pack"])

    def rows(self, filled: int) -> int:
        """B of a batch to learn from of which so many rows are filled."""
        total = self.multiple
        while total < filled:
            total *= 2
        return total

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
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that lies within this rollout needs it
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, step: int, number: int, prompts: Sequence[Encoded]) -> "Rollout":
        """What `save` wrote, for a run that resumes after `step` steps, within this rollout.

        Raises:
          TrainingError: the file is not there, or damaged.
        """
        checkpoint = path.parents[1] / "checkpoints" / str(step)
        advice = f"move {checkpoint} out of its folder and start again: the run goes on from the checkpoint before it"
        if not path.is_file():
            raise TrainingError(f"{path}: expected the completions of rollout {number}, found nothing; {advice}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file}  # each has its checksum
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{path}: expected the completions of rollout {number}, and the file is damaged "
                f"({type(error).__name__}); {advice}"
            ) from error
        fields = {field.name: arrays[field.name] for field in dataclasses.fields(Completions)}
        return cls(number, prompts, Completions(**fields), **{name: arrays[name] for name in _ARRAYS})


def file(workdir: Path | None, number: int) -> Path:
    """Where a rollout is kept for a resumed run; without a workdir, under the current one."""
    return (workdir or Path()) / "rollouts" / f"{number:08d}.npz"


def forget(workdir: Path | None, iterations: int, number: int) -> None:
    """Removes the rollouts, of `iterations` steps each, that no checkpoint lies within, nor one that is being written
    or about to be; `number` stays."""
    # Orbax writes to STEP.orbax-checkpoint-tmp, which may not be there yet: that step is of the rollout before.
    names = (path.name.partition(".")[0] for path in ((workdir or Path()) / "checkpoints").glob("*"))
    saved = [int(name) for name in names if name.isdigit()]
    needed = {number, number - 1} | {step // iterations for step in saved if step % iterations}
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
    weights: str = "gathered",
) -> Completions:
    """`group` completions of each prompt; a completion is a function of weights, prompt, `key` and its number.

    Args:
      weights: see `decoding_weights.WEIGHTS`.
    """
    length = min(t for t in shapes.prompt_lengths if t >= max(len(p.tokens) for p in prompts))
    patches = min(p for p in shapes.patches if p >= max(len(e.patches) for e in prompts))
    seeds = np.random.SeedSequence(tuple(key)).generate_state(len(prompts) * group, np.uint32)
    return complete(
        for_decoding(model, weights),
        collate([[p] for p in prompts], length=length, patches=patches),
        Sampling(temperature=temperature),
        max_new_tokens=max_new_tokens,
        stop_token_ids=processor.eos_token_ids,
        banned_token_ids=processor.banned_token_ids,
        seed=[int(seed) for seed in seeds],
        samples=group,
        compact=True,
    )


def learning_batch(
    rollout: Rollout, shapes: Shapes, local_rows: Any, *, indifferent: bool = False
) -> tuple[PolicyBatch, tuple[int, ...], int]:
    """Rows to learn from, without `old` and `reference`.

    Completions that teach nothing take no room; their share of the loss's divisor is kept.

    Args:
      local_rows: number of rows -> those that this process fills, see `Share.rows`.
      indifferent: also completions with advantage 0, which teach something only where the loss has another term, or
        a divisor that depends on who is in the same micro-batch.

    Returns:
      The batch, the completions in it, row by row, and how many tokens it has that are not padding.
    """
    lengths = rollout.completions.lengths
    teaches = ~rollout.masked & (indifferent | (rollout.advantages != 0))
    kept = np.flatnonzero(teaches).tolist() or [0]
    samples = {
        i: extend(rollout.prompts[i // rollout.group], rollout.completions.tokens[i, : lengths[i]]) for i in kept
    }
    sizes = [(len(samples[i].tokens), len(samples[i].patches)) for i in kept]
    placed = place(sizes, shapes.lengths, shapes.patches, None, shapes.multiple, shapes.pack)
    rows = [[kept[at] for at in row] for row in placed.rows if row]
    total = shapes.rows(len(rows))
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


def write_samples(
    path: Path, count: int, ids: Sequence[str], texts: Sequence[str], scores: Scores, made: Completions
) -> None:
    """The first completions of a rollout and what they were rewarded with, one JSON object a line."""
    lines = []
    for i in range(min(count, len(texts))):
        line = {
            "id": ids[i],
            "completion": texts[i],
            "tokens": int(made.lengths[i]),
            "stopped": bool(made.stopped[i]),
            "reward": float(scores.total[i]),
            "rewards": {n: None if np.isnan(v[i]) else float(v[i]) for n, v in scores.by_function.items()},
        }
        extras = {name: values[i] for name, values in scores.extras.items() if len(values) == len(texts)}
        lines.append(line | {name: value for name, value in extras.items() if name not in line})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Completions may hold halves of surrogate pairs; JSON escapes them.
    partial.write_text("".join(json.dumps(line, default=_plain) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def _plain(value: Any) -> Any:
    """What a reward function logged and JSON does not know: arrays and their scalars as numbers, the rest as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
