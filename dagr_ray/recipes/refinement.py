"""A generate-and-critique loop, unrolled into stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from dagr_ray.core.stage import Stage
from dagr_ray.engines import Engine, Sampling
from dagr_ray.recipes.augmentation import filtered
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mix import MixQueries
from dagr_ray.stages.pairs import Pairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.refine import CritiquedPairs, RemainingPassages, TopExemplars
from dagr_ray.stages.rewrite import Rewrite
from dagr_ray.stages.select import Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.critique import Critique
from dagr_ray.strategies.retry import Retry

if TYPE_CHECKING:
    pass


def refine(
    passages: Stage,
    corpus: Stage,
    strategy: Strategy,
    engine: Engine,
    *,
    exemplars: Stage | None,
    rounds: int,
    label: Callable[[Stage], Stage],
    samples: int = 1,
    max_rank: int = 20,
    k: int = 8,
    max_tokens: int = 32,
    until: Literal["filters", "evaluator"] = "filters",
) -> tuple[MixQueries, tuple[Select, ...]]:
    """Queries of at most ``rounds`` rounds of generation and critique: all accepted ones, and those of each step.

    A round generates for passages without an accepted query, with the best accepted queries as exemplars (by the
    ``scores`` of ``label``, a teacher's stage for given queries). ``Critique`` names faults of the answers, and ``Retry``
    writes these answers again. Filters accept or reject the queries of both. ``until`` says what ends the loop for a
    passage: the filters alone, or also a critique without faults. Source: MetaSynth, arXiv 2510.01523. Every step is a
    stage, so an interrupted loop resumes, and the report shows the gain of each step.
    """
    sampling = Sampling(max_tokens=max_tokens)
    accepted: list[Select] = []
    verdicts: list[CritiquedPairs] = []
    shown, remaining = exemplars, passages
    for number in range(rounds):
        if number:
            so_far = MixQueries(arms=tuple(accepted))
            shown = TopExemplars(selected=so_far, corpus=corpus, scores=label(so_far), k=k)
            done = tuple(verdicts) if until == "evaluator" else ()
            remaining = RemainingPassages(corpus=passages, accepted=tuple(accepted), verdicts=done)
        raw = Generate(
            corpus=remaining, strategy=strategy, engine=engine, sampling=sampling, samples=samples, exemplars=shown
        )
        parsed = Parse(generations=raw, corpus=remaining)
        accepted.append(filtered(parsed, remaining, corpus, max_rank=max_rank))
        pairs = Pairs(queries=parsed, corpus=remaining)
        verdict = Generate(corpus=pairs, strategy=Critique(), engine=engine, sampling=sampling)
        verdicts.append(CritiquedPairs(critiques=verdict))
        again = Rewrite(generations=Generate(corpus=verdicts[-1], strategy=Retry(), engine=engine, sampling=sampling))
        accepted.append(filtered(again, remaining, corpus, max_rank=max_rank))
    return MixQueries(arms=tuple(accepted)), tuple(accepted)
