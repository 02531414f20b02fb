"""Duplicates over a whole data set: what is found, that neither order nor shards matter, and what it costs to decide anew."""

import random
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.filters import duplicate
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.leakage import minhash
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select

WORDS = [f"{a}{b}" for a in "stone river lamp cloud paper glass iron wool".split() for b in range(40)]


def made(rows, seed=0):
    """(id, text): random texts of 6 to 12 words, then near copies of the first tenth of them."""
    rng = random.Random(seed)
    texts = [rng.choices(WORDS, k=rng.randint(6, 12)) for _ in range(rows)]
    near = [[*text[:3], "other", *text[3:]] for text in texts[: rows // 10]]
    return [(f"q{i}", " ".join(text)) for i, text in enumerate([*texts, *near])]


def table(rows):
    return tables.table("queries", [{"query_id": i, "text": text} for i, text in rows])


def scored(kind, rows, part=None):
    parts = [table(rows[i : i + (part or len(rows))]) for i in range(0, len(rows), part or len(rows))]
    found = kind.score_stream(lambda: parts, len(rows))
    return dict(zip((i for i, _ in rows), found.tolist(), strict=True))


def jaccard(a, b):
    a, b = set(a.split()), set(b.split())
    return len(a & b) / len(a | b)


def test_minhash_scores_are_exact_similarities_to_earlier_rows():
    rows = made(300)
    scores = scored(Duplicate(by="minhash", bands=40, rows=3), rows)
    drawn = dict(zip((i for i, _ in rows), minhash.hash_texts(table(rows)["query_id"]).tolist(), strict=True))
    found = 0
    for i, text in rows:
        before = [jaccard(text, other) for j, other in rows if drawn[j] < drawn[i]]
        best = max(before, default=0.0)
        assert scores[i] <= best + 1e-6, "a similarity that no earlier query has"
        if best >= 0.8:
            found += 1
            assert scores[i] == pytest.approx(best)
    assert found >= 25


def test_kept_queries_differ_and_rejected_ones_have_a_twin():
    rows = made(400, seed=3)
    kind = Duplicate(by="minhash")
    scores = scored(kind, rows)
    kept = [text for i, text in rows if kind.keep(scores[i]) is None]
    assert len(kept) == 400
    assert max(jaccard(a, b) for n, a in enumerate(kept) for b in kept[:n]) < 0.8


@pytest.mark.parametrize("by", ["exact", "normalised", "minhash"])
def test_neither_order_nor_parts_matter(by, monkeypatch):
    rows = made(500) + [(f"copy{i}", text.upper() + " ?") for i, (_, text) in enumerate(made(40))]
    whole = scored(Duplicate(by=by), rows)
    shuffled = random.Random(1).sample(rows, len(rows))
    monkeypatch.setattr(duplicate, "BATCH", 64)
    monkeypatch.setattr(duplicate, "RECORDS", 16)
    monkeypatch.setattr(duplicate, "WORDS", 200)
    # many files, so that groups come from several
    monkeypatch.setattr(minhash, "Spill", partial(minhash.Spill, part_rows=100))
    assert scored(Duplicate(by=by), shuffled, part=77) == whole
    assert sum(score >= 1 for score in whole.values()) == (0 if by == "exact" else 44)


def test_words_differ_as_people_see_them():
    same = ["Copy a dict?", "copy  A   dict", "copy-a-dict!", " copy a dict"]
    others = ["copy a dic t", "copya dict", "copy dict a", "copy a dict a", "COPY", "", "??", "!!"]
    whole = minhash.split_words(pa.array(same + others)).whole
    assert len(set(whole[:4])) == 1 and len(set(whole)) == 1 + len(others)
    greek = minhash.split_words(
        pa.array(["ΟΔΟΣ μας", "οδος ΜΑΣ", "straße weit", "STRASSE  weit", "ｆｕｌｌ width", "full width"])
    ).whole
    assert whole.dtype == np.uint64 and greek[0] == greek[1] and greek[2] == greek[3] and greek[4] == greek[5]
    assert len(minhash.split_words(pa.array(["量子計算"])).hashes) == 2, "words of Chinese stand without spaces"
    bags = minhash.split_words(pa.array(["a b b", "b a b", "a a b", "a b"])).bags()
    assert bags[0] == bags[1] and len(set(bags)) == 3


def test_repeated_keys_are_all_found():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, 5000, dtype=np.uint64)
    keys[100:300] = keys[1100:1300]
    some = set(minhash.find_repeated(keys).tolist())
    assert set(range(100, 300)) | set(range(1100, 1300)) <= some and len(some) < 450
    assert len(minhash.find_repeated(keys[:0])) == 0


def test_embedding_finds_the_same_meaning_in_other_words():
    encoder = Encoder(model=str(minilm()), max_length=32)
    kind = Duplicate(by="embedding", encoder=encoder, similarity=0.8)
    texts = {
        "q1": "how do I sort a list in reverse order",
        "q2": "sorting a list in descending order, how?",
        "q3": "what is the capital of France",
        "q4": "HOW do I sort a list in reverse order?",
        "q5": "parse a date from a string",
    }
    scores = scored(kind, list(texts.items()))
    refused = [i for i in texts if kind.keep(scores[i])]
    assert len(refused) == 2 and set(refused) < {"q1", "q2", "q4"}
    turned = scored(kind, list(texts.items())[::-1], part=2)
    assert turned == pytest.approx(scores, abs=0.02) and [i for i in texts if kind.keep(turned[i])] == refused


def test_clusters_find_near_vectors(monkeypatch):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(3000, 32)).astype(np.float32)
    vectors[2000:] = vectors[:1000] + 0.05 * rng.normal(size=(1000, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    monkeypatch.setattr(duplicate, "CLUSTER", 200)
    rows = [(f"q{i}", f"text {i}") for i in range(3000)]
    monkeypatch.setattr(duplicate, "load", lambda encoder: None)
    monkeypatch.setattr(
        duplicate._Work, "_encode", lambda self, fresh, queries, encoder: vectors[fresh].astype(np.float16)
    )
    scores = scored(Duplicate(by="embedding", encoder=Encoder(model="m")), rows)
    found = sum(max(scores[f"q{i}"], scores[f"q{i + 2000}"]) > 0.95 for i in range(1000))
    assert found >= 980 and sum(score > 0.95 for score in scores.values()) == found


# -- in a selection ---------------------------------------------------------------------------------------------------


class Written(Stage):
    """Queries in shards of 50, two of them with two passages each where ``double``."""

    type: ClassVar[str] = "written-queries"
    rows: int = 300
    double: bool = False
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage")

    def size(self, inputs):
        return len(made(self.rows))

    def open(self, inputs, folder, pool):
        def run(start, stop):
            some = made(self.rows)[start:stop]
            pairs = [(i, "d0") for i, _ in some] + ([(some[0][0], "d1")] if self.double else [])
            of = [
                dict(zip(tables.schema("lineage").names, (i, "g", "d0", "s", "e", "m"), strict=True)) for i, _ in some
            ]
            qrels = [{"query_id": i, "doc_id": d, "relevance": 1} for i, d in pairs]
            return Output(
                {"queries": table(some), "qrels": tables.table("qrels", qrels), "lineage": tables.table("lineage", of)}
            )

        return run


class Nothing(Stage):
    """A corpus without passages: the filter looks at none."""

    type: ClassVar[str] = "no-passages"
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)

    def open(self, inputs, folder, pool):
        return lambda start, stop: Output({"corpus": tables.empty("corpus")})


def selection(similarity, double=False):
    queries = Written(double=double)
    score = Score(parsed=queries, corpus=Nothing(), filter=Duplicate(by="minhash", similarity=similarity))
    return Select(parsed=queries, scores=(score,))


@pytest.mark.parametrize("double", [False, True])
def test_shards_of_scores_are_cut_from_one_pass(tmp_path, double):
    placement = Placement(light=Pool(shard_rows=50))
    states = []
    folder = materialize(selection(0.8, double), str(tmp_path), placement)
    assert folder.count("queries") == 300
    assert folder.read("rejected")["reason"].unique().to_pylist() == ["near-duplicate"]
    score = selection(0.8, double).scores[0].folder(str(tmp_path))
    assert len(score.manifest["tables"]["scores"]["parts"]) > 3
    alone = scored(Duplicate(by="minhash"), made(300))
    rows = score.read("scores").to_pylist()
    assert len(rows) == 330 + 7 * double and all(row["score"] == np.float32(alone[row["query_id"]]) for row in rows)
    again = selection(0.99, double)
    loose = materialize(again, str(tmp_path), placement, lambda p: states.append((p.stage.type, p.state)))
    assert loose.count("queries") == 330
    assert {state for kind, state in states if kind in ("whole", "score")} == {"cached"}


def test_only_embeddings_need_an_encoder():
    with pytest.raises(ValueError, match="give an encoder"):
        Duplicate(by="embedding")
    with pytest.raises(ValueError, match="remove encoder"):
        Duplicate(encoder=Encoder(model="m"))
