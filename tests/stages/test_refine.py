"""The loop of generator and evaluator: rounds ask only what is left, show the best so far, and resume like all stages."""

import re

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage, walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.miners.bm25 import BM25
from dagr_ray.recipes.refinement import refine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.label import Label
from dagr_ray.stages.pairs import Pairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.refine import CritiquedPairs, RemainingPassages, TopExemplars
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.noisy import Noisy
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.teachers.hybrid import Hybrid
from tests.conftest import tiny_beir
from tests.stages.test_select_mine import FixedTables, corpus
from tests.study.test_canary import answers
from tests.support.endpoint import served

HERE = Placement(generate=Pool(workers=0, shard_rows=30), light=Pool(workers=0))
NUMBER = re.compile(r"has number (\d+)")


def said(body):
    """Good queries for two passages in three, none for the others until they are told what was wrong."""
    prompt = body["prompt"]
    last = prompt.rpartition("Passage")[2]
    number = int(NUMBER.search(last)[1])
    good = f" which place in spring has number {number}"
    if prompt.endswith("Problem:"):
        return " none" if f"number {number}\nProblem" in prompt else " names nothing that the passage is about"
    if prompt.endswith("Better query:"):
        return good if number % 2 else " what is it"
    return good if number % 3 else " what is this all about then"


def test_rounds_use_remaining_passages_and_top_exemplars(tmp_path):
    runs, docs = str(tmp_path / "runs"), Beir(path=str(tiny_beir(tmp_path / "set")))

    def label(queries: Stage) -> Stage:
        searches = tuple(
            Search(index=Index(corpus=docs, miner=BM25(k1=k1)), queries=queries, depth=20) for k1 in (0.9, 1.5)
        )
        return Label(teacher=Hybrid(), queries=queries, corpus=docs, searches=searches)

    with served(answers(said)) as server:
        engine = OpenAIServer(model="m", base_url=server.url)
        every, steps = refine(
            docs, docs, Promptagator(), engine, exemplars=None, rounds=2, label=label, max_rank=60, k=4
        )
        made = materialize(every, runs, HERE)
        kept = [step.folder(runs).manifest["counts"]["out"] for step in steps]
        # first round: two thirds, then the odd ones of the rest; second: the twenty's even ones are asked again in vain
        assert kept[0] == 40 and kept[1] == 10 and kept[2] == 0 and kept[3] == 0
        assert made.count("queries") == 50 and len(set(made.read("qrels")["doc_id"].to_pylist())) == 50
        second = steps[2].parsed.generations
        assert second.corpus.folder(runs).count("corpus") == 10
        shown = second.exemplars.folder(runs).read("exemplars").to_pylist()
        assert 1 <= len(shown) <= 4 and len({row["doc_id"] for row in shown}) == len(shown)
        # the evaluator found nothing wrong with what 40 passages got at first, whatever the filters say
        verdict = next(stage for stage in walk(every) if isinstance(stage, CritiquedPairs))
        unending = materialize(RemainingPassages(corpus=docs, accepted=(), verdicts=(verdict,)), runs, HERE)
        fine = set(steps[0].folder(runs).read("qrels")["doc_id"].to_pylist())
        assert unending.count("corpus") == 20 and not fine & set(unending.read("corpus")["doc_id"].to_pylist())
        ended = refine(
            docs,
            docs,
            Promptagator(),
            engine,
            exemplars=None,
            rounds=2,
            label=label,
            max_rank=60,
            k=4,
            until="evaluator",
        )[1]
        assert ended[0] == steps[0] and ended[2].parsed.generations.corpus.verdicts == (verdict,)
        asked = len(server.seen)
        for name in ("manifest.json",):
            made.remove(name)
        materialize(every, runs, HERE)
        assert len(server.seen) == asked, "a loop that is run again asks nothing again"


class Scores(Stage):
    """Given scores: a test's teacher."""

    abstract = False
    type = "given-scores"
    rows: tuple[tuple[str, str, float], ...]

    def open(self, inputs, folder, pool):
        from dagr_ray.core import tables

        rows = [{"query_id": q, "doc_id": d, "scorer": "t", "score": s} for q, d, s in self.rows]
        return lambda start, stop: Output({"scores": tables.table("scores", rows)})


def test_top_exemplars_differ_in_passage_and_words(tmp_path):
    texts = ("old stone bridge", "stone bridge old", "a boat", "a boat on the lake", "when do the bells ring")
    passages = ("d0", "d1", "d2", "d2", "d3")
    queries = FixedTables(
        rows={
            "queries": tuple((f"q{i}", text) for i, text in enumerate(texts)),
            "qrels": tuple((f"q{i}", doc, 1) for i, doc in enumerate(passages)),
        }
    )
    scores = Scores(rows=(*((f"q{i}", doc, 1.0 - i / 10) for i, doc in enumerate(passages)), ("q4", "d0", 9.0)))
    best = TopExemplars(selected=queries, corpus=corpus("a", "b", "c", "d"), scores=scores, k=3)
    shown = materialize(best, str(tmp_path), HERE).read("exemplars").to_pylist()
    assert [(row["query_id"], row["doc_id"]) for row in shown] == [("q0", "d0"), ("q2", "d2"), ("q4", "d3")]
    left = materialize(
        RemainingPassages(corpus=corpus("a", "b", "c", "d", "e"), accepted=(queries,)), str(tmp_path), HERE
    )
    assert left.read("corpus")["doc_id"].to_pylist() == ["d4"]
    nothing = RemainingPassages(corpus=corpus("a", "b", "c", "d"), accepted=(queries,))
    asked = Parse(generations=Generate(corpus=nothing, strategy=Crop(), engine=CropEngine()), corpus=nothing)
    assert materialize(asked, str(tmp_path), HERE).count("queries") == 0, "a round with nothing to ask is a round"


def test_only_critiques_are_read_as_critiques(tmp_path):
    docs = Beir(path=str(tiny_beir(tmp_path / "set")))
    asked = Generate(corpus=Pairs(queries=docs, corpus=docs, split="dev"), strategy=Noisy(), engine=CropEngine())
    with pytest.raises(ValueError, match="'noisy' writes queries; give one that writes critiques"):
        CritiquedPairs(critiques=asked)
    assert issubclass(ConfigError, ValueError)
