"""Scores and negatives of a part of the queries are those that all of them together give."""

from typing import ClassVar

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.joins import Positives
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.core.tables import table
from dagr_ray.engines.crop import CropEngine
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.miners.bm25 import BM25
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.strategies.crop import Crop
from tests.stages.test_select_mine import FixedTables

pytestmark = pytest.mark.slow

WORDS = "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh otter quill reef".split()


class Twinned(Stage):
    """60 passages of two sentences; each of the first 20 stands again at the end, in capitals and under another title."""

    outputs: ClassVar[tuple[str, ...]] = ("corpus",)

    def open(self, inputs, folder, pool):
        def text(i):
            one, two = ([WORDS[(i * k + j) % 16] for j in range(6)] for k in (3, 7))
            return f"The {' '.join(one)} has number {i % 9}. Nobody saw the {' '.join(two)} then."

        rows = [{"doc_id": f"d{i:02}", "title": f"t{i}", "text": text(i)} for i in range(60)]
        rows += [{"doc_id": f"e{i:02}", "title": "", "text": text(i).upper()} for i in range(19)]
        rows += [{"doc_id": "e19", "title": "alone", "text": ""}, {"doc_id": "e20", "title": "Alone", "text": " "}]
        return lambda start, stop: Output({"corpus": table("corpus", rows)})


DOCS = Twinned()


def made(searched_of=None):
    parsed = Parse(generations=Generate(corpus=DOCS, strategy=Crop(), engine=CropEngine(), samples=2), corpus=DOCS)
    index = Index(corpus=DOCS, miner=BM25())
    score = Score(parsed=parsed, corpus=DOCS, filter=RoundTrip(), search=Search(index=index, queries=parsed, depth=30))
    kept = Select(parsed=parsed, scores=(score,))
    search = Search(index=index, queries=parsed if searched_of == "parsed" else kept, depth=30)
    return score, Mine(selected=kept, corpus=DOCS, searches=(search,), negatives=3)


def rows_of(stage, runs, rows, table):
    pool = Pool(workers=0, shard_rows=rows)
    here = Placement(generate=pool, light=pool, retrieve=Pool(workers=0, shard_rows=1 if rows < 100 else 100))
    folder = materialize(stage, str(runs), here)
    counts = folder.manifest["counts"]
    return folder.read(table).to_pylist(), counts, len(folder.manifest["tables"][table]["parts"])


def test_round_trip_and_mining_do_not_depend_on_shards(tmp_path):
    score, mine = made()
    for stage, name in ((score, "scores"), (mine, "examples")):
        whole, counts, one = rows_of(stage, tmp_path / "whole", 10_000, name)
        parts, also, many = rows_of(stage, tmp_path / "parts", 7, name)
        assert one == 1 and many > 10
        assert parts == whole and also == counts
    ranks = [row["score"] for row in rows_of(score, tmp_path / "parts", 7, "scores")[0]]
    assert len(ranks) > 100 and min(ranks) == 1 and max(ranks) > 1
    # a twin is neither a negative nor one of two, whatever part its query is in
    twin_of = {f"e{i:02}": f"d{i:02}" for i in range(19)}
    for row in rows_of(mine, tmp_path / "parts", 7, "examples")[0]:
        texts = [twin_of.get(doc_id, doc_id) for doc_id in (row["positive_id"], *row["negative_ids"])]
        assert len(set(texts)) == len(texts), row


def test_candidates_of_a_part_of_a_search_s_queries(tmp_path):
    ours, other = made()[1], made("parsed")[1]
    (rows, _, many), (same, _, also) = (rows_of(each, tmp_path, 7, "examples") for each in (ours, other))
    assert many == also > 10 and rows == same


def test_queries_without_text_share_no_positives(tmp_path):
    rows = {"queries": (("q0", ""), ("q1", " "), ("q2", "bells"), ("q3", "Bells "), ("q4", "boats")),
            "qrels": (("q0", "d0", 1), ("q1", "d1", 1), ("q2", "d2", 1), ("q3", "d3", 1), ("q4", "d4", 1))}  # fmt: skip
    folder = materialize(FixedTables(rows=rows), str(tmp_path))
    assert Positives(folder).of(folder.read("qrels")) == {
        "q0": {"d0", "d1"}, "q1": {"d0", "d1"}, "q2": {"d2", "d3"}, "q3": {"d2", "d3"}, "q4": {"d4"},
    }  # fmt: skip
