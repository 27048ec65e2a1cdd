"""Shares and means with 95 % intervals; nothing here knows what is counted or compared.

A share of examples has Wilson's interval, which lies within 0 and 1 and has a width where none or all are correct. A
mean of other numbers (over seeds; differences of two models over examples) has Student's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959964
"""z with P(|Z| <= z) = 95 % for a standard normal Z."""


@dataclass(frozen=True)
class Interval:
    """The mean of n values and the interval of their expectation; no interval for one value."""

    mean: float
    deviation: float | None
    """Of the sample, divisor n - 1."""
    low: float | None
    high: float | None
    count: int

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        ci95 = None if self.low is None else [self.low, self.high]
        return {"mean": self.mean, "ci95": ci95, "deviation": self.deviation, "count": self.count}


def wilson(successes: float, total: float, z: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); (0, 1) for no data."""
    if total == 0:
        return 0.0, 1.0
    p = successes / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval by Student's t: mean ± t(n-1) s / sqrt(n), s² with divisor n - 1.

    It rests on values that are independent and near normal. It is not cut to a range: an interval of shares may pass 1.

    Raises: ValueError for no values.
    Oracle: tests/test_compare.py::test_an_interval_by_hand
    """
    count = len(values)
    if not count:
        raise ValueError("mean_interval() got no values. Leave out what was not measured.")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_quantile((1 + CONFIDENCE) / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, deviation, mean - half, mean + half, count)


def paired_difference(values: Mapping[int, float], first: Mapping[int, float]) -> Interval | None:
    """values - first, key by key (seeds, or examples), over the keys that both have; None if there is none."""
    shared = [values[key] - first[key] for key in values if key in first]
    return mean_interval(shared) if shared else None


def paired_ratio(values: Mapping[int, float], first: Mapping[int, float]) -> dict[int, float]:
    """values / first for each seed that both have."""
    return {seed: values[seed] / first[seed] for seed in values if seed in first}


def student_quantile(probability: float, degrees: int) -> float:
    """t with P(T <= t) = probability, for 1/2 <= probability < 1 and a whole number of degrees of freedom.

    Bisects the closed form of the distribution over the angle arctan(t / sqrt(degrees)), which is bounded.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"student_quantile({probability}, {degrees}): needs 1/2 <= probability < 1 and degrees >= 1.")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # down to rounding
        middle = (low + high) / 2
        if central_probability(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= t) at the angle arctan(t / sqrt(degrees)): finite sums for whole degrees of freedom.

        odd    2/π [θ + sin θ (cos θ + 2/3 cos³θ + 2·4/(3·5) cos⁵θ + ... up to cos^(ν-2) θ)]
        even   sin θ (1 + 1/2 cos²θ + 1·3/(2·4) cos⁴θ + ... up to cos^(ν-2) θ)

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    is_odd = degrees % 2
    total, term = 0.0, math.cos(angle) if is_odd else 1.0
    for power in range(is_odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
