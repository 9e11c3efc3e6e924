"""Medians of alternating runs, and the memory bandwidth of the machine."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Measure = Callable[[], float]
"""Does its work once and returns seconds; what it must prepare is not in them."""


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def alternate(measures: Mapping[str, Measure], rounds: int, pause: float = 0.2) -> dict[str, float]:
    """Median seconds of each, run in turn after one round of warm-up.

    The pause lets the worker threads of the other framework, which spin for a while, go to sleep.
    """
    times: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(rounds + 1):
        for name, measure in measures.items():
            time.sleep(pause)
            seconds = measure()
            if i:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


class Parts:
    """Where the time of a step of reinforcement learning went, by run."""

    def __init__(self):
        self._runs: list[dict[str, float]] = []

    def add(self, total: float, rollout: float, rewards: float, tokens: int) -> None:
        """Seconds, and tokens generated. What is neither rollout nor rewards is the update's."""
        spent = {"total": total, "rollout": rollout, "rewards": rewards, "update": total - rollout - rewards}
        self._runs.append(spent | {"tokens": tokens, "tokens_per_second": tokens / total})

    def medians(self, rounds: int) -> dict[str, float]:
        """Of the last `rounds` runs."""
        runs = self._runs[-rounds:]
        return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def bandwidth(megabytes: int, rounds: int) -> dict[str, float]:
    """Bytes a second: `copy` counts each byte as read and written, `read` is a sum.

    The copy goes back into its own buffer: into a new one it would measure the faults of pages never touched.
    """
    read = jax.jit(jnp.sum)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = [jnp.ones((megabytes * 2**18,), jnp.float32)]
    size = x[0].nbytes

    def copied() -> jax.Array:
        x.append(copy(x.pop()))
        return x[0]

    median = alternate({"copy": lambda: clock(copied), "read": lambda: clock(lambda: read(x[0]))}, rounds)
    return {"copy": 2 * size / median["copy"], "read": size / median["read"]}
