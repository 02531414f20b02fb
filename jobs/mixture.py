"""Measures each strategy in a mixture: alone, all, all but one. ``dagr study jobs/mixture.py``."""

from dagr_ray import Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Train, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart.models import SMOLLM2, minilm
from dagr_ray.recipes import arm, mixed, parts, shown_split, strategy_named
from dagr_ray.stages.sources import PyDocs

STRATEGIES = ("promptagator", "typed", "crop")
STUDY = {"mix": ("all", *(f"only-{s}" for s in STRATEGIES), *(f"without-{s}" for s in STRATEGIES))}


def mixture(
    mix: str = "all",
    strategies: str = "+".join(STRATEGIES),
    weights: str | None = None,
    budget: float | None = None,
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
    """A retriever trained on ``volume`` rows of ``strategies``, evaluated on ``data``'s test split.

    They are mixed in equal parts, or by ``weights``, one for each strategy (``strategies=typed+hyde weights=3+1``), or by
    ``budget``: all rows that each strategy yields for this many dollars, independent of ``volume``.
    ``mix`` is ``all``, ``only-NAME`` or ``without-NAME``, always at the same volume. ``volume=0`` is the frozen base.
    """
    corpus = Beir(path=data, language=language) if data else PyDocs(part="stdlib")
    sets = {corpus.label(): corpus}
    encoder = Encoder(model=str(minilm()), max_length=256 if data else 48)
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), k=4)
    if volume == 0:
        return judge(sets, Dense(encoder=encoder), exclude=exemplars, split=split)
    weight_of = parts(strategies, mix, weights)
    sample = Sample(corpus=corpus, n=passages or (1400 if data else 800), exclude=exemplars)
    arms = [
        arm(
            strategy_named(name), VLLM(model=model or SMOLLM2), sample, corpus, encoder, exemplars=exemplars,
            max_rank=max_rank, held_out=(corpus,), split=split, max_cost=budget,
        )
        for name in weight_of
    ]  # fmt: skip
    blend, passages_of_all = mixed(arms) if budget else mixed(arms, n=volume, weights=tuple(weight_of.values()))
    trained = Train(
        examples=blend, queries=blend, corpus=passages_of_all, base=encoder, lr=lr, max_length=160 if data else 48,
        seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split)
