"""Records -> summary: scores with 95 % intervals, by label and by length; and what did not go as it should.

    summary = aggregate(task, expected_keys(benchmark.name, benchmark, task.seeds), records)
    summary["score"], summary["scores"]["accuracy"]["low"], summary["truncated"]["value"]

Every key must be there exactly once. Names of scores:

    accuracy            the share of right answers over all questions (micro)
    macro l2_category   the mean, over the values of a label, of their accuracies
    circular            MMBench: questions whose index is alike modulo 1,000,000 are one question with its options
                        rolled; it is right if all of them are
    plain               MMBench: accuracy over the questions as they were before their options were rolled
    vision              MathVerse: accuracy over the versions that need the image

A question answered under several seeds is one observation, its share of right answers; intervals are over questions,
not over records, because answers to one question are not independent. They are Wilson's with the mean share and the
number of questions: exact for one seed, too wide for several (the variance of a mean share is at most that of one
answer). The interval of a macro score adds up the variances of its groups, each group's with two right and two wrong
answers more (Agresti and Coull), so that a group of which all are right does not count as certain. `spread` is the
standard deviation over seeds (divided by n - 1): what another run may give, while the interval is about other
questions.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pvm_jax.evals.intervals import Z95, interval, percent, share
from pvm_jax.evals.protocols import Task
from pvm_jax.evals.questions import Question, Record
from pvm_jax.evals.results import ResultError

Key = tuple[str, str, int]
"""Benchmark, index, seed."""

Units = Mapping[str, Mapping[int, bool]]
"""What an interval counts (a question, or a circular group) -> seed -> whether it was right."""

LENGTHS = (0, 16, 64, 256, 1024, 4096, 16_384)
"""Where bins of answer lengths begin, in tokens."""

ROLL = 1_000_000
VISION = ("vision intensive", "vision dominant", "vision only")


def expected_keys(name: str, questions: Iterable[Question], seeds: Sequence[int]) -> set[Key]:
    """One key for each question and seed; broken questions too, since they have a record that says so."""
    return {(name, question.index, seed) for question in questions for seed in seeds}


def aggregate(task: Task, expected: Iterable[Key], records: Iterable[Record]) -> dict[str, Any]:
    """The summary of a benchmark.

    Returns:
      {"benchmark", "protocol", "version", "samples", "seeds", "metric", "score", "scores", "by", "by_length",
      "truncated", "unparsed", "broken", "unjudged", "ungraded"}. `samples` are questions. `scores` is {name: {"value",
      "low", "high", "count", "seeds": {seed: value}, "spread"}}; `metric` names the one that is `score`. `by` is
      {label: {value: share}}, `by_length` a list of shares with "from" and "to" (not included; None: no limit). The
      last five are shares of records: cut off at the limit, answered but without an answer that a rule found, not
      asked, answered but not judged, and wrong with the grader lost on the answer. Shares are those of
      `intervals.share`.

    Raises:
      ResultError: a key that is missing, there twice, or not expected.
    """
    records = sorted(records, key=lambda record: (record.index, record.seed))
    _check_keys(set(expected), [record.key for record in records])
    seeds = sorted({record.seed for record in records})
    scores = _scores(task, records, seeds)
    metric = task.headline if task.headline in scores else "accuracy"
    return {
        "benchmark": records[0].benchmark,
        "protocol": task.protocol,
        "version": task.version,
        "samples": len({record.index for record in records}),
        "seeds": seeds,
        "metric": metric,
        "score": scores[metric]["value"],
        "scores": scores,
        "by": _by_label(records),
        "by_length": _by_length(records),
        "truncated": _records_with(records, lambda r: r.finish_reason == "length"),
        "unparsed": _records_with(records, lambda r: r.completion is not None and r.answer is None and r.error is None),
        "broken": _records_with(records, lambda r: r.completion is None),
        "unjudged": _records_with(records, lambda r: r.completion is not None and r.error is not None),
        "ungraded": _records_with(records, lambda r: r.ungraded is not None),
    }


def _check_keys(expected: set[Key], found: Sequence[Key]) -> None:
    counts = Counter(found)
    for keys, what in (
        (sorted(expected - counts.keys()), "is missing; was the evaluation interrupted?"),
        (sorted(key for key, count in counts.items() if count > 1), "is there more than once"),
        (sorted(counts.keys() - expected), "belongs to no question; was it made from another file or other seeds?"),
    ):
        if keys:
            benchmark, index, seed = keys[0]
            others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ResultError(f"{benchmark}: the record of index {index!r}, seed {seed}{others} {what}")
    indices, seeds = {index for _, index, _ in expected}, {seed for _, _, seed in expected}
    if not expected or len(expected) != len(indices) * len(seeds):
        raise ResultError(
            f"expected keys of one benchmark, every question under every seed; got {len(expected)} keys of "
            f"{len(indices)} questions and {len(seeds)} seeds"
        )


def _scores(task: Task, records: Sequence[Record], seeds: Sequence[int]) -> dict[str, Any]:
    questions = _units(records)
    scores = {"accuracy": _score(questions, seeds, _accuracy)}
    for label in task.macro:
        groups = {value: _units(rows) for value, rows in _labelled(records, label).items()}
        if groups:
            scores[f"macro {label}"] = _macro_score(groups, seeds)
    if task.benchmark in ("mmbench_en", "mmbench_cn"):
        originals = {index: rights for index, rights in questions.items() if not index.isdecimal() or int(index) < ROLL}
        scores["plain"] = _score(originals, seeds, _accuracy)
        scores["circular"] = _score(_circular(questions), seeds, _accuracy)
    versions = _labelled(records, "problem_version")
    vision = [r for version, rows in versions.items() if _plain(version) in VISION for r in rows]
    if task.benchmark == "mathverse" and vision:
        scores["vision"] = _score(_units(vision), seeds, _accuracy)
    return scores


def _units(records: Iterable[Record]) -> dict[str, dict[int, bool]]:
    units: dict[str, dict[int, bool]] = defaultdict(dict)
    for record in records:
        units[record.index][record.seed] = record.right
    return dict(units)


def _circular(questions: Units) -> dict[str, dict[int, bool]]:
    """Groups of rolls; a broken row has an index that is no number and is a group of its own."""
    groups: dict[str, list[Mapping[int, bool]]] = defaultdict(list)
    for index, by_seed in questions.items():
        groups[str(int(index) % ROLL) if index.isdecimal() else index].append(by_seed)
    return {group: {seed: all(roll[seed] for roll in rolls) for seed in rolls[0]} for group, rolls in groups.items()}


def _mean_share(units: Units) -> dict[str, Any]:
    """A share over units; `right` is a whole number if every unit has one seed."""
    means = [sum(by_seed.values()) / len(by_seed) for by_seed in units.values()]
    right = math.fsum(means)
    return share(int(right) if right.is_integer() else right, len(means))


def _accuracy(units: Units) -> float:
    return _mean_share(units)["value"]


def _score(units: Units, seeds: Sequence[int], value: Callable[[Units], float]) -> dict[str, Any]:
    whole = _mean_share(units)
    values = {seed: value(_of_seed(units, seed)) for seed in seeds}
    return {name: whole[name] for name in ("value", "low", "high", "count")} | _over_seeds(values)


def _macro_score(groups: Mapping[str, Units], seeds: Sequence[int]) -> dict[str, Any]:
    def macro(of: Mapping[str, Units]) -> float:
        return math.fsum(_accuracy(units) for units in of.values()) / len(of)

    variance = 0.0
    for units in groups.values():
        count = len(units) + Z95**2
        share_of = (_accuracy(units) * len(units) + Z95**2 / 2) / count
        variance += share_of * (1 - share_of) / count / len(groups) ** 2
    value, half = macro(groups), Z95 * math.sqrt(variance)
    values = {seed: macro({name: _of_seed(units, seed) for name, units in groups.items()}) for seed in seeds}
    return {
        "value": value,
        "low": max(0.0, value - half),
        "high": min(1.0, value + half),
        "count": sum(map(len, groups.values())),
    } | _over_seeds(values)


def _of_seed(units: Units, seed: int) -> dict[str, dict[int, bool]]:
    return {unit: {seed: by_seed[seed]} for unit, by_seed in units.items()}


def _over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
    mean = math.fsum(values.values()) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values.values())
    spread = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return {"seeds": {str(seed): value for seed, value in values.items()}, "spread": spread}


def _labelled(records: Iterable[Record], label: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if value := record.question["labels"].get(label):
            groups[value].append(record)
    return dict(sorted(groups.items()))


def _by_label(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    labels = dict.fromkeys(label for record in records for label in record.question["labels"])
    return {
        label: {value: _mean_share(_units(rows)) for value, rows in _labelled(records, label).items()}
        for label in labels
    }


def _by_length(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Accuracy by the length of the answer; records without one are left out."""
    bins = []
    for low, high in zip(LENGTHS, (*LENGTHS[1:], None)):
        inside = [r for r in records if r.completion is not None and low <= r.tokens < (high or math.inf)]
        if inside:
            bins.append({"from": low, "to": high} | _mean_share(_units(inside)))
    return bins


def _records_with(records: Sequence[Record], what: Callable[[Record], bool]) -> dict[str, Any]:
    return share(sum(map(what, records)), len(records))


def _plain(version: str) -> str:
    return version.lower().replace("_", " ").replace("-", " ").strip()


# ---- Tables ------------------------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    seeds = f"{len(summary['seeds'])} seed" + ("s" if len(summary["seeds"]) > 1 else "")
    lines = [
        f"{summary['benchmark']}, {summary['protocol']} version {summary['version']}: {summary['samples']} questions, "
        f"{seeds}; with 95 % intervals"
    ]
    rows = [(_mark(name, summary), interval(s), _spread(s), str(s["count"])) for name, s in summary["scores"].items()]
    for label, values in summary["by"].items():
        rows += [(f"{label}: {value}", interval(s), "", str(s["count"])) for value, s in values.items()]
    for s in summary["by_length"]:
        to = "and more" if s["to"] is None else f"to {s['to'] - 1}"
        rows.append((f"answers of {s['from']} {to} tokens", interval(s), "", str(s["count"])))
    rows += [(name, percent(summary[name]["value"]), "", str(summary[name]["right"])) for name in _FAULTS]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, value, spread, count in rows:
        line = f"{name:<{widths[0]}}  {value:<{widths[1]}}  {spread:<{widths[2]}}  {count:>{widths[3]}}"
        lines.append(line)
    return "\n".join(lines)


_FAULTS = ("truncated", "unparsed", "broken", "unjudged", "ungraded")


def _mark(name: str, summary: Mapping[str, Any]) -> str:
    return f"* {name}" if name == summary["metric"] else f"  {name}"


def _spread(score: Mapping[str, Any]) -> str:
    return "" if score["spread"] is None else f"+-{percent(score['spread'])}"
