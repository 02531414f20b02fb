"""Approximate nearest neighbours by faiss: inverted lists of product codes, and graphs. Their hits are scored exactly."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from dagr_ray.core.config import Config, ConfigError
from dagr_ray.retrieval import exact_search
from dagr_ray.retrieval.vectors import BLOCK_ROWS, Ranking, VectorIndex

FILE = "approximate.faiss"
# Fewer are searched exactly in no time, and 256 of them are needed to learn product codes from.
LEAST = 1024
QUERIES_AT_ONCE = 1024


class Method(Config):
    """How vectors are searched."""

    abstract: ClassVar[bool] = True


class Exact(Method):
    """Every vector is compared with every query: see ``dagr_ray.retrieval.exact_search``. Nothing to set.

    >>> Exact().to_json()
    {'type': 'exact'}
    """

    abstract: ClassVar[bool] = False


class Approximation(Method):
    """A structure that looks at some of the vectors. It is probed before it is used.

    ``sample`` queries are searched exactly too; where fewer than ``min_recall`` of the exact hits are among those found,
    all queries are searched exactly.
    """

    abstract: ClassVar[bool] = True
    at_search: ClassVar[tuple[str, ...]] = ()  # fields that only decide how the structure is searched
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.95
    sample: Annotated[int, Field(ge=1)] = 200

    def built(self) -> Approximation:
        """The method without what only decides how its structure is searched and probed."""
        names = ("min_recall", "sample", *self.at_search)
        return self.model_copy(update={name: type(self).model_fields[name].default for name in names})

    def build(self, vectors: VectorIndex) -> Any:
        """The faiss index of vectors. Raises ConfigError where it cannot be built."""
        raise NotImplementedError

    def opened(self, index: Any, count: int) -> tuple[Any, int]:
        """The index set up for ``count`` hits, and how many to look at for each that is wanted."""
        raise NotImplementedError


class IvfPq(Approximation):
    """Inverted lists of product codes: ``bytes`` for each vector, ``probes`` of ``lists`` searched for each query.

    ``refine`` times as many as are wanted are scored exactly. None takes 4 sqrt(n) lists and an eighth of them as probes.
    Source: Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011; the number of lists is that of
    faiss's guidelines.

    >>> IvfPq(probes=16).bytes
    48
    """

    abstract: ClassVar[bool] = False
    at_search: ClassVar[tuple[str, ...]] = ("probes", "refine")
    lists: Annotated[int, Field(ge=1)] | None = None
    bytes: Annotated[int, Field(ge=1)] = 48
    probes: Annotated[int, Field(ge=1)] | None = None
    refine: Annotated[int, Field(ge=1)] = 8

    def build(self, vectors: VectorIndex) -> Any:
        """Learnt from 64 vectors for each list, spread over all."""
        import faiss

        dimension = vectors.parts[0].shape[1]
        if dimension % self.bytes:
            allowed = [n for n in range(1, dimension + 1) if dimension % n == 0]
            raise ConfigError(
                f"ivf-pq: bytes = {self.bytes} does not divide {dimension} dimensions; allowed: {allowed}"
            )
        # faiss wants 39 vectors and more to place a list by
        lists = min(self.lists or round(4 * sqrt(len(vectors))), len(vectors) // 39)
        index = faiss.index_factory(dimension, f"IVF{lists},PQ{self.bytes}", faiss.METRIC_INNER_PRODUCT)
        learnt = min(len(vectors), max(64 * lists, 65536))
        index.train(vectors.take(np.linspace(0, len(vectors) - 1, learnt).astype(np.int64)))
        return _filled(index, vectors)

    def opened(self, index: Any, count: int) -> tuple[Any, int]:
        """With its number of probes."""
        index.nprobe = min(self.probes or max(index.nlist // 8, 1), index.nlist)
        return index, self.refine


class Hnsw(Approximation):
    """A graph of ``links`` to near vectors, walked from far to near with a list of ``ef_search`` of the best so far.

    Source: Malkov and Yashunin, Hierarchical Navigable Small World graphs, TPAMI 2018. Holds all vectors in memory.

    >>> Hnsw(ef_search=512).links
    32
    """

    abstract: ClassVar[bool] = False
    at_search: ClassVar[tuple[str, ...]] = ("ef_search",)
    links: Annotated[int, Field(ge=2)] = 32
    ef_construction: Annotated[int, Field(ge=8)] = 200
    ef_search: Annotated[int, Field(ge=1)] = 256

    def build(self, vectors: VectorIndex) -> Any:
        """One vector after the other, on all threads."""
        import faiss

        index = faiss.IndexHNSWFlat(vectors.parts[0].shape[1], self.links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.ef_construction
        return _filled(index, vectors)

    def opened(self, index: Any, count: int) -> tuple[Any, int]:
        """With a list that is no shorter than what is wanted."""
        index.hnsw.efSearch = max(self.ef_search, count)
        return index, 1


def _filled(index: Any, vectors: VectorIndex) -> Any:
    for block in vectors.blocks(BLOCK_ROWS):
        index.add(block)
    return index


def write(method: Approximation, vectors: VectorIndex, folder: Path) -> bool:
    """Builds the structure of ``method`` and writes it below ``folder``; False where there are too few vectors for one."""
    import faiss

    if len(vectors) < LEAST:
        return False
    faiss.write_index(method.build(vectors), str(folder / FILE))
    return True


def opened(method: Approximation, vectors: VectorIndex, file: Path) -> Callable[[np.ndarray, int], list[Ranking]]:
    """A search by the structure in ``file``: for each row of queries [m, dimension] the ``k`` best that it finds.

    Scores and their order are those of exact search.
    """
    import faiss

    index = faiss.read_index(str(file))

    def search(queries: np.ndarray, k: int) -> list[Ranking]:
        ready, wider = method.opened(index, k)
        found: list[Ranking] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = np.ascontiguousarray(queries[start : start + QUERIES_AT_ONCE], np.float32)
            _, near = ready.search(some, min(k * wider, len(vectors)))
            left, place = np.nonzero(near >= 0)
            rows = near[left, place]
            scores = exact_search.scored(some, vectors.take, left, rows)
            best = exact_search.cut(left, rows, scores, k, vectors.names)
            found += vectors.hits(len(some), *best)
        return found

    return search


def recall(found: list[Ranking], truth: list[Ranking]) -> float:
    """The share of the true hits that were found, by query, on average; 1 where there are none."""
    shares = [
        len({d for d, _ in hits} & {d for d, _ in true}) / len(true)
        for hits, true in zip(found, truth, strict=True)
        if true
    ]
    return float(np.mean(shares)) if shares else 1.0
