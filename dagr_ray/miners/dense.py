"""Dense retrieval: the vectors of a bi-encoder, searched exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa

from dagr_ray import retriever
from dagr_ray.index import Hits, VectorIndex, VectorWriter
from dagr_ray.miners import Miner
from dagr_ray.retriever import Encoder
from dagr_ray.tables import passage_text

QUERIES_AT_ONCE = 4096
MINILM_COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


class Dense(Miner):
    """Exact cosine search over the vectors of ``encoder``; ``storage`` float16 halves the index at 3 digits' precision.

    Source: Karpukhin et al., Dense Passage Retrieval, arXiv 2004.04906, with an exact instead of an approximate index.

    >>> Dense(encoder=Encoder(model="/models/e5", query_prefix="query: ")).storage
    'float32'
    """

    abstract: ClassVar[bool] = False
    encoder: Encoder = Encoder(revision=MINILM_COMMIT)
    storage: Literal["float32", "float16"] = "float32"

    def label(self) -> str:
        return self.encoder.label()

    def build(self, corpus: Iterable[pa.Table], folder: Path, model: Path | None = None) -> None:
        """Encodes the corpus part by part into ``vectors.npy`` and ``ids.parquet``."""
        loaded = retriever.load(self.encoder, model=model)
        with VectorWriter(folder, int(loaded.get_embedding_dimension() or 0), self.storage) as writer:
            for part in corpus:
                for start in range(0, part.num_rows, retriever.WINDOW):
                    rows = part.slice(start, retriever.WINDOW).to_pylist()
                    texts = [passage_text(row["title"], row["text"]) for row in rows]
                    vectors = retriever.encode(loaded, texts, self.encoder.prompts()[1], self.encoder.dtype)
                    writer.add([row["doc_id"] for row in rows], vectors)

    def open(self, folder: Path, model: Path | None = None) -> DenseIndex:
        return DenseIndex(self.encoder, VectorIndex.open(folder), model)


class DenseIndex:
    """An opened index with the encoder for its queries."""

    def __init__(self, encoder: Encoder, vectors: VectorIndex, model: Path | None = None) -> None:
        self.encoder, self.vectors = encoder, vectors
        self._model = retriever.load(encoder, model=model)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """See ``Searcher``."""
        found: list[Hits] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            texts = queries[start : start + QUERIES_AT_ONCE]
            vectors = retriever.encode(self._model, texts, self.encoder.prompts()[0], self.encoder.dtype)
            found += self.vectors.search(vectors, k)
        return found
