"""Score, Select, Take and Mine: thresholds cost nothing, rows add up, subsets nest, negatives are not relevant."""

from typing import ClassVar

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import Output, Stage, load_stage
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.take import Take


class FixedTables(Stage):
    """Writes the rows that it is given: {table: ((value, ...), ...)}."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "given-rows"
    rows: dict[str, tuple[tuple, ...]]

    def open(self, inputs, folder, pool):
        def run(start, stop):
            made = {}
            for name, rows in self.rows.items():
                names = tables.schema(name).names
                made[name] = tables.table(name, (dict(zip(names, row, strict=False)) for row in rows))
            return Output(made)

        return run


def corpus(*texts):
    return FixedTables(rows={"corpus": tuple((f"d{i}", f"title {i}", text) for i, text in enumerate(texts))})


def parsed(*pairs):
    """(query text, doc id) -> queries q0, q1, ... with qrels and lineage."""
    ids = [f"q{i}" for i in range(len(pairs))]
    return FixedTables(
        rows={
            "queries": tuple((i, text) for i, (text, _) in zip(ids, pairs, strict=True)),
            "qrels": tuple((i, doc, 1) for i, (_, doc) in zip(ids, pairs, strict=True)),
            "lineage": tuple((i, f"g{i}", doc, "s", "e", "m") for i, (_, doc) in zip(ids, pairs, strict=True)),
        }
    )


def search(hits):
    """{query id: [(doc id, score), ...]} in order of rank."""
    rows = [(q, d, rank, score) for q, found in hits.items() for rank, (d, score) in enumerate(found, 1)]
    return FixedTables(rows={"candidates": tuple(rows)})


@pytest.fixture
def build(tmp_path):
    return lambda stage, observe=None: materialize(stage, str(tmp_path), Placement(), observe)


def examples(folder):
    return {row["query_id"]: row for row in folder.read("examples").to_pylist()}


# -- Score and Select -----------------------------------------------------------------------------------------------


def test_threshold_costs_no_new_scoring(build):
    queries, docs = parsed(("one two", "d0"), ("one two three four", "d1")), corpus("a b", "c d")
    states = []

    def note(progress):
        states.append((progress.stage.type, progress.state))

    def recipe(most):
        return Select(parsed=queries, scores=(Score(parsed=queries, corpus=docs, filter=Length(max_words=most)),))

    wide, narrow = recipe(40), recipe(3)
    assert wide.scores[0].fingerprint() == narrow.scores[0].fingerprint()
    assert wide.fingerprint() != narrow.fingerprint()
    assert build(wide).count("queries") == 2
    assert build(narrow, note).count("queries") == 1
    assert ("score", "cached") in states
    assert ("score", "done") not in states
    assert load_stage(build(narrow)) == narrow


def test_what_scoring_reads_changes_its_fingerprint():
    queries, docs = parsed(("one two", "d0")), corpus("a b")
    exact, normalised = (Score(parsed=queries, corpus=docs, filter=Duplicate(by=e)) for e in ("exact", "normalised"))
    assert exact.fingerprint() != normalised.fingerprint()


def test_rows_add_up_and_the_first_rejection_is_the_reason(build):
    queries = parsed(
        ("copy a dict", "d0"), ("Copy a dict?", "d1"), ("x", "d0"), ("1. copy", "d1"), ("<p>merge</p>", "d0")
    )
    docs = corpus("about copies", "about lists")
    filters = (Format(), Length(), Duplicate())
    chosen = Select(parsed=queries, scores=tuple(Score(parsed=queries, corpus=docs, filter=f) for f in filters))
    folder = build(chosen)
    counts = folder.manifest["counts"]
    assert counts["rejected"] == {"format/list": 1, "format/markup": 1, "length/too-short": 1, "duplicate/duplicate": 1}
    assert counts["in"] == 5 == counts["out"] + sum(counts["rejected"].values())
    ids = folder.read("queries")["query_id"].to_pylist()
    assert len(ids) == 1 and ids[0] in ("q0", "q1")
    assert folder.read("qrels")["query_id"].to_pylist() == folder.read("lineage")["id"].to_pylist() == ids
    assert folder.count("rejected") == 4
    assert {r["id"] for r in folder.read("rejected").to_pylist()}.isdisjoint(ids)


def test_select_without_filters_and_without_rows(build):
    assert build(Select(parsed=parsed(("a", "d0")))).count("queries") == 1
    none = parsed()
    empty = build(Select(parsed=none, scores=(Score(parsed=none, corpus=corpus("a"), filter=Format()),)))
    assert empty.count("queries") == empty.count("rejected") == 0


def test_a_twin_of_the_passage_counts_as_found(build):
    queries = parsed(("copy a dict", "d0"), ("sort a list", "d2"), ("empty", "d3"), ("copy it", "d1"))
    docs = corpus("Return a copy.", "return  a COPY.", "Sort it.", "", "")
    hits = search(
        {"q0": [("d2", 9.0), ("d1", 8.0)], "q1": [("d1", 9.0), ("d0", 8.0)], "q2": [("d4", 1.0)], "q3": [("d0", 1.0)]}
    )
    folder = build(Score(parsed=queries, corpus=docs, filter=RoundTrip(), search=hits))
    rows = folder.read("scores").to_pylist()
    found = [(r["query_id"], r["doc_id"], r["score"]) for r in rows]
    assert found == [
        ("q0", "d0", 2),
        ("q1", "d2", 1e6),
        ("q2", "d3", 1e6),
        ("q3", "d1", 1),
    ]
    assert {r["scorer"] for r in rows} == {"round-trip"}


def test_wrong_wiring_is_refused():
    queries, docs = parsed(("a", "d0")), corpus("a")
    with pytest.raises(ValueError, match="search is not set"):
        Score(parsed=queries, corpus=docs, filter=RoundTrip())
    with pytest.raises(ValueError, match="remove search"):
        Score(parsed=queries, corpus=docs, filter=Length(), search=search({}))
    with pytest.raises(ValueError, match="score the queries that are selected from"):
        Select(parsed=parsed(("b", "d0")), scores=(Score(parsed=queries, corpus=docs, filter=Length()),))


# -- Take -----------------------------------------------------------------------------------------------------------

MINED = FixedTables(rows={"examples": tuple((f"q{i}", f"d{i % 40}", ("d0",), None, (None,)) for i in range(200))})


def taken(build, **fields):
    folder = build(Take(mined=MINED, **fields))
    return [(row["query_id"], row["positive_id"]) for row in folder.read("examples").to_pylist()], folder.manifest[
        "counts"
    ]


def test_take_nests(build):
    small, counts = taken(build, n=20)
    large, _ = taken(build, n=70)
    assert counts == {"in": 200, "out": 20, "short": 0, "left_out": {"n": 180}}
    assert large[:20] == small
    assert set(taken(build, density=1)[0]) < set(taken(build, density=3)[0])
    assert set(taken(build, coverage=0.25)[0]) < set(taken(build, coverage=0.5)[0])
    assert set(taken(build, n=20, seed=1)[0]) != set(small)
    assert len(taken(build)[0]) == 200


def test_take_combines(build):
    rows, counts = taken(build, coverage=0.5, density=2, n=1000)
    passages = [d for _, d in rows]
    assert max(passages.count(d) for d in set(passages)) == 2
    assert 10 <= len(set(passages)) <= 30
    assert counts["in"] == counts["out"] + sum(counts["left_out"].values())
    assert counts["short"] == 1000 - len(rows)
    assert {d for _, d in taken(build, coverage=0.5)[0]} == set(passages)


def test_coverage_is_not_the_draw_that_made_the_sample(build):
    """Passages sampled by hash all have a small hash: a coverage by the same hash would keep every one of them."""
    ids = sorted((f"d{i}" for i in range(2000)), key=lambda i: tables.unit_of(0, i))[:200]
    mined = FixedTables(rows={"examples": tuple((f"q{i}", doc, (), None, ()) for i, doc in enumerate(ids))})
    assert 60 < build(Take(mined=mined, coverage=0.5)).count("examples") < 140


# -- Mine -----------------------------------------------------------------------------------------------------------

DOCS = corpus("own", "OWN ", "near", "far", "farther", "other", "farther", "last")


def mined(build, hits, queries=None, **fields):
    queries = queries or parsed(("ask", "d0"))
    searches = tuple(search(each) for each in hits)
    return build(Mine(selected=queries, corpus=DOCS, searches=searches, **fields))


def test_margin_drops_what_scores_like_the_positive(build):
    hits = {"q0": [("d2", 10.0), ("d0", 10.0), ("d3", 9.6), ("d4", 9.5), ("d5", 1.0)]}
    folder = mined(build, [hits], negatives=2)
    row = examples(folder)["q0"]
    assert row["negative_ids"] == ["d4", "d5"]
    assert row["positive_score"] == 10.0 and row["negative_scores"] == [9.5, 1.0]
    assert folder.manifest["counts"]["too_close"] == 2
    assert examples(mined(build, [hits], negatives=2, margin=None))["q0"]["negative_ids"] == ["d2", "d3"]


def test_margin_under_zero(build):
    hits = {"q0": [("d0", -1.0), ("d3", -1.01), ("d4", -1.2)]}
    assert examples(mined(build, [hits]))["q0"]["negative_ids"] == ["d4"]


def test_a_difference_and_an_absolute_score_are_rules_too(build):
    hits = {"q0": [("d2", 10.0), ("d0", 10.0), ("d3", 9.6), ("d4", 8.0), ("d5", 1.0)], "q1": [("d3", 9.0), ("d4", 2.0)]}
    two = parsed(("ask", "d0"), ("else", "d7"))

    def kept(**rules):
        return {q: row["negative_ids"] for q, row in examples(mined(build, [hits], two, negatives=1, **rules)).items()}

    assert kept(margin=None, difference=1.0) == {"q0": ["d4"], "q1": ["d3"]}, "q1's positive was not found"
    assert kept(margin=None, difference=0.1) == {"q0": ["d3"], "q1": ["d3"]}
    assert kept(margin=None, threshold=8.0) == {"q0": ["d5"], "q1": ["d4"]}
    assert kept(margin=0.9, difference=0.1) == {"q0": ["d4"], "q1": ["d3"]}, "the stricter rule holds"
    plain, same = Mine(selected=two, corpus=DOCS), Mine(selected=two, corpus=DOCS, threshold=None)
    assert plain.fingerprint() == same.fingerprint() != Mine(selected=two, corpus=DOCS, threshold=1.0).fingerprint()


def test_a_twin_is_neither_negative_nor_counted_twice(build):
    hits = {"q0": [("d1", 9.0), ("d4", 4.0), ("d6", 4.0), ("d5", 3.0)]}
    row = examples(mined(build, [hits], negatives=3))["q0"]
    assert row["negative_ids"] == ["d4", "d5"], "d1 says what the positive says, and d6 what d4 says"
    assert row["positive_score"] is None


def test_positives_of_the_same_question_are_no_negatives(build):
    queries = parsed(("How to ask", "d0"), ("how  to ask", "d4"), ("another", "d3"))
    hits = {q: [("d6", 5.0), ("d4", 4.9), ("d3", 4.0), ("d0", 1.0)] for q in ("q0", "q1", "q2")}
    found = examples(mined(build, [hits], queries, margin=None, negatives=9))
    assert found["q0"]["negative_ids"] == ["d3"]
    assert found["q1"]["negative_ids"] == ["d3"]
    assert found["q2"]["negative_ids"] == ["d6", "d0"]


def test_searches_take_turns(build):
    first = {"q0": [("d0", 9.0), ("d3", 5.0), ("d4", 4.0)], "unselected": [("d5", 9.0)]}
    second = {"q0": [("d5", 0.9), ("d3", 0.8), ("d7", 0.7)]}
    row = examples(mined(build, [first, second], negatives=4))["q0"]
    assert row["negative_ids"] == ["d5", "d3", "d4", "d7"]
    assert row["negative_scores"] == [None, 5.0, 4.0, None]
    assert examples(mined(build, [first, second], negatives=1, depth=1))["q0"]["negative_ids"] == ["d5"]


def test_too_close_in_one_search_is_too_close(build):
    first = {"q0": [("d0", 9.0), ("d3", 8.9), ("d4", 4.0)]}
    second = {"q0": [("d3", 0.8), ("d4", 0.1)]}
    assert examples(mined(build, [first, second], negatives=5))["q0"]["negative_ids"] == ["d4"]


def test_no_negative_is_a_rejection_and_rows_add_up(build):
    queries = parsed(("a", "d0"), ("b", "d3"), ("c", "d5"))
    folder = mined(build, [{"q0": [("d0", 1.0), ("d1", 1.0)], "q1": [("d3", 9.0), ("d4", 1.0)]}], queries, negatives=2)
    counts = folder.manifest["counts"]
    assert counts["in"] == 3 == counts["out"] + sum(counts["rejected"].values())
    assert counts["rejected"] == {"mine/no-negative": 2} and counts["short"] == 1
    assert {r["id"] for r in folder.read("rejected").to_pylist()} == {"q0", "q2"}
    assert examples(folder)["q1"]["negative_ids"] == ["d4"]
    assert mined(build, [], queries, negatives=0).count("examples") == 3
