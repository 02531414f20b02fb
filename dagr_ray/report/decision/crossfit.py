"""The best of several arms without the winner's curse: chosen on some queries and seeds, estimated on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dagr_ray.report.decision.estimates import Estimate, Floats, combined, seed_variance


@dataclass(frozen=True)
class Best:
    """``arm`` is the best on all data; ``estimate`` its gain by cross-fitting; ``naive`` what choosing and measuring on the
    same queries would say; ``chosen`` how often each arm was the choice."""

    arm: int
    estimate: Estimate
    naive: float
    chosen: tuple[float, ...]


def best_arm(gains: Sequence[Floats], repeats: int = 50, seed: int = 0) -> Best:
    """The best of arms ``[queries, seeds]`` (gains over the same base on the same queries), each with as many seeds.

    Queries are cut in halves ``repeats`` times. An arm is chosen by its mean on one half, and by the seeds other than one
    where there are several; its gain is read on the other half, of that one seed. Every query and seed is read in each
    repetition, and the mean over them is the estimate: the repeated cross-fitting of Chernozhukov et al. 2018
    (arXiv 1608.00060, section 3.4). Its standard error is the spread of the queries' own means, and of seeds.
    It speaks of the choice as it is made with half of the queries, which is at most slightly worse than the final one.

    >>> rng = np.random.default_rng(1)
    >>> same = [rng.normal(0.02, 0.2, (200, 1)) for _ in range(8)]
    >>> best = best_arm(same)
    >>> bool(best.naive > best.estimate.mean)
    True
    """
    arms = [g[:, None] if g.ndim == 1 else g for g in gains]
    seeds = {a.shape[1] for a in arms}
    if len(seeds) != 1:
        raise ValueError(f"arms have {sorted(seeds)} seeds; give each arm as many")
    values = np.stack(arms, axis=2)  # [queries, seeds, arms]
    queries, count, _ = values.shape
    means = values.mean(axis=(0, 1))
    rng = np.random.default_rng(seed)
    read = np.zeros((queries, count))
    chosen = np.zeros(len(arms))
    # each of the two halves' sums, by one product for all repetitions
    first = np.zeros((repeats, queries), bool)
    for row in first:
        row[rng.permutation(queries)[: queries // 2]] = True
    totals = values.sum(axis=0)  # [seeds, arms]
    of_first = np.tensordot(first.astype(float), values, axes=(1, 0))  # [repeats, seeds, arms]
    for half, sums in ((~first, of_first), (first, totals - of_first)):
        for s in range(count):
            by = sums.sum(axis=1) - sums[:, s] if count > 1 else sums[:, 0]
            arm = by.argmax(axis=1)
            np.add.at(chosen, arm, 1)
            for a in np.unique(arm):
                read[:, s] += half[arm == a].sum(axis=0) * values[:, s, a]
    read /= repeats
    own = read.mean(axis=1)
    pooled, df = seed_variance(arms)
    best = values[:, :, means.argmax()].mean(axis=1)
    # one arm's chance is more than the mean of several arms', which are chosen in turn if they are alike
    parts: list[tuple[float, float]] = [(float(max(own.var(ddof=1), best.var(ddof=1))) / queries, queries - 1)]
    if df:
        parts.append((pooled / count, df))
    share = tuple((chosen / chosen.sum()).tolist())
    return Best(int(means.argmax()), combined(float(own.mean()), parts), float(means.max()), share)
