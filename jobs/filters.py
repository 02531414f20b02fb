"""Measures each filter: training with and without it, on the same number of queries. ``dagr study jobs/filters.py``."""

from typing import Literal

from dagr_ray import BM25, Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Take, Train, generator_named, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.engines import Sampling
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes import filtered_by, shown_split
from dagr_ray.recipes.filters import EXTRA
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import PyDocs

FILTERS = ("format", "length", "repetition", "refusal", "template", "duplicate", "copied", "round-trip", "leak")
STUDY = {"filters": ("all", "none", *(f"without-{name}" for name in FILTERS), *(f"with-{name}" for name in EXTRA))}


def filters(
    filters: str = "all",
    data: FileOrFolder | None = None,
    volume: int = 300,
    base: Literal["minilm", "scratch"] = "minilm",
    model: str | None = None,
    passages: int | None = None,
    samples: int = 2,
    max_rank: int = 20,
    seed: int = 0,
    language: str = "auto",
    split: str = "test",
) -> Scorecard:
    """A retriever trained on ``volume`` queries that pass ``filters``, evaluated on ``data`` (none: Python's documentation)."""
    corpus = Beir(path=data, language=language) if data else PyDocs(part="stdlib")
    frozen = encoder = Encoder(model=str(minilm()), max_length=256 if data else 48)
    if base == "scratch":
        encoder = encoder.model_copy(update={"reinitialise": 0, "layers": 2})
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), k=4)
    if volume == 0:
        return judge({corpus.label(): corpus}, Dense(encoder=encoder), exclude=exemplars, split=split)
    strategy, engine = generator_named("llm" if model else "smollm2", model)
    # enough that half of the queries that pass all filters are 300
    sample = Sample(corpus=corpus, n=passages or (1600 if data else 900), exclude=exemplars)
    raw = Generate(
        corpus=sample, strategy=strategy, engine=engine, sampling=Sampling(max_tokens=32, logprob=True), samples=samples,
        exemplars=exemplars,
    )  # fmt: skip
    parsed = Parse(generations=raw, corpus=sample)
    selected = filtered_by(
        filters, parsed, sample, corpus, frozen, max_rank=max_rank, held_out=(corpus,), split=split, exemplars=exemplars,
    )  # fmt: skip
    search = Search(index=Index(corpus=corpus, miner=BM25()), queries=parsed, depth=100)
    mined = Mine(selected=selected, corpus=corpus, searches=(search,), negatives=1)
    trained = Train(
        examples=Take(mined=mined, n=volume), queries=selected, corpus=corpus, base=encoder, seed=seed,
        lr=5e-4 if base == "scratch" else 2e-5, epochs=2 if base == "scratch" else 1, max_length=160 if data else 48,
    )  # fmt: skip
    return judge({corpus.label(): corpus}, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split)
