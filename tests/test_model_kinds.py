"""Models as they come: the vectors are the library's own, whatever the folder holds; what cannot be read is refused."""

import logging

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from dagr_ray import retriever
from dagr_ray.retriever import Encoder
from tests.model_kinds import KINDS
from tests.toys import WORDS

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


def test_vectors_are_those_of_the_library_for_queries_and_documents(folder):
    encoder = Encoder(model=str(folder), dtype="float32")
    encoder.check()
    ours, theirs = retriever.load(encoder, "cpu"), SentenceTransformer(str(folder), device="cpu")
    if theirs[0].tokenizer is not None and getattr(theirs[0].tokenizer, "pad_token", "") is None:
        theirs[0].tokenizer.pad_token = theirs[0].tokenizer.eos_token
    for task, prompt, encode in zip(
        retriever.TASKS, encoder.prompts(), (theirs.encode_query, theirs.encode_document), strict=True
    ):
        expected = encode(TEXTS, normalize_embeddings=True, batch_size=3, show_progress_bar=False)
        assert np.abs(expected).max() > 0.1
        for budget, order in ((24, 1), (None, -1)):
            found = retriever.encode(ours, TEXTS[::order], prompt, "float32", task, budget)
            np.testing.assert_allclose(found[::order], expected, atol=1e-3)
