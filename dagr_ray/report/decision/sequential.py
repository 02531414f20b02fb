"""Intervals that stay valid however often a person looks.

Two kinds of looking need two tools. After each rung a *new* arm is compared on the same judged queries: that is one more
hypothesis, and a share of alpha is spent on it (``spent``). When judged queries come in bit by bit, the *same* hypothesis
is looked at again with more data: ``betting_sequence`` holds at all numbers of queries together.
"""

from __future__ import annotations

import numpy as np

from dagr_ray.report.decision.estimates import Floats


def spent(alpha: float, look: int, looks: int | None = None) -> float:
    """The part of ``alpha`` that look number ``look`` (from 1) may use; all looks together use at most ``alpha``.

    Of a ladder whose number of rungs is fixed beforehand each look has an equal part. Of one without an end, look k has
    alpha / (k (k + 1)), which adds up to alpha over all k. Discrete alpha spending (Lan and DeMets 1983, Biometrika 70(3));
    the parts are added up as in Bonferroni's inequality, so it holds for any dependence between the rungs.

    >>> [spent(0.05, k, 5) for k in (1, 5)], round(sum(spent(0.05, k) for k in range(1, 10_000)), 4)
    ([0.01, 0.01], 0.05)
    """
    if look < 1 or (looks is not None and look > looks):
        raise ValueError(f"look = {look}; allowed: 1 to {looks or 'any number'}")
    return alpha / looks if looks else alpha / (look * (look + 1))


def betting_sequence(
    differences: Floats, alpha: float = 0.05, low: float = -1.0, high: float = 1.0, cells: int = 2_000
) -> tuple[Floats, Floats]:
    """Lower and upper ends ``[queries]`` of a confidence sequence for the mean of bounded differences, in the order given.

    With a probability of at least 1 - ``alpha`` the true mean lies between the ends after *every* query, so a person may look
    and stop at any time. Hedged capital with predictable plug-in bets: Waudby-Smith and Ramdas, Journal of the Royal
    Statistical Society B 86 (2024), arXiv 2010.09686, theorem 3 (bets truncated at 1/2, both sides hedged
    equally). nDCG differences lie in [-1, 1]. The mean is looked for on ``cells`` values, and each end lies one cell further
    out than the grid says. Queries must be in an order that does not depend on their values.

    >>> rng = np.random.default_rng(0)
    >>> lows, highs = betting_sequence(rng.uniform(-0.2, 0.3, 2_000))
    >>> bool(lows[-1] < 0.05 < highs[-1]), bool(highs[-1] - lows[-1] < 0.03)
    (True, True)
    """
    x = (np.asarray(differences, float) - low) / (high - low)
    if x.size and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"a difference lies outside [{low}, {high}]")
    count = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bet = np.sqrt(2 * np.log(2 / alpha) / (before * count * np.log(count + 1)))
    grid = np.linspace(0.5 / cells, 1 - 0.5 / cells, cells)
    up, down = np.zeros(cells), np.zeros(cells)
    lows, highs = np.empty(len(x)), np.empty(len(x))
    alive = np.ones(cells, bool)
    limit = np.log(1 / alpha) + np.log(2)
    for i, value in enumerate(x):
        up += np.log1p(np.minimum(bet[i], 0.5 / grid) * (value - grid))
        down += np.log1p(-np.minimum(bet[i], 0.5 / (1 - grid)) * (value - grid))
        alive &= np.maximum(up, down) < limit  # what was refuted once stays so: the intersection holds too
        inside = np.flatnonzero(alive)
        if not len(inside):  # of probability below alpha; the last ends stand
            lows[i:], highs[i:] = lows[i - 1], highs[i - 1]
            break
        lows[i] = max(0.0, grid[inside[0]] - 1 / cells)
        highs[i] = min(1.0, grid[inside[-1]] + 1 / cells)
    return low + lows * (high - low), low + highs * (high - low)
