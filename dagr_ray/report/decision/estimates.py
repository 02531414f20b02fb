"""A paired gain with its standard error: test queries and training seeds are both samples, crossed with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom of that error."""

    mean: float
    se: float
    df: float

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """Two-sided Student interval: each side fails with a probability of ``alpha / 2``.

        >>> low, high = Estimate(0.02, 0.005, 99).interval(0.05)
        >>> round(low, 4), round(high, 4)
        (0.0101, 0.0299)
        """
        half = self.se * float(stdtrit(self.df, 1 - alpha / 2)) if self.se > 0 else 0.0
        return self.mean - half, self.mean + half

    def p(self) -> float:
        """Two-sided p value of "the mean is 0"."""
        if self.se <= 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stdtr(self.df, -abs(self.mean) / self.se))


def seed_variance(arms: Sequence[Floats]) -> tuple[float, int]:
    """Variance between the seeds' means of an arm, pooled over arms ``[queries, seeds]``, and its degrees of freedom.

    What the means of seeds differ by because of the queries' chance alone is not taken out of it: the variance component would
    be smaller, and 0 in some studies, and intervals that rest on three seeds are then too narrow (benchmarks/quality/decision.py).
    Arms of one seed say nothing: (0, 0).

    >>> value, df = seed_variance([np.array([[0.0, 0.2], [0.1, 0.3]])])
    >>> round(value, 6), df
    (0.02, 1)
    """
    several = [values for values in arms if values.shape[1] > 1]
    df = sum(values.shape[1] - 1 for values in several)
    total = sum((values.shape[1] - 1) * float(values.mean(axis=0).var(ddof=1)) for values in several)
    return (total / df, df) if df else (0.0, 0)


def paired(arm: Floats, other: Floats | None = None, pooled: tuple[float, int] | None = None) -> Estimate:
    """The mean of ``arm`` minus the mean of ``other`` over the same queries, each ``[queries, seeds]`` or ``[queries]``.

    The variance is the queries' (of the difference of the seeds' means) and, for each of the two that has several seeds, the
    variance between seeds over their number. Degrees of freedom by Satterthwaite (1946). ``pooled`` is a
    ``seed_variance`` over more arms: three seeds of one arm alone have two degrees of freedom, and so wide an interval.

    >>> e = paired(np.array([0.3, 0.5, 0.4, 0.8]), np.array([0.2, 0.5, 0.1, 0.6]))
    >>> round(e.mean, 3), round(e.se, 4), e.df
    (0.15, 0.0645, 3.0)
    """
    sides = [_columns(arm)] + ([] if other is None else [_columns(other)])
    means = [side.mean(axis=1) for side in sides]
    difference = means[0] - means[1] if other is not None else means[0]
    queries = len(difference)
    parts = [(float(difference.var(ddof=1)) / queries, queries - 1)] if queries > 1 else [(0.0, 1)]
    for side in sides:
        seeds = side.shape[1]
        if seeds > 1:
            value, df = pooled if pooled and pooled[1] else seed_variance([side])
            parts.append((value / seeds, df))
    return combined(float(difference.mean()), parts)


def combined(mean: float, parts: Sequence[tuple[float, float]]) -> Estimate:
    """An estimate whose variance is a sum of (variance, degrees of freedom) parts (Satterthwaite 1946).

    >>> combined(0.0, [(1.0, 10), (0.0, 2)]).df, round(combined(0.0, [(1.0, 10), (1.0, 10)]).df)
    (10.0, 20)
    """
    variance = sum(v for v, _ in parts)
    if variance <= 0:
        return Estimate(mean, 0.0, float(max(1, min(df for _, df in parts))))
    df = variance**2 / sum(v**2 / max(d, 1) for v, d in parts if v > 0)
    return Estimate(mean, float(np.sqrt(variance)), float(df))


def _columns(values: Floats) -> Floats:
    return values[:, None] if values.ndim == 1 else values
