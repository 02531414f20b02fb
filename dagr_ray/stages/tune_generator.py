"""Tunes a generator on human queries."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.ray_train import TrainWorker, fit, model_files, model_folder
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.engines import Engine
from dagr_ray.prompts import Passage
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.doc2query import Doc2Query
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.lora import LoRA
from dagr_ray.training.settings import GeneratorSettings


class TuneGenerator(Stage):
    """The model of ``engine`` tuned on pairs of a passage and a query that a person wrote for it.

    The pairs are the relevant ones of ``data``'s split ``split``, at most ``n`` of them, drawn by hash, so that a smaller
    draw is part of a larger one. Prompts are the strategy's, as in ``Generate``; the loss covers only the query. Sources:
    doc2query (arXiv 1904.08375), and SPTAR (arXiv 2307.08303) for tuning on few pairs. Give the stage to ``Generate`` as
    ``tuned``, with the same engine and strategy.

    ``exemplars`` holds the training pairs. If they come from the evaluated collection, give this stage as ``exclude`` to
    the stages that sample passages and evaluate, because a generator may have memorised its pairs.

    ``lora`` trains adapters instead of the weights; they are merged before saving. ``model/`` is a plain folder in the
    type of the model's own weights, which every engine reads. Metrics: ``loss@<step>``, per token of a query.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "train"
    starts_workers: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("metrics", "exemplars")
    judged: ClassVar[dict[str, str]] = {"data": "split"}
    data: Stage
    engine: Engine
    strategy: Strategy = Doc2Query()
    split: str = "dev"
    n: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_length: Annotated[int, Field(ge=64)] = 512
    max_answer: Annotated[int, Field(ge=4)] = 48
    lora: LoRA | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def label(self) -> str:
        return "-".join(filter(None, [self.split, str(self.n or "")]))

    def check(self) -> None:
        """Raises ConfigError if the engine has no model of its own that could be tuned, or the prompts need more than a passage."""
        self.engine.tunable_folder()
        if self.strategy.reads != "corpus":
            raise ConfigError(
                f"tune-generator: strategy {self.strategy.type!r} reads {self.strategy.reads}; give one that reads passages"
            )
        if self.lora is not None:
            self.lora.check()

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            pairs = self.pairs(inputs["data"])
            if not pairs:
                raise ConfigError(
                    f"tune-generator: {inputs['data'].name} has no relevant pair in split {self.split!r}; give another split"
                )
            started = time.time()
            job = {"engine": self.engine, "settings": self._settings(pool), "pairs": [self._pair(row) for row in pairs]}
            result = fit(_work, job, {}, folder, pool)
            metrics = [{"measure": f"loss@{step}", "value": loss} for step, loss in result["losses"]]
            shown = [{name: row[name] for name in ("query_id", "doc_id", "query", "passage")} for row in pairs]
            Checkpoints(folder, "").clear()
            return Output(
                {"metrics": tables.table("metrics", metrics), "exemplars": tables.table("exemplars", shown)},
                [f"model/{name}" for name in result["files"]],
                {"in": len(pairs), "out": len(pairs)} | result["counts"],
                {"train_s": result["train_s"], "setup_s": time.time() - started - result["train_s"]},
            )

        return run

    def pairs(self, data: Artifact) -> list[dict[str, Any]]:
        """The pairs to learn from, in the order drawn: ``query_id``, ``doc_id``, ``query``, ``title``, ``text``, ``passage``."""
        qrels = data.qrels(self.split, self.type)
        relevant = [row for row in qrels.to_pylist() if row["relevance"] > 0]
        relevant.sort(key=lambda row: tables.unit_of("tune-generator", self.seed, row["query_id"], row["doc_id"]))
        relevant = relevant[: self.n]
        query_of = tables.texts_of(data.read("queries"))
        passages = rows_with(data, "corpus", "doc_id", {row["doc_id"] for row in relevant})
        passage_of = {row["doc_id"]: row for row in passages.to_pylist()}
        rows = []
        for row in relevant:
            passage, query = passage_of.get(row["doc_id"]), query_of.get(row["query_id"], "").strip()
            if passage is not None and query:
                text = tables.passage_text(passage["title"], passage["text"])
                rows.append(row | {"query": query, "title": passage["title"], "text": passage["text"], "passage": text})
        return rows

    def _pair(self, row: dict[str, Any]) -> tuple[str, str]:
        passage = Passage(row["doc_id"], row["title"] or "", row["text"])
        return self.strategy.prompt(passage, (), random.Random(self.seed)).text, " ".join(row["query"].split())

    def _settings(self, pool: Pool) -> GeneratorSettings:
        named = {field.name for field in fields(GeneratorSettings)} & set(TuneGenerator.model_fields)
        return GeneratorSettings(**{n: getattr(self, n) for n in named}, checkpoint_every=pool.checkpoint_every)


def _work(config: dict[str, Any], worker: TrainWorker) -> dict[str, Any] | None:
    """One worker of a tuning."""
    from dagr_ray.training.generator import tune

    checkpoints = Checkpoints(worker.folder, worker.attempt, worker.rank, worker.workers)
    with model_folder(worker.folder) if worker.rank == 0 else tempfile.TemporaryDirectory() as target:
        tuned = tune(
            config["engine"].tunable_folder(), config["pairs"], config["settings"], Path(target),
            rank=worker.rank, workers=worker.workers, device=worker.device, checkpoints=checkpoints,
        )  # fmt: skip
        if worker.rank:
            return None
        files = model_files(Path(target))
    counts = {"steps": tuned.steps, "tokens": tuned.tokens, "cut": tuned.cut}
    return {"losses": tuned.losses, "counts": counts, "train_s": tuned.seconds, "files": files}
