"""What a scorecard was made from, read from manifests: its ancestors, the part each plays, and what each cost.

Parts are told by what a folder reads and writes, not by its class, so stages of plugins are found too. Nothing here
opens a model or needs the machine that the folders were made on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dagr_ray import bill
from dagr_ray.artifact import Artifact, Json


class Folders:
    """Complete folders of a runs folder by name; each manifest is read once."""

    def __init__(self, runs: str) -> None:
        self.runs = runs
        self._manifests: dict[str, Json | None] = {}

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.runs, name)

    def manifest(self, name: str) -> Json | None:
        if name not in self._manifests:
            self._manifests[name] = self.artifact(name).manifest
        return self._manifests[name]

    def found(self, name: str) -> Json:
        """The manifest of a folder, empty where it is gone (a study outlives what was deleted to save space)."""
        return self.manifest(name) or {"inputs": {}, "tables": {}, "counts": {}, "cost": {}, "stage": {}, "price": 0.0}

    def ancestors(self, name: str) -> list[str]:
        """The folder and all it was made from, inputs first, each once."""
        seen: dict[str, None] = {}

        def visit(each: str) -> None:
            if each not in seen and self.manifest(each) is not None:
                for inner in self.found(each)["inputs"].values():
                    visit(inner)
                seen.setdefault(each)

        visit(name)
        return list(seen)

    def sums(self, names: Iterable[str]) -> Json:
        """Seconds, dollars and tokens of some folders together; ``wasted_tokens`` (at most so many) are in no table."""
        manifests = [self.found(name) for name in names]
        costs = [m["cost"] for m in manifests]
        spent = {f"{kind}_tokens": sum(c.get(f"{kind}_tokens", 0) for c in costs) for kind in bill.KINDS}
        spent["wasted_tokens"] = sum(m.get("bill", {}).get("waste", {}).get("tokens", 0) for m in manifests)
        return {
            "seconds": sum(c.get("wall_s", 0.0) for c in costs),
            "price": sum(m.get("price") or 0.0 for m in manifests),
            **spent,
        }


@dataclass(frozen=True)
class Arm:
    """The folders behind one trained retriever; names are None where a part is not there."""

    folders: Folders
    card: str

    @cached_property
    def names(self) -> list[str]:
        return self.folders.ancestors(self.card)

    def _reading(self, field: str, table: str | None = None) -> str | None:
        """The last ancestor that has an input called ``field`` and writes ``table``."""
        for name in reversed(self.names):
            manifest = self.folders.found(name)
            if field in manifest["inputs"] and (table is None or table in manifest["tables"]):
                return name
        return None

    @cached_property
    def train(self) -> str | None:
        return self._reading("examples")

    @cached_property
    def taken(self) -> str | None:
        """The examples that were trained on."""
        return self.folders.found(self.train)["inputs"]["examples"] if self.train else None

    @cached_property
    def mined(self) -> str | None:
        """The examples that ``taken`` is drawn from; the same folder where nothing was drawn."""
        return self.folders.found(self.taken)["inputs"].get("mined", self.taken) if self.taken else None

    @cached_property
    def selected(self) -> str | None:
        return self._reading("parsed", "lineage")

    @cached_property
    def gated(self) -> str | None:
        """The selected queries without those that resemble a test query."""
        return self._reading("scan", "leaks")

    @cached_property
    def parsed(self) -> str | None:
        return self._reading("generations", "lineage")

    @cached_property
    def generated(self) -> str | None:
        """The last generation: those before it wrote what it was asked about."""
        return next((n for n in reversed(self.names) if "generations" in self.folders.found(n)["tables"]), None)

    @cached_property
    def used(self) -> int:
        """Rows trained on."""
        return _rows(self.folders, self.taken)

    @cached_property
    def accepted(self) -> int:
        """Rows that came through every filter and the mining."""
        return _rows(self.folders, self.mined)

    @cached_property
    def data_stages(self) -> list[str]:
        return self.folders.ancestors(self.mined) if self.mined else []

    def cost(self) -> Json:
        """What the arm's data and training cost. Judging is left out: frozen rows have it too.

        Data is made once for all volumes; an arm is charged the share of it that its rows are of the accepted rows.
        """
        data, training = self.folders.sums(self.data_stages), self.folders.sums([self.train] if self.train else [])
        share = self.used / self.accepted if self.accepted else 0.0
        return {
            "data_seconds": data["seconds"] * share,
            "train_seconds": training["seconds"],
            "seconds": data["seconds"] * share + training["seconds"],
            "prompt_tokens": round(data["prompt_tokens"] * share),
            "completion_tokens": round(data["completion_tokens"] * share),
            "price": data["price"] * share + training["price"],
        }


def _rows(folders: Folders, name: str | None) -> int:
    return folders.found(name)["tables"].get("examples", {}).get("rows", 0) if name else 0


def funnel(arm: Arm, label: str) -> Json:
    """How many completions an arm's generator wrote and what became of them, with reasons and the cost of an accepted one."""
    found = arm.folders.found
    steps = [(step, found(name)["counts"]) for step, name in _steps(arm) if name]
    rejected: list[Json] = []
    for step, counts in steps:
        # what Generate leaves out are passages, before any completion
        reasons = counts.get("rejected", {}) if step != "generate" else {}
        rejected += [{"step": step, "reason": reason, "rows": rows} for reason, rows in reasons.items() if rows]
    made = found(arm.generated)["tables"].get("generations", {}).get("rows", 0) if arm.generated else 0
    spent = arm.folders.sums(arm.data_stages)
    generate = found(arm.generated)["counts"] if arm.generated else {}
    return {
        "generator": label,
        "folder": arm.generated,
        "passages": generate.get("in", 0),
        "left_out": sum(generate.get("rejected", {}).values()),
        "completions": made,
        "errors": generate.get("errors", 0),
        "truncated": generate.get("truncated", 0),
        "accepted": arm.accepted,
        "rejected": sorted(rejected, key=lambda row: -row["rows"]),
        **spent,
        "price_per_accepted": spent["price"] / arm.accepted if arm.accepted else None,
        "seconds_per_accepted": spent["seconds"] / arm.accepted if arm.accepted else None,
        "tokens_per_accepted": (
            (spent["prompt_tokens"] + spent["completion_tokens"]) / arm.accepted if arm.accepted else None
        ),
    }


def _steps(arm: Arm) -> list[tuple[str, str | None]]:
    named = [
        ("generate", arm.generated),
        ("parse", arm.parsed),
        ("select", arm.selected),
        ("leaks", arm.gated),
        ("mine", arm.mined),
    ]
    seen: set[str | None] = set()
    return [(step, name) for step, name in named if not (name in seen or seen.add(name))]  # type: ignore[func-returns-value]
