"""Agreement of two raters on grades 0 to 3, and cut points that convert a teacher's scores to such grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dagr_ray.core.tables import unit_of

GRADES = 4
FOLDS = 5
# Candidate cut points. All 45,760 ordered triples of 64 are compared by numpy in milliseconds.
CANDIDATES = 64
Cuts = tuple[float, float, float]


class Agreement(NamedTuple):
    """``confusion`` is [human grade][teacher's grade]. ``kappa`` and ``quadratic`` are NaN if chance always agrees."""

    confusion: np.ndarray
    kappa: float
    quadratic: float
    exact: float


def agreement(people: Sequence[int] | np.ndarray, teacher: Sequence[int] | np.ndarray) -> Agreement:
    """The agreement of two lists of grades for the same pairs, in the same order.

    >>> result = agreement([0, 0, 1, 3], [0, 1, 1, 3])
    >>> result.exact, round(result.kappa, 3), round(result.quadratic, 3)
    (0.75, 0.636, 0.909)
    """
    confusion = np.zeros((GRADES, GRADES), np.int64)
    np.add.at(confusion, (np.asarray(people, int), np.asarray(teacher, int)), 1)
    exact = float(np.trace(confusion) / max(confusion.sum(), 1))
    return Agreement(confusion, kappa(confusion), kappa(confusion, quadratic=True), exact)


def kappa(confusion: np.ndarray, quadratic: bool = False) -> float:
    """Cohen's kappa of a confusion table [k, k]: 1 is full agreement, 0 is chance, NaN if chance always agrees.

    Source: Cohen 1960, doi 10.1177/001316446002000104. With ``quadratic``, a disagreement is weighted by the square of
    its distance: Cohen 1968, doi 10.1037/h0026256.
    """
    return float(_kappas(confusion[None], quadratic)[0])


def _kappas(confusions: np.ndarray, quadratic: bool) -> np.ndarray:
    """Kappa of each table of [n, k, k]."""
    grades = np.arange(confusions.shape[1])
    apart = np.abs(grades[:, None] - grades[None, :])
    weights = apart**2 if quadratic else (apart > 0).astype(int)
    total = confusions.sum((1, 2))
    by_chance = np.einsum("ni,nj->nij", confusions.sum(2), confusions.sum(1))
    observed, expected = (confusions * weights).sum((1, 2)) * total, (by_chance * weights).sum((1, 2))
    return 1 - np.divide(observed, expected, out=np.full(len(total), np.nan), where=expected > 0)


def graded(scores: Sequence[float] | np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """Grades 0 to 3: the number of the three cut points that each score reaches.

    >>> graded([0.1, 0.5, 2.6], (0.5, 1.5, 2.5)).tolist()
    [0, 1, 3]
    """
    return np.searchsorted(np.asarray(cuts, np.float64), np.asarray(scores, np.float64), side="right")


def best_cuts(scores: Sequence[float] | np.ndarray, grades: Sequence[int] | np.ndarray) -> Cuts:
    """The cut points with the highest quadratic kappa between ``graded(scores, cuts)`` and human ``grades``.

    Tries all ordered triples of midpoints between neighbouring scores (of 64 spread over the scores, if there are more).
    Ties are broken by the number of equal grades, then by order. A cut above all scores means that no score earns that
    grade.

    >>> best_cuts([0.1, 0.2, 0.8, 0.9], [0, 0, 3, 3])
    (0.5, 0.5, 0.5)
    """
    order = np.argsort(np.asarray(scores, np.float64), kind="stable")
    sorted_scores, sorted_grades = np.asarray(scores, np.float64)[order], np.asarray(grades, int)[order]
    starts = np.flatnonzero(np.diff(sorted_scores, prepend=-np.inf))
    places = np.append(starts, len(sorted_scores))  # place p: the first p scores stay under the cut
    if len(places) > CANDIDATES:
        places = places[np.unique(np.linspace(0, len(places) - 1, CANDIDATES).astype(int))]
    under = np.zeros((len(sorted_scores) + 1, GRADES), np.int64)
    under[1:] = np.cumsum(np.eye(GRADES, dtype=np.int64)[sorted_grades], axis=0)
    a, b, c = np.meshgrid(*[np.arange(len(places))] * 3, indexing="ij", sparse=False)
    ordered = (a <= b) & (b <= c)
    triples = np.stack([places[a[ordered]], places[b[ordered]], places[c[ordered]]], axis=1)
    edges = np.concatenate([np.zeros((len(triples), 1), int), triples, np.full((len(triples), 1), len(under) - 1)], 1)
    confusions = np.diff(under[edges], axis=1).transpose(0, 2, 1)
    # kappa is undefined if both give the same grade to all pairs; that is full agreement
    quality = np.nan_to_num(_kappas(confusions, quadratic=True), nan=1.0).round(12)
    same = np.trace(confusions, axis1=1, axis2=2)
    best = triples[np.lexsort((-same, -quality))[0]]
    first, second, third = (_cut(sorted_scores, int(place)) for place in best)
    return first, second, third


def _cut(scores: np.ndarray, place: int) -> float:
    if place == 0:
        return float(scores[0])
    if place == len(scores):
        return float(np.nextafter(scores[-1], np.inf))
    return float((scores[place - 1] + scores[place]) / 2)


def held_out(scores: Sequence[float], grades: Sequence[int], ids: Sequence[str]) -> Agreement | None:
    """The agreement with cut points fitted on other pairs (5 folds by hash of ``ids``); None for under 20 labels.

    The agreement of ``best_cuts`` on its own labels is too optimistic; this one is the agreement to expect on new pairs.
    """
    if len(ids) < 20:
        return None
    fold_of = np.array([int(unit_of("fold", pair_id) * FOLDS) for pair_id in ids])
    values, labels = np.asarray(scores, np.float64), np.asarray(grades, int)
    predicted = np.zeros(len(ids), int)
    for fold in range(FOLDS):
        inside = fold_of == fold
        if inside.any() and not inside.all():
            predicted[inside] = graded(values[inside], best_cuts(values[~inside], labels[~inside]))
    return agreement(labels, predicted)
