"""The results of a study's trials: the scores of each scorecard, and which trials are seeds of one arm."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import digest
from dagr_ray.core.paths import distinct_names
from dagr_ray.report.lineage import ArmFolders, Folders

# Parameters that set how many rows an arm is trained on: they vary along a curve, all others distinguish curves.
AMOUNTS = ("volume", "density", "coverage")


def use_same_set_names(rows: list[TrialResult]) -> None:
    """Renames data sets so that trials evaluated on the same data use the same names: a folder may have been renamed."""
    first: dict[str, TrialResult] = {}
    for row in rows:
        earlier = first.setdefault(row.judged_on, row)
        if earlier is not row:
            row.rename(dict(zip(row.set_names, earlier.set_names, strict=True)))


def group_seeds(rows: list[TrialResult], warnings: list[str]) -> list[TrialResult]:
    """One result for all trials that differ only in ``seed``: the first trial with scores, which refers to the others."""
    groups: dict[str, list[TrialResult]] = {}
    for row in rows:
        same = {k: v for k, v in row.params.items() if k != "seed"}
        key = json.dumps(same, sort_keys=True) if row.kind == "augmented" else row.id
        groups.setdefault(key, []).append(row)
    arms = []
    for group in groups.values():
        first = next((row for row in group if row.scores), group[0])
        first.seeds = [row for row in group if row.scores and row.judged_on == first.judged_on] or [first]
        first.trials = group
        arms.append(first)
        if 0 < len(first.seeds) < len(group) and first.scores:
            warnings.append(f"{first.base} {first.label}: {len(first.seeds)} of {len(group)} seeds have a result")
    return arms


@dataclass
class TrialResult:
    """A trial with its scores. ``seeds`` are the trials of the same arm that have scores, including this trial."""

    folders: Folders
    trial: Json
    defaults: Json = field(default_factory=dict)
    label: str = ""
    base: str = ""
    seeds: list[TrialResult] = field(default_factory=list)
    trials: list[TrialResult] = field(default_factory=list)

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
    def arm(self) -> ArmFolders:
        return ArmFolders(self.folders, self.trial["folder"])

    @cached_property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Data set -> measure -> query -> value; empty if the trial has not finished."""
        if self.folders.manifest(self.trial["folder"]) is None:
            return {}
        rows: list[Json] = self.folders.read_or(self.trial["folder"], lambda card: card.read("metrics").to_pylist(), [])
        splits: dict[str, set[str]] = {}
        for row in rows:
            splits.setdefault(row["data"] or "data", set()).add(row["split"] or "")
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for row in rows:
            if row["query_id"] is not None:
                name = row["data"] or "data"
                name = f"{name}/{row['split']}" if len(splits[name]) > 1 else name
                scores.setdefault(name, {}).setdefault(row["measure"], {})[row["query_id"]] = row["value"]
        return scores

    @cached_property
    def evaluations(self) -> list[Json]:
        """The evaluations of the scorecard's stage, the in-distribution one first."""
        return self.folders.manifest_or_empty(self.trial["folder"])["stage"].get("evaluations", [])

    @cached_property
    def judged(self) -> list[Json]:
        """For each evaluation its name and split, and the fingerprints of its data, leak gate and miners, if known.

        The study records them. For a study of an earlier version, they are read from the folders.
        """
        if "judged" in self.trial:
            return self.trial["judged"]
        card_inputs = self.folders.manifest_or_empty(self.trial["folder"])["inputs"]
        inputs = [
            self.folders.manifest_or_empty(card_inputs.get(f"evaluations.{i}", ""))["inputs"]
            for i in range(len(self.evaluations))
        ]
        known = all("data" in names for names in inputs)
        return [
            {
                "name": e.get("name"),
                "split": e.get("split"),
                "data": names["data"].rpartition("-")[2] if known else e.get("data"),
                "leaks": bool(e.get("leaks")),
            }
            for e, names in zip(self.evaluations, inputs, strict=True)
        ]

    @cached_property
    def judged_on(self) -> str:
        """Equal for trials that are evaluated on the same data, whatever the data is called."""
        return digest([[e["data"], e["split"], bool(e["leaks"])] for e in self.judged])

    @cached_property
    def set_names(self) -> list[str]:
        """The name in ``scores`` of the data of each evaluation."""
        splits: dict[str, set[str]] = {}
        for evaluation in self.judged:
            splits.setdefault(evaluation["name"] or "data", set()).add(evaluation["split"] or "")
        named = [(evaluation["name"] or "data", evaluation["split"]) for evaluation in self.judged]
        return [f"{name}/{split}" if len(splits[name]) > 1 else name for name, split in named]

    @property
    def judged_by_name(self) -> dict[str, Json]:
        return dict(zip(self.set_names, self.judged, strict=True))

    def rename(self, names: dict[str, str]) -> None:
        """Renames the data sets that the trial is evaluated on."""
        self.scores = {names.get(name, name): values for name, values in self.scores.items()}
        self.set_names = [names.get(name, name) for name in self.set_names]

    @cached_property
    def _encoder(self) -> str:
        if all("miners" in evaluation for evaluation in self.judged):
            return json.dumps([evaluation["miners"] for evaluation in self.judged])
        indexes = [(e.get("search") or {}).get("index") or {} for e in self.evaluations]
        return json.dumps([index.get("miner") for index in indexes], sort_keys=True)

    def frozen(self, rows: list[TrialResult]) -> TrialResult | None:
        """The retriever before training: the same encoder, evaluated on the same data."""
        if self.kind != "augmented":
            return None
        same = [r for r in rows if r.kind == "frozen" and r.scores and r.judged_on == self.judged_on]
        named = [r for r in same if r.params.get("base") == self.params.get("base")]
        return next((r for r in [*named, *same] if r._encoder == self._encoder), named[0] if named else None)

    def bm25(self, rows: list[TrialResult]) -> TrialResult | None:
        same = (r for r in rows if r.kind == "bm25" and r.scores and r.judged_on == self.judged_on)
        return next(same, None)

    @property
    def _base(self) -> str:
        return str(self.params.get("base") or self.defaults.get("base") or "base")

    @property
    def generator(self) -> str:
        if self.kind != "augmented":
            return ""
        if self.arm.examples and not self.arm.generation:
            return "human"  # none of the training texts were generated
        name = self.params.get("generator")
        stage = self.folders.manifest_or_empty(self.arm.generation)["stage"] if self.arm.generation else {}
        return str(name or stage.get("strategy", {}).get("type") or "generated")

    def series(self) -> str:
        """Equal for arms that differ only in the number of rows that they were trained on."""
        return json.dumps({k: v for k, v in self.params.items() if k not in (*AMOUNTS, "seed")}, sort_keys=True)

    def name(self, rows: list[TrialResult]) -> None:
        """Sets ``base``, the short name of the retriever, and ``label``: the generator and other parameters that vary."""
        bases = distinct_names(row._base for row in rows if row.kind != "bm25")
        self.base = "BM25" if self.kind == "bm25" else bases[self._base]
        arms = [r.params for r in rows if r.kind == "augmented"]
        known = ("base", "generator", "volume", "seed")
        extra = [k for k in self.params if k not in known and len({json.dumps(p.get(k)) for p in arms}) > 1]
        parts = [f"{k}={self.params[k]}" for k in extra] if self.kind == "augmented" else []
        self.label = " ".join([self.generator or {"frozen": "frozen"}.get(self.kind, ""), *parts]).strip()

    def described(self, rows: list[TrialResult]) -> Json:
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
            "model": self._model() if arm else None,
            "trained_on": "pairs" if arm and self.arm.has_human_pairs else "queries",
            "frozen": frozen.id if frozen else None,
            "bm25": bm25.id if bm25 else None,
            "cost": self.arm.cost() if arm and self.arm.train else None,
            "seconds": self.trial.get("seconds", 0.0),
            "seeds": [
                {"trial": row.id, "seed": row.params.get("seed"), "state": row.trial.get("state"), "means": row.means}
                for row in self.trials or [self]
            ],
        }

    def _model(self) -> str | None:
        """The folder of the trained model, which sentence-transformers opens; None if nothing was trained."""
        if self.arm.train is None:
            return None
        folder = Artifact(self.folders.runs, self.arm.train)
        return f"{folder.path if folder.local else f'{folder.runs}/{folder.name}'}/model"

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """Data set -> measure -> mean of this trial alone."""
        return {
            name: {m: sum(values.values()) / len(values) for m, values in measures.items() if values}
            for name, measures in self.scores.items()
        }
