"""The ladder: measures each step from generated queries to a trained retriever. ``dagr study jobs/ladder.py data=DIR``."""

from typing import Literal

from dagr_ray import Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Train, generator_named, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.engines import Sampling
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes import RUNGS, Rung, Source, climb, filtered, named_sets, shown_split
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mix import HumanPairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.sources import PyDocs
from dagr_ray.teachers.cross_encoder import CrossEncoder

STUDY = {"rung": RUNGS, "base": ("minilm", "scratch")}


def ladder(
    data: FileOrFolder | None = None, ood: str | None = None, rung: Rung = "filters", base: str = "minilm", human: float = 0.0,
    volume: int = 1000, generator: Literal["smollm2", "crop", "llm"] = "smollm2", model: str | None = None,
    teacher: str | None = None, bm25_share: float | None = None, passages: int = 1500, samples: int = 4,
    negatives: int = 7, max_rank: int = 100, epochs: int | None = None, lr: float | None = None, seed: int = 0,
    language: str = "auto", split: str = "test", fused: bool = False,
) -> Scorecard:  # fmt: skip
    """A retriever trained on ``volume`` pairs at a rung, evaluated on ``data`` (a BEIR folder, or none: Python's documentation).

    ``ood``: more such folders, joined by ``+``; ``base``: ``minilm``, ``scratch`` (two re-initialised layers) or a folder;
    ``human``: the share of pairs out of the train split; ``teacher``: a cross-encoder's folder, or none: BM25 by
    ``bm25_share`` (0.6) and the base; ``fused``: each retriever together with BM25, too. At this ``max_rank`` 23 % of 400
    queries on product reviews pass all filters (20: 15 %).
    """
    corpus = Beir(path=data, language=language) if data else PyDocs(part="stdlib")
    sets = named_sets(corpus, ood or (None if data else PyDocs(part="numeric")))
    frozen = Encoder(model=str(minilm()) if base in ("minilm", "scratch") else base, max_length=None if data else 48)
    encoder = frozen.model_copy(update={"reinitialise": 0, "layers": 2}) if base == "scratch" else frozen
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), otherwise=None if split == "train" else "train", k=4)
    if volume == 0:
        return judge(sets, Dense(encoder=encoder), exclude=exemplars, split=split, fused=fused)
    sources = [Source(human, HumanPairs(data=corpus), corpus)] if human > 0 else []
    if human < 1:
        strategy, engine = generator_named(generator, model)
        sample = Sample(corpus=corpus, n=passages, exclude=exemplars)
        written = Generate(
            corpus=sample, strategy=strategy, engine=engine, sampling=Sampling(max_tokens=32), samples=samples,
            exemplars=None if strategy.copies_its_passage else exemplars,
        )  # fmt: skip
        parsed = Parse(generations=written, corpus=sample)
        filtered_queries = filtered(parsed, sample, corpus, max_rank=max_rank, copies=strategy.copies_its_passage)
        sources.append(Source(1 - human, filtered_queries if rung == "filters" else parsed, sample))
    examples, queries, losses = climb(
        rung, sources, corpus, frozen, n=volume, negatives=negatives, held_out=tuple(sets.values()), split=split,
        teacher=CrossEncoder(model=teacher) if teacher else None, bm25_share=bm25_share,
    )  # fmt: skip
    trained = Train(
        examples=examples, queries=queries, corpus=corpus, base=encoder, losses=losses, max_length=160 if data else 48,
        epochs=epochs or (2 if base == "scratch" else 1), lr=lr or (5e-4 if base == "scratch" else 3e-5), seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split, fused=fused)
