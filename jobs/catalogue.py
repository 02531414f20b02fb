"""Compares strategies: a retriever trained on the same number of rows from each. ``dagr study jobs/catalogue.py``."""

from dagr_ray import Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Take, Train, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart.models import SMOLLM2, minilm
from dagr_ray.recipes import arm, shown_split, strategy_named
from dagr_ray.stages.sources import PyDocs

STUDY = {
    "strategy": (
        "none", "crop", "crop/span", "crop/inverse-cloze", "promptagator", "inpars", "inpars/gbq", "typed", "persona", "prefix",
        "paraphrase", "noisy", "hyde", "hard-negative", "counterfactual", "simplify", "translate", "translate-passage",
        "multi-hop", "task-triple",
    )
}  # fmt: skip


def catalogue(
    strategy: str = "promptagator",
    data: FileOrFolder | None = None,
    volume: int = 500,
    model: str | None = None,
    passages: int | None = None,
    samples: int = 2,
    max_rank: int = 20,
    negatives: int = 1,
    lr: float = 2e-5,
    seed: int = 0,
    split: str = "test",
) -> Scorecard:
    """A retriever trained on ``volume`` rows of one strategy (``none``: untrained), evaluated on ``data``'s test split.

    ``data`` is a BEIR folder, or none for Python's documentation; ``model`` the folder of a generator, or none for the
    quick start's; ``passages`` defaults to the number that the small model needs for 500 accepted rows.
    """
    corpus = Beir(path=data) if data else PyDocs(part="stdlib")
    sets = {corpus.label(): corpus}
    encoder = Encoder(model=str(minilm()), max_length=256 if data else 48)
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), k=4)
    if strategy == "none":
        return judge(sets, Dense(encoder=encoder), exclude=exemplars, split=split)
    sample = Sample(corpus=corpus, n=passages or (1400 if data else 800), exclude=exemplars)
    built = arm(
        strategy_named(strategy), VLLM(model=model or SMOLLM2), sample, corpus, encoder, exemplars=exemplars,
        samples=samples, max_rank=max_rank, negatives=negatives, held_out=(corpus,), split=split,
    )  # fmt: skip
    trained = Train(
        examples=Take(mined=built.examples, n=volume), queries=built.queries, corpus=built.corpus, base=encoder, lr=lr,
        max_length=160 if data else 48, seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split)
