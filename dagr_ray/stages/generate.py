"""From passages to queries: Exemplars to show, Generate to ask, Parse to read the answers."""

from __future__ import annotations

import atexit
import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from dagr_ray import bill, tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.engines import Engine, Sampling, paid
from dagr_ray.filters import words
from dagr_ray.stage import Inputs, Output, Run, Stage
from dagr_ray.strategies import Exemplar, Passage, Prompt, Strategy


class Exemplars(Stage):
    """Up to ``k`` human queries of a split with their passages, to show in prompts; none where there is no such split.

    Drawn by hash, one for a passage. Passages of up to ``max_words`` words come first, longer ones are cut to that;
    then the highest grade, and queries that share ``grounded`` of their words (of four letters or more) with the
    passage. A small model copies a query that could stand under any passage: with one such among four, it wrote
    "which operating system is this running on" for a fifth of the standard library.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("exemplars",)
    corpus: Stage
    split: str = "dev"
    k: Annotated[int, Field(ge=1, le=32)] = 8
    seed: int = 0
    max_words: Annotated[int, Field(ge=8)] = 60
    grounded: Annotated[float, Field(ge=0, le=1)] = 0.5

    def label(self) -> str:
        return f"{self.split}{self.k}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            source, name = inputs["corpus"], f"qrels.{self.split}"
            if name not in source.table_names():
                return Output({"exemplars": tables.empty("exemplars")}, counts={"in": 0, "out": 0})
            judged = [row for row in source.read(name).to_pylist() if row["relevance"] > 0]
            text_of = {row["query_id"]: row["text"] for row in source.read("queries").to_pylist()}
            wanted = {row["doc_id"] for row in judged}
            passage_of = {}
            for part in source.scan("corpus"):
                for row in part.to_pylist():
                    if row["doc_id"] in wanted:
                        passage_of[row["doc_id"]] = tables.passage_text(row["title"], row["text"]).split()
            usable = [
                row for row in judged if passage_of.get(row["doc_id"]) and text_of.get(row["query_id"], "").strip()
            ]
            usable.sort(
                key=lambda row: (
                    len(passage_of[row["doc_id"]]) > self.max_words,
                    -row["relevance"],
                    _shared(text_of[row["query_id"]], passage_of[row["doc_id"]]) < self.grounded,
                    tables.unit_of("exemplars", self.seed, row["query_id"], row["doc_id"]),
                )
            )
            # the same query for two passages, or two queries for one passage, would show one thing twice
            drawn: list[dict[str, Any]] = []
            seen: set[str] = set()
            for row in usable:
                keys = {f"q{row['query_id']}", f"d{row['doc_id']}"}
                if len(drawn) < self.k and not keys & seen:
                    seen |= keys
                    passage = " ".join(passage_of[row["doc_id"]][: self.max_words])
                    drawn.append(
                        {
                            "query_id": row["query_id"],
                            "doc_id": row["doc_id"],
                            "query": text_of[row["query_id"]],
                            "passage": passage,
                        }
                    )
            return Output(
                {"exemplars": tables.table("exemplars", drawn)}, counts={"in": len(judged), "out": len(drawn)}
            )

        return run


def _shared(query: str, passage: list[str]) -> float:
    """The share of a query's longer words that start a word of the passage, or are started by one."""
    asked = {word for word in words(query.casefold()) if len(word) > 3}
    there = {word for word in words(" ".join(passage).casefold()) if len(word) > 3}
    return sum(any(w.startswith(a) or a.startswith(w) for w in there) for a in asked) / max(len(asked), 1)


class Generate(Stage):
    """``samples`` completions for each passage of ``corpus``. Passages that are shown as exemplars are left out.

    A completion's id and seed come from this stage's fingerprint, its passage and its number, so they are the same on
    any number of workers and after any number of restarts. ``errors`` and ``truncated`` count passages. The cost counts
    a prompt's tokens once for all samples that one request drew.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "generate"
    concurrent: ClassVar[bool] = True
    rescues: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ("generations", "rejected")
    corpus: Stage
    strategy: Strategy
    engine: Engine
    sampling: Sampling = Sampling()
    samples: Annotated[int, Field(ge=1)] = 1
    exemplars: Stage | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _samples_differ(self) -> Generate:
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                f"generate: samples = {self.samples} at temperature 0 would all be the same; "
                "raise the temperature, or set samples=1"
            )
        if self.strategy.writes != "queries":
            raise ConfigError(
                f"generate: strategy {self.strategy.type!r} writes {self.strategy.writes}; give one that writes queries"
            )
        return self

    def label(self) -> str:
        return f"{self.strategy.type}-{self.engine.type}"

    def size(self, inputs: Inputs) -> int:
        return inputs["corpus"].count("corpus")

    def refuse(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """A passage that is given up: no completions, and a row in ``rejected``."""
        [doc_id] = inputs["corpus"].slice("corpus", row, row + 1)["doc_id"].to_pylist()
        refused = {"id": doc_id, "by": "generate", "reason": reason, "detail": tables.clean(detail)}
        made = {"generations": tables.empty("generations"), "rejected": tables.table("rejected", [refused])}
        return Output(made, counts={"in": 1, "out": 0, "errors": 0, "rejected": {f"generate/{reason}": 1}})

    def prompts(self, inputs: Inputs, ids: Iterable[str]) -> dict[str, str]:
        """The exact prompts of some passages, by doc_id, before an engine cuts long ones: for ``dagr preview``."""
        wanted, fingerprint, (shown, _) = set(ids), self.fingerprint(), _exemplars(inputs)
        return {
            row["doc_id"]: self._prompt(row, shown, tables.seed_of(fingerprint, row["doc_id"])).text
            for part in inputs["corpus"].scan("corpus")
            for row in part.to_pylist()
            if row["doc_id"] in wanted
        }

    def _prompt(self, row: dict[str, Any], shown: tuple[Exemplar, ...], seed: int) -> Prompt:
        passage = Passage(row["doc_id"], row["title"] or "", row["text"])
        return self.strategy.prompt(passage, shown, random.Random(seed))

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        fingerprint, (shown, held_out) = self.fingerprint(), _exemplars(inputs)
        began = time.time()
        session = bill.within_budget(self.engine, folder, pool.workers).open(pool)
        atexit.register(session.close)
        start_s = [time.time() - began]

        def run(start: int, stop: int) -> Output:
            rejected, asked = [], []
            for row in inputs["corpus"].slice("corpus", start, stop).to_pylist():
                if row["doc_id"] in held_out:
                    rejected.append({"id": row["doc_id"], "by": "exemplar", "reason": "held-out", "detail": None})
                elif not tables.passage_text(row["title"] or "", row["text"]).strip():
                    rejected.append({"id": row["doc_id"], "by": "generate", "reason": "empty-passage", "detail": None})
                else:
                    asked.append((row["doc_id"], tables.seed_of(fingerprint, row["doc_id"]), row))
            prompts = [self._prompt(row, shown, seed) for _, seed, row in asked]
            before = time.time()
            answers = session.generate(prompts, [seed for _, seed, _ in asked], self.sampling, self.samples)
            spent = {"generate_s": time.time() - before, "engine_start_s": start_s.pop() if start_s else 0.0}
            rows = []
            for (source_id, seed, _), prompt, answer in zip(asked, prompts, answers, strict=True):
                assert len(answer) == self.samples, f"{self.engine.type} gave {len(answer)} samples of {self.samples}"
                sha = hashlib.sha256(prompt.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                for i, completion in enumerate(answer):
                    rows.append(
                        {
                            "gen_id": tables.mint(fingerprint, source_id, i),
                            "source_id": source_id,
                            "sample": i,
                            "seed": seed + i,
                            "prompt_sha": sha,
                            "truncated": completion.truncated,
                            "raw": None if completion.raw is None else tables.clean(completion.raw),
                            "finish_reason": completion.finish_reason,
                            "prompt_tokens": completion.prompt_tokens,
                            "cached_tokens": completion.cached_tokens,
                            "completion_tokens": completion.completion_tokens,
                            "error": None if completion.error is None else tables.clean(completion.error),
                        }
                    )
            counts = {
                "in": stop - start,
                "out": sum(row["error"] is None for row in rows),
                "errors": sum(any(c.error for c in answer) for answer in answers),
                "truncated": sum(any(c.truncated for c in answer) for answer in answers),
                "rejected": dict(Counter(f"{row['by']}/{row['reason']}" for row in rejected)),
            }
            cost = {**paid(answers), **spent}
            made = {"generations": tables.table("generations", rows), "rejected": tables.table("rejected", rejected)}
            return Output(made, counts=counts, cost=cost)

        return run


def _exemplars(inputs: Inputs) -> tuple[tuple[Exemplar, ...], set[str]]:
    """What is shown, and the passages that so have been given away."""
    if "exemplars" not in inputs:
        return (), set()
    rows = inputs["exemplars"].read("exemplars").to_pylist()
    shown = tuple(Exemplar(row["passage"], row["query"]) for row in rows)
    return shown, {row["doc_id"] for row in rows}


class Parse(Stage):
    """Queries out of completions, each judged relevant to its passage; what holds none is rejected with the reason.

    ``corpus`` is the one that the completions were made for. Mending the parser (``parse_version``) makes another
    folder of this stage and no new completions.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    generations: Generate
    corpus: Stage

    @model_validator(mode="after")
    def _same_corpus(self) -> Parse:
        if self.corpus.fingerprint() != self.generations.corpus.fingerprint():
            raise ConfigError(
                f"parse: corpus is {self.corpus.folder_name()}, the completions are for "
                f"{self.generations.corpus.folder_name()}; give that one"
            )
        return self

    def label(self) -> str:
        return self.generations.strategy.type

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"parse_version": self.generations.strategy.parse_version}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        strategy, engine = self.generations.strategy, self.generations.engine
        made_by = {"strategy": strategy.type, "engine": engine.type, "model": engine.model_name()}

        def run(start: int, stop: int) -> Output:
            passage_of = {
                row["doc_id"]: Passage(row["doc_id"], row["title"] or "", row["text"])
                for part in inputs["corpus"].scan("corpus")
                for row in part.to_pylist()
            }
            queries, qrels, lineage, rejected, read = [], [], [], [], 0
            for part in inputs["generations"].scan("generations", ["gen_id", "source_id", "raw", "error"]):
                read += part.num_rows
                for row in part.to_pylist():
                    gen_id, source_id = row["gen_id"], row["source_id"]
                    if row["error"] is not None or row["raw"] is None:
                        rejected.append({"id": gen_id, "by": "generate", "reason": "error", "detail": row["error"]})
                        continue
                    parsed = strategy.parse(passage_of[source_id], row["raw"])
                    for i, text in enumerate(parsed.kept):
                        query_id = tables.mint(gen_id, i)
                        queries.append({"query_id": query_id, "text": tables.clean(text)})
                        qrels.append({"query_id": query_id, "doc_id": source_id, "relevance": 1})
                        lineage.append({"id": query_id, "gen_id": gen_id, "source_id": source_id, **made_by})
                    for reason, detail in parsed.rejected:
                        rejected.append({"id": gen_id, "by": "parse", "reason": reason, "detail": tables.clean(detail)})
            rows = {"queries": queries, "qrels": qrels, "lineage": lineage, "rejected": rejected}
            counts = {
                "in": read,
                "out": len(queries),
                "rejected": dict(Counter(f"{row['by']}/{row['reason']}" for row in rejected)),
            }
            return Output({name: tables.table(name, values) for name, values in rows.items()}, counts=counts)

        return run
