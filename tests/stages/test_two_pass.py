"""A retriever that has learnt looks again: at the queries (Promptagator's two passes), or for negatives (ANCE's rounds)."""

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import walk
from dagr_ray.filters.length import Length
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.quickstart import models
from dagr_ray.recipes.augmentation import own_round_trip
from dagr_ray.recipes.ladder import refreshed
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.train import Train
from tests.stages.test_select_mine import corpus, parsed

pytestmark = pytest.mark.slow

# A word that stands for a thing nowhere but in these queries: only a retriever that has learnt from them knows it.
NAMES = {
    "zorb": "kettle",
    "quin": "violin",
    "blat": "glacier",
    "drix": "passport",
    "flom": "beehive",
    "gant": "telescope",
}
FORMS = ("where is the {}", "price of a {}", "{} for children", "old {} value")
HERE = Placement(train=Pool(workers=0), retrieve=Pool(workers=0))


def test_the_retriever_was_trained_on_the_queries(tmp_path):
    docs = corpus(*(f"All that there is to know on the {thing}." for thing in NAMES.values()))
    queries = parsed(*((form.format(name), f"d{i}") for form in FORMS for i, name in enumerate(NAMES)))
    base = Encoder(model=str(models.minilm()), max_length=16, dtype="float32", layers=1)
    search = own_round_trip(queries, docs, base, batch_size=6, epochs=5, lr=1e-3, max_length=16)
    assert search.index.trained.queries.fingerprint() == queries.fingerprint()

    def kept(found_by):
        scored = Score(parsed=queries, corpus=docs, filter=RoundTrip(max_rank=1), search=found_by)
        return materialize(Select(parsed=queries, scores=(scored,)), str(tmp_path), HERE).count("queries")

    frozen = search.model_copy(update={"index": search.index.model_copy(update={"trained": None})})
    assert kept(frozen) < 12 < 20 < kept(search), "of 24"

    rounds = refreshed(
        queries, docs, base, rounds=2, steps=8, negatives=1, margin=None, batch_size=6, lr=1e-3, max_length=16, seed=3
    )
    first, second = rounds.start, rounds
    assert isinstance(first, Train) and first.start is None and (first.seed, second.seed) == (3, 4)
    folder = materialize(rounds, str(tmp_path), HERE)
    examples = [each.examples.folder(str(tmp_path)).read("examples") for each in (first, second)]
    before, after = ({name: table[name].to_pylist() for name in ("query_id", "negative_ids")} for table in examples)
    assert before["query_id"] == after["query_id"] and before["negative_ids"] != after["negative_ids"], "mined anew"
    losses = [each.folder(str(tmp_path)).read("metrics")["value"].to_pylist() for each in (first, second)]
    assert losses[1][-1] < losses[0][0] and folder.manifest["counts"]["steps"] == 8

    cheap = Select(parsed=queries, scores=(Score(parsed=queries, corpus=docs, filter=Length()),))
    taught = own_round_trip(queries, docs, base, taught_by=cheap)
    assert cheap.fingerprint() in {stage.fingerprint() for stage in walk(taught)}
