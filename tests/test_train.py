"""Training: Ray Train with two workers, one worker's determinism, the batches, and what the folder holds afterwards."""

import random
from typing import ClassVar

import numpy as np
import pytest

from dagr_ray import models, tables
from dagr_ray.cluster import Placement, Pool, connect
from dagr_ray.config import ConfigError
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Output, Stage, materialize
from dagr_ray.stages.train import Train, _cut, _Example, _plan, _repeats, _Texts

WORDS = (
    "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh north ocean pine quay river".split()
)
HERE = Placement(train=Pool(workers=0))
TWO = Placement(train=Pool(workers=2, cpus=1))


class Toy(Stage):
    """``n`` passages of random words, a query for each, ``negatives`` others as its negatives."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "examples")
    n: int = 64
    negatives: tuple[int, ...] = (1,)

    def open(self, inputs, folder, pool):
        def run(start, stop):
            rng, rows = random.Random(0), {name: [] for name in self.outputs}
            for i in range(self.n):
                text = " ".join(rng.choices(WORDS, k=rng.randint(4, 24)))
                others = [f"d{(i * 7 + 3 + k) % self.n}" for k in range(self.negatives[i % len(self.negatives)])]
                rows["corpus"].append({"doc_id": f"d{i}", "title": f"number {i}", "text": text})
                rows["queries"].append({"query_id": f"q{i}", "text": f"where is {text.split()[0]} {i}"})
                rows["examples"].append({"query_id": f"q{i}", "positive_id": f"d{i}", "negative_ids": others})
            return Output({name: tables.table(name, values) for name, values in rows.items()})

        return run


def toy_train(toy=None, **fields):
    toy = toy or Toy()
    base = Encoder(model=str(models.minilm()), max_length=64, dtype="float32")
    return Train(
        **{"examples": toy, "queries": toy, "corpus": toy, "base": base, "batch_size": 16, "max_length": 32} | fields
    )


def weights(path):
    from safetensors.numpy import load_file

    return load_file(f"{path}/model/model.safetensors")


def distance(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What one Ray worker of one core has; threads that wait for a busy second core make a step ten times as long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The toy trained in this process."""
    return materialize(toy_train(), str(tmp_path_factory.mktemp("here")), HERE)


def test_the_folder_holds_a_model_that_opens(here):
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(here.local_path("model"))
    assert opened.encode(["a query"], show_progress_bar=False).shape == (1, 384)
    assert opened.max_seq_length == 64, "the encoder's own length, not that of training"
    card = (here.read_bytes("model/README.md") or b"").decode()
    assert here.manifest["fingerprint"] in card and "toy" in card and "batch_size: 16" in card
    assert {"model/model.safetensors", "model/README.md", "model/modules.json"} <= set(here.manifest["files"])
    assert not [name for name in here.listing("model") if name.endswith((".bin", ".pt"))]
    assert here.damaged(deep=True) == {}
    assert here.fs.get_file_info(f"{here.path}/ray").type.name == "NotFound", "Ray Train's own folder is cleared"


def test_it_learns_and_says_so(here):
    counts, cost = here.manifest["counts"], here.manifest["cost"]
    assert (counts["examples"], counts["steps"], counts["negatives"], cost["samples"]) == (64, 4, 1.0, 64)
    loss = [row["value"] for row in here.read("metrics").to_pylist()]
    assert [row["measure"] for row in here.read("metrics").to_pylist()] == ["loss@4"]
    assert 0 < loss[-1] < 10
    moved = distance(weights(here.path), weights_of_base())
    assert 1e-6 < moved < 1e-2


def weights_of_base():
    from safetensors.numpy import load_file

    return load_file(f"{models.minilm()}/model.safetensors")


def test_same_seed_same_weights(here, tmp_path):
    again = materialize(toy_train(), str(tmp_path), HERE)
    assert distance(weights(here.path), weights(again.path)) == 0
    other = materialize(toy_train(seed=1), str(tmp_path), HERE)
    assert distance(weights(here.path), weights(other.path)) > 1e-6


def test_two_workers_are_one_worker(here, tmp_path):
    """Shared batches, gathered negatives, averaged gradients: the same steps (sentence-transformers #3453, #3862)."""
    connect()
    two = materialize(toy_train(), str(tmp_path), TWO)
    assert two.manifest["counts"] == here.manifest["counts"]
    # Adam divides by the root of tiny squares, so rounding is enlarged: steps are 2e-5 wide, four of them 6e-5
    ours, theirs = weights(here.path), weights(two.path)
    assert distance(ours, theirs) < 2e-5
    mean = np.mean([np.abs(ours[name] - theirs[name]).mean() for name in ours])
    assert mean < 0.02 * np.mean(
        [np.abs(ours[name] - value).mean() for name, value in weights_of_base().items() if name in ours]
    )
    assert two.fs.get_file_info(f"{two.path}/ray").type.name == "NotFound"


def test_fewer_negatives_are_filled_up_and_none_is_fine(tmp_path):
    short = materialize(toy_train(Toy(n=16, negatives=(2, 1)), batch_size=8), str(tmp_path), HERE)
    assert short.manifest["counts"]["negatives"] == 1.5
    none = materialize(toy_train(Toy(n=5, negatives=(0,)), epochs=2), str(tmp_path), HERE)
    assert none.manifest["counts"]["steps"] == 2 and none.manifest["cost"]["samples"] == 10


def test_mistakes_are_one_line_before_anything_starts(tmp_path):
    def message(stage, placement=HERE):
        with pytest.raises(ConfigError) as caught:
            materialize(stage, str(tmp_path), placement)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no rows" in message(toy_train(Toy(n=0)))
    assert "rows with negatives and rows without" in message(toy_train(Toy(n=8, negatives=(1, 0))))
    assert "batch_size = 15 cannot be shared by 2 workers" in message(toy_train(batch_size=15), TWO)


# -- batches --------------------------------------------------------------------------------------------------------


def dense(passages, each, negatives=0):
    examples = [
        _Example(i, i % passages, tuple((i + 1 + k) % passages for k in range(negatives)))
        for i in range(passages * each)
    ]
    return _Texts([str(i) for i in range(len(examples))], ["word " * (i % 9) for i in range(passages)], examples)


def test_every_example_is_seen_in_every_epoch():
    texts = dense(100, 1)
    order = _plan(texts, 32, 3, seed=0)
    assert len(order) == 3 * 128
    for epoch in range(3):
        assert set(order[epoch * 128 : (epoch + 1) * 128]) == set(range(100))
    assert order == _plan(texts, 32, 3, seed=0) != _plan(texts, 32, 3, seed=1)


def test_no_batch_has_a_passage_twice_where_that_can_be():
    texts = dense(64, 8)
    assert _repeats(texts, _plan(texts, 16, 2, seed=0), 16) == 0
    assert _repeats(texts, list(range(0, 512, 64)) + list(range(8)), 16) > 0, "the measure sees what it is for"
    crowded = dense(4, 8)
    assert len(_plan(crowded, 8, 1, seed=0)) == 32, (
        "four passages cannot fill a batch of eight: full batches all the same"
    )


def test_cut_parts_rows_that_share_a_text():
    examples = [_Example(0, 0, (9,)), _Example(1, 0, (8,)), _Example(2, 9, (7,)), _Example(3, 3, (6,))]
    first, second = _cut(examples, [0, 1, 2, 3], 2)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert first == [0, 3] and second == [1, 2]
