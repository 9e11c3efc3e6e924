"""Encoded samples become rows of a batch.

A row of T tokens and P patches takes several samples; segment ids keep them apart in self-attention, in PVM and, per
image or frame, in the vision tower. Nothing is ever cut: a sample that fits no row is an error that says which option
to change, unless the caller left it out beforehand.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

from pvm_jax.data.batch import Batch
from pvm_jax.data.images import DataError

PATCHES_PER_TOKEN = 4  # of Qwen3-VL: 2 x 2 patches are merged into one visual token


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One sample as the model sees it, unpadded; a text-only sample has P = 0."""

    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, "3 T"]
    visual_index: Int32[np.ndarray, " T"]  # which merged visual token stands here, -1 = text
    loss_mask: Bool[np.ndarray, " T"]  # True: this token is learned, as a target
    patches: Float32[np.ndarray, "P C"]
    patch_segment: Int32[np.ndarray, " P"]  # image or video frame, from 1
    patch_coords: Int32[np.ndarray, "P 2"]
    pos_index: Int32[np.ndarray, "P 4"]
    pos_weight: Float32[np.ndarray, "P 4"]
    next_position: int  # MRoPE position, on all three axes, of a token appended to this sample
    id: str = "?"

    def __post_init__(self) -> None:
        # Inside jit a mismatch would be silent: a gather beyond the end is clamped.
        visual = self.visual_index[self.visual_index >= 0]
        if len(visual) * PATCHES_PER_TOKEN != len(self.patches) or not np.array_equal(visual, np.arange(len(visual))):
            raise DataError(
                f"sample {self.id}: expected {len(self.patches) // PATCHES_PER_TOKEN} visual tokens in order for "
                f"{len(self.patches)} patches, got {len(visual)}; was the sample cut inside an image?"
            )


def extend(prompt: Encoded, tokens: Sequence[int] | Int32[np.ndarray, " n"], *, learn: bool = True) -> Encoded:
    """The prompt with a completion behind it, text alone; with `learn`, its tokens are targets."""
    count = len(tokens)
    following = prompt.next_position + np.arange(count, dtype=np.int32)
    return dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, np.asarray(tokens, np.int32)]),
        positions=np.concatenate([prompt.positions, np.broadcast_to(following, (3, count))], axis=1),
        visual_index=np.concatenate([prompt.visual_index, np.full(count, -1, np.int32)]),
        loss_mask=np.concatenate([np.zeros(len(prompt.tokens), bool), np.full(count, learn)]),
        next_position=prompt.next_position + count,
    )


def shift_answers(sample: Encoded, by: int) -> Encoded:
    """The sample with `by` added to the MRoPE positions of all tokens from the first learned one on.

    As if so many tokens stood between prompt and answer, without any: distances to the prompt become those of a longer
    text, while attention has no more keys than before.

        learned    -  -  x  x            shift by 10
        positions  0  1  2  3    becomes 0  1 12 13
    """
    if not sample.loss_mask.any():
        return sample
    positions = sample.positions.copy()
    positions[:, int(np.argmax(sample.loss_mask)) :] += by
    return dataclasses.replace(sample, positions=positions, next_position=sample.next_position + by)


def plan(sizes: Sequence[tuple[int, int]], length: int, patches: int) -> list[list[int]]:
    """Which samples of (tokens, patches) share a row: first fit decreasing, the same for the same sizes.

    The fullest samples, by the scarcer of the two capacities, are placed first, each into the first row that still
    takes it. Samples of a row, and rows by their first sample, keep the order they came in. Tokens alone would allow
    the last three together here, but three times 8 patches are more than 16:

        >>> plan([(6, 0), (3, 8), (5, 8), (2, 8)], length=10, patches=16)
        [[0, 1], [2, 3]]

    Args:
      sizes: each fits an empty row.
    """

    def fullness(i: int) -> tuple[float, int]:
        tokens, count = sizes[i]
        return max(tokens / length, count / max(patches, 1)), tokens

    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for i in sorted(range(len(sizes)), key=fullness, reverse=True):
        tokens, count = sizes[i]
        fitting = (r for r, (t, p) in enumerate(free) if tokens <= t and count <= p)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            free.append((length, patches))
        rows[row].append(i)
        free[row] = (free[row][0] - tokens, free[row][1] - count)
    return sorted(sorted(row) for row in rows)


def pack(
    encoded: Sequence[Encoded],
    *,
    rows: int | None = None,
    length: int,
    patches: int,
    loss_normalization: Literal["sample", "token"] = "sample",
    vision_masked: bool | Sequence[bool] = False,
) -> Batch:
    """Packs samples into `rows` rows (None: the fewest that first fit finds) of `length` tokens, `patches` patches.

    Args:
      loss_normalization: "sample": the loss weights of a sample add up to 1, however long its answer is (the paper's
        recipe: one sample a device, mean over its tokens). "token": every learned token weighs 1.
      vision_masked: of the whole batch, or one value a row.

    Raises:
      DataError: a sample is larger than a row, or the samples need more rows.
    """
    for sample in encoded:
        _check_capacity([sample], length, patches)
    planned = plan([(len(e.tokens), len(e.patches)) for e in encoded], length, patches)
    if rows is not None and len(planned) > rows:
        raise DataError(
            f"{len(encoded)} samples need {len(planned)} rows of {length} tokens and {patches} patches, "
            f"got rows = {rows}"
        )
    return collate(
        [[encoded[i] for i in row] for row in planned] + [[]] * ((rows or 0) - len(planned)),
        length=length,
        patches=patches,
        loss_normalization=loss_normalization,
        vision_masked=vision_masked,
    )


def collate(
    rows: Sequence[Sequence[Encoded]],
    *,
    length: int,
    patches: int,
    loss_normalization: Literal["sample", "token"] = "sample",
    vision_masked: bool | Sequence[bool] = False,
    channels: int | None = None,
) -> Batch:
    """The batch whose row i holds the samples rows[i], one behind the other; see `pack`, which chooses the rows.

    `channels` is C, which rows without any sample do not tell.
    """
    if patches < PATCHES_PER_TOKEN or patches % PATCHES_PER_TOKEN:
        raise DataError(f"patches: expected a positive multiple of {PATCHES_PER_TOKEN}, got {patches}")
    samples = [e for row in rows for e in row]
    if not samples and channels is None:
        raise DataError("expected at least one sample, got none")
    for row in rows:
        _check_capacity(row, length, patches)
    size, memory = len(rows), patches // PATCHES_PER_TOKEN
    channels = samples[0].patches.shape[1] if channels is None else channels
    batch = Batch(
        tokens=np.zeros((size, length), np.int32),
        positions=np.zeros((3, size, length), np.int32),
        segment_ids=np.zeros((size, length), np.int32),
        loss_weights=np.zeros((size, length), np.float32),
        visual_index=np.full((size, length), -1, np.int32),
        patches=np.zeros((size, patches, channels), np.float32),
        patch_segment_ids=np.zeros((size, patches), np.int32),
        patch_coords=np.zeros((size, patches, 2), np.int32),
        pos_index=np.zeros((size, patches, 4), np.int32),
        pos_weight=np.zeros((size, patches, 4), np.float32),
        memory_segment_ids=np.zeros((size, memory), np.int32),
        memory_index=np.full((size, memory), -1, np.int32),
        vision_masked=np.broadcast_to(np.asarray(vision_masked, bool), (size,)).copy(),
    )
    for row, samples in enumerate(rows):
        _fill_row(batch, row, samples, loss_normalization)
    return batch


def _check_capacity(row: Sequence[Encoded], length: int, patches: int) -> None:
    tokens, count = sum(len(e.tokens) for e in row), sum(len(e.patches) for e in row)
    if tokens > length or count > patches:
        names = ", ".join(e.id for e in row)
        raise DataError(
            f"sample {names}: expected at most {length} tokens and {patches} patches, got {tokens} and {count}; "
            "raise length or patches, lower max_pixels, or leave the sample out"
        )


def _fill_row(batch: Batch, row: int, samples: Sequence[Encoded], loss_normalization: str) -> None:
    token, patch, images = 0, 0, 0
    for segment, e in enumerate(samples, start=1):
        t = slice(token, token + len(e.tokens))
        p = slice(patch, patch + len(e.patches))
        m = slice(patch // PATCHES_PER_TOKEN, p.stop // PATCHES_PER_TOKEN)
        visual = e.visual_index >= 0
        batch.tokens[row, t] = e.tokens
        batch.positions[:, row, t] = e.positions
        batch.segment_ids[row, t] = segment
        batch.loss_weights[row, t] = loss_weights(e.loss_mask, loss_normalization)
        batch.visual_index[row, t] = np.where(visual, e.visual_index + m.start, -1)
        batch.patches[row, p] = e.patches
        batch.patch_segment_ids[row, p] = e.patch_segment + images
        batch.patch_coords[row, p] = e.patch_coords
        batch.pos_index[row, p] = e.pos_index
        batch.pos_weight[row, p] = e.pos_weight
        batch.memory_segment_ids[row, m] = segment
        batch.memory_index[row, m] = token + np.flatnonzero(visual)
        token, patch = t.stop, p.stop
        images += int(e.patch_segment.max(initial=0))


def loss_weights(loss_mask: Bool[np.ndarray, " T"], normalization: str) -> Float32[np.ndarray, " T"]:
    """Weight of each token as a target. The first has no token before it that could predict it and weighs 0.

    >>> loss_weights(np.array([False, False, True, True]), "sample").tolist()
    [0.0, 0.0, 0.5, 0.5]
    >>> loss_weights(np.array([True, False, True, True]), "token").tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    weights = loss_mask.astype(np.float32)
    weights[:1] = 0
    if normalization == "sample":
        return weights / np.float32(max(weights.sum(), 1))
    if normalization == "token":
        return weights
    raise DataError(f"loss_normalization: expected 'sample' or 'token', got {normalization!r}")
