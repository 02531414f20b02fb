"""Teachers: what every one must be, and what each gives for pairs whose order is known."""

import doctest
import importlib
import json
import math
import pickle
import re

import pytest

from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError, from_json, plugins
from dagr_ray.teachers import Hit, Pair, Spread, Teacher, by_query
from dagr_ray.teachers.hybrid import Hybrid

TEACHERS = {name: kind for name, kind in plugins(Teacher).items() if kind.__module__.startswith("dagr_ray.")}


@pytest.mark.parametrize("kind", TEACHERS.values(), ids=TEACHERS)
def test_contract(kind):
    made = kind()
    assert from_json(json.loads(json.dumps(made.to_json())), Teacher) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert re.search(r"arXiv \d{4}\.\d{4,5}", kind.__doc__), "the docstring says where the teacher comes from"
    runner = doctest.DocTestRunner()
    test = doctest.DocTestFinder().find(kind, globs=vars(importlib.import_module(kind.__module__)).copy())[0]
    assert test.examples, "the docstring has an example"
    assert not runner.run(test).failed


def test_the_folder_is_scanned():
    assert "hybrid" in TEACHERS


# -- hybrid ---------------------------------------------------------------------------------------------------------


def fused(hits, spreads=(), **fields):
    pairs = [Pair("q", "ask", f"d{i}", "text", own, tuple(spreads)) for i, own in enumerate(hits)]
    return Hybrid(**fields).open(Pool()).score(pairs)


def test_reciprocal_ranks():
    both, first, second, none = (Hit(1, 9.0), Hit(3, 0.2)), (Hit(2, 8.0), None), (None, Hit(1, 0.9)), (None, None)
    scores = fused([both, first, second, none])
    assert scores == pytest.approx([1 / 61 + 1 / 63, 1 / 62, 1 / 61, 0.0])
    assert fused([both, second], k=1) == pytest.approx([1 / 2 + 1 / 4, 1 / 2])
    weighted = fused([both, first, second], weights=(0, 2))
    assert weighted == pytest.approx([2 / 63, 0.0, 2 / 61])


def test_scores_are_scaled_by_all_hits_of_the_query():
    spreads = (Spread(5.0, 2.0, 2.0, 10.0), Spread(0.5, 0.1, 0.3, 0.7))
    hits = [(Hit(1, 10.0), Hit(9, 0.3)), (Hit(4, 6.0), Hit(2, 0.6)), (None, Hit(1, 0.7))]
    assert fused(hits, spreads, fusion="min-max") == pytest.approx([0.5, (0.5 + 0.75) / 2, 0.5])
    assert fused(hits, spreads, fusion="z-score") == pytest.approx([(2.5 - 2) / 2, (0.5 + 1) / 2, (-1.5 + 2) / 2])
    assert fused(hits, spreads, fusion="min-max", weights=(1, 0)) == pytest.approx([1.0, 0.5, 0.0])


def test_a_search_without_hits_or_with_one():
    one = (Spread(3.0, 0.0, 3.0, 3.0), None)
    assert fused([(Hit(1, 3.0), None), (None, None)], one, fusion="min-max") == pytest.approx([0.5, 0.0])
    assert fused([(Hit(1, 3.0), None)], one, fusion="z-score") == [0.0]
    assert not any(math.isnan(s) for s in fused([(None, None)], (None, None), fusion="min-max"))


def test_weights_for_another_number_of_searches_are_named():
    with pytest.raises(ConfigError, match="2 searches; give one for each"):
        fused([(Hit(1, 1.0), None)], weights=(1, 2, 3))


def test_pairs_of_a_query_are_taken_together():
    pairs = [Pair(q, "", d, "") for q, d in ("aa", "ab", "ba")]
    assert [[p.doc_id for p in own] for own in by_query(pairs)] == [["a", "b"], ["a"]]
    assert list(by_query([])) == []
