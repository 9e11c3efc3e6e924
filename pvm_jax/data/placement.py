"""Which of the configured shapes a batch gets, and which sample goes into which of its rows."""

import dataclasses
import itertools
from collections.abc import Sequence

from pvm_jax.data.images import DataError
from pvm_jax.data.packing import PATCHES_PER_TOKEN, plan


@dataclasses.dataclass(frozen=True)
class Placement:
    """A shape [B,T] with P patches a row, and the samples of each of its B rows (by their place in the list)."""

    length: int
    patches: int
    rows: tuple[tuple[int, ...], ...]

    @property
    def cost(self) -> int:
        """Size of the batch in tokens, text and visual, padding included."""
        return len(self.rows) * (self.length + self.patches // PATCHES_PER_TOKEN)


def place(
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    patches: Sequence[int],
    rows: int | None = None,
    multiple: int = 1,
    pack: bool = True,
) -> Placement:
    """The cheapest configured shape that holds all samples; each of them must fit the largest buckets.

    Args:
      sizes: (tokens, patches) of each sample.
      lengths, patches: the buckets.
      rows: B, or None for the fewest rows, rounded up to `multiple`. Rows without a sample are empty.
      pack: False: one sample a row, in the order given.

    Raises:
      DataError: the samples need more than `rows` rows in every shape.
    """
    longest, most = (max(size[axis] for size in sizes) for axis in (0, 1))
    choices: list[Placement] = []
    fewest = len(sizes)
    for t, p in itertools.product(lengths, patches):
        if t < longest or p < most:
            continue
        placed = plan(sizes, t, p) if pack else [[i] for i in range(len(sizes))]
        fewest = min(fewest, len(placed))
        total = -(-len(placed) // multiple) * multiple if rows is None else rows
        if len(placed) <= total:
            placed += [[] for _ in range(total - len(placed))]
            choices.append(Placement(t, p, tuple(map(tuple, placed))))
    if not choices:
        raise DataError(
            f"{len(sizes)} samples ({sum(s[0] for s in sizes)} tokens, {sum(s[1] for s in sizes)} patches) need "
            f"{fewest} rows of at most {max(lengths)} tokens and {max(patches)} patches, and rows = {rows}; raise "
            "rows, length or patches, lower samples, or set rows to None"
        )
    return min(choices, key=lambda choice: choice.cost)  # the first of equals: the shortest rows
