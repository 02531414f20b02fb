"""nDCG@10 of the model as it is, on a dev set that shares no passage with the training set."""

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
# Texts and whether they are queries -> unit vectors [len(texts), dimension].
Embed = Callable[[Sequence[str], bool], np.ndarray]


class Dev:
    """Queries with judgements, searched in ``corpus``, which is read anew each time and never held."""

    def __init__(self, data: Artifact, split: str, corpus: Artifact) -> None:
        name = tables.qrels_table(data.table_names(), split, "train: dev", data.name)
        self.data, self.corpus = data, corpus
        self.qrels: dict[str, dict[str, int]] = defaultdict(dict)
        for row in tables.relevant(data.read(name)).to_pylist():
            self.qrels[row["query_id"]][row["doc_id"]] = row["relevance"]
        if not self.qrels:
            raise ConfigError(f"train: dev = {data.name!r} has no judged query in {split!r}; give one that has some")
        text_of = tables.texts_of(data.read("queries"))
        self.queries = {query_id: text_of[query_id] for query_id in self.qrels}

    def check(self, training: Data) -> None:
        """Raises ConfigError where a dev query's passage is one that the training learns from, under whatever id."""
        relevant = pa.array({doc_id for docs in self.qrels.values() for doc_id in docs}, tables.TEXT)
        said: dict[str, str] = {}
        for part in ranges(self.corpus, "corpus"):
            for row in part.filter(pc.is_in(part["doc_id"], value_set=relevant)).to_pylist():
                said[wording(tables.passage_text(row["title"], row["text"]))] = row["doc_id"]
        found = set()
        for number in np.unique(training.examples.positive):
            doc_id = said.get(wording(training.passages.read([number])[0]))
            if doc_id is not None:
                found.add(doc_id)
        if found:
            raise ConfigError(
                f"train: dev = {self.data.name!r}: {len(found)} of its passages are positives of the training, such as "
                f"{min(found)!r}; split by passage (DevSplit), or give another dev set"
            )

    def score(self, embed: Embed) -> float:
        """The mean over the queries; a passage with the id of its query is no answer, unless it was judged as one."""
        import ir_measures

        ids: list[str] = []
        vectors: list[np.ndarray] = []
        for part in ranges(self.corpus, "corpus"):
            ids += part["doc_id"].to_pylist()
            rows = zip(part["title"].to_pylist(), part["text"].to_pylist(), strict=True)
            vectors.append(embed([tables.passage_text(*row) for row in rows], False))
        found = VectorIndex(ids, np.concatenate(vectors)).search(embed(list(self.queries.values()), True), CUT + 1)
        run = []
        for query_id, hits in zip(self.queries, found, strict=True):
            kept = [d for d, _ in hits if d != query_id or d in self.qrels[query_id]]
            run += [ir_measures.ScoredDoc(query_id, doc_id, float(-rank)) for rank, doc_id in enumerate(kept)]
        judged = [ir_measures.Qrel(q, d, r) for q, docs in self.qrels.items() for d, r in docs.items()]
        return float(ir_measures.calc_aggregate([ir_measures.parse_measure(MEASURE)], judged, run).popitem()[1])
