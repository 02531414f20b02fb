"""Evaluates a retriever on several data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import distinct_names, split_values, word_of
from dagr_ray.core.stage import Stage
from dagr_ray.miners import Miner
from dagr_ray.miners.bm25 import BM25
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.fuse import Fuse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import Beir

if TYPE_CHECKING:
    pass

JUDGED = 100  # passages of a query that are evaluated: R@100 is the deepest measure
FUSED = (0.6, 0.4)  # weights of BM25 and of the retriever, as in the hybrid teacher


def shown_split(split: str) -> str:
    """The split from which exemplars are drawn if ``split`` is evaluated: another one.

    >>> shown_split("test"), shown_split("dev"), shown_split("validation")
    ('dev', 'train', 'train')
    """
    return "train" if split in tables.DEV else "dev"


def named_sets(*data: Stage | str | None) -> dict[str, Stage]:
    """Data sets by unique names, for ``judge``; a data set that is given twice occurs once.

    A text stands for BEIR folders, joined by ``+``. The name is the stage's label; for a second stage with this label it
    is extended by the path, or else by the content.
    """
    sets: dict[str, Stage] = {}
    texts = {item: [Beir(path=path) for path in split_values(item, "+")] for item in data if isinstance(item, str)}
    for item in [stage for entry in data if entry for stage in (texts[entry] if isinstance(entry, str) else [entry])]:
        if item.fingerprint() in {other.fingerprint() for other in sets.values()}:
            continue
        name = item.label() or item.type
        if name in sets:
            places = [str(getattr(other, "path", "")) for other in (item, sets[name])]
            name = word_of(distinct_names(places)[places[0]]) if all(places) and places[0] != places[1] else name
        sets[f"{name}_{item.fingerprint()[:4]}" if name in sets else name] = item
    return sets


def judge(
    sets: Mapping[str, Stage],
    miner: Miner,
    *,
    trained: Stage | None = None,
    exclude: Stage | None = None,
    split: str = "test",
    leaks: Stage | None = None,
    prefixes: Mapping[str, tuple[str, str]] | None = None,
    fused: bool = False,
) -> Scorecard:
    """The scorecard of a retriever on several data sets, the in-distribution one first.

    ``prefixes`` gives a set its own query and passage prefixes instead of the encoder's, as models with instructions
    need them (``{"arguana": ("query: ", "query: ")}``); BM25 has none.

    ``judge`` retrieves 101 passages and evaluates the top 100, because a query that is also a passage is removed from its
    own results. With ``fused`` each set occurs a second time as ``NAME-fused``: the retriever together with BM25, as most
    teams run search. Both scores are scaled over the query's hits to mean 0 and deviation 1, and weighted 0.6 and 0.4
    (``FUSED``); these weights are fixed beforehand and the same for all arms, including the frozen base.

    With ``leaks`` (a ``LeakGate``) each set occurs twice: unchanged, and as ``NAME-untouched`` without the queries that
    the training data resembles.
    """
    unknown = sorted((prefixes or {}).keys() - sets.keys())
    if unknown:
        raise ConfigError(f"judge: prefixes for {unknown[0]!r}, which is not a data set; allowed: {', '.join(sets)}")
    evaluations: list[Evaluate] = []
    together: list[Evaluate] = []
    for position, (name, data) in enumerate(sets.items()):
        own = _prefixed(miner, prefixes[name]) if prefixes and name in prefixes else miner
        index = Index(corpus=data, miner=own, trained=trained)
        search = Search(index=index, queries=data, split=split, depth=JUDGED + 1)
        held_out = exclude if position == 0 else None
        evaluations.append(Evaluate(search=search, data=data, split=split, exclude=held_out, name=name, depth=JUDGED))
        if fused:
            bm25 = search.model_copy(update={"index": Index(corpus=data, miner=BM25())})
            both = Fuse(searches=(bm25, search), method="weights", scale="z-score", weights=FUSED, depth=JUDGED + 1)
            together.append(evaluations[-1].model_copy(update={"search": both, "name": f"{name}-fused"}))
    evaluations += together
    if leaks is not None:
        clean = [each.model_copy(update={"name": f"{each.name}-untouched", "leaks": leaks}) for each in evaluations]
        evaluations += clean
    return Scorecard(evaluations=tuple(evaluations))


def _prefixed(miner: Miner, prefixes: tuple[str, str]) -> Miner:
    encoder = getattr(miner, "encoder", None)
    if not isinstance(encoder, Encoder):
        return miner
    query, passage = prefixes
    changed = encoder.model_copy(update={"query_prefix": query, "doc_prefix": passage})
    return miner.model_copy(update={"encoder": changed})
