"""Models as they come: the vectors are the library's own, whatever the folder holds; what cannot be read is refused."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.miners.dense import DenseIndex
from dagr_ray.retrieval import encoder as encoders
from dagr_ray.retrieval.encoder import TASKS, Encoder, load
from dagr_ray.retrieval.vectors import VectorIndex
from tests.support.model_kinds import KINDS
from tests.support.toys import HERE, WORDS, Toy, toy_train

pytestmark = pytest.mark.slow

TEXTS = [
    "ember",
    "Amber Birch cedar: a dune.",
    " ".join(WORDS),
    "",
    "heath islet " * 70,
    "naïve 日本語 😀",
    "river " * 11,
    "quay",
    "ocean pine grove north. " * 3,
]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return KINDS[request.param](tmp_path_factory.mktemp("kind") / "m")


def test_vectors_equal_the_library_for_queries_and_documents(folder):
    encoder = Encoder(model=str(folder), dtype="float32")
    encoder.check()
    ours, theirs = load(encoder, "cpu"), SentenceTransformer(str(folder), device="cpu")
    if theirs[0].tokenizer is not None and getattr(theirs[0].tokenizer, "pad_token", "") is None:
        theirs[0].tokenizer.pad_token = theirs[0].tokenizer.eos_token
    for task, prompt, encode in zip(
        TASKS, encoder.prompts(), (theirs.encode_query, theirs.encode_document), strict=True
    ):
        expected = encode(TEXTS, normalize_embeddings=True, batch_size=3, show_progress_bar=False)
        assert np.abs(expected).max() > 0.1
        for budget, order in ((24, 1), (None, -1)):
            found = encoders.encode(ours, TEXTS[::order], prompt, "float32", task, budget)
            np.testing.assert_allclose(found[::order], expected, atol=1e-3)


TRAINED = [
    "pooling mean", "prompt not pooled", "prompt not pooled, padded left", "dense, norm", "truncated", "static",
    "static, normalised", "router", "router of two", "router of static", "router at the end", "bag of words", "words, cnn",
    "decoder with a chat template", "qwen", "lengths", "old layout",
]  # fmt: skip


@pytest.fixture(scope="module", params=TRAINED)
def base(request, tmp_path_factory):
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return Encoder(model=str(KINDS[request.param](tmp_path_factory.mktemp("base") / "m")), dtype="float32")


def test_training_reads_and_saves_like_the_library(base, tmp_path):
    """The first loss is that of the library's vectors; the folder has the base's length and the prompts that were used."""
    toy, before = Toy(n=12, negatives=(1, 2)), SentenceTransformer(base.model, device="cpu")
    if getattr(before.tokenizer, "pad_token", "") is None:
        before.tokenizer.pad_token = before.tokenizer.eos_token
    stage = toy_train(toy, base=base, batch_size=12, lr=1e-2, max_length=4096, warmup=0.0, steps=1)
    stage.check()
    made = materialize(stage, str(tmp_path), HERE)
    rows = toy.rows()
    text_of = {row["doc_id"]: tables.passage_text(row["title"], row["text"]) for row in rows["corpus"]}
    asked = {row["query_id"]: row["text"] for row in rows["queries"]}
    ids = sorted({d for row in rows["examples"] for d in (row["positive_id"], *row["negative_ids"])})
    q = before.encode_query([asked[row["query_id"]] for row in rows["examples"]], normalize_embeddings=True)
    d = before.encode_document([text_of[i] for i in ids], normalize_embeddings=True)
    positive = torch.tensor([ids.index(row["positive_id"]) for row in rows["examples"]])
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(q @ d.T) / 0.05, positive).item()
    [loss] = made.read("metrics")["value"].to_pylist()
    assert loss == pytest.approx(expected, abs=2e-3)

    folder = made.local_path("model")
    after = SentenceTransformer(str(folder), device="cpu")
    assert after.max_seq_length == before.max_seq_length and after.truncate_dim == before.truncate_dim
    served = load(base, "cpu", folder)
    for task, prompt, encode, old in zip(
        TASKS, base.prompts(), (after.encode_query, after.encode_document), (q, d), strict=True
    ):
        said = list(asked.values()) if task == "query" else [text_of[i] for i in ids]
        theirs = encode(said, normalize_embeddings=True)
        np.testing.assert_allclose(encoders.encode(served, said, prompt, "float32", task), theirs, atol=1e-3)
        assert np.abs(theirs - old).max() > 1e-4, "nothing was learnt"
        assert after.prompts[task] == prompt


def test_trained_prefixes_are_saved_and_override_the_models(tmp_path):
    folder = KINDS["prompt for passages"](tmp_path / "m")
    base = Encoder(model=str(folder), query_prefix="where: ", doc_prefix="there: ", dtype="float32", max_length=16)
    toy = Toy(n=8)
    made = materialize(toy_train(toy, base=base, max_length=8, lr=1e-2), str(tmp_path), HERE)
    own = SentenceTransformer(made.local_path("model"), device="cpu")
    assert own.prompts == {"query": "where: ", "document": "there: ", "passage": "there: "}
    assert own.max_seq_length == 16, "the encoder's length, not that of training"
    said = [row["text"] for row in toy.rows()["corpus"]][:4]
    found = DenseIndex(base, VectorIndex([], np.zeros((0, 16), np.float32)), made.local_path("model")).encoded(said)
    np.testing.assert_allclose(found, own.encode_query(said, normalize_embeddings=True), atol=1e-3)
    card = made.read_bytes("model/README.md").decode()
    assert '`"where: "`' in card and '`"there: "`' in card and "8 in training, 16 in search and by this folder" in card
    assert Encoder(model=str(made.local_path("model"))).prompts() == base.prompts()
