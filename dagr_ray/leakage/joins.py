"""Pairs of texts that share a key, without quadratic cost for keys that all texts share.

A header, a licence or a template would pair any two texts. A key (a run of words, a band of MinHash, a word) of more than
``COMMON`` texts therefore leads only to the first ``FEW`` of them; other pairs are found by rarer keys. This is the idea of
prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007): rare keys select pairs, all keys score
them. Scores are exact, and memory has a bound that does not depend on the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dagr_ray.leakage import minhash
from dagr_ray.leakage.minhash import Flags, Floats, Kind, Longs, Places, Sets, Words

COMMON = 64  # a key of more texts is common
RARE = 16  # the same limit for longer keys, which are used if the shorter keys are common
FEW = 4  # texts of a common key that are still compared
SCORED = 64  # texts that are scored for a row: those with the most shared keys
ENTRIES = 1 << 20  # keys, pairs or words in memory at once
ROWS_AT_ONCE = 2048
WIDER = (2, 4, 8)  # numbers of consecutive bands that form a key if a single band is common

Pairs = tuple[Places, Places]
Marks = npt.NDArray[np.uint16]


def matching(left: Longs, right: Longs, most: int | None = None) -> Pairs:
    """All pairs of positions (in ``left``, in ``right``) with equal keys.

    With ``most``, only a key's pairs with one of its first ``most`` positions on either side: each position keeps partners,
    and n equal keys on both sides give 2 x n x ``most`` pairs instead of n x n.
    """
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    first, last = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    every = last if most is None else np.minimum(last, first + most)
    rows, at = _ranges(first, every)
    pairs = rows, order[at]
    if most is None or not (last > every).any():
        return pairs
    long = np.flatnonzero(last > every)
    # the first left positions of a key also get the remaining right ones
    long = long[np.argsort(first[long], kind="stable")]
    long = long[_rank(first[long]) < most]
    rows, at = _ranges(first[long] + most, last[long])
    return np.concatenate([pairs[0], long[rows]]), np.concatenate([pairs[1], order[at]])


def count_matching(left: Longs, right: Longs) -> int:
    """The number of pairs of ``matching`` without a limit."""
    ordered = np.sort(right)
    return int((np.searchsorted(ordered, left, "right") - np.searchsorted(ordered, left, "left")).sum())


def _ranges(first: Places, last: Places) -> Pairs:
    """The range number and value of every integer from each ``first`` to before its ``last``."""
    counts = last - first
    ends = np.cumsum(counts)
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(np.arange(len(counts)), counts), np.repeat(first, counts) + inside


def _rank(groups: Places) -> Places:
    """The position of each entry in its group, from 0; ``groups`` are sorted."""
    begins = np.concatenate([np.ones(min(len(groups), 1), bool), groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]


def best(groups: Places, scores: Floats | Places, most: int) -> Flags:
    """Flags of the ``most`` best entries of each group; ties are broken by order."""
    order = np.lexsort((-scores, groups))
    kept = np.zeros(len(groups), bool)
    kept[order[_rank(groups[order]) < most]] = True
    return kept


def _most(rows: Places, shared: Places) -> Flags:
    """Flags of the ``SCORED`` pairs of each row that share most; ``rows`` are sorted."""
    kept = np.ones(len(rows), bool)
    many = np.bincount(rows) > SCORED if len(rows) else kept
    some = np.flatnonzero(many[rows])
    if len(some):
        kept[some] = best(rows[some], shared[some], SCORED)
    return kept


def distinct(numbers: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
    """Sorted unique numbers. Sorting is several times as fast as numpy's hash table."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate([np.ones(min(len(numbers), 1), bool), numbers[1:] != numbers[:-1]])]


def chunks(sizes: Places, most: int = ENTRIES) -> Iterator[tuple[int, int]]:
    """Ranges of entries with total ``sizes`` of at most ``most``; a larger entry is a range by itself."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + most, "right")), first + 1)
        yield first, last
        first = last


class Postings:
    """The texts of each key. A key of more than ``common`` texts leads only to the first ``few``."""

    def __init__(self, keys: Longs, texts: Places, common: int = COMMON, few: int = FEW) -> None:
        order = np.lexsort((texts, keys))
        keys, texts = keys[order], texts[order]
        same = keys[1:] == keys[:-1]
        start = np.ones(min(len(keys), 1), bool)
        new = np.concatenate([start, ~same | (texts[1:] != texts[:-1])])
        keys, self.texts = keys[new], texts[new]
        begins = np.concatenate([start, keys[1:] != keys[:-1]])
        self.keys, self.starts = keys[begins], np.append(np.flatnonzero(begins), len(keys))
        self.sizes, self.few = np.diff(self.starts), few
        self.common: Flags = self.sizes > common

    @property
    def places(self) -> Places:
        """For each entry of ``texts``, the position of its key."""
        return np.repeat(np.arange(len(self.keys)), self.sizes)

    def known(self, keys: Longs, rows: Places) -> Pairs:
        """Rows and the positions of their known keys, each once, row by row."""
        if not len(self.keys):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.searchsorted(self.keys, keys)
        some = np.flatnonzero(self.keys[np.minimum(place, len(self.keys) - 1)] == keys)
        rows, place = np.divmod(distinct(rows[some] * len(self.keys) + place[some]), len(self.keys))
        return rows, place

    def pairs(self, rows: Places, places: Places) -> Iterator[tuple[Places, Places, Places]]:
        """Rows and texts that share a key, each pair once, and the number of rare keys that they share.

        ``rows`` and ``places`` are the result of ``known``.
        """
        rare = ~self.common[places]
        takes = np.where(rare, self.sizes[places], self.few)
        begins = np.flatnonzero(np.concatenate([np.ones(min(len(rows), 1), bool), rows[1:] != rows[:-1]]))
        edges = np.append(begins, len(rows))
        for first, last in chunks(np.add.reduceat(takes, begins) if len(begins) else begins):
            mine = slice(edges[first], edges[last])
            if last == first + 1:
                yield self._of_one(rows[mine], places[mine], rare[mine], takes[mine])
                continue
            which, at = _ranges(self.starts[places[mine]], self.starts[places[mine]] + takes[mine])
            entries = np.sort((rows[mine][which] << 33) | (self.texts[at] << 1) | ~rare[mine][which])
            pair = entries >> 1
            new = np.flatnonzero(np.concatenate([np.ones(min(len(pair), 1), bool), pair[1:] != pair[:-1]]))
            if len(new):
                counts = np.add.reduceat(1 - (entries & 1), new)
                yield pair[new] >> 32, pair[new] & 0xFFFFFFFF, counts

    def _of_one(self, rows: Places, places: Places, rare: Flags, takes: Places) -> tuple[Places, Places, Places]:
        """The pairs of one row, which may have any number of keys, counted text by text."""
        counts, seen = np.zeros(int(self.texts.max(initial=-1)) + 1, np.int64), np.zeros(0, np.int64)
        for first, last in chunks(takes):
            mine = slice(first, last)
            which, at = _ranges(self.starts[places[mine]], self.starts[places[mine]] + takes[mine])
            counts += np.bincount(self.texts[at][rare[mine][which]], minlength=len(counts))
            seen = np.union1d(seen, self.texts[at])
        return np.full(len(seen), rows[0]), seen, counts[seen]


class Grams:
    """The runs of words of texts, and the numbers of runs that they share with others."""

    def __init__(self, keys: Longs, texts: Places, count: int) -> None:
        self.postings = Postings(keys, texts)
        self.sizes = np.bincount(self.postings.texts, minlength=count)
        places = self.postings.places
        self._common = _lists(self.postings.texts, places, self.postings.common[places], count)

    def shared(self, keys: Longs, rows: Places, count: int) -> Iterator[tuple[Places, Places, Places]]:
        """Rows (of ``count``) and texts, with the number of different runs that they share.

        For each row, only the texts that share the most rare runs are scored.
        """
        rows, places = self.postings.known(keys, rows)
        own = _lists(rows, places, self.postings.common[places], count)
        for left, right, counts in self.postings.pairs(rows, places):
            most = _most(left, counts)
            left, right, counts = left[most], right[most], counts[most]
            sizes = np.diff(own[1])[left] + np.diff(self._common[1])[right]
            for first, last in chunks(sizes, 4 * ENTRIES):
                mine = slice(first, last)
                counts[mine] += minhash.shared(
                    *minhash.take_lists(*own, left[mine]), *minhash.take_lists(*self._common, right[mine])
                )
            yield left, right, counts

    def only_common(self) -> int:
        """The number of texts with only common runs."""
        return int(np.count_nonzero((self.sizes > 0) & (np.diff(self._common[1]) == self.sizes)))


def _lists(rows: Places, values: Places, some: Flags, count: int) -> tuple[npt.NDArray[np.uint32], Places]:
    """The flagged values grouped by row, and the start of each of ``count`` rows."""
    order = np.argsort(rows[some], kind="stable")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows[some], minlength=count))])
    return values[some][order].astype(np.uint32), starts


class SimilarSets:
    """Finds similar sets of words: candidates by MinHash, then the exact Jaccard similarity.

    A common band is not used as a key. Instead, several consecutive bands are, and rare words and runs of three words.
    Longer keys in place of common short ones: Bawa, Condie and Ganesan 2005 (LSH forest). Of a row's candidates, those that
    agree with it in most bands are scored.
    """

    def __init__(self, words: Words, bands: int, rows: int) -> None:
        self.bands, self.rows = bands, rows
        self.sets = Sets.of(words)
        keys, some = self.sets.bands(bands, rows)
        self.marks = _marks(keys, some, len(words))
        self.levels = [Postings(keys.ravel(), np.repeat(some, bands))]
        self.rare: Postings | None = None
        again = self._unclear(self.levels[0], len(words))
        if len(again):
            self.rare = Postings(*_words_and_triples(words.take(again), again), RARE, 0)
        for width in WIDER:
            if not len(again):
                break
            mine = np.isin(some, again)
            level = Postings(wider(keys[mine], width).ravel(), np.repeat(some[mine], bands), RARE)
            self.levels.append(level)
            again = self._unclear(level, len(words))

    @staticmethod
    def _unclear(level: Postings, count: int) -> Places:
        """The texts with a common key."""
        return np.flatnonzero(np.bincount(level.texts[level.common[level.places]], minlength=count))

    def to(self, found: Words, least: float) -> Iterator[tuple[Places, Places, Floats]]:
        """Rows of ``found`` and texts with a similarity of at least ``least``, with the similarity."""
        sizes = np.diff(self.sets.starts)
        for first in range(0, len(found), ROWS_AT_ONCE):
            some = found.slice(first, min(first + ROWS_AT_ONCE, len(found)))
            sets = Sets.of(some)
            rows, texts, marks = self._candidates(some, sets)
            mine, theirs = np.diff(sets.starts)[rows], sizes[texts]
            close = np.minimum(mine, theirs) >= least * np.maximum(mine, theirs) - 1e-6
            rows, texts, both = rows[close], texts[close], (mine + theirs)[close]
            most = self._nearest(marks, rows, texts)
            rows, texts, both = rows[most], texts[most], both[most]
            for start, stop in chunks(both, 4 * ENTRIES):
                left, right = rows[start:stop], texts[start:stop]
                shared = minhash.shared(
                    *minhash.take_lists(sets.words, sets.starts, left),
                    *minhash.take_lists(self.sets.words, self.sets.starts, right),
                )
                scores = (shared / np.maximum(both[start:stop] - shared, 1)).astype(np.float32)
                over = scores >= least - 1e-6
                yield left[over] + first, right[over], scores[over]

    def _nearest(self, marks: Marks, rows: Places, texts: Places) -> Flags:
        """Flags of the pairs to score: for rows with many candidates, those that agree in most bands."""
        many = np.flatnonzero((np.bincount(rows) > SCORED)[rows]) if len(rows) else rows
        agree = np.zeros(len(rows), np.int64)
        for first in range(0, len(many), ENTRIES // 4):
            mine = many[first : first + ENTRIES // 4]
            agree[mine] = np.count_nonzero(marks[rows[mine]] == self.marks[texts[mine]], axis=1)
        return _most(rows, agree)

    def _candidates(self, some: Words, sets: Sets) -> tuple[Places, Places, Marks]:
        keys, at = sets.bands(self.bands, self.rows)
        found, width = [], 1
        unclear = at
        for level, width in zip(self.levels, (1, *WIDER), strict=False):
            mine = np.isin(at, unclear)
            asked = keys[mine] if width == 1 else wider(keys[mine], width)
            rows, places = level.known(asked.ravel(), np.repeat(at[mine], self.bands))
            found += [left << 32 | right for left, right, _ in level.pairs(rows, places)]
            unclear = np.unique(rows[level.common[places]])
            if width == 1 and self.rare is not None and len(unclear):
                rows, places = self.rare.known(*_words_and_triples(some.take(unclear), unclear))
                found += [left << 32 | right for left, right, _ in self.rare.pairs(rows, places)]
            if not len(unclear):
                break
        both = distinct(np.concatenate([np.zeros(0, np.int64), *found]))
        return both >> 32, both & 0xFFFFFFFF, _marks(keys, at, len(some))


def _marks(keys: Longs, at: Places, count: int) -> Marks:
    """16 bits of each band of ``count`` texts, [count, bands]: enough to estimate which of many are similar."""
    marks = np.zeros((count, keys.shape[1]), np.uint16)
    marks[at] = keys.astype(np.uint16)
    return marks


def wider(keys: Longs, width: int) -> Longs:
    """Keys [m, bands] of ``width`` consecutive bands, from the keys of single bands, in a circle."""
    with np.errstate(over="ignore"):
        factors = minhash.constants(width, 8)
        return minhash.mix_bits(sum(np.roll(keys, -i, axis=1) * factors[i] for i in range(width)) + np.uint64(width))


def _words_and_triples(words: Words, rows: Places) -> tuple[Longs, Places]:
    """The words and runs of three words of texts, and their rows (``rows`` maps each text to its row)."""
    triples, at = words.ngrams(3)
    return np.concatenate([words.hashes, triples]), rows[np.concatenate([words.rows, words.rows[at]])]
