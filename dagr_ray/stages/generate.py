"""Generates completions: builds the prompts of passages and sends them to the engine."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field, model_validator

from dagr_ray.core import cost, special_tokens, tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, OmitWhenDefault
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.engines import Completion, Engine, Sampling, token_usage
from dagr_ray.prompts import Exemplar, LazyRandom, Passage, Prompt
from dagr_ray.strategies import Strategy

READS = {"corpus": "passages", "pairs": "Pairs or LinkedPairs"}


class Generate(Stage):
    """``samples`` completions for each passage of ``corpus`` and strategy. Passages shown as exemplars are excluded.

    A completion's id and seed derive from this stage's fingerprint, its passage and its number, so they are the same with
    any number of workers and after any number of restarts. With ``tuned`` (a ``TuneGenerator`` of the same engine), its
    model answers. ``errors`` and ``truncated`` count passages. The cost counts a prompt's tokens once for all samples of a
    request.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "generate"
    rows_from: ClassVar[str] = "corpus"
    pool: ClassVar[str] = "generate"
    concurrent: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("generations", "rejected")
    corpus: Stage
    strategy: Strategy
    engine: Engine
    sampling: Sampling = Sampling()
    samples: Annotated[int, Field(ge=1)] = 1
    exemplars: Stage | None = None
    tuned: Annotated[Stage | None, OmitWhenDefault()] = None
    seed: int = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Generate:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                f"generate: samples = {self.samples} at temperature 0 would all be the same; "
                "raise the temperature, or set samples=1"
            )
        if self.strategy.reads not in self.corpus.outputs:
            raise ConfigError(
                f"generate: strategy {self.strategy.type!r} reads {self.strategy.reads}, but corpus is a "
                f"{self.corpus.type!r} without them; give {READS[self.strategy.reads]}"
            )
        return self

    def label(self) -> str:
        return f"{self.strategy.type}-{self.engine.type}{'-tuned' if self.tuned else ''}"

    def model_name(self) -> str:
        """The model that answers, as it is named in ``lineage``."""
        name = self.engine.model_name()
        return name if self.tuned is None else f"{name}+{self.tuned.folder_name()}"

    def engine_asked(self) -> Engine:
        return self.engine

    def size(self, inputs: Inputs) -> int:
        return inputs["corpus"].count(self.strategy.reads)

    def per_passage(self) -> int:
        """Completions per passage: ``samples`` for each strategy."""
        return self.samples * len(self.strategy.members())

    def per_request(self) -> int:
        """Completions per prompt: one if a strategy words each sample's prompt anew."""
        return 1 if any(strategy.per_sample() for strategy in self.strategy.members()) else self.samples

    @property
    def keeps_logprob(self) -> bool:
        """Whether the engine has to return log-probabilities."""
        return self.sampling.logprob or any(strategy.by_logprob for strategy in self.strategy.members())

    def skip_row(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """A skipped passage: no completions, and a row in ``rejected``."""
        [doc_id] = inputs["corpus"].slice(self.strategy.reads, row, row + 1)["doc_id"].to_pylist()
        row_rejected = {"id": doc_id, "by": "generate", "reason": reason, "detail": tables.clean(detail)}
        output = {"generations": tables.empty("generations"), "rejected": tables.table("rejected", [row_rejected])}
        return Output(output, counts={"in": 1, "out": 0, "errors": 0, "rejected": {f"generate/{reason}": 1}})

    def prompts(self, inputs: Inputs, ids: Iterable[str], sample: int = 0) -> dict[str, str]:
        """The exact prompts of passages for sample number ``sample``, by doc_id, before an engine cuts long ones."""
        rows, (shown, _) = rows_with(inputs["corpus"], self.strategy.reads, "doc_id", ids), _exemplars(inputs)
        requests, _ = self._requests(rows, tables.encode_id_part(self.fingerprint()), shown, set())
        prompts = requests.prompts[sample // self.per_request() :: self.per_passage() // self.per_request()]
        return {doc_id: prompt.text for doc_id, prompt in zip(requests.ids, prompts, strict=True)}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        # from the plan: a worker would have to read the whole corpus again, which may have changed meanwhile
        plan = folder.read_json("plan.json") or {"fingerprint": self.fingerprint()}
        ids, (shown, held_out) = tables.encode_id_part(plan["fingerprint"]), _exemplars(inputs)
        opening = time.time()
        engine = self.engine
        if "tuned" in inputs:
            engine = engine.with_model(Path(inputs["tuned"].local_path("model")))
        session = cost.with_remaining_budget(engine, folder, pool.workers).open(pool)
        atexit.register(session.close)
        start_s = [time.time() - opening]
        sampling = self.sampling.model_copy(update={"logprob": self.keeps_logprob})

        def run(start: int, stop: int) -> Output:
            requests, rejected = self._requests(
                inputs["corpus"].slice(self.strategy.reads, start, stop), ids, shown, held_out
            )
            generating = time.time()
            answers = session.generate(requests.prompts, self._seeds(requests), sampling, self.per_request())
            spent = {"generate_s": time.time() - generating, "engine_start_s": start_s.pop() if start_s else 0.0}
            generations = self._generations(requests, answers)
            samples = [completion for answer in answers for completion in answer]
            per_passage = self.per_passage()
            by_passage = [samples[i : i + per_passage] for i in range(0, len(samples), per_passage)]
            counts = {
                "in": stop - start,
                "out": generations["error"].null_count,
                "errors": sum(any(c.error for c in a) for a in by_passage) if any(c.error for c in samples) else 0,
                "truncated": sum(any(c.truncated for c in a) for a in by_passage),
                "rejected": rejected.counts_by_reason(),
            }
            output = {"generations": generations, "rejected": rejected.table()}
            return Output(output, counts=counts, cost={**token_usage(answers), **spent})

        return run

    def _requests(
        self, corpus: pa.Table, start: bytes, shown: tuple[Exemplar, ...], held_out: set[str]
    ) -> tuple[_Requests, tables.Rejected]:
        """The requests for passages, and the rejected passages. ``start`` is the first part of all ids."""
        requests, rejected, rng, strategies = _Requests(), tables.Rejected(), LazyRandom(), self.strategy.members()
        apart = any(strategy.per_sample() for strategy in strategies)
        plain = (
            partial(special_tokens.escape_special_tokens, own=self.engine.special_tokens())
            if self.engine.reads_markers
            else None
        )
        if plain:
            shown = tuple(Exemplar(plain(each.passage), plain(each.query)) for each in shown)
        for doc_id, title, text, *more in zip(*map(tables.texts, tables.prompt_source(corpus).columns), strict=True):
            if doc_id in held_out:
                rejected.add(doc_id, "exemplar", "held-out")
                continue
            if not (text.strip() or (title and title.strip())):
                rejected.add(doc_id, "generate", "empty-passage")
                continue
            content = start + tables.encode_id_part(doc_id)
            seed = tables.seed_for(content)
            requests.ids.append(doc_id)
            requests.contents.append(content)
            requests.seeds.append(seed)
            passage = Passage(doc_id, title or "", text, *more)
            if plain:
                passage = Passage(doc_id, *(plain(each or "") for each in passage[1:]))
            # prompts of a passage are adjacent, so that their common prefix is still in the engine's cache
            if apart:
                each = enumerate(strategies_of_samples(strategies, rng, seed, self.samples))
                requests.prompts += [one.prompt(passage, shown, rng.seeded(seed + i)) for i, one in each]
            else:
                requests.prompts += [strategy.prompt(passage, shown, rng.seeded(seed)) for strategy in strategies]
        return requests, rejected

    def _seeds(self, requests: _Requests) -> list[int]:
        """The seed of each prompt's first sample."""
        firsts = range(0, self.per_passage(), self.per_request())
        return [seed + first for seed in requests.seeds for first in firsts]

    def _generations(self, requests: _Requests, answers: list[list[Completion]]) -> pa.Table:
        """The rows of the table, samples of a passage adjacent. As columns: a dict per row takes 8 times as long."""
        prompts = len(requests.prompts)
        assert len(answers) == prompts, f"{self.engine.type} answered {len(answers)} of {prompts} prompts"
        numbers_range, per_request = range(self.per_passage()), self.per_request()
        for answer in answers:
            assert len(answer) == per_request, f"{self.engine.type} gave {len(answer)} of {per_request}"
        numbers = [tables.encode_id_part(i) for i in numbers_range]
        shas = [tables.prompt_sha(prompt.text) for prompt in requests.prompts]
        completions = [completion for answer in answers for completion in answer]
        clean = tables.clean
        return tables.columns(
            "generations",
            len(completions),
            gen_id=[tables.hash_id(content + number) for content in requests.contents for number in numbers],
            source_id=[doc_id for doc_id in requests.ids for _ in numbers_range],
            sample=[i for _ in requests.ids for i in numbers_range],
            seed=[seed + i for seed in requests.seeds for i in numbers_range],
            prompt_sha=[sha for sha in shas for _ in range(per_request)],
            truncated=[c.truncated for c in completions],
            raw=[None if c.raw is None else clean(c.raw) for c in completions],
            finish_reason=[c.finish_reason for c in completions],
            prompt_tokens=[c.prompt_tokens for c in completions],
            cached_tokens=[c.cached_tokens for c in completions],
            completion_tokens=[c.completion_tokens for c in completions],
            logprob=[c.logprob for c in completions],
            error=[None if c.error is None else clean(c.error) for c in completions],
        )


def strategies_of_samples(strategies: Sequence[Strategy], rng: LazyRandom, seed: int, samples: int) -> list[Strategy]:
    """The strategy of each completion of a passage with this seed; prompting and parsing get the same."""
    each = enumerate(strategies)
    return [one for i, strategy in each for one in strategy.strategies_for(rng.seeded(seed + i * samples), samples)]


@dataclass
class _Requests:
    """The requests for the passages of a shard: column by column, in order."""

    ids: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)  # first parts of the completions' ids
    seeds: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


def _exemplars(inputs: Inputs) -> tuple[tuple[Exemplar, ...], set[str]]:
    """The exemplars, and the ids of their passages."""
    if "exemplars" not in inputs:
        return (), set()
    rows = inputs["exemplars"].read("exemplars").to_pylist()
    shown = tuple(Exemplar(row["passage"], row["query"]) for row in rows)
    return shown, {row["doc_id"] for row in rows}
