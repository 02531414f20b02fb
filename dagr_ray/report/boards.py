"""All arms of a study on one judged data set: means, intervals, gains with tests, curves, changed queries; and averages."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dagr_ray.core.artifact import Json
from dagr_ray.core.paths import distinct_names
from dagr_ray.report import stats
from dagr_ray.report.arms import Row
from dagr_ray.report.compare import changed
from dagr_ray.report.verdict import best_arm

MEASURE = "nDCG@10"


def boards_of(rows: list[Row], warnings: list[str]) -> list[Board]:
    """One board for each judged data set, the in-distribution one first."""
    boards: list[Board] = []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.scores:
            groups.setdefault(row.judged_on, []).append(row)
    shown = _shown(groups)
    for key, group in groups.items():
        for name in group[0].scores:
            members = [row for row in group if all(MEASURE in each.scores.get(name, {}) for each in row.seeds)]
            if not members:
                continue
            asked = [set(each.scores[name][MEASURE]) for row in members for each in row.seeds]
            queries = sorted(set.intersection(*asked))
            if len(queries) < max(len(a) for a in asked):
                warnings.append(f"{name}: rows are compared on the {len(queries)} queries that all of them have")
            if queries:
                role = _role(group[0], name)
                boards.append(Board(shown[key, name], name, role, members, queries, len(boards)))
    return sorted(boards, key=lambda board: board.role != "in")


def _shown(groups: dict[str, list[Row]]) -> dict[tuple[str, str], str]:
    """What people are told for each name of a group: the name; of several data sets of one name also where each lies."""
    names = {(key, name): _place(group[0], name) for key, group in groups.items() for name in group[0].scores}
    found = {}
    for (key, name), place in names.items():
        others = [each for (other, called), each in names.items() if called == name and other != key]
        if not others:
            found[key, name] = name
            continue
        apart = distinct_names([place, *others]).get(place) if place and place not in others else None
        found[key, name] = f"{name} ({apart or key[:4]})"
    return found


def _place(row: Row, name: str) -> str:
    at = row.set_names.index(name) if name in row.set_names else len(row.evaluations)
    data = row.evaluations[at].get("data") if at < len(row.evaluations) else None
    return str(data.get("path") or "") if isinstance(data, dict) else ""


def _role(row: Row, name: str) -> str:
    """Whether a data set is the one that the arms were made for, or another."""
    first = row.judged[0] if row.judged else {}
    return "in" if row.judged_by_name.get(name, {}).get("data") == first.get("data") else "out"


@dataclass
class Board:
    """All arms on one data set: values by query (means over an arm's seeds), and bootstrap means that all arms share."""

    name: str
    key: str
    role: str
    rows: list[Row]
    queries: list[str]
    number: int = 0
    boots: dict[str, stats.Floats] = field(default_factory=dict)

    def described(self) -> Json:
        where = {"name": self.name, "key": self.key, "role": self.role}
        return {**where, "queries": len(self.queries), "measures": self.measures}

    @cached_property
    def measures(self) -> list[str]:
        every = [each for row in self.rows for each in row.seeds]
        return [m for m in self.rows[0].scores[self.key] if all(m in each.scores[self.key] for each in every)]

    @cached_property
    def column(self) -> dict[str, int]:
        return {row.id: i for i, row in enumerate(self.rows)}

    @cached_property
    def seeds(self) -> list[list[int]]:
        """The columns of ``runs`` that are each arm's."""
        edges = itertools.accumulate((len(row.seeds) for row in self.rows), initial=0)
        return [list(range(start, stop)) for start, stop in itertools.pairwise(edges)]

    def runs(self, measure: str) -> stats.Floats:
        """``[queries, trials]``: each seed by itself."""
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

    def arms(self, trials: dict[str, Json]) -> list[Row]:
        """Those that are compared with a frozen base."""
        return [row for row in self.rows if trials[row.id]["frozen"] in self.column]

    def gains(self, measure: str, trials: dict[str, Json]) -> stats.Floats:
        """``[queries, arms]``: over each arm's frozen base."""
        values, column = self.values(measure), self.column
        pairs = [(column[row.id], column[trials[row.id]["frozen"]]) for row in self.arms(trials)]
        return np.stack([values[:, i] - values[:, j] for i, j in pairs], axis=1)

    def score(self, trials: dict[str, Json]) -> None:
        """Adds this data set's means, gains, intervals and tests to the trials."""
        # all measures and seeds see the same samples of queries; no two data sets do, so that averages are of independent ones
        every = np.concatenate([self._runs[m] for m in self.measures], axis=1)
        means = stats.resampled_means(every, seed=stats.SEED + self.number)
        for place, measure in enumerate(self.measures):
            own = means[:, place * (every.shape[1] // len(self.measures)) :]
            boots = self.boots[measure] = stats.over_seeds(own, self.seeds)
            found = self.values(measure).mean(axis=0)
            for i, row in enumerate(self.rows):
                low, high = stats.interval(boots[:, i])
                scores = trials[row.id]["scores"].setdefault(self.name, {})
                scores[measure] = {"mean": float(found[i]), "low": low, "high": high}
                if len(row.seeds) > 1:
                    each = self._runs[measure][:, self.seeds[i]].mean(axis=0)
                    scores[measure]["seed_sd"] = float(each.std(ddof=1))
            arms = self.arms(trials)
            if not arms:
                continue
            gains = self.gains(measure, trials)
            tested = stats.randomisation_p(gains).tolist()
            for i, (row, p, corrected) in enumerate(zip(arms, tested, stats.holm(tested), strict=True)):
                score = trials[row.id]["scores"][self.name][measure]
                score |= self.gap(measure, row.id, trials[row.id]["frozen"]) | {"p": p, "p_holm": corrected}
                score |= _won(gains[:, i])
                if len(row.seeds) > 1:
                    score["query_se"] = float(gains[:, i].std(ddof=1) / np.sqrt(len(gains)))
                if trials[row.id]["bm25"] in self.column:
                    bm25, values = trials[row.id]["bm25"], self.values(measure)
                    over = values[:, self.column[row.id]] - values[:, self.column[bm25]]
                    score["over_bm25"] = self.gap(measure, row.id, bm25) | _won(over)

    def gap(self, measure: str, trial: str, other: str) -> Json:
        """The mean of ``trial`` minus that of ``other``, with a paired interval."""
        i, j = self.column[trial], self.column[other]
        values = self.values(measure)
        low, high = stats.interval(self.boots[measure][:, i] - self.boots[measure][:, j])
        return {"delta": float((values[:, i] - values[:, j]).mean()), "delta_low": low, "delta_high": high}

    def curves(self, trials: dict[str, Json]) -> list[Json]:
        """Each generator and base over volume, from the frozen base at 0 on."""
        groups: dict[str, list[Row]] = {}
        for row in self.arms(trials):
            groups.setdefault(row.series(), []).append(row)
        found = []
        for group in groups.values():
            frozen = trials[group[0].id]["frozen"]
            ordered = [frozen, *(r.id for r in sorted(group, key=lambda r: trials[r.id]["used"]))]
            points = [{"trial": t, "used": trials[t]["used"], "price": _price(trials[t])} for t in ordered]
            for point in points:
                point |= trials[point["trial"]]["scores"][self.name][MEASURE]
            found.append(
                {
                    "set": self.name,
                    "base": group[0].base,
                    "generator": group[0].generator,
                    "label": group[0].label,
                    "points": points,
                    **self._enough(points),
                    "steps": self._steps(points),
                }
            )
        return found

    def _enough(self, points: list[Json]) -> Json:
        """The best point, and the smallest one that is not shown to be below it (paired interval includes 0)."""
        best = max(points, key=lambda point: point["mean"])
        for point in points:
            behind = self.gap(MEASURE, best["trial"], point["trial"])
            if point is best or behind["delta_low"] <= 0:
                return {"best": best["used"], "enough": point["used"], "best_over_enough": behind}
        raise AssertionError("the best point is one of the points")

    def _steps(self, points: list[Json]) -> list[Json]:
        """What each larger volume added, for 100 more rows and for a dollar more."""
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
        """For the arm of each base that the verdict is about: queries won, lost and tied against the frozen base."""
        by_base: dict[str, list[Row]] = {}
        for row in self.arms(trials):
            by_base.setdefault(row.base, []).append(row)
        found = []
        for rows in by_base.values():
            scores = {row.id: trials[row.id]["scores"][self.name][MEASURE] for row in rows}
            best = best_arm(scores)
            found.append(self._changed(trials, next(row for row in rows if row.id == best)))
        return found

    def _changed(self, trials: dict[str, Json], row: Row) -> Json:
        values, column = self.values(MEASURE), self.column
        before, after = values[:, column[trials[row.id]["frozen"]]], values[:, column[row.id]]
        found = changed(self.queries, before, after, {})
        said = _query_texts(row, self.key, {query["query_id"] for query in found["queries"]})
        for query in found["queries"]:
            query["text"] = said.get(query["query_id"], "")
        where = {"set": self.name, "base": row.base, "trial": row.id, "label": row.label, "seeds": len(row.seeds)}
        return {**where, "used": trials[row.id]["used"], **found}


def _won(gains: stats.Floats) -> Json:
    found = changed([""] * len(gains), np.zeros(len(gains)), gains, {})
    return {key: found[key] for key in ("won", "lost", "same")}


def _price(trial: Json) -> float:
    return (trial["cost"] or {}).get("price", 0.0)


def _query_texts(row: Row, name: str, wanted: set[str]) -> dict[str, str]:
    """The wording of some judged queries, out of the data that the evaluation of that name read."""
    folders = row.folders
    for inner in folders.found(row.trial["folder"])["inputs"].values():
        manifest = folders.found(inner)
        data = manifest["inputs"].get("data")
        if manifest["stage"].get("name") == name.split("/")[0] and "queries" in folders.found(data or "")["tables"]:
            rows: list[Json] = folders.soundly(str(data), lambda read: read.read("queries").to_pylist(), [])
            return {r["query_id"]: r["text"] for r in rows if r["query_id"] in wanted}
    return {}


# -- averages -----------------------------------------------------------------------------------------------------------


def averages(boards: list[Board], trials: dict[str, Json]) -> list[Json]:
    """Means over data sets, each set counting alike as in BEIR (Thakur et al., arXiv 2104.08663), added to the trials.

    One for all sets that the same arms are judged on, and one for those out of distribution where they are two or more.
    Sets without the queries that leaks touch are left out: they are there as they are. Intervals resample the queries of
    each set; the randomisation test flips every query's difference, weighed as in the average.
    """
    groups: dict[tuple[str, ...], list[Board]] = {}
    for board in boards:
        if not board.rows[0].judged_by_name.get(board.key, {}).get("leaks"):
            groups.setdefault(tuple(row.id for row in board.rows), []).append(board)
    found: list[Any] = []
    for group in groups.values():
        outside = [board for board in group if board.role == "out"]
        for chosen, what in ((group, "sets"), (outside, "sets out of distribution")):
            if len(chosen) > 1 and (what == "sets" or len(outside) < len(group)):
                name = f"average of {len(chosen)} {what}"
                if any(each["name"] == name for each in found):
                    name = f"{name} ({len(found) + 1})"
                found.append(_averaged(name, chosen, trials))
    return found


def _averaged(name: str, boards: list[Board], trials: dict[str, Json]) -> Json:
    first = boards[0]
    measures = [m for m in first.measures if all(m in board.measures for board in boards)]
    for measure in measures:
        boots: Any = np.mean([board.boots[measure] for board in boards], axis=0)
        means = np.mean([board.values(measure).mean(axis=0) for board in boards], axis=0)
        for i, row in enumerate(first.rows):
            low, high = stats.interval(boots[:, i])
            scores = trials[row.id]["scores"].setdefault(name, {})
            scores[measure] = {"mean": float(means[i]), "low": low, "high": high}
        arms = first.arms(trials)
        if not arms:
            continue
        weighed = [board.gains(measure, trials) / (len(board.queries) * len(boards)) for board in boards]
        tested = stats.randomisation_p(np.concatenate(weighed)).tolist()
        for row, p, corrected in zip(arms, tested, stats.holm(tested), strict=True):
            i, j = first.column[row.id], first.column[trials[row.id]["frozen"]]
            low, high = stats.interval(boots[:, i] - boots[:, j])
            gap = {"delta": float(means[i] - means[j]), "delta_low": low, "delta_high": high}
            trials[row.id]["scores"][name][measure] |= gap | {"p": p, "p_holm": corrected}
    return {"name": name, "sets": [board.name for board in boards], "measures": measures}
