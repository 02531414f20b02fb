"""Relabel: what a teacher finds relevant among the negatives becomes a positive or goes, and all is counted."""

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement
from dagr_ray.stages.label import Label
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.relabel import Relabel
from dagr_ray.teachers.hybrid import Hybrid
from tests.stages.test_select_mine import FixedTables, corpus, parsed, search

MINED = FixedTables(
    rows={
        "examples": (
            ("q0", "p0", ("a", "b", "c"), 9.0, (1.0, 2.0, None)),
            ("q1", "p1", ("a",), None, (None,)),
            ("q2", "p2", (), None, ()),
            ("q3", "p3", ("a", "b"), None, (None, None)),
        )
    }
)
SCORES = {
    "q0": {"p0": 2.0, "a": 1.95, "b": 1.0, "c": 0.5},
    "q1": {"p1": -1.0, "a": -1.01},
    "q2": {"p2": 1.0},
    "q3": {"p3": 4.0, "a": 0.5},  # none for b
}


def labels(scores=SCORES, scorer="t"):
    return FixedTables(rows={"scores": tuple((q, d, scorer, s) for q, own in scores.items() for d, s in own.items())})


@pytest.fixture
def relabel(tmp_path):
    def build(mined=MINED, scores=None, **fields):
        folder = materialize(Relabel(mined=mined, labels=scores or labels(), **fields), str(tmp_path), Placement())
        rows = [
            (r["query_id"], r["positive_id"], r["negative_ids"], r["positive_score"], r["negative_scores"])
            for r in folder.read("examples").to_pylist()
        ]
        return rows, folder.manifest["counts"], folder.read("rejected").to_pylist()

    return build


def approx(rows):
    return [(*row[:3], pytest.approx(row[3]), pytest.approx(row[4])) for row in rows]


def test_scores_alone(relabel):
    rows, counts, rejected = relabel()
    assert rows == approx(
        [
            ("q0", "p0", ["a", "b", "c"], 2.0, [1.95, 1.0, 0.5]),
            ("q1", "p1", ["a"], -1.0, [-1.01]),
            ("q2", "p2", [], 1.0, []),
            ("q3", "p3", ["a", "b"], 4.0, [0.5, None]),
        ]
    )
    assert (counts["in"], counts["out"], counts["relevant"], counts["unscored"]) == (4, 4, 0, 1) and not rejected


def test_a_share_of_the_positive(relabel):
    rows, counts, rejected = relabel(share=0.95)
    assert rows == approx(
        [
            ("q0", "p0", ["b", "c"], 2.0, [1.0, 0.5]),
            ("q0", "a", ["b", "c"], 1.95, [1.0, 0.5]),
            ("q2", "p2", [], 1.0, []),
            ("q3", "p3", ["a", "b"], 4.0, [0.5, None]),
        ]
    )
    # q1's negative is as good as a positive under zero, and nothing is left to learn from
    assert [(r["id"], r["reason"]) for r in rejected] == [("q1", "no-negative")] * 2
    assert counts["relevant"] == counts["added"] == counts["dropped"] == 2
    assert counts["in"] + counts["added"] == counts["out"] + counts["rejected"]["relabel/no-negative"]


def test_a_threshold(relabel):
    rows, counts, _ = relabel(threshold=1.0, relevant="drop")
    assert [(q, p, n) for q, p, n, *_ in rows] == [
        ("q0", "p0", ["c"]),
        ("q1", "p1", ["a"]),
        ("q2", "p2", []),
        ("q3", "p3", ["a", "b"]),
    ]
    assert counts["relevant"] == counts["dropped"] == 2 and counts["added"] == 0
    both, _, _ = relabel(threshold=1.0, share=0.2, relevant="drop")
    assert [q for q, *_ in both] == ["q2", "q3"], "either of the two is enough"


def test_a_whole_example_can_go(relabel):
    rows, counts, rejected = relabel(share=0.95, relevant="remove")
    assert [q for q, *_ in rows] == ["q2", "q3"]
    assert {r["reason"] for r in rejected} == {"relevant-negative"} and len(rejected) == 2
    assert counts["in"] == counts["out"] + counts["rejected"]["relabel/relevant-negative"]


def test_the_first_remaining_negatives_are_kept(relabel):
    rows, counts, _ = relabel(share=0.95, negatives=1)
    assert [n for *_, n, _, _ in rows] == [["b"], ["b"], [], ["a"]]
    assert counts["short"] == 0
    rows, counts, _ = relabel(share=0.95, negatives=3)
    assert counts["short"] == 2


def test_a_positive_in_one_row_is_a_negative_in_none(relabel):
    mined = FixedTables(rows={"examples": (("q", "p", ("x", "y", "z")), ("q", "x", ("p", "y")), ("r", "y", ("x",)))})
    scores = labels({"q": {"p": 2.0, "x": 2.0, "y": 1.99, "z": 0.0}, "r": {"y": 1.0, "x": 0.1}})
    rows, counts, rejected = relabel(mined, scores, share=0.95)
    assert [(q, p, n) for q, p, n, *_ in rows] == [("q", "p", ["z"]), ("q", "y", ["z"]), ("r", "y", ["x"])]
    assert counts["added"] == 1 and [(r["id"], r["detail"]) for r in rejected] == [("q", "x")]
    mined = FixedTables(rows={"examples": (("q", "p", ("x", "z")), ("q", "x", ("z",)))})
    rows, _, _ = relabel(mined, labels({"q": {"p": 2.0, "x": 1.0, "z": 0.0}}), share=0.95)
    assert [(p, n) for _, p, n, *_ in rows] == [("p", ["z"]), ("x", ["z"])], "whatever the teacher says of it"


def test_errors_name_the_cause(relabel):
    with pytest.raises(ValueError, match="set share or threshold"):
        Relabel(mined=MINED, labels=labels(), relevant="drop")
    two = FixedTables(rows={"scores": (("q0", "a", "one", 1.0), ("q0", "a", "two", 2.0))})
    with pytest.raises(ConfigError, match="scores of one, two; give those of one teacher"):
        relabel(scores=two)


def test_from_passages_to_relabelled_examples(tmp_path):
    """The real chain: a twin in other words that both searches put first is no negative any more."""
    docs = corpus("own text", "the same in other words", "far", "farther")
    queries = parsed(("ask", "d0"))
    first = search({"q0": [("d1", 9.0), ("d0", 8.0), ("d2", 2.0)]})
    second = search({"q0": [("d1", 0.9), ("d0", 0.8), ("d3", 0.1)]})
    mined = Mine(selected=queries, corpus=docs, searches=(first, second), negatives=3, margin=None)
    teacher = Hybrid(fusion="min-max")
    scored = Label(teacher=teacher, queries=queries, corpus=docs, searches=(first, second), examples=mined)
    folder = materialize(Relabel(mined=mined, labels=scored, share=1.0), str(tmp_path))
    rows = folder.read("examples").to_pylist()
    assert [(r["positive_id"], r["negative_ids"]) for r in rows] == [("d0", ["d2", "d3"]), ("d1", ["d2", "d3"])]
    assert rows[1]["positive_score"] == 1.0 and rows[0]["negative_scores"] == pytest.approx([0.0, 0.0])
