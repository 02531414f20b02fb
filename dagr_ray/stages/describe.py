"""Describes a set of queries by statistics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.joins import rows_with
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.words import folded, words
from dagr_ray.retrieval.encoder import Encoder, encode, load

_ASKS = re.compile(
    r"^(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|do|does|did|can|could|should|will|would|has|have)\b",
    re.IGNORECASE,
)
_SMALL = frozenset(
    "the a an is are was were be been of to in on for with that this it i my and or not you your by from".split()
)


def form_of(text: str) -> str:
    """``question``, ``keywords`` or ``statement``, by a query's first word and its share of function words.

    >>> [form_of(q) for q in ("how do I copy a folder", "copy folder python", "My train was cancelled and I want a refund.")]
    ['question', 'keywords', 'statement']
    """
    if text.rstrip().endswith(("?", "？", "؟", "፧", "\u037e")) or "՞" in text or _ASKS.match(text.strip()):
        return "question"
    query_words = folded(text)
    return "keywords" if sum(word in _SMALL for word in query_words) <= len(query_words) // 6 else "statement"


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams (distinct-n: Li et al. 2016, arXiv 1510.03055); 0 if there are none.

    >>> distinct(["copy a file", "copy a folder"], 2)
    0.75
    """
    counts = Counter[tuple[str, ...]]()
    for text in texts:
        text_words = folded(text)
        counts.update(zip(*(text_words[i:] for i in range(n)), strict=False))
    return len(counts) / counts.total() if counts else 0.0


class Describe(Stage):
    """Statistics of a set of queries, as ``metrics``; none of them says whether the queries are useful for training.

    * ``distinct@1`` and ``distinct@2`` of the first ``n`` queries by hash, because they fall with the number of texts;
    * ``words`` per query, ``overlap``: the share of a query's words that its passage contains;
    * ``form:question`` and so on: shares by ``form_of``; ``form:distance``: half the sum of the differences from the shares
      of ``human``'s queries in ``split`` (0: the same mix, 1: nothing in common), if ``human`` is given;
    * ``spread``: one minus the mean cosine of two queries' embeddings by ``encoder``, if one is given.
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    judged: ClassVar[dict[str, str]] = {"human": "split"}
    queries: Stage
    corpus: Stage
    human: Stage | None = None
    split: str = "dev"
    encoder: Encoder | None = None
    n: Annotated[int, Field(ge=2)] = 500

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            text_of = tables.texts_of(inputs["queries"].read("queries"))
            sample = sorted(text_of, key=lambda query_id: (tables.unit_of("describe", query_id), query_id))[: self.n]
            texts = [text_of[query_id] for query_id in sample]
            metrics = {f"distinct@{n}": distinct(texts, n) for n in (1, 2)}
            if texts:
                metrics["words"] = float(np.mean([len(words(text)) for text in texts]))
                metrics["overlap"] = self._overlap(inputs, text_of, set(sample))
            forms = _forms(texts)
            metrics |= {f"form:{form}": share for form, share in forms.items()}
            if "human" in inputs:
                human_ids = inputs["human"].qrels(self.split, self.type, ["query_id"])["query_id"].unique().to_pylist()
                human_text_of = tables.texts_of(inputs["human"].read("queries"))
                human_forms = _forms([human_text_of[query_id] for query_id in human_ids])
                metrics["form:distance"] = sum(abs(forms[form] - human_forms[form]) for form in forms) / 2
            if self.encoder is not None and len(texts) > 1:
                vectors = encode(load(self.encoder), texts).astype(np.float64)
                n, total = len(vectors), vectors.sum(axis=0)
                metrics["spread"] = 1 - float(total @ total - (vectors * vectors).sum()) / (n * (n - 1))
            rows: list[dict[str, Any]] = [{"measure": name, "value": value} for name, value in metrics.items()]
            return Output({"metrics": tables.table("metrics", rows)}, counts={"in": len(text_of), "out": len(texts)})

        return run

    def _overlap(self, inputs: Inputs, text_of: dict[str, str], drawn: set[str]) -> float:
        relevant = tables.relevant(inputs["queries"].read("qrels"))
        pairs = [row for row in relevant.to_pylist() if row["query_id"] in drawn]
        passages = rows_with(inputs["corpus"], "corpus", "doc_id", {row["doc_id"] for row in pairs})
        words_of: dict[str, set[str]] = {}
        for row in passages.to_pylist():
            words_of[row["doc_id"]] = set(folded(tables.passage_text(row["title"], row["text"])))
        shares = []
        for row in pairs:
            query_words = folded(text_of[row["query_id"]])
            if query_words and row["doc_id"] in words_of:
                shares.append(sum(word in words_of[row["doc_id"]] for word in query_words) / len(query_words))
        return float(np.mean(shares)) if shares else 0.0


def _forms(texts: Sequence[str]) -> dict[str, float]:
    counts = Counter(map(form_of, texts))
    return {form: counts[form] / max(len(texts), 1) for form in ("question", "keywords", "statement")}
