"""Hard negatives: what a search returns for a query besides its own passage, without what is probably relevant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.stage import Inputs, Output, Run, Stage


class Mine(Stage):
    """One example for each selected query: its passage, and up to ``negatives`` passages that searches confuse with it.

    ``searches`` may hold more queries than are selected. Their results are taken in turn (the best of the first, the
    best of the second, the second of the first, ...), each passage and each text once. Never a negative:

    * the positive, a passage with its text, and the positives of other queries that say the same;
    * a passage that any search scores over ``margin`` times the positive, where that search returned the positive: the
      positive-aware rule TopK-PercPos of NV-Retriever (arXiv 2407.15831), which raised nDCG@10 there from 0.541 to
      0.586 at 95 %. ``margin=None`` leaves the rule out.

    A query left without any negative is rejected; one with fewer than ``negatives`` is kept and counted as ``short``.
    ``positive_score`` and ``negative_scores`` are those of the first search, null where it did not return the passage.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("examples", "rejected")
    selected: Stage
    corpus: Stage
    searches: tuple[Stage, ...] = ()
    negatives: Annotated[int, Field(ge=0)] = 1
    margin: Annotated[float, Field(gt=0)] | None = 0.95
    depth: Annotated[int, Field(ge=1)] = 100

    def label(self) -> str:
        return f"{len(self.searches)}x{self.negatives}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            queries = inputs["selected"].read("queries")
            judged = inputs["selected"].read("qrels")
            qrels = judged.filter(pc.greater(judged["relevance"], 0)).select(["query_id", "doc_id"])
            results = [_Results(inputs[f"searches.{i}"], queries, self.depth) for i in range(len(self.searches))]
            same = _Same(inputs["corpus"], qrels, results)
            relevant = same.relevant(queries, qrels)
            examples, rejected = [], []
            near = short = 0
            for query_id, positive_id in zip(*(column.to_pylist() for column in qrels.columns), strict=True):
                lists = [r.of(query_id) for r in results]
                alike = relevant[query_id] | {same.text_of[positive_id]}
                found, dropped = self._negatives(lists, same, same.text_of[positive_id], alike)
                near += dropped
                if not found and self.negatives:
                    searched = sum(len(each) for each in lists)
                    detail = f"{searched} candidates, {dropped} of them too close to the positive"
                    rejected.append({"id": query_id, "by": self.type, "reason": "no-negative", "detail": detail})
                    continue
                short += len(found) < self.negatives
                first = {hit.doc_id: hit.score for hit in lists[0]} if lists else {}
                examples.append(
                    {
                        "query_id": query_id,
                        "positive_id": positive_id,
                        "negative_ids": found,
                        "positive_score": first.get(positive_id),
                        "negative_scores": [first.get(doc_id) for doc_id in found],
                    }
                )
            made = {"examples": tables.table("examples", examples), "rejected": tables.table("rejected", rejected)}
            counts = {
                "in": qrels.num_rows,
                "out": len(examples),
                "rejected": {f"{self.type}/no-negative": len(rejected)} if rejected else {},
                "too_close": near,
                "short": short,
            }
            return Output(made, counts=counts)

        return run

    def _negatives(self, lists: list[list[_Hit]], same: _Same, positive: int, alike: set[int]) -> tuple[list[str], int]:
        """The negatives of one query, and how many candidates the positive-aware rule dropped."""
        close = set()
        for hits in lists:
            own = max((hit.score for hit in hits if same.text_of[hit.doc_id] == positive), default=None)
            if own is not None and self.margin is not None:
                # the same as margin x own where own is positive; BM25 and cosines may be under zero
                limit = own - (1 - self.margin) * abs(own)
                close |= {same.text_of[hit.doc_id] for hit in hits if hit.score > limit}
        close -= alike
        taken: dict[int, str] = {}
        for hit in _in_turn(lists):
            text = same.text_of[hit.doc_id]
            if len(taken) == self.negatives:
                break
            if text not in alike and text not in close:
                taken.setdefault(text, hit.doc_id)
        return list(taken.values()), len(close)


class _Hit(NamedTuple):
    doc_id: str
    score: float


def _in_turn(lists: list[list[_Hit]]) -> Iterator[_Hit]:
    for hits in zip_longest(*lists):
        yield from (hit for hit in hits if hit is not None)


class _Results:
    """The hits of a search by query, best first. Held as Arrow arrays: a hundred hits a query are many for Python."""

    def __init__(self, search: Artifact, queries: pa.Table, depth: int) -> None:
        wanted, found = queries["query_id"].unique(), [tables.empty("candidates")]
        for part in search.scan("candidates"):
            mask = pc.and_(pc.is_in(part["query_id"], value_set=wanted), pc.less_equal(part["rank"], depth))
            found.append(part.filter(mask))
        rows = pa.concat_tables(found).combine_chunks()
        place = pc.index_in(rows["query_id"], value_set=wanted).to_numpy()
        order = np.lexsort((rows["rank"].to_numpy(), place))
        self.rows = rows.select(["doc_id", "score"]).take(pa.array(order))
        edges = np.searchsorted(place[order], np.arange(len(wanted) + 1))
        self.range_of = {q: (edges[i], edges[i + 1]) for i, q in enumerate(wanted.to_pylist())}

    def of(self, query_id: str) -> list[_Hit]:
        start, stop = self.range_of[query_id]
        part = self.rows.slice(start, stop - start)
        return [_Hit(*row) for row in zip(part["doc_id"].to_pylist(), part["score"].to_pylist(), strict=True)]


class _Same:
    """A number for each passage's text, equal for passages that differ in id, case and spacing only."""

    def __init__(self, corpus: Artifact, qrels: pa.Table, results: list[_Results]) -> None:
        seen = pa.chunked_array([qrels["doc_id"].unique(), *(r.rows["doc_id"].unique() for r in results)], tables.TEXT)
        wanted = seen.unique()
        parts = [part.filter(pc.is_in(part["doc_id"], value_set=wanted)) for part in corpus.scan("corpus")]
        passages = pa.concat_tables([tables.empty("corpus"), *parts])
        texts = tables.folded(passages["text"])
        # a passage of a title alone is named by its title
        texts = pc.if_else(pc.equal(texts, ""), tables.folded(passages["title"]), texts)
        numbers = texts.combine_chunks().dictionary_encode().indices.to_pylist()
        self.text_of: dict[str, int] = dict(zip(passages["doc_id"].to_pylist(), numbers, strict=True))
        missing = [doc_id for doc_id in wanted.to_pylist() if doc_id not in self.text_of]
        assert not missing, f"{len(missing)} passages of the searches are not in {corpus.path}, such as {missing[0]!r}"

    def relevant(self, queries: pa.Table, qrels: pa.Table) -> dict[str, set[int]]:
        """Query id -> the texts that are positives of a query that says the same."""
        said = dict(zip(queries["query_id"].to_pylist(), tables.folded(queries["text"]).to_pylist(), strict=True))
        texts: dict[Any, set[int]] = {}
        for query_id, doc_id in zip(qrels["query_id"].to_pylist(), qrels["doc_id"].to_pylist(), strict=True):
            texts.setdefault(said[query_id], set()).add(self.text_of[doc_id])
        return {query_id: texts[text] for query_id, text in said.items() if text in texts}
