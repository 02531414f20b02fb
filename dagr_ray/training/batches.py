"""Which examples make a batch: a plan that depends on the examples and the seed alone, not on the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dagr_ray.training.texts import Examples

# Batches whose rows are sorted by length together: enough to save padding, few enough that batches stay mixed.
SORTED_TOGETHER = 8


class Row(NamedTuple):
    """An example as numbers of texts."""

    query: int
    positive: int
    negatives: tuple[int, ...]


def rows_of(examples: Examples, numbers: Sequence[int] | np.ndarray) -> list[Row]:
    """Examples by number."""
    return [
        Row(int(examples.query[i]), int(examples.positive[i]), tuple(examples.of(i).tolist()))
        for i in map(int, numbers)
    ]


def margins(examples: Examples) -> np.ndarray:
    """How easy each example is: its positive's score less that of its best negative; NaN where one is missing, [n]."""
    best = np.full(len(examples), np.nan, np.float32)
    some = np.diff(examples.starts) > 0
    if some.any():
        best[some] = np.maximum.reduceat(examples.negative_scores, examples.starts[:-1][some])
    return examples.positive_score - best


def plan(
    examples: Examples, length: np.ndarray, size: int, epochs: int, seed: int, curriculum: bool = False
) -> list[np.ndarray]:
    """Batches of example numbers, epoch after epoch: each example once an epoch, ``size`` to a batch, one batch with the rest.

    ``length`` [passages] says how long each passage is. Rows that stand in line together are alike in length, and no batch
    has a text twice as long as a row without it is in reach. With ``curriculum`` the examples of an epoch come in order
    of falling ``margins``, mixed among neighbours only.
    """
    rng = np.random.default_rng(seed)
    longest = length[examples.positive].copy()
    if len(examples.negatives):
        some = np.diff(examples.starts) > 0
        own = np.maximum.reduceat(length[examples.negatives], examples.starts[:-1][some])
        longest[some] = np.maximum(longest[some], own)
    easy = margins(examples) if curriculum else None
    batches: list[np.ndarray] = []
    for _ in range(epochs):
        order = rng.permutation(len(examples))
        if easy is not None:
            order = order[np.argsort(-easy[order], kind="stable")]
        epoch: list[np.ndarray] = []
        for start in range(0, len(order), size * SORTED_TOGETHER):
            group = order[start : start + size * SORTED_TOGETHER]
            group = group[np.argsort(longest[group], kind="stable")]
            found = [group[batch] for batch in cut(rows_of(examples, group), size)]
            if easy is not None:
                found = [found[i] for i in rng.permutation(len(found))]
            epoch += found
        batches += epoch if easy is not None else [epoch[i] for i in rng.permutation(len(epoch))]
    return batches


def cut(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Rows, by their place, as batches of ``size``, the last of what is left.

    Each goes to the first batch with room and none of its texts, the last ones by an exchange.
    """
    room = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
    batches: list[list[int]] = [[] for _ in room]
    seen = [_Seen() for _ in room]
    first, left = 0, []
    for i, row in enumerate(rows):
        while first < len(room) and len(batches[first]) == room[first]:
            first += 1
        fits = (b for b in range(first, len(room)) if len(batches[b]) < room[b] and not seen[b].clash(row))
        b = next(fits, None)
        if b is None:
            left.append(i)
        else:
            seen[b].add(row)
            batches[b].append(i)
    for i in left:
        b = next(b for b, batch in enumerate(batches) if len(batch) < room[b])
        i = _exchange(rows, batches, i, seen[b]) if seen[b].clash(rows[i]) else i
        seen[b].add(rows[i])
        batches[b].append(i)
    return batches


def _exchange(rows: Sequence[Row], batches: list[list[int]], i: int, room: _Seen) -> int:
    """Puts row ``i`` in the place of one that fits the batch with room, and returns that; ``i`` if there is none."""
    for batch in batches:
        for place, other in enumerate(batch):
            if not room.clash(rows[other]):
                rest = _Seen()
                for kept in batch[:place] + batch[place + 1 :]:
                    rest.add(rows[kept])
                if not rest.clash(rows[i]):
                    batch[place] = i
                    return other
    return i


class _Seen:
    """The texts of a batch."""

    def __init__(self) -> None:
        self.queries: set[int] = set()
        self.positives: set[int] = set()
        self.negatives: set[int] = set()

    def clash(self, row: Row) -> bool:
        """Whether a passage that is relevant to a query would stand in the batch as another's as well."""
        known = row.query in self.queries or row.positive in self.positives or row.positive in self.negatives
        return known or not self.positives.isdisjoint(row.negatives)

    def add(self, row: Row) -> None:
        self.queries.add(row.query)
        self.positives.add(row.positive)
        self.negatives.update(row.negatives)


def repeats(examples: Examples, batches: Sequence[np.ndarray]) -> int:
    """Rows whose batch holds one of their texts already."""
    found = 0
    for batch in batches:
        seen = _Seen()
        for row in rows_of(examples, batch):
            found += seen.clash(row)
            seen.add(row)
    return found
