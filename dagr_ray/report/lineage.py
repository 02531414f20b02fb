"""Reads from manifests what a scorecard was built from: its ancestors, their roles, and their costs.

A manifest records the role of its stage and the inputs whose rows the stage worked on (``Stage.role``, ``rows_from``), so
stages of plugins are recognised too. Nothing here opens a model or needs the machine that built the folders.
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
from dagr_ray.core.stage import main_inputs_of, role_of

log = logging.getLogger("dagr")
T = TypeVar("T")

# Lines of a bill that the price does not include.
NOT_IN_PRICE = ("setup", "waiting")
# Role of a stage that rejects rows -> the step of the funnel.
STEPS = {"parse": "parse", "select": "select", "leak-gate": "leaks", "mine": "mine", "relabel": "mine"}


class Folders:
    """The finished folders of a runs folder, by name. Each manifest is read once."""

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

    def manifest_or_empty(self, name: str) -> Json:
        """The manifest of a folder; an empty manifest if the folder was deleted, for example to save space."""
        return self.manifest(name) or {"inputs": {}, "tables": {}, "counts": {}, "cost": {}, "stage": {}, "price": 0.0}

    def role(self, name: str) -> str:
        """The role of a folder's stage, as its class declares it."""
        return role_of(self.manifest_or_empty(name))

    def main(self, name: str) -> list[str]:
        """The folders whose rows a folder's stage worked on."""
        return main_inputs_of(self.manifest_or_empty(name))

    def inputs_with(self, name: str, role: str) -> list[str]:
        """The inputs of a folder whose stages have this role."""
        return [inner for inner in self.manifest_or_empty(name)["inputs"].values() if self.role(inner) == role]

    def judged_data(self, evaluation: str) -> str | None:
        """The input of an evaluation that holds the judgements of a split."""
        for name in self.manifest_or_empty(evaluation)["inputs"].values():
            if any(table.startswith("qrels.") for table in self.manifest_or_empty(name)["tables"]):
                return name
        return None

    def read_or(self, name: str, read: Callable[[Artifact], T], default: T) -> T:
        """The result of ``read`` for a folder, or ``default`` if the folder is damaged, which is recorded in ``damaged``."""
        try:
            return read(self.artifact(name))
        except Damaged as error:
            if name not in self.damaged:
                log.warning("left out: %s; run its job again to rebuild it", error)
            self.damaged[name] = str(error)
            return default

    def ancestors(self, name: str) -> list[str]:
        """The folder and all folders that it was built from, inputs first, each once."""
        names: list[str] = []
        seen: set[str] = set()

        def visit(folder: str) -> None:
            if folder not in seen and self.manifest(folder) is not None:
                seen.add(folder)  # before its inputs: a manifest written by hand may name its own folder
                for inner in self.manifest_or_empty(folder)["inputs"].values():
                    visit(inner)
                names.append(folder)

        visit(name)
        return names

    def sums(self, names: Iterable[str]) -> Json:
        """The total seconds, dollars and tokens of some folders.

        ``wasted_tokens`` is an upper bound of the tokens whose texts are in no table. ``price`` does not include
        ``setup_price`` and ``waiting_price``.
        """
        manifests = [self.manifest_or_empty(name) for name in names]
        costs = [m["cost"] for m in manifests]
        spent = {f"{kind}_tokens": sum(c.get(f"{kind}_tokens", 0) for c in costs) for kind in cost.KINDS}
        spent["wasted_tokens"] = sum(m.get("bill", {}).get("waste", {}).get("tokens", 0) for m in manifests)
        return {
            "seconds": sum(c.get("wall_s", 0.0) for c in costs),
            "price": sum(m.get("price") or 0.0 for m in manifests),
            **{
                f"{line}_price": sum(m.get("bill", {}).get("usd", {}).get(line, 0.0) for m in manifests)
                for line in NOT_IN_PRICE
            },
            **spent,
        }


@dataclass(frozen=True)
class ArmFolders:
    """The folders behind one trained retriever. A name is None if the arm has no such folder."""

    folders: Folders
    card: str

    @cached_property
    def names(self) -> list[str]:
        return self.folders.ancestors(self.card)

    @cached_property
    def train(self) -> str | None:
        """The last training."""
        return next((n for n in reversed(self.names) if self.folders.role(n) == "train"), None)

    @cached_property
    def examples(self) -> str | None:
        """The examples that were trained on."""
        return next(iter(self.folders.main(self.train)), None) if self.train else None

    @cached_property
    def mined(self) -> str | None:
        """The examples that ``examples`` were drawn from; the same folder if none were drawn."""
        if self.examples is None or self.folders.role(self.examples) not in ("take", "relabel"):
            return self.examples
        return next(iter(self.folders.main(self.examples)), self.examples)

    @cached_property
    def generations(self) -> list[str]:
        """The generations whose texts are in the rows, without those that only wrote texts for another generation to read."""
        every = [n for n in self.names if "generations" in self.folders.manifest_or_empty(n)["tables"]]
        intermediate = {name for last in every for name in self.folders.ancestors(last)[:-1]}
        return [name for name in every if name not in intermediate]

    @cached_property
    def before_generation(self) -> set[str]:
        """The folders that the generations were built from."""
        return {name for last in self.generations for name in self.folders.ancestors(last)[:-1]}

    @cached_property
    def has_human_pairs(self) -> bool:
        """Whether the examples contain pairs that people judged. Pairs that a generator only read do not count."""
        names = self.folders.ancestors(self.examples) if self.examples else []
        return any(self.folders.role(name) == "human" for name in names if name not in self.before_generation)

    @cached_property
    def generation(self) -> str | None:
        """The first of the generations; a mixture has several."""
        return next(iter(self.generations), None)

    @cached_property
    def used(self) -> int:
        """The number of rows that the arm was trained on."""
        return _rows(self.folders, self.examples)

    @cached_property
    def accepted(self) -> int:
        """The number of rows that passed every filter and the mining."""
        return _rows(self.folders, self.mined)

    @cached_property
    def data_stages(self) -> list[str]:
        return self.folders.ancestors(self.mined) if self.mined else []

    def cost(self) -> Json:
        """The cost of the arm's data and training, without the evaluation, which the frozen base has too.

        The data is generated once for all volumes. An arm is charged for the share of accepted rows that it used.
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
    return folders.manifest_or_empty(name)["tables"].get("examples", {}).get("rows", 0) if name else 0


def funnel(arm: ArmFolders, label: str) -> Json:
    """The completions of an arm's generators: how many were accepted or rejected, why, and the cost of an accepted one."""
    manifest, rejected = arm.folders.manifest_or_empty, Counter[tuple[str, str]]()
    for step, name in _steps(arm):
        # Generate rejects passages, before there is any completion
        if step != "generate":
            rejected.update(
                {(step, reason): n for reason, n in manifest(name)["counts"].get("rejected", {}).items() if n}
            )
    completions = sum(manifest(name)["tables"]["generations"]["rows"] for name in arm.generations)
    counts: Json = {}
    for name in arm.generations:
        add_up(
            counts,
            {k: v for k, v in manifest(name)["counts"].items() if k in ("in", "errors", "truncated", "rejected")},
        )
    spent = arm.folders.sums(arm.data_stages)
    return {
        "generator": label,
        "folder": arm.generation,
        "passages": counts.get("in", 0),
        "left_out": sum(counts.get("rejected", {}).values()),
        "completions": completions,
        "errors": counts.get("errors", 0),
        "truncated": counts.get("truncated", 0),
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


def _steps(arm: ArmFolders) -> list[tuple[str, str]]:
    """The folders that process the completions, each once, with its role."""
    steps: dict[str, str] = {}
    for name in arm.data_stages:
        tables, role = arm.folders.manifest_or_empty(name)["tables"], arm.folders.role(name)
        if name in arm.before_generation or "rejected" not in tables:
            continue
        if name in arm.generations:
            steps[name] = "generate"
        elif role in STEPS:
            steps[name] = STEPS[role]
        elif name == arm.mined or "examples" in tables:
            steps[name] = "mine"
    return [(step, name) for name, step in steps.items()]


def _parts(arm: ArmFolders) -> list[Json]:
    """The completions and accepted queries of each source of a mixture or round of a refinement; empty for other arms."""
    for name in reversed(arm.data_stages):
        sources = arm.folders.main(name) if arm.folders.role(name) == "mix" else []
        if len(sources) > 1:
            return [part for inner in sources if (part := _part(arm.folders, inner)) is not None]
    return []


def _part(folders: Folders, name: str) -> Json | None:
    chain = folders.ancestors(name)
    generation = next((n for n in reversed(chain) if "generations" in folders.manifest_or_empty(n)["tables"]), None)
    if generation is None:
        return None
    manifest = folders.manifest_or_empty(generation)
    return {
        "folder": name,
        "strategy": manifest["stage"].get("strategy", {}).get("type", ""),
        "completions": manifest["tables"]["generations"]["rows"],
        "accepted": folders.manifest_or_empty(name)["tables"].get("queries", {}).get("rows", 0),
    }
