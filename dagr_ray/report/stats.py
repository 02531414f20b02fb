"""Intervals and tests: paired bootstrap over queries, and over seeds too; paired randomisation test; Holm's correction.

The randomisation test takes queries as the sample, so its result holds for the models that were trained, not for other
seeds. If an arm was trained with several seeds, ``over_seeds`` includes the variation between seeds in an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
Floats = NDArray[np.float64]


def resampled_means(values: Floats, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Means of bootstrap samples of queries: ``[queries, systems]`` -> ``[resamples, systems]``.

    Every system sees the same samples, so differences of columns are the paired bootstrap (Efron and Tibshirani 1993;
    for retrieval, Sakai, SIGIR 2006).
    """
    queries = len(values)
    random = np.random.default_rng(seed)
    means = []
    for size in _pieces(resamples, queries):
        draws = random.integers(0, queries, (size, queries)) + np.arange(size)[:, None] * queries
        weights = np.bincount(draws.ravel(), minlength=size * queries).reshape(size, queries)
        means.append(weights @ values / queries)
    return np.concatenate(means)


def over_seeds(means: Floats, arms: Sequence[Sequence[int]], seed: int = SEED) -> Floats:
    """Resampled means of arms, each the mean of its seeds: ``[resamples, systems]`` -> ``[resamples, len(arms)]``.

    ``arms`` has the columns of each arm's seeds. Rows of ``means`` are samples of queries. Here the seeds are resampled
    too, independently of the queries: the two-way ("pigeonhole") bootstrap of Owen (2007, arXiv 0712.1111). Of S seeds,
    S - 1 are drawn, because a sample of S has only (S - 1) / S of the variance of a mean of S (Rao and Wu 1988,
    https://doi.org/10.1080/01621459.1988.10478591). Arms with the same number of seeds share the draws, as all arms share
    the samples of queries. An arm of one seed is unchanged: the variation between its seeds is unknown.
    """
    columns_of_arms = []
    for columns in arms:
        own = means[:, list(columns)]
        if len(columns) > 1:
            several = len(columns)
            random = np.random.default_rng([seed, several])
            draws = random.multinomial(several - 1, np.full(several, 1 / several), len(means))
            own = own * draws * (several / (several - 1))
        columns_of_arms.append(own.mean(axis=1))
    return np.stack(columns_of_arms, axis=1)


def interval(samples: Floats, level: float = 0.95) -> tuple[float, float]:
    """The central share ``level`` of resampled means (percentile interval)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def randomisation_p(differences: Floats, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Two-sided p of the paired randomisation test for each column of ``[queries, comparisons]``.

    The sign of each query's difference is flipped at random (Smucker, Allan and Carterette, CIKM 2007). One is added to
    both counts, so that p is never 0 (Phipson and Smyth 2010, arXiv 1603.05766): the smallest is 1 / (resamples + 1).
    """
    random = np.random.default_rng(seed)
    # Sums of the same numbers in a different order differ in the last bits.
    observed = np.abs(differences.sum(axis=0)) - 1e-9
    extreme = np.zeros(differences.shape[1])
    for size in _pieces(resamples, len(differences)):
        signs = random.integers(0, 2, (size, len(differences)), dtype=np.int8).astype(np.float64) * 2 - 1
        extreme += (np.abs(signs @ differences) >= observed).sum(axis=0)
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: p values that are valid for all comparisons together, in the given order.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _pieces(total: int, width: int) -> Iterator[int]:
    """TrialResult counts that add up to ``total``, each of at most about 2 million cells."""
    step = max(1, 2_000_000 // max(width, 1))
    for start in range(0, total, step):
        yield min(step, total - start)
