"""What a scorecard was made from, read from manifests: its ancestors, the part each plays, and what each cost.

Parts are told by what a folder reads and writes, not by its class, so stages of plugins are found too. Nothing here
opens a model or needs the machine that the folders were made on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from dagr_ray.core import cost
from dagr_ray.core.artifact import Artifact, Damaged, Json, add_up

log = logging.getLogger("dagr")
T = TypeVar("T")

# Lines of a bill that are no part of the price.
BESIDE = ("setup", "waiting")


class Folders:
    """Complete folders of a runs folder by name; each manifest is read once."""

    def __init__(self, runs: str) -> None:
        self.runs = runs
        self._manifests: dict[str, Json | None] = {}
        self.damaged: dict[str, str] = {}

    def artifact(self, name: str) -> Artifact:
        return Artifact(self.runs, name)

    def manifest(self, name: str) -> Json | None:
        if name not in self._manifests:
            self._manifests[name] = self.artifact(name).manifest
        return self._manifests[name]

    def found(self, name: str) -> Json:
        """The manifest of a folder, empty where it is gone (a study outlives what was deleted to save space)."""
        return self.manifest(name) or {"inputs": {}, "tables": {}, "counts": {}, "cost": {}, "stage": {}, "price": 0.0}

    def soundly(self, name: str, read: Callable[[Artifact], T], otherwise: T) -> T:
        """What ``read`` gives of a folder; ``otherwise`` where that is damaged, which is noted in ``damaged``."""
        try:
            return read(self.artifact(name))
        except Damaged as error:
            if name not in self.damaged:
                log.warning("left out: %s; run its job again, which mends it", error)
            self.damaged[name] = str(error)
            return otherwise

    def ancestors(self, name: str) -> list[str]:
        """The folder and all it was made from, inputs first, each once."""
        found: list[str] = []
        seen: set[str] = set()

        def visit(each: str) -> None:
            if each not in seen and self.manifest(each) is not None:
                seen.add(each)  # before its inputs: what was put there by hand may name itself
                for inner in self.found(each)["inputs"].values():
                    visit(inner)
                found.append(each)

        visit(name)
        return found

    def sums(self, names: Iterable[str]) -> Json:
        """Seconds, dollars and tokens of some folders together; ``wasted_tokens`` (at most so many) are in no table.

        ``setup_price`` and ``waiting_price`` are no part of ``price``.
        """
        manifests = [self.found(name) for name in names]
        costs = [m["cost"] for m in manifests]
        spent = {f"{kind}_tokens": sum(c.get(f"{kind}_tokens", 0) for c in costs) for kind in cost.KINDS}
        spent["wasted_tokens"] = sum(m.get("bill", {}).get("waste", {}).get("tokens", 0) for m in manifests)
        return {
            "seconds": sum(c.get("wall_s", 0.0) for c in costs),
            "price": sum(m.get("price") or 0.0 for m in manifests),
            **{
                f"{line}_price": sum(m.get("bill", {}).get("usd", {}).get(line, 0.0) for m in manifests)
                for line in BESIDE
            },
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

    @cached_property
    def train(self) -> str | None:
        """The last ancestor that reads examples."""
        return next((n for n in reversed(self.names) if "examples" in self.folders.found(n)["inputs"]), None)

    @cached_property
    def taken(self) -> str | None:
        """The examples that were trained on."""
        return self.folders.found(self.train)["inputs"]["examples"] if self.train else None

    @cached_property
    def mined(self) -> str | None:
        """The examples that ``taken`` is drawn from; the same folder where nothing was drawn."""
        return self.folders.found(self.taken)["inputs"].get("mined", self.taken) if self.taken else None

    @cached_property
    def generations(self) -> list[str]:
        """The generations whose texts the rows are made of: not those that only wrote what another one asks about."""
        every = [n for n in self.names if "generations" in self.folders.found(n)["tables"]]
        asked_about = {name for each in every for name in self.folders.ancestors(each)[:-1]}
        return [name for name in every if name not in asked_about]

    @cached_property
    def generated(self) -> str | None:
        """The first of them; a mixture has several."""
        return next(iter(self.generations), None)

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
    """How many completions an arm's generators wrote and what became of them, with reasons and the cost of an accepted one."""
    found, rejected = arm.folders.found, Counter[tuple[str, str]]()
    for step, name in _steps(arm):
        # what Generate leaves out are passages, before any completion
        if step != "generate":
            rejected.update({(step, reason): n for reason, n in found(name)["counts"].get("rejected", {}).items() if n})
    made = sum(found(name)["tables"]["generations"]["rows"] for name in arm.generations)
    asked: Json = {}
    for name in arm.generations:
        add_up(
            asked, {k: v for k, v in found(name)["counts"].items() if k in ("in", "errors", "truncated", "rejected")}
        )
    spent = arm.folders.sums(arm.data_stages)
    return {
        "generator": label,
        "folder": arm.generated,
        "passages": asked.get("in", 0),
        "left_out": sum(asked.get("rejected", {}).values()),
        "completions": made,
        "errors": asked.get("errors", 0),
        "truncated": asked.get("truncated", 0),
        "accepted": arm.accepted,
        "parts": _parts(arm),
        "rejected": [{"step": step, "reason": reason, "rows": rows} for (step, reason), rows in rejected.most_common()],
        **spent,
        "price_per_accepted": spent["price"] / arm.accepted if arm.accepted else None,
        "seconds_per_accepted": spent["seconds"] / arm.accepted if arm.accepted else None,
        "tokens_per_accepted": (
            (spent["prompt_tokens"] + spent["completion_tokens"]) / arm.accepted if arm.accepted else None
        ),
    }


def _steps(arm: Arm) -> list[tuple[str, str]]:
    """The folders that completions went through, each once, with the part that it plays."""
    behind = {name for each in arm.generations for name in arm.folders.ancestors(each)[:-1]}
    steps: dict[str, str] = {}
    for name in arm.data_stages:
        manifest = arm.folders.found(name)
        inputs, made = manifest["inputs"], manifest["tables"]
        if name in behind or "rejected" not in made:
            continue
        if name in arm.generations:
            steps[name] = "generate"
        elif "generations" in inputs and "lineage" in made:
            steps[name] = "parse"
        elif "parsed" in inputs and "lineage" in made:
            steps[name] = "select"
        elif "scan" in inputs and "leaks" in made:
            steps[name] = "leaks"
        elif name == arm.mined or "examples" in made:
            steps[name] = "mine"
    return [(step, name) for name, step in steps.items()]


def _parts(arm: Arm) -> list[Json]:
    """What each source of a mixture, or each round of a refinement, asked and gave, in their order; none for other arms."""
    for name in reversed(arm.data_stages):
        inputs = arm.folders.found(name)["inputs"]
        joined = [inner for field, inner in inputs.items() if field.startswith(("arms.", "queries."))]
        if len(joined) > 1:
            return [part for inner in joined if (part := _part(arm.folders, inner)) is not None]
    return []


def _part(folders: Folders, name: str) -> Json | None:
    chain = folders.ancestors(name)
    generated = next((n for n in reversed(chain) if "generations" in folders.found(n)["tables"]), None)
    if generated is None:
        return None
    manifest = folders.found(generated)
    return {
        "folder": name,
        "strategy": manifest["stage"].get("strategy", {}).get("type", ""),
        "completions": manifest["tables"]["generations"]["rows"],
        "accepted": folders.found(name)["tables"].get("queries", {}).get("rows", 0),
    }
