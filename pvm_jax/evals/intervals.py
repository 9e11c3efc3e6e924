"""Shares and means with their 95 % intervals."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

Z95 = 1.959964


def wilson(right: int | float, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share: never outside [0, 1], sensible at 0 and 1 (unlike the normal interval).

    With 8 of 10 right: (0.490, 0.943); with 10 of 10: (0.722, 1.0).
    """
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def share(right: int | float, count: int) -> dict[str, Any]:
    """A share as it stands in result files; without observations its value is None. `right` may be a sum of shares."""
    low, high = wilson(right, count)
    return {"right": right, "count": count, "value": right / count if count else None, "low": low, "high": high}


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its interval of 95 % (Student's, for independent values); None with fewer than two."""

    value: float
    low: float | None
    high: float | None
    count: int


def mean(values: Sequence[float]) -> Mean | None:
    """None without values. Of 0.90, 0.92 and 0.94: 0.92, and 4.303 * 0.02 / sqrt(3) = 0.0497 to either side."""
    if not values:
        return None
    count, value = len(values), statistics.fmean(values)
    if count == 1:
        return Mean(value, None, None, 1)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return Mean(value, value - half, value + half, count)


def percent(value: float | None) -> str:
    """A share as tables print it, `67.3 %`."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(score: Mapping[str, Any] | None) -> str:
    """A share with its interval, `67.3 % (64.1-70.4)`."""
    if score is None or score["value"] is None:
        return "-"
    return f"{percent(score['value'])} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"
