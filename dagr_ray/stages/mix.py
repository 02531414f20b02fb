"""Queries of several generators as one training set, and what kind of queries they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.retriever import Encoder, encode, load
from dagr_ray.stage import Inputs, Output, Run, Stage
from dagr_ray.words import folded, words


class Mix(Stage):
    """The selected queries of several arms, by weight: ``n`` in all, of which arm ``i`` gives its share of ``weights``.

    Without ``weights`` all arms weigh alike, without ``n`` as many are taken as the weights allow. Drawn by hash, so that
    a smaller mixture lies inside a larger one of the same weights. An arm that has too few gives all it has, and ``short``
    counts what is missing: it is not made up by the others, because then the weights would not be those that were asked
    for. To mix by budget, give arms that stop at a cost (``Reach`` with ``max_cost``) and no weights and no ``n``.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage")
    arms: tuple[Stage, ...]
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _weights_fit(self) -> Mix:
        if not self.arms:
            raise ConfigError("mix: arms is empty; give at least one stage of selected queries")
        if self.weights is not None and (len(self.weights) != len(self.arms) or not sum(self.weights)):
            raise ConfigError(
                f"mix: weights = {self.weights} for {len(self.arms)} arms; give one each, not all of them 0"
            )
        return self

    def label(self) -> str:
        return f"{len(self.arms)}arms-{self.n or 'all'}"

    def wanted(self, there: Sequence[int]) -> list[int]:
        """Queries to take of each arm, of which there are so many.

        >>> from dagr_ray.stages.pairs import Topics
        >>> two = (Topics(n=1), Topics(n=2))
        >>> Mix(arms=two, weights=(3, 1), n=10).wanted([100, 100]), Mix(arms=two, weights=(3, 1)).wanted([100, 10])
        ([8, 2], [30, 10])
        >>> Mix(arms=two).wanted([100, 10])
        [100, 10]
        """
        if self.n is None and self.weights is None:
            return list(there)
        weights = np.array(self.weights or [1.0] * len(self.arms)) / sum(self.weights or [1.0] * len(self.arms))
        total = self.n or int(min(t / w for t, w in zip(there, weights, strict=True) if w) + 1e-9)
        # largest remainders, the first arm first
        exact = weights * total
        found = np.floor(exact + 1e-9).astype(int)
        for i in sorted(range(len(found)), key=lambda i: (found[i] - exact[i], i))[: total - int(found.sum())]:
            found[i] += 1
        return [int(k) for k in found]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            arms = [inputs[f"arms.{i}"] for i in range(len(self.arms))]
            ids = [arm.read("queries", ["query_id"])["query_id"].to_pylist() for arm in arms]
            wanted, taken, seen = self.wanted([len(each) for each in ids]), [], set[str]()
            made: dict[str, list[pa.Table]] = {name: [tables.empty(name)] for name in self.outputs}
            for arm, own, k in zip(arms, ids, wanted, strict=True):
                fresh = [query_id for query_id in own if query_id not in seen]
                drawn = sorted(fresh, key=lambda query_id: (tables.unit_of("mix", self.seed, query_id), query_id))[:k]
                seen |= set(drawn)
                taken.append(len(drawn))
                kept = pa.array(drawn, tables.TEXT)
                for name, rows in made.items():
                    table = arm.read(name)
                    rows.append(
                        table.filter(pc.is_in(table["id" if name == "lineage" else "query_id"], value_set=kept))
                    )
            counts = {"in": sum(map(len, ids)), "out": sum(taken), "short": sum(wanted) - sum(taken)}
            shares = {self.arms[i].folder_name(): taken[i] for i in range(len(taken))}
            return Output({k: pa.concat_tables(v) for k, v in made.items()}, counts=counts | {"taken": shares})

        return run


_ASKS = re.compile(
    r"^(?:who|whom|whose|what|when|where|which|why|how|is|are|was|were|do|does|did|can|could|should|will|would|has|have)\b",
    re.IGNORECASE,
)
_SMALL = frozenset(
    "the a an is are was were be been of to in on for with that this it i my and or not you your by from".split()
)


def form_of(text: str) -> str:
    """``question``, ``keywords`` or ``statement``, by how a query begins and whether it has the small words of a sentence.

    >>> [form_of(q) for q in ("how do I copy a folder", "copy folder python", "My train was cancelled and I want a refund.")]
    ['question', 'keywords', 'statement']
    """
    if text.rstrip().endswith(("?", "？", "؟", "፧", "\u037e")) or "՞" in text or _ASKS.match(text.strip()):
        return "question"
    said = folded(text)
    return "keywords" if sum(word in _SMALL for word in said) <= len(said) // 6 else "statement"


def distinct(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words (distinct-n: Li et al. 2016, arXiv 1510.03055); 0 of none.

    >>> distinct(["copy a file", "copy a folder"], 2)
    0.75
    """
    counts = Counter[tuple[str, ...]]()
    for text in texts:
        said = folded(text)
        counts.update(zip(*(said[i:] for i in range(n)), strict=False))
    return len(counts) / counts.total() if counts else 0.0


class Describe(Stage):
    """What a set of queries is like, as ``metrics``: nothing here says whether they teach anything.

    * ``distinct@1`` and ``distinct@2`` of the first ``n`` queries by hash, because they fall with the number of texts;
    * ``words`` a query, ``overlap``: the share of a query's words that its passage has;
    * ``form:question`` and so on: shares by ``form_of``; ``form:distance``: half the sum of the differences from those of
      ``human``'s queries in ``split`` (0: the same mix, 1: nothing in common), where ``human`` is given;
    * ``spread``: one minus the mean cosine of two queries' embeddings by ``encoder``, where one is given.
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
            drawn = sorted(text_of, key=lambda query_id: (tables.unit_of("describe", query_id), query_id))[: self.n]
            texts = [text_of[query_id] for query_id in drawn]
            found = {f"distinct@{n}": distinct(texts, n) for n in (1, 2)}
            if texts:
                found["words"] = float(np.mean([len(words(text)) for text in texts]))
                found["overlap"] = self._overlap(inputs, text_of, set(drawn))
            forms = _forms(texts)
            found |= {f"form:{form}": share for form, share in forms.items()}
            if "human" in inputs:
                human = inputs["human"]
                name = tables.judgements(human.table_names(), self.split, "mix", human.name)
                judged = human.read(name, ["query_id"])["query_id"].unique().to_pylist()
                by_people = tables.texts_of(inputs["human"].read("queries"))
                other = _forms([by_people[query_id] for query_id in judged])
                found["form:distance"] = sum(abs(forms[form] - other[form]) for form in forms) / 2
            if self.encoder is not None and len(texts) > 1:
                vectors = encode(load(self.encoder), texts).astype(np.float64)
                n, total = len(vectors), vectors.sum(axis=0)
                found["spread"] = 1 - float(total @ total - (vectors * vectors).sum()) / (n * (n - 1))
            rows: list[dict[str, Any]] = [{"measure": name, "value": value} for name, value in found.items()]
            return Output({"metrics": tables.table("metrics", rows)}, counts={"in": len(text_of), "out": len(texts)})

        return run

    def _overlap(self, inputs: Inputs, text_of: dict[str, str], drawn: set[str]) -> float:
        judged = tables.relevant(inputs["queries"].read("qrels"))
        pairs = [row for row in judged.to_pylist() if row["query_id"] in drawn]
        wanted = pa.array(sorted({row["doc_id"] for row in pairs}), tables.TEXT)
        said: dict[str, set[str]] = {}
        for part in inputs["corpus"].scan("corpus"):
            for row in part.filter(pc.is_in(part["doc_id"], value_set=wanted)).to_pylist():
                passage = tables.passage_text(row["title"], row["text"])
                said[row["doc_id"]] = set(folded(passage))
        shares = []
        for row in pairs:
            own = folded(text_of[row["query_id"]])
            if own and row["doc_id"] in said:
                shares.append(sum(word in said[row["doc_id"]] for word in own) / len(own))
        return float(np.mean(shares)) if shares else 0.0


def _forms(texts: Sequence[str]) -> dict[str, float]:
    counts = Counter(map(form_of, texts))
    return {form: counts[form] / max(len(texts), 1) for form in ("question", "keywords", "statement")}
