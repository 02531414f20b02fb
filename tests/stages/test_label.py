"""Label: which pairs a teacher is asked, that shards and kills change nothing, and what is given up."""

import os
from collections.abc import Sequence
from typing import ClassVar

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, StageFailed, load_stage
from dagr_ray.stages.label import Label
from dagr_ray.teachers import NO_SCORE, Pair, Teacher
from dagr_ray.teachers.hybrid import Hybrid
from tests.stages.test_select_mine import FixedTables, search


class Words(Teacher):
    """Shared words, for these tests. Notes what it is asked, and can stop half-way."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "words-for-tests"
    log: str = ""
    stop_at: str = ""

    def open(self, pool: Pool) -> "Words":
        return self

    def score(self, pairs: Sequence[Pair], cost=None) -> list[float]:
        with open(self.log, "a") as log:
            log.writelines(f"{pair.query_id} {pair.doc_id}\n" for pair in pairs)
        if self.stop_at and any(self.stop_at in pair.query for pair in pairs) and not os.path.exists(self.log + ".on"):
            raise RuntimeError("stopped")
        cost["asked"] = len(pairs)
        return [
            NO_SCORE if "unreadable" in pair.passage else len(set(pair.query.split()) & set(pair.passage.split()))
            for pair in pairs
        ]

    def close(self) -> None:
        pass


class InParts(FixedTables):
    """Writes its candidates in parts of one row."""

    type: ClassVar[str] = "given-in-parts"

    def ranges(self, inputs, step):
        return [(i, i + 1) for i in range(len(self.rows["candidates"]))]

    def open(self, inputs, folder, pool):
        whole = super().open(inputs, folder, pool)(0, 0).tables["candidates"]
        return lambda start, stop: Output({"candidates": whole.slice(start, stop - start)})


DOCS = FixedTables(
    rows={"corpus": tuple((f"d{i}", "", text) for i, text in enumerate(["a b", "b c", "c d e", "unreadable", "x"]))}
)
QUERIES = FixedTables(
    rows={
        "queries": (("q0", "a b"), ("q1", "c d"), ("q2", "x"), ("q3", "a c")),
        "qrels": (("q0", "d0", 1), ("q1", "d2", 1), ("q2", "d4", 1)),
        "qrels.dev": (("q3", "d1", 1),),
    }
)
HITS = search({"q1": [("d1", 9.0), ("d2", 8.0), ("d0", 1.0)], "q0": [("d1", 3.0)], "other": [("d0", 1.0)]})


@pytest.fixture
def label(tmp_path):
    def build(shard_rows=2, **fields):
        fields = {"teacher": Words(log=str(tmp_path / "log")), "queries": QUERIES, "corpus": DOCS} | fields
        stage = Label(**fields)
        folder = materialize(stage, str(tmp_path / "runs"), Placement(light=Pool(shard_rows=shard_rows)))
        return folder, {(r["query_id"], r["doc_id"]): r["score"] for r in folder.read("scores").to_pylist()}

    return build


def test_pairs_are_judgements_and_hits_each_once(label):
    folder, scores = label(searches=(HITS,))
    expected = {("q0", "d0"): 2, ("q0", "d1"): 1, ("q1", "d2"): 2, ("q1", "d1"): 1, ("q1", "d0"): 0, ("q2", "d4"): 1}
    assert scores == expected
    assert folder.read("scores").num_rows == len(expected) == folder.manifest["counts"]["out"]
    assert folder.manifest["counts"]["queries"] == 4 and folder.manifest["cost"]["asked"] == 6
    assert set(folder.read("scores")["scorer"].to_pylist()) == {"words-for-tests"}
    assert set(label(searches=(HITS,), depth=2)[1]) == set(expected) - {("q1", "d0")}
    assert label(split="dev")[1] == {("q3", "d1"): 1}
    assert load_stage(folder).fingerprint() == folder.name[-12:]


def test_any_sharding_gives_the_same_rows(label):
    rows = [label(searches=(HITS,), shard_rows=n, seed=n)[0].read("scores").to_pylist() for n in (1, 3, 100)]
    assert rows[0] == rows[1] == rows[2]


def test_a_search_in_many_parts_and_in_no_order(label):
    rows = HITS.rows["candidates"]
    mixed = InParts(rows={"candidates": (*rows[2:], *rows[:2])})
    assert label(searches=(mixed,))[1] == label(searches=(HITS,))[1]


def test_pairs_of_examples(label):
    mined = FixedTables(rows={"examples": (("q1", "d2", ("d1", "d4")), ("q0", "d0", ("d1",)), ("q0", "d1", ()))})
    _, scores = label(examples=mined)
    assert scores == {("q1", "d2"): 2, ("q1", "d1"): 1, ("q1", "d4"): 0, ("q0", "d0"): 2, ("q0", "d1"): 1}


def test_a_pair_without_a_score_is_rejected_and_too_many_fail(label):
    many = FixedTables(
        rows={
            "queries": tuple((f"q{i}", "a") for i in range(300)),
            "qrels": (*((f"q{i}", "d0", 1) for i in range(300)), ("q7", "d3", 1)),
        }
    )
    folder, scores = label(queries=many, shard_rows=64)
    counts = folder.manifest["counts"]
    assert counts["in"] == 301 == counts["out"] + counts["rejected"]["label/no-score"] == len(scores) + 1
    assert folder.read("rejected").to_pylist() == [{"id": "q7", "by": "label", "reason": "no-score", "detail": "d3"}]
    few = FixedTables(rows={"queries": (("q0", "a"),), "qrels": (("q0", "d3", 1),)})
    with pytest.raises(StageFailed, match="1 of 1 rows failed"):
        label(queries=few)


def test_a_resume_asks_only_for_what_is_missing(label, tmp_path):
    stops = Words(log=str(tmp_path / "log"), stop_at="c d")
    queries = FixedTables(
        rows={
            "queries": tuple((f"q{i}", "c d" if i == 9 else "a b") for i in range(10)),
            "qrels": tuple((f"q{i}", "d0", 1) for i in range(10)),
        }
    )
    folder, _ = label(queries=queries, teacher=stops, shard_rows=5)
    # alone, the query at fault is given up; the others were asked again in smaller ranges
    assert folder.read("rejected")["id"].to_pylist() == ["q9"] and folder.count("scores") == 9
    (tmp_path / "log.on").touch()
    (tmp_path / "log").unlink()
    folder.revoke([1])
    folder, scores = label(queries=queries, teacher=stops, shard_rows=5)
    asked = (tmp_path / "log").read_text().split("\n")[:-1]
    assert asked == [f"q{i} d0" for i in range(5, 10)] and len(scores) == 10


def test_a_teacher_that_fuses_sees_every_search(label):
    other = search({"q1": [("d2", 0.9), ("d4", 0.1)]})
    _, scores = label(teacher=Hybrid(), searches=(HITS, other))
    assert scores["q1", "d2"] == pytest.approx(1 / 62 + 1 / 61, rel=1e-6)
    assert scores["q1", "d4"] == pytest.approx(1 / 62, rel=1e-6)
    assert scores["q2", "d4"] == 0
    mined = FixedTables(rows={"examples": (("q1", "d2", ("d0",)),)})
    _, of_examples = label(teacher=Hybrid(fusion="min-max"), searches=(HITS, other), examples=mined)
    assert of_examples == pytest.approx({("q1", "d2"): (7 / 8 + 1) / 2, ("q1", "d0"): 0.0})


def test_errors_name_the_cause(label, tmp_path):
    with pytest.raises(ValueError, match="fuses at least 1; give more searches"):
        Label(teacher=Hybrid(), queries=QUERIES, corpus=DOCS)
    with pytest.raises(ValueError, match="remove one of them"):
        Label(teacher=Words(), queries=QUERIES, corpus=DOCS, examples=QUERIES, split="dev")
    with pytest.raises(ConfigError, match="split = 'test'.*allowed: dev"):
        label(split="test")
    few = FixedTables(rows={"corpus": (("d0", "", "a"),)})
    with pytest.raises(AssertionError, match="passages of the pairs are not in"):
        label(corpus=few)


def test_no_queries_and_no_pairs(label):
    folder, scores = label(queries=FixedTables(rows={"queries": (), "qrels": ()}))
    assert scores == {} and folder.read("scores").schema.equals(tables.schema("scores"))
    folder, scores = label(queries=FixedTables(rows={"queries": (("q", "a"),), "qrels": ()}))
    assert scores == {} and folder.manifest["counts"]["queries"] == 1
