"""The batches of a training: a plan that depends only on the examples and the seed, not on the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dagr_ray.training.texts import Examples

# The number of batches whose rows are sorted by length together: enough to save padding, few enough to keep batches mixed.
SORTED_TOGETHER = 8


class ExampleRow(NamedTuple):
    """An example as text numbers."""

    query: int
    positive: int
    negatives: tuple[int, ...]


def rows_of(examples: Examples, numbers: Sequence[int] | np.ndarray) -> list[ExampleRow]:
    """Examples by number."""
    return [
        ExampleRow(int(examples.query[i]), int(examples.positive[i]), tuple(examples.of(i).tolist()))
        for i in map(int, numbers)
    ]


def margins(examples: Examples) -> np.ndarray:
    """The margin [n] of each example: its positive's score minus its best negative's; NaN if a score is missing."""
    best = np.full(len(examples), np.nan, np.float32)
    has_negatives = np.diff(examples.starts) > 0
    if has_negatives.any():
        best[has_negatives] = np.maximum.reduceat(examples.negative_scores, examples.starts[:-1][has_negatives])
    return examples.positive_score - best


def plan(
    examples: Examples, length: np.ndarray, size: int, epochs: int, seed: int, curriculum: bool = False
) -> list[np.ndarray]:
    """Batches of example numbers for all epochs. An epoch has each example once, ``size`` to a batch, and a smaller last one.

    ``length`` [passages] is the length of each passage. The rows of a batch have similar lengths. A batch does not repeat a
    text if another row is available. With ``curriculum``, the examples of an epoch are ordered by descending ``margins``,
    and shuffled only among neighbours.
    """
    rng = np.random.default_rng(seed)
    longest = length[examples.positive].copy()
    if len(examples.negatives):
        has_negatives = np.diff(examples.starts) > 0
        negatives = np.maximum.reduceat(length[examples.negatives], examples.starts[:-1][has_negatives])
        longest[has_negatives] = np.maximum(longest[has_negatives], negatives)
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
            of_group = [group[batch] for batch in split_rows(rows_of(examples, group), size)]
            if easy is not None:
                of_group = [of_group[i] for i in rng.permutation(len(of_group))]
            epoch += of_group
        batches += epoch if easy is not None else [epoch[i] for i in rng.permutation(len(epoch))]
    return batches


def split_rows(rows: Sequence[ExampleRow], size: int) -> list[list[int]]:
    """Splits rows, by their positions, into batches of ``size``; the last one may be smaller.

    Each row goes to the first batch that is not full and has none of its texts. Remaining rows are exchanged with others.
    """
    capacity = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
    batches: list[list[int]] = [[] for _ in capacity]
    seen = [_BatchTexts() for _ in capacity]
    first, remaining = 0, []
    for i, row in enumerate(rows):
        while first < len(capacity) and len(batches[first]) == capacity[first]:
            first += 1
        fits = (b for b in range(first, len(capacity)) if len(batches[b]) < capacity[b] and not seen[b].clash(row))
        b = next(fits, None)
        if b is None:
            remaining.append(i)
        else:
            seen[b].add(row)
            batches[b].append(i)
    for i in remaining:
        b = next(b for b, batch in enumerate(batches) if len(batch) < capacity[b])
        i = _exchange(rows, batches, i, seen[b]) if seen[b].clash(rows[i]) else i
        seen[b].add(rows[i])
        batches[b].append(i)
    return batches


def _exchange(rows: Sequence[ExampleRow], batches: list[list[int]], i: int, texts: _BatchTexts) -> int:
    """Replaces a row that fits the batch of ``texts`` by row ``i``, and returns the replaced row; ``i`` if none fits."""
    for batch in batches:
        for position, other in enumerate(batch):
            if not texts.clash(rows[other]):
                rest = _BatchTexts()
                for member in batch[:position] + batch[position + 1 :]:
                    rest.add(rows[member])
                if not rest.clash(rows[i]):
                    batch[position] = i
                    return other
    return i


class _BatchTexts:
    """The texts of a batch."""

    def __init__(self) -> None:
        self.queries: set[int] = set()
        self.positives: set[int] = set()
        self.negatives: set[int] = set()

    def clash(self, row: ExampleRow) -> bool:
        """Whether the batch already has the row's query, or a passage relevant to one query as a passage of another."""
        known = row.query in self.queries or row.positive in self.positives or row.positive in self.negatives
        return known or not self.positives.isdisjoint(row.negatives)

    def add(self, row: ExampleRow) -> None:
        self.queries.add(row.query)
        self.positives.add(row.positive)
        self.negatives.update(row.negatives)


def repeats(examples: Examples, batches: Sequence[np.ndarray]) -> int:
    """The number of rows that clash with earlier rows of their batch."""
    count = 0
    for batch in batches:
        seen = _BatchTexts()
        for row in rows_of(examples, batch):
            count += seen.clash(row)
            seen.add(row)
    return count
