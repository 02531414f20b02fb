"""Gain over volume: families of curves through (0, 0), fitted to every resample at once; bands; what the next rung brings.

Each family is a height times a shape of one or two parameters that are not linear. By variable projection (Golub and Pereyra
1973) the height is solved for every shape on a grid, so there is no optimiser that could stop at a wrong place, and a fit of
a thousand resamples is one matrix product.

* ``hill``: G n^b / (D + n^b), the rectified scaling law (Lin et al. 2024, arXiv 2402.02314) less its value at 0; D = n50^b;
* ``pow4``: a - b (n + d)^-c with a = b d^-c, which makes it 0 at 0 (Mohr et al., LCDB; Yan et al. 2025, arXiv 2505.15657);
* ``peak``: a l + b l^2 with l = log(1 + n / d), the one that can fall again: about one learning curve in seven does (LCDB);
* ``last1``: nothing changes after the last rung, and rungs are joined by lines. Every extrapolation must beat it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dagr_ray.report.decision.estimates import Estimate, Floats
from dagr_ray.report.stats import SEED, holm, over_seeds, resampled_means

FAMILIES = ("hill", "pow4", "peak", "last1")
STEEP = np.geomspace(0.25, 4.0, 13)  # b of hill
FALL = np.geomspace(0.02, 3.0, 12)  # c of pow4; near 0 it is a logarithm
FALLS = 1 / 7  # of learning curves fall again (LCDB 1.1), and few rungs cannot tell which
PLACES = 24  # values of n50 and of d, from a tenth of the smallest rung to four times the largest


def resampled_gains(base: Floats, rungs: Sequence[Floats], resamples: int = 1_000, seed: int = SEED) -> Floats:
    """Gains of rungs over their base: ``[resamples, rungs]``. ``base`` is ``[queries]``, each rung ``[queries, seeds]``.

    Queries and seeds are resampled together and crossed (Owen 2007, arXiv 0712.1111; see ``stats.over_seeds``), with the
    same sample at all rungs, so that what rungs share is kept.
    """
    columns = np.concatenate([r if r.ndim == 2 else r[:, None] for r in rungs], axis=1) - base[:, None]
    edges = np.cumsum([0, *(1 if r.ndim == 1 else r.shape[1] for r in rungs)])
    arms = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    return over_seeds(resampled_means(columns, resamples, seed), arms, seed)


def shapes(family: str, volumes: Sequence[float], at: Sequence[float]) -> Floats:
    """Columns of every shape of a family at ``at``: ``[shapes, columns, len(at)]``. ``volumes`` are the rungs that set the grid.

    >>> shapes("hill", [10, 100], [0, 100]).shape, float(shapes("hill", [10, 100], [0.0])[0, 0, 0])
    ((312, 1, 2), 0.0)
    """
    n = np.asarray(at, float)[None, None, :]
    place = np.geomspace(min(volumes) / 10, 4 * max(volumes), PLACES)[None, :, None]
    if family == "hill":
        steep = STEEP[:, None, None]
        return (n**steep / (place**steep + n**steep)).reshape(-1, 1, len(at))
    if family == "pow4":
        return (1 - (1 + n / place) ** -FALL[:, None, None]).reshape(-1, 1, len(at))
    if family == "peak":
        log = np.log1p(n / place)[0]
        return np.stack([log, log**2], axis=1)
    raise ValueError(f"family {family!r}; allowed: {', '.join(FAMILIES)}")


def fit(family: str, volumes: Sequence[float], gains: Floats, weights: Floats, at: Sequence[float]) -> Floats:
    """The best curve of a family for each resample: ``gains [resamples, rungs]`` -> ``[resamples, len(at)]``.

    ``weights`` are one over each rung's variance. Heights may be below 0: more can harm.

    >>> true = 0.05 * np.array([50, 200, 800]) / (200 + np.array([50, 200, 800]))
    >>> float(round(fit("hill", [50, 200, 800], true[None], np.ones(3), [3_200])[0, 0], 3))
    0.047
    """
    if family == "last1":
        return gains @ _between(np.asarray(volumes, float), np.asarray(at, float))
    basis = shapes(family, volumes, volumes)
    gram = np.einsum("sik,k,sjk->sij", basis, weights, basis)
    along = np.einsum("rk,sik->rsi", gains * weights, basis)
    ridge = 1e-9 * np.einsum("sii->s", gram)[:, None, None] * np.eye(basis.shape[1])
    heights = np.einsum("sij,rsj->rsi", np.linalg.inv(gram + ridge), along)
    best = (heights * along).sum(axis=2).argmax(axis=1)  # what a shape explains of the weighted squares
    rows = np.arange(len(gains))
    return np.einsum("ri,rik->rk", heights[rows, best], shapes(family, volumes, at)[best])


def _between(volumes: Floats, at: Floats) -> Floats:
    """Weights of the rungs ``[rungs, at]``: along the logarithm between two, in proportion below the first, level at the end."""
    unit = np.eye(len(volumes))
    place = np.log(np.maximum(at, 1e-9))
    columns = np.stack([np.interp(place, np.log(volumes), row) for row in unit])
    return columns * np.minimum(1.0, at / volumes[0])


@dataclass(frozen=True)
class Curve:
    """Curves of all resamples: ``drawn [resamples, at]`` from the families by their weights; ``error`` is each family's
    root mean square error on the last rung when it was held out."""

    volumes: tuple[float, ...]
    at: tuple[float, ...]
    gains: Floats
    drawn: Floats
    error: dict[str, float]
    weight: dict[str, float]
    excess: float

    def band(self, level: float = 0.9) -> Floats:
        """``[2, at]``: the gain of the population of queries lies between with that probability."""
        return np.quantile(self.drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)

    def rise(self, worth: float) -> float:
        """The probability that the last of ``at`` is above the last rung by ``worth`` or more."""
        return float((self.drawn[:, -1] - self.gains[:, -1] >= worth).mean())


def fit_curve(
    volumes: Sequence[float], gains: Floats, at: Sequence[float], families: Sequence[str] = FAMILIES, seed: int = SEED
) -> Curve:
    """Fits each family to each resample and draws one of them for each, by how well they foretell the last rung.

    ``volumes`` rise (rows, or dollars) and do not hold 0; ``gains`` are ``resampled_gains``. The weight of a family is one over
    its mean square error on the last rung, held out (leave-last-rung-out, not R squared). Fewer than three rungs are no
    forecast: ValueError. What to report beside a fit: Li, Kudugunta and Zettlemoyer 2025, (Mis)Fitting, arXiv 2502.18969.
    """
    if len(volumes) < 3:
        raise ValueError(f"{len(volumes)} rungs; a curve needs three or more besides the frozen base")
    weights = 1 / np.maximum(gains.var(axis=0), 1e-12)
    held = {f: fit(f, volumes[:-1], gains[:, :-1], weights[:-1], volumes[-1:])[:, 0] - gains[:, -1] for f in families}
    error = {f: float(np.sqrt((e**2).mean())) for f, e in held.items()}
    means, spreads = (np.array([g(held[f]) for f in families]) for g in (np.mean, lambda e: max(np.std(e), 1e-9)))
    likelihood = -0.5 * (means / spreads) ** 2 - np.log(spreads)
    weight = np.exp(likelihood - likelihood.max())
    weight /= weight.sum()
    excess = float(np.sqrt(max(0.0, (weight * (means**2 - spreads**2)).sum())))
    drawn = np.stack([fit(f, volumes, gains, weights, at) for f in families])
    rng = np.random.default_rng(seed)
    pick = rng.choice(len(families), size=len(gains), p=weight)
    if "peak" in families:  # what fell at its last rung may go on falling, which fewer rungs could not foretell
        falling = (gains[:, -1] < gains[:, -2]) & (rng.random(len(gains)) < FALLS)
        pick[falling] = list(families).index("peak")
    chosen = drawn[pick, np.arange(len(gains))]
    # how far beyond the last rung, in steps as large as the last one
    beyond = np.clip(np.log(np.asarray(at) / volumes[-1]) / np.log(volumes[-1] / volumes[-2]), 0, None)
    chosen = chosen + rng.normal(0, excess, len(gains))[:, None] * beyond
    return Curve(
        tuple(volumes), tuple(at), gains, chosen, error, dict(zip(families, weight.tolist(), strict=True)), excess
    )


def forecast(curve: Curve, level: float = 0.9, seed: int = SEED) -> tuple[float, float]:
    """Between what the *measured* gain at the last of ``at`` will lie, on the same test queries.

    What all rungs share (these queries) is no error of such a forecast, and is taken out of each resample as the mean of its
    rungs' deviations. The new rung's own noise is put in (seeds, and queries that go another way): half of the variance of
    a step, whose two rungs have such noise each.
    """
    shared = (curve.gains - curve.gains.mean(axis=0)).mean(axis=1)
    own = np.var(np.diff(curve.gains, axis=1), axis=0).mean() / 2 * (1 + 1 / len(curve.volumes))
    noise = np.random.default_rng([seed, 1]).normal(0, np.sqrt(own), len(shared))
    low, high = np.quantile(curve.drawn[:, -1] - shared + noise, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Dip:
    """A rung at which the gain falls: from ``volumes[at - 1]`` to ``volumes[at]``, with its p value after Holm's correction."""

    at: int
    change: float
    p: float


def dips(steps: Sequence[Estimate], alpha: float = 0.05) -> list[Dip]:
    """The steps of a curve that are *shown* to fall: ``steps`` are paired differences of a rung and the one before.

    One-sided tests of each step, Holm (1979) over all of them. A curve without a shown dip is not shown to rise everywhere.

    >>> [d.at for d in dips([Estimate(0.02, 0.004, 500), Estimate(-0.02, 0.004, 500), Estimate(-0.003, 0.004, 500)])]
    [2]
    """
    one_sided = [s.p() / 2 if s.mean < 0 else 1 - s.p() / 2 for s in steps]
    corrected = holm(one_sided)
    return [Dip(i + 1, s.mean, p) for i, (s, p) in enumerate(zip(steps, corrected, strict=True)) if p < alpha]
