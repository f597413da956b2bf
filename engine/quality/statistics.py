"""Means and paired differences with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and the interval that holds the true one with the confidence asked for."""

    mean: float
    low: float
    high: float

    @property
    def is_zero_outside(self) -> bool:
        """Whether the interval leaves out 0: a difference that chance does not explain."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean with Student's t interval, for values that are about normal; endless for one value.

    Raises:
        ValueError: no values, one that is not finite, or a confidence outside 0 to 1.
    """
    x = _checked(values, confidence)
    if len(x) == 1:
        return Estimate(float(x[0]), -math.inf, math.inf)
    half = t_quantile(confidence, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = float(x.mean())
    return Estimate(mean, mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean with the percentile bootstrap's interval, for values of any shape; ten or more of them.

    Raises:
        ValueError: as `mean_interval`.
    """
    x = _checked(values, confidence)
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    low, high = np.quantile(x[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(x.mean()), float(low), float(high))


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> Estimate:
    """Mean of ours - theirs over pairs that share clip and seed, with Student's t interval.

    Raises:
        ValueError: not as many of one as of the other, or as `mean_interval`.
    """
    return mean_interval(paired(ours, theirs), confidence)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours - theirs, pair by pair, for either interval.

    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"There are {len(ours)} and {len(theirs)} values; paired ones are as many as each "
            "other, in the same order."
        )
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that |Student's t| stays below with a probability, by bisection."""
    low, high = 0.0, 1.0
    while _t_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _t_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _t_probability(t: float, freedom: int) -> float:
    """P(|T| <= t), in closed form (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _checked(values: Sequence[float], confidence: float) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"The values are {values}; expected is a list of one or more finite ones.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1.")
    return x
