"""Exact nearest neighbours by inner product: a fast rough product says what can be near, float32 says what is.

Processors that multiply bfloat16 do so at twice the rate of float32. The product of rounded vectors q' and v' is off by

    |q.v - q'.v'| <= |q - q'| |v| + |q'| |v - v'|        (Cauchy and Schwarz)

and by what the sums lose, so all that scores within twice that of the k-th best is scored again in float32: nothing that
belongs to the best can be missing. Elsewhere the rough product is float32 itself, and only the sums are doubted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import torch

# Scores equal to so many decimals count as a tie: the same vector scores differently by 1e-7 from product to product.
DECIMALS = 6
DOUBT = 2e-6
# A tile of scores stays in the processor's cache until what is high in it has been taken out.
QUERIES, VECTORS = 1024, 8192
# What a tile may remember before it is cut: a million equal vectors are no reason to run out of memory.
ENTRIES = 1 << 24

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
Names = Callable[[np.ndarray], pa.ChunkedArray]


class Nearest:
    """The ``k`` nearest of vectors that are added block by block, for each of ``queries`` [m, dimension].

    ``names`` gives the ids of rows, by which ties are broken, descending like trec_eval. Uses CUDA if there is a
    device, otherwise the threads of torch.
    """

    def __init__(self, queries: np.ndarray, k: int, names: Names) -> None:
        import torch

        self.k, self.names, self.rows = k, names, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = rough_dtype(self.device.type)
        # fewer queries at once if each keeps many
        step = max(1, min(QUERIES, ENTRIES // (4 * k)))
        whole = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(self.device)
        self.tiles = [_Tile(self, part) for part in whole.split(step)]

    def add(self, block: np.ndarray) -> None:
        """The next rows: [n, dimension] of float32."""
        import torch

        with torch.inference_mode():
            vectors = torch.from_numpy(block).to(self.device)
            parts = [_Rough(part, self.dtype) for part in vectors.split(VECTORS)]
            for tile in self.tiles:
                tile.add(vectors, parts, self.rows)
        self.rows += len(block)

    def best(self) -> Pairs:
        """Queries, rows and scores of the best: by query, then by falling score, then by falling id."""
        found, first = [], 0
        for tile in self.tiles:
            queries, rows, scores = cut(*tile.pool, self.k, self.names)
            found.append((queries + first, rows, scores))
            first += len(tile.queries)
        queries, rows, scores = (np.concatenate(columns) for columns in zip(*found, strict=True))
        return queries, rows, scores


def cut(queries: np.ndarray, rows: np.ndarray, scores: np.ndarray, k: int, names: Names) -> Pairs:
    """The ``k`` best of each query: by query, then by falling score, then by falling id of the row (``names``)."""
    order = np.argsort(_keys(queries, scores), kind="stable")
    queries, rows, scores = queries[order], rows[order], scores[order]
    same = (queries[1:] == queries[:-1]) & (scores[1:] == scores[:-1])
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        group = np.cumsum(np.append(True, ~same))[tied]
        unique, place = np.unique(rows[tied], return_inverse=True)
        rank = np.empty(len(unique), np.int64)
        rank[pc.sort_indices(names(unique)).to_numpy()] = np.arange(len(unique))
        rows[tied] = rows[tied][np.lexsort((-rank[place], group))]
    kept = _place(queries) < k
    return queries[kept], rows[kept], scores[kept]


def scored(
    queries: np.ndarray, take: Callable[[np.ndarray], np.ndarray], left: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Exact scores of the pairs (``queries[left]``, ``take(rows)``), rounded as those of ``Nearest``."""
    found = [np.empty(0, np.float32)]
    for start in range(0, len(left), VECTORS):
        some = slice(start, start + VECTORS)
        found.append(np.einsum("ij,ij->i", queries[left[some]], take(rows[some])))
    return np.round(np.concatenate(found), DECIMALS)


def rough_dtype(device: str) -> torch.dtype:
    """bfloat16 on a processor with instructions for it. A GPU sums bfloat16 in ways that no bound holds for."""
    import torch

    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device == "cpu" and has else torch.float32


class _Rough:
    """Vectors as they are multiplied, with the length of the longest and of the greatest difference to what they were."""

    def __init__(self, vectors: torch.Tensor, dtype: torch.dtype) -> None:
        self.values = vectors.to(dtype)
        self.longest = float(vectors.norm(dim=1).max())
        self.off = 0.0 if self.values is vectors else float((vectors - self.values).norm(dim=1).max())


class _Tile:
    """Some queries, and the best that they have found."""

    def __init__(self, whole: Nearest, queries: torch.Tensor) -> None:
        self.whole, self.queries = whole, queries
        self.rough = queries.to(whole.dtype)
        self.lengths = queries.norm(dim=1).cpu().numpy()
        self.off = (queries - self.rough).norm(dim=1).cpu().numpy()
        # what rounding the sum itself may take off, as a share of it
        self.ulp = 1.01 * 2.0**-8 if whole.dtype != queries.dtype else 0.0
        # the k-th best is not below this
        self.floor = np.full(len(queries), -np.inf, np.float32)
        # queries, rows and exact scores of all that may be among the best
        self.pool: Pairs = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def _error(self, part: _Rough) -> np.ndarray:
        """How far a rough score may be off, by query."""
        sums = 2.0 * self.queries.shape[1] * 2.0**-24 * self.lengths * part.longest
        return self.off * part.longest + (self.lengths + self.off) * part.off + sums + 1e-12

    def add(self, vectors: torch.Tensor, parts: list[_Rough], first: int) -> None:
        """Scores a block, whose rows are counted from ``first``."""
        import torch

        k, at, known = self.whole.k, 0, self.whole.rows > 0
        found: list[tuple[np.ndarray, ...]] = []
        for number, part in enumerate(parts, 1):
            scores = torch.mm(self.rough, part.values.T)
            error = self._error(part)
            if np.isinf(self.floor).any() and scores.shape[1] >= k:
                kth = torch.topk(scores.float(), k, dim=1).values[:, -1].cpu().numpy()
                self.floor = np.maximum(self.floor, self._lowest(kth, error))
            queries, places, values = _above(scores, self.floor - error - DOUBT)
            low = self._lowest(values, error[queries])
            high = values + np.abs(values) * self.ulp + error[queries]
            found.append((queries, places + at, low, high))
            at += len(part.values)
            many = sum(len(each[0]) for each in found)
            if many > ENTRIES:
                self._settle(vectors, found, first)
                found = []
            elif not known and number & (number - 1) == 0:
                found = [self._narrowed(found)]
        self._settle(vectors, found, first)

    def _lowest(self, scores: np.ndarray, error: np.ndarray) -> np.ndarray:
        return (scores - np.abs(scores) * self.ulp - error).astype(np.float32)

    def _narrowed(self, found: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """Raises the floor by what has been found in this block; what cannot reach it is left out."""
        queries, places, low, high = (np.concatenate(columns) for columns in zip(*found, strict=True))
        every = np.concatenate([self.pool[0], queries]), np.concatenate([self.pool[2], low])
        self._raise(*every)
        kept = high >= self.floor[queries] - DOUBT
        return queries[kept], places[kept], low[kept], high[kept]

    def _raise(self, queries: np.ndarray, scores: np.ndarray) -> None:
        kth = _kth(queries, scores, len(self.floor), self.whole.k)
        self.floor = np.maximum(self.floor, kth)

    def _settle(self, vectors: torch.Tensor, found: list[tuple[np.ndarray, ...]], first: int) -> None:
        """Scores in float32 what has been found of a block, and keeps what may be among the best."""
        if not found:
            return
        queries, places, _, _ = self._narrowed(found)
        scores = _exact(self.queries, vectors, queries, places)
        pool = tuple(np.concatenate(both) for both in zip(self.pool, (queries, places + first, scores), strict=True))
        self._raise(pool[0], pool[2])
        kept = pool[2] >= self.floor[pool[0]] - DOUBT
        self.pool = (pool[0][kept], pool[1][kept], pool[2][kept])
        if len(self.pool[0]) > ENTRIES // 4 + 2 * self.whole.k * len(self.queries):
            self.pool = cut(*self.pool, self.whole.k, self.whole.names)


def _exact(queries: torch.Tensor, vectors: torch.Tensor, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of pairs, in float32, rounded."""
    import torch

    found = [np.empty(0, np.float32)]
    for start in range(0, len(left), VECTORS):
        some = slice(start, start + VECTORS)
        q, v = (torch.from_numpy(each[some]).to(queries.device) for each in (left, right))
        found.append((queries[q] * vectors[v]).sum(dim=1).cpu().numpy())
    return np.round(np.concatenate(found), DECIMALS)


def _above(scores: torch.Tensor, least: np.ndarray) -> Pairs:
    """Queries, places and values of the scores [m, n] that are not below ``least`` [m]."""
    import torch

    limits = torch.from_numpy(least.astype(np.float32)).to(scores.dtype).to(scores.device)
    if scores.device.type != "cpu":
        queries, places = (part.cpu().numpy() for part in torch.nonzero(scores >= limits[:, None], as_tuple=True))
        return queries, places, scores[queries, places].float().cpu().numpy()
    if scores.dtype == torch.bfloat16 and bool((limits > 0).all()):
        # positive floats have the order of their bits as whole numbers, which are compared four times as fast
        high = np.greater_equal(scores.view(torch.int16).numpy(), limits.view(torch.int16).numpy()[:, None])
    else:
        high = torch.ge(scores, limits[:, None]).numpy()
    flat = np.flatnonzero(high.reshape(-1))
    queries, places = np.divmod(flat, scores.shape[1])
    return queries, places, scores.reshape(-1)[torch.from_numpy(flat)].float().numpy()


def _keys(queries: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Whole numbers that rise by query and then by falling score: one sort of numbers instead of two."""
    bits = np.ascontiguousarray(scores + np.float32(0)).view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (queries.astype(np.int64) << 32) + (0x7FFFFFFF - ordered.astype(np.int64))


def _kth(queries: np.ndarray, scores: np.ndarray, count: int, k: int) -> np.ndarray:
    """The k-th best score of each of ``count`` queries; -inf if there are fewer."""
    keys = np.sort(_keys(queries, scores))
    starts = np.searchsorted(keys, np.arange(count + 1, dtype=np.int64) << 32)
    found = np.full(count, -np.inf, np.float32)
    enough = np.flatnonzero(np.diff(starts) >= k)
    ordered = (0x7FFFFFFF - (keys[starts[enough] + k - 1] & 0xFFFFFFFF)).astype(np.int32)
    found[enough] = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)
    return found


def _place(queries: np.ndarray) -> np.ndarray:
    """The place of each entry among those of its query, from 0; ``queries`` is sorted."""
    if not len(queries):
        return queries
    starts = np.flatnonzero(np.append(True, queries[1:] != queries[:-1]))
    return np.arange(len(queries)) - np.repeat(starts, np.diff(np.append(starts, len(queries))))
