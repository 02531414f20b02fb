"""Duplicate queries: equal, nearly equal in their words, or equal in meaning."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, Threshold
from dagr_ray.filters import Filter, ScoredQuery
from dagr_ray.leakage import minhash
from dagr_ray.leakage.joins import RARE, WIDER, chunks, distinct, wider
from dagr_ray.retrieval.encoder import WINDOW, Encoder, encode, load

BATCH = 1 << 14  # rows whose keys fit into a processor's cache
NEIGHBOURS = 8  # rows with the same key before a row that it is compared with, besides the first
RECORDS = 1 << 20  # (key, row) records that pairs are formed from at once
WORDS = 1 << 22  # words of the pairs that are compared at once
CLUSTER = 1024  # vectors per cluster, on average
NEAR = 8192  # in a large cluster, vectors before a vector that it is compared with, and first vectors of the cluster
SAMPLE = 64  # vectors per cluster that the centres are trained on

Rows = npt.NDArray[np.uint32]
Tables = Callable[[], Iterable[pa.Table]]


class Duplicate(Filter):
    """Keeps one of equal or nearly equal queries of the whole data set, in the order of the hash of their ids.

    ``by`` is the criterion:

    * ``normalised``: the same words in the same order; case, spacing and punctuation do not matter. ``exact``: the same
      characters. The score is a query's position among its duplicates, from 0; ``copies`` of them are kept.
    * ``minhash``: the score is the highest Jaccard similarity of the query's word set to the word set of an earlier
      query. MinHash (Broder 1997) selects the pairs to compare: two queries of similarity s are compared with probability
      1 - (1 - s**rows)**bands, 0.998 for s = 0.8; the similarity itself is exact. If many queries share a band
      (boilerplate), a query is compared with the 8 before it and the first, and by several consecutive bands and by rare
      words.
    * ``embedding``: the highest cosine to an earlier query, by ``encoder``, among the queries in its two nearest clusters
      (an inverted file as in Jégou et al. 2011, searched on disk). In a cluster of more than 16,384 queries, a query is
      compared with the 8,192 before it and with the first 8,192.

    Among the compared pairs, no two kept queries are duplicates, and every rejected query duplicates an earlier one.
    Neither the order of the rows nor the number of shards matters. Lee et al. 2021 (arXiv 2107.06499) measure the benefit
    of deduplication: duplicates count a text twice and, with two positives, make each a false negative of the other.

    >>> texts = ["Copy a dict?", "copy  a dict", "list"]
    >>> rows = [ScoredQuery(f"q{i}", text, f"d{i}", "") for i, text in enumerate(texts)]
    >>> scores = Duplicate().score(rows, None)
    >>> sorted(scores[:2]), scores[2], Duplicate(by="exact").score(rows, None)
    ([0.0, 1.0], 0.0, [0.0, 0.0, 0.0])
    >>> Duplicate().keep(0.0), Duplicate().keep(1.0), Duplicate(copies=2).keep(1.0)
    (None, 'duplicate', None)
    >>> near = Duplicate(by="minhash", similarity=0.8)
    >>> near.keep(0.7), near.keep(0.9)
    (None, 'near-duplicate')
    """

    abstract: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    needs_passage: ClassVar[bool] = False
    version: ClassVar[int] = 4  # finds near duplicates among texts that share a template
    by: Literal["exact", "normalised", "minhash", "embedding"] = "normalised"
    bands: Annotated[int, Field(ge=1, le=64)] = 12
    rows: Annotated[int, Field(ge=1, le=16)] = 4
    encoder: Encoder | None = None
    copies: Annotated[int, Field(ge=1), Threshold()] = 1
    similarity: Annotated[float, Field(gt=0, le=1), Threshold()] = 0.8

    @model_validator(mode="after")
    def _encoder_as_needed(self) -> Duplicate:
        if (self.by == "embedding") != (self.encoder is not None):
            remedy = "give an encoder to compare with" if self.encoder is None else "remove encoder"
            raise ConfigError(f"duplicate: by = {self.by!r} and encoder = {self.encoder!r}; {remedy}")
        return self

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        ids, texts = [row.query_id for row in rows], [row.text for row in rows]
        table = pa.table([pa.array(ids, tables.TEXT), pa.array(texts, tables.TEXT)], schema=tables.schema("queries"))
        return self.score_stream(lambda: [table], len(rows)).tolist()

    def score_stream(self, queries: Tables, rows: int) -> minhash.Floats:
        """See ``Filter``. Takes about 30 bytes of memory a row and some batches; the rest is in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="dagr-duplicate-") as scratch:
            work = _Work(Path(scratch), rows, by_bytes=self.by == "exact", sets=self.by == "minhash")
            for part in queries():
                for start in range(0, part.num_rows, BATCH):
                    work.add(part.slice(start, BATCH))
            position = work.positions()
            if self.by in ("exact", "normalised"):
                return position.astype(np.float32)
            scores = np.zeros(rows, np.float32)
            if self.by == "minhash":
                work.compare_sets(position == 0, self.bands, self.rows, scores)
            else:
                assert self.encoder is not None
                work.compare_vectors(position == 0, queries, self.encoder, scores)
            scores[position > 0] = 1.0
            return scores

    def keep(self, score: float) -> str | None:
        if self.by in ("exact", "normalised"):
            return "duplicate" if score >= self.copies else None
        return "near-duplicate" if score >= self.similarity else None


class _Work:
    """The rows of one scoring: their order of precedence in memory, their words or vectors on disk."""

    def __init__(self, folder: Path, rows: int, by_bytes: bool, sets: bool) -> None:
        self.folder, self.by_bytes, self.seen = folder, by_bytes, 0
        self.precedence = np.zeros(rows, np.uint64)  # hash of the id: lower comes earlier
        self.wholes = minhash.Spill(folder, "whole", rows)
        self.words = open(folder / "words", "wb") if sets else None
        self.starts = np.zeros(rows + 1 if sets else 1, np.int64)

    def add(self, queries: pa.Table) -> None:
        rows = np.arange(self.seen, self.seen + queries.num_rows, dtype=np.uint32)
        self.precedence[self.seen : self.seen + len(rows)] = minhash.hash_texts(queries["query_id"])
        texts = minhash.split_words(queries["text"])
        self.wholes.add(minhash.hash_texts(queries["text"]) if self.by_bytes else texts.whole, rows)
        if self.words is not None:
            sets = minhash.Sets.of(texts)
            self.words.write(sets.words.tobytes())
            self.starts[self.seen + 1 : self.seen + len(rows) + 1] = self.starts[self.seen] + sets.starts[1:]
        self.seen += len(rows)

    def positions(self) -> npt.NDArray[np.int32]:
        """Each row's position among its duplicates."""
        assert self.seen == len(self.precedence), f"{self.seen} queries of {len(self.precedence)}"
        position = np.zeros(len(self.precedence), np.int32)
        for keys, rows in self.wholes.parts():
            keys, rows = self._ordered(keys, rows)
            position[rows] = np.arange(len(rows)) - _firsts(keys)
        return position

    def _ordered(self, keys: minhash.Longs, rows: Rows) -> tuple[minhash.Longs, Rows]:
        """The records that share a key with others, by key, then by precedence."""
        shared = minhash.find_repeated(keys)
        keys, rows = keys[shared], rows[shared]
        order = np.lexsort((self.precedence[rows], keys))
        return keys[order], rows[order]

    def compare_sets(self, fresh: minhash.Flags, bands: int, rows: int, scores: minhash.Floats) -> None:
        """Raises the scores of ``fresh`` rows to their Jaccard similarity to earlier rows that share a band."""
        assert self.words is not None
        self.words.close()
        if not self.starts[-1]:
            return
        words = np.memmap(self.folder / "words", np.uint32, "r")
        unclear = fresh
        for width in (1, *WIDER):
            spill = minhash.Spill(self.folder, "band", int(unclear.sum()) * bands)
            for mine in _blocks(unclear, self.starts):
                keys, some = minhash.Sets(*minhash.take_lists(words, self.starts, mine)).bands(bands, rows)
                keys = keys if width == 1 else wider(keys, width)
                spill.add(keys.ravel(), np.repeat(mine[some].astype(np.uint32), bands))
            unclear = np.zeros(len(fresh), bool)
            self._compare(words, self._pairs(spill, unclear), scores)
            if not unclear.any():
                return
            if width == 1:
                self._compare(words, self._pairs(self._by_words(words, unclear), most=RARE), scores)

    def _by_words(self, words: npt.NDArray[np.uint32], unclear: minhash.Flags) -> minhash.Spill:
        """Records of (word, row) for the unclear rows."""
        spill = minhash.Spill(self.folder, "word", int(np.diff(self.starts)[unclear].sum()))
        for mine in _blocks(unclear, self.starts):
            own, starts = minhash.take_lists(words, self.starts, mine)
            spill.add(minhash.mix_bits(own.astype(np.uint64)), np.repeat(mine, np.diff(starts)).astype(np.uint32))
        return spill

    def _compare(
        self,
        words: npt.NDArray[np.uint32],
        pairs: Iterable[tuple[minhash.Places, minhash.Places]],
        scores: minhash.Floats,
    ) -> None:
        sizes = np.diff(self.starts)
        for before, after in pairs:
            for start, stop in chunks(sizes[before] + sizes[after], WORDS):
                left, right = before[start:stop], after[start:stop]
                both = minhash.shared(
                    *minhash.take_lists(words, self.starts, left),
                    *minhash.take_lists(words, self.starts, right),
                )
                alike = both / (sizes[left] + sizes[right] - both)
                np.maximum.at(scores, right, alike.astype(np.float32))

    def _pairs(
        self, spill: minhash.Spill, crowded: minhash.Flags | None = None, most: int | None = None
    ) -> Iterator[tuple[minhash.Places, minhash.Places]]:
        """Pairs (earlier, later) of rows that share a key, each pair once in a block.

        Sets ``crowded`` for rows whose key is too frequent to compare all of its rows. Keys of more than ``most`` rows
        give no pairs.
        """
        for keys, rows in spill.parts():
            keys, rows = self._ordered(keys, rows)
            first = _firsts(keys)
            sizes = np.bincount(first, minlength=len(rows))[first]
            if crowded is not None:
                crowded[rows[sizes > NEIGHBOURS + 1]] = True
            at = np.arange(len(rows)) if most is None else np.flatnonzero(sizes <= most)
            for start in range(0, len(at), RECORDS):
                some = at[start : start + RECORDS]
                blocks = []
                for back in range(1, NEIGHBOURS + 1):
                    later = some[some - first[some] >= back]
                    blocks.append(rows[later - back].astype(np.uint64) << np.uint64(32) | rows[later])
                later = some[some - first[some] > NEIGHBOURS]
                blocks.append(rows[first[later]].astype(np.uint64) << np.uint64(32) | rows[later])
                pairs = distinct(np.concatenate(blocks))
                yield (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def compare_vectors(self, fresh: minhash.Flags, queries: Tables, encoder: Encoder, scores: minhash.Floats) -> None:
        """Raises the scores of ``fresh`` rows to their highest cosine to earlier rows in their two nearest clusters."""
        mine = np.flatnonzero(fresh)
        if not len(mine):
            return
        vectors = self._encode(fresh, queries, encoder)
        centres = _cluster_centres(vectors, np.argsort(self.precedence[mine], kind="stable"))
        spill = minhash.Spill(self.folder, "near", len(mine) * 2)
        for start in range(0, len(mine), BATCH):
            nearest = _nearest(np.asarray(vectors[start : start + BATCH], np.float32), centres)
            rows = np.arange(start, start + len(nearest), dtype=np.uint32)
            spill.add(minhash.mix_bits(nearest.ravel().astype(np.uint64)), np.repeat(rows, nearest.shape[1]))
        precedence, self.precedence = self.precedence, self.precedence[mine]
        for keys, rows in spill.parts():
            keys, rows = self._ordered(keys, rows)
            ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)) + 1
            for first, last in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
                members = rows[first:last]
                np.maximum.at(scores, mine[members], _highest_cosines(vectors, members))
        self.precedence = precedence

    def _encode(self, fresh: minhash.Flags, queries: Tables, encoder: Encoder) -> npt.NDArray[np.float16]:
        model = load(encoder)
        shape = int(fresh.sum()), int(model.get_embedding_dimension() or 0)
        vectors = np.memmap(self.folder / "vectors", np.float16, "w+", shape=shape)
        at = encoded = 0
        for part in queries():
            texts = tables.texts(part["text"].filter(pa.array(fresh[at : at + part.num_rows])))
            for start in range(0, len(texts), WINDOW):
                window = texts[start : start + WINDOW]
                prompt = encoder.prompts()[0]
                vectors[encoded : encoded + len(window)] = encode(model, window, prompt, encoder.dtype, "query")
                encoded += len(window)
            at += part.num_rows
        return vectors


def _blocks(flags: minhash.Flags, starts: minhash.Places) -> Iterator[minhash.Places]:
    """The flagged rows, ``BATCH`` at once, or fewer if they have many words."""
    rows = np.flatnonzero(flags)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        for first, last in chunks(starts[some + 1] - starts[some], WORDS):
            yield some[first:last]


def _firsts(keys: minhash.Longs) -> minhash.Places:
    """For each sorted key, the position of the first equal key."""
    begins = np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])
    return np.flatnonzero(begins)[np.cumsum(begins) - 1]


def _cluster_centres(vectors: npt.NDArray[np.float16], order: minhash.Places) -> minhash.Floats:
    """Centres [k, dimension] of clusters of about ``CLUSTER`` vectors, trained on the first rows of ``order``."""
    import faiss

    count = max(len(vectors) // CLUSTER, 1)
    sample = np.asarray(vectors[np.sort(order[: count * SAMPLE])], np.float32)
    if count == 1:
        return sample.mean(axis=0, keepdims=True)
    means = faiss.Kmeans(vectors.shape[1], count, niter=8, seed=1, spherical=True, min_points_per_centroid=1)
    means.train(sample)
    return means.centroids


def _nearest(vectors: minhash.Floats, centres: minhash.Floats) -> minhash.Places:
    """The two nearest centres of each vector, or the only one."""
    import faiss

    _, nearest = faiss.knn(vectors, centres, min(2, len(centres)), metric=faiss.METRIC_INNER_PRODUCT)
    return nearest


def _highest_cosines(vectors: npt.NDArray[np.float16], members: Rows, block: int = 2048) -> minhash.Floats:
    """For each member the highest cosine to an earlier member; 0 for the first. See ``NEAR``."""
    best = np.zeros(len(members), np.float32)
    small = len(members) <= 2 * NEAR
    held = np.asarray(vectors[members], np.float32) if small else None

    def block_of(first: int) -> minhash.Floats:
        last = first + block
        return held[first:last] if held is not None else np.asarray(vectors[members[first:last]], np.float32)

    for start in range(0, len(members), block):
        some = block_of(start)
        for other in range(0, start + len(some), block):
            if not small and NEAR <= other < start - NEAR:
                continue
            alike = some @ block_of(other).T
            if other == start:
                alike[np.triu_indices(len(some))] = 0.0
            best[start : start + len(some)] = np.maximum(best[start : start + len(some)], alike.max(axis=1))
    return best
