"""A generator's whole arm, from passages to mined examples."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Stage
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.vllm import VLLM
from dagr_ray.filters import Filter
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.refusal import Refusal
from dagr_ray.filters.repetition import Repetition
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.template import Template
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.quickstart.models import SMOLLM2
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.generate_until import GenerateUntil
from dagr_ray.stages.human_labels import WithHumanLabels
from dagr_ray.stages.leakage import LeakGate, LeakScan
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.promptagator import Promptagator


def generator_named(name: str, model: str | None = None) -> tuple[Strategy, Engine]:
    """The strategy and engine of a generator: ``crop`` (no LLM), ``smollm2`` (a small LLM), or ``llm`` with a model."""
    if name == "crop":
        return Crop(), CropEngine()
    if name == "smollm2":
        return Promptagator(), VLLM(model=SMOLLM2)
    if name == "llm" and model:
        return Promptagator(), VLLM(model=model)
    raise ConfigError(f"generator = {name!r} (model {model!r}): allowed are crop, smollm2, and llm with model=FOLDER")


def augment(
    passages: Stage,
    corpus: Stage,
    strategy: Strategy,
    engine: Engine,
    *,
    exemplars: Stage | None,
    samples: int,
    max_rank: int,
    negatives: int = 1,
    max_tokens: int = 32,
    extra_filters: Sequence[Filter] = (),
    accepted: int | None = None,
    max_completions: int | None = None,
    max_cost: float | None = None,
    held_out: Sequence[Stage] = (),
    split: str = "test",
    base: Encoder | None = None,
    without: Collection[str] = (),
    people: Stage | None = None,
    tuned: Stage | None = None,
    max_candidates: int | None = None,
) -> tuple[Select | GenerateUntil | WithHumanLabels | LeakGate, Mine]:
    """Generated queries for ``passages``, filtered and with BM25 negatives from ``corpus``: selected queries and examples.

    With ``accepted``, generation stops when this many queries are accepted or a limit is reached: see ``GenerateUntil``.
    Queries that resemble those of ``split`` in ``held_out`` (evaluation sets) are removed: see ``LeakGate``; with the
    encoder ``base``, also paraphrases. ``without`` names types of filters to omit. Human labels (``people``) override the
    filters: they can both reject and restore a query. A cropped query is a copy of its passage by design, so it is not
    filtered for copies. The model of ``tuned`` (a ``TuneGenerator``) answers instead of the engine's own, and needs no
    exemplars. ``max_candidates`` is the name of ``max_completions`` in 0.1.
    """
    max_completions = max_candidates if max_completions is None else max_completions
    sampling = Sampling(max_tokens=max_tokens)
    shown = None if strategy.copies_its_passage or tuned else exemplars
    raw = Generate(
        corpus=passages,
        strategy=strategy,
        engine=engine,
        sampling=sampling,
        samples=samples,
        exemplars=shown,
        tuned=tuned,
    )
    parsed = Parse(generations=raw, corpus=passages)
    every = filtered(
        parsed,
        passages,
        corpus,
        max_rank=max_rank,
        copies=strategy.copies_its_passage,
        extra=extra_filters,
        without=without,
    )
    selected: Select | GenerateUntil | WithHumanLabels | LeakGate = every
    search = every.scores[-1].search
    if accepted is not None:
        selected = GenerateUntil(selected=every, accepted=accepted, max_completions=max_completions, max_cost=max_cost)
        search = Search(index=Index(corpus=corpus, miner=BM25()), queries=selected, depth=100)
    assert search is not None
    if people is not None:
        selected = WithHumanLabels(source=selected, people=people, queries=parsed)
    if held_out:
        selected = gated(selected, passages, held_out, base, exemplars=shown, split=split)
    return selected, Mine(selected=selected, corpus=corpus, searches=(search,), negatives=negatives)


def filtered(
    parsed: Stage,
    passages: Stage,
    corpus: Stage,
    *,
    max_rank: int,
    copies: bool = False,
    extra: Sequence[Filter] = (),
    without: Collection[str] = (),
    search: Search | None = None,
) -> Select:
    """The queries of ``parsed`` that pass the cheap filters, ``extra``, and a round trip through BM25 over ``corpus``.

    ``passages`` are those for which they were generated; ``copies`` says that the queries may be copies of them.
    ``without`` names types of filters to omit. ``search``, of the queries of ``parsed``, replaces the BM25 search.
    """
    cheap: list[Filter] = [Format(), Length(), Repetition(), Refusal(), Template(), Duplicate()]
    cheap += [] if copies else [Copied()]
    scores = [Score(parsed=parsed, corpus=passages, filter=f, search=None) for f in [*cheap, *extra]]
    search = search or Search(index=Index(corpus=corpus, miner=BM25()), queries=parsed, depth=100)
    scores.append(Score(parsed=parsed, corpus=corpus, filter=RoundTrip(max_rank=max_rank), search=search))
    return Select(parsed=parsed, scores=tuple(score for score in scores if score.filter.type not in without))


def gated(
    selected: Stage,
    passages: Stage,
    held_out: Sequence[Stage],
    base: Encoder | None,
    *,
    exemplars: Stage | None = None,
    split: str = "test",
) -> LeakGate:
    """``selected`` without queries that resemble those of ``split`` in ``held_out``; ``passages`` hold their positives.

    ``exemplars`` are compared too. With the encoder ``base``, paraphrases are also removed.
    """
    sets = tuple(held_out)
    scan = LeakScan(
        selected=selected, corpus=passages, held_out=sets, exemplars=exemplars, encoder=base, split=split
    )  # fmt: skip
    return LeakGate(selected=selected, scan=scan)


def own_round_trip(
    parsed: Stage, corpus: Stage, base: Encoder, *, taught_by: Stage | None = None, depth: int = 100, **training: Any
) -> Search:
    """The search for a round trip through a retriever that is trained on the same queries before the filter.

    Promptagator's own recipe in two passes (Dai et al. 2022, arXiv 2209.11755, section 3.2): ``base`` is trained on all
    queries of ``parsed``, or on those of ``taught_by`` (such as the output of the cheap filters), against the other
    passages of its batch; then it searches for every query's passage. Give the search to a ``Score`` with a ``RoundTrip``,
    and train the final retriever from ``base`` again, on the queries that pass. ``training`` are fields of ``Train``.
    """
    from dagr_ray.stages.train import Train  # brings Ray Train and torch

    unfiltered = parsed if taught_by is None else taught_by
    examples = Mine(selected=unfiltered, corpus=corpus, negatives=0)
    trained = Train(examples=examples, queries=unfiltered, corpus=corpus, base=base, **training)
    return Search(index=Index(corpus=corpus, miner=Dense(encoder=base), trained=trained), queries=parsed, depth=depth)
