"""Splits training examples by passage, as a dev set for data without one."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage


class DevSplit(Stage):
    """``examples`` without those about a ``share`` of the passages; these become queries, ``qrels.dev`` and a small corpus.

    For ``Train(examples=split, dev=split)``. Split by passage, never by pair: passages of equal text, and all positives of
    a query, are on one side, so no dev answer was a positive in training. The corpus to search holds the dev positives,
    the negatives mined for them, and ``distractors`` other passages. Everything is drawn by hash.
    """

    abstract: ClassVar[bool] = False
    rows_from: ClassVar[str] = "examples"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "queries", "qrels.dev", "corpus")
    examples: Stage
    queries: Stage
    corpus: Stage
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    distractors: Annotated[int, Field(ge=0)] = 1000
    seed: int = 0

    def label(self) -> str:
        return f"{self.share:g}"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            examples = inputs["examples"].read("examples")
            queries, positives = examples["query_id"].to_pylist(), examples["positive_id"].to_pylist()
            text_of = _folded(inputs["corpus"], examples["positive_id"].unique())
            group_of = _groups(queries, [text_of[doc_id] for doc_id in positives])
            is_dev = [tables.unit_of("dev", self.seed, group_of[query_id]) < self.share for query_id in queries]
            train, dev = examples.filter(pa.array([not x for x in is_dev])), examples.filter(pa.array(is_dev))
            if not len(train) or not len(dev):
                raise ConfigError(
                    f"dev-split: share = {self.share} of {len(examples)} examples leaves {len(train)} to train on and "
                    f"{len(dev)} to evaluate on; use another share, or more examples"
                )
            dev_passages = pa.chunked_array(
                [*dev["positive_id"].chunks, pc.list_flatten(dev["negative_ids"]).combine_chunks()]
            )
            corpus = self._corpus(inputs["corpus"], dev_passages.unique())
            all_queries = inputs["queries"].read("queries")
            dev_queries = all_queries.filter(pc.is_in(all_queries["query_id"], value_set=dev["query_id"].unique()))
            dev_qrels = tables.columns(
                "qrels", len(dev), query_id=dev["query_id"], doc_id=dev["positive_id"], relevance=1
            )
            output = {"examples": train, "queries": dev_queries, "qrels.dev": dev_qrels, "corpus": corpus}
            counts = {"in": len(examples), "out": len(train), "dev": len(dev), "dev_passages": corpus.num_rows}
            return Output(output, counts=counts)

        return run

    def _corpus(self, corpus: Artifact, wanted: pa.Array) -> pa.Table:
        """The wanted passages and the first others by hash; memory holds no more than these and one part."""
        parts, others = [tables.empty("corpus")], tables.empty("corpus")
        for part in corpus.scan("corpus"):
            inside = pc.is_in(part["doc_id"], value_set=wanted)
            parts.append(part.filter(inside))
            others = pa.concat_tables([others, part.filter(pc.invert(inside))])
            ids = others["doc_id"].to_pylist()
            order = sorted(range(len(ids)), key=lambda i: (tables.unit_of("distractor", self.seed, ids[i]), ids[i]))
            others = others.take(pa.array(sorted(order[: self.distractors]), pa.int64()))
        return pa.concat_tables([*parts, others]).combine_chunks()


def _folded(corpus: Artifact, ids: pa.ChunkedArray) -> dict[str, str]:
    rows = rows_with(corpus, "corpus", "doc_id", ids)
    texts = pc.binary_join_element_wise(
        tables.fold_texts(rows["title"]), tables.fold_texts(rows["text"]), pa.scalar(" ", tables.TEXT)
    )
    return dict(zip(rows["doc_id"].to_pylist(), texts.to_pylist(), strict=True))


def _groups(queries: list[str], texts: list[str]) -> dict[str, str]:
    """Query -> the name of its group: queries that share a text, and texts that share a query, are in one.

    >>> _groups(["a", "b", "b", "c"], ["x", "x", "y", "z"])
    {'a': 'x', 'b': 'x', 'c': 'z'}
    """
    above: dict[str, str] = {}

    def top(text: str) -> str:
        while above.setdefault(text, text) != text:
            above[text] = text = above[above[text]]
        return text

    first: dict[str, str] = {}
    for query, text in zip(queries, texts, strict=True):
        one, other = sorted((top(first.setdefault(query, text)), top(text)))
        above[other] = one
    return {query: top(text) for query, text in first.items()}
