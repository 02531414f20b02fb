"""The same study on any BEIR folder: ``dagr study jobs/beir.py data=DIR``."""

from typing import Literal

from dagr_ray import Beir, Dense, Encoder, Exemplars, Sample, Scorecard, Take, Train, augment, generator_named, judge
from dagr_ray.core.paths import FileOrFolder, split_values
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes import named_sets, shown_split
from dagr_ray.stages.human_labels import People
from dagr_ray.stages.tune_generator import TuneGenerator

STUDY = {"volume": (0, 256, 1024), "generator": ("smollm2", "crop")}


def beir(
    data: FileOrFolder, ood: FileOrFolder | None = None, volume: int = 1024,
    generator: Literal["smollm2", "crop", "llm", "smollm2-tuned", "llm-tuned"] = "smollm2", model: str | None = None,
    base: str = "minilm", density: int | None = None, coverage: float | None = None, passages: int = 1500, samples: int = 2,
    max_rank: int = 20, negatives: int = 1, people: str | None = None, epochs: int = 1, lr: float = 2e-5, seed: int = 0,
    language: str = "auto", split: str = "test", tuned_on: FileOrFolder | None = None, pairs: int | None = None,
    fused: bool = False,
) -> Scorecard:  # fmt: skip
    """A retriever trained on ``volume`` queries generated for the passages of ``data``, evaluated on human queries.

    ``data`` is a folder in BEIR's or another layout, judged on ``split``; ``ood`` a second one for the out-of-distribution
    row; ``base`` is ``minilm`` or the folder of an encoder;
    ``people`` are files of their ratings, joined by ``+``, which override the filters. A generator with ``-tuned`` has learnt
    how people ask from at most ``pairs`` of their queries: those of the collection ``tuned_on``, or the other split of ``data``.
    ``fused`` judges each retriever together with BM25, too.
    """
    corpus = Beir(path=data, language=language)
    sets = named_sets(corpus, ood)
    encoder = Encoder(model=str(minilm()) if base == "minilm" else base)
    exemplars = Exemplars(corpus=corpus, split=shown_split(split), k=6)
    if volume == 0:
        return judge(sets, Dense(encoder=encoder), exclude=exemplars, split=split, fused=fused)

    strategy, engine = generator_named(generator.removesuffix("-tuned"), model)
    tuned = None
    if generator.endswith("-tuned"):
        source = Beir(path=tuned_on) if tuned_on else corpus
        tuned = TuneGenerator(data=source, engine=engine, split=shown_split(split), n=pairs)
        strategy = tuned.strategy
    sample = Sample(corpus=corpus, n=passages, exclude=exemplars)
    selected, mined = augment(
        sample, corpus, strategy, engine, exemplars=exemplars, samples=samples, max_rank=max_rank, negatives=negatives,
        held_out=tuple(sets.values()), split=split, base=encoder,
        people=People(files=split_values(people, "+")) if people else None, tuned=tuned,
    )  # fmt: skip
    examples = Take(mined=mined, n=volume, density=density, coverage=coverage)
    trained = Train(
        examples=examples, queries=selected, corpus=corpus, base=encoder, batch_size=32, max_length=160, lr=lr,
        epochs=epochs, seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, exclude=exemplars, split=split, fused=fused)
