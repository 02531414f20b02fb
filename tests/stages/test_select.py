"""Scoring shard by shard and selecting the best: rows stand where they stood, sizes do not matter, thresholds are free."""

import math
from typing import ClassVar

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.engines import Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.filters import Filter, ScoredQuery
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.diversity import Diversity, facility, hashed, k_centre
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.logprob import Logprob
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.teacher import Teacher
from dagr_ray.quickstart import models
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.mask_pii import Mask
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.stages.test_select_mine import FixedTables, corpus, parsed, search

ROWS = 60


class Parts(Stage):
    """Queries in several parts, some of them empty: query i is for passage i % 7, in an order that may differ."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "given-parts"
    part: int = 10
    backwards: bool = False
    generations: Stage | None = None

    def size(self, inputs):
        return ROWS

    def ranges(self, inputs, step):
        return [(i, min(i + self.part, ROWS)) for i in range(0, ROWS, self.part)] + [(ROWS, ROWS)]

    def open(self, inputs, folder, pool):
        def run(start, stop):
            names = [f"q{ROWS - 1 - i if self.backwards else i}" for i in range(start, stop) if i // 10 != 2]
            docs = [f"d{int(name[1:]) % 7}" for name in names]
            return Output(
                {
                    "queries": tables.table("queries", ({"query_id": n, "text": text(n)} for n in names[::-1])),
                    "qrels": tables.columns("qrels", len(names), query_id=names, doc_id=docs, relevance=1),
                    "lineage": tables.columns(
                        "lineage",
                        len(names),
                        id=names,
                        gen_id=[f"g{n[1:]}" for n in names],
                        source_id=docs,
                        strategy=["typed/claim" if int(n[1:]) % 2 else "typed/question" for n in names],
                        engine="e",
                        model="m",
                    ),
                }
            )

        return run


def text(name):
    return " ".join("copy a dictionary of lists and tuples by value".split()[: int(name[1:]) % 9 + 1])


DOCS = corpus(*(f"passage {i} says copy a dictionary of lists and tuples by value" for i in range(9)))


@pytest.fixture
def build(tmp_path):
    def built(stage, shard_rows=None, where="runs"):
        pool = Pool(workers=0, shard_rows=shard_rows) if shard_rows else None
        placement = Placement(light=pool) if pool else Placement()
        return materialize(stage, str(tmp_path / where), placement)

    return built


def values(folder):
    return {(r["query_id"], r["doc_id"]): r["score"] for r in folder.read("scores").to_pylist()}


@pytest.mark.parametrize("kind", [Length(), Copied()])
def test_sharded_and_unsharded_selection_are_equal(build, kind):
    queries = Parts(part=4)
    whole = build(Score(parsed=queries, corpus=DOCS, filter=kind), 1000, "whole")
    shards = build(Score(parsed=queries, corpus=DOCS, filter=kind), 9, "shards")
    assert len(whole.manifest["tables"]["scores"]["parts"]) == 1
    assert len(shards.manifest["tables"]["scores"]["parts"]) > 5
    assert whole.read("scores").equals(shards.read("scores"))
    assert whole.read("scores")["query_id"].equals(build(queries).read("qrels")["query_id"])
    selected = Select(parsed=queries, scores=(Score(parsed=queries, corpus=DOCS, filter=kind),))
    one, many = build(selected, 1000, "whole"), build(selected, 9, "shards")
    for name in selected.outputs:
        assert one.read(name).equals(many.read(name)), name
    assert one.manifest["counts"] == many.manifest["counts"]
    assert 0 < one.count("queries") == one.count("lineage") < 50


def test_passages_are_found_in_any_order(build, monkeypatch):
    """Windows of two rows: the passages of a shard stand anywhere in the corpus, and one is read but once a shard."""
    monkeypatch.setattr("dagr_ray.core.joins.WINDOW", 2)
    expected = values(build(Score(parsed=Parts(), corpus=DOCS, filter=Copied()), 1000, "expected"))
    turned = FixedTables(rows={"corpus": DOCS.rows["corpus"][::-1]})
    assert values(build(Score(parsed=Parts(), corpus=turned, filter=Copied()), 9, "turned")) == expected
    assert values(build(Score(parsed=Parts(backwards=True), corpus=DOCS, filter=Copied()), 9, "back")).keys() <= {
        (f"q{i}", f"d{i % 7}") for i in range(ROWS)
    }
    missing = FixedTables(rows={"corpus": DOCS.rows["corpus"][1:]})
    with pytest.raises(AssertionError, match="1 rows of corpus are not in .*, such as d0"):
        build(Score(parsed=Parts(), corpus=missing, filter=Copied()), 9, "missing")


def generated(values):
    """Completions g0, g1, ... with a log-probability each."""
    names = tables.schema("generations").names
    rows = [
        {"gen_id": f"g{i}", "source_id": "d0", "sample": 0, "seed": 0, "prompt_sha": "", "truncated": False}
        for i in values
    ]
    return FixedTables(
        rows={
            "generations": tuple(
                tuple({**r, "logprob": values[int(r["gen_id"][1:])]}.get(n) for n in names) for r in rows
            )
        }
    )


def test_the_best_by_log_probability(build):
    """The cut is the same for any size of shard, exact where scores are equal, and made after the other filters."""
    source = generated({i: -float(i // 6) if i % 11 else None for i in range(ROWS)})
    queries = Parts(part=4, generations=source)

    def chosen(top, rows, where, filters=(), **more):
        score = Score(parsed=queries, corpus=DOCS, filter=Logprob(top=top, **more))
        first = tuple(Score(parsed=queries, corpus=DOCS, filter=f) for f in filters)
        return build(Select(parsed=queries, scores=(*first, score)), rows, where)

    there = [i for i in range(ROWS) if i // 10 != 2 and i % 11]
    for top in (1, 8, 20):
        one, many = chosen(top, 1000, "a"), chosen(top, 5, "b")
        ids = one.read("queries")["query_id"].to_pylist()
        assert sorted(ids) == sorted(many.read("queries")["query_id"].to_pylist())
        assert len(ids) == top
        kept = {int(i[1:]) // 6 for i in ids}
        assert all(there_too // 6 >= max(kept) for there_too in there if f"q{there_too}" not in ids)
    assert one.manifest["counts"]["rejected"]["logprob/no-logprob"] == 50 - len(there)
    assert one.manifest["counts"]["rejected"]["logprob/not-among-best"] == len(there) - 20
    smaller = set(chosen(8, 1000, "a").read("queries")["query_id"].to_pylist())
    assert smaller < set(ids)
    short = chosen(8, 7, "c", (Length(min_words=3),))
    assert short.count("queries") == 8, "so many of those that the filters before it keep"
    assert all(len(t.split()) >= 3 for t in short.read("queries")["text"].to_pylist())
    assert chosen(None, 1000, "d", top_share=0.5).count("queries") == round(0.5 * len(there))
    assert chosen(1000, 1000, "e").count("queries") == len(there)


def test_round_trip_keeps_a_share_and_knows_the_corpus(build):
    queries = parsed(*((f"ask {i}", f"d{i}") for i in range(8)))
    hits = search({f"q{i}": [("d8", 9.0)] * i + [(f"d{i}", 1.0)] for i in range(8)})
    scored = Score(parsed=queries, corpus=DOCS, filter=RoundTrip(), search=hits)

    def kept(**fields):
        stage = Select(parsed=queries, scores=(scored.model_copy(update={"filter": RoundTrip(**fields)}),))
        return build(stage).read("queries")["query_id"].to_pylist()

    assert kept(best_share=0.5) == ["q0", "q1", "q2", "q3"]
    assert kept(max_rank=2) == ["q0", "q1"]
    assert len(kept(max_rank="auto")) == 8, "nine passages are a small corpus"
    stage = Select(parsed=queries, scores=(scored.model_copy(update={"filter": RoundTrip(max_rank="auto")}),))
    assert [*stage.inputs()] == ["parsed", "scores.0", "scores.0.corpus"]
    large = FixedTables(rows={"corpus": tuple((f"d{i}", "", f"text {i}") for i in range(5000))})
    sized = Score(parsed=queries, corpus=large, filter=RoundTrip(max_rank="auto"), search=hits)
    assert build(Select(parsed=queries, scores=(sized,))).read("queries")["query_id"].to_pylist() == ["q0", "q1"]


def test_forms_have_their_own_threshold(build):
    queries = Parts()
    scored = Score(parsed=queries, corpus=DOCS, filter=Copied(n=1, max_share=0, by_form={"claim": 1.0}))
    kept = build(Select(parsed=queries, scores=(scored,)))
    assert {r["strategy"] for r in kept.read("lineage").to_pylist()} == {"typed/claim"}
    assert kept.count("queries") == 25


def test_the_first_of_several_rejections_counts(build):
    queries = parsed(("?", "d0"), ("copy a dict", "d1"), ("1. x", "d2"))
    scores = tuple(Score(parsed=queries, corpus=DOCS, filter=f) for f in (Length(min_words=3), Format()))
    for order, by in ((scores, "length"), (scores[::-1], "format")):
        folder = build(Select(parsed=queries, scores=order))
        assert folder.read("queries")["query_id"].to_pylist() == ["q1"]
        assert folder.read("rejected")["by"].to_pylist() == [by, by]


def test_a_teacher_of_one_stage(build):
    queries = parsed(("a", "d0"), ("b", "d1"), ("c", "d2"))
    labels = FixedTables(rows={"scores": (("q0", "d0", "t", 0.9), ("q0", "d3", "t", 0.95), ("q1", "d1", "t", 0.2))})
    scored = Score(parsed=queries, corpus=DOCS, filter=Teacher(min_score=0.5), labels=labels)
    assert build(Select(parsed=queries, scores=(scored,))).read("queries")["query_id"].to_pylist() == ["q0"]
    stored = build(scored).read("scores")["score"].to_pylist()
    assert stored[:2] == pytest.approx([0.9, 0.2]) and math.isnan(stored[2])
    margin = scored.model_copy(update={"filter": Teacher(by="margin")})
    assert margin.fingerprint() != scored.fingerprint()
    assert values(build(margin))["q0", "d0"] == pytest.approx(-0.05)
    for wrong in ({"labels": None}, {"search": search({})}):
        with pytest.raises(ValueError, match="(labels is not set|reads no search)"):
            Score(parsed=queries, corpus=DOCS, filter=Teacher(), **{"labels": labels, **wrong})


def test_scores_without_a_teacher_keep_their_fingerprints():
    score = Score(parsed=parsed(("a", "d0")), corpus=DOCS, filter=Length())
    assert "labels" not in score.identity()


# -- Diversity ------------------------------------------------------------------------------------------------------

TOPICS = ("copy a dict", "sort a list of tuples", "tall is the eiffel tower", "symptoms of a sprained ankle")
MANY = tuple(f"{how} {topic}" for topic in TOPICS for how in ("how", "what about", "how to", "please", "the", "why"))


@pytest.mark.parametrize("by", ["k-centre", "facility"])
def test_diversity_covers_and_nests(build, by):
    queries = parsed(*((text, "d0") for text in MANY))
    scored = Score(parsed=queries, corpus=DOCS, filter=Diversity(by=by))

    def kept(n, **more):
        stage = Select(parsed=queries, scores=(scored.model_copy(update={"filter": Diversity(by=by, n=n, **more)}),))
        return set(build(stage).read("queries")["text"].to_pylist())

    assert len(kept(4)) == 4
    assert all(any(topic in text for text in kept(4)) for topic in TOPICS), "one of each topic"
    assert kept(2) < kept(4) < kept(9) < kept(None) == set(MANY)
    assert len(kept(None, most=5)) == 5


@pytest.mark.parametrize("by", [k_centre, facility])
def test_greedy_is_greedy(by):
    """Each place against all alternatives, computed from the definition."""
    vectors = hashed(MANY)
    near = vectors @ vectors.T
    chosen = by(vectors, len(MANY))
    assert sorted(chosen) == list(range(len(MANY)))
    for place in range(1, 8):
        before = chosen[:place]
        left = [i for i in range(len(MANY)) if i not in before]
        if by is k_centre:
            value = {i: -near[i, before].max() for i in left}
        else:
            value = {i: near[:, [*before, i]].max(axis=1).clip(0).sum() for i in left}
        assert value[chosen[place]] == pytest.approx(max(value.values()), abs=1e-5)


def test_diversity_does_not_depend_on_the_order_of_the_rows():
    from tests.plugins.test_filters import rows

    given = rows(*MANY)
    scores = dict(zip((r.query_id for r in given), Diversity().score(given, None), strict=True))
    turned = dict(zip((r.query_id for r in given[::-1]), Diversity().score(given[::-1], None), strict=True))
    assert scores == turned


def test_every_filter_says_what_it_is():
    """A filter that reads another table has a place for it in Score."""
    from dagr_ray.core.config import plugins

    for kind in plugins(Filter).values():
        assert kind.reads in ("", "candidates", "scores", "generations")


def test_diversity_by_an_encoder():
    """Same meaning in other words: only an encoder knows that these are two topics, and the words say four."""
    texts = ("physician for children", "doctor who treats kids", "purchase an automobile", "buy a car")
    rows = [ScoredQuery(f"q{i}", each, "d0", "") for i, each in enumerate(texts)]
    encoder = Encoder(model=str(models.minilm()), max_length=16)
    for by in ("k-centre", "facility"):
        places = Diversity(by=by, encoder=encoder).score(rows, None)
        first = {i // 2 for i, place in enumerate(places) if place < 2}
        assert first == {0, 1}, by


def test_completions_are_those_of_the_queries(tmp_path):
    """Through Parse, and through a selection of it; an engine that tells no probabilities leaves nothing to keep."""

    def build(stage):
        return materialize(stage, str(tmp_path / "runs"), Placement(generate=Pool(workers=0, shard_rows=8)))

    docs = Mask(corpus=Beir(path=str(tiny_beir(tmp_path / "set", docs=30))))
    raw = Generate(corpus=docs, strategy=Crop(), engine=CropEngine(), sampling=Sampling(logprob=True))
    queries = Parse(generations=raw, corpus=docs)
    chosen = Select(parsed=queries, scores=(Score(parsed=queries, corpus=docs, filter=Length(max_words=12)),))
    untold = Parse(generations=Generate(corpus=docs, strategy=Crop(), engine=CropEngine()), corpus=docs)
    with pytest.raises(ValueError, match=r"have no log-probabilities, .*Sampling\(logprob=True\)"):
        Score(parsed=untold, corpus=docs, filter=Logprob())
    for source in (queries, chosen):
        scored = Score(parsed=source, corpus=docs, filter=Logprob())
        assert scored.inputs()["generations"].fingerprint() == raw.fingerprint()
        folder = build(Select(parsed=source, scores=(scored,)))
        assert folder.manifest["counts"]["rejected"] == {"logprob/no-logprob": build(source).count("queries")}
    with pytest.raises(ValueError, match="was not parsed from completions, but 'logprob' reads them"):
        Score(parsed=parsed(("a", "d0")), corpus=DOCS, filter=Logprob())
