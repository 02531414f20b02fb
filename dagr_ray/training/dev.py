"""nDCG@10 of the current model on a dev set that shares no passage with the training set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.words import wording
from dagr_ray.retrieval.vectors import VectorIndex
from dagr_ray.training.texts import Data, ranges

MEASURE = "nDCG@10"
CUT = 10
# (texts, whether they are queries) -> unit vectors [len(texts), dimension].
Embed = Callable[[Sequence[str], bool], np.ndarray]


class Dev:
    """Queries with judgements, searched in ``corpus``. Each evaluation reads the corpus again instead of holding it."""

    def __init__(self, data: Artifact, split: str, corpus: Artifact) -> None:
        self.data, self.corpus = data, corpus
        self.qrels: dict[str, dict[str, int]] = defaultdict(dict)
        for row in tables.relevant(data.qrels(split, "train: dev")).to_pylist():
            self.qrels[row["query_id"]][row["doc_id"]] = row["relevance"]
        if not self.qrels:
            raise ConfigError(
                f"train: dev = {data.name!r} has no judged query in split {split!r}; give another dev set"
            )
        text_of = tables.texts_of(data.read("queries"))
        self.queries = {query_id: text_of[query_id] for query_id in self.qrels}

    def check(self, training: Data) -> None:
        """Raises ConfigError if a dev query's passage is also a positive of the training, under any id."""
        relevant = pa.array({doc_id for docs in self.qrels.values() for doc_id in docs}, tables.TEXT)
        doc_of: dict[str, str] = {}
        for part in ranges(self.corpus, "corpus"):
            for row in part.filter(pc.is_in(part["doc_id"], value_set=relevant)).to_pylist():
                doc_of[wording(tables.passage_text(row["title"], row["text"]))] = row["doc_id"]
        shared = set()
        for number in np.unique(training.examples.positive):
            doc_id = doc_of.get(wording(training.passages.read([number])[0]))
            if doc_id is not None:
                shared.add(doc_id)
        if shared:
            raise ConfigError(
                f"train: dev = {self.data.name!r}: {len(shared)} of its passages are positives of the training, such as "
                f"{min(shared)!r}; split by passage (DevSplit), or give another dev set"
            )

    def score(self, embed: Embed) -> float:
        """The mean over the queries. A passage with the id of its query is ignored unless it is judged."""
        import ir_measures

        ids: list[str] = []
        vectors: list[np.ndarray] = []
        for part in ranges(self.corpus, "corpus"):
            ids += part["doc_id"].to_pylist()
            rows = zip(part["title"].to_pylist(), part["text"].to_pylist(), strict=True)
            vectors.append(embed([tables.passage_text(*row) for row in rows], False))
        results = VectorIndex(ids, np.concatenate(vectors)).search(embed(list(self.queries.values()), True), CUT + 1)
        run = []
        for query_id, hits in zip(self.queries, results, strict=True):
            ranking = [d for d, _ in hits if d != query_id or d in self.qrels[query_id]]
            run += [ir_measures.ScoredDoc(query_id, doc_id, float(-rank)) for rank, doc_id in enumerate(ranking)]
        qrels = [ir_measures.Qrel(q, d, r) for q, docs in self.qrels.items() for d, r in docs.items()]
        return float(ir_measures.calc_aggregate([ir_measures.parse_measure(MEASURE)], qrels, run).popitem()[1])
