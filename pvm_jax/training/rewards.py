"""Rewards: plain functions of completions and columns, as TRL's are, so that a project brings its own.

    def short(completions, **columns):                                # mine/rewards.py
        return [float(len(c[0]["content"]) < 4000) for c in completions]

    rewards = Rewards([("pvm_jax.training.rewards:format_reward", 0.1),
                       ("pvm_jax.training.rewards:accuracy_reward", 0.9),
                       ("mine.rewards:short", 0.05)])
    scores = rewards(texts, columns, ids=ids, prompts=prompts, completion_ids=token_ids, step=step)
    scores.total                                                      # f64 [completions], the weighted sums

A function gets, as keywords: `completions`, each a list of one message as TRL has them for chat prompts; `prompts`
(messages); `completion_ids` (token ids); every column of the data set, one entry for each completion; `trainer_state`
with its `global_step`; `log_metric(name, value)` and `log_extra(column, values)`. One that declares no `**columns` gets
what it names. It returns a number for each completion; None means that it has nothing to say about that one. It may
take its time, and the run waits for it (and says so): what may hang belongs into a process that can be killed, as
`pvm_jax/grading.py` has one.

The two rewards of the public PVM release are here. `format_reward` asks for thinking and answer in tags,
`accuracy_reward` for the right answer; the release weighs them 0.1 and 0.9. Which answers count as right, and where
that differs from the release, is in `pvm_jax/grading.py`.
"""

import contextlib
import dataclasses
import inspect
import math
import numbers
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float64

from pvm_jax import cli
from pvm_jax.answers import final_answer
from pvm_jax.grading import REASONS, Grader, GradingError
from pvm_jax.training.stage import Fraction, TrainingError

ON_ERROR = ("error", "zero")
RewardFunction = Callable[..., Sequence[float | None]]

_THINKING = "<think>"
_BETWEEN = re.compile(r"</think>\s*<answer>")
_END = "</answer>"
_PATIENCE = 60.0  # seconds, after which a reward function that still runs is named
_LARGEST = float(np.finfo(np.float32).max)  # advantages are float32
_GRADER = Grader()  # starts nothing before there is something to grade


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for `<think>...</think> <answer>...</answer>` and nothing around it but space at the end, else 0.

    Says what the release's expression `^<think>.*?</think>\\s*<answer>.*?</answer>\\s*$` says, a dot being any
    character, but in linear time: backtracking is quadratic in the number of closing tags, and a completion may have
    thousands of them.
    """
    return [float(_well_formed(_text(completion))) for completion in completions]


def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """1 where the last `<answer>` equals the solution, else 0.

    Logs, for every reason of `grading.REASONS`, the share of answers that were decided by it.
    """
    verdicts = _GRADER.grade([final_answer(_text(completion)) for completion in completions], list(solution))
    if log_metric and verdicts:
        for reason in REASONS:
            log_metric(f"graded/{reason}", sum(verdict.reason == reason for verdict in verdicts) / len(verdicts))
    return [float(verdict.correct) for verdict in verdicts]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the reward functions said about completions."""

    total: Float64[np.ndarray, " completions"]
    """Weighted sums; a function without an opinion adds nothing."""
    by_function: dict[str, Float64[np.ndarray, " completions"]]
    """Before the weights; NaN: no opinion."""
    metrics: dict[str, Fraction]
    """`reward/NAME` and `reward_errors/NAME` for every function, and what functions logged, as (sum, count)."""
    extras: dict[str, list[Any]]
    """Columns that functions logged with `log_extra`, for the table of sample completions."""


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """The one part of TRL's argument of this name that there is here."""

    global_step: int


class Rewards:
    """Weighted reward functions, and what to do when one of them fails.

    Args:
      functions: ("module:function", or the function, and its weight), in order.
      on_error: what follows when a function raises, or does not return a finite number for each completion. "error":
        the run ends with a sentence that names function and row. "zero": the row counts as 0 for that function, and in
        the metric `reward_errors/NAME`.

    Raises:
      TrainingError: no such module or function, or a weight that is no number.
    """

    def __init__(self, functions: Sequence[Any], on_error: str = "error"):
        if on_error not in ON_ERROR:
            raise TrainingError(f"reward_errors: expected one of {', '.join(ON_ERROR)}; got {on_error!r}")
        if not functions:
            raise TrainingError("rewards: expected pairs of a function (as 'module:function') and its weight, got none")
        self._zero = on_error == "zero"
        self._functions: dict[str, tuple[RewardFunction, float]] = {}
        for entry in functions:
            if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
                raise TrainingError(
                    f"rewards: expected pairs such as (('module:function', 1.0),), got {functions!r}; one pair alone "
                    "needs the comma behind it"
                )
            given, weight = entry
            name, function = _named(given)
            if not _is_finite(weight):
                raise TrainingError(f"rewards: expected a finite weight for {name}, got {weight!r}")
            if name in self._functions:
                raise TrainingError(f"rewards: two functions are called {name!r}; give one of them another name")
            self._functions[name] = function, float(weight)

    def check(self) -> None:
        """Before anything is drawn: whether the functions of this module find what they need.

        Raises:
          GradingError: the grader cannot work at all.
        """
        if any(function is accuracy_reward for function, _ in self._functions.values()):
            _GRADER.grade(["x+1"], ["1+x"])  # by algebra; its child stays for the first completions

    def __call__(
        self,
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        ids: Sequence[str],
        prompts: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        step: int = 0,
    ) -> Scores:
        """The scores of completions; all sequences are as long as `completions`.

        Args:
          columns: of the data set (`pvm_jax.data.prompts.reward_columns`); names that are arguments here are left out.
          ids: name the rows in messages.

        Raises:
          TrainingError: a function asks for a column that is not there, or fails and `on_error` is "error".
          GradingError: the grader cannot work at all.
        """
        rows = {
            **columns,
            "prompts": [None] * len(completions) if prompts is None else list(prompts),
            "completions": [[{"role": "assistant", "content": text}] for text in completions],
            "completion_ids": [[]] * len(completions) if completion_ids is None else list(completion_ids),
        }
        total = np.zeros(len(completions))
        scores = Scores(total, {}, {}, {})
        for name, (function, weight) in self._functions.items():
            call = _Call(name, function, rows, ids, step, self._zero)
            values = call.values()
            said = ~np.isnan(values)
            total += weight * np.where(said, values, 0.0)
            scores.by_function[name] = values
            scores.metrics[f"reward/{name}"] = float(values[said].sum()), int(said.sum())
            scores.metrics[f"reward_errors/{name}"] = call.failed, len(values)
            scores.metrics.update(call.metrics)
            scores.extras.update(call.extras)
        return scores


class _Call:
    """One function on one list of completions."""

    def __init__(self, name: str, function: RewardFunction, rows: dict, ids: Sequence[str], step: int, zero: bool):
        self._name, self._function, self._rows, self._ids, self._zero = name, function, rows, ids, zero
        self._more = {"trainer_state": TrainerState(step), "log_metric": self._metric, "log_extra": self._extra}
        self.metrics: dict[str, Fraction] = {}
        self.extras: dict[str, list[Any]] = {}
        self.failed = 0
        self._check_arguments()

    def values(self) -> np.ndarray:
        """f64 [completions]; NaN where the function returned None."""
        try:
            returned = self._ask(range(len(self._ids)))
        except GradingError:
            raise
        except (Exception, SystemExit) as error:  # the function is the user's: it may raise anything
            return self._one_by_one(error)
        if isinstance(returned, np.ndarray):
            returned = returned.tolist()
        if not isinstance(returned, Sequence) or isinstance(returned, str):
            return self._all_failed(f"returned {_shown(returned)}; expected a list of {len(self._ids)} numbers")
        if len(returned) != len(self._ids):
            return self._all_failed(f"returned {len(returned)} rewards for {len(self._ids)} completions")
        return np.array([self._checked(value, self._ids[i]) for i, value in enumerate(returned)], np.float64)

    def _ask(self, chosen: Sequence[int]) -> Any:
        rows = {name: [values[i] for i in chosen] for name, values in self._rows.items()}
        arguments = rows | self._more
        if self._named is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._named}
        with _named_if_slow(self._name):
            return self._function(**arguments)

    def _one_by_one(self, error: BaseException) -> np.ndarray:
        """After the function raised: once more for each row alone, so that only the rows at fault are lost."""
        values = np.zeros(len(self._ids))
        self.metrics.clear()  # what it logged before it raised
        self.extras.clear()
        before = self.failed
        for i, row in enumerate(self._ids):
            try:
                (value,) = self._ask([i])
            except (Exception, SystemExit) as alone:
                self._fail(f"raised {_shown(alone)} on row {row}", alone)
            else:
                values[i] = self._checked(value, row)
        if self.failed == before:  # the rows are good one by one: the function needs correcting, not the data
            return self._all_failed(f"raised {_shown(error)} on all rows together and on none of them alone", error)
        return values

    def _checked(self, value: Any, row: str) -> float:
        if value is None:
            return math.nan
        if _is_finite(value):
            return float(value)
        self._fail(f"returned {_shown(value)} for row {row}; expected a finite number, or None for no opinion")
        return 0.0

    def _all_failed(self, what: str, cause: BaseException | None = None) -> np.ndarray:
        span = self._ids[0] if len(self._ids) == 1 else f"{self._ids[0]} to {self._ids[-1]}"
        self._fail(f"{what} (rows {span})", cause, len(self._ids))
        return np.zeros(len(self._ids))

    def _fail(self, what: str, cause: BaseException | None = None, rows: int = 1) -> None:
        if not self._zero:
            raise TrainingError(
                f"the reward function {self._name} {what}; correct it, or count such rows as 0 with "
                "reward_errors='zero'"
            ) from cause
        self.failed += rows

    def _check_arguments(self) -> None:
        """Which arguments the function can take; a column that it needs and that is not there ends the run."""
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError:  # written in C, without a signature
            parameters = ()
        takes_all = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = None if takes_all else {p.name for p in parameters}
        known = self._rows.keys() | self._more.keys()
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if missing := [name for name in needed if name not in known]:
            raise TrainingError(
                f"the reward function {self._name} needs {', '.join(missing)}, and the rows have "
                f"{', '.join(sorted(self._rows))}; rename a column of the data, or give the argument a default"
            )

    def _metric(self, name: str, value: float) -> None:
        sum_, count = self.metrics.get(name, (0.0, 0))
        self.metrics[name] = sum_ + float(value), count + 1

    def _extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras.setdefault(column, []).extend(values)


def _well_formed(text: str) -> bool:
    text = text.rstrip()
    return text.startswith(_THINKING) and text.endswith(_END) and bool(_BETWEEN.search(text, len(_THINKING)))


def _text(completion: Any) -> str:
    """The text of a completion, which is a string or TRL's list of one message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _named(given: str | RewardFunction) -> tuple[str, RewardFunction]:
    """Name and function of an entry of the configuration."""
    if not isinstance(given, str):
        return getattr(given, "__name__", type(given).__name__), given
    module, _, name = given.partition(":")
    if not module or not name:
        raise TrainingError(f"rewards: expected 'module:function', got {given!r}")
    found = cli.plug_in(module, "rewards", TrainingError)
    if not hasattr(found, name):
        raise TrainingError(f"rewards: the module {module!r} has no function {name!r}")
    function = getattr(found, name)
    if not callable(function):
        raise TrainingError(f"rewards: expected 'module:function', got {given!r}")
    return name, function


@contextlib.contextmanager
def _named_if_slow(name: str) -> Iterator[None]:
    """Around the call of a reward function: it may hang, and nobody else would say what the run waits for."""
    timer = threading.Timer(
        _PATIENCE, logging.warning, ("the reward function %s has been running for %.0f s", name, _PATIENCE)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_finite(value: Any) -> bool:
    """Whether this is a number that float32 can hold."""
    try:
        return isinstance(value, numbers.Real | np.bool_) and abs(float(value)) <= _LARGEST
    except OverflowError:  # an int or a fraction
        return False


def _shown(value: Any) -> str:
    if isinstance(value, BaseException):
        return f"{type(value).__name__} ({value!s:.120})"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "an integer beyond float32"  # Python refuses to print some
    return f"{value!r:.60}" if isinstance(value, numbers.Real | str) else f"a {type(value).__name__}"
