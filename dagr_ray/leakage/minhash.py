"""Hashes of words, MinHash bands and set overlaps of texts, column by column, to find near-duplicates.

numpy processes millions of short texts; only texts with letters outside ASCII go through a Python loop. Hashes depend only
on the text, so they are equal on all machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core.words import folded

Longs = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Kind = TypeVar("Kind", bound=np.generic)

BLOCK = 1 << 20  # bytes or words that are hashed at once, so that their numbers stay in the cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORDLESS = np.uint64(0x5851F42D4C957F2D)
# byte -> its folded byte; 0 separates words. Bytes over 127 are parts of words that are already folded.
_FOLD = np.zeros(256, np.uint8)
for _byte in range(256):
    if _byte >= 128 or chr(_byte).isalnum() or chr(_byte) == "_":
        _FOLD[_byte] = ord(chr(_byte).lower()) if _byte < 128 else _byte


def mix_bits(values: Longs) -> Longs:
    """A permutation of the 64-bit numbers that separates similar ones (the last steps of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def constants(count: int, seed: int) -> Longs:
    """``count`` pseudo-random odd numbers, equal on all machines (splitmix64)."""
    with np.errstate(over="ignore"):
        return mix_bits((np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * _GOLDEN) | np.uint64(1)


def _sums(values: Longs, starts: Places) -> Longs:
    """Sums mod 2**64 of ``values`` from each of ``starts`` (n + 1 of them) to the next; empty ranges give 0."""
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    return total[starts[1:]] - total[starts[:-1]]


def _in_order(values: npt.NDArray[np.unsignedinteger], starts: Places, seed: int) -> Longs:
    """An order-dependent hash of each range of ``values``.

    Multilinear hashing (Lemire and Kaser, arXiv 1202.4961): two ranges collide with a probability under 2**-55. Works block
    by block, because each intermediate array takes eight times the memory of the bytes.
    """
    lengths = np.diff(starts)
    factors = constants(int(lengths.max(initial=0)), seed)
    sums = np.zeros(len(lengths), np.uint64)
    with np.errstate(over="ignore"):
        for first in range(0, len(values), BLOCK):
            last = min(first + BLOCK, len(values))
            # the ranges that begin before the block's end and end after its start
            low, high = np.searchsorted(starts[1:], first, "right"), np.searchsorted(starts[:-1], last, "left")
            edges = np.clip(starts[low : high + 1], first, last) - first
            begins = np.repeat(starts[low:high], np.diff(edges))
            place = np.arange(first, last, dtype=np.int64) - begins
            sums[low:high] += _sums((values[first:last].astype(np.uint64) + np.uint64(1)) * factors[place], edges)
        return mix_bits(sums + lengths.astype(np.uint64) * _GOLDEN)


def _bytes(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Places]:
    """The bytes of a large_string array, and the start of each row."""
    if not len(texts):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    held = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return held[starts[0] : starts[-1]], starts - starts[0]


def _one(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    return texts.cast(pa.large_string())


def hash_texts(texts: pa.Array | pa.ChunkedArray) -> Longs:
    """A hash of each text by its bytes."""
    return _in_order(*_bytes(_one(texts)), 1)


@dataclass(frozen=True)
class Words:
    """The hashed words of n texts, one text after the other; ``starts`` [n + 1] are the positions of their first words.

    ``whole`` [n] is a hash of each text's words in order. Case, spacing and punctuation do not count; a text without words is
    hashed by its bytes.
    """

    hashes: Longs
    starts: Places
    whole: Longs

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Places:
        return np.diff(self.starts)

    @property
    def rows(self) -> Places:
        """The text of each word."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.counts)

    def slice(self, first: int, last: int) -> Words:
        """The words of consecutive texts."""
        starts = self.starts[first : last + 1]
        return Words(self.hashes[starts[0] : starts[-1]], starts - starts[0], self.whole[first:last])

    def take(self, rows: Places) -> Words:
        """The words of the texts ``rows``."""
        return Words(*take_lists(self.hashes, self.starts, rows), self.whole[rows])

    def blocks(self) -> Iterator[tuple[int, Words]]:
        """Blocks of about ``BLOCK`` words with the position of their first text, to bound the memory of processing them."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.starts, self.starts[first] + BLOCK, "right")) - 1
            last = min(max(last, first + 1), len(self))
            yield first, self.slice(first, last)
            first = last

    def bags(self) -> Longs:
        """An order-independent hash of each text's words with repetitions: sums of ``weights``."""
        return _sums(self.weights, self.starts)

    def prefixes(self, backwards: bool = False) -> Callable[[Places, Places], Longs]:
        """A function that hashes the first n words of texts (rows, n), or the last n if ``backwards``."""
        values = self.hashes[::-1] if backwards else self.hashes
        starts = (len(self.hashes) - self.starts[1:]) if backwards else self.starts[:-1]
        factors = constants(int(self.counts.max(initial=0)), 9)
        lengths, at = self.counts, np.arange(len(values), dtype=np.int64)
        place = at - (np.repeat(starts[::-1], lengths[::-1]) if backwards else np.repeat(starts, lengths))
        with np.errstate(over="ignore"):
            total = np.concatenate([np.zeros(1, np.uint64), np.cumsum((values + np.uint64(1)) * factors[place])])

        def of(rows: Places, counts: Places) -> Longs:
            return total[starts[rows] + counts] - total[starts[rows]]

        return of

    @property
    def weights(self) -> Longs:
        """The summand of each word in the hash of its bag. Subtracting it removes the word."""
        return mix_bits(self.hashes ^ _GOLDEN)

    def ngrams(self, n: int) -> tuple[Longs, Places]:
        """A hash of each run of ``n`` words within a text, and the position of its first word."""
        if len(self.hashes) < n:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        runs = len(self.hashes) - n + 1
        inside = self.rows[:runs] == self.rows[n - 1 :]
        factors = constants(n, 2)
        with np.errstate(over="ignore"):
            found = np.zeros(runs, np.uint64)
            for i in range(n):
                found += (self.hashes[i : i + runs] + np.uint64(1)) * factors[i]
        at = np.flatnonzero(inside)
        return mix_bits(found[at]), at


def split_words(texts: pa.Array | pa.ChunkedArray) -> Words:
    """The words of texts.

    >>> first, second = split_words(pa.array(["Copy a dict?", "copy  a DICT"])).whole
    >>> bool(first == second)
    True
    """
    given = _one(texts)
    data, row_starts = _bytes(_folded(given))
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for first, last in _pieces(data, row_starts):
        found, at = _words(_FOLD[data[first:last]], row_starts, first)
        hashes.append(found)
        starts.append(at)
    found, at = np.concatenate(hashes), np.concatenate(starts)
    rows = np.searchsorted(at, row_starts).astype(np.int64)
    whole = _in_order(found, rows, 4)
    wordless = np.diff(rows) == 0
    if wordless.any():
        whole[wordless] = hash_texts(given.filter(pa.array(wordless))) ^ _WORDLESS
    return Words(found, rows, whole)


def _pieces(data: npt.NDArray[np.uint8], row_starts: Places) -> Iterator[tuple[int, int]]:
    """Ranges of about ``BLOCK`` bytes that split no word."""
    first = 0
    while first < len(data):
        last = first + BLOCK
        while last < len(data):
            ends = np.flatnonzero(_FOLD[data[last : last + 4096]] == 0)
            row = row_starts[np.searchsorted(row_starts, last)]
            if len(ends) or row <= last + 4096:
                last = min(last + int(ends[0]) if len(ends) else len(data), int(row))
                break
            last += 4096
        last = min(last, len(data))
        yield first, last
        first = last


def _words(low: npt.NDArray[np.uint8], row_starts: Places, offset: int) -> tuple[Longs, Places]:
    """Hashes of the words of folded bytes, and their positions; ``offset`` is the position of the first byte."""
    is_word = low != 0
    first = np.zeros(len(low) + 1, bool)
    inside = row_starts[np.searchsorted(row_starts, offset) : np.searchsorted(row_starts, offset + len(low), "right")]
    first[inside - offset] = True
    first[0] = True  # a piece begins between words
    begins = is_word & (first[:-1] | ~np.concatenate([np.zeros(1, bool), is_word[:-1]]))
    at = np.flatnonzero(begins)
    # the positions of the words' first letters in the sequence of letters without separators
    before = np.cumsum(is_word) - is_word
    word_starts = np.append(before[at], np.count_nonzero(is_word)).astype(np.int64)
    return _in_order(low[is_word], word_starts, 3), at + offset


def _folded(texts: pa.Array) -> pa.Array:
    """Non-ASCII texts as folded words separated by spaces; ASCII texts unchanged."""
    other = pc.invert(pc.string_is_ascii(texts))
    if not pc.any(other).as_py():
        return texts
    made = [" ".join(folded(text)) for text in texts.filter(other).to_pylist()]
    return pc.replace_with_mask(texts, other, pa.array(made, pa.large_string()))


@dataclass(frozen=True)
class Sets:
    """The different words of n texts as sorted 32-bit hashes, one text after the other."""

    words: npt.NDArray[np.uint32]
    starts: Places

    @classmethod
    def of(cls, found: Words) -> Sets:
        keys = (found.rows.astype(np.uint64) << np.uint64(32)) | (found.hashes >> np.uint64(32))
        keys.sort()
        keys = keys[np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])]
        starts = np.searchsorted(keys, np.arange(len(found) + 1, dtype=np.uint64) << np.uint64(32))
        return cls(keys.astype(np.uint32), starts.astype(np.int64))

    def bands(self, bands: int, rows: int) -> tuple[Longs, Places]:
        """MinHash keys [m, bands] of the m texts with words. Texts with an equal key are probably similar.

        Texts of Jaccard similarity s share a key with probability 1 - (1 - s**rows)**bands. Source: Broder 1997, On the
        resemblance and containment of documents; the bands follow Leskovec et al., Mining of Massive Datasets, 3.4.
        """
        some = np.flatnonzero(np.diff(self.starts))
        keys = np.zeros((len(some), bands), np.uint64)
        if not len(some):
            return keys, some
        values = self.words.astype(np.uint64)
        scale, shift = constants(bands * rows, 5), constants(bands * rows, 6)
        with np.errstate(over="ignore"):
            for i in range(bands * rows):
                least = np.minimum.reduceat((values * scale[i] + shift[i]) >> np.uint64(32), self.starts[some])
                keys[:, i // rows] += (least + np.uint64(1)) * scale[i]
            return mix_bits(keys + constants(bands, 7)), some


def shared(
    left: npt.NDArray[np.uint32], left_starts: Places, right: npt.NDArray[np.uint32], right_starts: Places
) -> Places:
    """The number of words that the i-th set on the left shares with the i-th set on the right."""
    lengths, others = np.diff(left_starts), np.diff(right_starts)
    pairs = np.arange(len(lengths), dtype=np.uint64) << np.uint64(32)
    keys = np.concatenate([np.repeat(pairs, lengths) | left, np.repeat(pairs, others) | right])
    keys.sort()
    both = keys[:-1][keys[1:] == keys[:-1]] >> np.uint64(32)
    return np.bincount(both.astype(np.int64), minlength=len(lengths))


def take_lists(flat: npt.NDArray[Kind], starts: Places, rows: Places) -> tuple[npt.NDArray[Kind], Places]:
    """The values of the given rows of a column of lists, one row after the other, and the start of each row."""
    lengths = starts[rows + 1] - starts[rows]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    at = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends[:-1] - starts[rows], lengths)
    return flat[at], ends


def find_repeated(keys: Longs) -> Places:
    """The positions of keys that occur more than once, and rarely of one that does not."""
    # the positions are in the low bits, because sorting numbers is several times as fast as argsort
    bits = np.uint64(len(keys).bit_length())
    at = np.sort((keys >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    same = at[1:] >> bits == at[:-1] >> bits
    some = at[np.append(same, False) | np.concatenate([np.zeros(min(len(at), 1), bool), same])] if len(at) else at
    return (some & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


class Spill:
    """(key, row) records on disk, to group equal keys among more rows than fit into memory.

    Files split the keys by their first bits. The keys must be hashes, so that the files have similar sizes.
    """

    _KIND = np.dtype([("key", "<u8"), ("row", "<u4")])

    def __init__(self, folder: Path, name: str, records: int, part_rows: int = 1 << 21) -> None:
        self.bits = min(max((records // part_rows).bit_length(), 0), 8)
        self._paths = [folder / f"{name}-{i:03}" for i in range(1 << self.bits)]
        self._files = [open(path, "wb") for path in self._paths]

    def add(self, keys: Longs, rows: npt.NDArray[np.uint32]) -> None:
        """Appends records."""
        records = np.empty(len(keys), self._KIND)
        records["key"], records["row"] = keys, rows
        if not self.bits:
            self._files[0].write(records.tobytes())
            return
        part = (keys >> np.uint64(64 - self.bits)).astype(np.uint16)
        records = records[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=1 << self.bits))
        for file, first, last in zip(self._files, np.concatenate([[0], ends[:-1]]), ends, strict=True):
            if last > first:
                file.write(records[first:last].tobytes())

    def parts(self) -> Iterator[tuple[Longs, npt.NDArray[np.uint32]]]:
        """Keys and rows, part by part; all rows of a key are in one part. Each file is deleted after it is read."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            records = np.fromfile(path, self._KIND)
            path.unlink()
            if len(records):
                yield records["key"], records["row"]
