"""Aggregate: raters with unknown thresholds, simulated ones whose truth is known, and as a stage over scores."""

import doctest
import json
from itertools import pairwise

import numpy as np
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement
from dagr_ray.stages import aggregate
from dagr_ray.stages.aggregate import Aggregate, rank, worth_asking
from dagr_ray.stages.human_labels import People
from tests.annotation.test_annotate import line
from tests.stages.test_select_mine import FixedTables


def simulated(items, raters, seed, slips=0.0):
    rng = np.random.default_rng(seed)
    score, threshold = rng.uniform(size=items), rng.uniform(size=raters)
    ratings = (score[None, :] > threshold[:, None]).astype(float)
    turned = rng.uniform(size=ratings.shape) < slips
    return np.where(turned, 1 - ratings, ratings), np.argsort(-score).tolist()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(aggregate).failed == 0


@pytest.mark.parametrize("raters", [1, 10, 100])
def test_without_mistakes_the_bins_follow_the_thresholds(raters):
    ratings, truth = simulated(40, raters, raters)
    ranking = rank(ratings)
    likes = ratings.sum(axis=0)
    assert [sorted(likes[i] for i in items) for items in ranking.bins()] == [
        [value] * int((likes == value).sum()) for value in sorted(set(likes), reverse=True)
    ]
    place = {item: at for at, item in enumerate(truth, 1)}
    assert all(ranking.first[i] <= place[i] <= ranking.last[i] for i in range(40))
    order = np.argsort(-ranking.score, kind="stable")
    assert all(likes[a] >= likes[b] for a, b in pairwise(order))


def test_with_mistakes_more_raters_still_help():
    def distance(raters):
        found = []
        for seed in range(5):
            ratings, truth = simulated(40, raters, seed, slips=0.1)
            order = np.argsort(-rank(ratings).score, kind="stable").tolist()
            place = {item: at for at, item in enumerate(order)}
            found.append(sum(abs(place[item] - at) for at, item in enumerate(truth)))
        return np.mean(found)

    few, many = distance(10), distance(300)
    assert many < few / 2


def test_deviation_falls_with_more_ratings():
    ratings, _ = simulated(30, 60, 1)
    ratings[10:, :15] = np.nan
    ranking = rank(ratings)
    assert ranking.deviation[:15].mean() > 1.5 * ranking.deviation[15:].mean()
    asked = worth_asking(ratings, ranking, 50)
    assert len(asked) == 50 and all(np.isnan(ratings[rater, item]) for rater, item, _ in asked)
    gains = [gain for *_, gain in asked]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert worth_asking(np.ones((3, 4)), rank(np.ones((3, 4))), 9) == [], "all has been asked"


GRADES = {
    "a": {("q0", "d0"): 3.0, ("q0", "d1"): 2.0, ("q0", "d2"): 0.0, ("q1", "d9"): 1.0, ("q1", "d8"): 0.0},
    "b": {("q0", "d0"): 1.0, ("q0", "d1"): 1.0, ("q0", "d2"): 0.0, ("q0", "d3"): 0.0},
}


def test_scores_of_several_teachers_become_one_ranking(tmp_path):
    def given(name):
        return FixedTables(rows={"scores": tuple((q, d, name, s) for (q, d), s in GRADES[name].items())})

    folder = materialize(Aggregate(labels=(given("a"), given("b"))), str(tmp_path), Placement())
    rows = {(r["scorer"], r["query_id"], r["doc_id"]): r["score"] for r in folder.read("scores").to_pylist()}
    order = sorted("d0 d1 d2 d3".split(), key=lambda d: -rows["aggregate", "q0", d])
    assert order[:2] == ["d0", "d1"] and rows["aggregate", "q1", "d9"] > rows["aggregate", "q1", "d8"]
    assert rows["aggregate-deviation", "q0", "d3"] > rows["aggregate-deviation", "q0", "d2"]
    ask = json.loads(folder.read_bytes("ask.json"))
    assert {(each["rater"], each["query_id"], each["doc_id"]) for each in ask} >= {("a", "q0", "d3")}
    assert len({tuple(each.values())[1:] for each in ask}) == len(ask)
    assert folder.manifest["counts"] == {"in": 6, "out": 6, "queries": 2, "raters": 2, "ask": len(ask)}


def test_people_are_raters_beside_a_judge(tmp_path):
    def rated(who, grades):
        return "".join(line(q, d, int(grade), who=who) for (q, d), grade in grades.items())

    (tmp_path / "people.jsonl").write_text(rated("ann", GRADES["a"]) + rated("bob", GRADES["b"]))
    people = People(files=(str(tmp_path / "people.jsonl"),))
    judge = FixedTables(rows={"scores": tuple((q, d, "llm-judge", -s) for (q, d), s in GRADES["a"].items())})
    folder = materialize(Aggregate(labels=(people, judge)), str(tmp_path / "runs"), Placement())
    assert folder.manifest["counts"]["raters"] == 3
    rows = {r["doc_id"]: r["score"] for r in folder.read("scores").to_pylist() if r["scorer"] == "aggregate"}
    assert rows["d0"] > rows["d2"], "two people against one judge"
    asked = {each["rater"] for each in json.loads(folder.read_bytes("ask.json"))}
    assert asked & {"ann", "bob"} and asked <= {"ann", "bob", "llm-judge"}


def test_fine_scores_are_cut_into_levels(tmp_path):
    fine = FixedTables(rows={"scores": tuple(("q", f"d{i}", "t", i / 10) for i in range(100))})
    folder = materialize(Aggregate(labels=(fine, fine), levels=5), str(tmp_path))
    scores = {r["doc_id"]: r["score"] for r in folder.read("scores").to_pylist() if r["scorer"] == "aggregate"}
    assert len({round(s, 6) for s in scores.values()}) == 5 and folder.manifest["counts"]["raters"] == 2
    assert scores["d99"] > scores["d50"] > scores["d0"]
    generous = Aggregate(labels=(fine,), levels=4)
    assert generous._cuts([*range(8), *[9.0] * 12]) == [4.0], "nothing is over the highest score"
    assert generous._cuts([*range(8), *[9.0] * 95]) == [7.0] and generous._cuts([1.0, 1.0]) == []
    with pytest.raises(ValueError, match="labels are empty"):
        Aggregate(labels=())
