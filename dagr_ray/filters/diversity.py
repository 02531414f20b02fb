"""Diversity: a subset of the queries that covers the space of all of them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.config import Threshold
from dagr_ray.core.words import folded
from dagr_ray.filters import Filter, ScoredQuery
from dagr_ray.retrieval.encoder import Encoder, encode, load

Vectors = npt.NDArray[np.float32]
ABSENT = 1e7  # the score of a query that was not selected; exact in float32
HASH_DIMENSIONS = 512  # of the vectors of hashed words
BLOCK = 1024  # vectors that are compared with all others at once
PAIRS = 1 << 26  # the largest number of similarities in memory at once; lowers BLOCK for very many vectors


class Diversity(Filter):
    """Keeps ``n`` queries, or a ``share`` of them, that cover the space of all.

    The score is a query's position in the order of selection.

    ``by`` is the selection rule. ``k-centre`` always selects the query farthest from the selected ones, so the largest
    distance of any query to its nearest selected query is at most twice the optimum (Gonzalez 1985; as a choice of
    training data Sener and Savarese 2017, arXiv 1708.00489); it prefers outliers. ``facility`` selects the query that
    most increases the sum of all queries' similarity to their nearest selected query, which reaches 1 - 1/e of the
    optimum (Nemhauser et al. 1978), by lazy evaluation (Minoux 1978); it prefers typical queries. Both are greedy: a
    smaller ``n`` is a subset of a larger one.

    Vectors come from ``encoder``; without one they are hashes of words and word prefixes. All rows are compared, so score
    the output of other filters (a ``Select`` as ``parsed``). Only the first ``most`` positions are computed. The cost is
    ``most`` times the rows for k-centre, the rows squared for facility location, and all vectors in memory. Ties are
    broken by the hash of the id, so the order of the rows does not matter.

    >>> texts = ["copy a dict", "copying a dict", "copy of a dict", "sort a list", "how tall is the eiffel tower"]
    >>> rows = [ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> scores = Diversity(by="k-centre").score(rows, None)
    >>> first = [text for score, text in sorted(zip(scores, texts)) if score < 3]
    >>> len(first), sum("dict" in text for text in first)
    (3, 1)
    >>> Diversity(n=3).quota(5), Diversity(share=0.5).quota(8), Diversity(n=3).keep(1e7)
    (3, 4, 'not-reached')
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # reads words of any script, with their marks
    needs_passage: ClassVar[bool] = False
    best: ClassVar[Literal["high", "low"]] = "low"
    by: Literal["k-centre", "facility"] = "facility"
    encoder: Encoder | None = None
    most: Annotated[int, Field(ge=1, lt=ABSENT)] = 10_000
    n: Annotated[Annotated[int, Field(ge=1)] | None, Threshold()] = None
    share: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Threshold()] = None

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        order = sorted(
            range(len(rows)), key=lambda i: (tables.unit_of("diversity", rows[i].query_id), rows[i].query_id)
        )
        scores = [ABSENT] * len(rows)
        if order:
            vectors = self._vectors([rows[i].text for i in order])
            selected = (k_centre if self.by == "k-centre" else facility)(vectors, min(self.most, len(rows)))
            for position, i in enumerate(selected):
                scores[order[i]] = float(position)
        return scores

    def _vectors(self, texts: Sequence[str]) -> Vectors:
        return hashed(texts) if self.encoder is None else encoded(self.encoder, texts)

    def keep(self, score: float) -> str | None:
        return "not-reached" if score >= ABSENT else None

    def quota(self, rows: int) -> int | None:
        limits = [self.n] if self.n is not None else []
        return min(limits + ([round(self.share * rows)] if self.share is not None else []), default=None)


def encoded(encoder: Encoder, texts: Sequence[str]) -> Vectors:
    """Unit vectors (rows, dimensions) of an encoder."""
    model = load(encoder)
    return encode(model, texts, encoder.prompts()[0], encoder.dtype, "query")


def hashed(texts: Sequence[str]) -> Vectors:
    """Unit vectors (rows, 512) of each text's words and their first four letters, hashed with a sign.

    Feature hashing: Weinberger et al. 2009, arXiv 0902.2206. A text without words is a vector of zeros.
    """
    vectors = np.zeros((len(texts), HASH_DIMENSIONS), np.float32)
    for row, text in enumerate(texts):
        for word in folded(text):
            for feature in {word, re.sub(r"^(.{4}).*", r"\1-", word)}:
                code = crc32(feature.encode("utf-8", "surrogatepass"))
                vectors[row, code % HASH_DIMENSIONS] += 1.0 if code >> 20 & 1 else -1.0
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def k_centre(vectors: Vectors, n: int) -> list[int]:
    """The rows of the first ``n`` centres: the most central row, then always the row farthest from all selected ones."""
    middle = vectors.mean(axis=0)
    selected = [int(np.argmax(vectors @ middle))]
    nearest = vectors @ vectors[selected[0]]
    nearest[selected[0]] = np.inf  # never selected again, while duplicates of it may come last
    while len(selected) < n:
        selected.append(int(np.argmin(nearest)))
        np.maximum(nearest, vectors @ vectors[selected[-1]], out=nearest)
        nearest[selected[-1]] = np.inf
    return selected


def facility(vectors: Vectors, n: int) -> list[int]:
    """The first ``n`` rows of facility location with similarity max(cosine, 0), by lazy greedy selection.

    A gain can only shrink while rows are selected. A recomputed gain that is still the first is therefore the largest.
    """
    covered = np.zeros(len(vectors), np.float32)
    block = max(min(BLOCK, PAIRS // max(len(vectors), 1)), 1)
    gains = np.concatenate([_gains(vectors, vectors[i : i + block], covered) for i in range(0, len(vectors), block)])
    heap = [(-float(gain), i, 0) for i, gain in enumerate(gains)]
    heapq.heapify(heap)
    selected: list[int] = []
    while len(selected) < n:
        _, i, computed_at = heapq.heappop(heap)
        if computed_at < len(selected):
            gain = float(_gains(vectors, vectors[i : i + 1], covered)[0])
            heapq.heappush(heap, (-gain, i, len(selected)))
            continue
        selected.append(i)
        np.maximum(covered, vectors @ vectors[i], out=covered)
    return selected


def _gains(vectors: Vectors, candidates: Vectors, covered: Vectors) -> Vectors:
    gains = vectors @ candidates.T - covered[:, None]
    return np.maximum(gains, 0, out=gains).sum(axis=0)
