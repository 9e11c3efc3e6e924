"""Which samples a step takes, in closed form: no state, so any step can be computed first."""

import bisect
from collections.abc import Sequence

import numpy as np

from pvm_jax.data.images import DataError


class Schedule:
    """Turns of streams that are active in windows of steps `(start, stop)`; `stop` may be None.

    Between two edges the set of active streams is constant and they take turns, beginning with the first:

        windows (0, None), (0, 6), (4, None)
        step    0 1 2 3 | 4 5 | 6 7 8 9
        stream  0 1 0 1 | 0 1 | 0 2 0 2
        turn    0 0 1 1 | 2 2 | 3 0 4 1       (how many turns the stream had before)
    """

    def __init__(self, windows: Sequence[tuple[int, int | None]]):
        self._windows = windows
        self._edges = sorted({0} | {edge for window in windows for edge in window if edge is not None})
        self._active = [
            [i for i, (start, stop) in enumerate(windows) if start <= first and (stop is None or first < stop)]
            for first in self._edges
        ]

    def turn(self, step: int) -> tuple[int, int]:
        """The stream of this step and how many turns it had before."""
        segment = bisect.bisect_right(self._edges, step) - 1
        if segment < 0 or not self._active[segment]:
            raise DataError(f"no data stream is active at step {step}: their (start, stop) are {self._windows}")
        active = self._active[segment]
        stream = active[(step - self._edges[segment]) % len(active)]
        return stream, self.turns(stream, step)

    def turns(self, stream: int, step: int) -> int:
        """How many turns the stream has in the steps before `step`."""
        total = 0
        for first, last, active in zip(self._edges, [*self._edges[1:], step], self._active):
            steps = min(last, step) - first
            if stream in active and steps > 0:
                total += (steps - active.index(stream) + len(active) - 1) // len(active)
        return total

    def first_step_with(self, turns: Sequence[int]) -> int:
        """The fewest steps in which every stream without a `stop` has had so many turns, and the others ended."""
        unbounded = [i for i, (_, stop) in enumerate(self._windows) if stop is None]
        if not unbounded:
            return self._edges[-1]
        most = self._edges[-1] + max(turns) * len(self._windows)
        done = bisect.bisect_left(
            range(most), True, key=lambda step: all(self.turns(i, step) >= turns[i] for i in unbounded)
        )
        return max(done, self._edges[-1])


# Generators' methods may change with numpy's version; bit generators are promised to give the same raw numbers for
# ever, and a resumed run must see the same order.
def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on the integers of `key` alone."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")


def uniform(*key: int) -> float:
    """A number in [0, 1) that depends on the integers of `key` alone."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw() / 2.0**64
