"""Rungs of training: in-batch, mined negatives, a teacher's scores, filters; and negatives that are mined anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Stage
from dagr_ray.losses import Loss
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.losses.kl import KL
from dagr_ray.miners import Miner
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.augmentation import gated
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.label import Label
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.mix import MixExamples
from dagr_ray.stages.relabel import Relabel
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.take import Take
from dagr_ray.teachers import Teacher
from dagr_ray.teachers.hybrid import Hybrid

if TYPE_CHECKING:
    from dagr_ray.stages.train import Train


Rung = Literal["in-batch", "mined", "teacher", "filters"]
RUNGS: tuple[Rung, ...] = get_args(Rung)


def refreshed(
    selected: Stage,
    corpus: Stage,
    base: Encoder,
    *,
    rounds: int,
    steps: int,
    negatives: int = 4,
    margin: float | None = 0.95,
    searches: Sequence[Stage] = (),
    relabel: Callable[[Mine], Stage] | None = None,
    depth: int = 100,
    **training: Any,
) -> Train:
    """A training whose negatives are mined anew by its own last checkpoint every ``steps`` steps, ``rounds`` times.

    The first round mines with ``base``, each later one with the previous round's model, which it also continues to train:
    ANCE (Xiong et al. 2020, arXiv 2007.00808), whose index lags behind in the same way. ``searches`` (such as BM25's) take
    turns with the retriever's own. ``relabel`` adds a teacher's scores to mined examples. ``training`` are fields of
    ``Train``; the learning rate rises and falls once in each round unless ``schedule="constant"``. Every round is a stage,
    so an interrupted run resumes.
    """
    from dagr_ray.stages.train import Train  # brings Ray Train and torch

    if rounds < 1:
        raise ConfigError(f"refreshed: rounds = {rounds}; give 1 or more")
    trained: Train | None = None
    seed = training.pop("seed", 0)
    for number in range(rounds):
        own = Search(
            index=Index(corpus=corpus, miner=Dense(encoder=base), trained=trained), queries=selected, depth=depth
        )
        mined = Mine(selected=selected, corpus=corpus, searches=(own, *searches), negatives=negatives, margin=margin)
        trained = Train(
            examples=relabel(mined) if relabel else mined, queries=selected, corpus=corpus, base=base, start=trained,
            steps=steps, seed=seed + number, **training,
        )  # fmt: skip
    assert trained is not None
    return trained


class Source(NamedTuple):
    """Queries to train on: their weight, their stage, and the corpus with their passages."""

    weight: float
    queries: Stage
    passages: Stage


def climb(
    rung: Rung,
    sources: Sequence[Source],
    corpus: Stage,
    base: Encoder,
    *,
    n: int,
    negatives: int = 7,
    teacher: Teacher | None = None,
    bm25_share: float | None = None,
    held_out: Sequence[Stage] = (),
    split: str = "test",
) -> tuple[Stage, Stage, tuple[Loss, ...]]:
    """``n`` examples of some queries at a rung of the ladder, the stage with their queries, and the losses to train with.

    * ``in-batch``: a query and its passage, against the other passages of its batch;
    * ``mined``: also against a hard negative of BM25 or ``base``, by the positive-aware rule (``Mine``);
    * ``teacher`` and ``filters``: with ``negatives`` hard negatives, trained towards a teacher's order and distances
      (listwise KL, as in Ren et al., arXiv 2110.07367), and a tenth of the in-batch loss.

    The default teacher is the weighted mean of the z-scores of BM25, with weight ``bm25_share`` (0.6), and of ``base``.
    Another teacher's scores are logits, as a cross-encoder's are, at a temperature of 1. ``filters`` differs from
    ``teacher`` only in its queries: see ``filtered``. Several sources are mixed by weight (``MixExamples``). Queries that
    resemble those of ``split`` in ``held_out`` are removed.
    """
    if teacher is not None and bm25_share is not None:
        raise ConfigError(f"climb: bm25_share = {bm25_share} is the hybrid teacher's; remove it with {teacher.type}")
    bm25_share = 0.6 if bm25_share is None else bm25_share
    if not 0 <= bm25_share <= 1:
        raise ConfigError(f"climb: bm25_share = {bm25_share}; give BM25's share of the teacher, from 0 to 1")
    queries = [gated(s.queries, s.passages, held_out, base, split=split) if held_out else s.queries for s in sources]
    scores = teacher or Hybrid(fusion="z-score", weights=(bm25_share, round(1 - bm25_share, 6)))
    examples = [_examples(rung, each, corpus, base, negatives, scores) for each in queries]
    kl = KL() if teacher is None else KL(teacher_temperature=1.0)
    distilled: tuple[Loss, ...] = (kl, InfoNCE(weight=0.1))
    losses = (InfoNCE(),) if rung in ("in-batch", "mined") else distilled
    if len(sources) == 1:
        return Take(mined=examples[0], n=n), queries[0], losses
    weights = tuple(each.weight for each in sources)
    blend = MixExamples(examples=tuple(examples), queries=tuple(queries), weights=weights, n=n)
    return blend, blend, losses


def _examples(rung: Rung, queries: Stage, corpus: Stage, base: Encoder, negatives: int, teacher: Teacher) -> Stage:
    if rung == "in-batch":
        return Mine(selected=queries, corpus=corpus, negatives=0)
    miners: tuple[Miner, ...] = (BM25(), Dense(encoder=base))
    searches = tuple(Search(index=Index(corpus=corpus, miner=m), queries=queries, depth=100) for m in miners)
    if rung == "mined":
        return Mine(selected=queries, corpus=corpus, searches=searches, negatives=1)
    # the teacher decides what else is relevant, so no negative is removed for a score near the positive's
    mined = Mine(selected=queries, corpus=corpus, searches=searches, negatives=negatives, margin=None)
    labels = Label(teacher=teacher, queries=queries, corpus=corpus, searches=searches, examples=mined)
    return Relabel(mined=mined, labels=labels)
