"""A goal in place of a size: generate in steps until the filters have accepted enough, or a limit is reached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AliasChoices, Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import Config
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived, walk
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Sample

log = logging.getLogger("dagr")
MARGIN = 1.05  # a step asks for a little more than its rate says, so that the last one is seldom a tiny one
GROWTH = 4  # times what was asked so far: the rate of few rows is a guess


class GenerateUntil(Stage):
    """Exactly ``accepted`` queries of ``selected``: its passages are asked in steps until the filters have kept that many.

    Steps are disjoint slices of the corpus in the order of a hash, each a stage of its own: a run that was ended goes
    on, and a larger goal begins with the steps of a smaller one as far as they are the same. Stops early at
    ``max_completions`` completions, before ``max_cost`` dollars would be spent (what the first step costs tells), or at
    the end of the corpus; ``counts.stopped`` names which. Queries equal but for case and spacing count once over all
    steps, and what the last step gives beyond the goal is refused as ``surplus``.
    """

    abstract: ClassVar[bool] = False
    templates: ClassVar[tuple[str, ...]] = ("selected",)  # the steps are made by it
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    selected: Select
    accepted: Annotated[int, Field(ge=1)]
    max_completions: Annotated[int, Field(ge=1)] | None = Field(
        None, validation_alias=AliasChoices("max_completions", "max_candidates")
    )  # its name in 0.1 works until 0.3
    max_cost: Annotated[float, Field(gt=0)] | None = None
    first_step: Annotated[int, Field(ge=1)] = 512

    def label(self) -> str:
        return f"{self.accepted}"

    @derived("corpus")
    def _corpus(self) -> Stage:
        """The only input before the steps are built: their number is not known then."""
        return self._generate().corpus

    def _parse(self) -> Parse:
        parsed = self.selected.parsed
        assert isinstance(parsed, Parse)
        return parsed

    def _generate(self) -> Generate:
        return self._parse().generations

    def step(self, start: int, stop: int) -> Select:
        """``selected`` over the passages ``start`` to ``stop`` of the corpus in the order of the hash."""
        template = self._generate()
        part = Sample(corpus=template.corpus, n=stop - start, skip=start)
        parsed = Parse(generations=template.model_copy(update={"corpus": part}), corpus=part)
        made = _with(self.selected, self._parse().fingerprint(), parsed)
        assert isinstance(made, Select)
        return made

    def dynamic_inputs(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """Builds the steps, and returns their folders by name."""
        passages, samples = inputs["corpus"].count("corpus"), self._generate().per_passage()
        limit = passages if self.max_completions is None else min(passages, self.max_completions // samples)
        steps: Inputs = {}
        seen: set[str] = set()
        done, spent, ask = 0, 0.0, min(self.first_step, limit)
        while ask > 0:
            step = self.step(done, done + ask)
            folder = build(step)
            steps[f"steps.{len(steps)}"] = folder
            done += ask
            seen |= set(tables.fold_texts(folder.read("queries", ["text"])["text"]).to_pylist())
            spent += sum((each.folder(folder.runs).manifest or {}).get("price", 0.0) for each in _own(step))
            log.info("%s: %d of %d accepted after %d passages", self.folder_name(), len(seen), self.accepted, done)
            if len(seen) >= self.accepted:
                break
            wanted = (self.accepted - len(seen)) / max(len(seen) / done, 1 / (GROWTH * done)) * MARGIN
            ask = min(int(wanted) + 1, GROWTH * done, limit - done)
            if self.max_cost is not None and spent:
                ask = min(ask, int((self.max_cost - spent) / (spent / done)))
        return steps

    def stopped(self, kept: int, candidates: int, corpus: int) -> str:
        """What ended the steps: ``accepted``, ``max_completions``, ``corpus`` or ``max_cost``."""
        samples = self._generate().per_passage()
        if kept >= self.accepted:
            return "accepted"
        if self.max_completions is not None and candidates + samples > self.max_completions:
            return "max_completions"
        return "corpus" if candidates >= corpus * samples else "max_cost"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            steps = sorted((name for name in inputs if name.startswith("steps.")), key=lambda n: int(n.split(".")[1]))
            parts = {t: [inputs[s].read(t) for s in steps] for t in ("queries", "qrels", "lineage")}
            whole = {t: pa.concat_tables([tables.empty(t), *found]) for t, found in parts.items()}
            ids, texts = (
                whole["queries"]["query_id"].to_pylist(),
                tables.fold_texts(whole["queries"]["text"]).to_pylist(),
            )
            reasons: dict[str, str] = {}
            seen: set[str] = set()
            for query_id, text in zip(ids, texts, strict=True):
                if text in seen:
                    reasons[query_id] = "duplicate"
                seen.add(text)
            order = sorted((i for i in ids if i not in reasons), key=lambda i: (tables.unit_of("goal", i), i))
            reasons |= dict.fromkeys(order[self.accepted :], "surplus")
            rejected = [{"id": i, "by": "goal", "reason": why, "detail": None} for i, why in reasons.items()]
            out = pa.array(list(reasons), tables.TEXT)
            made = {
                name: table.filter(pc.invert(pc.is_in(table["id" if name == "lineage" else "query_id"], value_set=out)))
                for name, table in whole.items()
            }
            passages = sum(self._asked(inputs[s]) for s in steps)
            candidates = passages * self._generate().per_passage()
            kept = made["queries"].num_rows
            why = self.stopped(kept, candidates, inputs["corpus"].count("corpus"))
            if why != "accepted":
                log.warning(
                    "%s: stopped by %s with %d of %d accepted from %d candidates; raise it, or loosen the filters",
                    folder.name,
                    why,
                    kept,
                    self.accepted,
                    candidates,
                )
            counts: dict[str, Any] = {"in": len(ids), "out": kept, "candidates": candidates, "stopped": {why: 1}}
            counts["rejected"] = {
                f"goal/{reason}": sum(r == reason for r in reasons.values()) for reason in set(reasons.values())
            }
            return Output(made | {"rejected": tables.table("rejected", rejected)}, counts=counts)

        return run

    @staticmethod
    def _asked(step: Artifact) -> int:
        """Passages of a step, from the sample below it."""
        return step.plan["stage"]["parsed"]["corpus"]["n"]


def _own(step: Stage) -> list[Stage]:
    """The stages of a step that no other step shares."""
    return [each for each in walk(step) if any(isinstance(inner, Generate) for inner in walk(each))]


def _with(config: Any, fingerprint: str, new: Stage) -> Any:
    """A copy of a config in which every stage with this fingerprint is ``new``."""
    if isinstance(config, Stage) and config.fingerprint() == fingerprint:
        return new
    if isinstance(config, tuple):
        return tuple(_with(item, fingerprint, new) for item in config)
    if not isinstance(config, Config):
        return config
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        other = _with(value, fingerprint, new)
        if other is not value:
            changed[name] = other
    return config.model_copy(update=changed) if changed else config
