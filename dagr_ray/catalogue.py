"""Arms to compare: one for each strategy, from passages to mined examples; for each source of negatives; for each filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dagr_ray.config import ConfigError, plugins
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.keyboard import KeyboardEngine
from dagr_ray.filters import Filter
from dagr_ray.filters.diversity import Diversity
from dagr_ray.filters.language import Language
from dagr_ray.filters.logprob import Logprob
from dagr_ray.filters.pii import Pii
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.teacher import Teacher
from dagr_ray.goal import Reach
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes import augment, filtered, gated
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Stage
from dagr_ray.stages.blend import Blend
from dagr_ray.stages.cloze import CLOZE, Cloze
from dagr_ray.stages.generate import Generate, Parse
from dagr_ray.stages.label import Label
from dagr_ray.stages.leak import LeakGate
from dagr_ray.stages.mine import Mine, Relabel
from dagr_ray.stages.pairs import AsQueries, Linked, Pairs, Topics
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import Rewrite, Together, WithNegatives
from dagr_ray.stages.select import Score, Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.hard_negative import HardNegative
from dagr_ray.strategies.paraphrase import Paraphrase
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.translate import Translate
from dagr_ray.teachers.hybrid import Hybrid

NEGATIVES = (
    "bm25", "dense", "llm", "mixed", "llm-filtered", "searched", "searched-dropped", "searched-relabelled",
)  # fmt: skip
EXTRA = ("logprob", "teacher-score", "diversity", "language", "pii")
MOST = 10_000_000  # queries: more than a budget is for
SPARE = 4  # times the negatives that are wanted are mined where a teacher takes some out
# How many tokens an answer may have, by what is written.
TOKENS = {"queries": 32, "passages": 96, "negatives": 96, "triples": 224}


def teacher_scores(made: Arm, encoder: Encoder) -> Label:
    """What the hybrid teacher says about the examples of an arm."""
    return hybrid_scores(made.queries, made.corpus, encoder, examples=made.examples)


def hybrid_scores(queries: Stage, corpus: Stage, encoder: Encoder, *, examples: Stage | None = None) -> Label:
    """The weighted mean of BM25's and ``encoder``'s z-scores among a query's 100 best passages of ``corpus``."""
    miners = (BM25(), Dense(encoder=encoder))
    searches = tuple(Search(index=Index(corpus=corpus, miner=m), queries=queries, depth=100) for m in miners)
    teacher = Hybrid(fusion="z-score", weights=(0.6, 0.4))
    return Label(teacher=teacher, queries=queries, corpus=corpus, searches=searches, examples=examples)


@dataclass(frozen=True)
class Arm:
    """What a strategy's answers become: ``examples`` to train on, with the stages that hold their queries and passages."""

    generations: Generate
    parsed: Stage
    queries: Stage
    corpus: Stage
    examples: Stage


def strategy_named(name: str) -> Strategy:
    """A strategy by its type, or in one of its forms (``inpars/gbq``). Raises ConfigError with those that make an arm.

    >>> strategy_named("crop/span").name(), strategy_named("crop").name()
    ('crop/span', 'crop')
    """
    found = {kind: cls for kind, cls in plugins(Strategy).items() if cls.writes in TOKENS}
    kind, _, form = name.partition("/")
    if kind not in found:
        raise ConfigError(f"strategy = {name!r} is not in the catalogue; allowed: {', '.join(sorted(found))}")
    if not form:
        return found[kind]()
    field = next((each for each in ("form", "mode") if each in found[kind].model_fields), None)
    if field is None:
        raise ConfigError(f"strategy = {name!r}: {kind!r} has one form only; write {kind!r}")
    return found[kind](**{field: form})


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
    held_out: Sequence[Stage] = (),
    split: str = "test",
    max_cost: float | None = None,
) -> Arm:
    """The arm of a strategy. Those that read a query read ``Promptagator``'s accepted ones, which are so part of the cost.

    Queries that resemble those of ``split`` in ``held_out`` (evaluation sets) are left out. With ``max_cost``, passages are
    asked in steps until so many dollars are spent (``Reach``). Raises ConfigError for that where a strategy reads pairs.
    """
    if max_cost is not None and (strategy.reads, strategy.writes) != ("corpus", "queries"):
        raise ConfigError(f"max_cost = {max_cost}: {strategy.type!r} does not write queries for passages; leave it out")

    def clean(queries: Stage, positives: Stage) -> Stage:
        return gated(queries, positives, held_out, encoder, split=split) if held_out else queries

    used = _engine_of(strategy, engine)
    sampling = Sampling(max_tokens=TOKENS[strategy.writes])
    if (strategy.reads, strategy.writes) == ("corpus", "queries"):
        shown = None if used.type != engine.type else exemplars
        # a prefix is no whole query
        without = ("format", "length") if strategy.type == "prefix" else ()
        selected, mined = augment(
            passages, corpus, strategy, used, exemplars=shown, samples=samples, max_rank=max_rank, negatives=negatives,
            max_tokens=sampling.max_tokens, held_out=held_out, base=encoder, without=without, max_cost=max_cost,
            accepted=None if max_cost is None else MOST, split=split,
        )  # fmt: skip
        kept: Stage = selected
        while isinstance(kept, LeakGate | Reach):
            kept = kept.selected
        parsed = kept.inputs()["parsed"]
        assert isinstance(parsed, Parse)
        read = Cloze(corpus=corpus, selected=selected) if strategy.name() == CLOZE else corpus
        return Arm(parsed.generations, parsed, selected, read, mined)
    if strategy.writes == "triples":
        asked: Stage = Topics(n=passages.n)  # type: ignore[attr-defined]
        made = _rewritten(strategy, used, asked, sampling, samples)
        queries = clean(made, made)
        mined = Mine(selected=queries, corpus=made, negatives=0)
        examples: Stage = WithNegatives(mined=mined, written=(made,), total=1)
        return Arm(made.made, made, queries, made, examples)
    if strategy.type == "multi-hop":
        near = Search(
            index=Index(corpus=corpus, miner=Dense(encoder=encoder)), queries=AsQueries(corpus=passages), depth=10
        )
        asked = Linked(passages=passages, corpus=corpus, search=near)
    else:
        first, mined = augment(
            passages, corpus, Promptagator(), engine, exemplars=exemplars, samples=samples, max_rank=max_rank,
            negatives=negatives, held_out=held_out, base=encoder, split=split,
        )  # fmt: skip
        asked = Pairs(queries=first, corpus=corpus)
    made = _rewritten(strategy, used, asked, sampling, samples)
    if strategy.writes == "queries":
        # words of another language are in no index of words
        miner = Dense(encoder=encoder) if isinstance(strategy, Translate) else BM25()
        search = Search(index=Index(corpus=corpus, miner=miner), queries=made, depth=100)
        found = filtered(made, corpus, corpus, max_rank=max_rank, search=search)
        if isinstance(strategy, Paraphrase):  # by retrieval, and by embedding
            near = Search(index=Index(corpus=corpus, miner=Dense(encoder=encoder)), queries=made, depth=100)
            same = Score(parsed=made, corpus=corpus, filter=RoundTrip(max_rank=max_rank), search=near)
            found = found.model_copy(update={"scores": (*found.scores, same)})
        queries = clean(found, corpus)
        mined = Mine(selected=queries, corpus=corpus, searches=(search,), negatives=negatives)
        return Arm(made.made, made, queries, corpus, mined)
    both = Together(corpora=(corpus, made))
    if strategy.writes == "negatives":
        examples = WithNegatives(mined=mined, written=(made,), total=negatives)
        return Arm(made.made, made, first, both, examples)
    search = Search(index=Index(corpus=both, miner=BM25()), queries=made, depth=100)
    mined = Mine(selected=made, corpus=both, searches=(search,), negatives=negatives)
    return Arm(made.made, made, made, both, mined)


def parts(strategies: str, mix: str = "all", weights: str | None = None) -> dict[str, float]:
    """Weights of the strategies of a mixture: of ``all`` that ``strategies`` names, ``only-NAME`` or all ``without-NAME``.

    Raises ConfigError for another ``mix`` and for weights that do not fit.

    >>> parts("typed+hyde+crop", "without-crop", "3+1+1"), parts("typed+hyde", "only-hyde")
    ({'typed': 3.0, 'hyde': 1.0}, {'hyde': 1.0})
    """
    names, (word, _, one) = strategies.split("+"), mix.partition("-")
    kept = {"all": names, "only": [one], "without": [n for n in names if n != one]}.get(word, [])
    if (one and one not in names) or not kept or (word == "all") != (not one):
        raise ConfigError(f"mix = {mix!r}; allowed: all, and only-NAME or without-NAME with one of {', '.join(names)}")
    try:
        found = [float(each) for each in weights.split("+")] if weights else [1.0] * len(names)
    except ValueError:
        found = []
    if len(found) != len(names):
        raise ConfigError(
            f"weights = {weights!r}: there are {len(names)} strategies; give a number each, such as 2+1+1"
        )
    return {name: weight for name, weight in zip(names, found, strict=True) if name in kept}


def mixed(
    arms: Sequence[Arm], *, n: int | None = None, weights: tuple[float, ...] | None = None
) -> tuple[Blend, Stage]:
    """``n`` examples of several arms by weight, or all where neither is given, and the corpus with their passages.

    What comes out is for ``Train(examples=blend, queries=blend, corpus=corpus)``. Written negatives and passages stay with
    their queries.
    """
    blend = Blend(
        examples=tuple(each.examples for each in arms), queries=tuple(each.queries for each in arms),
        weights=weights, n=n,
    )  # fmt: skip
    corpora = {each.corpus.fingerprint(): each.corpus for each in arms}
    return blend, arms[0].corpus if len(corpora) == 1 else Together(corpora=tuple(corpora.values()))


def _rewritten(strategy: Strategy, engine: Engine, asked: Stage, sampling: Sampling, samples: int) -> Rewrite:
    # of long texts that say the same, one is enough
    several = 1 if strategy.writes == "passages" else samples
    return Rewrite(
        generations=Generate(corpus=asked, strategy=strategy, engine=engine, sampling=sampling, samples=several)
    )


def negatives_from(
    source: str, queries: Stage, corpus: Stage, encoder: Encoder, engine: Engine, *, k: int = 5
) -> tuple[Stage, Stage]:
    """Examples of ``queries`` with ``k`` negatives each out of ``source``, and the corpus with all their passages.

    * ``bm25``, ``dense``: what that search returns besides the positive, by the positive-aware rule of ``Mine``;
    * ``llm``: written by ``engine`` (``HardNegative``), and none besides;
    * ``mixed``: written ones and those of both searches in equal parts;
    * ``llm-filtered``: written ones without those that a teacher (the weighted z-scores of both searches over passages and
      negatives together) scores at 95 % of the positive or above;
    * ``searched``: what both searches return, whatever it scores; without those that the same teacher finds relevant
      (``searched-dropped``), or with these as positives (``searched-relabelled``; RLHN, arXiv 2505.16967).

    Source: arXiv 2504.21015, which compares the first five at ``k`` = 5. Raises ConfigError for another source.
    """
    if source not in NEGATIVES:
        raise ConfigError(f"negatives = {source!r}; allowed: {', '.join(NEGATIVES)}")
    miners = {"bm25": BM25(), "dense": Dense(encoder=encoder)}

    def searches(over: Stage, names: Sequence[str]) -> tuple[Search, ...]:
        return tuple(Search(index=Index(corpus=over, miner=miners[n]), queries=queries, depth=100) for n in names)

    def judged(mined: Stage, over: Stage, relevant: Literal["positive", "drop"]) -> Relabel:
        labels = hybrid_scores(queries, over, encoder, examples=mined)
        return Relabel(mined=mined, labels=labels, share=0.95, relevant=relevant, negatives=k)

    if source.startswith("searched"):
        wanted = k if source == "searched" else SPARE * k
        near = Mine(
            selected=queries, corpus=corpus, searches=searches(corpus, list(miners)), negatives=wanted, margin=None
        )
        if source == "searched":
            return near, corpus
        return judged(near, corpus, "drop" if source == "searched-dropped" else "positive"), corpus
    mined = Mine(
        selected=queries, corpus=corpus, searches=searches(corpus, [source] if source in miners else list(miners)), negatives=k
    )  # fmt: skip
    if source in miners:
        return mined, corpus
    made = _rewritten(HardNegative(), engine, Pairs(queries=queries, corpus=corpus), Sampling(max_tokens=96), k)
    both = Together(corpora=(corpus, made))
    if source == "mixed":
        return WithNegatives(mined=mined, written=(made,), total=k, written_share=1 / 3), both
    written = WithNegatives(mined=mined, written=(made,), total=k)
    return (written if source == "llm" else judged(written, both, "drop")), both


def filtered_by(
    setting: str,
    parsed: Parse,
    passages: Stage,
    corpus: Stage,
    encoder: Encoder,
    *,
    max_rank: int,
    held_out: Sequence[Stage] = (),
    exemplars: Stage | None = None,
    split: str = "test",
) -> Stage:
    """The queries of ``parsed`` by ``all`` the filters of ``filtered``, ``none``, all ``without-NAME``, or all ``with-NAME`` too.

    NAME is a filter's type; with ``logprob`` and ``teacher-score`` (the margin of a hybrid teacher) the better half is kept,
    and ``diversity`` keeps half of what all others kept, that which covers the space best. Of ``held_out`` (evaluation
    sets) and ``exemplars``, the leak gate is the last of all but ``none`` and ``without-leak``. Raises ConfigError for another.
    """
    every = filtered(parsed, passages, corpus, max_rank=max_rank)
    names = [score.filter.type for score in every.scores]
    word, _, name = setting.partition("-")
    allowed = ["all", "none", *(f"without-{n}" for n in (*names, "leak")), *(f"with-{n}" for n in EXTRA)]
    if setting not in allowed:
        raise ConfigError(f"filters = {setting!r}; allowed: {', '.join(allowed)}")
    if setting == "none":
        return Select(parsed=parsed)
    if setting == "without-leak":
        return every
    kept = every
    if word == "without":
        kept = filtered(parsed, passages, corpus, max_rank=max_rank, without=(name,))
    elif name == "diversity":
        order = Score(parsed=every, corpus=passages, filter=Diversity(encoder=encoder, share=0.5))
        kept = Select(parsed=every, scores=(order,))
    elif word == "with":
        kept = every.model_copy(update={"scores": (*every.scores, _extra(name, parsed, passages, corpus, encoder))})
    return gated(kept, passages, held_out, encoder, exemplars=exemplars, split=split) if held_out else kept


def _extra(name: str, parsed: Parse, passages: Stage, corpus: Stage, encoder: Encoder) -> Score:
    """The score of one of the filters of ``EXTRA`` that looks at a row."""
    if name != "teacher-score":
        found: dict[str, Filter] = {"logprob": Logprob(top_share=0.5), "language": Language(), "pii": Pii()}
        return Score(parsed=parsed, corpus=passages, filter=found[name])
    labels = hybrid_scores(parsed, corpus, encoder)
    return Score(parsed=parsed, corpus=corpus, filter=Teacher(by="margin", top_share=0.5), labels=labels)
