"""What people said wins wherever judgements and scores are read."""

from typing import ClassVar

import pytest

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Output
from dagr_ray.engines.crop import CropEngine
from dagr_ray.filters.length import Length
from dagr_ray.filters.teacher import Teacher
from dagr_ray.recipes.augmentation import augment
from dagr_ray.stages.human_labels import AGREEMENT, People, WithHumanLabels, cut
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.relabel import Relabel
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.annotation.test_annotate import line
from tests.conftest import tiny_beir
from tests.stages.test_select_mine import FixedTables, corpus, examples, parsed, search


@pytest.fixture
def build(tmp_path):
    return lambda stage: materialize(stage, str(tmp_path / "made"))


@pytest.fixture
def by_people(tmp_path):
    """Their ratings: ``q0_d1=3`` is a grade for query q0 and passage d1."""

    def said(**grades):
        file = tmp_path / "people.jsonl"
        file.write_text("".join(line(*pair.split("_"), grade) for pair, grade in grades.items()))
        return People(files=(str(file),))

    return said


SOURCE = parsed(("copy a folder", "d0"), ("sort", "d1"), ("read a file", "d2"))
DOCS = corpus("about copies", "about lists", "about files", "about locks")
HITS = search({q: [(f"d{i}", 9.0 - i) for i in range(4)] for q in ("q0", "q1", "q2")})


@pytest.mark.cluster
def test_human_labels_override_the_filters_of_a_recipe(build, tmp_path):
    docs = Beir(path=str(tiny_beir(tmp_path / "set")))
    files = tmp_path / "people.jsonl"

    def ends(people=None):
        selected, mined = augment(
            docs, docs, Crop(), CropEngine(), exemplars=None, samples=1, max_rank=20, people=people,
            extra_filters=(Length(min_words=8),),
        )  # fmt: skip
        return selected, set(build(mined).read("examples")["query_id"].to_pylist())

    selected, before = ends()
    parsed = build(selected.parsed)
    passage_of = dict(zip(*(parsed.read("qrels")[name].to_pylist() for name in ("query_id", "doc_id")), strict=True))
    text_of = dict(zip(*(parsed.read("queries")[name].to_pylist() for name in ("query_id", "text")), strict=True))
    refused = sorted(q for q in set(passage_of) - before if "first seen" in text_of[q])
    assert refused and before
    taken = sorted(before)[0]
    files.write_text(line(refused[0], passage_of[refused[0]], 3) + line(taken, passage_of[taken], 0))
    _, after = ends(People(files=(str(files),)))
    assert after == (before - {taken}) | {refused[0]}


def test_where_people_draw_the_line_is_a_threshold(tmp_path):
    folder = Artifact(str(tmp_path), "people-1")
    folder.write_json(AGREEMENT, {"teachers": {"judge": {"recalibrated": {"cuts": [0.4, 1.2, 2.6]}}}})
    kept = Teacher(min_score=cut(f"{tmp_path}/people-1/", "judge"))
    assert cut(folder.path, "judge", 3) == 2.6 and kept.keep(1.2) is None and kept.keep(1.1) == "low-score"
    for where, scorer, said in (
        (folder.path, "other", "allowed in .*: judge"),
        (str(tmp_path), "judge", "annotate import"),
    ):
        with pytest.raises(ConfigError, match=said):
            cut(where, scorer)


def test_mine_takes_positives_and_negatives_as_people_say(build, by_people):
    told = by_people(q0_d0=1, q0_d3=3, q2_d2=2)
    labelled = WithHumanLabels(source=SOURCE, people=told)
    plain = build(Mine(selected=SOURCE, corpus=DOCS, searches=(HITS,), negatives=3, margin=None))
    mined = build(Mine(selected=labelled, corpus=DOCS, searches=(HITS,), negatives=3, margin=None))
    assert {q: row["positive_id"] for q, row in examples(plain).items()} == {"q0": "d0", "q1": "d1", "q2": "d2"}
    found = examples(mined)
    assert {q: row["positive_id"] for q, row in found.items()} == {"q0": "d3", "q1": "d1", "q2": "d2"}
    assert "d3" in examples(plain)["q0"]["negative_ids"] and found["q0"]["negative_ids"] == ["d0", "d1", "d2"]
    folder = build(labelled)
    rows = {(r["query_id"], r["doc_id"]): r["relevance"] for r in folder.read("qrels").to_pylist()}
    assert rows == {("q0", "d0"): 0, ("q0", "d3"): 3, ("q1", "d1"): 1, ("q2", "d2"): 2}
    counts = folder.manifest["counts"]
    assert (counts["overridden"], counts["added"], counts["back"]) == (2, 1, 0)
    assert folder.read("queries").equals(build(SOURCE).read("queries"))
    lenient = build(WithHumanLabels(source=SOURCE, people=told, relevant_from=1))
    assert lenient.read("qrels")["relevance"].to_pylist()[0] == 1


def test_a_rejected_relevant_query_is_restored(build, by_people):
    chosen = Select(parsed=SOURCE, scores=(Score(parsed=SOURCE, corpus=DOCS, filter=Length(min_words=3)),))
    assert build(chosen).read("queries")["query_id"].to_pylist() == ["q0", "q2"]
    folder = build(WithHumanLabels(source=chosen, people=by_people(q1_d1=3, q0_d0=0, q2_d2=2), queries=SOURCE))
    assert folder.read("queries")["query_id"].to_pylist() == ["q0", "q2", "q1"]
    assert folder.read("lineage")["id"].to_pylist() == ["q0", "q2", "q1"]
    rows = {(r["query_id"], r["doc_id"]): r["relevance"] for r in folder.read("qrels").to_pylist()}
    assert rows == {("q0", "d0"): 0, ("q2", "d2"): 2, ("q1", "d1"): 3} and folder.count("qrels") == 3
    assert folder.count("rejected") == 0 and folder.manifest["counts"]["back"] == 1
    stays = build(WithHumanLabels(source=chosen, people=by_people(q1_d1=1), queries=SOURCE))
    assert stays.count("queries") == 2 and stays.count("rejected") == 1


def test_select_reads_human_labels(build, by_people):
    """Filters over labelled queries, and a filter over labelled scores."""
    labelled = WithHumanLabels(source=SOURCE, people=by_people(q0_d0=0, q1_d1=3))
    chosen = Select(parsed=labelled, scores=(Score(parsed=labelled, corpus=DOCS, filter=Length(min_words=2)),))
    folder = build(chosen)
    assert folder.read("queries")["query_id"].to_pylist() == ["q0", "q2"]
    mined = build(Mine(selected=chosen, corpus=DOCS, searches=(HITS,), negatives=1, margin=None))
    assert list(examples(mined)) == ["q2"]


def test_scores_follow_people_whatever_the_threshold(build, by_people):
    teacher = FixedTables(
        rows={
            "scores": (("q0", "d0", "t", 0.5), ("q0", "d1", "t", 0.2), ("q1", "d1", "t", 0.9), ("q2", "d2", "t", -1.0))
        }
    )
    told = by_people(q0_d0=0, q2_d2=2, q0_d3=1, q9_d0=3)
    folder = build(WithHumanLabels(source=teacher, people=told))
    scores = {(r["query_id"], r["doc_id"]): r["score"] for r in folder.read("scores").to_pylist()}
    assert scores == pytest.approx(
        {("q0", "d0"): -1.0, ("q0", "d1"): 0.2, ("q1", "d1"): 0.9, ("q2", "d2"): 0.9, ("q0", "d3"): -1.0}
    )
    assert set(folder.read("scores")["scorer"].to_pylist()) == {"t"}
    graded = build(WithHumanLabels(source=teacher, people=told, scale=(0, 1, 2, 3)))
    scores = {(r["query_id"], r["doc_id"]): r["score"] for r in graded.read("scores").to_pylist()}
    assert scores["q0", "d0"] == 0 and scores["q2", "d2"] == 2 and scores["q0", "d3"] == 1


def test_negatives_that_people_find_relevant_become_positives(build, by_people):
    mined = Mine(selected=SOURCE, corpus=DOCS, searches=(HITS,), negatives=3, margin=None)
    pairs = [(q, d) for q in ("q0", "q1", "q2") for d in ("d0", "d1", "d2", "d3")]
    teacher = FixedTables(rows={"scores": tuple((q, d, "t", 0.9 if q[1] == d[1] else 0.1) for q, d in pairs)})
    labels = WithHumanLabels(source=teacher, people=by_people(q1_d3=3))
    plain = build(Relabel(mined=mined, labels=teacher, threshold=0.8))
    found = build(Relabel(mined=mined, labels=labels, threshold=0.8))
    positives = [{(r["query_id"], r["positive_id"]) for r in f.read("examples").to_pylist()} for f in (plain, found)]
    assert positives[1] - positives[0] == {("q1", "d3")} and positives[0] <= positives[1]


class InShards(FixedTables):
    """Three shards, the second without rows."""

    type: ClassVar[str] = "given-in-shards"

    def ranges(self, inputs, step):
        return [(0, 0), (1, 1), (2, 2)]

    def open(self, inputs, folder, pool):
        whole = super().open(inputs, folder, pool)(0, 0).tables

        def run(start, stop):
            size = {0: (0, 2), 1: (2, 0), 2: (2, 9)}[start]
            return Output({name: table.slice(*size) for name, table in whole.items()})

        return run


def test_shards_stay_side_by_side(build, by_people):
    ids = [f"q{i}" for i in range(4)]
    rows = {
        "queries": tuple((q, "text") for q in ids),
        "qrels": tuple((q, "d0", 1) for q in ids),
        "scores": tuple((q, "d0", "t", 0.5) for q in ids),
    }
    folder = build(WithHumanLabels(source=InShards(rows=rows), people=by_people(q0_d0=3, q3_d0=0, q3_d9=2)))
    tables_made = folder.manifest["tables"]
    assert [part["rows"] for part in tables_made["queries"]["parts"]] == [2, 0, 2]
    assert [part["rows"] for part in tables_made["qrels"]["parts"]] == [2, 0, 3]
    assert folder.read("qrels")["relevance"].to_pylist() == [3, 1, 1, 0, 2]
    assert folder.read("queries")["query_id"].to_pylist() == ids
    assert tables.schema("ratings").names == ["query_id", "doc_id", "grade", "who", "at"]
