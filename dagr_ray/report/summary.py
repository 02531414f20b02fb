"""A study as one JSON value: its arms with what they scored (see ``boards``), curves, costs, filters, the verdict."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dagr_ray.artifact import Artifact, Json
from dagr_ray.bill import Rates
from dagr_ray.config import ConfigError, digest
from dagr_ray.paths import told_apart
from dagr_ray.report.boards import MEASURE, averages, boards_of
from dagr_ray.report.leaks import leaks
from dagr_ray.report.lexical import lexical
from dagr_ray.report.lineage import Arm, Folders, funnel
from dagr_ray.report.verdict import verdict

# Parameters that set how many rows an arm is trained on: they move along a curve, the others tell curves apart.
AMOUNTS = ("volume", "density", "coverage")


def study_of(folder: Artifact) -> Json:
    """``study.json`` of a folder. Raises ConfigError where it is no study's, or damaged."""
    found = folder.read_json("study.json")
    if found is None:
        wrong = folder.problem("study.json")
        raise ConfigError(
            f"{folder.path}/{wrong}; run the study again: what is finished stays"
            if wrong
            else f"no study.json in {folder.path!r}; give a folder that starts with study-"
        )
    return found


def summarise(runs: str, study_folder: str) -> Json:
    """Everything that the tables and the page show, as plain JSON values. Reads finished folders only.

    Raises ConfigError where ``study_folder`` is no study.
    """
    study = study_of(Artifact(runs, study_folder))
    folders = Folders(runs)
    warnings: list[str] = []
    rows = [Row(folders, trial, study.get("defaults", {})) for trial in study["trials"]]
    _same_names(rows)
    for row in rows:
        row.name(rows)
    arms = _by_seed(rows, warnings)
    boards = boards_of(arms, warnings)
    trials = sorted((row.described(rows) for row in arms), key=_place)
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
        "averages": averages(boards, by_name),
        "trials": trials,
        "curves": curves,
        "generators": (made := generators(rows)),
        "leaks": leaks(folders, arms, made, MEASURE),
        "changes": [change for board in boards for change in board.changes(by_name)],
        "stages": _stages(folders, rows),
        "lexical": lexical(folders, (row.trial["folder"] for row in rows if row.kind == "bm25"), warnings),
        "warnings": warnings,
        "damaged": folders.damaged,
    }
    warnings += [f"left out, as it is damaged: {what}" for what in folders.damaged.values()]
    summary |= _versions(folders, rows)
    summary["total"] = folders.sums(stage["folder"] for stage in summary["stages"])
    summary["rates"] = sorted({str(Rates.from_json(b["rates"])) for b in _bills(folders, summary["stages"])})
    summary["verdict"] = verdict(summary)
    return summary


def _place(trial: Json) -> tuple[Any, ...]:
    """The order of the tables: BM25, then each base, frozen first, and its arms by generator and size."""
    kind = ("bm25", "frozen", "augmented").index(trial["kind"])
    return kind > 0, trial["base"], kind, trial["label"], trial["used"], trial["trial"]


def _same_names(rows: list[Row]) -> None:
    """Rows that are judged on the same data call it by the first one's names: a folder may have been renamed between."""
    first: dict[str, Row] = {}
    for row in rows:
        known = first.setdefault(row.judged_on, row)
        if known is not row:
            row.rename(dict(zip(row.set_names, known.set_names, strict=True)))


def _by_seed(rows: list[Row], warnings: list[str]) -> list[Row]:
    """The rows, but of trials that differ in nothing but ``seed`` only the first that has scores, which knows the others."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = {k: v for k, v in row.params.items() if k != "seed"}
        key = json.dumps(same, sort_keys=True) if row.kind == "augmented" else row.id
        groups.setdefault(key, []).append(row)
    found = []
    for group in groups.values():
        first = next((row for row in group if row.scores), group[0])
        first.seeds = [row for row in group if row.scores and row.judged_on == first.judged_on] or [first]
        first.trials = group
        found.append(first)
        if 0 < len(first.seeds) < len(group) and first.scores:
            warnings.append(f"{first.base} {first.label}: {len(first.seeds)} of {len(group)} seeds have a result")
    return found


@dataclass
class Row:
    """A trial with what its scorecard holds; ``seeds`` are the trials of the same arm that have a result, itself one of them."""

    folders: Folders
    trial: Json
    defaults: Json = field(default_factory=dict)
    label: str = ""
    base: str = ""
    seeds: list[Row] = field(default_factory=list)
    trials: list[Row] = field(default_factory=list)

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
        rows: list[Json] = self.folders.soundly(self.trial["folder"], lambda card: card.read("metrics").to_pylist(), [])
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
    def judged(self) -> list[Json]:
        """Of each evaluation its name and split, and by content its data, its leak gate and its miners, where they are known.

        As the study wrote them down; in one of an earlier version, as the folders say.
        """
        if "judged" in self.trial:
            return self.trial["judged"]
        made = self.folders.found(self.trial["folder"])["inputs"]
        inputs = [self.folders.found(made.get(f"evaluations.{i}", ""))["inputs"] for i in range(len(self.evaluations))]
        known = all("data" in each for each in inputs)
        return [
            {
                "name": e.get("name"),
                "split": e.get("split"),
                "data": each["data"].rpartition("-")[2] if known else e.get("data"),
                "leaks": bool(e.get("leaks")),
            }
            for e, each in zip(self.evaluations, inputs, strict=True)
        ]

    @cached_property
    def judged_on(self) -> str:
        """Equal for trials that are judged on the same data, whatever it is called."""
        return digest([[each["data"], each["split"], bool(each["leaks"])] for each in self.judged])

    @cached_property
    def set_names(self) -> list[str]:
        """What ``scores`` calls the data of each evaluation."""
        splits: dict[str, set[str]] = {}
        for each in self.judged:
            splits.setdefault(each["name"] or "data", set()).add(each["split"] or "")
        named = [(each["name"] or "data", each["split"]) for each in self.judged]
        return [f"{name}/{split}" if len(splits[name]) > 1 else name for name, split in named]

    @property
    def judged_by_name(self) -> dict[str, Json]:
        return dict(zip(self.set_names, self.judged, strict=True))

    def rename(self, names: dict[str, str]) -> None:
        """Other names for what the row is judged on."""
        self.scores = {names.get(name, name): values for name, values in self.scores.items()}
        self.set_names = [names.get(name, name) for name in self.set_names]

    @cached_property
    def _encoder(self) -> str:
        if all("miners" in each for each in self.judged):
            return json.dumps([each["miners"] for each in self.judged])
        indexes = [(e.get("search") or {}).get("index") or {} for e in self.evaluations]
        return json.dumps([index.get("miner") for index in indexes], sort_keys=True)

    def frozen(self, rows: list[Row]) -> Row | None:
        """The untrained retriever that this one began as: the same encoder, judged on the same data."""
        if self.kind != "augmented":
            return None
        same = [r for r in rows if r.kind == "frozen" and r.scores and r.judged_on == self.judged_on]
        named = [r for r in same if r.params.get("base") == self.params.get("base")]
        return next((r for r in [*named, *same] if r._encoder == self._encoder), named[0] if named else None)

    def bm25(self, rows: list[Row]) -> Row | None:
        same = (r for r in rows if r.kind == "bm25" and r.scores and r.judged_on == self.judged_on)
        return next(same, None)

    @property
    def _base(self) -> str:
        return str(self.params.get("base") or self.defaults.get("base") or "base")

    @property
    def generator(self) -> str:
        if self.kind != "augmented":
            return ""
        if self.arm.taken and not self.arm.generated:
            return "human"  # nothing that it was trained on was generated
        named = self.params.get("generator")
        stage = self.folders.found(self.arm.generated)["stage"] if self.arm.generated else {}
        return str(named or stage.get("strategy", {}).get("type") or "generated")

    def series(self) -> str:
        """Equal for arms that differ only in how many rows they were trained on."""
        return json.dumps({k: v for k, v in self.params.items() if k not in (*AMOUNTS, "seed")}, sort_keys=True)

    def name(self, rows: list[Row]) -> None:
        """Sets ``base``, what people call the retriever, and ``label``: generator, and what else varies among the arms."""
        bases = told_apart(row._base for row in rows if row.kind != "bm25")
        self.base = "BM25" if self.kind == "bm25" else bases[self._base]
        arms = [r.params for r in rows if r.kind == "augmented"]
        known = ("base", "generator", "volume", "seed")
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
            "seeds": [
                {"trial": row.id, "seed": row.params.get("seed"), "state": row.trial.get("state"), "means": row.means}
                for row in self.trials or [self]
            ],
        }

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Data set -> measure -> mean of this trial alone."""
        return {
            name: {m: sum(values.values()) / len(values) for m, values in measures.items() if values}
            for name, measures in self.scores.items()
        }


def generators(rows: list[Row]) -> list[Json]:
    """The funnel of each set of examples that arms were drawn from, once; none for people's pairs."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.kind == "augmented" and row.arm.mined and row.arm.generated:
            seen.setdefault(row.arm.mined, row)
    twice = Counter(row.generator for row in seen.values())
    found = []
    for mined, row in seen.items():
        label = row.generator if twice[row.generator] == 1 else f"{row.label or row.generator} ({mined[-4:]})"
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
                "recall": counts.get("recall"),  # of an approximate search, by its probe
                "exact": bool(counts.get("exact")),
                "trials": trials,
            }
        )
    return found


def _bills(folders: Folders, stages: list[Json]) -> list[Json]:
    """The bills of the folders that something was paid for."""
    found = [folders.found(stage["folder"]).get("bill") for stage in stages]
    return [bill for bill in found if bill and bill["usd"]["total"]]


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
