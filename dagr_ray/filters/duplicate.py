"""Queries that are written more than once: equal, nearly equal in their words, or equal in what they mean."""

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
from dagr_ray.filters import Candidate, Filter
from dagr_ray.leakage import minhash
from dagr_ray.leakage.joins import RARE, WIDER, chunks, distinct, wider
from dagr_ray.retrieval.encoder import WINDOW, Encoder, encode, load

BATCH = 1 << 14  # rows whose numbers stay in the cache of a processor
NEIGHBOURS = 8  # of the rows with one key, each is compared with so many before it, and with the first
RECORDS = 1 << 20  # rows with their keys that neighbours are taken from at once
WORDS = 1 << 22  # of pairs that are compared at once
CLUSTER = 1024  # vectors in a cluster, about
NEAR = 8192  # vectors of a larger cluster: each is compared with so many before it, and with the first ones
SAMPLE = 64  # vectors a cluster that the clusters are found by

Rows = npt.NDArray[np.uint32]
Tables = Callable[[], Iterable[pa.Table]]


class Duplicate(Filter):
    """Keeps one of equal or nearly equal queries, over all of the data set; which one is drawn by the hash of its id.

    ``by`` says what counts as equal:

    * ``normalised``: the same words in the same order, whatever their case, spacing and signs. ``exact``: the same
      characters. The score is a query's place among its equals, from 0; ``copies`` of them are kept.
    * ``minhash``: the score is the highest Jaccard similarity of its set of words to that of a query that comes before
      it. Candidates are found by MinHash (Broder 1997): two queries of similarity s are compared with odds
      1 - (1 - s**rows)**bands, 0.998 for 0.8; the similarity itself is exact. Of many with one band (boilerplate) a query is
      compared with the 8 before it and the first, and by several bands in a row and words that few have.
    * ``embedding``: the highest cosine to a query before it, by ``encoder``, among those of its two nearest clusters
      (an inverted file as in Jégou et al. 2011, searched on disk); of a cluster of more than 16,384, with the 8,192 before
      it and the first 8,192.

    No two queries that are kept are alike, as far as they were compared, and what is refused is like one that came
    before. Neither the order of the rows nor the number of shards matters. That deduplication pays is measured by Lee
    et al. 2021 (arXiv 2107.06499): duplicates weigh a text double and, with two positives, make each a false negative.

    >>> texts = ["Copy a dict?", "copy  a dict", "list"]
    >>> rows = [Candidate(f"q{i}", text, f"d{i}", "") for i, text in enumerate(texts)]
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
    version: ClassVar[int] = 4  # near copies among texts that have a template in common
    by: Literal["exact", "normalised", "minhash", "embedding"] = "normalised"
    bands: Annotated[int, Field(ge=1, le=64)] = 12
    rows: Annotated[int, Field(ge=1, le=16)] = 4
    encoder: Encoder | None = None
    copies: Annotated[int, Field(ge=1), Threshold()] = 1
    similarity: Annotated[float, Field(gt=0, le=1), Threshold()] = 0.8

    @model_validator(mode="after")
    def _encoder_as_needed(self) -> Duplicate:
        if (self.by == "embedding") != (self.encoder is not None):
            wanted = "give the encoder to compare with" if self.encoder is None else "leave encoder out"
            raise ConfigError(f"duplicate: by = {self.by!r} and encoder = {self.encoder!r}; {wanted}")
        return self

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        ids, texts = [row.query_id for row in rows], [row.text for row in rows]
        table = pa.table([pa.array(ids, tables.TEXT), pa.array(texts, tables.TEXT)], schema=tables.schema("queries"))
        return self.score_stream(lambda: [table], len(rows)).tolist()

    def score_stream(self, queries: Tables, rows: int) -> minhash.Floats:
        """See ``Filter``. Holds about 30 bytes a row, and some batches; the rest lies in the temporary folder."""
        with tempfile.TemporaryDirectory(prefix="dagr-duplicate-") as scratch:
            work = _Work(Path(scratch), rows, by_bytes=self.by == "exact", sets=self.by == "minhash")
            for part in queries():
                for start in range(0, part.num_rows, BATCH):
                    work.add(part.slice(start, BATCH))
            place = work.places()
            if self.by in ("exact", "normalised"):
                return place.astype(np.float32)
            scores = np.zeros(rows, np.float32)
            if self.by == "minhash":
                work.compare_sets(place == 0, self.bands, self.rows, scores)
            else:
                assert self.encoder is not None
                work.compare_vectors(place == 0, queries, self.encoder, scores)
            scores[place > 0] = 1.0
            return scores

    def keep(self, score: float) -> str | None:
        if self.by in ("exact", "normalised"):
            return "duplicate" if score >= self.copies else None
        return "near-duplicate" if score >= self.similarity else None


class _Work:
    """The rows of one scoring: their order of precedence in memory, what they are compared by on disk."""

    def __init__(self, folder: Path, rows: int, by_bytes: bool, sets: bool) -> None:
        self.folder, self.by_bytes, self.seen = folder, by_bytes, 0
        self.drawn = np.zeros(rows, np.uint64)
        self.wholes = minhash.Spill(folder, "whole", rows)
        self.words = open(folder / "words", "wb") if sets else None
        self.starts = np.zeros(rows + 1 if sets else 1, np.int64)

    def add(self, queries: pa.Table) -> None:
        rows = np.arange(self.seen, self.seen + queries.num_rows, dtype=np.uint32)
        self.drawn[self.seen : self.seen + len(rows)] = minhash.hashed(queries["query_id"])
        found = minhash.split_words(queries["text"])
        self.wholes.add(minhash.hashed(queries["text"]) if self.by_bytes else found.whole, rows)
        if self.words is not None:
            sets = minhash.Sets.of(found)
            self.words.write(sets.words.tobytes())
            self.starts[self.seen + 1 : self.seen + len(rows) + 1] = self.starts[self.seen] + sets.starts[1:]
        self.seen += len(rows)

    def places(self) -> npt.NDArray[np.int32]:
        """Each row's place among its equals."""
        assert self.seen == len(self.drawn), f"{self.seen} queries of {len(self.drawn)}"
        place = np.zeros(len(self.drawn), np.int32)
        for keys, rows in self.wholes.parts():
            keys, rows = self._ordered(keys, rows)
            place[rows] = np.arange(len(rows)) - _firsts(keys)
        return place

    def _ordered(self, keys: minhash.Longs, rows: Rows) -> tuple[minhash.Longs, Rows]:
        """The records whose key others have too, by key, and within a key by precedence."""
        some = minhash.repeated(keys)
        keys, rows = keys[some], rows[some]
        order = np.lexsort((self.drawn[rows], keys))
        return keys[order], rows[order]

    def compare_sets(self, fresh: minhash.Flags, bands: int, rows: int, scores: minhash.Floats) -> None:
        """Raises the scores of ``fresh`` rows to the Jaccard similarity with rows before them that share a band."""
        assert self.words is not None
        self.words.close()
        if not self.starts[-1]:
            return
        words = np.memmap(self.folder / "words", np.uint32, "r")
        unclear = fresh
        for width in (1, *WIDER):
            spill = minhash.Spill(self.folder, "band", int(unclear.sum()) * bands)
            for mine in _blocks(unclear, self.starts):
                keys, some = minhash.Sets(*minhash.picked(words, self.starts, mine)).bands(bands, rows)
                keys = keys if width == 1 else wider(keys, width)
                spill.add(keys.ravel(), np.repeat(mine[some].astype(np.uint32), bands))
            unclear = np.zeros(len(fresh), bool)
            self._compare(words, self._pairs(spill, unclear), scores)
            if not unclear.any():
                return
            if width == 1:
                self._compare(words, self._pairs(self._by_words(words, unclear), most=RARE), scores)

    def _by_words(self, words: npt.NDArray[np.uint32], unclear: minhash.Flags) -> minhash.Spill:
        """The rows by their words."""
        spill = minhash.Spill(self.folder, "word", int(np.diff(self.starts)[unclear].sum()))
        for mine in _blocks(unclear, self.starts):
            own, starts = minhash.picked(words, self.starts, mine)
            spill.add(minhash.mixed(own.astype(np.uint64)), np.repeat(mine, np.diff(starts)).astype(np.uint32))
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
                    *minhash.picked(words, self.starts, left),
                    *minhash.picked(words, self.starts, right),
                )
                alike = both / (sizes[left] + sizes[right] - both)
                np.maximum.at(scores, right, alike.astype(np.float32))

    def _pairs(
        self, spill: minhash.Spill, crowded: minhash.Flags | None = None, most: int | None = None
    ) -> Iterator[tuple[minhash.Places, minhash.Places]]:
        """Rows that share a key, each pair once in a block, the one that comes first first.

        ``crowded`` is set for rows of keys that more rows have than are compared with each; keys that more than ``most``
        rows have give no pairs.
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
                found = []
                for back in range(1, NEIGHBOURS + 1):
                    later = some[some - first[some] >= back]
                    found.append(rows[later - back].astype(np.uint64) << np.uint64(32) | rows[later])
                later = some[some - first[some] > NEIGHBOURS]
                found.append(rows[first[later]].astype(np.uint64) << np.uint64(32) | rows[later])
                pairs = distinct(np.concatenate(found))
                yield (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def compare_vectors(self, fresh: minhash.Flags, queries: Tables, encoder: Encoder, scores: minhash.Floats) -> None:
        """Raises the scores of ``fresh`` rows to the cosine with rows before them in their two nearest clusters."""
        mine = np.flatnonzero(fresh)
        if not len(mine):
            return
        vectors = self._encoded(fresh, queries, encoder)
        centres = _clusters(vectors, np.argsort(self.drawn[mine], kind="stable"))
        spill = minhash.Spill(self.folder, "near", len(mine) * 2)
        for start in range(0, len(mine), BATCH):
            nearest = _nearest(np.asarray(vectors[start : start + BATCH], np.float32), centres)
            rows = np.arange(start, start + len(nearest), dtype=np.uint32)
            spill.add(minhash.mixed(nearest.ravel().astype(np.uint64)), np.repeat(rows, nearest.shape[1]))
        drawn, self.drawn = self.drawn, self.drawn[mine]
        for keys, rows in spill.parts():
            keys, rows = self._ordered(keys, rows)
            ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)) + 1
            for first, last in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
                members = rows[first:last]
                np.maximum.at(scores, mine[members], _before(vectors, members))
        self.drawn = drawn

    def _encoded(self, fresh: minhash.Flags, queries: Tables, encoder: Encoder) -> npt.NDArray[np.float16]:
        model = load(encoder)
        shape = int(fresh.sum()), int(model.get_embedding_dimension() or 0)
        vectors = np.memmap(self.folder / "vectors", np.float16, "w+", shape=shape)
        at = done = 0
        for part in queries():
            texts = tables.texts(part["text"].filter(pa.array(fresh[at : at + part.num_rows])))
            for start in range(0, len(texts), WINDOW):
                some = texts[start : start + WINDOW]
                prompt = encoder.prompts()[0]
                vectors[done : done + len(some)] = encode(model, some, prompt, encoder.dtype, "query")
                done += len(some)
            at += part.num_rows
        return vectors


def _blocks(flags: minhash.Flags, starts: minhash.Places) -> Iterator[minhash.Places]:
    """The flagged rows, ``BATCH`` of them at once, or fewer where they have many words."""
    rows = np.flatnonzero(flags)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        for first, last in chunks(starts[some + 1] - starts[some], WORDS):
            yield some[first:last]


def _firsts(keys: minhash.Longs) -> minhash.Places:
    """For each of some sorted keys the place of the first that equals it."""
    begins = np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])
    return np.flatnonzero(begins)[np.cumsum(begins) - 1]


def _clusters(vectors: npt.NDArray[np.float16], order: minhash.Places) -> minhash.Floats:
    """Centres [k, dimension] of clusters of about ``CLUSTER`` vectors, found on the first of ``order``."""
    import faiss

    count = max(len(vectors) // CLUSTER, 1)
    sample = np.asarray(vectors[np.sort(order[: count * SAMPLE])], np.float32)
    if count == 1:
        return sample.mean(axis=0, keepdims=True)
    means = faiss.Kmeans(vectors.shape[1], count, niter=8, seed=1, spherical=True, min_points_per_centroid=1)
    means.train(sample)
    return means.centroids


def _nearest(vectors: minhash.Floats, centres: minhash.Floats) -> minhash.Places:
    """The one or two nearest centres of each vector."""
    import faiss

    _, found = faiss.knn(vectors, centres, min(2, len(centres)), metric=faiss.METRIC_INNER_PRODUCT)
    return found


def _before(vectors: npt.NDArray[np.float16], members: Rows, block: int = 2048) -> minhash.Floats:
    """For each of some rows the highest cosine to one before it in the list; 0 for the first. See ``NEAR``."""
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
