"""Finds texts that resemble held-out texts, which must not be trained on: the mechanisms of the leak gate.

Held-out texts (of evaluation sets) are in memory; any number of other texts is compared with them block by block, through
hashes. The cost of a block grows with its words, not with the pairs, even if all texts share a header, a licence or a
template: see ``joins``. Texts with the same words are compared once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dagr_ray.leakage import minhash
from dagr_ray.leakage.joins import Grams, SimilarSets, best, count_matching, matching
from dagr_ray.leakage.minhash import Flags, Floats, Longs, Places, Words

SAME_WORDS = ("exact", "normalised", "reordered")
MECHANISMS = (*SAME_WORDS, "edited", "rearranged", "contained", "minhash", "embedding", "paraphrase")
EDITED, REARRANGED, CONTAINED, MINHASH, EMBEDDING, PARAPHRASE = range(len(SAME_WORDS), len(MECHANISMS))
EQUAL = len(SAME_WORDS)  # mechanisms from this position on have scores with thresholds
# Lower scores are not stored. A threshold may be lowered to these values without a new comparison.
FLOORS = {"edited": 0.5, "rearranged": 0.5, "contained": 0.5, "minhash": 0.6, "embedding": 0.8, "paraphrase": 0.8}
# Two passages with at least these scores are the same.
SAME = {"contained": 0.9, "minhash": 0.9, "edited": math.inf, "rearranged": math.inf, "embedding": math.inf}
BANDS, ROWS = 20, 4  # of MinHash: sets of similarity 0.7 are compared with probability 0.995
BEST = 8  # held-out texts that are reported for a text and a mechanism
VECTORS = 1024, 4096  # texts and held-out texts that are compared at once
FLAGS = 1 << 26  # (text, held-out text) flags in memory at once: whether one passage answers both
COLUMNS = ("rows", "held_out", "how", "scores")  # of matches
MIN_WORDS = 3  # the fewest words of a text that is searched for inside others
MIN_BITS = 12.0  # and the least information of its words, because many questions contain "what is it made of"


@dataclass(frozen=True)
class Matches:
    """Pairs of rows of a batch and similar held-out rows; ``how`` is a position in ``MECHANISMS``.

    For each mechanism, a row has its ``BEST`` most similar held-out rows, and a held-out row has its most similar row. So
    every leaking row and every affected held-out row is present for any threshold. ``left_out`` [mechanisms] counts the
    other pairs.
    """

    rows: Places
    held_out: Places
    how: npt.NDArray[np.int8]
    scores: Floats
    left_out: Places = field(default_factory=lambda: np.zeros(len(MECHANISMS), np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def over(self, least: dict[str, float]) -> Matches:
        """The matches with at least the score for their mechanism."""
        limits = np.array([least.get(name, 0.0) for name in MECHANISMS], np.float32)
        return self.select(self.scores >= limits[self.how] - 1e-6)

    def select(self, flags: Flags | Places) -> Matches:
        """The matches with these flags or positions."""
        return Matches(self.rows[flags], self.held_out[flags], self.how[flags], self.scores[flags], self.left_out)

    def cut(self) -> Matches:
        """The ``BEST`` of each row and the best of each held-out row, by mechanism."""
        groups = len(MECHANISMS)
        kept = best(self.rows * groups + self.how, self.scores, BEST)
        kept |= best(self.held_out * groups + self.how, self.scores, 1)
        left_out = self.left_out + np.bincount(self.how[~kept], minlength=groups)
        return Matches(self.rows[kept], self.held_out[kept], self.how[kept], self.scores[kept], left_out)

    def drop_weaker(self) -> Matches:
        """Drops the weaker mechanisms of equal pairs, and sorts by row and held-out row."""
        order = np.lexsort((self.how, self.held_out, self.rows))
        rows, others, how = self.rows[order], self.held_out[order], self.how[order]
        pair = np.concatenate([np.ones(min(len(rows), 1), bool), (rows[1:] != rows[:-1]) | (others[1:] != others[:-1])])
        first = how[np.flatnonzero(pair)][np.cumsum(pair) - 1]
        return self.select(order).select((how == first) | (first >= EQUAL))

    @classmethod
    def concat(cls, parts: Iterable[Matches]) -> Matches:
        """The concatenation of matches."""
        empty = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.float32))
        every = [empty, *parts]
        rows, held_out, how, scores = (np.concatenate([getattr(e, name) for e in every]) for name in COLUMNS)
        return cls(rows, held_out, how, scores, np.sum([each.left_out for each in every], axis=0))

    @classmethod
    def of(cls, how: int, rows: Places, held_out: Places, scores: Floats | None = None, left_out: int = 0) -> Matches:
        """Matches of one mechanism, with scores of 1 by default."""
        counted = np.zeros(len(MECHANISMS), np.int64)
        counted[how] = left_out
        given = np.ones(len(rows), np.float32) if scores is None else scores.astype(np.float32)
        return cls(rows, held_out, np.full(len(rows), how, np.int8), given, counted)


class SharedAnswers(NamedTuple):
    """The source passages of texts, pairs (``rows``, ``made_of``), and the answers of held-out texts, pairs (``held_out``,
    ``answers``). If a text and a held-out text share a passage, that passage answers both.
    """

    rows: Places
    made_of: Places
    held_out: Places
    answers: Places

    def flags(self, first: int, last: int, count: int) -> Flags:
        """Flags [rows ``first`` to before ``last``, ``count`` held-out texts]: whether one passage answers both."""
        found = np.zeros((last - first, count), bool)
        some = np.flatnonzero((self.rows >= first) & (self.rows < last))
        order = np.argsort(self.answers, kind="stable")
        passages, held = self.answers[order], self.held_out[order]
        edges = (np.searchsorted(passages, self.made_of[some], side) for side in ("left", "right"))
        for row, start, stop in zip((self.rows[some] - first).tolist(), *(e.tolist() for e in edges), strict=True):
            found[row, held[start:stop]] = True
        return found


class WordInformation:
    """The information of a word in bits: its inverse document frequency in queries or in passages, whichever is lower.

    A word of most questions ("what") has little information even if passages lack it. Source: Spärck Jones 1972.
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
        """Bits of each word of the queries that this object was built from."""
        return self._bits[np.searchsorted(self._known, queries.hashes)]


@dataclass
class HeldOut:
    """Held-out texts with their hashes for all mechanisms. ``ngram`` is the number of words of a shared run.

    * ``exact``: the same characters; ``normalised``: the same words in the same order; ``reordered``: in any order.
    * ``edited``: one word is replaced, added or removed. The score is the remaining share of the held-out text's
      information (bits of ``telling``). If the most informative word is replaced, the question is another one; a frame that
      several held-out texts share ("what is the size of the ...") has no information. Neither counts.
    * ``rearranged``: the same, but the other words are in another order, so that the texts differ more than the score tells.
    * ``contained``: the share of the held-out text's different word n-grams that are in the other text.
    * ``minhash``: the Jaccard similarity of the sets of words; ``embedding``: the cosine of ``vectors``, unit vectors.
    * ``paraphrase``: the same cosine, if one passage is known to answer both: see ``SharedAnswers``.

    Parts that many held-out texts share (boilerplate) do not select pairs, but count in the scores. Texts with equal words
    are always found, by a hash of all words. See ``joins`` for the bounds, and ``common`` for the share of such parts.
    """

    texts: pa.Array
    ngram: int = 6
    telling: WordInformation | None = None
    vectors: Floats | None = None
    words: Words = field(init=False)

    def __post_init__(self) -> None:
        every = minhash.split_words(self.texts)
        self._bytes, self._whole = minhash.hash_texts(self.texts), every.whole
        _, first, self.same = np.unique(every.whole, return_index=True, return_inverse=True)
        # in the order of the texts; of texts with the same words, the first represents all
        firsts = np.sort(first)
        self.same = np.searchsorted(firsts, first[self.same])
        self.words = every.take(firsts)
        self._bags = self.words.bags()
        self._similar_sets = SimilarSets(self.words, BANDS, ROWS)
        bits = self.telling.of(self.words) if self.telling else np.ones(len(self.words.hashes))
        rows, total = self.words.rows, np.zeros(len(self.words))
        np.add.at(total, rows, bits)
        most = np.zeros(len(self.words))
        np.maximum.at(most, rows, bits)
        left, share = _frames(self.words, self._bags, bits, total, most)
        enough = np.flatnonzero(share >= FLOORS["edited"])
        self._frames, self._framed, self._share = left[enough], rows[enough], share[enough].astype(np.float32)
        short = (self.words.counts < MIN_WORDS) | ((total < MIN_BITS) if self.telling else False)
        self._findable = ~short
        self._grams = {n: self._ngrams(n) for n in range(MIN_WORDS, self.ngram + 1)}

    def _ngrams(self, n: int) -> Grams:
        """The n-grams of texts that are searched for by runs of n words."""
        grams, at = self.words.ngrams(n)
        rows = self.words.rows[at]
        some = self._findable[rows] & ((self.words.counts[rows] == n) | (n == self.ngram))
        return Grams(grams[some], rows[some], len(self.words))

    def common(self) -> dict[str, int]:
        """Boilerplate: ``ngrams`` of ``of`` different n-grams are common, and ``texts`` have no others."""
        common = [grams.postings.common for grams in self._grams.values()]
        return {
            "ngrams": sum(map(int, map(np.count_nonzero, common))),
            "of": sum(map(len, common)),
            "texts": sum(grams.only_common() for grams in self._grams.values()),
        }

    def find_similar(
        self, texts: pa.Array, vectors: Floats | None = None, about: SharedAnswers | None = None
    ) -> Matches:
        """The matches of texts with the held-out texts by any mechanism, with scores of at least ``FLOORS``."""
        found, raw = minhash.split_words(texts), minhash.hash_texts(texts)
        parts = [_offset(self._similar_by_words(some), first) for first, some in found.blocks()]
        equal = [self._equal(0, raw, self._bytes), self._equal(1, found.whole, self._whole)]
        made = Matches.concat([*equal, self._for_all_texts(Matches.concat(parts))])
        if vectors is not None and self.vectors is not None:
            near = self._near(vectors, about)
            other = found.bags()[near.rows] != self._bags[self.same[near.held_out]]
            made = Matches.concat([made, near.select(other | (found.counts[near.rows] == 0))])
        return made.over(FLOORS).drop_weaker().cut()

    def _equal(self, how: int, left: Longs, right: Longs) -> Matches:
        rows, others = matching(left, right, BEST)
        return Matches.of(how, rows, others, left_out=count_matching(left, right) - len(rows))

    def _similar_by_words(self, found: Words) -> Matches:
        """Matches by words between different texts. Texts with the same words in the same order are matched by hash."""
        bags, parts = found.bags(), []
        rows, others = matching(bags, self._bags, BEST)
        some = found.counts[rows] > 0
        parts.append(Matches.of(2, rows[some], others[some], left_out=count_matching(bags, self._bags) - len(rows)))
        rows, others, shares = self._edited(found, bags)
        same = _differ_at_one_position(found, rows, self.words, others)
        parts.append(Matches.of(EDITED, rows[same], others[same], shares[same]))
        parts.append(Matches.of(REARRANGED, rows[~same], others[~same], shares[~same]))
        parts += self._contained(found)
        parts += [_cut(MINHASH, *each) for each in self._similar_sets.to(found, FLOORS["minhash"])]
        made = Matches.concat(parts)
        equal = bags[made.rows] == self._bags[made.held_out]
        made = made.select(~equal | ((made.how == 2) & (found.whole[made.rows] != self.words.whole[made.held_out])))
        order = np.lexsort((-made.scores, made.how, made.held_out, made.rows))
        return _deduplicate(made, order).cut()

    def _for_all_texts(self, found: Matches) -> Matches:
        """Extends matches of representative texts to all texts with the same words."""
        found = found.select(np.argsort(-found.scores, kind="stable"))
        parts = []
        for how in np.unique(found.how).tolist():
            some = np.flatnonzero(found.how == how)
            left, right = found.held_out[some].astype(np.uint64), self.same.astype(np.uint64)
            at, others = matching(left, right, BEST)
            more = count_matching(left, right) - len(at)
            parts.append(Matches.of(how, found.rows[some][at], others, found.scores[some][at], more))
        made = Matches.concat(parts)
        return Matches(made.rows, made.held_out, made.how, made.scores, made.left_out + found.left_out)

    def quoting(self, texts: pa.Array) -> Matches:
        """Texts that contain complete held-out texts, such as a passage that contains a question."""
        blocks = minhash.split_words(texts).blocks()
        found = Matches.concat(_offset(Matches.concat(self._contained(some)).cut(), first) for first, some in blocks)
        return self._for_all_texts(found).over(FLOORS).cut()

    def quoted(self, texts: pa.Array) -> Matches:
        """Texts that are parts of a held-out text. The score is the share of their n-grams that it contains."""
        parts = []
        for first, some in minhash.split_words(texts).blocks():
            grams, at = some.ngrams(self.ngram)
            grams, own = _unique_keys(grams, some.rows[at])
            sizes = np.maximum(np.bincount(own, minlength=len(some)), 1)
            for rows, others, shared in self._grams[self.ngram].shared(grams, own, len(some)):
                parts.append(_offset(_cut(CONTAINED, rows, others, shared / sizes[rows]), first))
        return self._for_all_texts(Matches.concat(parts)).over(FLOORS).cut()

    def _edited(self, found: Words, bags: Longs) -> tuple[Places, Places, Floats]:
        """Rows, texts and shares. Each different word is removed once, however often the text has it."""
        left, rows = _unique_keys(bags[found.rows] - found.weights, found.rows)
        findable = np.flatnonzero(self._findable)
        replaced, frame = matching(left, self._frames, BEST)
        less, frame_of_less = matching(bags, self._frames, BEST)
        more, whole = matching(left, self._bags[findable], BEST)
        frame = np.concatenate([frame, frame_of_less])
        shares = np.concatenate([self._share[frame], np.ones(len(more), np.float32)])
        others = np.concatenate([self._framed[frame], findable[whole]])
        return np.concatenate([rows[replaced], less, rows[more]]), others, shares

    def _contained(self, found: Words) -> list[Matches]:
        made = []
        for n, grams in self._grams.items():
            theirs, at = found.ngrams(n)
            for rows, others, shared in grams.shared(theirs, found.rows[at], len(found)):
                made.append(_cut(CONTAINED, rows, others, shared / grams.sizes[others]))
        return made

    def _near(self, vectors: Floats, about: SharedAnswers | None) -> Matches:
        assert self.vectors is not None
        parts = []
        step = max(min(VECTORS[0], FLAGS // max(len(self.vectors), 1)), 1)
        for first in range(0, len(vectors), step):
            some = vectors[first : first + step]
            told = about.flags(first, first + len(some), len(self.vectors)) if about is not None else None
            for start in range(0, len(self.vectors), VECTORS[1]):
                alike = some @ self.vectors[start : start + VECTORS[1]].T
                near = alike >= FLOORS["embedding"]
                parts.append(_offset(_highest(EMBEDDING, alike, near), first, start))
                if told is not None:
                    near &= told[:, start : start + VECTORS[1]]
                    parts.append(_offset(_highest(PARAPHRASE, alike, near), first, start))
        return Matches.concat(parts)


def _highest(how: int, scores: Floats, flags: Flags) -> Matches:
    """The best flagged scores of a block [rows, held-out rows]."""
    kept, every = flags, int(np.count_nonzero(flags))
    if every and np.count_nonzero(flags, axis=1).max() > BEST:
        values = np.where(flags, scores, -np.inf)
        kept = np.zeros_like(flags)
        np.put_along_axis(kept, np.argpartition(values, -BEST, axis=1)[:, -BEST:], True, axis=1)
        kept[values.argmax(axis=0), np.arange(values.shape[1])] = True
        kept &= flags
    rows, others = (places.astype(np.int64) for places in np.nonzero(kept))
    return Matches.of(how, rows, others, scores[rows, others], every - len(rows))


def _offset(found: Matches, row: int, held_out: int = 0) -> Matches:
    """Matches of a block with the given first row and held-out row."""
    return Matches(found.rows + row, found.held_out + held_out, found.how, found.scores, found.left_out)


def _cut(how: int, rows: Places, others: Places, scores: npt.NDArray[np.floating]) -> Matches:
    """The best matches of one mechanism above its floor."""
    return Matches.of(how, rows, others, scores.astype(np.float32)).over(FLOORS).cut()


def _deduplicate(found: Matches, order: Places) -> Matches:
    """The first match in ``order`` of each row, held-out row and mechanism."""
    found = found.select(order)
    keys = (found.rows, found.held_out, found.how.astype(np.int64))
    return found.select(np.any([np.diff(column, prepend=-1) != 0 for column in keys], axis=0))


def _unique_keys(keys: Longs, rows: Places) -> tuple[Longs, Places]:
    """The unique keys of each row; ``rows`` are sorted."""
    order = np.lexsort((keys, rows))
    keys, rows = keys[order], rows[order]
    new = np.concatenate([np.ones(min(len(keys), 1), bool), (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])])
    return keys[new], rows[new]


def _differ_at_one_position(left: Words, rows: Places, right: Words, others: Places) -> Flags:
    """Whether two texts have the same words in the same order except for one replaced, added or removed word."""
    counts, theirs = left.counts[rows], right.counts[others]
    shared = np.zeros(len(rows), np.int64)
    if not len(rows):
        return shared > 0
    for backwards in (False, True):
        mine, held = left.prefixes(backwards), right.prefixes(backwards)
        # the longest common prefix by bisection: prefixes are equal if their hashes are
        low, high = np.zeros(len(rows), np.int64), np.minimum(counts, theirs)
        while (low < high).any():
            middle = (low + high + 1) // 2
            alike = mine(rows, middle) == held(others, middle)
            low, high = np.where(alike, middle, low), np.where(alike, high, middle - 1)
        shared += low
    same: Flags = shared >= np.maximum(counts, theirs) - 1
    return same


def _frames(
    held: Words,
    own: Longs,
    bits: npt.NDArray[np.float64],
    total: npt.NDArray[np.float64],
    most: npt.NDArray[np.float64],
) -> tuple[Longs, npt.NDArray[np.float64]]:
    """For each word, the bag of its text without the word, and the remaining share of information; 0 for a shared frame."""
    rows = held.rows
    bags = own[rows]
    left = bags - held.weights
    share = 1 - bits / np.maximum(total[rows], 1e-9)
    share[bits >= most[rows]] = 0.0
    order = np.lexsort((bags, left))
    left_in, bags_in = left[order], bags[order]
    start = np.ones(min(len(order), 1), bool)
    other = np.concatenate([start, left_in[1:] != left_in[:-1]])
    texts = np.cumsum(other | np.concatenate([start, bags_in[1:] != bags_in[:-1]]))
    frame = np.cumsum(other) - 1
    begins = np.flatnonzero(other)
    # several different texts share a frame if the last text's number exceeds the first one's
    ends = np.append(begins[1:], len(order)) - 1
    several = texts[ends] > texts[begins] if len(order) else other
    share[order[several[frame]]] = 0.0
    return left, share
