"""Which (query, passage) pairs a person should see first: teachers disagree, near a threshold, new region, or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.retrieval.encoder import Encoder, encode, load

Pair = tuple[str, str]
Cuts = tuple[float, ...]
REASONS = {
    "disagree": "teachers disagree",
    "threshold": "score near the threshold",
    "region": "new region of the queries",
    "random": "drawn at random",
}
# Queries among which new regions are looked for; each is encoded.
REGION_POOL = 20_000


@dataclass
class Pairs:
    """Pairs in an order drawn by hash, so that ties do not depend on how folders were given.

    ``scores``: teacher -> float64 [pairs], NaN where it gave none. ``claimed``: those that ``qrels`` call relevant.
    """

    ids: list[Pair] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    claimed: set[Pair] = field(default_factory=set)


def pairs_of(folders: Sequence[Artifact]) -> Pairs:
    """The pairs that teachers scored in ``folders`` (tables ``scores``), and those of the ``qrels`` of the other folders.

    Raises ConfigError where a folder is not complete or has neither table.
    """
    known: dict[Pair, None] = {}
    told: dict[str, dict[Pair, float]] = {}
    claimed: set[Pair] = set()
    for folder in sorted(folders, key=lambda each: each.name):
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
        mine: dict[str, dict[Pair, float]] = {}
        for part in folder.scan("scores") if "scores" in names else ():
            for row in part.to_pylist():
                mine.setdefault(row["scorer"], {})[row["query_id"], row["doc_id"]] = row["score"]
        for scorer, values in mine.items():
            # two folders of one teacher: its fields differ, and so do its scores
            told[f"{scorer} ({folder.name[-12:]})" if scorer in told else scorer] = values
            known |= dict.fromkeys(values)
    ids = sorted(known, key=lambda pair: (tables.unit_of("annotate", *pair), pair))
    scores = {s: np.array([told[s].get(pair, math.nan) for pair in ids], np.float64) for s in sorted(told)}
    return Pairs(ids, scores, claimed)


def percentiles(scores: np.ndarray) -> np.ndarray:
    """The share of a teacher's scores under each score, ties in the middle: scores of any teachers become comparable.

    >>> percentiles(np.array([10.0, 30.0, 30.0, np.nan])).round(3).tolist()
    [0.167, 0.667, 0.667, nan]
    """
    there = ~np.isnan(scores)
    found = np.full(len(scores), np.nan)
    if there.any():
        _, places, counts = np.unique(scores[there], return_inverse=True, return_counts=True)
        found[there] = ((np.cumsum(counts) - counts / 2) / there.sum())[places]
    return found


def _disagreeing(pairs: Pairs) -> Iterator[tuple[int, str]]:
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


def _near(pairs: Pairs, thresholds: Mapping[str, Cuts]) -> Iterator[tuple[int, str]]:
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
        cut = min(thresholds[name], key=lambda each: abs(each - score))
        yield int(i), f"{name} gives {score:.4g}, and its threshold is {cut:.4g}"


def _distance(scores: np.ndarray, cuts: Cuts) -> np.ndarray:
    """How far each score is from the nearest cut point, in standard deviations; infinite where there is no score."""
    apart = np.abs(scores[:, None] - np.asarray(cuts, np.float64)[None, :]).min(1)
    return np.nan_to_num(apart / (float(np.nanstd(scores)) or 1.0), nan=np.inf)


def farthest_first(vectors: np.ndarray, seen: int = 0) -> Iterator[tuple[int, float]]:
    """(row, cosine to the nearest of those before it) of unit vectors [n, dimension], the farthest of all each time.

    The first ``seen`` rows count as chosen already and are not given. The greedy solution of the k-centre problem, at
    most twice the best radius: Gonzalez 1985, doi 10.1016/0304-3975(85)90224-5. Ends where nothing new is left.
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
    pairs: Pairs, texts: Mapping[str, str], encoder: Encoder, rated: set[Pair]
) -> Iterator[tuple[int, str]]:
    first: dict[str, int] = {}
    for i, (query_id, _) in enumerate(pairs.ids):
        first.setdefault(query_id, i)
    seen = {query_id for query_id, _ in rated if query_id in texts}
    known, new = sorted(seen), [query_id for query_id in first if query_id not in seen][:REGION_POOL]
    vectors = encode(load(encoder), [texts[q] for q in (*known, *new)], encoder.prompts()[0], encoder.dtype)
    for row, cosine in farthest_first(vectors, len(known)):
        why = "the first query" if cosine == -1 else f"cosine {cosine:.2f} to the nearest query before it"
        yield first[new[row - len(known)]], why


def rank(
    pairs: Pairs,
    items: int,
    thresholds: Mapping[str, Cuts],
    encoder: Encoder | None = None,
    texts: Mapping[str, str] | None = None,
    rated: Iterable[Pair] = (),
) -> list[tuple[int, str, str]]:
    """(row of ``pairs``, reason, why) of the ``items`` pairs to ask about, most telling first.

    The reasons take turns, each with the pair that it finds most telling: largest spread between the teachers'
    percentiles, smallest distance to a threshold in standard deviations of that teacher's scores, the query farthest from
    all before it. Every turn ends with a pair drawn at random: kappa of hard pairs alone would be no one's kappa. Pairs of
    ``rated`` are left out.
    """
    done = set(rated)
    queues: dict[str, Iterator[tuple[int, str]]] = {
        "disagree": _disagreeing(pairs),
        "threshold": _near(pairs, thresholds),
        "random": ((i, "one of all pairs") for i in range(len(pairs.ids))),
    }
    if encoder is not None:
        queues["region"] = _new_regions(pairs, texts or {}, encoder, done)
    open_queues = [reason for reason in REASONS if reason in queues]
    found: list[tuple[int, str, str]] = []
    while open_queues and len(found) < items:
        for reason in list(open_queues):
            new = next((each for each in queues[reason] if pairs.ids[each[0]] not in done), None)
            if new is None:
                open_queues.remove(reason)
            elif len(found) < items:
                done.add(pairs.ids[new[0]])
                found.append((new[0], reason, new[1]))
    return found
