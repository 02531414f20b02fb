"""Measures against pytrec_eval itself, and what an evaluation leaves out."""

import json
import random
from collections import Counter

import pytest
import pytrec_eval

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.evaluation import judge
from dagr_ray.retrieval.fusion import Lists
from dagr_ray.retrieval.vectors import best_first
from dagr_ray.stages.evaluate import MEASURES, Evaluate, Scorecard, measure
from dagr_ray.stages.sources import Beir
from dagr_ray.study.plan import _baselines
from tests.conftest import tiny_beir
from tests.support.toys import tiny


def test_measures_equal_pytrec_eval_with_ties():
    rng = random.Random(0)
    qrels = {f"q{i}": {f"d{j}": rng.choice([0, 1, 1, 3]) for j in rng.sample(range(40), 6)} for i in range(40)}
    run = {q: {f"d{j}": rng.choice([0.5, 1.0, 1.5, 2.0]) for j in rng.sample(range(40), 30)} for q in qrels}
    ours = measure(qrels, {q: list(docs.items()) for q, docs in run.items()})
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(run)
    for query_id, values in theirs.items():
        assert ours["nDCG@10"][query_id] == pytest.approx(values["ndcg_cut_10"], abs=1e-6)
        assert ours["R@100"][query_id] == pytest.approx(values["recall_100"], abs=1e-6)
        expected = values["recip_rank"] if values["recip_rank"] >= 0.1 else 0
        assert ours["RR@10"][query_id] == pytest.approx(expected, abs=1e-6)
    assert len({*ours["nDCG@10"].values()}) > 20


def test_ties_are_broken_by_falling_doc_id_in_every_measure():
    values = measure({"q": {"a": 1}}, {"q": [("a", 1.0), ("b", 1.0), ("c", 1.0)]})
    assert values["RR@10"]["q"] == pytest.approx(1 / 3)
    assert values["nDCG@10"]["q"] == pytest.approx(0.5)


def test_cutoffs_are_exact():
    hits = [(f"d{i:03}", float(-i)) for i in range(150)]
    values = measure({"q": {"d010": 1, "d099": 1, "d100": 1}}, {"q": hits})
    assert (values["RR@10"]["q"], values["nDCG@10"]["q"]) == (0, 0)
    assert values["R@100"]["q"] == pytest.approx(2 / 3)


def test_a_query_without_results_scores_zero():
    values = measure({"q1": {"a": 1}, "q2": {"a": 1}}, {"q1": [("a", 1.0)], "other": [("a", 1.0)]})
    assert all(values[name] == {"q1": 1.0, "q2": 0.0} for name in MEASURES)
    assert measure({"q1": {"a": 1}}, {}) == {name: {"q1": 0.0} for name in MEASURES}


# -- stages -----------------------------------------------------------------------------------------------------------

JUDGED = [("q1", "a", 1), ("q2", "b", 2), ("q2", "c", 1), ("q3", "a", 1), ("q4", "b", 1), ("7", "a", 1), ("8", "8", 1)]
FOUND = {
    "q1": [("a", 2.0), ("b", 1.0)],
    "q2": [("a", 1.5), ("c", 1.5), ("b", 1.0)],
    "q4": [("b", 1.0)],
    "7": [("7", 9.0), ("a", 1.0)],
    "8": [("8", 1.0)],
    "train-query": [("a", 1.0)],
}


class Judged(Stage):
    """Queries, judgements, candidates and exemplars in one folder."""

    empty: bool = False

    def open(self, inputs, folder, pool):
        queries = {q: f"what is {q}" for q, _, _ in JUDGED} | {"q4": "What  is an EXEMPLAR"}
        candidates = [
            {"query_id": q, "doc_id": d, "rank": rank, "score": score}
            for q, hits in FOUND.items()
            for rank, (d, score) in enumerate(best_first(hits), 1)
        ]
        shown = [("q3", "what is q3"), ("other", "what is an exemplar")]
        made = {
            "queries": tables.table("queries", [{"query_id": q, "text": t} for q, t in queries.items()]),
            "qrels.test": tables.table("qrels", [{"query_id": q, "doc_id": d, "relevance": r} for q, d, r in JUDGED]),
            "candidates": tables.table("candidates", [] if self.empty else candidates),
            "exemplars": tables.table(
                "exemplars", [{"query_id": q, "doc_id": "x", "query": t, "passage": "p"} for q, t in shown]
            ),
        }
        return lambda start, stop: Output(made)


def evaluated(tmp_path, **fields):
    return materialize(Evaluate(search=Judged(), data=Judged(), name="toy", **fields), str(tmp_path))


def of(folder, name):
    return {r["query_id"]: r["value"] for r in folder.read("metrics").to_pylist() if r["measure"] == name}


def test_metrics_hold_every_query_and_the_mean(tmp_path):
    made = evaluated(tmp_path)
    for name in MEASURES:
        values = of(made, name)
        mean = values.pop(None)
        assert set(values) == {q for q, _, _ in JUDGED} and values["q3"] == 0
        assert mean == pytest.approx(sum(values.values()) / 6)
    assert {(r["data"], r["split"]) for r in made.read("metrics").to_pylist()} == {("toy", "test")}
    assert made.manifest["counts"] == {"in": 6, "out": 6, "excluded": 0, "no_hits": 1, "itself": 1}


def test_a_query_is_no_answer_to_itself_unless_judged(tmp_path):
    made = evaluated(tmp_path)
    assert of(made, "RR@10")["7"] == 1.0, "the passage with the query's own id was left in"
    assert of(made, "RR@10")["8"] == 1.0, "a judged passage was taken out"
    rows = [(r["query_id"], r["doc_id"], r["rank"]) for r in made.read("candidates").to_pylist()]
    assert ("7", "a", 1) in rows and ("7", "7", 1) not in rows
    assert not any(query_id == "train-query" for query_id, _, _ in rows)


def test_depth_counts_after_the_query_itself_is_taken_out(tmp_path):
    made = evaluated(tmp_path, depth=1)
    rows = {(r["query_id"], r["doc_id"]) for r in made.read("candidates").to_pylist()}
    assert ("7", "a") in rows, "the query itself took a passage's place"
    assert ("q1", "b") not in rows and of(made, "R@100")["q2"] == 0.5
    assert Evaluate(search=Judged(), data=Judged()).identity().keys().isdisjoint({"depth", "leaks"})


def test_a_query_that_is_a_passage_has_as_many_hits_as_others(tmp_path):
    root = tiny_beir(tmp_path / "set", docs=110)
    first = json.loads((root / "corpus.jsonl").read_text().splitlines()[20])
    with open(root / "queries.jsonl", "a") as queries:  # as in ArguAna
        queries.write(json.dumps({"_id": "d20", "text": f"{first['title']} {first['text']}"}) + "\n")
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd20\td21\t1\nq22\td22\t1\n")
    card = judge({"set": Beir(path=str(root))}, Dense(encoder=tiny()))
    materialize(card, str(tmp_path), Placement(light=Pool(workers=0), retrieve=Pool(workers=0)))
    judged = card.evaluations[0].folder(str(tmp_path))
    assert judged.manifest["counts"]["itself"] == 1
    assert Counter(judged.read("candidates")["query_id"].to_pylist()) == {"d20": 100, "q22": 100}


def test_the_fused_search_is_judged_beside_the_retriever_alone(tmp_path):
    """With fixed weights, for the frozen base and for BM25 as well: their gains can be compared."""
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    card = judge({"set": data}, Dense(encoder=tiny()), fused=True)
    assert [evaluation.name for evaluation in card.evaluations] == ["set", "set-fused"]
    baselines = {kind: baseline for kind, _, baseline in _baselines({}, card)}
    assert [e.search.type for e in baselines["frozen"].evaluations] == ["search", "fuse"]
    assert [e.search.label() for e in baselines["bm25"].evaluations] == ["bm25-test", "bm25-test"]
    made = materialize(card, str(tmp_path), Placement(light=Pool(workers=0), retrieve=Pool(workers=0)))
    means = {
        row["data"]: row["value"]
        for row in made.read("metrics").to_pylist()
        if row["measure"] == "nDCG@10" and not row["query_id"]
    }
    lists = Lists([search.folder(str(tmp_path)).read("candidates") for search in card.evaluations[1].search.searches])
    ranked = lists.ranked(lists.weighted((0.6, 0.4), "z-score"), 101)
    by_hand = card.evaluations[1].search.folder(str(tmp_path)).read("candidates")
    assert ranked.equals(by_hand) and means["set-fused"] != means["set"]


def test_exemplars_are_left_out_by_id_and_by_wording(tmp_path):
    made = evaluated(tmp_path, exclude=Judged())
    assert set(of(made, "nDCG@10")) == {None, "q1", "q2", "7", "8"}
    assert made.manifest["counts"]["excluded"] == 2 and made.manifest["counts"]["in"] == 6


def test_the_run_file_is_read_back_by_ir_measures(tmp_path):
    import ir_measures

    made = evaluated(tmp_path)
    run = list(ir_measures.read_trec_run(made.read_bytes("run.trec").decode()))
    qrels = [ir_measures.Qrel(*row) for row in JUDGED]
    mean = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    assert mean == pytest.approx(of(made, "nDCG@10")[None])
    assert "run.trec" in made.manifest["files"]


def test_a_search_that_found_nothing_scores_zero(tmp_path):
    made = materialize(Evaluate(search=Judged(empty=True), data=Judged(), name="toy"), str(tmp_path))
    assert set(of(made, "nDCG@10").values()) == {0.0} and made.read_bytes("run.trec") == b""


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(ConfigError, match="split = 'dev'.*allowed: test"):
        evaluated(tmp_path, split="dev")


def test_a_scorecard_holds_all_its_evaluations(tmp_path):
    parts = tuple(Evaluate(search=Judged(), data=Judged(), name=name) for name in ("one", "two"))
    made = materialize(Scorecard(evaluations=parts), str(tmp_path)).read("metrics")
    assert made.num_rows == 2 * len(MEASURES) * 7
    assert {r["data"] for r in made.to_pylist()} == {"one", "two"}
    with pytest.raises(ValueError, match="own name and split"):
        Scorecard(evaluations=parts[:1] * 2)
    with pytest.raises(ValueError, match="at least one"):
        Scorecard(evaluations=())
