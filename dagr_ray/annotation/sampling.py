"""Active sampling: the (query, passage) pairs that a person should rate first, with the reason for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.retrieval.encoder import Encoder, encode, load

PairId = tuple[str, str]  # query id, passage id
Cuts = tuple[float, ...]
REASONS = {
    "disagree": "teachers disagree",
    "threshold": "score near the threshold",
    "region": "new region of the queries",
    "random": "random sample",
}
# The most queries that are encoded to find new regions.
REGION_POOL = 20_000


@dataclass
class PairPool:
    """Pairs in the order of a hash, so that ties do not depend on the order of the folders.

    ``scores`` maps a teacher to float64 [pairs], NaN for pairs that it did not score. ``claimed`` are the pairs that
    ``qrels`` label as relevant.
    """

    ids: list[PairId] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    claimed: set[PairId] = field(default_factory=set)


def pairs_of(folders: Sequence[Artifact]) -> PairPool:
    """The pairs that teachers scored in ``folders`` (tables ``scores``), and the pairs of ``qrels`` in the others.

    Raises ConfigError if a folder is not complete or has neither table.
    """
    known: dict[PairId, None] = {}
    scores_of: dict[str, dict[PairId, float]] = {}
    claimed: set[PairId] = set()
    for folder in sorted(folders, key=lambda folder: folder.name):
        if folder.manifest is None:
            raise ConfigError(f"{folder.name} is not complete; run its job again to finish it")
        names = folder.table_names()
        judged = [name for name in names if name.split(".")[0] == "qrels"]
        if "scores" not in names and not judged:
            raise ConfigError(
                f"{folder.name} has neither scores nor qrels; give folders of label, parse, select or beir"
            )
        for name in judged:
            rows = folder.read(name).to_pylist()
            claimed |= {(row["query_id"], row["doc_id"]) for row in rows if row["relevance"] > 0}
            known |= dict.fromkeys((row["query_id"], row["doc_id"]) for row in rows)
        in_folder: dict[str, dict[PairId, float]] = {}
        for part in folder.scan("scores") if "scores" in names else ():
            for row in part.to_pylist():
                in_folder.setdefault(row["scorer"], {})[row["query_id"], row["doc_id"]] = row["score"]
        for scorer, values in in_folder.items():
            # two folders of one teacher differ in its fields, and therefore in its scores
            scores_of[f"{scorer} ({folder.name[-12:]})" if scorer in scores_of else scorer] = values
            known |= dict.fromkeys(values)
    ids = sorted(known, key=lambda pair: (tables.unit_of("annotate", *pair), pair))
    scores = {s: np.array([scores_of[s].get(pair, math.nan) for pair in ids], np.float64) for s in sorted(scores_of)}
    return PairPool(ids, scores, claimed)


def percentiles(scores: np.ndarray) -> np.ndarray:
    """The percentile of each of a teacher's scores, ties in the middle. Percentiles compare between teachers.

    >>> percentiles(np.array([10.0, 30.0, 30.0, np.nan])).round(3).tolist()
    [0.167, 0.667, 0.667, nan]
    """
    present = ~np.isnan(scores)
    percentile = np.full(len(scores), np.nan)
    if present.any():
        _, positions, counts = np.unique(scores[present], return_inverse=True, return_counts=True)
        percentile[present] = ((np.cumsum(counts) - counts / 2) / present.sum())[positions]
    return percentile


def _disagreements(pairs: PairPool) -> Iterator[tuple[int, str]]:
    if len(pairs.scores) < 2:
        return
    names, ranks = list(pairs.scores), np.stack([percentiles(scores) for scores in pairs.scores.values()])
    spread = np.where(np.isnan(ranks), -np.inf, ranks).max(0) - np.where(np.isnan(ranks), np.inf, ranks).min(0)
    spread[(~np.isnan(ranks)).sum(0) < 2] = 0
    for i in np.argsort(-spread, kind="stable"):
        if spread[i] <= 0:
            return
        low, high = int(np.nanargmin(ranks[:, i])), int(np.nanargmax(ranks[:, i]))
        under, over = (f"{names[t]} above {ranks[t, i]:.0%} of pairs" for t in (low, high))
        yield int(i), f"{under}, {over}"


def _near(pairs: PairPool, thresholds: Mapping[str, Cuts]) -> Iterator[tuple[int, str]]:
    if not thresholds:
        return
    names = sorted(thresholds)
    near = np.stack([_distance(pairs.scores[name], thresholds[name]) for name in names])
    best, by = near.min(0), near.argmin(0)
    for i in np.argsort(best, kind="stable"):
        if not math.isfinite(best[i]):
            return
        name = names[by[i]]
        score = float(pairs.scores[name][i])
        cut = min(thresholds[name], key=lambda cut: abs(cut - score))
        yield int(i), f"{name} gives {score:.4g}, and its threshold is {cut:.4g}"


def _distance(scores: np.ndarray, cuts: Cuts) -> np.ndarray:
    """The distance of each score to the nearest cut point, in standard deviations; infinite without a score."""
    apart = np.abs(scores[:, None] - np.asarray(cuts, np.float64)[None, :]).min(1)
    return np.nan_to_num(apart / (float(np.nanstd(scores)) or 1.0), nan=np.inf)


def farthest_first(vectors: np.ndarray, seen: int = 0) -> Iterator[tuple[int, float]]:
    """(row, cosine to the nearest earlier row) of unit vectors [n, dimension], always the farthest row next.

    The first ``seen`` rows count as selected and are not yielded. Greedy solution of the k-centre problem with at most
    twice the optimal radius: Gonzalez 1985, doi 10.1016/0304-3975(85)90224-5. Ends when only duplicates remain.
    """
    nearest = np.full(len(vectors), -1.0)
    for row in range(seen):
        np.maximum(nearest, vectors @ vectors[row], out=nearest)
    while len(vectors) > seen:
        row = seen + int(nearest[seen:].argmin())
        if nearest[row] > 1 - 1e-5:
            return
        yield row, float(nearest[row])
        np.maximum(nearest, vectors @ vectors[row], out=nearest)


def _new_regions(
    pairs: PairPool, texts: Mapping[str, str], encoder: Encoder, rated: set[PairId]
) -> Iterator[tuple[int, str]]:
    first: dict[str, int] = {}
    for i, (query_id, _) in enumerate(pairs.ids):
        first.setdefault(query_id, i)
    seen = {query_id for query_id, _ in rated if query_id in texts}
    known, new = sorted(seen), [query_id for query_id in first if query_id not in seen][:REGION_POOL]
    vectors = encode(load(encoder), [texts[q] for q in (*known, *new)], encoder.prompts()[0], encoder.dtype)
    for row, cosine in farthest_first(vectors, len(known)):
        why = "the first query" if cosine == -1 else f"cosine {cosine:.2f} to the nearest earlier query"
        yield first[new[row - len(known)]], why


def rank(
    pairs: PairPool,
    items: int,
    thresholds: Mapping[str, Cuts],
    encoder: Encoder | None = None,
    texts: Mapping[str, str] | None = None,
    rated: Iterable[PairId] = (),
) -> list[tuple[int, str, str]]:
    """(row of ``pairs``, reason, explanation) of the ``items`` pairs to rate, most informative first.

    The reasons take turns, each with its most informative pair: the largest spread between the teachers' percentiles,
    the smallest distance to a threshold in standard deviations of that teacher's scores, the query farthest from all
    earlier ones. Every turn ends with a random pair, because kappa on hard pairs alone would not represent all pairs. Pairs
    in ``rated`` are excluded.
    """
    excluded = set(rated)
    queues: dict[str, Iterator[tuple[int, str]]] = {
        "disagree": _disagreements(pairs),
        "threshold": _near(pairs, thresholds),
        "random": ((i, "one of all pairs") for i in range(len(pairs.ids))),
    }
    if encoder is not None:
        queues["region"] = _new_regions(pairs, texts or {}, encoder, excluded)
    open_queues = [reason for reason in REASONS if reason in queues]
    selected: list[tuple[int, str, str]] = []
    while open_queues and len(selected) < items:
        for reason in list(open_queues):
            candidate = next((row for row in queues[reason] if pairs.ids[row[0]] not in excluded), None)
            if candidate is None:
                open_queues.remove(reason)
            elif len(selected) < items:
                excluded.add(pairs.ids[candidate[0]])
                selected.append((candidate[0], reason, candidate[1]))
    return selected
