"""Training: Ray Train with two workers, one worker's determinism, the batches, and what the folder holds afterwards."""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.losses.kl import KL
from dagr_ray.quickstart import models
from dagr_ray.stages.dev_split import DevSplit
from dagr_ray.training import texts
from dagr_ray.training.batches import ExampleRow, margins, plan, repeats, rows_of, split_rows
from dagr_ray.training.texts import Examples
from tests.support.toys import HERE, TWO, Toy, distance, small, toy_train, weights

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("one_thread")]


class Watched(InfoNCE):
    """Writes down with how many threads it is computed."""

    type: ClassVar[str] = "watched"
    log: str

    def value(self, batch):
        Path(self.log).write_text(str(torch.get_num_threads()))
        return super().value(batch)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The toy trained in this process."""
    return materialize(toy_train(), str(tmp_path_factory.mktemp("here")), HERE)


def test_the_folder_holds_a_model_that_opens(tmp_path):
    from sentence_transformers import SentenceTransformer

    made = materialize(toy_train(Toy(n=8), base=small(layers=None)), str(tmp_path), HERE)
    opened = SentenceTransformer(made.local_path("model"))
    assert opened.encode(["a query"], show_progress_bar=False).shape == (1, 384)
    assert opened.max_seq_length == 64, "the encoder's own length, not that of training"
    card = (made.read_bytes("model/README.md") or b"").decode()
    assert made.manifest["fingerprint"] in card and "toy" in card and "batch_size: 16" in card
    assert "loss: type info-nce, weight 1.0, temperature 0.05" in card
    counts = made.manifest["counts"]
    said = f"{counts['effective_negatives']['info-nce']:.2f} by info-nce; padding: {counts['padding']:.1%} of the"
    assert f"* effective negatives of a query: {said} computed tokens" in card
    assert {"model/model.safetensors", "model/README.md", "model/modules.json"} <= set(made.manifest["files"])
    assert not [name for name in made.listing("model") if name.endswith((".bin", ".pt"))]
    assert made.damaged(deep=True) == {}
    for name in ("ray", "checkpoints"):
        assert made.fs.get_file_info(f"{made.path}/{name}").type.name == "NotFound", name


def test_it_learns_and_says_so(here):
    counts, cost = here.manifest["counts"], here.manifest["cost"]
    assert (counts["examples"], counts["steps"], counts["negatives"], cost["samples"]) == (64, 4, 1.0, 64)
    assert 0 <= counts["padding"] < 0.1 and 16 < counts["effective_negatives"]["info-nce"] <= 31
    loss = [row["value"] for row in here.read("metrics").to_pylist()]
    assert [row["measure"] for row in here.read("metrics").to_pylist()] == ["loss@4"]
    assert 0 < loss[-1] < 10
    assert 1e-6 < distance(weights(here.path), weights_of_base(here)) < 1e-2


def weights_of_base(like):
    from safetensors.numpy import load_file

    every = load_file(f"{models.minilm()}/model.safetensors")
    return {name: every[name] for name in weights(like.path)}


def test_same_seed_same_weights(here, tmp_path):
    again = materialize(toy_train(), str(tmp_path), HERE)
    assert distance(weights(here.path), weights(again.path)) == 0
    other = materialize(toy_train(seed=1), str(tmp_path), HERE)
    assert distance(weights(here.path), weights(other.path)) > 1e-6


def test_two_workers_are_one_worker(here, tmp_path):
    """Shared batches, gathered negatives, added gradients: the same steps (sentence-transformers #3453, #3862)."""
    connect()
    two = materialize(toy_train(), str(tmp_path), TWO)
    ours, theirs = here.manifest["counts"], two.manifest["counts"]
    assert {**ours, "padding": 0} == {**theirs, "padding": 0}
    for one, other in zip(here.read("metrics").to_pylist(), two.read("metrics").to_pylist(), strict=True):
        assert one["measure"] == other["measure"] and one["value"] == pytest.approx(other["value"], abs=1e-5)
    # Adam divides by the root of tiny squares, so rounding is enlarged: steps are 2e-5 wide, four of them 6e-5
    ours, theirs, base = weights(here.path), weights(two.path), weights_of_base(here)
    assert distance(ours, theirs) < 2e-5
    mean = np.mean([np.abs(ours[name] - theirs[name]).mean() for name in ours])
    assert mean < 0.02 * np.mean([np.abs(ours[name] - base[name]).mean() for name in ours])
    assert two.fs.get_file_info(f"{two.path}/ray").type.name == "NotFound"


@pytest.mark.parametrize(("cpus", "threads"), [(1.8, "2"), (0.9, "1")])
def test_a_worker_has_as_many_threads_as_its_cpus_are_rounded(tmp_path, cpus, threads):
    connect()
    toy = toy_train(Toy(n=8), batch_size=8, losses=(Watched(log=str(tmp_path / "log")),))
    materialize(toy, str(tmp_path / "runs"), Placement(train=Pool(workers=1, cpus=cpus)))
    assert (tmp_path / "log").read_text() == threads


def test_fewer_negatives_and_none_are_fine(tmp_path):
    short = materialize(toy_train(Toy(n=16, negatives=(2, 1, 0)), batch_size=8), str(tmp_path), HERE)
    assert short.manifest["counts"]["negatives"] == 17 / 16
    none = materialize(toy_train(Toy(n=5, negatives=(0,)), epochs=2), str(tmp_path), HERE)
    assert none.manifest["counts"]["steps"] == 2 and none.manifest["cost"]["samples"] == 10


def test_a_training_continues_another_for_some_steps(here, tmp_path):
    runs = here.runs
    more = materialize(toy_train(start=toy_train(), steps=2, lr=1e-5, schedule="constant"), runs, HERE)
    assert more.manifest["counts"]["steps"] == 2
    assert 0 < distance(weights(more.path), weights(here.path)) < distance(weights(more.path), weights_of_base(here))


def test_mistakes_are_one_line_before_anything_starts(tmp_path):
    def message(**fields):
        with pytest.raises(ConfigError) as caught:
            materialize(toy_train(**fields), str(tmp_path), HERE)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no rows" in message(toy=Toy(n=0))
    assert "kl needs a score for every positive" in message(toy=Toy(n=8), losses=(KL(),))
    assert "kl compares scores" in message(toy=Toy(n=8, negatives=(1, 0), scored=True), losses=(KL(),))
    assert "curriculum needs a score" in message(toy=Toy(n=8), curriculum=True)
    for says, fields in {
        "needs a dev set": {"patience": 2},
        "a kind occurs twice": {"losses": (InfoNCE(), InfoNCE(weight=2))},
        "is not a training of the same base": {"start": toy_train(base=small(max_length=32))},
    }.items():
        with pytest.raises(ValueError, match=says):
            toy_train(**fields)


# -- the dev set ------------------------------------------------------------------------------------------------------


def test_the_best_step_is_kept_and_may_be_the_base(tmp_path):
    toy = Toy(n=40, dev=16)
    made = materialize(toy_train(toy, dev=toy, eval_every=1, epochs=3, lr=1e-4), str(tmp_path), HERE)
    by_step = {
        int(row["measure"].rpartition("@")[2]): row["value"]
        for row in made.read("metrics").to_pylist()
        if row["split"] == "dev"
    }
    best = made.manifest["counts"]["best_step"]
    assert sorted(by_step) == list(range(7)) and by_step[best] == max(by_step.values()) and best > 0
    short = materialize(
        toy_train(toy, dev=toy, eval_every=1, steps=best, lr=1e-4, schedule="constant"), str(tmp_path), HERE
    )
    assert short.manifest["counts"]["steps"] == best

    ruin = toy_train(toy, dev=toy, eval_every=2, patience=1, epochs=5, lr=0.5)
    broken = materialize(ruin, str(tmp_path), HERE)
    assert broken.manifest["counts"]["best_step"] == 0, "the base is better than what a rate of 0.5 leaves of it"
    assert broken.manifest["counts"]["steps"] == 2, "one evaluation without a better one ends it"
    assert distance(weights(broken.path), weights_of_base(broken)) == 0
    assert "this is the base as it was" in (broken.read_bytes("model/README.md") or b"").decode()


def test_a_dev_set_that_asks_about_training_passages_is_refused(tmp_path):
    leaking = Toy(n=16, dev=8, negatives=(1,))
    with pytest.raises(ConfigError, match="8 of its passages are positives of the training, such as 'd1.*DevSplit"):
        materialize(toy_train(Toy(n=16), dev=leaking), str(tmp_path), HERE)


def test_examples_are_split_by_passage(tmp_path):
    toy = Toy(n=60)
    split = DevSplit(examples=toy, queries=toy, corpus=toy, share=0.3, distractors=5)
    made = materialize(split, str(tmp_path))
    train, dev = (
        set(made.read(t, [c])[c].to_pylist()) for t, c in (("examples", "positive_id"), ("qrels.dev", "doc_id"))
    )
    assert not train & dev and len(train | dev) == 60 and 8 < len(dev) < 30
    corpus = set(made.read("corpus")["doc_id"].to_pylist())
    assert dev <= corpus and len(corpus) <= 2 * len(dev) + 5
    trained = materialize(toy_train(split, queries=toy, corpus=toy, dev=split, steps=1), str(tmp_path), HERE)
    assert trained.manifest["counts"]["examples"] == len(train)
    with pytest.raises(ConfigError, match="use another share"):
        materialize(split.model_copy(update={"share": 1e-6}), str(tmp_path))


# -- texts and batches ------------------------------------------------------------------------------------------------


def read(data):
    """The examples of a training as texts."""
    found = rows_of(data.examples, range(len(data.examples)))
    one = lambda texts, i: texts.read([i])[0]  # noqa: E731
    return [
        (one(data.queries, r.query), one(data.passages, r.positive), [one(data.passages, n) for n in r.negatives])
        for r in found
    ]


def test_batches_do_not_depend_on_ids_or_row_order(tmp_path):
    found = []
    for shuffled in (None, 1, 2):
        folder = materialize(Toy(n=40, negatives=(2, 1), scored=True, shuffled=shuffled), str(tmp_path))
        data = texts.fetch(folder, folder, folder)
        batches = plan(data.examples, data.passages.bytes, 8, 2, seed=0)
        found.append((read(data), [b.tolist() for b in batches], data.examples.negative_scores.tolist()))
        data.remove()
    assert found[0] == found[1] == found[2]
    asked, positive, negatives = found[0][0][0]
    number = re.search(r"(\d+)$", asked)[1]
    assert positive.startswith(f"number {number} ") and len(negatives) == (2, 1)[int(number) % 2]


def test_a_corpus_is_read_in_ranges_without_missing_passages(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ROWS", 7)
    toy = Toy(n=40)
    folder = materialize(toy, str(tmp_path))
    data = texts.fetch(folder, folder, folder)
    said = {f"number {r['title'].split()[1]} {r['text']}" for r in toy.rows()["corpus"]}
    assert {positive for _, positive, _ in read(data)} == said
    data.remove()
    other = materialize(Toy(n=30), str(tmp_path))
    with pytest.raises(AssertionError, match="10 ids of the examples are not in corpus"):
        texts.fetch(folder, folder, other)


def dense(passages, each, negatives=0):
    n = passages * each
    own = [[(i + 1 + k) % passages for k in range(negatives)] for i in range(n)]
    flat = np.array([p for row in own for p in row], np.int32)
    score = np.linspace(0, 1, n, dtype=np.float32)
    scores = np.zeros(len(flat), np.float32)
    made = Examples(np.arange(n), np.arange(n) % passages, flat, np.arange(n + 1) * negatives, score, scores)
    return made, np.array([5 * (i % 9) for i in range(passages)])


def test_every_example_is_seen_once_in_every_epoch():
    examples, length = dense(100, 1)
    batches = plan(examples, length, 32, 3, seed=0)
    assert len(batches) == 12 and sorted(map(len, batches)) == [4] * 3 + [32] * 9
    for epoch in range(3):
        assert sorted(np.concatenate(batches[epoch * 4 : epoch * 4 + 4])) == list(range(100))
    same, other = (plan(examples, length, 32, 3, seed=s) for s in (0, 1))
    assert [b.tolist() for b in batches] == [b.tolist() for b in same] != [b.tolist() for b in other]


def test_no_batch_repeats_a_passage_if_possible():
    examples, length = dense(64, 8)
    assert repeats(examples, plan(examples, length, 16, 2, seed=0)) == 0
    assert repeats(examples, [np.arange(0, 512, 64)]) == 7, "the measure sees what it is for"
    crowded, length = dense(4, 8)
    batches = plan(crowded, length, 8, 1, seed=0)
    assert [len(b) for b in batches] == [8] * 4, "four passages cannot fill a batch of eight: full batches all the same"


def test_cut_parts_rows_that_share_a_text():
    rows = [ExampleRow(0, 0, (9,)), ExampleRow(1, 0, (8,)), ExampleRow(2, 9, (7,)), ExampleRow(3, 3, (6,))]
    assert split_rows(rows, 2) == [[0, 3], [1, 2]]


def test_a_curriculum_goes_from_easy_to_hard():
    examples, length = dense(512, 1, negatives=2)
    easy = margins(examples)
    batches = plan(examples, length, 16, 1, seed=0, curriculum=True)
    mean = [easy[b].mean() for b in batches]
    assert np.mean(mean[:8]) > np.mean(mean[8:16]) > np.mean(mean[-8:])
    assert sorted(np.concatenate(batches)) == list(range(512))
    assert abs(np.mean([easy[b].mean() for b in plan(examples, length, 16, 1, seed=0)][:8]) - 0.5) < 0.1


def test_what_costs_only_memory_is_no_other_training():
    assert toy_train(gradient_checkpointing=True).fingerprint() == toy_train().fingerprint()
    assert Placement(train=Pool(fsdp=True)).train.checkpoint_every == 200
