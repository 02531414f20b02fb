"""Generates in steps until the filters have accepted enough queries, or a limit is reached."""

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
MARGIN = 1.05  # a step generates a little more than its rate suggests, so that the last step is seldom tiny
GROWTH = 4  # a step is at most this many times the rows so far: a rate from few rows is unreliable


class GenerateUntil(Stage):
    """Exactly ``accepted`` queries of ``selected``: generates for its passages in steps until the filters keep that many.

    Steps are disjoint slices of the corpus in hash order, each a stage of its own: an interrupted run resumes, and a
    larger goal reuses the steps of a smaller one as far as they are equal. Stops early at ``max_completions``
    completions, before ``max_cost`` dollars would be exceeded (estimated from the first step), or at the end of the
    corpus; ``counts.stopped`` names the reason. Queries equal except for case and spacing count once over all steps, and
    queries of the last step beyond the goal are rejected as ``surplus``.
    """

    abstract: ClassVar[bool] = False
    templates: ClassVar[tuple[str, ...]] = ("selected",)  # the steps are built from it
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
        """The only input that is known before the steps are built."""
        return self._generate().corpus

    def _parse(self) -> Parse:
        parsed = self.selected.parsed
        assert isinstance(parsed, Parse)
        return parsed

    def _generate(self) -> Generate:
        return self._parse().generations

    def step(self, start: int, stop: int) -> Select:
        """``selected`` over passages ``start`` to ``stop`` of the corpus in hash order."""
        template = self._generate()
        part = Sample(corpus=template.corpus, n=stop - start, skip=start)
        parsed = Parse(generations=template.model_copy(update={"corpus": part}), corpus=part)
        step = _with(self.selected, self._parse().fingerprint(), parsed)
        assert isinstance(step, Select)
        return step

    def dynamic_inputs(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """Builds the steps and returns their folders by name."""
        passages, samples = inputs["corpus"].count("corpus"), self._generate().per_passage()
        limit = passages if self.max_completions is None else min(passages, self.max_completions // samples)
        steps: Inputs = {}
        texts: set[str] = set()
        done, spent, step_size = 0, 0.0, min(self.first_step, limit)
        while step_size > 0:
            step = self.step(done, done + step_size)
            folder = build(step)
            steps[f"steps.{len(steps)}"] = folder
            done += step_size
            texts |= set(tables.fold_texts(folder.read("queries", ["text"])["text"]).to_pylist())
            spent += sum((stage.folder(folder.runs).manifest or {}).get("price", 0.0) for stage in _own(step))
            log.info("%s: %d of %d accepted after %d passages", self.folder_name(), len(texts), self.accepted, done)
            if len(texts) >= self.accepted:
                break
            needed = (self.accepted - len(texts)) / max(len(texts) / done, 1 / (GROWTH * done)) * MARGIN
            step_size = min(int(needed) + 1, GROWTH * done, limit - done)
            if self.max_cost is not None and spent:
                step_size = min(step_size, int((self.max_cost - spent) / (spent / done)))
        return steps

    def stopped(self, kept: int, candidates: int, corpus: int) -> str:
        """Why the steps ended: ``accepted``, ``max_completions``, ``corpus`` or ``max_cost``."""
        samples = self._generate().per_passage()
        if kept >= self.accepted:
            return "accepted"
        if self.max_completions is not None and candidates + samples > self.max_completions:
            return "max_completions"
        return "corpus" if candidates >= corpus * samples else "max_cost"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            steps = sorted((name for name in inputs if name.startswith("steps.")), key=lambda n: int(n.split(".")[1]))
            tables_by_name = {t: [inputs[s].read(t) for s in steps] for t in ("queries", "qrels", "lineage")}
            joined = {t: pa.concat_tables([tables.empty(t), *step_tables]) for t, step_tables in tables_by_name.items()}
            ids = joined["queries"]["query_id"].to_pylist()
            reasons: dict[str, str] = {}
            texts: set[str] = set()
            for query_id, text in zip(ids, tables.fold_texts(joined["queries"]["text"]).to_pylist(), strict=True):
                if text in texts:
                    reasons[query_id] = "duplicate"
                texts.add(text)
            order = sorted((i for i in ids if i not in reasons), key=lambda i: (tables.unit_of("goal", i), i))
            reasons |= dict.fromkeys(order[self.accepted :], "surplus")
            rejected = [{"id": i, "by": "goal", "reason": reason, "detail": None} for i, reason in reasons.items()]
            rejected_ids = pa.array(list(reasons), tables.TEXT)
            output = {
                name: table.filter(
                    pc.invert(pc.is_in(table["id" if name == "lineage" else "query_id"], value_set=rejected_ids))
                )
                for name, table in joined.items()
            }
            passages = sum(self._sample_size(inputs[s]) for s in steps)
            candidates = passages * self._generate().per_passage()
            accepted = output["queries"].num_rows
            reason = self.stopped(accepted, candidates, inputs["corpus"].count("corpus"))
            if reason != "accepted":
                log.warning(
                    "%s: stopped by %s with %d of %d accepted from %d candidates; raise it, or loosen the filters",
                    folder.name,
                    reason,
                    accepted,
                    self.accepted,
                    candidates,
                )
            counts: dict[str, Any] = {"in": len(ids), "out": accepted, "candidates": candidates, "stopped": {reason: 1}}
            counts["rejected"] = {
                f"goal/{reason}": sum(r == reason for r in reasons.values()) for reason in set(reasons.values())
            }
            return Output(output | {"rejected": tables.table("rejected", rejected)}, counts=counts)

        return run

    @staticmethod
    def _sample_size(step: Artifact) -> int:
        """The number of passages in a step, from its sample."""
        return step.plan["stage"]["parsed"]["corpus"]["n"]


def _own(step: Stage) -> list[Stage]:
    """The stages that belong to one step only."""
    return [stage for stage in walk(step) if any(isinstance(part, Generate) for part in walk(stage))]


def _with(config: Any, fingerprint: str, new: Stage) -> Any:
    """A copy of a config in which every stage with this fingerprint is replaced by ``new``."""
    if isinstance(config, Stage) and config.fingerprint() == fingerprint:
        return new
    if isinstance(config, tuple):
        return tuple(_with(item, fingerprint, new) for item in config)
    if not isinstance(config, Config):
        return config
    changed = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        replaced = _with(value, fingerprint, new)
        if replaced is not value:
            changed[name] = replaced
    return config.model_copy(update=changed) if changed else config
