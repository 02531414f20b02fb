"""One arm for each strategy of the catalogue: from passages to mined examples, whatever the strategy reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

from dagr_ray.config import ConfigError, plugins
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.keyboard import KeyboardEngine
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes import augment, filtered
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Stage
from dagr_ray.stages.generate import Generate, Parse
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.pairs import AsQueries, Linked, Pairs, Topics
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import Rewrite, Together, WithNegatives
from dagr_ray.stages.select import Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.promptagator import Promptagator

# How many tokens an answer may have, by what is written.
TOKENS = {"queries": 32, "passages": 96, "negatives": 96, "triples": 224}


@dataclass(frozen=True)
class Arm:
    """What a strategy's answers become: ``examples`` to train on, with the stages that hold their queries and passages."""

    generations: Generate
    parsed: Stage
    queries: Stage
    corpus: Stage
    examples: Stage


def strategy_named(name: str) -> Strategy:
    """A strategy with its defaults, by its type. Raises ConfigError with those that make an arm."""
    found = {kind: cls for kind, cls in plugins(Strategy).items() if cls.writes in TOKENS}
    if name not in found:
        raise ConfigError(f"strategy = {name!r} is not in the catalogue; allowed: {', '.join(sorted(found))}")
    return found[name]()


def _engine_of(strategy: Strategy, engine: Engine) -> Engine:
    """The engine that answers a strategy: some need no language model."""
    return {"crop": CropEngine(), "noisy": KeyboardEngine()}.get(strategy.type, engine)


def arm(
    strategy: Strategy,
    engine: Engine,
    passages: Stage,
    corpus: Stage,
    encoder: Encoder,
    *,
    exemplars: Stage | None,
    samples: int = 2,
    max_rank: int = 20,
    negatives: int = 1,
) -> Arm:
    """The arm of a strategy. Those that read a query read ``Promptagator``'s accepted ones, which are so part of the cost."""
    used = _engine_of(strategy, engine)
    sampling = Sampling(max_tokens=TOKENS[strategy.writes])
    if (strategy.reads, strategy.writes) == ("corpus", "queries"):
        shown = None if used.type != engine.type else exemplars
        selected, mined = augment(
            passages, corpus, strategy, used, exemplars=shown, samples=samples, max_rank=max_rank, negatives=negatives,
            max_tokens=sampling.max_tokens,
        )  # fmt: skip
        assert isinstance(selected, Select) and isinstance(selected.parsed, Parse)
        return Arm(selected.parsed.generations, selected.parsed, selected, corpus, mined)
    if strategy.writes == "triples":
        asked: Stage = Topics(n=passages.n)  # type: ignore[attr-defined]
        made = _rewritten(strategy, used, asked, sampling, samples)
        mined = Mine(selected=made, corpus=made, negatives=0)
        examples: Stage = WithNegatives(mined=mined, written=(made,), total=1)
        return Arm(made.made, made, made, made, examples)
    if strategy.type == "multi-hop":
        near = Search(
            index=Index(corpus=corpus, miner=Dense(encoder=encoder)), queries=AsQueries(corpus=passages), depth=10
        )
        asked = Linked(passages=passages, corpus=corpus, search=near)
    else:
        first, mined = augment(
            passages, corpus, Promptagator(), engine, exemplars=exemplars, samples=samples, max_rank=max_rank,
            negatives=negatives,
        )  # fmt: skip
        asked = Pairs(queries=first, corpus=corpus)
    made = _rewritten(strategy, used, asked, sampling, samples)
    if strategy.writes == "queries":
        selected = filtered(made, corpus, corpus, max_rank=max_rank)
        search = Search(index=Index(corpus=corpus, miner=BM25()), queries=made, depth=100)
        mined = Mine(selected=selected, corpus=corpus, searches=(search,), negatives=negatives)
        return Arm(made.made, made, selected, corpus, mined)
    both = Together(corpora=(corpus, made))
    if strategy.writes == "negatives":
        examples = WithNegatives(mined=mined, written=(made,), total=negatives)
        return Arm(made.made, made, first, both, examples)
    search = Search(index=Index(corpus=both, miner=BM25()), queries=made, depth=100)
    mined = Mine(selected=made, corpus=both, searches=(search,), negatives=negatives)
    return Arm(made.made, made, made, both, mined)


def _rewritten(strategy: Strategy, engine: Engine, asked: Stage, sampling: Sampling, samples: int) -> Rewrite:
    # a rewriting of one text seldom differs from the next, but for negatives and slips
    several = samples if strategy.writes in ("negatives", "triples") or strategy.type == "noisy" else 1
    return Rewrite(
        generations=Generate(corpus=asked, strategy=strategy, engine=engine, sampling=sampling, samples=several)
    )
