"""Five outcomes, and the smallest volume that is enough. All are read from one interval and a margin fixed beforehand.

``worth`` is the smallest gain that is worth having, ``alpha`` the share of studies that may claim what is not so. Both are
given before the first result. "No difference was shown" is never read as "there is none": an equivalence is claimed only if
the whole interval lies within the margin (two one-sided tests, Schuirmann 1987, doi 10.1007/BF01068419; with the two-sided
interval of level 1 - alpha each of them is done at alpha / 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dagr_ray.report.decision import ALPHA, WORTH
from dagr_ray.report.decision.estimates import Estimate, Floats, paired
from dagr_ray.report.decision.power import POWER, errors_seen
from dagr_ray.report.numbers import signed

Outcome = Literal["better", "worse", "equivalent", "more volume", "more judged queries"]
# What fewer judged queries, or fewer that changed, have not shown may well be there: an interval over them is no bound.
QUERIES, CHANGED = 30, 10
LIKELY = 0.5  # a rise by `worth` at the next rung that is as likely as not is tried, if nobody says what it is worth


@dataclass(frozen=True)
class Finding:
    """An outcome with the numbers that it stands on. ``needed`` is a number of judged queries, ``rise`` a probability."""

    outcome: Outcome
    mean: float
    low: float
    high: float
    worth: float
    queries: int
    smallest: float
    needed: int
    rise: float | None = None

    def sentence(self, what: str, other: str) -> str:
        """One plain sentence: ``what`` against ``other``.

        >>> e = Estimate(0.038, 0.004, 3583)
        >>> print(compare(e, 3584).sentence("1,000 crop queries", "the frozen base"))
        1,000 crop queries are better than the frozen base: +0.038 (+0.030 to +0.046).
        >>> print(compare(Estimate(0.004, 0.009, 224), 225).sentence("1,000 crop queries", "the frozen base"))
        1,000 crop queries against the frozen base: the test set cannot tell (+0.004, −0.014 to +0.022). 225 judged queries \
show a gain of 0.025 or more; 0.01 needs about 1,431.
        """
        change = f"{signed(self.mean)}, {signed(self.low)} to {signed(self.high)}"
        ends = f"{signed(self.low)} to {signed(self.high)}"
        if self.outcome == "better":
            return f"{what} are better than {other}: {signed(self.mean)} ({ends})."
        if self.outcome == "worse":
            return f"{what} are worse than {other}: {signed(self.mean)} ({ends})."
        if self.outcome == "equivalent":
            return f"{what} are as good as {other} to within {self.worth:g} ({change})."
        if self.outcome == "more volume":
            return (
                f"More volume: after {what} the next rung brings {self.worth:g} or more with a probability of "
                f"{self.rise:.0%} ({change} over {other})."
            )
        return (
            f"{what} against {other}: the test set cannot tell ({change}). {self.queries:,} judged queries show a gain of "
            f"{self.smallest:.3f} or more; {self.worth:g} needs about {self.needed:,}."
        )


def compare(
    gain: Estimate,
    queries: int,
    *,
    worth: float = WORTH,
    alpha: float = ALPHA,
    rise: float | None = None,
    pays: float = LIKELY,
) -> Finding:
    """What an arm is against its base, or a rung against the one before: ``gain`` over ``queries`` judged queries.

    ``alpha`` is what this comparison may spend, after its share for arms and looks. ``rise`` is the probability that the next
    rung adds ``worth`` or more (``curves``); if it is ``pays`` or higher, a rung that is not shown to be worse calls for more
    volume. Without it the outcome is one of the other four.

    >>> [compare(Estimate(m, se, 999), 1000).outcome for m, se in ((0.03, 0.01), (-0.03, 0.01), (0.0, 0.003), (0.0, 0.01))]
    ['better', 'worse', 'equivalent', 'more judged queries']
    >>> compare(Estimate(0.01, 0.003, 999), 1000, rise=0.8).outcome
    'more volume'
    """
    low, high = gain.interval(alpha)
    smallest = errors_seen(1, alpha, POWER) * gain.se
    needed = int(np.ceil(queries * (smallest / worth) ** 2))
    outcome: Outcome
    if high < 0:
        outcome = "worse"
    elif rise is not None and rise >= pays:
        outcome = "more volume"
    elif -worth < low and high < worth:
        outcome = "equivalent"
    elif low > 0:
        outcome = "better"
    else:
        outcome = "more judged queries"
    return Finding(outcome, gain.mean, low, high, worth, queries, smallest, needed, rise)


def can_rule_out(queries: int, changed: int, worth: float = WORTH) -> bool:
    """Whether queries that did not change say that nothing is there.

    Where all queries tie, as much as 3 in ``queries`` of those that were not drawn may still gain (the rule of three, Hanley
    and Lippman-Hand 1983, doi 10.1001/jama.1983.03330370053031).

    >>> can_rule_out(60, 0), can_rule_out(600, 0), can_rule_out(60, 20)
    (False, True, True)
    """
    return 3 / max(queries, 1) <= worth or (queries >= QUERIES and changed >= CHANGED)


@dataclass(frozen=True)
class Enough:
    """``at`` is the index of the smallest volume shown to be enough, None if none is. ``rest`` is what larger volumes add to it
    (the one with the highest upper end), or what they add to the last but one if none is enough."""

    at: int | None
    rest: Finding


def smallest_enough(
    volumes: list[Floats],
    *,
    worth: float = WORTH,
    alpha: float = ALPHA,
    pooled: tuple[float, int] | None = None,
    estimate: Callable[[Floats, Floats, tuple[float, int] | None], Estimate] = paired,
) -> Enough:
    """The smallest of volumes, in rising order, for which it is *shown* that no larger one that was tried adds ``worth``.

    ``volumes`` are scores ``[queries, seeds]`` of a curve's points, the frozen base first, on the same queries; two at least.
    A volume is enough if against each larger one the interval of the difference ends below ``worth`` (an intersection-union
    test, Berger 1982: no correction is needed), over queries that can rule something out. Volumes are taken
    from the last but one downwards and the first that is not
    shown ends it (a fixed sequence, Maurer, Hothorn and Lehmacher 1995), so the chance to name one that is too small is at
    most ``alpha / 2`` however many there are. Of the largest volume nothing larger is known: it is never called enough.

    >>> rng = np.random.default_rng(2)
    >>> base = rng.uniform(0, 0.8, (2_000, 1))
    >>> curve = [base, *(base + gain + rng.normal(0, 0.1, base.shape) for gain in (0.03, 0.05, 0.051))]
    >>> found = smallest_enough(curve)
    >>> found.at, found.rest.outcome
    (2, 'equivalent')
    >>> smallest_enough([b[:50] for b in curve]).at is None
    True
    """
    if len(volumes) < 2:
        raise ValueError(f"{len(volumes)} volumes; give two or more")
    at, rest = None, None
    for i in range(len(volumes) - 2, -1, -1):
        found = [
            compare(estimate(larger, volumes[i], pooled), len(larger), worth=worth, alpha=alpha)
            for larger in volumes[i + 1 :]
        ]
        worst = max(found, key=lambda each: each.high)
        rest = rest or worst
        tied = min(_changed(larger, volumes[i]) for larger in volumes[i + 1 :])
        if not worst.high < worth or not can_rule_out(worst.queries, tied, worth):
            break
        at, rest = i, worst
    assert rest is not None
    return Enough(at, rest)


def _changed(one: Floats, other: Floats) -> int:
    """Queries whose means over the seeds differ."""
    means = [side if side.ndim == 1 else side.mean(axis=1) for side in (one, other)]
    return int((np.abs(means[0] - means[1]) > 1e-9).sum())
