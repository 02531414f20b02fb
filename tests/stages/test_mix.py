"""Mixtures by weight nest and add up; what queries are like is measured as arithmetic says."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages import mix
from dagr_ray.stages.describe import Describe, distinct, form_of
from dagr_ray.stages.mix import MixQueries
from tests.stages.test_select_mine import FixedTables, corpus

HERE = Placement(generate=Pool(workers=0), light=Pool(workers=0))


def arm(name, n, text="query {i} of {name}"):
    ids = [f"{name}{i}" for i in range(n)]
    return FixedTables(
        rows={
            "queries": tuple((q, text.format(i=i, name=name)) for i, q in enumerate(ids)),
            "qrels": tuple((q, "d0", 1) for q in ids),
            "lineage": tuple((q, f"g{q}", "d0", name, "e", "m") for q in ids),
        }
    )


def ids(folder):
    return folder.read("queries")["query_id"].to_pylist()


def test_the_examples_hold():
    assert doctest.testmod(mix).failed == 0 and doctest.testmod(mix).attempted >= 5


def test_a_mixture_has_its_weights_and_every_row_its_strategy(tmp_path):
    arms = (arm("a", 100), arm("b", 50), arm("c", 10))
    made = {n: materialize(MixQueries(arms=arms, weights=(5, 3, 2), n=n), str(tmp_path), HERE) for n in (20, 40, 100)}
    for n, shares in (
        (20, {"a": 10, "b": 6, "c": 4}),
        (40, {"a": 20, "b": 12, "c": 8}),
        (100, {"a": 50, "b": 30, "c": 10}),
    ):
        lineage = made[n].read("lineage").to_pylist()
        assert {name: sum(row["strategy"] == name for row in lineage) for name in shares} == shares
        assert (
            sorted(row["id"] for row in lineage)
            == sorted(ids(made[n]))
            == sorted(made[n].read("qrels")["query_id"].to_pylist())
        )
    assert set(ids(made[20])) < set(ids(made[40])) < set(ids(made[100]))
    assert made[100].manifest["counts"]["short"] == 10 and made[40].manifest["counts"]["short"] == 0
    # no n: as many as the scarcest arm allows; neither: all
    assert len(ids(materialize(MixQueries(arms=arms, weights=(5, 3, 2)), str(tmp_path), HERE))) == 50
    assert len(ids(materialize(MixQueries(arms=arms), str(tmp_path), HERE))) == 160
    other = materialize(MixQueries(arms=arms, weights=(5, 3, 2), n=40, seed=1), str(tmp_path), HERE)
    assert set(ids(other)) != set(ids(made[40]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.floats(0, 1e6, allow_subnormal=False)), min_size=1, max_size=8),
    st.integers(1, 300),
)
def test_a_larger_total_takes_no_place_from_any_source(weights, total):
    assume(sum(weights) > 1e-9)
    smaller, larger = (mix.apportion(weights, n) for n in (total, total + 1))
    assert (sum(smaller), sum(larger)) == (total, total + 1)
    assert all(few <= more for few, more in zip(smaller, larger, strict=True))
    # by weight: within one place of the exact share, but for what ties of many small sources move
    exact = [total * weight / sum(weights) for weight in weights]
    assert all(places >= math.floor(share - len(weights) / 2) for places, share in zip(smaller, exact, strict=True))


@pytest.mark.parametrize("weights", [(6, 6, 2), (0.5, 0.3, 0.2), (1, 1, 1, 1)])
def test_a_mixture_holds_every_smaller_one(tmp_path, weights):
    arms = tuple(arm(f"arm{i}", 40) for i in range(len(weights)))
    before: set[str] = set()
    for n in range(9, 14):
        now = set(ids(materialize(MixQueries(arms=arms, weights=weights, n=n), str(tmp_path), HERE)))
        assert len(now) == n and before < now
        before = now


def test_weights_that_do_not_fit_are_refused():
    for fields in (
        {"arms": ()},
        {"arms": (arm("a", 1),), "weights": (1.0, 2.0)},
        {"arms": (arm("a", 1),), "weights": (0.0,)},
    ):
        with pytest.raises(ValueError, match="mix-queries: "):
            MixQueries(**fields)
    assert issubclass(ConfigError, ValueError)


def test_forms_and_distinct_words():
    said = ("wie geht das?", "Is it open on Mondays", "lake baikal depth", "it leaks after a week of use")
    assert [form_of(text) for text in said] == ["question", "question", "keywords", "statement"]
    assert distinct([], 2) == distinct(["one"], 2) == 0.0 and distinct(["a b", "a b", "a b", "a c"], 2) == 0.5


def test_a_description_is_what_arithmetic_says(tmp_path):
    passages = corpus("the old stone bridge", "a small boat")
    said = ("where is the old bridge", "stone bridge", "boat boat boat")
    queries = FixedTables(
        rows={
            "queries": tuple((f"q{i}", text) for i, text in enumerate(said)),
            "qrels": (("q0", "d0", 1), ("q1", "d0", 1), ("q2", "d1", 1)),
            "qrels.dev": (("q1", "d0", 1),),
            "lineage": (),
        }
    )
    stage = Describe(queries=queries, corpus=passages, human=queries, encoder=Encoder(model=str(minilm())))
    found = {
        row["measure"]: row["value"] for row in materialize(stage, str(tmp_path), HERE).read("metrics").to_pylist()
    }
    assert found["words"] == 10 / 3 and found["overlap"] == pytest.approx((3 / 5 + 1 + 1) / 3)
    assert found["distinct@1"] == 7 / 10 and found["distinct@2"] == 6 / 7
    assert (found["form:question"], found["form:keywords"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found["form:distance"] == pytest.approx(1 / 3)
    from dagr_ray.retrieval.encoder import encode, load

    vectors = encode(load(stage.encoder), list(said)).astype(float)
    cosines = [vectors[i] @ vectors[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["spread"] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
