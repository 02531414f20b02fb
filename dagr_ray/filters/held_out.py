"""Texts that must not be trained on, and what resembles them: the mechanisms of the leak gate, without any stage.

Held-out texts are few (those of evaluation sets) and stand in memory; any number of others is compared with them batch
by batch, through hashes, so that a batch costs what its words cost and not what the pairs would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dagr_ray.filters import sketch
from dagr_ray.filters.sketch import Floats, Longs, Places, Sets, Words

SAME_WORDS = ("exact", "normalised", "reordered")
MECHANISMS = (*SAME_WORDS, "edited", "rearranged", "contained", "minhash", "embedding", "paraphrase")
EDITED, REARRANGED, CONTAINED, MINHASH, EMBEDDING, PARAPHRASE = range(len(SAME_WORDS), len(MECHANISMS))
EQUAL = len(SAME_WORDS)  # from this place on a mechanism has a score that a threshold is for
# Scores below are not stored: what a threshold may be lowered to without comparing anew.
FLOORS = {"edited": 0.5, "rearranged": 0.5, "contained": 0.5, "minhash": 0.6, "embedding": 0.8, "paraphrase": 0.8}
# From these scores on two passages are one.
SAME = {"contained": 0.9, "minhash": 0.9, "edited": math.inf, "rearranged": math.inf, "embedding": math.inf}
BANDS, ROWS = 20, 4  # of MinHash: sets of similarity 0.7 are compared with odds of 0.995
MIN_WORDS = 3  # of a text that is looked for inside others
MIN_BITS = 12.0  # and what its words have to tell: "what is it made of" stands in many questions


@dataclass(frozen=True)
class Matches:
    """Rows of a batch beside the held-out rows that they resemble: ``how`` is a place in ``MECHANISMS``."""

    rows: Places
    held_out: Places
    how: npt.NDArray[np.int8]
    scores: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def over(self, least: dict[str, float]) -> Matches:
        """Those with at least a score for their mechanism."""
        limits = np.array([least.get(name, 0.0) for name in MECHANISMS], np.float32)
        return self._those(self.scores >= limits[self.how] - 1e-6)

    def about(self, rows: Places, held_out: Places) -> Matches:
        """With ``paraphrase`` for what ``embedding`` found of these pairs: questions that one and the same passage answers."""
        named = np.isin(self.rows << 32 | self.held_out, rows << 32 | held_out)
        again = self._those(named & (self.how == EMBEDDING))
        more = Matches(again.rows, again.held_out, np.full(len(again), PARAPHRASE, np.int8), again.scores)
        return Matches(
            *(
                np.concatenate([getattr(self, name), getattr(more, name)])
                for name in ("rows", "held_out", "how", "scores")
            )
        )

    def _those(self, flags: sketch.Flags) -> Matches:
        return Matches(self.rows[flags], self.held_out[flags], self.how[flags], self.scores[flags])

    @classmethod
    def joined(cls, parts: Iterable[tuple[int, Places, Places, Floats]]) -> Matches:
        """The best score of each pair and mechanism, without what says less of pairs that are equal."""
        found = [(np.full(len(rows), how, np.int8), rows, others, scores) for how, rows, others, scores in parts]
        if not found:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.float32))
        how, rows, others, scores = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((-scores, how, others, rows))
        how, rows, others, scores = how[order], rows[order], others[order], scores[order]
        pair = np.concatenate([np.ones(min(len(rows), 1), bool), (rows[1:] != rows[:-1]) | (others[1:] != others[:-1])])
        best = how[np.flatnonzero(pair)][np.cumsum(pair) - 1]
        first = pair | np.concatenate([np.zeros(min(len(how), 1), bool), how[1:] != how[:-1]])
        kept = first & ((how == best) | (best >= EQUAL))
        return cls(rows, others, how, scores)._those(kept)


def matching(left: Longs, right: Longs) -> tuple[Places, Places]:
    """All pairs of places (in ``left``, in ``right``) with equal keys."""
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    first, last = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    some = np.flatnonzero(last > first)
    counts = (last - first)[some]
    ends = np.cumsum(counts)
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(some, counts), order[np.repeat(first[some], counts) + inside]


class Telling:
    """How much a word tells, in bits: the inverse document frequency among queries or among passages, the lower one.

    A word that is in most questions ("what") tells little even where passages lack it. Source: Spärck Jones 1972.
    """

    def __init__(self, queries: Words, passages: Iterable[Words]) -> None:
        self._known = np.unique(queries.hashes)
        self._bits = self._rarity([queries])
        passages = list(passages)
        if passages:
            self._bits = np.minimum(self._bits, self._rarity(passages))

    def _rarity(self, texts: list[Words]) -> npt.NDArray[np.float64]:
        counts, total = np.zeros(len(self._known), np.int64), sum(map(len, texts))
        for each in texts:
            at, place = matching(each.hashes, self._known)
            pairs = np.unique(each.rows[at] * max(len(self._known), 1) + place)
            counts += np.bincount(pairs % max(len(self._known), 1), minlength=len(self._known))
        return np.maximum(np.log2((total + 1) / (counts + 0.5)), 0.0)

    def of(self, queries: Words) -> npt.NDArray[np.float64]:
        """Bits of each word of the queries that this was made from."""
        return self._bits[np.searchsorted(self._known, queries.hashes)]


@dataclass
class HeldOut:
    """Held-out texts in the forms that others are compared with. ``ngram`` is the run of words that counts as shared.

    * ``exact``: the same characters; ``normalised``: the same words in the same order; ``reordered``: in any order.
    * ``edited``: one word replaced, added or left out. The score is the share of what the held-out text tells (bits of
      ``telling``) that is still there. Where the word that tells most was replaced the question is another one, and a
      frame that several held-out texts share ("what is the size of the ...") says nothing: neither counts.
    * ``rearranged``: the same, but the other words are in another order, so that more has changed than the score says.
    * ``contained``: the share of the held-out text's word n-grams that stand in the other one.
    * ``minhash``: the Jaccard similarity of the sets of words; ``embedding``: the cosine of ``vectors``, unit vectors.
    * ``paraphrase``: the same cosine, where it is known that one passage answers both: see ``Matches.about``.
    """

    texts: pa.Array
    ngram: int = 6
    telling: Telling | None = None
    vectors: Floats | None = None
    words: Words = field(init=False)

    def __post_init__(self) -> None:
        self.words = sketch.split(self.texts)
        self._sets = Sets.of(self.words)
        self._keys = self._sets.bands(BANDS, ROWS)
        bits = self.telling.of(self.words) if self.telling else np.ones(len(self.words.hashes))
        rows, total = self.words.rows, np.zeros(len(self.words))
        np.add.at(total, rows, bits)
        most = np.zeros(len(self.words))
        np.maximum.at(most, rows, bits)
        self._left, self._share = _frames(self.words, bits, total, most)
        short = (self.words.counts < MIN_WORDS) | ((total < MIN_BITS) if self.telling else False)
        self._findable = ~short
        self._grams = {n: self._ngrams(n) for n in range(MIN_WORDS, self.ngram + 1)}

    def _ngrams(self, n: int) -> tuple[Longs, Places]:
        """The n-grams of findable texts that are looked for by runs of n words, and the text that each is of."""
        grams, at = self.words.ngrams(n)
        rows = self.words.rows[at]
        some = self._findable[rows] & ((self.words.counts[rows] == n) | (n == self.ngram))
        return grams[some], rows[some]

    def resembling(self, texts: pa.Array, vectors: Floats | None = None) -> Matches:
        """What resembles the held-out texts by any mechanism, with scores from ``FLOORS`` on."""
        found = sketch.split(texts)
        bags, own = found.bags(), self.words.bags()
        parts = [
            (0, *matching(sketch.hashed(texts), sketch.hashed(self.texts))),
            (1, *matching(found.whole, self.words.whole)),
            (2, *_both(matching(bags, own), found.counts > 0)),
        ]
        scored = [(how, rows, others, np.ones(len(rows), np.float32)) for how, rows, others in parts]
        for rows, others, shares in self._edited(found, bags, own):
            same = _but_one_place(found, rows, self.words, others)
            scored += [(EDITED, rows[same], others[same], shares[same])]
            scored += [(REARRANGED, rows[~same], others[~same], shares[~same])]
        scored += [(CONTAINED, *self._contained(found)), (MINHASH, *self._alike(found))]
        if vectors is not None and self.vectors is not None:
            scored.append((EMBEDDING, *self._near(vectors)))
        return Matches.joined(scored).over(FLOORS)

    def quoting(self, texts: pa.Array) -> Matches:
        """Texts with whole held-out texts inside, such as a passage that holds a question."""
        return Matches.joined([(CONTAINED, *self._contained(sketch.split(texts)))]).over(FLOORS)

    def quoted(self, texts: pa.Array) -> Matches:
        """Texts that are taken out of a held-out one: the score is the share of their n-grams that stand there."""
        found = sketch.split(texts)
        grams, at = found.ngrams(self.ngram)
        mine, held_at = self.words.ngrams(self.ngram)
        where, other = matching(grams, mine)
        sizes = np.maximum(found.counts - self.ngram + 1, 1)
        return Matches.joined(
            [(CONTAINED, *_shares(found.rows[at][where], self.words.rows[held_at][other], where, sizes))]
        ).over(FLOORS)

    def _edited(self, found: Words, bags: Longs, own: Longs) -> Iterable[tuple[Places, Places, Floats]]:
        rows = found.rows
        left = bags[rows] - found.weights
        enough = np.flatnonzero(self._share >= FLOORS["edited"])
        frames, of = self._left[enough], self.words.rows[enough]
        where, place = matching(left, frames)
        yield rows[where], of[place], self._share[enough[place]].astype(np.float32)
        row, place = matching(bags, frames)
        yield row, of[place], self._share[enough[place]].astype(np.float32)
        findable = np.flatnonzero(self._findable)
        where, place = matching(left, own[findable])
        yield rows[where], findable[place], np.ones(len(where), np.float32)

    def _contained(self, found: Words) -> tuple[Places, Places, Floats]:
        sizes = np.maximum(self.words.counts - self.ngram + 1, 1)
        rows, others, scores = [], [], []
        for n, (grams, of) in self._grams.items():
            theirs, at = found.ngrams(n)
            where, place = matching(theirs, grams)
            row, other, share = _shares(of[place], found.rows[at][where], place, sizes)
            rows.append(other)
            others.append(row)
            scores.append(share)
        return np.concatenate(rows), np.concatenate(others), np.concatenate(scores)

    def _alike(self, found: Words) -> tuple[Places, Places, Floats]:
        sets = Sets.of(found)
        keys, some = sets.bands(BANDS, ROWS)
        held, mine = self._keys
        pairs = []
        for band in range(BANDS):
            left, right = matching(keys[:, band], held[:, band])
            pairs.append(some[left] << 32 | mine[right])
        both = np.unique(np.concatenate(pairs))
        rows, others = both >> 32, both & 0xFFFFFFFF
        shared = sketch.shared(
            *sketch.picked(sets.words, sets.starts, rows),
            *sketch.picked(self._sets.words, self._sets.starts, others),
        )
        union = np.diff(sets.starts)[rows] + np.diff(self._sets.starts)[others] - shared
        return rows, others, (shared / np.maximum(union, 1)).astype(np.float32)

    def _near(self, vectors: Floats) -> tuple[Places, Places, Floats]:
        assert self.vectors is not None
        rows, others, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for start in range(0, len(vectors), 1024):
            alike = vectors[start : start + 1024] @ self.vectors.T
            row, other = np.nonzero(alike >= FLOORS["embedding"])
            rows.append(row + start)
            others.append(other)
            scores.append(alike[row, other])
        return np.concatenate(rows), np.concatenate(others), np.concatenate(scores)


def _both(pairs: tuple[Places, Places], some: sketch.Flags) -> tuple[Places, Places]:
    kept = some[pairs[0]]
    return pairs[0][kept], pairs[1][kept]


def _but_one_place(left: Words, rows: Places, right: Words, others: Places) -> sketch.Flags:
    """Whether two texts have the same words in the same order but at one place: one replaced, added or left out there."""
    counts, theirs = left.counts[rows], right.counts[others]
    shorter = np.minimum(counts, theirs)
    shared = np.zeros(len(rows), np.int64)
    firsts, lasts = (left.starts[rows], right.starts[others]), (left.starts[rows + 1] - 1, right.starts[others + 1] - 1)
    for (mine, held), step in ((firsts, 1), (lasts, -1)):
        going, place = np.flatnonzero(shorter > 0), 0
        while len(going):
            alike = left.hashes[mine[going] + step * place] == right.hashes[held[going] + step * place]
            shared[going] += alike
            place += 1
            going = going[alike & (shorter[going] > place)]
    same: sketch.Flags = shared >= np.maximum(counts, theirs) - 1
    return same


def _frames(
    held: Words, bits: npt.NDArray[np.float64], total: npt.NDArray[np.float64], most: npt.NDArray[np.float64]
) -> tuple[Longs, npt.NDArray[np.float64]]:
    """For each word the bag of its text without it, and the share of what the text tells that is left; 0 for a mere frame."""
    rows, bags = held.rows, held.bags()
    left = bags[rows] - held.weights
    share = 1 - bits / np.maximum(total[rows], 1e-9)
    share[bits >= most[rows]] = 0.0
    _, distinct = np.unique(np.stack([left, bags[rows]], axis=1), axis=0, return_index=True)
    frames, counts = np.unique(left[distinct], return_counts=True)
    share[np.isin(left, frames[counts > 1])] = 0.0
    return left, share


def _shares(rows: Places, others: Places, grams: Places, sizes: Places) -> tuple[Places, Places, Floats]:
    """The share of a row's n-grams, ``sizes`` of them, that another has; ``grams`` are the places of the row's own."""
    if not len(rows):
        return rows, others, np.zeros(0, np.float32)
    distinct = np.unique(np.stack([rows, others, grams], axis=1), axis=0)
    pairs, counts = np.unique(distinct[:, :2], axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], (counts / sizes[pairs[:, 0]]).astype(np.float32)
