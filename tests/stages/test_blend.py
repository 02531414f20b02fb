"""People's and generated pairs as one set: weights, nesting, ids; and a study whose searches are of several kinds."""

import doctest
import itertools
from collections import Counter

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.evaluation import judge
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages import mix
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.mix import HumanPairs, MixExamples
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.trec import TrecRun
from dagr_ray.study.job import Job
from dagr_ray.study.plan import plan_study
from tests.conftest import tiny_beir

HERE = Placement(generate=Pool(workers=0), retrieve=Pool(workers=0), light=Pool(workers=0))


class Bag(Stage):
    """``n`` examples and their queries; ``twice`` gives each query a second passage."""

    name: str
    n: int
    twice: bool = False
    says: str = "text of"
    scores: bool = False

    def open(self, inputs, folder, pool):
        ids = [f"{self.name}{i}" for i in range(self.n)]
        rows = [
            {"query_id": q, "positive_id": f"{q}-{k}", "negative_ids": ["x"], "positive_score": 2.0 if self.scores else None}
            for q in ids
            for k in range(1 + self.twice)
        ]  # fmt: skip
        lineage = [
            {"id": q, "gen_id": f"g{q}", "source_id": "d", "strategy": "s", "engine": "e", "model": "m"} for q in ids
        ]
        made = {
            "examples": tables.table("examples", rows),
            "queries": tables.table("queries", [{"query_id": q, "text": f"{self.says} {q}"} for q in ids]),
        }
        if self.name != "human":
            made["lineage"] = tables.table("lineage", lineage)
        return lambda start, stop: Output(made)


HUMAN, OURS = Bag(name="human", n=60), Bag(name="ours", n=300, twice=True, scores=True)


def blended(tmp_path, *sources, **fields):
    return materialize(MixExamples(examples=sources, queries=sources, **fields), str(tmp_path), HERE)


def test_the_examples_hold():
    assert doctest.testmod(mix).failed == 0 and doctest.testmod(mix).attempted >= 4


def kinds(folder):
    return Counter(q.rstrip("0123456789") for q in folder.read("examples")["query_id"].to_pylist())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n": 80, "weights": (0.25, 0.75)}, (20, 60)),
        ({"n": 80, "weights": (1, 0)}, (60, 0)),  # 20 short, and nobody else makes them up
        ({"n": 40, "weights": (0, 1)}, (0, 40)),
        ({"n": 66}, (6, 60)),
        ({}, (60, 600)),
        ({"temperature": 2.0}, (60, 189)),  # 60 ** 0.5 to 600 ** 0.5
        ({"weights": (1, 2)}, (60, 120)),
    ],
)
def test_shares_are_those_of_the_weights(tmp_path, fields, expected):
    made = blended(tmp_path, HUMAN, OURS, **fields)
    assert (kinds(made)["human"], kinds(made)["ours"]) == expected
    counts = made.manifest["counts"]
    assert counts["out"] == sum(expected) and counts["short"] == (20 if fields.get("weights") == (1, 0) else 0)


def test_smaller_sets_lie_inside_larger_ones(tmp_path):
    third = Bag(name="c", n=500)
    before: set[tuple[str, str]] = set()
    for n in (1, 2, 3, 5, 8, 13, 50, 51, 52, 53, 170):
        made = blended(tmp_path, HUMAN, OURS, third, weights=(0.35, 0.35, 0.3), n=n).read("examples").to_pylist()
        now = {(r["query_id"], r["positive_id"]) for r in made}
        assert len(now) == n and before < now, f"{n} does not hold what fewer held"
        before = now
    # weights at which largest remainders, and turns that begin at the whole parts, take a seat away again
    weights = (0.0244, 0.0859, 0.4259, 0.0512, 0.0233, 0.3894)
    dealt = MixExamples(examples=(HUMAN,) * 6, queries=(HUMAN,) * 6, weights=weights)
    seats = [dealt.model_copy(update={"n": n}).shares([999] * 6) for n in range(1, 300)]
    assert all(sum(k) == n for n, k in enumerate(seats, 1))
    assert all(a <= b for one, more in itertools.pairwise(seats) for a, b in zip(one, more, strict=True))


def test_what_train_reads_is_there(tmp_path):
    made = blended(tmp_path, HUMAN, OURS, n=100, weights=(0.3, 0.7))
    examples, queries = made.read("examples").to_pylist(), tables.texts_of(made.read("queries"))
    assert {row["query_id"] for row in examples} == queries.keys()
    assert all(queries[q] == f"text of {q}" for q in queries)
    ours = {q for q in queries if q.startswith("ours")}
    assert set(made.read("lineage")["id"].to_pylist()) == ours
    assert {r["positive_score"] for r in examples if r["query_id"] in ours} == {2.0}
    first = Counter(row["query_id"][:1] for row in examples[:50])
    assert 5 <= first["h"] <= 25, "the sources stand one after the other"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="'human0' is one query in bag-.* and another in bag-"):
        blended(tmp_path, HUMAN, Bag(name="human", n=50, says="another text of"))
    twins = blended(tmp_path, HUMAN, Bag(name="human", n=50))
    assert twins.read("queries").num_rows == 60 and twins.read("examples").num_rows == 110
    for fields, said in [
        ({"weights": (1,)}, "weights = .* for 2 sources"),
        ({"weights": (0, 0)}, "not all of them 0"),
        ({"weights": (1, 1), "temperature": 2}, "remove one of them"),
    ]:
        with pytest.raises(ValueError, match=said):
            MixExamples(examples=(HUMAN, OURS), queries=(HUMAN, OURS), **fields)
    with pytest.raises(ValueError, match="2 examples and 1 queries"):
        MixExamples(examples=(HUMAN, OURS), queries=(HUMAN,))
    with pytest.raises(ConfigError, match="has no query 'ours"):
        materialize(MixExamples(examples=(OURS,), queries=(HUMAN,)), str(tmp_path), HERE)


def test_human_pairs_are_mined_and_held_out_like_generated_ones(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    human = HumanPairs(data=data, split="dev", n=8)
    search = Search(index=Index(corpus=data, miner=BM25()), queries=human, depth=20)
    mined = materialize(
        Mine(selected=human, corpus=data, searches=(search,), negatives=2), str(tmp_path / "runs"), HERE
    )
    rows = mined.read("examples").to_pylist()
    assert len(rows) == 8 and all(r["positive_id"] == f"d{r['query_id'][1:]}" for r in rows)
    assert all(len(r["negative_ids"]) == 2 for r in rows)
    few = (
        materialize(human.model_copy(update={"n": 3}), str(tmp_path / "runs"), HERE)
        .read("qrels")["query_id"]
        .to_pylist()
    )
    assert set(few) < {r["query_id"] for r in rows}
    with pytest.raises(ConfigError, match="split = 'train' is not in .*allowed: dev, test"):
        materialize(HumanPairs(data=data), str(tmp_path / "runs"), HERE)


# -- what a study derives from a scorecard ----------------------------------------------------------------------------


class Fused(Stage):
    """Several searches as one."""

    searches: tuple[Stage, ...]


def planned(card):
    def recipe() -> Stage:
        return card

    return plan_study(Job("job.py", "recipe", recipe), {})


def searched(data, **fields):
    return Search(index=Index(corpus=data, miner=Dense(encoder=Encoder(model="a/b", revision="0" * 40)), **fields),
                  queries=data, split="test")  # fmt: skip


def test_the_baselines_of_a_fusion_are_bm25_and_untrained(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    keyword = Search(index=Index(corpus=data, miner=BM25(k1=1.2)), queries=data, split="test")
    fused = Fused(searches=(searched(data, trained=Bag(name="t", n=1)), keyword))
    trials = planned(Scorecard(evaluations=(Evaluate(search=fused, data=data),))).trials
    assert [t.kind for t in trials] == ["bm25", "frozen", "augmented"]
    bm25, frozen = (t.card.evaluations[0].search for t in trials[:2])
    assert isinstance(bm25, Search) and bm25.index.miner == BM25() and bm25.split == "test"
    assert frozen == Fused(searches=(searched(data), keyword))


def test_another_systems_run_has_no_baselines(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    (tmp_path / "run").write_text("q20 Q0 d20 1 1 x\n")
    card = Scorecard(evaluations=(Evaluate(search=TrecRun(path=str(tmp_path / "run")), data=data),))
    assert [t.kind for t in planned(card).trials] == ["augmented"]


def test_a_set_has_its_own_prefixes(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "set")))
    encoder = Encoder(model="a/b", revision="0" * 40, query_prefix="q: ", doc_prefix="p: ")
    card = judge({"one": data, "two": data}, Dense(encoder=encoder), prefixes={"two": ("ask: ", "")})
    one, two = (each.search.index.miner.encoder for each in card.evaluations)
    assert (one.query_prefix, one.doc_prefix) == ("q: ", "p: ")
    assert (two.query_prefix, two.doc_prefix) == ("ask: ", "") and two.model == encoder.model
    assert judge({"one": data}, BM25(), prefixes={"one": ("a", "b")}) == judge({"one": data}, BM25())
    with pytest.raises(ConfigError, match="prefixes for 'three', which is not a data set; allowed: one, two"):
        judge({"one": data, "two": data}, Dense(encoder=encoder), prefixes={"three": ("", "")})
