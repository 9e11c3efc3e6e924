"""Rows of a batch: what stands where, how samples share rows, and what is refused."""

import dataclasses

import numpy as np
import pytest
import tiny

from pvm_jax.data.images import DataError
from pvm_jax.data.packing import Encoded, collate, loss_weights, pack, plan
from pvm_jax.data.processor import Processor

NAMES = ("two_images", "short", "video", "image", "turns", "short", "text")


@pytest.fixture(scope="module")
def encoded(stock_checkpoint) -> list[Encoded]:
    processor = Processor.from_pretrained(stock_checkpoint)
    samples = tiny.conversations()
    return [processor.encode({"id": f"{i} {name}"} | samples[name]) for i, name in enumerate(NAMES)]


def sample(tokens: list[int], visual: list[int], positions: list[int], learned: list[int]) -> Encoded:
    """One image of 2 x 4 patches where `visual` counts, else text alone."""
    count = 4 * sum(v >= 0 for v in visual)
    return Encoded(
        tokens=np.array(tokens, np.int32),
        positions=np.tile(np.array(positions, np.int32), (3, 1)),
        visual_index=np.array(visual, np.int32),
        loss_mask=np.array(learned, bool),
        patches=np.ones((count, 3), np.float32),
        patch_segment=np.ones(count, np.int32),
        patch_coords=np.ones((count, 2), np.int32),
        pos_index=np.ones((count, 4), np.int32),
        pos_weight=np.ones((count, 4), np.float32),
        next_position=max(positions) + 1,
    )


def test_worked_example_of_the_batch_docstring():
    image = sample([7, 8, 8, 9, 1, 2], [-1, 0, 1, -1, -1, -1], [0, 1, 1, 3, 4, 5], [0, 0, 0, 0, 1, 1])
    text = sample([3, 4, 5], [-1, -1, -1], [0, 1, 2], [0, 1, 1])
    batch = pack([image, text], rows=1, length=10, patches=12)
    assert batch.tokens[0].tolist() == [7, 8, 8, 9, 1, 2, 3, 4, 5, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 2, 2, 2, 0]
    assert batch.visual_index[0].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, -1, -1]
    assert batch.positions[0, 0].tolist() == [0, 1, 1, 3, 4, 5, 0, 1, 2, 0]
    assert batch.memory_segment_ids[0].tolist() == [1, 1, 0]
    assert batch.memory_index[0].tolist() == [1, 2, -1]
    assert batch.loss_weights[0].tolist() == [0, 0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0]
    assert batch.patch_segment_ids[0].tolist() == [1] * 8 + [0] * 4
    assert not batch.vision_masked.any()


def test_packed_samples_are_those_of_separate_rows(encoded):
    """Every field of every sample, found again in its packed row."""
    batch = pack(encoded, length=700, patches=184)
    alone = collate([[e] for e in encoded], length=700, patches=184)
    rows = plan([(len(e.tokens), len(e.patches)) for e in encoded], 700, 184)
    assert len(rows) < len(encoded)
    assert sorted(i for row in rows for i in row) == list(range(len(encoded)))
    for row, members in enumerate(rows):
        for segment, i in enumerate(members, start=1):
            here, there = batch.segment_ids[row] == segment, alone.segment_ids[i] == 1
            for field in ("tokens", "loss_weights"):
                np.testing.assert_array_equal(getattr(batch, field)[row, here], getattr(alone, field)[i, there])
            np.testing.assert_array_equal(batch.positions[:, row, here], alone.positions[:, i, there])
            visual = batch.memory_segment_ids[row] == segment
            columns = batch.memory_index[row, visual] - np.argmax(here)
            np.testing.assert_array_equal(columns, alone.memory_index[i, alone.memory_segment_ids[i] == 1])
            patches, own = np.repeat(visual, 4), alone.patch_segment_ids[i] > 0
            for field in ("patches", "patch_coords", "pos_index", "pos_weight"):
                np.testing.assert_array_equal(getattr(batch, field)[row, patches], getattr(alone, field)[i, own])


def test_indices_of_a_row_agree_with_each_other(encoded):
    batch = pack(encoded, length=700, patches=184)
    for row in range(len(batch.tokens)):
        columns = np.flatnonzero(batch.visual_index[row] >= 0)
        np.testing.assert_array_equal(batch.visual_index[row, columns], np.arange(len(columns)))
        np.testing.assert_array_equal(batch.memory_index[row, : len(columns)], columns)
        np.testing.assert_array_equal(batch.memory_segment_ids[row, : len(columns)], batch.segment_ids[row, columns])
        assert (batch.memory_index[row, len(columns) :] == -1).all()
        assert not batch.memory_segment_ids[row, len(columns) :].any()
        images = batch.patch_segment_ids[row, : 4 * len(columns)]
        assert (np.diff(images) >= 0).all() and (np.diff(images) <= 1).all() and (images > 0).all()
        # An image or frame belongs to one sample: no segment of patches spans two.
        owner = np.repeat(batch.memory_segment_ids[row, : len(columns)], 4)
        assert all(len(set(owner[images == image])) == 1 for image in set(images.tolist()))
        assert not batch.patch_segment_ids[row, 4 * len(columns) :].any()
        assert not batch.pos_weight[row, 4 * len(columns) :].any()


@pytest.mark.parametrize("seed", range(20))
def test_plan_respects_both_capacities(seed):
    rng = np.random.default_rng(seed)
    sizes = list(zip(rng.integers(1, 101, 40).tolist(), (4 * rng.integers(0, 11, 40)).tolist()))
    rows = plan(sizes, 100, 40)
    assert sorted(i for row in rows for i in row) == list(range(40))
    assert all(sum(sizes[i][axis] for i in row) <= limit for row in rows for axis, limit in ((0, 100), (1, 40)))
    assert rows == plan(sizes, 100, 40)
    assert all(row == sorted(row) for row in rows) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    # First fit never leaves two rows that could be one.
    totals = [tuple(sum(sizes[i][axis] for i in row) for axis in (0, 1)) for row in rows]
    assert all(a[0] + b[0] > 100 or a[1] + b[1] > 40 for i, a in enumerate(totals) for b in totals[:i])


def test_plan_goes_by_the_scarcer_capacity():
    # By tokens alone the three texts would come first, and the images would need rows of their own.
    assert plan([(40, 0), (35, 0), (30, 36), (30, 36), (30, 4), (25, 4)], 100, 40) == [[0, 2, 4], [1, 3, 5]]


def test_rows_are_filled_up_with_empty_ones(encoded):
    assert pack(encoded[1:2], rows=3, length=64, patches=4).segment_ids.any(axis=1).tolist() == [True, False, False]
    with pytest.raises(DataError, match="7 samples need 3 rows of 700 tokens and 184 patches, got rows = 1"):
        pack(encoded, rows=1, length=700, patches=184)


def test_oversized_samples_are_named(encoded):
    e = encoded[0]
    tokens, patches = len(e.tokens), len(e.patches)
    message = (
        f"sample 0 two_images: expected at most {tokens - 1} tokens and {patches} patches, got {tokens} and {patches}"
    )
    with pytest.raises(DataError, match=f"^{message}; raise length or patches, lower max_pixels"):
        pack([e], length=tokens - 1, patches=patches)
    with pytest.raises(DataError, match="sample 0 two_images, 1 short: expected at most"):
        collate([[e, encoded[1]]], length=tokens, patches=patches)
    assert pack([e], length=tokens, patches=patches).tokens.shape == (1, tokens)


def test_a_sample_cut_inside_an_image_is_refused(encoded):
    e = encoded[3]
    cut = int(np.flatnonzero(e.visual_index >= 0)[-1])
    with pytest.raises(DataError, match=r"sample 3 image: expected \d+ visual tokens .* was the sample cut inside"):
        dataclasses.replace(
            e,
            tokens=e.tokens[:cut],
            positions=e.positions[:, :cut],
            visual_index=e.visual_index[:cut],
            loss_mask=e.loss_mask[:cut],
        )


def test_shapes_that_cannot_be_are_refused(encoded):
    for patches in (0, 6):
        with pytest.raises(DataError, match=f"patches: expected a positive multiple of 4, got {patches}"):
            pack(encoded[1:2], length=64, patches=patches)
    with pytest.raises(DataError, match="expected at least one sample, got none"):
        pack([], rows=2, length=64, patches=4)


@pytest.mark.parametrize("normalization", ["sample", "token"])
def test_loss_weights(encoded, normalization):
    batch = pack(encoded, length=700, patches=184, loss_normalization=normalization)
    counts = np.array([e.loss_mask[1:].sum() for e in encoded])
    expected = len(encoded) if normalization == "sample" else counts.sum()
    np.testing.assert_allclose(batch.loss_weights.sum(), expected, rtol=1e-6)
    first = np.diff(batch.segment_ids, prepend=0) != 0
    assert not batch.loss_weights[first].any()


def test_the_first_token_is_no_target():
    assert loss_weights(np.array([True, True, True]), "sample").tolist() == [0, 0.5, 0.5]
    assert loss_weights(np.array([True]), "sample").tolist() == [0]
    assert loss_weights(np.zeros(0, bool), "token").tolist() == []
    with pytest.raises(DataError, match="loss_normalization: expected 'sample' or 'token', got 'batch'"):
        loss_weights(np.array([True]), "batch")


def test_vision_masked_is_of_the_batch_or_of_rows(encoded):
    short = [encoded[1], encoded[5]]
    assert pack(short, rows=2, length=64, patches=4, vision_masked=True).vision_masked.tolist() == [True, True]
    some = pack(short, rows=2, length=64, patches=4, vision_masked=[False, True])
    assert some.vision_masked.tolist() == [False, True]
