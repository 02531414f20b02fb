"""Few queries that stand for many: a subset that covers the space of all of them."""

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
from dagr_ray.filters import Candidate, Filter
from dagr_ray.retrieval.encoder import Encoder, encode, load

Vectors = npt.NDArray[np.float32]
ABSENT = 1e7  # the place of a query that was not reached; exact in float32
HASHED = 512  # dimensions of vectors made of words
BLOCK = 1024  # vectors that are compared with all others at once, and fewer where there are very many others
PAIRS = 1 << 26


class Diversity(Filter):
    """Keeps ``n`` queries, or ``share`` of them, that cover the space of all.

    The score is a query's place in the order that they are chosen in.

    ``by`` says what covers: ``k-centre`` always takes the query that is farthest from those taken, so the largest
    distance of any query to its nearest is within twice the least possible (Gonzalez 1985; as a choice of training data
    Sener and Savarese 2017, arXiv 1708.00489); it likes outliers. ``facility`` takes the query that raises most the sum
    of all queries' similarity to their nearest, within 1 - 1/e of the best (Nemhauser et al. 1978), by lazy evaluation
    (Minoux 1978); it likes what is typical. Both orders are greedy: a smaller ``n`` lies inside a larger one.

    Vectors are those of ``encoder``, or of hashed words and their beginnings where there is none. All rows are compared:
    score what other filters have kept (a ``Select`` as ``parsed``). Only the first ``most`` places are computed; that
    costs ``most`` times the rows for k-centre and the rows squared for facility location, and the vectors in memory.
    Equal choices fall by the hash of the id, so the order of the rows does not matter.

    >>> texts = ["copy a dict", "copying a dict", "copy of a dict", "sort a list", "how tall is the eiffel tower"]
    >>> rows = [Candidate(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> scores = Diversity(by="k-centre").score(rows, None)
    >>> first = [text for score, text in sorted(zip(scores, texts)) if score < 3]
    >>> len(first), sum("dict" in text for text in first)
    (3, 1)
    >>> Diversity(n=3).room(5), Diversity(share=0.5).room(8), Diversity(n=3).keep(1e7)
    (3, 4, 'not-reached')
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # words of any script, with their marks
    needs_passage: ClassVar[bool] = False
    best: ClassVar[Literal["high", "low"]] = "low"
    by: Literal["k-centre", "facility"] = "facility"
    encoder: Encoder | None = None
    most: Annotated[int, Field(ge=1, lt=ABSENT)] = 10_000
    n: Annotated[Annotated[int, Field(ge=1)] | None, Threshold()] = None
    share: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Threshold()] = None

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        order = sorted(
            range(len(rows)), key=lambda i: (tables.unit_of("diversity", rows[i].query_id), rows[i].query_id)
        )
        scores = [ABSENT] * len(rows)
        if order:
            vectors = self._vectors([rows[i].text for i in order])
            chosen = (k_centre if self.by == "k-centre" else facility)(vectors, min(self.most, len(rows)))
            for place, i in enumerate(chosen):
                scores[order[i]] = float(place)
        return scores

    def _vectors(self, texts: Sequence[str]) -> Vectors:
        return hashed(texts) if self.encoder is None else encoded(self.encoder, texts)

    def keep(self, score: float) -> str | None:
        return "not-reached" if score >= ABSENT else None

    def room(self, rows: int) -> int | None:
        limits = [self.n] if self.n is not None else []
        return min(limits + ([round(self.share * rows)] if self.share is not None else []), default=None)


def encoded(encoder: Encoder, texts: Sequence[str]) -> Vectors:
    """Unit vectors (rows, dimensions) by an encoder."""
    model = load(encoder)
    return encode(model, texts, encoder.prompts()[0], encoder.dtype, "query")


def hashed(texts: Sequence[str]) -> Vectors:
    """Unit vectors (rows, 512) of the words of each text and of their first four letters, hashed with a sign.

    Feature hashing: Weinberger et al. 2009, arXiv 0902.2206. A text without words is a vector of zeros.
    """
    vectors = np.zeros((len(texts), HASHED), np.float32)
    for row, text in enumerate(texts):
        for word in folded(text):
            for feature in {word, re.sub(r"^(.{4}).*", r"\1-", word)}:
                code = crc32(feature.encode("utf-8", "surrogatepass"))
                vectors[row, code % HASHED] += 1.0 if code >> 20 & 1 else -1.0
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def k_centre(vectors: Vectors, n: int) -> list[int]:
    """The rows of the first ``n`` centres: the most central one, then always the one farthest from all before."""
    middle = vectors.mean(axis=0)
    chosen = [int(np.argmax(vectors @ middle))]
    nearest = vectors @ vectors[chosen[0]]
    nearest[chosen[0]] = np.inf  # never again, twins may come last
    while len(chosen) < n:
        chosen.append(int(np.argmin(nearest)))
        np.maximum(nearest, vectors @ vectors[chosen[-1]], out=nearest)
        nearest[chosen[-1]] = np.inf
    return chosen


def facility(vectors: Vectors, n: int) -> list[int]:
    """The rows of the first ``n`` places of facility location with similarity max(cosine, 0), by lazy greedy.

    A gain can only shrink as rows are chosen, so one that stands first when it is computed anew is the largest.
    """
    covered = np.zeros(len(vectors), np.float32)
    block = max(min(BLOCK, PAIRS // max(len(vectors), 1)), 1)
    gains = np.concatenate([_gains(vectors, vectors[i : i + block], covered) for i in range(0, len(vectors), block)])
    heap = [(-float(gain), i, 0) for i, gain in enumerate(gains)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < n:
        _, i, seen = heapq.heappop(heap)
        if seen < len(chosen):
            fresh = float(_gains(vectors, vectors[i : i + 1], covered)[0])
            heapq.heappush(heap, (-fresh, i, len(chosen)))
            continue
        chosen.append(i)
        np.maximum(covered, vectors @ vectors[i], out=covered)
    return chosen


def _gains(vectors: Vectors, some: Vectors, covered: Vectors) -> Vectors:
    more = vectors @ some.T - covered[:, None]
    return np.maximum(more, 0, out=more).sum(axis=0)
