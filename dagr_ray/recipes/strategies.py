"""An arm for every strategy, and mixtures of arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dagr_ray.core.config import ConfigError, lookup, plugins
from dagr_ray.core.stage import Stage
from dagr_ray.engines import Engine, Sampling
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.augmentation import augment, filtered, gated
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.cloze import CLOZE, Cloze
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.generate_until import GenerateUntil
from dagr_ray.stages.leakage import LeakGate
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.mix import MixExamples
from dagr_ray.stages.pairs import AsQueries, LinkedPairs, Pairs, Topics
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import ConcatCorpora, Rewrite, WithNegatives
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.promptagator import Promptagator

MOST = 10_000_000  # queries: more than any budget pays for
# The maximum tokens of a completion, by what is generated.
TOKENS = {"queries": 32, "passages": 96, "negatives": 96, "triples": 224}


@dataclass(frozen=True)
class Arm:
    """The arm of a strategy: ``examples`` to train on, with the stages of their queries and passages."""

    generations: Generate
    parsed: Stage
    queries: Stage
    corpus: Stage
    examples: Stage


def strategy_named(name: str) -> Strategy:
    """A strategy by its type, or in one of its forms (``inpars/gbq``). Raises ConfigError, which lists those with an arm.

    >>> strategy_named("crop/span").name(), strategy_named("crop").name()
    ('crop/span', 'crop')
    """
    types = {kind: cls for kind, cls in plugins(Strategy).items() if cls.writes in TOKENS}
    kind, _, form = name.partition("/")
    if kind not in types:
        raise ConfigError(f"strategy = {name!r} is not in the catalogue; allowed: {', '.join(sorted(types))}")
    if not form:
        return types[kind]()
    field = next(
        (name_of_field for name_of_field in ("form", "mode") if name_of_field in types[kind].model_fields), None
    )
    if field is None:
        raise ConfigError(f"strategy = {name!r}: {kind!r} has one form only; write {kind!r}")
    return types[kind](**{field: form})


def _engine_of(strategy: Strategy, engine: Engine) -> Engine:
    """The engine for a strategy: some strategies have their own, without a language model."""
    return lookup(strategy.own_engine, Engine)() if strategy.own_engine else engine


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
    held_out: Sequence[Stage] = (),
    split: str = "test",
    max_cost: float | None = None,
) -> Arm:
    """The arm of a strategy. Strategies that read a query get ``Promptagator``'s accepted ones, whose cost counts too.

    Queries that resemble those of ``split`` in ``held_out`` (evaluation sets) are removed. With ``max_cost``, passages are
    used in steps until this many dollars are spent (``GenerateUntil``); raises ConfigError for a strategy that reads pairs.
    """
    if max_cost is not None and (strategy.reads, strategy.writes) != ("corpus", "queries"):
        raise ConfigError(f"max_cost = {max_cost}: {strategy.type!r} does not write queries for passages; remove it")

    def clean(queries: Stage, positives: Stage) -> Stage:
        return gated(queries, positives, held_out, encoder, split=split) if held_out else queries

    used = _engine_of(strategy, engine)
    sampling = Sampling(max_tokens=TOKENS[strategy.writes])
    if (strategy.reads, strategy.writes) == ("corpus", "queries"):
        without = () if strategy.writes_whole_queries else ("format", "length")
        selected, mined = augment(
            passages, corpus, strategy, used, exemplars=exemplars, samples=samples, max_rank=max_rank, negatives=negatives,
            max_tokens=sampling.max_tokens, held_out=held_out, base=encoder, without=without, max_cost=max_cost,
            accepted=None if max_cost is None else MOST, split=split,
        )  # fmt: skip
        selection: Stage = selected
        while isinstance(selection, LeakGate | GenerateUntil):
            selection = selection.selected
        assert isinstance(selection, Select) and isinstance(selection.parsed, Parse)
        parsed = selection.parsed
        read = Cloze(corpus=corpus, selected=selected) if strategy.name() == CLOZE else corpus
        return Arm(parsed.generations, parsed, selected, read, mined)
    if strategy.writes == "triples":
        source: Stage = Topics(n=passages.n)  # type: ignore[attr-defined]
        rewritten = _rewritten(strategy, used, source, sampling, samples)
        queries = clean(rewritten, rewritten)
        mined = Mine(selected=queries, corpus=rewritten, negatives=0)
        examples: Stage = WithNegatives(mined=mined, written=(rewritten,), total=1)
        return Arm(rewritten.generate, rewritten, queries, rewritten, examples)
    if strategy.reads_links:
        near = Search(
            index=Index(corpus=corpus, miner=Dense(encoder=encoder)), queries=AsQueries(corpus=passages), depth=10
        )
        source = LinkedPairs(passages=passages, corpus=corpus, search=near)
    else:
        first, mined = augment(
            passages, corpus, Promptagator(), engine, exemplars=exemplars, samples=samples, max_rank=max_rank,
            negatives=negatives, held_out=held_out, base=encoder, split=split,
        )  # fmt: skip
        source = Pairs(queries=first, corpus=corpus)
    rewritten = _rewritten(strategy, used, source, sampling, samples)
    if strategy.writes == "queries":
        # words of another language are not in the index
        miner = Dense(encoder=encoder) if strategy.changes_language else BM25()
        search = Search(index=Index(corpus=corpus, miner=miner), queries=rewritten, depth=100)
        selected_queries = filtered(rewritten, corpus, corpus, max_rank=max_rank, search=search)
        if strategy.keeps_meaning:  # by retrieval, and by embedding
            near = Search(index=Index(corpus=corpus, miner=Dense(encoder=encoder)), queries=rewritten, depth=100)
            meaning_score = Score(parsed=rewritten, corpus=corpus, filter=RoundTrip(max_rank=max_rank), search=near)
            selected_queries = selected_queries.model_copy(update={"scores": (*selected_queries.scores, meaning_score)})
        queries = clean(selected_queries, corpus)
        mined = Mine(selected=queries, corpus=corpus, searches=(search,), negatives=negatives)
        return Arm(rewritten.generate, rewritten, queries, corpus, mined)
    both = ConcatCorpora(corpora=(corpus, rewritten))
    if strategy.writes == "negatives":
        examples = WithNegatives(mined=mined, written=(rewritten,), total=negatives)
        return Arm(rewritten.generate, rewritten, first, both, examples)
    search = Search(index=Index(corpus=both, miner=BM25()), queries=rewritten, depth=100)
    mined = Mine(selected=rewritten, corpus=both, searches=(search,), negatives=negatives)
    return Arm(rewritten.generate, rewritten, rewritten, both, mined)


def parts(strategies: str, mix: str = "all", weights: str | None = None) -> dict[str, float]:
    """Weights of the strategies in a mixture: ``all`` of ``strategies``, ``only-NAME`` or ``without-NAME``.

    Raises ConfigError for another ``mix`` and for weights that do not fit.

    >>> parts("typed+hyde+crop", "without-crop", "3+1+1"), parts("typed+hyde", "only-hyde")
    ({'typed': 3.0, 'hyde': 1.0}, {'hyde': 1.0})
    """
    names, (word, _, one) = strategies.split("+"), mix.partition("-")
    chosen = {"all": names, "only": [one], "without": [n for n in names if n != one]}.get(word, [])
    if (one and one not in names) or not chosen or (word == "all") != (not one):
        raise ConfigError(f"mix = {mix!r}; allowed: all, and only-NAME or without-NAME with one of {', '.join(names)}")
    try:
        values = [float(value) for value in weights.split("+")] if weights else [1.0] * len(names)
    except ValueError:
        values = []
    if len(values) != len(names):
        raise ConfigError(
            f"weights = {weights!r}: there are {len(names)} strategies; give a number each, such as 2+1+1"
        )
    return {name: weight for name, weight in zip(names, values, strict=True) if name in chosen}


def mixed(
    arms: Sequence[Arm], *, n: int | None = None, weights: tuple[float, ...] | None = None
) -> tuple[MixExamples, Stage]:
    """``n`` examples of several arms by weight, or all if neither is given, and the corpus with their passages.

    Use the result as ``Train(examples=mix, queries=mix, corpus=corpus)``. Written negatives and passages stay with
    their queries.
    """
    blend = MixExamples(
        examples=tuple(arm.examples for arm in arms), queries=tuple(arm.queries for arm in arms),
        weights=weights, n=n,
    )  # fmt: skip
    corpora = {arm.corpus.fingerprint(): arm.corpus for arm in arms}
    return blend, arms[0].corpus if len(corpora) == 1 else ConcatCorpora(corpora=tuple(corpora.values()))


def _rewritten(strategy: Strategy, engine: Engine, source: Stage, sampling: Sampling, samples: int) -> Rewrite:
    # one of several long texts with the same meaning is enough
    several = 1 if strategy.writes == "passages" else samples
    return Rewrite(
        generations=Generate(corpus=source, strategy=strategy, engine=engine, sampling=sampling, samples=several)
    )
