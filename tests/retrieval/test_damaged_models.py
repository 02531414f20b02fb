"""Folders of models that are damaged, forged or of another kind: one line with the folder's name, before any work."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer import modules as st

from dagr_ray.core.config import ConfigError
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.retrieval import model_opening
from dagr_ray.retrieval.encoder import Encoder, encode, load
from dagr_ray.training.lora import LoRA
from tests.support.model_kinds import pooled, put, static, whole, words
from tests.support.toys import toy_train

pytestmark = pytest.mark.slow


def cut(folder, share=0.5):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def head(folder, change):
    """The head of the weights forged; what follows it is as it was."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    [size] = struct.unpack("<Q", data[:8])
    made = change(data[8 : 8 + size])
    path.write_bytes(struct.pack("<Q", len(made)) + made + data[8 + size :])


def sized(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])


def weights(folder, change):
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def edited(path, change):
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def named(found, end):
    return next(name for name in found if name.endswith(end))


def pickled(folder):
    """A projection as older models have it."""
    import torch

    made = put(folder, *whole(folder.parent / "w"), Dense(16, 8))
    torch.save(load_file(made / "2_Dense" / "model.safetensors"), made / "2_Dense" / "pytorch_model.bin")
    (made / "2_Dense" / "model.safetensors").unlink()


def of_kind(folder, kind, **card):
    edited(folder / "config_sentence_transformers.json", lambda said: said.update({"model_type": kind} | card))


def foreign(folder, kind="builtins.print"):
    edited(folder / "modules.json", lambda said: said[1].update(type=kind))


def config(folder, **values):
    edited(folder / "config.json", lambda said: said.update(values))


def new_id(folder, number):
    added = {"id": number, "content": "<new>", "special": False, "normalized": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edited(folder / "tokenizer.json", lambda said: said["added_tokens"].append(added))


# what is done to a folder -> what the line says
SEEN = {
    "weights cut": (cut, "model.safetensors is damaged"),
    "weights cut in their head": (lambda f: cut(f, 0.001), "model.safetensors is damaged"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "weights with more behind": (lambda f: (f / "model.safetensors").open("ab").write(b"more"), "damaged"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("git-lfs\nversion 1\n"), "damaged"),
    "a head of no size": (lambda f: sized(f, 0), "model.safetensors is damaged"),
    "a head of all memory": (lambda f: sized(f, 2**62), "model.safetensors is damaged"),
    "a head that is not JSON": (lambda f: head(f, lambda h: b"[" + h[1:]), "model.safetensors is damaged"),
    "a head of another type": (lambda f: head(f, lambda h: h.replace(b'"F32"', b'"F64"', 1)), "damaged"),
    "a head with other places": (lambda f: head(f, lambda h: re.sub(rb"\[0,", b"[8,", h, count=1)), "damaged"),
    "a head of an unknown type": (lambda f: head(f, lambda h: h.replace(b'"F32"', b'"Q99"', 1)), "damaged"),
    "no weights inside": (lambda f: save_file({}, f / "model.safetensors"), "has no weights"),
    "a pickle": (pickled, "2_Dense/pytorch_model.bin is not a safetensors file"),
    "modules of somebody else": (foreign, "'builtins.print', a third-party class"),
    "modules that are code beside": (lambda f: foreign(f, "modeling_mine.Mine"), "a third-party class"),
    "modules that are no list": (lambda f: (f / "modules.json").write_text("{}"), "not a list of modules"),
    "modules without a path": (lambda f: edited(f / "modules.json", lambda m: m[0].pop("path")), "not a list of modules"),
    "modules elsewhere": (lambda f: edited(f / "modules.json", lambda m: m[1].update(path="../x")), "outside"),
    "modules cut": (lambda f: (f / "modules.json").write_text('[{"idx": 0,'), "modules.json is not JSON"),
    "a card cut": (lambda f: (f / "config_sentence_transformers.json").write_text('{"prompts"'), "is not JSON"),
    "a card of bytes": (lambda f: (f / "config_sentence_transformers.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
    "a card that is a list": (lambda f: (f / "config_sentence_transformers.json").write_text("[]"), "not a JSON object"),
    "a card that nests": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "prompts that are numbers": (lambda f: of_kind(f, "SentenceTransformer", prompts={"query": 3}), "must be texts"),
    "prompts that are a list": (lambda f: of_kind(f, "SentenceTransformer", prompts=["a"]), "must be texts by name"),
    "a sparse encoder": (lambda f: of_kind(f, "SparseEncoder"), "is a SparseEncoder"),
    "a cross-encoder": (lambda f: of_kind(f, "CrossEncoder"), "is a CrossEncoder"),
    "sparse modules": (
        lambda f: foreign(f, "sentence_transformers.sparse_encoder.modules.SpladePooling"), "returns no dense vector",
    ),
    "a classifier": (
        lambda f: ((f / "modules.json").unlink(), config(f, architectures=["BertForSequenceClassification"])),
        "is a BertForSequenceClassification",
    ),
    "pictures": (lambda f: config(f, vision_config={"hidden_size": 8}), "reads more than texts"),
    "a vocabulary that is small": (lambda f: config(f, vocab_size=7), "vocab_size = 7 in config.json"),
    "an id above the vocabulary": (lambda f: new_id(f, 5000), "ids up to 5000"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "has adapters"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type": "be'), "config.json is not JSON"),
}  # fmt: skip
# what is seen when the folder is opened
OPENED = {
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("*oken*")], ""),
    "a tokenizer that is empty": (lambda f: (f / "tokenizer.json").write_text("{}"), ""),
    "another shape": (lambda f: config(f, hidden_size=32), ""),
    "fewer rows": (lambda f: weights(f, lambda w: w.update({
        named(w, "word_embeddings.weight"): w[named(w, "word_embeddings.weight")][:9].copy()})), ""),
    "numbers that are none": (lambda f: weights(f, lambda w: w[named(w, "0.output.dense.weight")].fill(np.nan)), "not finite"),
    "one number that is none": (
        lambda f: weights(f, lambda w: w[named(w, "word_embeddings.weight")].put(99, np.inf)), "not finite",
    ),
    "a weight that is gone": (lambda f: weights(f, lambda w: w.pop(named(w, "0.output.dense.weight"))), "lacks weights"),
    "a kind that nobody knows": (lambda f: config(f, model_type="never-heard-of"), ""),
    "code of its own": (lambda f: config(f, model_type="mine", auto_map={"AutoModel": "m.M", "AutoConfig": "m.C"}), ""),
    "heads that do not fit": (lambda f: config(f, num_attention_heads=5), ""),
    "a size that is a word": (lambda f: config(f, num_hidden_layers="two"), ""),
    "a module without its settings": (lambda f: shutil.rmtree(f / "1_Pooling"), ""),
    "pooling of another size": (lambda f: edited(f / "1_Pooling" / "config.json", lambda c: c.update(pooling_mode="most")), ""),
    "a prompt by default that is none": (lambda f: of_kind(f, "SentenceTransformer", default_prompt_name="no"), ""),
    "a later library": (lambda f: of_kind(f, "SentenceTransformer", requirements={"transformers": ">=999"}), ""),
}  # fmt: skip
# of no matter to the vectors
HARMLESS = {
    "a readme of broken YAML": lambda f: (f / "README.md").write_text("---\ntags: [a, :\n\t- {\n---\n"),
    "a readme of bytes": lambda f: (f / "README.md").write_bytes(b"---\n\xff\xfe\x00"),
    "a later version of the card": lambda f: of_kind(f, "SentenceTransformer", __version__={"sentence_transformers": "99.0"}),
    "files of a desktop": lambda f: [(f / f"._{n}").write_bytes(b"\x00\x05") for n in ("a.json", "model.safetensors")],
    "a pooler that is gone": lambda f: weights(f, lambda w: [w.pop(name) for name in list(w) if "pooler" in name]),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return pooled(tmp_path_factory.mktemp("sound"), "mean")


def damaged(sound, tmp_path, damage):
    folder = tmp_path / "my model"
    shutil.copytree(sound, folder)
    damage(folder)
    return folder


def one_line(error, folder, says):
    said = str(error.value)
    assert str(folder) in said and says in said and "\n" not in said and len(said) < 800, said
    return said


@pytest.mark.parametrize("case", SEEN)
def test_damage_that_the_files_show_is_refused_in_one_line(sound, tmp_path, case):
    damage, says = SEEN[case]
    encoder = Encoder(model=str(damaged(sound, tmp_path, damage)))
    with pytest.raises(ConfigError) as error:
        encoder.check()
    one_line(error, encoder.model, says)


@pytest.mark.parametrize("case", OPENED)
def test_damage_that_opening_shows_is_refused_in_one_line(sound, tmp_path, case):
    damage, says = OPENED[case]
    encoder = Encoder(model=str(damaged(sound, tmp_path, damage)))
    with pytest.raises(ConfigError) as error:
        encoder.check()
        model_opening.try_opening(encoder)
    one_line(error, encoder.model, says)


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_differences_are_accepted(sound, tmp_path, case, caplog):
    encoder = Encoder(model=str(damaged(sound, tmp_path, HARMLESS[case])), dtype="float32")
    encoder.check()
    model_opening.try_opening(encoder)
    said = [record.getMessage() for record in caplog.records if record.name == "dagr"]
    assert len(said) == ("readme" in case) and all(encoder.model in line and "README.md" in line for line in said)
    ours, theirs = (
        encode(load(Encoder(model=m), "cpu"), ["ember"], "", "float32") for m in (encoder.model, str(sound))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": 7}, "the model has 2"),
        ({"max_length": 97}, "reads at most 96 tokens"),
        ({"query_prefix": "where " * 200}, None),  # nothing is left of the query, which the library bears too
    ],
)
def test_fields_that_do_not_fit_the_model_are_refused(sound, fields, says):
    encoder = Encoder(model=str(sound), **fields)
    if says is None:
        model_opening.try_opening(encoder)
        return
    with pytest.raises(ConfigError, match=says):
        model_opening.try_opening(encoder)


def test_a_static_model_is_refused_what_it_has_not(tmp_path):
    model = str(put(tmp_path / "static", static()))
    base = Encoder(model=model)
    for fields in ({"lora": LoRA()}, {"losses": (InfoNCE(cached=4),)}):
        with pytest.raises(ConfigError, match=re.escape(model)):
            toy_train(base=base, **fields).check()
    for fields in ({"layers": 1}, {"reinitialise": 1}, {"pooling": "cls"}):
        with pytest.raises(ConfigError, match=re.escape(model)):
            model_opening.try_opening(base.model_copy(update=fields))
    model_opening.try_opening(base.model_copy(update={"max_length": 16}))


def test_a_base_that_has_nothing_to_learn_is_refused(tmp_path):
    base = Encoder(model=str(put(tmp_path / "words", words(tmp_path), st.Pooling(16, "mean"))))
    with pytest.raises(ConfigError, match=re.escape(base.model)):
        toy_train(base=base).check()
    edited(tmp_path / "words" / "wordembedding_config.json", lambda said: said.update(update_embeddings=True))
    toy_train(base=base).check()


def test_ways_of_other_dimensions_are_refused(tmp_path):
    wide = st.StaticEmbedding(static().tokenizer, embedding_dim=8)
    encoder = Encoder(model=str(put(tmp_path / "m", Router.for_query_document([static()], [wide]))))
    with pytest.raises(ConfigError, match="16 dimensions, documents 8"):
        model_opening.try_opening(encoder)


JOB = """
from dagr_ray.miners.dense import Dense
from dagr_ray.recipes.evaluation import judge
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.evaluate import Scorecard


def job(data: str, base: str) -> Scorecard:
    return judge({"set": Beir(path=data)}, Dense(encoder=Encoder(model=base)))
"""


@pytest.mark.parametrize("verb", [("check", "--one"), ("run",)])
def test_the_command_says_it_in_one_line_before_any_work(sound, tmp_path, verb):
    """A shape is seen by opening alone."""
    data = tmp_path / "set"
    (data / "qrels").mkdir(parents=True)
    (data / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "ember fjord"}\n')
    (data / "queries.jsonl").write_text('{"_id": "q1", "text": "ember"}\n')
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    (tmp_path / "job.py").write_text(JOB)
    folder = damaged(sound, tmp_path, lambda f: config(f, hidden_size=32))
    given = [
        verb[0],
        str(tmp_path / "job.py"),
        f"data={data}",
        f"base={folder}",
        "--runs",
        str(tmp_path / "runs"),
        *verb[1:],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dagr_ray.cli.main", *given], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"DAGR_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(said) == 1 and str(folder) in said[0], done.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_what_has_opened_is_not_opened_again(sound, tmp_path, monkeypatch):
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path / "cache"))
    model_opening.check([Encoder(model=str(sound))])
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    model_opening.check([Encoder(model=str(sound))])
    with pytest.raises(FileNotFoundError):
        model_opening.check([Encoder(model=str(sound), max_length=9)])
