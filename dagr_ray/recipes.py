"""The parts that recipes share: a generator's whole arm from passages to mined examples, and the judging of a retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dagr_ray.config import ConfigError
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.vllm import VLLM
from dagr_ray.filters import Filter
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.goal import Reach
from dagr_ray.miners import Miner
from dagr_ray.miners.bm25 import BM25
from dagr_ray.stage import Stage
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.generate import Generate, Parse
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.select import Score, Select
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.promptagator import Promptagator


def generator_named(name: str, model: str | None = None) -> tuple[Strategy, Engine]:
    """The strategy and engine of a generator: ``crop`` (no LLM), ``smollm2`` (the small one), or ``llm`` with a model."""
    if name == "crop":
        return Crop(), CropEngine()
    if name == "smollm2":
        from dagr_ray.models import smollm2

        return Promptagator(), VLLM(model=str(smollm2()))
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
    max_candidates: int | None = None,
    max_cost: float | None = None,
) -> tuple[Select | Reach, Mine]:
    """Queries for ``passages``, filtered and with BM25 negatives from ``corpus``: the selected queries and the examples.

    With ``accepted``, passages are asked only until so many queries are accepted or a limit is reached: see ``Reach``.
    A cropped query is a copy of its passage by design, so the filter against copies is left out for it.
    """
    sampling = Sampling(max_tokens=max_tokens)
    shown = None if strategy.type == "crop" else exemplars
    raw = Generate(
        corpus=passages, strategy=strategy, engine=engine, sampling=sampling, samples=samples, exemplars=shown
    )
    parsed = Parse(generations=raw, corpus=passages)
    search = Search(index=Index(corpus=corpus, miner=BM25()), queries=parsed, depth=100)
    cheap: list[Filter] = [Format(), Length(), Duplicate()]
    if strategy.type != "crop":
        cheap.append(Copied())
    scores = [Score(parsed=parsed, corpus=passages, filter=f, search=None) for f in [*cheap, *extra_filters]]
    scores.append(Score(parsed=parsed, corpus=corpus, filter=RoundTrip(max_rank=max_rank), search=search))
    every = Select(parsed=parsed, scores=tuple(scores))
    selected: Select | Reach = every
    if accepted is not None:
        selected = Reach(selected=every, accepted=accepted, max_candidates=max_candidates, max_cost=max_cost)
        search = Search(index=Index(corpus=corpus, miner=BM25()), queries=selected, depth=100)
    return selected, Mine(selected=selected, corpus=corpus, searches=(search,), negatives=negatives)


def judge(
    sets: Mapping[str, Stage],
    miner: Miner,
    *,
    trained: Stage | None = None,
    exclude: Stage | None = None,
    split: str = "test",
) -> Scorecard:
    """The scorecard of a retriever on several data sets, the in-distribution one first."""
    evaluations = []
    for position, (name, data) in enumerate(sets.items()):
        search = Search(index=Index(corpus=data, miner=miner, trained=trained), queries=data, split=split, depth=100)
        held_out = exclude if position == 0 else None
        evaluations.append(Evaluate(search=search, data=data, split=split, exclude=held_out, name=name))
    return Scorecard(evaluations=tuple(evaluations))
