"""Exact search by a rough product: nothing that belongs to the best is missing, whatever the vectors look like."""

import numpy as np
import pytest
import torch

from dagr_ray.retrieval import exact_search
from dagr_ray.retrieval.vectors import VectorIndex, VectorWriter, best_first

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def rough(request, monkeypatch):
    """Small tiles and blocks, so that a few thousand vectors have many edges."""
    monkeypatch.setattr(exact_search, "rough_dtype", lambda device: request.param)
    monkeypatch.setattr(exact_search, "QUERIES", 8)
    monkeypatch.setattr(exact_search, "VECTORS", 64)
    monkeypatch.setattr("dagr_ray.retrieval.vectors.BLOCK_ROWS", 500)
    return request.param


def unit(rng, *shape):
    made = rng.standard_normal(shape).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def assert_exact(vectors, queries, k):
    """Every hit has its own score, and the scores are the k best that there are."""
    ids = [f"d{i}" for i in range(len(vectors))]
    truth = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for row, hits in zip(truth, VectorIndex(ids, vectors).search(queries, k), strict=True):
        assert len({doc_id for doc_id, _ in hits}) == len(hits) == min(k, len(vectors))
        scores = np.array([score for _, score in hits])
        np.testing.assert_allclose(scores, [row[int(doc_id[1:])] for doc_id, _ in hits], atol=3e-6)
        np.testing.assert_allclose(scores, np.sort(row)[::-1][: len(hits)], atol=3e-6)


@pytest.mark.parametrize("k", [1, 10, 100, 3000])
def test_the_best_of_random_vectors(rough, k):
    rng = np.random.default_rng(k)
    assert_exact(unit(rng, 1700, 48), unit(rng, 21, 48), k)


def test_vectors_that_bfloat16_cannot_tell_apart(rough):
    rng = np.random.default_rng(1)
    centre = unit(rng, 1, 64)
    vectors = centre + 1e-4 * rng.standard_normal((1500, 64)).astype(np.float32)
    assert_exact(vectors, np.concatenate([centre, centre + 1e-4 * unit(rng, 9, 64)]), 10)


def test_scores_that_are_smaller_than_what_rounding_loses(rough):
    """Vectors almost at right angles to the query: products of large numbers that cancel."""
    rng = np.random.default_rng(6)
    query, vectors = unit(rng, 1, 64), unit(rng, 1500, 64)
    vectors += (rng.uniform(0, 1e-3, (1500, 1)) - vectors @ query.T).astype(np.float32) * query
    assert_exact(vectors, query, 10)


def test_scores_below_zero_and_vectors_of_any_length(rough):
    rng = np.random.default_rng(2)
    vectors = -np.abs(rng.standard_normal((1200, 32))).astype(np.float32) * rng.uniform(0.1, 9, (1200, 1)).astype(
        np.float32
    )
    queries = np.abs(rng.standard_normal((10, 32))).astype(np.float32)
    assert_exact(vectors / 30, queries, 25)
    assert_exact(np.concatenate([vectors / 30, unit(rng, 300, 32)]), queries, 25)


def test_the_best_may_stand_anywhere(rough):
    """Rising scores: every tile holds better vectors than all before it."""
    rng = np.random.default_rng(3)
    query = unit(rng, 1, 16)
    vectors = unit(rng, 1400, 16)
    order = np.argsort((vectors @ query.T)[:, 0])
    assert_exact(vectors[order], query, 50)
    assert_exact(vectors[order[::-1]], query, 50)


@pytest.mark.parametrize("entries", [1 << 24, 64])
def test_ties_are_broken_by_descending_id_however_many(rough, monkeypatch, entries):
    monkeypatch.setattr(exact_search, "ENTRIES", entries)
    rng = np.random.default_rng(4)
    vectors = rng.integers(-2, 3, (2000, 4)).astype(np.float32) / 2
    ids = [f"d{i}" for i in rng.permutation(2000)]
    queries = rng.integers(-2, 3, (11, 4)).astype(np.float32) / 2
    found = VectorIndex(ids, vectors).search(queries, 30)
    for query, hits in zip(queries, found, strict=True):
        assert hits == best_first(zip(ids, (vectors @ query).tolist(), strict=True), 30)


def test_parts_of_an_index_are_one(tmp_path, rough):
    rng = np.random.default_rng(5)
    vectors, queries = unit(rng, 1000, 24), unit(rng, 6, 24)
    ids = [f"d{i}" for i in range(1000)]
    cuts = [0, 0, 130, 131, 700, 1000]
    folders = [tmp_path / str(i) for i in range(len(cuts) - 1)]
    for folder, start, stop in zip(folders, cuts, cuts[1:], strict=False):
        with VectorWriter(folder, 24) as writer:
            writer.add(ids[start:stop], vectors[start:stop])
    joined = VectorIndex.open(*folders)
    assert joined.search(queries, 40) == VectorIndex(ids, vectors).search(queries, 40)
    np.testing.assert_array_equal(joined.take(np.array([999, 0, 130, 129])), vectors[[999, 0, 130, 129]])
    np.testing.assert_array_equal(np.concatenate(list(joined.blocks(77))), vectors)
