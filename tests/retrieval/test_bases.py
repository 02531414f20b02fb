"""Bases of other kinds: prompts of a model's card, pooling, a decoder with adapters."""

import json
import shutil

import numpy as np
import pytest
import torch

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.quickstart import models
from dagr_ray.retrieval import encoder
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.training.lora import LoRA
from tests.support.toys import HERE, WORDS, Toy, small, toy_train

pytestmark = pytest.mark.slow

TEXTS = [
    "short",
    "a text that is somewhat longer than the other one",
    "ten words of no meaning stand here in a row now",
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A causal language model of two random layers; its tokenizer pads at the start and has no token for it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("decoder") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mpnet", "xlm-roberta"])
def numbered(request, tmp_path_factory):
    """A model of two random layers and 66 positions, which numbers them from 2 on: it reads 64 tokens."""
    import transformers as hf

    words = sorted({*" ".join(TEXTS).split(), *WORDS, "number", "where", "is", "query", ":"})
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if request.param == "mpnet":
        vocab = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = hf.MPNetTokenizer(vocab=vocab, unk_token="<unk>")
        config, kind = hf.MPNetConfig, hf.MPNetModel
    else:
        tokenizer = hf.XLMRobertaTokenizer(
            vocab=[*((s, 0.0) for s in special), *((f"▁{word}", -1.0) for word in words)]
        )
        config, kind = hf.XLMRobertaConfig, hf.XLMRobertaModel
    folder = tmp_path_factory.mktemp("numbered") / request.param
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone_and_together(model):
    def embed(texts):
        with torch.no_grad():
            return model(model.preprocess(texts))["sentence_embedding"].numpy()

    return np.concatenate([embed([text]) for text in TEXTS]), embed(TEXTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_is_read_by_its_last_token_on_either_side(decoder, side):
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = encoder.load(Encoder(model=str(decoder), max_length=64), device="cpu")
    model.tokenizer.padding_side = side
    assert next(m for m in model if isinstance(m, Pooling)).pooling_mode == "lasttoken"
    np.testing.assert_allclose(*alone_and_together(model), atol=1e-5)
    mean = encoder.load(Encoder(model=str(decoder), max_length=64, pooling="mean"), device="cpu")
    assert np.abs(alone_and_together(mean)[0] - alone_and_together(model)[0]).max() > 1e-3


@pytest.mark.parametrize("cached", [None, 4])
def test_a_decoder_learns_by_adapters_and_is_saved_without_them(decoder, tmp_path, cached):
    base = Encoder(model=str(decoder), max_length=64, dtype="float32", query_prefix="query: ")
    stage = toy_train(
        Toy(n=16), base=base, batch_size=8, lr=1e-2, lora=LoRA(rank=4, targets=("q_proj", "v_proj")),
        losses=(InfoNCE(cached=cached),), gradient_checkpointing=cached is None,
    )  # fmt: skip
    made = materialize(stage, str(tmp_path), HERE)
    assert not [name for name in made.manifest["files"] if "adapter" in name]
    before, after = (
        dict(encoder.load(base, device="cpu", model=m).named_parameters()) for m in (None, made.local_path("model"))
    )
    changed = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"q_proj", "v_proj"}
    opened = json.loads((made.read_bytes("model/modules.json") or b"").decode())
    assert [module["type"].rsplit(".", 1)[-1] for module in opened] == ["Transformer", "Pooling"]
    with pytest.raises(ConfigError, match="lora: targets"):
        materialize(toy_train(Toy(n=8), base=base, lora=LoRA(targets=("nothing",))), str(tmp_path), HERE)


def test_bases_with_other_position_numbers_are_trained(numbered, tmp_path):
    base = Encoder(model=str(numbered), max_length=64, query_prefix="query: ")
    model = encoder.load(base, device="cpu")
    np.testing.assert_allclose(*alone_and_together(model), atol=1e-5)
    long = [" ".join(WORDS * 9), "short"]
    assert len(model.tokenizer(long[0]).input_ids) > 64
    before = encoder.encode(model, long, dtype="float32")
    with pytest.raises(ConfigError, match="reads at most 64 tokens"):
        encoder.load(base.model_copy(update={"max_length": 65}), device="cpu")
    made = materialize(toy_train(Toy(n=16), base=base, batch_size=8, lr=1e-2), str(tmp_path), HERE)
    after = encoder.encode(encoder.load(base, "cpu", made.local_path("model")), long, dtype="float32")
    assert np.abs(after - before).max() > 1e-2 and made.manifest["counts"]["steps"] == 2


def test_prompts_come_from_the_card_by_default(tmp_path):
    shutil.copytree(models.minilm(), tmp_path / "m")
    card = tmp_path / "m" / "config_sentence_transformers.json"
    card.write_text(json.dumps({"prompts": {"query": "query: ", "document": "passage: ", "passage": "not used"}}))
    said, given, plain = (
        Encoder(model=str(tmp_path / "m"), **fields)
        for fields in (
            {},
            {"query_prefix": "query: ", "doc_prefix": "passage: "},
            {"query_prefix": "", "doc_prefix": ""},
        )
    )
    assert said.prompts() == ("query: ", "passage: ") == given.prompts() and plain.prompts() == ("", "")
    assert said.fingerprint() == given.fingerprint() != plain.fingerprint()
    assert Encoder(model=str(tmp_path / "m"), query_prefix="ask: ").prompts() == ("ask: ", "passage: ")
    assert small().prompts() == ("", "")
    trained = [
        materialize(toy_train(Toy(n=8), base=base.model_copy(update={"layers": 1})), str(tmp_path / "runs"), HERE)
        for base in (said, plain)
    ]
    one, other = (float(made.read("metrics")["value"][0].as_py()) for made in trained)
    assert abs(one - other) > 1e-3, "the prompts are read in training"
