"""A study as one JSON value: means with intervals, gains over the frozen base with tests, curves, costs, filters."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dagr_ray.artifact import Artifact, Json
from dagr_ray.config import ConfigError, digest
from dagr_ray.report import stats
from dagr_ray.report.leaks import leaks
from dagr_ray.report.lineage import Arm, Folders, funnel
from dagr_ray.report.verdict import verdict

MEASURE = "nDCG@10"
# Parameters that set how many rows an arm is trained on: they move along a curve, the others tell curves apart.
AMOUNTS = ("volume", "density", "coverage")


def summarise(runs: str, study_folder: str) -> Json:
    """Everything that the tables and the page show, as plain JSON values. Reads finished folders only.

    Raises ConfigError where ``study_folder`` is no study.
    """
    study = Artifact(runs, study_folder).read_json("study.json")
    if study is None:
        raise ConfigError(f"no study.json in {study_folder!r} below {runs!r}; give a folder that starts with study-")
    folders = Folders(runs)
    warnings: list[str] = []
    rows = [Row(folders, trial, study.get("defaults", {})) for trial in study["trials"]]
    for row in rows:
        row.name(rows)
    boards = _boards(rows, warnings)
    trials = sorted((row.described(rows) for row in rows), key=_place)
    for trial in trials:
        trial["scores"] = {}
    by_name = {trial["trial"]: trial for trial in trials}
    for board in boards:
        board.score(by_name)
    sets = [board.described() for board in boards]
    curves = [curve for board in boards for curve in board.curves(by_name)]
    summary: Json = {
        "name": study["name"],
        "study": study_folder,
        "job": study.get("job", ""),
        "axes": study.get("axes", {}),
        "created": study.get("created"),
        "machine": study.get("machine", {}),
        "wall_s": study.get("wall_s", 0.0),
        "measure": MEASURE,
        "sets": sets,
        "trials": trials,
        "curves": curves,
        "generators": (made := generators(rows)),
        "leaks": leaks(folders, rows, made, MEASURE),
        "changes": [change for board in boards for change in board.changes(by_name)],
        "stages": _stages(folders, rows),
        "warnings": warnings,
    }
    summary |= _versions(folders, rows)
    summary["total"] = folders.sums(stage["folder"] for stage in summary["stages"])
    summary["verdict"] = verdict(summary)
    return summary


def _place(trial: Json) -> tuple[Any, ...]:
    """The order of the tables: BM25, then each base, frozen first, and its arms by generator and size."""
    kind = ("bm25", "frozen", "augmented").index(trial["kind"])
    return kind > 0, trial["base"], kind, trial["label"], trial["used"], trial["trial"]


@dataclass
class Row:
    """A trial with what its scorecard holds."""

    folders: Folders
    trial: Json
    defaults: Json = field(default_factory=dict)
    label: str = ""

    @property
    def id(self) -> str:
        return self.trial["trial"]

    @property
    def kind(self) -> str:
        return self.trial["kind"]

    @property
    def params(self) -> Json:
        return self.trial["params"]

    @cached_property
    def arm(self) -> Arm:
        return Arm(self.folders, self.trial["folder"])

    @cached_property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Data set -> measure -> query -> value; empty where the trial has not ended."""
        if self.folders.manifest(self.trial["folder"]) is None:
            return {}
        rows = self.folders.artifact(self.trial["folder"]).read("metrics").to_pylist()
        splits: dict[str, set[str]] = {}
        for row in rows:
            splits.setdefault(row["data"] or "data", set()).add(row["split"] or "")
        found: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            if row["query_id"] is not None:
                name = row["data"] or "data"
                name = f"{name}/{row['split']}" if len(splits[name]) > 1 else name
                found.setdefault(name, {}).setdefault(row["measure"], {})[row["query_id"]] = row["value"]
        return found

    @cached_property
    def evaluations(self) -> list[Json]:
        """The judged data sets as the scorecard's stage has them, the in-distribution one first."""
        return self.folders.found(self.trial["folder"])["stage"].get("evaluations", [])

    @cached_property
    def judged_on(self) -> str:
        """Equal for trials that are judged on the same data."""
        return digest([[e.get("name"), e.get("split"), e.get("data")] for e in self.evaluations])

    @cached_property
    def _encoder(self) -> str:
        indexes = [(e.get("search") or {}).get("index") or {} for e in self.evaluations]
        return json.dumps([index.get("miner") for index in indexes], sort_keys=True)

    def frozen(self, rows: list[Row]) -> Row | None:
        """The untrained retriever that this one began as: the same encoder, judged on the same data."""
        if self.kind != "augmented":
            return None
        same = [r for r in rows if r.kind == "frozen" and r.scores and r.judged_on == self.judged_on]
        named = [r for r in same if r.params.get("base") == self.params.get("base")]
        return next((r for r in named or same if r._encoder == self._encoder), named[0] if named else None)

    def bm25(self, rows: list[Row]) -> Row | None:
        same = (r for r in rows if r.kind == "bm25" and r.scores and r.judged_on == self.judged_on)
        return next(same, None)

    @property
    def base(self) -> str:
        """What people call the retriever that was trained."""
        if self.kind == "bm25":
            return "BM25"
        base = str(self.params.get("base") or self.defaults.get("base") or "base")
        return base.rstrip("/").rsplit("/", 1)[-1]

    @property
    def generator(self) -> str:
        if self.kind != "augmented":
            return ""
        named = self.params.get("generator")
        stage = self.folders.found(self.arm.generated)["stage"] if self.arm.generated else {}
        return str(named or stage.get("strategy", {}).get("type") or "generated")

    def series(self) -> str:
        """Equal for arms that differ only in how many rows they were trained on."""
        return json.dumps({k: v for k, v in self.params.items() if k not in AMOUNTS}, sort_keys=True)

    def name(self, rows: list[Row]) -> None:
        """Sets ``label``: base, generator, and what else varies among the arms."""
        arms = [r.params for r in rows if r.kind == "augmented"]
        known = ("base", "generator", "volume")
        extra = [k for k in self.params if k not in known and len({json.dumps(p.get(k)) for p in arms}) > 1]
        parts = [f"{k}={self.params[k]}" for k in extra] if self.kind == "augmented" else []
        self.label = " ".join([self.generator or {"frozen": "frozen"}.get(self.kind, ""), *parts]).strip()

    def described(self, rows: list[Row]) -> Json:
        arm = self.kind == "augmented"
        frozen, bm25 = self.frozen(rows), self.bm25(rows) if arm else None
        return {
            **{key: self.trial.get(key) for key in ("trial", "kind", "state", "error", "params", "folder")},
            "base": self.base,
            "generator": self.generator,
            "label": self.label,
            "series": self.series(),
            "volume": self.params.get("volume"),
            "used": self.arm.used if arm else 0,
            "frozen": frozen.id if frozen else None,
            "bm25": bm25.id if bm25 else None,
            "cost": self.arm.cost() if arm and self.arm.train else None,
            "seconds": self.trial.get("seconds", 0.0),
        }


def _boards(rows: list[Row], warnings: list[str]) -> list[Board]:
    """One board for each judged data set, the in-distribution one first."""
    boards: list[Board] = []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.scores:
            groups.setdefault(row.judged_on, []).append(row)
    names = Counter(name for group in groups.values() for name in group[0].scores)
    for key, group in groups.items():
        for position, name in enumerate(group[0].scores):
            members = [row for row in group if MEASURE in row.scores.get(name, {})]
            if not members:
                continue
            asked = [set(row.scores[name][MEASURE]) for row in members]
            queries = sorted(set.intersection(*asked))
            if len(queries) < max(len(a) for a in asked):
                warnings.append(f"{name}: rows are compared on the {len(queries)} queries that all of them have")
            if queries:
                shown = name if names[name] == 1 else f"{name} ({key[:4]})"
                boards.append(Board(shown, name, "in" if position == 0 else "out", members, queries))
    return sorted(boards, key=lambda board: board.role != "in")


@dataclass
class Board:
    """All trials on one data set: values by query, and bootstrap means that all trials share."""

    name: str
    key: str
    role: str
    rows: list[Row]
    queries: list[str]
    boots: dict[str, stats.Floats] = field(default_factory=dict)

    def described(self) -> Json:
        return {"name": self.name, "role": self.role, "queries": len(self.queries), "measures": self.measures}

    @cached_property
    def measures(self) -> list[str]:
        return [m for m in self.rows[0].scores[self.key] if all(m in r.scores[self.key] for r in self.rows)]

    @cached_property
    def column(self) -> dict[str, int]:
        return {row.id: i for i, row in enumerate(self.rows)}

    def values(self, measure: str) -> stats.Floats:
        """``[queries, trials]``."""
        return np.array([[row.scores[self.key][measure][q] for row in self.rows] for q in self.queries])

    def score(self, trials: dict[str, Json]) -> None:
        """Adds this data set's means, gains, intervals and tests to the trials."""
        for measure in self.measures:
            values = self.values(measure)
            boots = self.boots[measure] = stats.resampled_means(values)
            means = values.mean(axis=0)
            for i, row in enumerate(self.rows):
                low, high = stats.interval(boots[:, i])
                scores = trials[row.id]["scores"].setdefault(self.name, {})
                scores[measure] = {"mean": float(means[i]), "low": low, "high": high}
            arms = [row for row in self.rows if trials[row.id]["frozen"] in self.column]
            if not arms:
                continue
            gains = np.stack([values[:, self.column[r.id]] - self._other(values, trials, r) for r in arms], axis=1)
            tested = stats.randomisation_p(gains).tolist()
            for row, p, corrected in zip(arms, tested, stats.holm(tested), strict=True):
                found = trials[row.id]["scores"][self.name][measure]
                found |= self.gap(measure, row.id, trials[row.id]["frozen"]) | {"p": p, "p_holm": corrected}
                if trials[row.id]["bm25"] in self.column:
                    found["over_bm25"] = self.gap(measure, row.id, trials[row.id]["bm25"])

    def _other(self, values: stats.Floats, trials: dict[str, Json], row: Row) -> stats.Floats:
        return values[:, self.column[trials[row.id]["frozen"]]]

    def gap(self, measure: str, trial: str, other: str) -> Json:
        """The mean of ``trial`` minus that of ``other``, with a paired interval."""
        i, j = self.column[trial], self.column[other]
        values = self.values(measure)
        low, high = stats.interval(self.boots[measure][:, i] - self.boots[measure][:, j])
        return {"delta": float((values[:, i] - values[:, j]).mean()), "delta_low": low, "delta_high": high}

    def curves(self, trials: dict[str, Json]) -> list[Json]:
        """Each generator and base over volume, from the frozen base at 0 on."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if trials[row.id]["frozen"] in self.column:
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
        """For the best arm of each base: queries won and lost against the frozen base, and the ten that changed most."""
        best: dict[str, Row] = {}
        for row in self.rows:
            if trials[row.id]["frozen"] in self.column:
                now = best.setdefault(row.base, row)
                if self._mean(trials, row) > self._mean(trials, now):
                    best[row.base] = row
        return [self._changed(trials, row) for row in best.values()]

    def _mean(self, trials: dict[str, Json], row: Row) -> float:
        return trials[row.id]["scores"][self.name][MEASURE]["mean"]

    def _changed(self, trials: dict[str, Json], row: Row) -> Json:
        values = self.values(MEASURE)
        after, before = values[:, self.column[row.id]], self._other(values, trials, row)
        gains = after - before
        most = np.argsort(-np.abs(gains), kind="stable")[:10]
        said = _query_texts(row, self.key, {self.queries[i] for i in most})
        return {
            "set": self.name,
            "base": row.base,
            "trial": row.id,
            "label": row.label,
            "used": trials[row.id]["used"],
            "won": int((gains > 1e-9).sum()),
            "lost": int((gains < -1e-9).sum()),
            "same": int((np.abs(gains) <= 1e-9).sum()),
            "queries": [
                {
                    "query_id": self.queries[i],
                    "text": said.get(self.queries[i], ""),
                    "before": float(before[i]),
                    "after": float(after[i]),
                }
                for i in most
                if abs(gains[i]) > 1e-9
            ],
        }


def _price(trial: Json) -> float:
    return (trial["cost"] or {}).get("price", 0.0)


def _query_texts(row: Row, name: str, wanted: set[str]) -> dict[str, str]:
    """The wording of some judged queries, out of the data that the evaluation of that name read."""
    folders = row.folders
    for inner in folders.found(row.trial["folder"])["inputs"].values():
        manifest = folders.found(inner)
        data = manifest["inputs"].get("data")
        if manifest["stage"].get("name") == name.split("/")[0] and data and folders.manifest(data):
            rows = folders.artifact(data).read("queries").to_pylist()
            return {r["query_id"]: r["text"] for r in rows if r["query_id"] in wanted}
    return {}


def generators(rows: list[Row]) -> list[Json]:
    """The funnel of each set of examples that arms were drawn from, once."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.kind == "augmented" and row.arm.mined:
            seen.setdefault(row.arm.mined, row)
    twice = Counter(row.generator for row in seen.values())
    found = []
    for mined, row in seen.items():
        label = row.generator if twice[row.generator] == 1 else f"{row.generator} ({mined[-4:]})"
        found.append(funnel(row.arm, label) | {"mined": mined, "trial": row.id})
    return found


def _stages(folders: Folders, rows: list[Row]) -> list[Json]:
    """Every complete folder of the study once, inputs first, with what it cost and how many trials need it."""
    used = Counter[str]()
    for row in rows:
        used.update(folders.ancestors(row.trial["folder"]) or [n for n in row.trial["stages"] if folders.manifest(n)])
    found = []
    for name, trials in used.items():
        manifest = folders.found(name)
        counts, cost = manifest["counts"], manifest["cost"]
        found.append(
            {
                "folder": name,
                "fingerprint": manifest.get("fingerprint", ""),
                "in": counts.get("in"),
                "out": counts.get("out"),
                "seconds": cost.get("wall_s", 0.0),
                "price": manifest.get("price") or 0.0,
                "wasted": bill["usd"]["waste"] if (bill := manifest.get("bill")) else 0.0,
                "busy": bill["seconds"]["busy"] / bill["seconds"]["held"] if bill and bill["seconds"]["held"] else None,
                "attempts": manifest.get("attempts", 1),
                "trials": trials,
            }
        )
    return found


def _versions(folders: Folders, rows: list[Row]) -> Json:
    """Versions under which the folders were made; several where they differ."""
    packages: dict[str, set[str]] = {}
    code: set[str] = set()
    for name in {n for row in rows for n in folders.ancestors(row.trial["folder"])}:
        manifest: dict[str, Any] = folders.found(name)
        code.add(str(manifest.get("code", "")))
        for package, version in manifest.get("packages", {}).items():
            packages.setdefault(package, set()).add(version)
    return {
        "code": " and ".join(sorted(code)),
        "packages": {name: " and ".join(sorted(versions)) for name, versions in sorted(packages.items())},
    }
