"""How a retriever is judged on several data sets."""

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

JUDGED = 100  # passages of a query that count: R@100 is the deepest measure
FUSED = (0.6, 0.4)  # weights of BM25 and of the retriever, as of the hybrid teacher


def shown_split(split: str) -> str:
    """The split that exemplars are drawn from where ``split`` is judged: another one.

    >>> shown_split("test"), shown_split("dev"), shown_split("validation")
    ('dev', 'train', 'train')
    """
    return "train" if split in tables.DEV else "dev"


def named_sets(*data: Stage | str | None) -> dict[str, Stage]:
    """Data sets by a name for each, for ``judge``: what is given twice is there once, and no two have one name.

    A text stands for BEIR folders, joined by ``+``. The name is the stage's label; of a second one with that label, the
    path tells more, and else its content.
    """
    found: dict[str, Stage] = {}
    texts = {each: [Beir(path=path) for path in split_values(each, "+")] for each in data if isinstance(each, str)}
    for each in [stage for one in data if one for stage in (texts[one] if isinstance(one, str) else [one])]:
        if each.fingerprint() in {other.fingerprint() for other in found.values()}:
            continue
        name = each.label() or each.type
        if name in found:
            places = [str(getattr(other, "path", "")) for other in (each, found[name])]
            name = word_of(distinct_names(places)[places[0]]) if all(places) and places[0] != places[1] else name
        found[f"{name}_{each.fingerprint()[:4]}" if name in found else name] = each
    return found


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

    ``prefixes`` gives a set its own query and passage prefixes in place of the encoder's, as models with instructions
    want them (``{"arguana": ("query: ", "query: ")}``); BM25 has none.

    The best 100 passages of a query count; one more is searched, because a query that is a passage itself is taken out.
    With ``fused`` each set is there a second time as ``NAME-fused``: the retriever together with BM25, as most teams run
    search. Both scores are scaled by the query's hits to mean 0 and deviation 1, and weighted 0.6 and 0.4 (``FUSED``); these
    weights are fixed beforehand and the same for all arms, the frozen base included.

    With ``leaks`` (a ``LeakGate``) each set is there twice: as it is, and as ``NAME-untouched`` without the queries that
    the training data resembles.
    """
    unknown = sorted((prefixes or {}).keys() - sets.keys())
    if unknown:
        raise ConfigError(f"judge: prefixes for {unknown[0]!r}, which is no set; allowed: {', '.join(sets)}")
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
