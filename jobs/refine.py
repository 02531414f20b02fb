"""Measures rounds of generator and evaluator (MetaSynth, arXiv 2510.01523). ``dagr study jobs/refine.py``."""

from typing import Literal

from dagr_ray import BM25, Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Take, Train, generator_named, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes import gated, hybrid_scores, shown_split
from dagr_ray.recipes.refinement import refine as rounds_of
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import PyDocs

STUDY = {"rounds": (1, 2, 3)}


def refine(
    rounds: int = 2,
    until: Literal["filters", "evaluator"] = "filters",
    data: FileOrFolder | None = None,
    volume: int = 300,
    model: str | None = None,
    passages: int | None = None,
    max_rank: int = 20,
    lr: float = 2e-5,
    seed: int = 0,
    language: str = "auto",
    split: str = "test",
) -> Scorecard:
    """A retriever trained on ``volume`` queries of at most ``rounds`` rounds, evaluated on ``data``'s test split.

    ``until`` says what ends the loop for a passage (see ``recipes.refinement``). The report shows the gain of each step.
    """
    corpus = Beir(path=data, language=language) if data else PyDocs(part="stdlib")
    sets = {corpus.label(): corpus}
    encoder = Encoder(model=str(minilm()), max_length=256 if data else 48)
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), k=4)
    if rounds == 0 or volume == 0:
        return judge(sets, Dense(encoder=encoder), exclude=exemplars, split=split)
    strategy, engine = generator_named("llm" if model else "smollm2", model)
    sample = Sample(corpus=corpus, n=passages or (1800 if data else 1000), exclude=exemplars)
    unfiltered, _ = rounds_of(
        sample, corpus, strategy, engine, exemplars=exemplars, rounds=rounds, max_rank=max_rank, until=until,
        label=lambda queries: hybrid_scores(queries, corpus, encoder),
    )  # fmt: skip
    queries = gated(unfiltered, sample, (corpus,), encoder, exemplars=exemplars, split=split)
    search = Search(index=Index(corpus=corpus, miner=BM25()), queries=queries, depth=100)
    mined = Mine(selected=queries, corpus=corpus, searches=(search,), negatives=1)
    trained = Train(
        examples=Take(mined=mined, n=volume), queries=queries, corpus=corpus, base=encoder, lr=lr, seed=seed,
        max_length=160 if data else 48,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split)
