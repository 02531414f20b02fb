"""Dense retrieval: the vectors of a bi-encoder, searched exactly or by faiss's approximate structures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow as pa

from dagr_ray.core.config import OmitWhenDefault
from dagr_ray.core.tables import passage_text
from dagr_ray.miners import Build, Miner
from dagr_ray.retrieval import approximate
from dagr_ray.retrieval.approximate import Approximation, Exact, Method
from dagr_ray.retrieval.encoder import WINDOW, Encoder, encode, load
from dagr_ray.retrieval.vectors import Ranking, VectorIndex, VectorWriter

QUERIES_AT_ONCE = 16384
MINILM_COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


class Dense(Miner):
    """Cosine search over the vectors of ``encoder``; ``storage`` float16 halves the index at 3 digits' precision.

    ``search`` is ``exact``, or an approximate method by name or with its fields: ``ivf-pq``, ``hnsw``.
    Source: Karpukhin et al., Dense Passage Retrieval, arXiv 2004.04906, with an exact instead of an approximate index.

    >>> Dense(encoder=Encoder(model="/models/e5", query_prefix="query: ")).storage
    'float32'
    >>> Dense(search="hnsw").search.ef_search
    256
    """

    abstract: ClassVar[bool] = False
    shards_per_part: ClassVar[int] = 32
    encoder: Encoder = Encoder(revision=MINILM_COMMIT)
    storage: Literal["float32", "float16"] = "float32"
    search: Annotated[Method, OmitWhenDefault()] = Exact()

    def label(self) -> str:
        return self.encoder.label()

    def index_settings(self) -> Dense:
        """The vectors are the same however they are searched."""
        return self.model_copy(update={"search": Exact()})

    def builder(self, model: Path | None = None) -> Build:
        """Of ``vectors.npy`` and ``ids.parquet``: the encoder is loaded once for all that it is given."""
        loaded = load(self.encoder, model=model)

        def build(corpus: Iterable[pa.Table], folder: Path) -> None:
            with VectorWriter(folder, int(loaded.get_embedding_dimension() or 0), self.storage) as writer:
                for part in corpus:
                    for start in range(0, part.num_rows, WINDOW):
                        rows = part.slice(start, WINDOW).to_pylist()
                        texts = [passage_text(row["title"], row["text"]) for row in rows]
                        vectors = encode(loaded, texts, self.encoder.prompts()[1], self.encoder.dtype, "document")
                        writer.add([row["doc_id"] for row in rows], vectors)

        return build

    def open(self, *parts: Path, model: Path | None = None) -> DenseIndex:
        return DenseIndex(self.encoder, VectorIndex.open(*parts), model)


class DenseIndex:
    """An opened index with the encoder for its queries."""

    def __init__(self, encoder: Encoder, vectors: VectorIndex, model: Path | None = None) -> None:
        self.encoder, self.vectors = encoder, vectors
        self._find: Callable[[np.ndarray, int], list[Ranking]] = vectors.search
        self._model = load(encoder, model=model)

    def over(self, parts: Sequence[Path]) -> DenseIndex:
        """The same encoder over the vectors of other folders."""
        other = copy.copy(self)
        other.vectors = VectorIndex.open(*parts)
        other._find = other.vectors.search
        return other

    def approximately(self, method: Approximation, file: Path) -> DenseIndex:
        """The same index, searched by a structure that ``approximate.write`` wrote."""
        other = copy.copy(self)
        other._find = approximate.opened(method, self.vectors, file)
        return other

    def encoded(self, queries: Sequence[str]) -> np.ndarray:
        """The vectors of queries."""
        prompt, dtype = self.encoder.prompts()[0], self.encoder.dtype
        return encode(self._model, queries, prompt, dtype, "query")

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See ``Searcher``."""
        found: list[Ranking] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            found += self._find(self.encoded(queries[start : start + QUERIES_AT_ONCE]), k)
        return found
