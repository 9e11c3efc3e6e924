"""What a run says while it runs: progress bar, metrics, new shapes, and the end when a loss is not finite."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from pvm_jax.data.batch import Batch
from pvm_jax.training.metrics import Meter, MetricWriter
from pvm_jax.training.stage import StageBatch, TrainingError


class NonFiniteLoss(TrainingError):
    """A loss or gradient that is not finite; names step and samples."""


class Reporter:
    """Follows the steps of one process.

    A step's metrics are fetched while the next step runs, so that the device never waits for the host; `flush`
    waits. Speeds leave out compilation and whatever else is inside `paused`. `waiting_for_data` is the share of the
    time inside `waiting`: near 0, the batches come fast enough. What the stage did there instead of reading data, e.g.
    drawing completions, is not in it (`StageBatch.seconds`) and has a share of its own, `time/NAME`.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        stop: int,
        *,
        every: int,
        main_process: bool = True,
        sums: Mapping[str, Any] | None = None,
    ):
        """A line comes every `every` steps and after the last, `stop` (0: then alone).

        `sums` is what `sums()` gave when the checkpoint of step `start` was written.
        """
        self._writer = MetricWriter(workdir, start) if main_process else None
        self._bar = tqdm(total=stop, initial=start, unit="step", disable=None if main_process else True)
        self._meter = Meter(sums)
        self._every, self._stop = every, stop
        self._waiting: tuple[int, StageBatch, Mapping[str, Any]] | None = None
        self._shapes: set[tuple[Any, ...]] = set()
        self._tokens = self._samples = 0
        self._waited = 0.0
        self._elsewhere: Counter[str] = Counter()
        self._since = time.monotonic()

    def sums(self) -> dict[str, list[float]]:
        """The sums of the steps since the last line; call `flush` before."""
        return self._meter.sums()

    def step(self, step: int, drawn: StageBatch, metrics: Mapping[str, Any]) -> None:
        """Takes the (still running) metrics of `step`, counted from 1.

        Raises:
          NonFiniteLoss: of the step before.
        """
        self._elsewhere.update(drawn.seconds)  # before `flush`: its line counts this step's `waiting` as well
        self.flush()
        self._waiting = (step, drawn, metrics)

    def flush(self) -> None:
        """Waits for the last step and logs it.

        Raises:
          NonFiniteLoss: its loss or gradient is not finite.
        """
        if self._waiting is None:
            return
        (step, drawn, metrics), self._waiting = self._waiting, None
        metrics = dict(jax.device_get(metrics))
        if not metrics.pop("finite")[0]:
            raise NonFiniteLoss(
                f"step {step}: the loss is {metrics['loss'][0]:g} and the gradient norm {metrics['grad_norm'][0]:g}, "
                f"expected finite numbers; the step was not taken, and checkpoints are those from before it; "
                f"its {len(drawn.ids)} samples: {', '.join(drawn.ids)}"
            )
        for name, bound in drawn.bounds.items():
            value, count = metrics[name]
            if value > bound * count:
                self.say(f"warning: step {step}: {name} is {value / count:.3g}, expected at most {bound:g}")
        if drawn.label:
            metrics[f"loss/{drawn.label}"] = metrics["loss"]
        self._meter.add(drawn.metrics | metrics)  # a reward function may log any name, also `loss`
        self._tokens += drawn.tokens
        self._samples += len(drawn.ids)
        self._bar.update(step - self._bar.n)
        if due(step, self._every, self._stop):
            self._line(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values of their own, e.g. an evaluator's."""
        if self._writer:
            self._writer.write(step, values)
            self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._writer:
            self._bar.write(text)

    @contextlib.contextmanager
    def compiling(self, batch: Any) -> Iterator[None]:
        """Around the call of a compiled function: says each shape that it sees first, and how long that took."""
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        if shape in self._shapes:
            yield
            return
        self._shapes.add(shape)
        began = time.monotonic()
        with self.paused():
            yield
        self.say(f"compiled the step for {_describe(batch)} in {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the making of the next batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def close(self) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def _line(self, step: int) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        values = self._meter.take() | {
            "tokens_per_second": self._tokens / seconds,
            "samples_per_second": self._samples / seconds,
            "waiting_for_data": min(max(self._waited - self._elsewhere.total(), 0.0) / seconds, 1.0),
        }
        shares = {name: min(spent / seconds, 1.0) for name, spent in self._elsewhere.items()}
        values |= {f"time/{name}": share for name, share in shares.items()}
        self._tokens = self._samples = 0
        self._waited = 0.0
        self._elsewhere.clear()
        self._since = time.monotonic()
        if not self._writer:
            return
        self._writer.write(step, values)
        short = {"loss": f"{values.get('loss', 0):.4f}", "tokens/s": f"{values['tokens_per_second']:.0f}"}
        short |= {"padding": f"{100 * values['padding']:.0f} %"} if "padding" in values else {}
        shares = {"waiting for data": values["waiting_for_data"]} | shares
        short |= {name: f"{100 * share:.0f} %" for name, share in shares.items()}
        self._bar.set_postfix(short)
        if self._bar.disable:  # not a terminal: lines instead of a bar
            print(f"step {step}/{self._stop}  " + "  ".join(f"{k} {v}" for k, v in short.items()), flush=True)


def due(step: int, every: int, stop: int) -> bool:
    """Whether something that happens every `every` steps (0: only at the end) happens after `step`."""
    return step == stop or (every > 0 and step % every == 0)


def _describe(batch: Any) -> str:
    inner = [x for x in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Batch)) if isinstance(x, Batch)]
    if not inner:
        return str([x.shape for x in jax.tree.leaves(batch)])
    rows, length = inner[0].tokens.shape
    return f"{rows} rows of {length} tokens and {inner[0].patches.shape[1]} patches"
