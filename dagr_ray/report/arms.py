"""The trials of a study as rows: what each scorecard holds, and which trials are seeds of one arm."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property

from dagr_ray.core.artifact import Json
from dagr_ray.core.config import digest
from dagr_ray.core.paths import distinct_names
from dagr_ray.report.lineage import Arm, Folders

# Parameters that set how many rows an arm is trained on: they move along a curve, the others tell curves apart.
AMOUNTS = ("volume", "density", "coverage")


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
        bases = distinct_names(row._base for row in rows if row.kind != "bm25")
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
