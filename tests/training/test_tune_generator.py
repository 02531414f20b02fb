"""A generator that learns from people's queries: the loss, any number of workers, resume, and what vLLM writes with it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.vllm import VLLM
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.stages.tune_generator import TuneGenerator
from dagr_ray.strategies.doc2query import Doc2Query
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.generator import IGNORED, _Collator, encoded, tune
from dagr_ray.training.lora import LoRA
from dagr_ray.training.settings import GeneratorSettings
from tests.conftest import tiny_beir

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

HERE = Placement(train=Pool(workers=0, checkpoint_every=2), light=Pool(workers=0), retrieve=Pool(workers=0))
PAIRS = [(f"Passage:\nThe word is w{i}\nQuery:", f"which w{i}") for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of two layers over words and a handful of signs."""
    words = [
        "<unk>",
        "</s>",
        "Passage",
        ":",
        "\n",
        "Query",
        "The",
        "word",
        "is",
        "which",
        *(f"w{i}" for i in range(10)),
    ]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    folder = tmp_path_factory.mktemp("llama")
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def settings(**fields) -> GeneratorSettings:
    plain = {"epochs": 30, "batch_size": 4, "lr": 5e-3, "warmup": 0.1, "max_length": 64, "max_answer": 8, "seed": 0}
    return GeneratorSettings(**plain | {"lora": None, "checkpoint_every": 0} | fields)


def answer(folder: Path, prompt: str) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    learnt = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = learnt.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    return tokenizer.decode(made).strip()


@pytest.mark.parametrize("lora", [None, LoRA(rank=8)], ids=["weights", "adapters"])
def test_it_learns_the_answers_and_saves_a_plain_folder(model, tmp_path, lora):
    tuned = tune(model, PAIRS, settings(lora=lora, lr=5e-3 if lora is None else 2e-2), tmp_path / "model", device="cpu")
    assert tuned.losses[-1][1] < (0.3 if lora is None else 0.9) * tuned.losses[0][1]
    if lora is None:  # adapters leave the words' vectors, which nobody has trained here, as they are
        assert answer(tmp_path / "model", PAIRS[3][0]).startswith("which w3")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in weights)


def test_the_loss_is_on_the_answers_alone(model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    rows, cut = encoded(PAIRS, tokenizer, 64, 8)
    assert cut == 0 and rows[0][1][-1] == tokenizer.eos_token_id
    batch = _Collator(rows, 1, 0, 1)([0, 1, 2])
    assert (batch["labels"] != IGNORED).sum() == batch["total"] == sum(len(a) for _, a in rows[:3])
    learnt = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "total")}
    ours = learnt(**inputs).logits[:, :-1].log_softmax(-1)
    for row in range(3):
        prompt, said = rows[row]
        alone = learnt(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        plain = [float(alone[len(prompt) - 1 + i, token].detach()) for i, token in enumerate(said)]
        padded = [float(ours[row, ours.shape[1] - len(said) + i, token].detach()) for i, token in enumerate(said)]
        np.testing.assert_allclose(padded, plain, atol=1e-4)


def test_shares_of_a_batch_add_up_on_any_number_of_workers(model):
    rows, _ = encoded(PAIRS, PreTrainedTokenizerFast.from_pretrained(model), 64, 8)
    learnt = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)

    def gradient(workers: int) -> torch.Tensor:
        learnt.zero_grad()
        for rank in range(workers):
            batch = _Collator(rows, 1, rank, workers)([0, 1, 2, 3, 4])
            labels, total = batch.pop("labels"), batch.pop("total")
            logits = learnt(**batch).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            (loss / total).backward()
        return torch.cat([p.grad.flatten() for p in learnt.parameters()])

    alone = gradient(1)
    for workers in (2, 4, 7):
        torch.testing.assert_close(gradient(workers), alone, atol=1e-6, rtol=1e-5)


def test_a_long_prompt_loses_its_beginning_and_is_counted(model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    long = [("The word " * 100 + "\nQuery:", "which w1")]
    rows, cut = encoded(long, tokenizer, 64, 8)
    assert cut == 1 and len(rows[0][0]) + len(rows[0][1]) == 64
    assert rows[0][0][-3:] == tokenizer("\nQuery:")["input_ids"][-3:]


def test_what_was_broken_off_is_what_was_not(model, tmp_path, monkeypatch):
    """From the last checkpoint on: the same weights, and the curve of all steps."""
    few = settings(epochs=3, checkpoint_every=2)
    whole = tune(model, PAIRS, few, tmp_path / "whole", device="cpu")
    folder = Artifact(str(tmp_path), "tune-generator-000000000000")
    real, calls = _Collator.__call__, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 6:
            raise OSError("the machine goes away")
        return real(self, batch)

    monkeypatch.setattr(_Collator, "__call__", failing)
    with pytest.raises(OSError, match="goes away"):
        tune(model, PAIRS, few, tmp_path / "again", device="cpu", checkpoints=Checkpoints(folder, "a"))
    again = tune(model, PAIRS, few, tmp_path / "again", device="cpu", checkpoints=Checkpoints(folder, "b"))
    assert len(calls) < 6 + 9 and again.steps == whole.steps == 9
    np.testing.assert_allclose(again.losses, whole.losses, atol=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def stage(model, tmp_path_factory) -> TuneGenerator:
    data = Beir(path=str(tiny_beir(tmp_path_factory.mktemp("tune") / "set")))
    return TuneGenerator(data=data, engine=VLLM(model=str(model)), epochs=1, batch_size=4, seed=3)


def test_a_stage_holds_the_model_its_curve_and_its_pairs(stage, tmp_path):
    folder = materialize(stage, str(tmp_path), HERE)
    pairs = folder.read("exemplars").to_pylist()
    assert len(pairs) == 12 and {row["query_id"] for row in pairs} == {f"q{i}" for i in range(12)}
    assert [row["measure"] for row in folder.read("metrics").to_pylist()] == ["loss@3"]
    assert json.loads(Path(folder.local_path("model", "config.json")).read_text())["model_type"] == "llama"
    assert not (tmp_path / folder.name / "checkpoints").exists()
    counts = folder.manifest["counts"]
    assert (counts["in"], counts["steps"], counts["cut"]) == (12, 3, 0) and counts["tokens"] > 100
    assert not os.path.isdir(f"{folder.path}/ray")


def test_fewer_pairs_lie_inside_more(stage, tmp_path):
    data = materialize(stage.data, str(tmp_path), HERE)
    drawn = [[row["query_id"] for row in stage.model_copy(update={"n": n}).pairs(data)] for n in (3, 7, None)]
    assert drawn[0] == drawn[1][:3] and drawn[1] == drawn[2][:7] and len(drawn[2]) == 12


def test_what_it_learnt_from_is_neither_asked_about_nor_judged(stage, tmp_path):
    sample = materialize(Sample(corpus=stage.data, n=60, exclude=stage), str(tmp_path), HERE)
    learnt = materialize(stage, str(tmp_path), HERE).read("exemplars")["doc_id"].to_pylist()
    left_out = set(learnt) & set(sample.read("corpus")["doc_id"].to_pylist())
    assert not left_out and sample.count("corpus") == 48


def test_generate_with_a_tuned_model_has_its_own_fingerprint(stage):
    plain = Generate(corpus=stage.data, strategy=Doc2Query(), engine=stage.engine)
    tuned = Generate(corpus=stage.data, strategy=Doc2Query(), engine=stage.engine, tuned=stage)
    assert plain.fingerprint() != tuned.fingerprint()
    assert tuned.model_name() == f"{plain.model_name()}+{stage.folder_name()}"
    assert "tuned" in tuned.inputs() and "tuned" not in plain.inputs()


def test_an_engine_without_a_model_is_refused_beforehand(stage):
    with pytest.raises(ConfigError, match="engine 'crop-engine' has no model here that could be tuned; give vllm"):
        TuneGenerator(data=stage.data, engine=CropEngine()).check()
    with pytest.raises(ConfigError, match="split = 'train' is not in"):
        stage.model_copy(update={"split": "train"}).pairs(materialize(stage.data, stage.data.path + "-runs", HERE))
