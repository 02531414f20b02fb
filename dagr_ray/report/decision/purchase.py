"""From curves to a purchase: how many queries of which generator, at what price, with what risk.

N* is the least volume whose gain reaches a target. It is known as a distribution, one value for each resample's curve, and
what is bought is a high quantile of it: a purchase of the point estimate fails about every third time
(Mahmood et al., Optimizing Data Collection for Machine Learning, NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dagr_ray.report.decision.curves import Curve
from dagr_ray.report.decision.estimates import Floats
from dagr_ray.report.decision.power import errors_seen
from dagr_ray.report.numbers import dollars, signed

RISK = 0.1
# A target must be this many times the smallest gain that the test set can see: below it, whoever is lucky enough to see the
# target reached buys too little in one purchase of three, whatever the quantile (benchmarks/quality/decision.py).
PRECISE = 3.0
# A purchase is advised in studies that see the target in reach, and those are the luckier ones: at the quantile 1 - risk 14 % of
# advised purchases missed their target at a risk of 10 %. So half of the risk is left for that luck.
LUCK = 2.0
Price = Callable[[float], float]  # dollars of n queries: generation, filters and training


def needed(curve: Curve, target: float) -> Floats:
    """The least of ``curve.at`` whose gain reaches the target, for each resample; infinite if none does."""
    reached = curve.drawn >= target
    return np.where(reached.any(axis=1), np.asarray(curve.at)[reached.argmax(axis=1)], np.inf)


def grid(volumes: Sequence[float], reach: float = 16.0, points: int = 80) -> list[float]:
    """Volumes to look a purchase up at: from the smallest rung to ``reach`` times the largest, geometric.

    It reaches further than the next rung: if doubtful curves were out of reach, the purchases that are advised would be those of
    lucky studies, which miss their target more often than they say.

    >>> found = grid([62, 250, 1000])
    >>> round(found[0]), round(found[-1]), len(found)
    (62, 16000, 80)
    """
    return np.geomspace(min(volumes), reach * max(volumes), points).tolist()


@dataclass(frozen=True)
class Purchase:
    """What to buy, or why nothing is bought. ``likely`` is the volume that reaches the target as likely as not: the rest of
    ``n`` is bought for the doubt. Gains per dollar are of the last step up to ``n``, and of the rung after it."""

    generator: str
    base: str
    target: float
    risk: float
    n: int | None
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0
    price: float = 0.0
    per_dollar: float = 0.0
    next_per_dollar: float = 0.0
    next_n: int = 0
    likely: int = 0
    reason: str = ""
    rates: str = ""

    def sentence(self) -> str:
        """One plain sentence.

        >>> numbers = 0.03, 0.1, 1200, 0.041, 0.031, 0.052, 1.5
        >>> print(Purchase("crop", "minilm", *numbers, likely=800, rates="$0.05 an hour").sentence())
        Buy 1,200 queries of crop for minilm: +0.041 [+0.031, +0.052] at $1.50 (at $0.05 an hour). It brings less \
than +0.030 with a probability of at most 10 %; 800 would do as likely as not.
        """
        if self.n is None:
            return f"Buy nothing of {self.generator} for {self.base} yet: {self.reason}."
        rates = f" (at {self.rates})" if self.rates else ""
        ends = f"[{signed(self.low)}, {signed(self.high)}]"
        return (
            f"Buy {self.n:,} queries of {self.generator} for {self.base}: {signed(self.gain)} {ends} at "
            f"{dollars(self.price)}{rates}. It brings less than {signed(self.target)} with a probability of at most "
            f"{100 * self.risk:g} %; {self.likely:,} would do as likely as not."
        )


def buy(
    curve: Curve,
    price: Price,
    *,
    generator: str,
    base: str,
    target: float | None = None,
    worth: float = 0.01,
    risk: float = RISK,
    alpha: float = 0.05,
    step: float = 4.0,
    rates: str = "",
) -> Purchase:
    """The purchase that misses the target with a probability of ``risk``.

    ``target`` is a gain; without it, within ``worth`` of what the last of ``curve.at`` brings, resample by resample.
    What is bought is the quantile 1 - ``risk`` / ``LUCK`` of the least volume. Nothing is bought if it is out of reach, or if
    the test set is too small for the target (``PRECISE``): then more judged queries or seeds come before more queries.
    """
    aims = curve.drawn[:, -1] - worth if target is None else np.full(len(curve.drawn), target)
    reached = curve.drawn >= aims[:, None]
    volumes = np.asarray(curve.at)
    least = np.where(reached.any(axis=1), volumes[reached.argmax(axis=1)], np.inf)
    aim = float(np.median(aims))
    safe, middle = (float(np.quantile(least, q, method="higher")) for q in (1 - risk / LUCK, 0.5))

    def nothing(reason: str) -> Purchase:
        return Purchase(generator, base, aim, risk, None, reason=reason, rates=rates)

    if not math.isfinite(safe):
        share = float(np.isinf(least).mean())
        return nothing(
            f"{signed(aim)} is out of reach below {round(curve.at[-1]):,} queries with a probability of {share:.0%}"
        )
    i = int(np.searchsorted(volumes, safe))
    own = curve.drawn[:, i]
    smallest = errors_seen(1, alpha) * float(own.std())
    if PRECISE * smallest > aim:
        more = (PRECISE * smallest / aim) ** 2 if aim > 0 else math.inf
        times = (
            f"about {more:.1f} times as many judged queries (or more seeds)"
            if math.isfinite(more)
            else "another target"
        )
        return nothing(
            f"the test set sees gains of {smallest:.3f} or more, too coarse for a target of {signed(aim)}; it needs {times}"
        )
    low, high = np.quantile(own, [0.05, 0.95])
    before, after = volumes[max(i - 1, 0)], min(safe * step, volumes[-1])
    j = int(np.searchsorted(volumes, after))
    mean = curve.drawn.mean(axis=0)
    last = (mean[i] - mean[i - 1]) / (price(safe) - price(before)) if i and price(safe) > price(before) else 0.0
    ahead = (mean[j] - mean[i]) / (price(after) - price(safe)) if price(after) > price(safe) else 0.0
    return Purchase(
        generator, base, aim, risk, math.ceil(safe), float(np.median(own)), float(low), float(high), price(safe),
        float(last), float(ahead), round(float(after)), likely=math.ceil(middle), rates=rates,
    )  # fmt: skip


def best_value(curve: Curve, price: Price, value: float) -> int:
    """The index in ``curve.at`` with the highest mean of value less price, or -1 if no volume pays.

    ``value`` is what a gain of 0.01 is worth, in dollars (cost-aware stopping: Xie et al., arXiv 2507.12453).
    """
    net = curve.drawn.mean(axis=0) / 0.01 * value - np.array([price(n) for n in curve.at])
    best = int(net.argmax())
    return best if net[best] > 0 else -1


def at_dollars(curves: Mapping[str, tuple[Curve, Price]], dollars: float) -> dict[str, tuple[float, Floats]]:
    """Each generator at the same price: the volume that ``dollars`` buy, and the gains of all resamples there.

    Curves must be of the same resamples, so that the difference of two generators' gains is a paired one. A volume beyond
    what a curve looks at is left out, because nothing is known there.
    """
    found = {}
    for name, (curve, price) in curves.items():
        costs = np.array([price(n) for n in curve.at])
        if not costs[0] <= dollars <= costs[-1]:
            continue
        n = float(np.interp(dollars, costs, curve.at))
        right = int(np.clip(np.searchsorted(curve.at, n), 1, len(curve.at) - 1))
        left = right - 1
        share = (n - curve.at[left]) / (curve.at[right] - curve.at[left])
        found[name] = (n, (1 - share) * curve.drawn[:, left] + share * curve.drawn[:, right])
    return found
