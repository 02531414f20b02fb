"""Fusion of searches: the formulas by hand, nDCG@10 as ir_measures has it, and weights that are found."""

import random

import ir_measures
import numpy as np
import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import from_json
from dagr_ray.core.stage import Output, Stage
from dagr_ray.core.tables import table
from dagr_ray.miners.bm25 import BM25
from dagr_ray.retrieval import fusion
from dagr_ray.retrieval.fusion import Lists
from dagr_ray.retrieval.vectors import best_first
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.fuse import Fuse
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.study import plan


def found(hits: dict[str, dict[str, float]]):
    """A ``candidates`` table of these scores."""
    rows = [
        {"query_id": q, "doc_id": d, "rank": rank, "score": score}
        for q, docs in hits.items()
        for rank, (d, score) in enumerate(best_first(docs.items()), 1)
    ]
    return table("candidates", rows)


def by_query(made, name="score"):
    rows: dict[str, dict[str, float]] = {}
    for row in made.to_pylist():
        rows.setdefault(row["query_id"], {})[row["doc_id"]] = row[name]
    return rows


FIRST = {"q1": {"a": 9.0, "b": 5.0, "c": 1.0}, "q2": {"a": 3.0}}
SECOND = {"q1": {"c": 0.8, "d": 0.6}, "q3": {"b": 0.5, "a": 0.5}}
LISTS = Lists([found(FIRST), found(SECOND)])


def test_reciprocal_ranks():
    made = by_query(LISTS.ranked(LISTS.reciprocal(60), 10))
    expected = {"c": 1 / 63 + 1 / 61, "a": 1 / 61, "b": 1 / 62, "d": 1 / 62}
    assert made["q1"] == pytest.approx(expected) and list(made["q1"]) == ["c", "a", "d", "b"]
    assert made["q2"] == pytest.approx({"a": 1 / 61}) and list(made["q3"]) == ["b", "a"]
    ranks = by_query(LISTS.ranked(LISTS.reciprocal(60), 2), "rank")
    assert ranks["q1"] == {"c": 1, "a": 2}


def test_weights_of_min_max_scores():
    made = by_query(LISTS.ranked(LISTS.weighted((3, 1), "min-max"), 10))
    assert made["q1"] == pytest.approx({"a": 0.75, "b": 0.375, "c": 0.25, "d": 0.0})
    # a single hit is the best that a search has; equal hits are all its best
    assert made["q2"] == pytest.approx({"a": 0.75}) and made["q3"] == pytest.approx({"a": 0.25, "b": 0.25})


def test_weights_of_z_scores():
    made = by_query(LISTS.ranked(LISTS.weighted((1, 1), "z-score"), 10))
    first, deviation = (9 + 5 + 1) / 3, np.std([9, 5, 1])
    lowest = (1 - first) / deviation
    expected = {"a": (9 - first) / deviation - 1, "b": (5 - first) / deviation - 1, "c": lowest + 1, "d": lowest - 1}
    assert made["q1"] == pytest.approx({d: value / 2 for d, value in expected.items()}, abs=1e-6)
    assert made["q2"] == {"a": 0.0}


def test_no_hits_at_all():
    nothing = Lists([tables.empty("candidates"), tables.empty("candidates")])
    assert nothing.ranked(nothing.reciprocal(60), 10).num_rows == 0
    assert nothing.ranked(nothing.weighted((1, 1), "z-score"), 10).num_rows == 0


def judged(rng: random.Random):
    """Judgements of 30 queries, a search that follows them somewhat, and one that does not."""
    qrels, near, noise = [], {}, {}
    for q in range(30):
        graded = {f"d{d}": rng.choice([0, 0, 1, 2]) for d in rng.sample(range(60), 12)}
        qrels += [{"query_id": f"q{q}", "doc_id": d, "relevance": r} for d, r in graded.items()]
        docs = [f"d{d}" for d in rng.sample(range(60), 40)]
        near[f"q{q}"] = {d: graded.get(d, 0) + rng.gauss(0, 1.0) for d in docs[:30]}
        noise[f"q{q}"] = {d: rng.gauss(0, 1.0) for d in docs[10:]}
    qrels.append({"query_id": "nothing", "doc_id": "d1", "relevance": 1})
    qrels.append({"query_id": "irrelevant", "doc_id": "d1", "relevance": 0})
    return table("qrels", qrels), found(near), found(noise)


def ndcg(qrels, made) -> float:
    ranked = [ir_measures.ScoredDoc(r["query_id"], r["doc_id"], -float(r["rank"])) for r in made.to_pylist()]
    rows = [ir_measures.Qrel(*row.values()) for row in qrels.to_pylist()]
    return float(ir_measures.calc_aggregate([ir_measures.nDCG @ 10], rows, ranked)[ir_measures.nDCG @ 10])


@pytest.mark.parametrize("scale", ["min-max", "z-score"])
def test_weights_are_tuned_by_the_ndcg_of_ir_measures(scale):
    qrels, near, noise = judged(random.Random(0))
    lists = Lists([near, noise])
    weights, best, alone = fusion.tune(lists, qrels, scale, 10)
    grid = {w: ndcg(qrels, lists.ranked(lists.weighted(w, scale), 100)) for w in fusion.simplex(2, 10)}
    assert best == pytest.approx(max(grid.values()), abs=1e-6) and grid[weights] == pytest.approx(best, abs=1e-6)
    assert alone == pytest.approx([grid[1.0, 0.0], grid[0.0, 1.0]], abs=1e-6)
    assert weights[0] > 0.5 and best > alone[1] + 0.1


def test_of_equal_weights_the_most_equal_are_taken():
    qrels, near, _ = judged(random.Random(1))
    assert fusion.tune(Lists([near, near]), qrels, "min-max", 4)[0] == (0.5, 0.5)


# -- the stage --------------------------------------------------------------------------------------------------------


class Zoo(Stage):
    """Passages whose words and lengths tell k1 and b apart, with dev and test queries."""

    def open(self, inputs, folder, pool):
        rng = random.Random(0)
        words = "otter heron badger newt kestrel vole adder wren marten shrew".split()
        docs = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(80)]
        queries = {f"q{i}": " ".join(rng.sample(words, 2)) for i in range(20)}
        best = {
            q: max(range(80), key=lambda d: sum(map(docs[d].split().count, text.split())))
            for q, text in queries.items()
        }
        split = {name: [q for i, q in enumerate(queries) if i % 2 == part] for part, name in enumerate(("dev", "test"))}
        made = {
            "corpus": table("corpus", [{"doc_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(docs)]),
            "queries": table("queries", [{"query_id": q, "text": text} for q, text in queries.items()]),
        }
        for name, asked in split.items():
            rows = [{"query_id": q, "doc_id": f"d{best[q]}", "relevance": 1} for q in asked]
            made[f"qrels.{name}"] = table("qrels", rows)
        return lambda start, stop: Output(made)


ZOO = Zoo()


def searches(split="test"):
    miners = (BM25(), BM25(k1=20, b=0))
    return tuple(Search(index=Index(corpus=ZOO, miner=m), queries=ZOO, split=split, depth=20) for m in miners)


def test_a_hybrid_with_tuned_weights_is_evaluated(tmp_path):
    fused = Fuse(searches=searches(), method="weights", dev=ZOO, steps=10)
    made = materialize(Evaluate(search=fused, data=ZOO, split="test"), str(tmp_path))
    counts = fused.folder(str(tmp_path)).manifest["counts"]
    assert set(counts["weights"]) == {"0 bm25-test", "1 bm25-test"} and sum(
        counts["weights"].values()
    ) == pytest.approx(1)
    assert counts["dev_ndcg"]["fused"] >= max(counts["dev_ndcg"]["0 bm25-test"], counts["dev_ndcg"]["1 bm25-test"])
    dev = Evaluate(search=searches("dev")[0], data=ZOO, split="dev")
    rows = materialize(dev, str(tmp_path)).read("metrics").to_pylist()
    mean = next(r["value"] for r in rows if r["measure"] == "nDCG@10" and r["query_id"] is None)
    assert counts["dev_ndcg"]["0 bm25-test"] == pytest.approx(mean, abs=1e-6)
    given = fused.model_copy(update={"dev": None, "weights": tuple(counts["weights"].values())})
    assert materialize(given, str(tmp_path)).read("candidates").equals(fused.folder(str(tmp_path)).read("candidates"))
    assert made.manifest["counts"]["out"] == 10
    assert from_json(fused.to_json(), Stage) == fused


def test_a_study_evaluates_hybrids_beside_bm25():
    first, second = searches()
    trained = second.model_copy(update={"index": second.index.model_copy(update={"trained": Zoo()})})
    fused = Fuse(searches=(first, trained))
    card = Scorecard(evaluations=(Evaluate(search=fused, data=ZOO),))
    kinds = {kind: stage.evaluations[0].search for kind, _, stage in plan._baselines({}, card)}
    assert kinds["frozen"].fingerprint() == Fuse(searches=searches()).fingerprint() != fused.fingerprint()
    assert kinds["bm25"].fingerprint() == first.fingerprint()


def test_one_index_serves_every_k1_and_b(tmp_path):
    one, other = searches()
    assert one.index.fingerprint() == other.index.fingerprint() and one.fingerprint() != other.fingerprint()
    tables_of = [materialize(each, str(tmp_path)).read("candidates") for each in (one, other)]
    assert not tables_of[0].equals(tables_of[1])
    assert len(list(tmp_path.glob("index-*"))) == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"searches": searches()[:1]}, "1 searches; give at least two"),
        ({"searches": (searches()[0], searches("dev")[1])}, "differ in queries or split"),
        ({"weights": (1.0, 1.0)}, "'rrf' has no weights"),
        ({"method": "weights"}, "needs either weights, or dev"),
        ({"method": "weights", "weights": (1.0,)}, "for 2 searches"),
        ({"method": "weights", "weights": (0.0, 0.0)}, "are all 0"),
        ({"method": "weights", "dev": ZOO, "dev_split": "test"}, "is the searched split"),
    ],
)
def test_fields_that_do_not_agree_are_named(fields, says):
    with pytest.raises(ValueError, match=says):
        Fuse(**({"searches": searches()} | fields))
