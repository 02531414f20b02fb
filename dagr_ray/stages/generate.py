"""From passages to queries: Exemplars to show, Generate to ask, Parse to read the answers."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256 as _sha256
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray import bill, markers, tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError, Later
from dagr_ray.engines import Completion, Engine, Sampling, paid
from dagr_ray.filters.controls import controlled, missed
from dagr_ray.stage import Inputs, Output, Run, Stage
from dagr_ray.strategies import Dice, Exemplar, Passage, Prompt, Strategy
from dagr_ray.strategies.controls import Controls
from dagr_ray.words import folded, long, pieces

READS = {"corpus": "passages", "pairs": "Pairs or Linked"}


class Exemplars(Stage):
    """Up to ``k`` human queries of a split with their passages, to show in prompts; none where there is no such split.

    ``otherwise`` names the split that is taken where the first is not there: some collections have no dev split.

    Drawn by hash, one for a passage. Passages of up to ``max_words`` words come first, longer ones are cut to that;
    then the highest grade, and queries that share ``grounded`` of their words (of four letters or more) with the
    passage. A small model copies a query that could stand under any passage: with one such among four, it wrote
    "which operating system is this running on" for a fifth of the standard library.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    outputs: ClassVar[tuple[str, ...]] = ("exemplars",)
    corpus: Stage
    split: str = "dev"
    k: Annotated[int, Field(ge=1, le=32)] = 8
    seed: int = 0
    max_words: Annotated[int, Field(ge=8)] = 60
    grounded: Annotated[float, Field(ge=0, le=1)] = 0.5
    otherwise: Annotated[str | None, Later()] = None

    def label(self) -> str:
        return f"{self.split}{self.k}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            source = inputs["corpus"]
            splits = [name.removeprefix("qrels.") for name in source.table_names() if name.startswith("qrels.")]
            found = [tables.split_of(splits, split) for split in (self.split, self.otherwise) if split]
            split = next((split for split in found if split is not None), None)
            if split is None:
                return Output({"exemplars": tables.empty("exemplars")}, counts={"in": 0, "out": 0})
            judged = [row for row in source.read(f"qrels.{split}").to_pylist() if row["relevance"] > 0]
            text_of = {row["query_id"]: row["text"] for row in source.read("queries").to_pylist()}
            wanted = {row["doc_id"] for row in judged}
            passage_of = {}
            for part in source.scan("corpus"):
                for row in part.to_pylist():
                    if row["doc_id"] in wanted:
                        passage_of[row["doc_id"]] = pieces(tables.passage_text(row["title"], row["text"]))
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
                    passage = "".join(passage_of[row["doc_id"]][: self.max_words]).rstrip()
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
    asked = {word for word in folded(query) if long(word)}
    there = {word for word in folded("".join(passage)) if long(word)}
    return sum(any(w.startswith(a) or a.startswith(w) for w in there) for a in asked) / max(len(asked), 1)


class Generate(Stage):
    """``samples`` completions for each passage of ``corpus`` and strategy asked. Passages shown as exemplars are left out.

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
        if self.strategy.reads not in self.corpus.outputs:
            raise ConfigError(
                f"generate: strategy {self.strategy.type!r} reads {self.strategy.reads}, and corpus is a "
                f"{self.corpus.type!r}, which has none; give {READS[self.strategy.reads]}"
            )
        return self

    def label(self) -> str:
        return f"{self.strategy.type}-{self.engine.type}"

    def size(self, inputs: Inputs) -> int:
        return inputs["corpus"].count(self.strategy.reads)

    def per_passage(self) -> int:
        """Completions of one passage: ``samples`` for each strategy that asks."""
        return self.samples * len(self.strategy.asked())

    def per_request(self) -> int:
        """Completions of one prompt: one, where a strategy words each sample's prompt anew."""
        return 1 if any(strategy.draws() for strategy in self.strategy.asked()) else self.samples

    @property
    def keeps_logprob(self) -> bool:
        """Whether the engine is asked for log-probabilities."""
        return self.sampling.logprob or any(strategy.by_logprob for strategy in self.strategy.asked())

    def refuse(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """A passage that is given up: no completions, and a row in ``rejected``."""
        [doc_id] = inputs["corpus"].slice(self.strategy.reads, row, row + 1)["doc_id"].to_pylist()
        refused = {"id": doc_id, "by": "generate", "reason": reason, "detail": tables.clean(detail)}
        made = {"generations": tables.empty("generations"), "rejected": tables.table("rejected", [refused])}
        return Output(made, counts={"in": 1, "out": 0, "errors": 0, "rejected": {f"generate/{reason}": 1}})

    def prompts(self, inputs: Inputs, ids: Iterable[str], sample: int = 0) -> dict[str, str]:
        """The exact prompts of some passages' ``sample``, by doc_id, before an engine cuts long ones."""
        wanted, fingerprint, (shown, _) = list(ids), self.fingerprint(), _exemplars(inputs)
        found: dict[str, str] = {}
        for part in inputs["corpus"].scan(self.strategy.reads):
            rows = part.filter(pc.is_in(part["doc_id"], value_set=pa.array(wanted, tables.TEXT)))
            asked, _ = self._asked(rows, tables.part(fingerprint), shown, set())
            prompts = asked.prompts[sample // self.per_request() :: self.per_passage() // self.per_request()]
            found |= {doc_id: prompt.text for doc_id, prompt in zip(asked.ids, prompts, strict=True)}
        return found

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        # not hashed anew: on a worker that would read all of a corpus again, which may have changed meanwhile
        plan = folder.read_json("plan.json") or {"fingerprint": self.fingerprint()}
        ids, (shown, held_out) = tables.part(plan["fingerprint"]), _exemplars(inputs)
        began = time.time()
        session = bill.within_budget(self.engine, folder, pool.workers).open(pool)
        atexit.register(session.close)
        start_s = [time.time() - began]
        sampling = self.sampling.model_copy(update={"logprob": self.keeps_logprob})

        def run(start: int, stop: int) -> Output:
            asked, rejected = self._asked(
                inputs["corpus"].slice(self.strategy.reads, start, stop), ids, shown, held_out
            )
            before = time.time()
            answers = session.generate(asked.prompts, self._seeds(asked), sampling, self.per_request())
            spent = {"generate_s": time.time() - before, "engine_start_s": start_s.pop() if start_s else 0.0}
            generations = self._generations(asked, answers)
            samples = [completion for answer in answers for completion in answer]
            each = self.per_passage()
            of_a_passage = [samples[i : i + each] for i in range(0, len(samples), each)]
            counts = {
                "in": stop - start,
                "out": generations["error"].null_count,
                "errors": sum(any(c.error for c in a) for a in of_a_passage) if any(c.error for c in samples) else 0,
                "truncated": sum(any(c.truncated for c in a) for a in of_a_passage),
                "rejected": rejected.counted(),
            }
            made = {"generations": generations, "rejected": rejected.table()}
            return Output(made, counts=counts, cost={**paid(answers), **spent})

        return run

    def _asked(
        self, corpus: pa.Table, start: bytes, shown: tuple[Exemplar, ...], held_out: set[str]
    ) -> tuple[_Asked, tables.Rejected]:
        """What to ask of the passages, and those that nothing is asked of. ``start`` is the first part of all ids."""
        asked, rejected, dice, strategies = _Asked(), tables.Rejected(), Dice(), self.strategy.asked()
        apart = any(strategy.draws() for strategy in strategies)
        plain = partial(markers.unmarked, own=self.engine.special_tokens()) if self.engine.reads_markers else None
        if plain:
            shown = tuple(Exemplar(plain(each.passage), plain(each.query)) for each in shown)
        for doc_id, title, text, *more in zip(*map(tables.texts, tables.asked_about(corpus).columns), strict=True):
            if doc_id in held_out:
                rejected.add(doc_id, "exemplar", "held-out")
                continue
            if not (text.strip() or (title and title.strip())):
                rejected.add(doc_id, "generate", "empty-passage")
                continue
            content = start + tables.part(doc_id)
            seed = tables.seeded(content)
            asked.ids.append(doc_id)
            asked.contents.append(content)
            asked.seeds.append(seed)
            passage = Passage(doc_id, title or "", text, *more)
            if plain:
                passage = Passage(doc_id, *(plain(each or "") for each in passage[1:]))
            # side by side, so that what they have in common is still in the engine's cache
            if apart:
                each = enumerate(drawn(strategies, dice, seed, self.samples))
                asked.prompts += [one.prompt(passage, shown, dice.thrown(seed + i)) for i, one in each]
            else:
                asked.prompts += [strategy.prompt(passage, shown, dice.thrown(seed)) for strategy in strategies]
        return asked, rejected

    def _seeds(self, asked: _Asked) -> list[int]:
        """The seed of each prompt's first sample."""
        firsts = range(0, self.per_passage(), self.per_request())
        return [seed + first for seed in asked.seeds for first in firsts]

    def _generations(self, asked: _Asked, answers: list[list[Completion]]) -> pa.Table:
        """The rows of the table, samples of one passage in a row. Columns, because a dict for each row takes 8 times as long."""
        prompts = len(asked.prompts)
        assert len(answers) == prompts, f"{self.engine.type} answered {len(answers)} of {prompts} prompts"
        each, together = range(self.per_passage()), self.per_request()
        for answer in answers:
            assert len(answer) == together, f"{self.engine.type} gave {len(answer)} of {together}"
        numbers = [tables.part(i) for i in each]
        shas = [_sha256(prompt.text.encode("utf-8", "surrogatepass")).hexdigest()[:16] for prompt in asked.prompts]
        made = [completion for answer in answers for completion in answer]
        clean = tables.clean
        return tables.columns(
            "generations",
            len(made),
            gen_id=[tables.minted(content + number) for content in asked.contents for number in numbers],
            source_id=[doc_id for doc_id in asked.ids for _ in each],
            sample=[i for _ in asked.ids for i in each],
            seed=[seed + i for seed in asked.seeds for i in each],
            prompt_sha=[sha for sha in shas for _ in range(together)],
            truncated=[c.truncated for c in made],
            raw=[None if c.raw is None else clean(c.raw) for c in made],
            finish_reason=[c.finish_reason for c in made],
            prompt_tokens=[c.prompt_tokens for c in made],
            cached_tokens=[c.cached_tokens for c in made],
            completion_tokens=[c.completion_tokens for c in made],
            logprob=[c.logprob for c in made],
            error=[None if c.error is None else clean(c.error) for c in made],
        )


def drawn(strategies: Sequence[Strategy], dice: Dice, seed: int, samples: int) -> list[Strategy]:
    """The strategy of each completion of a passage whose seed is ``seed``: the same when asked and when read."""
    each = enumerate(strategies)
    return [one for i, strategy in each for one in strategy.drawn(dice.thrown(seed + i * samples), samples)]


def _drawn_again(
    strategies: Sequence[Strategy], seeds: list[int], numbers: list[int], samples: int
) -> Iterator[Strategy]:
    """The strategy of each completion, from its seed and number. Those of a passage stand together: drawn once for all."""
    dice, last, found = Dice(), -1, list[Strategy]()
    for seed, number in zip(seeds, numbers, strict=True):
        if seed - number != last:
            last, found = seed - number, drawn(strategies, dice, seed - number, samples)
        yield found[number]


@dataclass
class _Asked:
    """The passages of a shard that something is asked of: column by column, in order."""

    ids: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)  # what their generations' ids begin with
    seeds: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)


def _exemplars(inputs: Inputs) -> tuple[tuple[Exemplar, ...], set[str]]:
    """What is shown, and the passages that so have been given away."""
    if "exemplars" not in inputs:
        return (), set()
    rows = inputs["exemplars"].read("exemplars").to_pylist()
    shown = tuple(Exemplar(row["passage"], row["query"]) for row in rows)
    return shown, {row["doc_id"] for row in rows}


class Parse(Stage):
    """Queries out of completions, each judged relevant to its passage; what holds none is rejected with the reason.

    A query that misses one of its strategy's controls is rejected by ``control``, with the attribute that it misses.
    ``corpus`` is the one that the completions were made for. Mending the parser (``parse_version``) makes another
    folder of this stage and no new completions.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    generations: Generate
    corpus: Stage

    @model_validator(mode="after")
    def _same_corpus(self) -> Parse:
        asked = self.generations.strategy
        if (asked.reads, asked.writes) != ("corpus", "queries"):
            raise ConfigError(
                f"parse: strategy {asked.type!r} reads {asked.reads} and writes {asked.writes}; Rewrite reads its answers"
            )
        if self.corpus.fingerprint() != self.generations.corpus.fingerprint():
            raise ConfigError(
                f"parse: corpus is {self.corpus.folder_name()}, the completions are for "
                f"{self.generations.corpus.folder_name()}; give that one"
            )
        return self

    def label(self) -> str:
        return self.generations.strategy.type

    def identity(self) -> dict[str, Any]:
        versions = [strategy.parse_version for strategy in self.generations.strategy.asked()]
        found = super().identity() | {"parse_version": versions[0] if len(versions) == 1 else versions}
        if any(map(controlled, self.generations.strategy.asked())):
            found["check_version"] = Controls.check_version
        return found

    def size(self, inputs: Inputs) -> int:
        return inputs["generations"].count("generations")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole shards of the completions, several where they are small: each is read once, with its own passages."""
        return inputs["generations"].ranges("generations", step)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        strategies, engine = self.generations.strategy.asked(), self.generations.engine
        samples, columns = self.generations.samples, ["gen_id", "source_id", "raw", "error", "sample", "seed"]
        apart = any(strategy.draws() for strategy in strategies)
        made_by = {"engine": engine.type, "model": engine.model_name()}

        def run(start: int, stop: int) -> Output:
            rows = inputs["generations"].slice("generations", start, stop, columns)
            numbers = rows["sample"].to_pylist()
            asked_by: Iterable[Strategy] = (strategies[number // samples] for number in numbers)
            if apart:
                asked_by = _drawn_again(strategies, rows["seed"].to_pylist(), numbers, samples)
            passages = inputs["corpus"].slice("corpus", *inputs["generations"].source_rows("generations", start, stop))
            ids, titles, texts = map(tables.texts, passages.columns)
            place = dict(zip(ids, range(len(ids)), strict=True))
            rejected = tables.Rejected()
            query_ids: list[str] = []
            queries: list[str] = []
            gen_ids: list[str] = []
            source_ids: list[str] = []
            types: list[str] = []
            texts_of = map(tables.texts, rows.select(columns[:4]).columns)
            last, controls = None, None
            for gen_id, source_id, raw, error, strategy in zip(*texts_of, asked_by, strict=True):
                if error is not None or raw is None:
                    rejected.add(gen_id, "generate", "error", error)
                    continue
                at = place[source_id]
                parsed = strategy.parse(Passage(source_id, titles[at] or "", texts[at]), raw)
                if strategy is not last:
                    last, controls = strategy, controlled(strategy)
                for i, text in enumerate(parsed.kept):
                    if controls and (miss := missed(controls, text)):
                        rejected.add(gen_id, "control", miss[0], tables.clean(f"{miss[1]}: {text}"[:200]))
                        continue
                    query_ids.append(tables.mint(gen_id, i))
                    queries.append(tables.clean(text))
                    gen_ids.append(gen_id)
                    source_ids.append(source_id)
                    types.append(strategy.name())
                for reason, detail in parsed.rejected:
                    rejected.add(gen_id, "parse", reason, tables.clean(detail))
            size, minted, sources = len(queries), *(pa.array(each, tables.TEXT) for each in (query_ids, source_ids))
            made = {
                "queries": tables.columns("queries", size, query_id=minted, text=queries),
                "qrels": tables.columns("qrels", size, query_id=minted, doc_id=sources, relevance=1),
                "lineage": tables.columns(
                    "lineage", size, id=minted, gen_id=gen_ids, source_id=sources, strategy=types, **made_by
                ),
                "rejected": rejected.table(),
            }
            return Output(made, counts={"in": rows.num_rows, "out": size, "rejected": rejected.counted()})

        return run
