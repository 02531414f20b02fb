"""Is what a study says true? Simulated studies whose answers are known, and each bar of the decision with its figure.

    python benchmarks/decision.py [--studies 400] [--sizes 50 100 200 500 2000 5000] [--json FILE] [--markdown FILE]

A study has five rungs (62 to 15,872 queries, four times as many each), three training seeds, and a test set. A query changes with
a probability of 0.4, and then by a skewed share that all rungs have, one of the rung, and one of the seed; paired differences
have a standard deviation of 0.15 over queries and 0.004 between seeds. Curves rise, level off, dip, are flat, or climb
by exactly what is worth having at each rung, which is the hardest case for "enough". The rules that people use stand beside.
Writes benchmarks/decision.md and exits 1 where a bar is missed by more than three standard errors of the simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dagr_ray.report.decision.crossfit import best_arm
from dagr_ray.report.decision.curves import fit_curve, forecast, resampled_gains
from dagr_ray.report.decision.estimates import paired, seed_variance
from dagr_ray.report.decision.outcomes import compare, smallest_enough
from dagr_ray.report.decision.purchase import buy, grid
from dagr_ray.report.decision.sequential import spent

Floats = NDArray[np.float64]
RUNGS = np.array([62, 248, 992, 3968, 15872])
WORTH, ALPHA, SEEDS, CHANGED, SEED_SD = 0.01, 0.05, 3, 0.4, 0.004
PASSAGES, GPL = 10_000, 250_000


def _hill(top: float, half: float, steep: float) -> Callable[[Floats], Floats]:
    return lambda n: top * n**steep / (half**steep + n**steep)


CURVES: dict[str, Callable[[Floats], Floats]] = {
    "rises": _hill(0.10, 4_000, 0.6),
    "levels off": _hill(0.05, 150, 1.2),
    "dips": lambda n: 0.05 * n / (100 + n) - 0.03 * n / (6_000 + n),
    "flat": lambda n: 0 * n,
    "edge": lambda n: WORTH * (1 + np.log(np.maximum(n, 1) / RUNGS[0]) / np.log(4)),
}


def measured(gains: Floats, queries: int, rng: np.random.Generator) -> Floats:
    """Gains over the base of one study: ``[queries, arms, seeds]``."""
    arms = len(gains)
    changed = (rng.random(queries) < CHANGED)[:, None, None]
    shared = np.where(rng.random(queries) < 1 / 6, 0.35, -0.07)[:, None, None]
    own = rng.uniform(-0.25, 0.25, (queries, arms, 1)) + rng.uniform(-0.2, 0.2, (queries, arms, SEEDS))
    return changed * ((gains[:, None] + rng.normal(0, SEED_SD, (arms, SEEDS))) / CHANGED + shared + own)


@dataclass
class Count:
    """How often something was so, of how many times it could be."""

    hits: int = 0
    of: int = 0
    values: list[float] = field(default_factory=list)

    def add(self, hit: bool) -> None:
        self.hits, self.of = self.hits + bool(hit), self.of + 1

    @property
    def share(self) -> float:
        return self.hits / self.of if self.of else float("nan")


Counts = dict[str, Count]


def looks(gains: Floats, curve: str, counts: Counts) -> None:
    """A look after each rung: "better" and "enough", with alpha spent, and as people do it."""
    true = CURVES[curve](RUNGS.astype(float))
    zero = np.zeros((len(gains), 1))
    better = enough = peeked = False
    for k in range(1, len(RUNGS) + 1):
        seen = [gains[:, i] for i in range(k)]
        pooled, alpha = seed_variance(seen), spent(ALPHA, k, len(RUNGS))
        estimate = paired(seen[-1], pooled=pooled)
        better |= compare(estimate, len(gains), alpha=alpha).low > 0
        queries_only = paired(seen[-1].mean(axis=1))
        peeked |= queries_only.interval(ALPHA)[0] > 0
        at = smallest_enough([zero, *seen], worth=WORTH, alpha=alpha, pooled=pooled).at
        # a remaining gain of exactly what is worth having counts as one
        enough |= at is not None and max(0.0, *true[:k]) - (true[at - 1] if at else 0.0) >= WORTH - 1e-12
    if curve == "flat":
        counts["better"].add(better)
        counts["better, peeking"].add(peeked)
    counts["enough"].add(enough)
    values = np.concatenate([zero, gains.mean(axis=2)], axis=1)
    largest = int(values.mean(axis=0).argmax())
    not_worse = next(
        i
        for i in range(len(RUNGS) + 1)
        if i == largest or paired(values[:, largest], values[:, i]).interval(ALPHA)[0] <= 0
    )
    truth = np.concatenate([[0.0], true])
    counts["enough, not shown worse"].add(truth.max() - truth[not_worse] >= WORTH - 1e-12)
    done = smallest_enough(
        [zero, *(gains[:, i] for i in range(len(RUNGS)))],
        pooled=seed_variance([gains[:, i] for i in range(len(RUNGS))]),
    ).at
    counts["enough, said"].add(done is not None)


def bought(gains: Floats, curve: str, counts: Counts, resamples: int) -> None:
    """The band of the largest rung, and a purchase, from the four rungs before it."""
    before = [gains[:, i] for i in range(len(RUNGS) - 1)]
    samples = resampled_gains(np.zeros(len(gains)), before, resamples)
    at = grid(RUNGS[:-1].tolist(), 4.0)
    found = fit_curve(RUNGS[:-1].tolist(), samples, at)
    low, high = forecast(found)
    came = float(gains[:, -1].mean())
    counts["band"].add(low <= came <= high)
    counts["band"].values.append(high - low)
    truth = CURVES[curve](np.array(at))
    ends = found.band(0.9)[:, -1]
    counts["band of the population"].add(ends[0] <= truth[-1] <= ends[1])
    if curve not in ("rises", "levels off"):
        return
    target = 0.9 * float(CURVES[curve](np.array([8_000.0]))[0])
    oracle = float(np.interp(target, truth, at))
    made = buy(found, lambda n: n, generator="g", base="b", target=target)
    counts["bought"].add(made.n is not None)
    if made.n is not None:
        counts["missed"].add(float(CURVES[curve](np.array([float(made.n)]))[0]) < target)
        counts["missed"].values.append(made.n / oracle)
    median = np.median(found.drawn, axis=0)
    point = at[int((median >= target).argmax())] if (median >= target).any() else at[-1]
    for name, n in (
        ("point estimate", point),
        ("last1", at[int(np.searchsorted(at, RUNGS[-2]))]),
        ("passages", PASSAGES),
        ("GPL", GPL),
    ):
        counts[f"missed, {name}"].add(float(CURVES[curve](np.array([float(n)]))[0]) < target)
        counts[f"missed, {name}"].values.append(n / oracle)


def chosen(queries: int, rng: np.random.Generator, counts: Counts) -> None:
    """The best of eight arms that are alike, or that differ."""
    for spread in (0.0, 0.01):
        true = 0.02 + spread * np.linspace(-1, 1, 8)
        gains = measured(true, queries, rng)
        best = best_arm([gains[:, i] for i in range(8)])
        low, high = best.estimate.interval(ALPHA)
        counts["best"].add(low <= true[best.arm] <= high)
        counts["best"].values.append(best.estimate.mean - true[best.arm])
        naive = paired(gains[:, best.arm])
        low, high = naive.interval(ALPHA)
        counts["best, naive"].add(low <= true[best.arm] <= high)
        counts["best, naive"].values.append(best.naive - true[best.arm])
