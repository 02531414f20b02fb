"""Compares sources of hard negatives (arXiv 2504.21015): searches, an LLM, or both. ``dagr study jobs/negatives.py data=DIR``."""

from dagr_ray import Beir, Dense, Encoder, Scorecard, Take, Train, generator_named, judge
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.quickstart.models import minilm
from dagr_ray.recipes import NEGATIVES, gated, negatives_from
from dagr_ray.stages.mix import HumanPairs

STUDY = {"source": NEGATIVES}


def negatives(
    data: FileOrFolder,
    source: str = "bm25",
    queries: int = 300,
    k: int = 5,
    base: str = "minilm",
    model: str | None = None,
    batch_size: int = 16,
    epochs: int = 1,
    lr: float = 2e-5,
    seed: int = 0,
    language: str = "auto",
    split: str = "test",
) -> Scorecard:
    """A retriever trained on ``queries`` human queries of the train split, each with ``k`` negatives from ``source``.

    A third more queries are processed, because duplicates of test queries and queries without a negative are dropped.
    ``base`` is ``minilm``, ``scratch`` (two re-initialised layers) or the folder of an encoder; ``model`` the folder of the
    language model, or none for the quick start's. ``queries=0`` is the frozen base.
    """
    corpus = Beir(path=data, language=language)
    sets = {corpus.label(): corpus}
    encoder = Encoder(model=base if base not in ("minilm", "scratch") else str(minilm()))
    if base == "scratch":
        encoder = encoder.model_copy(update={"reinitialise": 0, "layers": 2})
    if queries == 0:
        return judge(sets, Dense(encoder=encoder), split=split)
    _, engine = generator_named("llm" if model else "smollm2", model)
    clean = gated(HumanPairs(data=corpus, n=queries + queries // 3), corpus, (corpus,), encoder, split=split)
    examples, passages = negatives_from(source, clean, corpus, encoder, engine, k=k)
    trained = Train(
        examples=Take(mined=examples, n=queries), queries=clean, corpus=passages, base=encoder,
        batch_size=batch_size, epochs=epochs, lr=lr, max_length=160, seed=seed,
    )  # fmt: skip
    return judge(sets, Dense(encoder=encoder), trained=trained, split=split)
