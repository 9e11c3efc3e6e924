"""Rewards of the digits experiment, whose right answer is a text of its own and not a number in tags."""

from collections.abc import Sequence
from typing import Any


def exact(completions: Sequence[Any], solution: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion is the solution, word for word."""
    return [float(c[-1]["content"].split() == s.split()) for c, s in zip(completions, solution, strict=True)]


def words(completions: Sequence[Any], solution: Sequence[str], **columns: Any) -> list[float]:
    """The share of words in their place, of as many as the longer of completion and solution has.

    >>> words([[{"content": "Reading Au one"}], [{"content": "Reading Au"}]], ["Reading Au two"] * 2)
    [0.6666666666666666, 0.6666666666666666]
    """
    shares = []
    for completion, right in zip(completions, solution, strict=True):
        got, wanted = completion[-1]["content"].split(), right.split()
        matches = sum(a == b for a, b in zip(got, wanted))
        shares.append(matches / max(len(got), len(wanted), 1))
    return shares
