"""Quick start: does augmentation help search over Python's own documentation, how much is enough, and at what cost?"""

from typing import Literal

from dagr_ray import Dense, Encoder, Exemplars, Sample, Scorecard, Take, Train, augment, generator_named, judge
from dagr_ray.quickstart.models import minilm
from dagr_ray.stages.sources import PyDocs

# The default axes of `dagr study`. The sizes take 12 minutes on two CPU cores.
STUDY = {"volume": (0, 64, 192, 448), "generator": ("smollm2", "crop"), "base": ("minilm", "scratch")}


def quickstart(
    volume: int = 448,
    generator: Literal["smollm2", "crop"] = "smollm2",
    base: Literal["minilm", "scratch"] = "minilm",
    density: int | None = None,
    coverage: float | None = None,
    passages: int = 640,
    samples: int = 2,
    max_rank: int = 20,
    seed: int = 0,
) -> Scorecard:
    """A retriever trained on ``volume`` generated queries about the standard library, evaluated on it and on numpy and pandas.

    ``density`` (queries per passage) and ``coverage`` (share of the passages) are DAGR's axes of volume; ``scratch`` is
    MiniLM with two re-initialised layers, a base that is not pre-trained.
    """
    docs = PyDocs(part="stdlib")
    sets = {"pydocs-stdlib": docs, "pydocs-numeric": PyDocs(part="numeric")}
    frozen = encoder = Encoder(model=str(minilm()), max_length=48)
    if base == "scratch":
        encoder = encoder.model_copy(update={"reinitialise": 0, "layers": 2})
    exemplars = Exemplars(corpus=docs, split="dev", k=4)
    if volume == 0:
        return judge(sets, Dense(encoder=encoder), exclude=exemplars)

    strategy, engine = generator_named(generator)
    sample = Sample(corpus=docs, n=passages, exclude=exemplars)
    selected, mined = augment(
        sample, docs, strategy, engine, exemplars=exemplars, samples=samples, max_rank=max_rank, max_tokens=24,
        held_out=tuple(sets.values()), base=frozen,
    )  # fmt: skip
    examples = Take(mined=mined, n=volume, density=density, coverage=coverage)
    trained = Train(
        examples=examples, queries=selected, corpus=docs, base=encoder, batch_size=32, max_length=48,
        lr=3e-5 if base == "minilm" else 5e-4, epochs=1 if base == "minilm" else 2, seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars)
