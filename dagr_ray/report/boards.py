"""Compares all arms of a study on one data set: means, intervals, gains with tests, curves, changed queries, averages."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dagr_ray.core.artifact import Json
from dagr_ray.core.paths import distinct_names
from dagr_ray.report import stats
from dagr_ray.report.arms import TrialResult
from dagr_ray.report.compare import changed_queries
from dagr_ray.report.decision import ALPHA, WORTH
from dagr_ray.report.decision.estimates import Estimate, paired, seed_variance
from dagr_ray.report.decision.outcomes import smallest_enough
from dagr_ray.report.verdict import best_arm

MEASURE = "nDCG@10"


def boards_of(rows: list[TrialResult], warnings: list[str], worth: float = WORTH, alpha: float = ALPHA) -> list[Board]:
    """One board for each evaluated data set, the in-distribution one first."""
    boards: list[Board] = []
    groups: dict[str, list[TrialResult]] = {}
    for row in rows:
        if row.scores:
            groups.setdefault(row.judged_on, []).append(row)
    names = _displayed_names(groups)
    for key, group in groups.items():
        for name in group[0].scores:
            members = [row for row in group if all(MEASURE in each.scores.get(name, {}) for each in row.seeds)]
            if not members:
                continue
            query_sets = [set(each.scores[name][MEASURE]) for row in members for each in row.seeds]
            queries = sorted(set.intersection(*query_sets))
            if len(queries) < max(map(len, query_sets)):
                warnings.append(f"{name}: trials are compared on the {len(queries)} queries that all of them have")
            if queries:
                role = _role(group[0], name)
                boards.append(Board(names[key, name], name, role, members, queries, len(boards), worth, alpha))
    return sorted(boards, key=lambda board: board.role != "in")


def _displayed_names(groups: dict[str, list[TrialResult]]) -> dict[tuple[str, str], str]:
    """The name to display for each data set of a group. Different data sets of one name also get their path."""
    places = {(key, name): _path(group[0], name) for key, group in groups.items() for name in group[0].scores}
    displayed = {}
    for (key, name), path in places.items():
        others = [place for (other, same), place in places.items() if same == name and other != key]
        if not others:
            displayed[key, name] = name
            continue
        distinct = distinct_names([path, *others]).get(path) if path and path not in others else None
        displayed[key, name] = f"{name} ({distinct or key[:4]})"
    return displayed


def _path(row: TrialResult, name: str) -> str:
    index = row.set_names.index(name) if name in row.set_names else len(row.evaluations)
    data = row.evaluations[index].get("data") if index < len(row.evaluations) else None
    return str(data.get("path") or "") if isinstance(data, dict) else ""


def _role(row: TrialResult, name: str) -> str:
    """``in`` for the data set that the arms were trained for, ``out`` for any other."""
    first = row.judged[0] if row.judged else {}
    return "in" if row.judged_by_name.get(name, {}).get("data") == first.get("data") else "out"


@dataclass
class Board:
    """All arms on one data set: values by query (means over an arm's seeds), and bootstrap means from shared samples."""

    name: str
    key: str
    role: str
    rows: list[TrialResult]
    queries: list[str]
    number: int = 0
    worth: float = WORTH
    alpha: float = ALPHA
    boots: dict[str, stats.Floats] = field(default_factory=dict)

    def described(self) -> Json:
        names = {"name": self.name, "key": self.key, "role": self.role}
        return {**names, "queries": len(self.queries), "measures": self.measures}

    @cached_property
    def measures(self) -> list[str]:
        every = [each for row in self.rows for each in row.seeds]
        return [m for m in self.rows[0].scores[self.key] if all(m in each.scores[self.key] for each in every)]

    @cached_property
    def column(self) -> dict[str, int]:
        return {row.id: i for i, row in enumerate(self.rows)}

    @cached_property
    def seeds(self) -> list[list[int]]:
        """The columns of ``runs`` that belong to each arm."""
        edges = itertools.accumulate((len(row.seeds) for row in self.rows), initial=0)
        return [list(range(start, stop)) for start, stop in itertools.pairwise(edges)]

    def runs(self, measure: str) -> stats.Floats:
        """``[queries, trials]``, each seed separately."""
        every = [each.scores[self.key][measure] for row in self.rows for each in row.seeds]
        return np.array([[values[q] for values in every] for q in self.queries])

    def values(self, measure: str) -> stats.Floats:
        """``[queries, arms]``."""
        return self._values[measure]

    @cached_property
    def _values(self) -> dict[str, stats.Floats]:
        return {m: np.stack([self._runs[m][:, c].mean(axis=1) for c in self.seeds], axis=1) for m in self.measures}

    @cached_property
    def _runs(self) -> dict[str, stats.Floats]:
        return {m: self.runs(m) for m in self.measures}

    def arms(self, trials: dict[str, Json]) -> list[TrialResult]:
        """The arms that are compared with a frozen base."""
        return [row for row in self.rows if trials[row.id]["frozen"] in self.column]

    def gains(self, measure: str, trials: dict[str, Json]) -> stats.Floats:
        """``[queries, arms]``: each arm minus its frozen base."""
        values, column = self.values(measure), self.column
        pairs = [(column[row.id], column[trials[row.id]["frozen"]]) for row in self.arms(trials)]
        return np.stack([values[:, i] - values[:, j] for i, j in pairs], axis=1)

    def score(self, trials: dict[str, Json]) -> None:
        """Adds the means, gains, intervals and tests on this data set to the trials."""
        # all measures and seeds share samples of queries; different data sets do not, so that averages are of independent samples
        every = np.concatenate([self._runs[m] for m in self.measures], axis=1)
        means = stats.resampled_means(every, seed=stats.SEED + self.number)
        for place, measure in enumerate(self.measures):
            own = means[:, place * (every.shape[1] // len(self.measures)) :]
            boots = self.boots[measure] = stats.over_seeds(own, self.seeds)
            averages = self.values(measure).mean(axis=0)
            for i, row in enumerate(self.rows):
                low, high = stats.interval(boots[:, i], 1 - self.alpha)
                scores = trials[row.id]["scores"].setdefault(self.name, {})
                scores[measure] = {"mean": float(averages[i]), "low": low, "high": high}
                if len(row.seeds) > 1:
                    seed_means = self._runs[measure][:, self.seeds[i]].mean(axis=0)
                    scores[measure]["seed_sd"] = float(seed_means.std(ddof=1))
            arms = self.arms(trials)
            if not arms:
                continue
            gains = self.gains(measure, trials)
            p_values = stats.randomisation_p(gains).tolist()
            for i, (row, p, corrected) in enumerate(zip(arms, p_values, stats.holm(p_values), strict=True)):
                score = trials[row.id]["scores"][self.name][measure]
                score |= self.gap(measure, row.id, trials[row.id]["frozen"]) | {"p": p, "p_holm": corrected}
                score |= {"alpha": self.alpha, "se": self._estimate(measure, row.id, trials[row.id]["frozen"]).se}
                score |= _won_and_lost(gains[:, i])
                if len(row.seeds) > 1:
                    score["query_se"] = float(gains[:, i].std(ddof=1) / np.sqrt(len(gains)))
                if trials[row.id]["bm25"] in self.column:
                    bm25, values = trials[row.id]["bm25"], self.values(measure)
                    over = values[:, self.column[row.id]] - values[:, self.column[bm25]]
                    score["over_bm25"] = self.gap(measure, row.id, bm25) | _won_and_lost(over)

    def gap(self, measure: str, trial: str, other: str) -> Json:
        """The mean of ``trial`` minus the mean of ``other``, with a paired interval."""
        i, j = self.column[trial], self.column[other]
        values = self.values(measure)
        low, high = stats.interval(self.boots[measure][:, i] - self.boots[measure][:, j], 1 - self.alpha)
        return {"delta": float((values[:, i] - values[:, j]).mean()), "delta_low": low, "delta_high": high}

    def curves(self, trials: dict[str, Json]) -> list[Json]:
        """A curve over the volume for each generator and base, starting from the frozen base at 0."""
        groups: dict[str, list[TrialResult]] = {}
        for row in self.arms(trials):
            groups.setdefault(row.series(), []).append(row)
        curves = []
        for group in groups.values():
            frozen = trials[group[0].id]["frozen"]
            ordered = [frozen, *(r.id for r in sorted(group, key=lambda r: trials[r.id]["used"]))]
            points = [{"trial": t, "used": trials[t]["used"], "price": _price(trials[t])} for t in ordered]
            for point in points:
                point |= trials[point["trial"]]["scores"][self.name][MEASURE]
            curves.append(
                {
                    "set": self.name,
                    "base": group[0].base,
                    "generator": group[0].generator,
                    "label": group[0].label,
                    "points": points,
                    **self._enough(points, len(groups)),
                    "steps": self._steps(points),
                }
            )
        return curves

    def _enough(self, points: list[Json], curves: int) -> Json:
        """The best point, and the smallest point that is shown to be enough: no larger one adds what is worth having.

        ``rest`` is what larger volumes add to it, or what the largest adds to the one before if none is enough. The
        probability of a false "enough" is shared by the data set's curves.
        """
        best = max(points, key=lambda point: point["mean"])
        volumes = [self._of_seeds(MEASURE, point["trial"]) for point in points]
        pooled = seed_variance(volumes)
        enough = smallest_enough(volumes, worth=self.worth, alpha=self.alpha / curves, pooled=pooled)
        used = None if enough.at is None else points[enough.at]["used"]
        return {"best": best["used"], "enough": used, "rest": asdict(enough.rest)}

    def _of_seeds(self, measure: str, trial: str) -> stats.Floats:
        """``[queries, seeds]`` of an arm."""
        return self._runs[measure][:, self.seeds[self.column[trial]]]

    def _estimate(self, measure: str, trial: str, other: str) -> Estimate:
        return paired(self._of_seeds(measure, trial), self._of_seeds(measure, other))

    def _steps(self, points: list[Json]) -> list[Json]:
        """The gain of each larger volume, for each 100 rows more and for each dollar more."""
        steps = []
        for before, after in itertools.pairwise(points):
            gap = self.gap(MEASURE, after["trial"], before["trial"])
            rows, price = after["used"] - before["used"], after["price"] - before["price"]
            steps.append(
                {
                    "from": before["used"],
                    "to": after["used"],
                    **gap,
                    "per_100_rows": gap["delta"] / rows * 100 if rows > 0 else None,
                    "per_dollar": gap["delta"] / price if price > 0 else None,
                }
            )
        return steps

    def changes(self, trials: dict[str, Json]) -> list[Json]:
        """Queries won, lost and tied against the frozen base, for the arm of each base that the verdict is about."""
        by_base: dict[str, list[TrialResult]] = {}
        for row in self.arms(trials):
            by_base.setdefault(row.base, []).append(row)
        changes = []
        for rows in by_base.values():
            scores = {row.id: trials[row.id]["scores"][self.name][MEASURE] for row in rows}
            best = best_arm(scores)
            changes.append(self._changes_of(trials, next(row for row in rows if row.id == best)))
        return changes

    def _changes_of(self, trials: dict[str, Json], row: TrialResult) -> Json:
        values, column = self.values(MEASURE), self.column
        before, after = values[:, column[trials[row.id]["frozen"]]], values[:, column[row.id]]
        change = changed_queries(self.queries, before, after, {})
        texts = _query_texts(row, self.key, {query["query_id"] for query in change["queries"]})
        for query in change["queries"]:
            query["text"] = texts.get(query["query_id"], "")
        labels = {"set": self.name, "base": row.base, "trial": row.id, "label": row.label, "seeds": len(row.seeds)}
        return {**labels, "used": trials[row.id]["used"], **change}


def _won_and_lost(gains: stats.Floats) -> Json:
    change = changed_queries([""] * len(gains), np.zeros(len(gains)), gains, {})
    return {key: change[key] for key in ("won", "lost", "same")}


def _price(trial: Json) -> float:
    return (trial["cost"] or {}).get("price", 0.0)


def _query_texts(row: TrialResult, name: str, wanted: set[str]) -> dict[str, str]:
    """The texts of some test queries, from the data that the evaluation of this name read."""
    folders = row.folders
    evaluations = dict(zip(row.set_names, folders.main(row.trial["folder"]), strict=False))
    data = folders.judged_data(evaluations[name]) if name in evaluations else None
    if data is None or "queries" not in folders.manifest_or_empty(data)["tables"]:
        return {}
    rows: list[Json] = folders.read_or(data, lambda read: read.read("queries").to_pylist(), [])
    return {r["query_id"]: r["text"] for r in rows if r["query_id"] in wanted}


# -- averages -----------------------------------------------------------------------------------------------------------


def averages(boards: list[Board], trials: dict[str, Json]) -> list[Json]:
    """Means over data sets, with equal weights as in BEIR (Thakur et al., arXiv 2104.08663), added to the trials.

    There is one average over all data sets that the same arms are evaluated on, and one over the out-of-distribution sets
    if there are at least two. Copies of a data set without leaked queries are left out, because the whole set is included.
    Intervals resample the queries of each set. The randomisation test flips the difference of every query, weighted as in
    the average.
    """
    groups: dict[tuple[str, ...], list[Board]] = {}
    for board in boards:
        if not board.rows[0].judged_by_name.get(board.key, {}).get("leaks"):
            groups.setdefault(tuple(row.id for row in board.rows), []).append(board)
    results: list[Any] = []
    for group in groups.values():
        outside = [board for board in group if board.role == "out"]
        for chosen, what in ((group, "sets"), (outside, "sets out of distribution")):
            if len(chosen) > 1 and (what == "sets" or len(outside) < len(group)):
                name = f"average of {len(chosen)} {what}"
                if any(result["name"] == name for result in results):
                    name = f"{name} ({len(results) + 1})"
                results.append(_averaged(name, chosen, trials))
    return results


def _averaged(name: str, boards: list[Board], trials: dict[str, Json]) -> Json:
    first = boards[0]
    measures = [m for m in first.measures if all(m in board.measures for board in boards)]
    for measure in measures:
        boots: Any = np.mean([board.boots[measure] for board in boards], axis=0)
        means = np.mean([board.values(measure).mean(axis=0) for board in boards], axis=0)
        for i, row in enumerate(first.rows):
            low, high = stats.interval(boots[:, i], 1 - first.alpha)
            scores = trials[row.id]["scores"].setdefault(name, {})
            scores[measure] = {"mean": float(means[i]), "low": low, "high": high}
        arms = first.arms(trials)
        if not arms:
            continue
        weighted = [board.gains(measure, trials) / (len(board.queries) * len(boards)) for board in boards]
        p_values = stats.randomisation_p(np.concatenate(weighted)).tolist()
        for row, p, corrected in zip(arms, p_values, stats.holm(p_values), strict=True):
            i, j = first.column[row.id], first.column[trials[row.id]["frozen"]]
            low, high = stats.interval(boots[:, i] - boots[:, j], 1 - first.alpha)
            gap = {"delta": float(means[i] - means[j]), "delta_low": low, "delta_high": high}
            trials[row.id]["scores"][name][measure] |= gap | {"p": p, "p_holm": corrected, "alpha": first.alpha}
    return {"name": name, "sets": [board.name for board in boards], "measures": measures}
