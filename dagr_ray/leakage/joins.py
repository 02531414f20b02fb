"""Pairs of texts that share something, without the square of the texts that share what all have.

A header, a licence or a template makes a pair of any two texts. So a key (a run of words, a band of MinHash, a word) that
more than ``COMMON`` texts have leads to the first ``FEW`` of them alone: a pair is found by any key that is rarer. The idea
is prefix filtering's (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007): rare keys find, all keys score.
Scores are exact, and what is held at once has a bound that no data move.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dagr_ray.leakage import minhash
from dagr_ray.leakage.minhash import Flags, Floats, Kind, Longs, Places, Sets, Words

COMMON = 64  # texts that may share a key
RARE = 16  # and a longer piece of a sketch or a word, which are asked where shorter pieces are common
FEW = 4  # texts of a common key that are looked at all the same
SCORED = 64  # texts that are scored for a row: those that share most with it
ENTRIES = 1 << 20  # of keys, pairs or words at once
ROWS_AT_ONCE = 2048
WIDER = (2, 4, 8)  # bands in a row that are a key where one band is common

Pairs = tuple[Places, Places]
Marks = npt.NDArray[np.uint16]


def matching(left: Longs, right: Longs, most: int | None = None) -> Pairs:
    """All pairs of places (in ``left``, in ``right``) with equal keys.

    With ``most``, of a key's pairs those with one of its first ``most`` on either side: each place keeps partners, and n
    equal ones on both sides give 2 x n x ``most`` pairs and not n x n.
    """
    order = np.argsort(right, kind="stable")
    ordered = right[order]
    first, last = np.searchsorted(ordered, left, "left"), np.searchsorted(ordered, left, "right")
    every = last if most is None else np.minimum(last, first + most)
    rows, at = _ranges(first, every)
    found = rows, order[at]
    if most is None or not (last > every).any():
        return found
    long = np.flatnonzero(last > every)
    # the first lefts of a key take the rest of its rights, too
    long = long[np.argsort(first[long], kind="stable")]
    long = long[_rank(first[long]) < most]
    rows, at = _ranges(first[long] + most, last[long])
    return np.concatenate([found[0], long[rows]]), np.concatenate([found[1], order[at]])


def count_matching(left: Longs, right: Longs) -> int:
    """How many pairs ``matching`` would give without a limit."""
    ordered = np.sort(right)
    return int((np.searchsorted(ordered, left, "right") - np.searchsorted(ordered, left, "left")).sum())


def _ranges(first: Places, last: Places) -> Pairs:
    """The whole numbers from each ``first`` to before its ``last``, and which range each is of."""
    counts = last - first
    ends = np.cumsum(counts)
    inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(np.arange(len(counts)), counts), np.repeat(first, counts) + inside


def _rank(groups: Places) -> Places:
    """The place of each entry among those of its group, from 0; ``groups`` are sorted."""
    begins = np.concatenate([np.ones(min(len(groups), 1), bool), groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]


def best(groups: Places, scores: Floats | Places, most: int) -> Flags:
    """Which entries are among the ``most`` best of their group; of equal ones the first."""
    order = np.lexsort((-scores, groups))
    kept = np.zeros(len(groups), bool)
    kept[order[_rank(groups[order]) < most]] = True
    return kept


def _most(rows: Places, shared: Places) -> Flags:
    """Which pairs are among the ``SCORED`` of their row that share most; ``rows`` are sorted."""
    kept = np.ones(len(rows), bool)
    many = np.bincount(rows) > SCORED if len(rows) else kept
    some = np.flatnonzero(many[rows])
    if len(some):
        kept[some] = best(rows[some], shared[some], SCORED)
    return kept


def distinct(numbers: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
    """Sorted, each once. Sorting is several times as fast as the table of hashes that numpy makes."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate([np.ones(min(len(numbers), 1), bool), numbers[1:] != numbers[:-1]])]


def chunks(sizes: Places, most: int = ENTRIES) -> Iterator[tuple[int, int]]:
    """Ranges of entries whose ``sizes`` are at most ``most`` in all; a larger one stands alone."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + most, "right")), first + 1)
        yield first, last
        first = last


class Postings:
    """Which of some texts have a key. One that more than ``common`` of them have leads to the first ``few`` alone."""

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
        """The key of each of ``texts``, by its place."""
        return np.repeat(np.arange(len(self.keys)), self.sizes)

    def known(self, keys: Longs, rows: Places) -> Pairs:
        """Rows and places of those of their keys that a text has, each once, row by row."""
        if not len(self.keys):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        place = np.searchsorted(self.keys, keys)
        some = np.flatnonzero(self.keys[np.minimum(place, len(self.keys) - 1)] == keys)
        rows, place = np.divmod(distinct(rows[some] * len(self.keys) + place[some]), len(self.keys))
        return rows, place

    def pairs(self, rows: Places, places: Places) -> Iterator[tuple[Places, Places, Places]]:
        """Rows and texts with a key in common, each pair once, and how many keys that are not common they share.

        ``rows`` and ``places`` are as from ``known``.
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
        """The pairs of one row, which may have any number of keys: they are counted, text by text."""
        counts, seen = np.zeros(int(self.texts.max(initial=-1)) + 1, np.int64), np.zeros(0, np.int64)
        for first, last in chunks(takes):
            mine = slice(first, last)
            which, at = _ranges(self.starts[places[mine]], self.starts[places[mine]] + takes[mine])
            counts += np.bincount(self.texts[at][rare[mine][which]], minlength=len(counts))
            seen = np.union1d(seen, self.texts[at])
        return np.full(len(seen), rows[0]), seen, counts[seen]


class Grams:
    """The runs of words of some texts, and how many of them others have, too."""

    def __init__(self, keys: Longs, texts: Places, count: int) -> None:
        self.postings = Postings(keys, texts)
        self.sizes = np.bincount(self.postings.texts, minlength=count)
        places = self.postings.places
        self._common = _lists(self.postings.texts, places, self.postings.common[places], count)

    def shared(self, keys: Longs, rows: Places, count: int) -> Iterator[tuple[Places, Places, Places]]:
        """Rows, of ``count``, and texts, and how many different runs they share.

        Of a row's texts those are looked at with which it shares most runs that are not common.
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
                    *minhash.picked(*own, left[mine]), *minhash.picked(*self._common, right[mine])
                )
            yield left, right, counts

    def only_common(self) -> int:
        """How many texts have no run but common ones."""
        return int(np.count_nonzero((self.sizes > 0) & (np.diff(self._common[1]) == self.sizes)))


def _lists(rows: Places, values: Places, some: Flags, count: int) -> tuple[npt.NDArray[np.uint32], Places]:
    """Some values by row, one row after the other, and where each of ``count`` rows starts."""
    order = np.argsort(rows[some], kind="stable")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows[some], minlength=count))])
    return values[some][order].astype(np.uint32), starts


class Alike:
    """Texts by their sets of words, and what is like them: candidates by MinHash, the Jaccard similarity exact.

    A band that is common is no key; then several bands in a row are, and words and runs of three words that few texts
    have. Longer pieces of a sketch where short ones are common: Bawa, Condie and Ganesan 2005 (LSH forest). Of a row's
    candidates those are scored that agree with it in most bands.
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
            self.rare = Postings(*_telling(words.take(again), again), RARE, 0)
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
        """Rows of ``found``, texts, and similarities from ``least`` on."""
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
                    *minhash.picked(sets.words, sets.starts, left),
                    *minhash.picked(self.sets.words, self.sets.starts, right),
                )
                scores = (shared / np.maximum(both[start:stop] - shared, 1)).astype(np.float32)
                over = scores >= least - 1e-6
                yield left[over] + first, right[over], scores[over]

    def _nearest(self, marks: Marks, rows: Places, texts: Places) -> Flags:
        """Which pairs to score, of rows with many: those that agree in most bands."""
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
                rows, places = self.rare.known(*_telling(some.take(unclear), unclear))
                found += [left << 32 | right for left, right, _ in self.rare.pairs(rows, places)]
            if not len(unclear):
                break
        both = distinct(np.concatenate([np.zeros(0, np.int64), *found]))
        return both >> 32, both & 0xFFFFFFFF, _marks(keys, at, len(some))


def _marks(keys: Longs, at: Places, count: int) -> Marks:
    """16 bits of each band of ``count`` texts, [count, bands]: enough to guess which of many are alike."""
    marks = np.zeros((count, keys.shape[1]), np.uint16)
    marks[at] = keys.astype(np.uint16)
    return marks


def wider(keys: Longs, width: int) -> Longs:
    """Keys [m, bands] of ``width`` bands in a row, from those of single ones; the last are followed by the first."""
    with np.errstate(over="ignore"):
        factors = minhash.constants(width, 8)
        return minhash.mixed(sum(np.roll(keys, -i, axis=1) * factors[i] for i in range(width)) + np.uint64(width))


def _telling(words: Words, rows: Places) -> tuple[Longs, Places]:
    """Words and runs of three, and the rows that they are of: what ``words`` are of, by its place."""
    triples, at = words.ngrams(3)
    return np.concatenate([words.hashes, triples]), rows[np.concatenate([words.rows, words.rows[at]])]
