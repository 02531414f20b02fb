"""Examples with negatives from different sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Stage
from dagr_ray.engines import Engine, Sampling
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.strategies import _rewritten
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.label import Label
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.pairs import Pairs
from dagr_ray.stages.relabel import Relabel
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import ConcatCorpora, WithNegatives
from dagr_ray.strategies.hard_negative import HardNegative
from dagr_ray.teachers.hybrid import Hybrid

NEGATIVES = (
    "bm25", "dense", "llm", "mixed", "llm-filtered", "searched", "searched-dropped", "searched-relabelled",
)  # fmt: skip
SPARE = 4  # this many times the wanted negatives are mined if a teacher removes some


def hybrid_scores(queries: Stage, corpus: Stage, encoder: Encoder, *, examples: Stage | None = None) -> Label:
    """The weighted mean of BM25's and ``encoder``'s z-scores among a query's 100 best passages of ``corpus``."""
    miners = (BM25(), Dense(encoder=encoder))
    searches = tuple(Search(index=Index(corpus=corpus, miner=m), queries=queries, depth=100) for m in miners)
    teacher = Hybrid(fusion="z-score", weights=(0.6, 0.4))
    return Label(teacher=teacher, queries=queries, corpus=corpus, searches=searches, examples=examples)


def negatives_from(
    source: str, queries: Stage, corpus: Stage, encoder: Encoder, engine: Engine, *, k: int = 5
) -> tuple[Stage, Stage]:
    """Examples of ``queries`` with ``k`` negatives each from ``source``, and the corpus with all their passages.

    * ``bm25``, ``dense``: hits of that search, by the positive-aware rule of ``Mine``;
    * ``llm``: only negatives written by ``engine`` (``HardNegative``);
    * ``mixed``: written negatives and hits of both searches in equal parts;
    * ``llm-filtered``: written negatives, except those that a teacher (the weighted z-scores of both searches over
      passages and negatives together) scores at 95 % of the positive or above;
    * ``searched``: hits of both searches with any score; without those that the same teacher finds relevant
      (``searched-dropped``), or with these as positives (``searched-relabelled``; RLHN, arXiv 2505.16967).

    Source: arXiv 2504.21015, which compares the first five at ``k`` = 5. Raises ConfigError for any other source.
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
    both = ConcatCorpora(corpora=(corpus, made))
    if source == "mixed":
        return WithNegatives(mined=mined, written=(made,), total=k, written_share=1 / 3), both
    written = WithNegatives(mined=mined, written=(made,), total=k)
    return (written if source == "llm" else judged(written, both, "drop")), both
