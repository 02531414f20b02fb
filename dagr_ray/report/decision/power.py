"""What a test set can see, before anything is spent, and how many judged queries would be needed.

A paired difference of n queries with a standard deviation of ``spread`` has a standard error of spread / sqrt(n). A two-sided
test at level alpha / m (the first step of Holm 1979 for m arms) finds a true gain of (z(1 - alpha / 2m) + z(power)) standard
errors with the probability ``power``: 2.80 of them at 5 % and 80 % for one arm. Webber, Moffat and Zobel, CIKM 2008
(doi 10.1145/1458082.1458158); Sakai, Information Retrieval Journal 2016 (doi 10.1007/s10791-015-9273-z).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import ndtri

# The standard deviation of a query's nDCG@10 gain over the frozen base before anything is measured. The largest that a
# pre-trained base was seen to have on five shared collections (0.099 numeric, 0.126 stdlib, 0.131 cranfield,
# 0.152 squadshifts_wiki, 0.228 squadshifts_amazon: docs/results.md), rounded up; a base that is retrained more varies more.
SPREAD = 0.25
POWER = 0.8


def errors_seen(arms: int, alpha: float = 0.05, power: float = POWER) -> float:
    """The smallest gain that is seen, in standard errors.

    >>> round(errors_seen(1), 2), round(errors_seen(8), 2)
    (2.8, 3.58)
    """
    return float(ndtri(1 - alpha / (2 * max(arms, 1))) + ndtri(power))


def smallest_gain(queries: int, spread: float, arms: int = 1, alpha: float = 0.05, power: float = POWER) -> float:
    """The smallest true gain that ``queries`` judged queries show with the probability ``power``, among ``arms`` arms.

    >>> round(smallest_gain(225, 0.1305), 3), round(smallest_gain(2397, 0.152), 4)
    (0.024, 0.0087)
    """
    return errors_seen(arms, alpha, power) * spread / math.sqrt(queries) if queries > 0 else math.inf


def queries_needed(worth: float, spread: float, arms: int = 1, alpha: float = 0.05, power: float = POWER) -> int:
    """Judged queries with which a true gain of ``worth`` is shown with the probability ``power``.

    >>> queries_needed(0.01, 0.1305), queries_needed(0.01, 0.2275)
    (1337, 4063)
    """
    return math.ceil((errors_seen(arms, alpha, power) * spread / worth) ** 2)


@dataclass(frozen=True)
class Power:
    """What one test set can see for a study's arms. ``measured`` is the number of finished arms that gave the spread."""

    name: str
    queries: int
    arms: int
    spread: float
    measured: int
    worth: float
    alpha: float
    split: str = "test"

    @property
    def smallest(self) -> float:
        return smallest_gain(self.queries, self.spread, self.arms, self.alpha)

    @property
    def needed(self) -> int:
        return queries_needed(self.worth, self.spread, self.arms, self.alpha)

    def to_json(self) -> dict[str, Any]:
        """All fields, with ``smallest`` (a gain) and ``needed`` (judged queries)."""
        return {**asdict(self), "smallest": self.smallest, "needed": self.needed}

    def sentence(self) -> str:
        """One line for a terminal.

        >>> print(Power("docs", 211, 8, 0.126, 0, 0.01, 0.05).sentence())
        docs (test): 211 judged queries show a gain of 0.031 or more (80 % power, 8 arms, alpha 0.05); 0.01 needs about 2,040 \
(spread 0.126 assumed: nothing is measured yet)
        """
        arms = f"{self.arms} arm{'' if self.arms == 1 else 's'}"
        basis = (
            f"the largest of {self.measured} finished arm{'' if self.measured == 1 else 's'}"
            if self.measured
            else "assumed: nothing is measured yet"
        )
        judged = f"{self.queries:,} judged quer{'y shows' if self.queries == 1 else 'ies show'}"
        seen = f"a gain of {self.smallest:.3f} or more ({100 * POWER:g} % power, {arms}, alpha {self.alpha:g})"
        there = ", which are there" if self.needed <= self.queries else ""
        need = f"{self.worth:g} needs about {_rounded(self.needed):,}{there}"
        return f"{self.name} ({self.split}): {judged} {seen}; {need} (spread {self.spread:.3f} {basis})"


def _rounded(count: int) -> int:
    """Up to two or three digits that mean something.

    >>> _rounded(2038), _rounded(97), _rounded(14437)
    (2040, 97, 14500)
    """
    step = 10 ** max(0, len(str(count)) - 3)
    return -(-count // step) * step
