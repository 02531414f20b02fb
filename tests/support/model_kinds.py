"""Model folders of many kinds with tiny random weights, as sentence-transformers writes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer import modules as st
from transformers import AutoTokenizer

from dagr_ray.quickstart import models
from tests.support.toys import WORDS

PROMPTS = {"query": "ask the archive: ", "document": "from the archive: "}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VOCABULARY = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *WORDS, *"abcdefghijklmnopqrstuvwxyz:.", "##s", "ask", "from"]


@cache
def bert_tokenizer() -> Any:
    """Of the words that the tests use, and letters."""
    import transformers as hf

    return hf.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)})


def bert(folder: Path, tokenizer: Any = None, **config: Any) -> Path:
    """A plain BERT."""
    import transformers as hf

    tokenizer = tokenizer or bert_tokenizer()
    torch.manual_seed(len(str(folder.name)))
    asked = {"vocab_size": len(tokenizer), "max_position_embeddings": 96, **SIZE} | config
    hf.BertModel(hf.BertConfig(**asked)).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decoder(folder: Path, kind: str = "Llama", chat: bool = False, **config: Any) -> Path:
    """A causal language model whose tokenizer pads at the start and has no token for it."""
    import transformers as hf

    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    if not chat:
        tokenizer.chat_template = None
    torch.manual_seed(0)
    asked = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 128, **SIZE} | config
    getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**asked)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def put(folder: Path, *modules: Any, **options: Any) -> Path:
    """The modules as a folder."""
    torch.manual_seed(1)
    SentenceTransformer(modules=list(modules), device="cpu", **options).save_pretrained(str(folder))
    return folder


def pooled(folder: Path, mode: Any, side: str = "right", prompts: Any = PROMPTS, **options: Any) -> Path:
    """A BERT with a way of pooling."""
    transformer = Transformer(str(bert(folder / "plain")))
    transformer.tokenizer.padding_side = side
    return put(folder / "model", transformer, st.Pooling(16, mode, **options), prompts=prompts)


def static(seed: int = 2) -> Any:
    """Words with a vector each."""
    torch.manual_seed(seed)
    return st.StaticEmbedding(bert_tokenizer().backend_tokenizer, embedding_dim=16)


def whole(folder: Path) -> list[Any]:
    """A transformer and its pooling."""
    return [Transformer(str(bert(folder))), st.Pooling(16, "mean")]


def words(folder: Path) -> Any:
    """Word vectors with a tokenizer of their own."""
    torch.manual_seed(3)
    vectors = torch.randn(len(WORDS) + 1, 16)
    vectors[0] = 0  # of the padding
    return st.WordEmbeddings(st.tokenizer.WhitespaceTokenizer(vocab=["PADDING_TOKEN", *WORDS]), vectors)


def old_layout(folder: Path, place: str = "") -> Path:
    """What sentence-transformers wrote up to version 2: other class names, flags for pooling, lengths in a file of their own."""
    bert(folder / place)
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    flags = {f"pooling_mode_{name}": name == "max_tokens" for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | flags))
    kinds = {place: "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / place / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 12, "do_lower_case": False})
    )
    return folder


def asym(folder: Path) -> Path:
    """A router under its former name, with its file under its former name."""
    ways = {"query": [*whole(folder / "q")], "document": [*whole(folder / "document")]}
    made = put(folder / "model", Router(ways, default_route="document"))
    listed, kind = (made / "modules.json").read_text(), "sentence_transformers.base.modules.router.Router"
    (made / "modules.json").write_text(listed.replace(kind, "sentence_transformers.models.Asym"))
    (made / "router_config.json").rename(made / "config.json")
    return made


def cased(folder: Path) -> Path:
    """A tokenizer that keeps capitals, in a model that wants none."""
    import transformers as hf

    tokenizer = hf.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}, do_lower_case=False)
    transformer = Transformer(str(bert(folder / "plain", tokenizer)), do_lower_case=True)
    return put(folder / "model", transformer, st.Pooling(16, "mean"))


def from_hub(folder: Path, kind: str) -> Path:
    """Transformers that number positions otherwise, or have other names for their sizes."""
    import transformers as hf

    torch.manual_seed(0)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    size = dict(SIZE)
    if kind == "MPNet":
        tokenizer: Any = hf.MPNetTokenizer(
            vocab={w: i for i, w in enumerate([*special, *VOCABULARY])}, unk_token="<unk>"
        )
    elif kind == "XLMRoberta":
        vocab = [*((s, 0.0) for s in special), *((f"▁{word}", -1.0) for word in VOCABULARY)]
        tokenizer = hf.XLMRobertaTokenizer(vocab=vocab)
    else:
        tokenizer = bert_tokenizer()
    if kind == "T5":
        config: Any = hf.T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model: Any = hf.T5EncoderModel(config)
    elif kind == "DistilBert":
        config = hf.DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        model = hf.DistilBertModel(config)
    else:
        own = {"max_position_embeddings": 66} if kind != "ModernBert" else {"pad_token_id": 0, "cls_token_id": 2}
        options = {"vocab_size": len(tokenizer), "pad_token_id": 1, **size} | own
        model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**options))
    model.eval().save_pretrained(folder)
    if kind in ("MPNet", "XLMRoberta"):
        tokenizer.model_max_length = 64  # two positions are not used
    tokenizer.save_pretrained(folder)
    return folder


def sharded(folder: Path) -> Path:
    """Weights in several files with a list of them."""
    made = put(folder / "model", *whole(folder / "plain"))
    transformer = Transformer(str(made))
    (made / "model.safetensors").unlink()
    transformer.model.save_pretrained(made, max_shard_size="5KB")
    assert (made / "model.safetensors.index.json").is_file()
    return made


def with_card(folder: Path, card: dict[str, Any]) -> Path:
    """A model whose card says more than the library writes."""
    made = put(folder / "model", *whole(folder / "plain"))
    path = made / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | card))
    return made


def last_way(folder: Path) -> Path:
    """One transformer, and a projection of its own for queries and for documents."""
    router = Router.for_query_document([Dense(16, 8)], [Dense(16, 8)])
    return put(folder / "model", *whole(folder / "plain"), router, prompts=PROMPTS)


def layered(folder: Path) -> Path:
    """A weighted sum of all layers."""
    bert(folder / "plain", output_hidden_states=True)
    weighing = st.WeightedLayerPooling(16, num_hidden_layers=2, layer_start=1)
    return put(folder / "model", Transformer(str(folder / "plain")), weighing, st.Pooling(16, "mean"))


def limited(folder: Path) -> Path:
    """A length for queries, another for documents, and a third for what is neither."""
    transformer = Transformer(str(bert(folder / "plain")), query_length=9, document_length=14)
    return put(folder / "model", transformer, st.Pooling(16, "mean"), prompts=PROMPTS)


def decoding(folder: Path, **options: Any) -> Path:
    """A decoder as a finished encoder, as Qwen's are."""
    transformer = Transformer(str(decoder(folder / "plain", **options)))
    transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    return put(
        folder / "model", transformer, st.Pooling(16, "lasttoken"), Normalize(), prompts=PROMPTS | {"document": ""}
    )


def dense(folder: Path) -> Path:
    """Pooling, a projection, a norm."""
    return put(
        folder / "model", *whole(folder / "plain"), Dense(16, 12), st.LayerNorm(12), Normalize(), prompts=PROMPTS
    )


def copied(folder: Path) -> Path:
    """The packaged MiniLM."""
    shutil.copytree(models.minilm(), folder / "model")
    return folder / "model"


KINDS: dict[str, Callable[[Path], Path]] = {
    "plain transformer": bert,
    **{f"pooling {mode}": (lambda f, m=mode: pooled(f, m)) for mode in st.Pooling.POOLING_MODES},
    "two poolings": lambda f: pooled(f, ("cls", "mean")),
    "prompt not pooled": lambda f: pooled(f, "mean", include_prompt=False),
    "prompt not pooled, padded left": lambda f: pooled(f, "mean", "left", include_prompt=False),
    "prompt not pooled, weighted": lambda f: pooled(f, "weightedmean", include_prompt=False),
    "prompt not pooled, largest": lambda f: pooled(f, "max", include_prompt=False),
    "padded left": lambda f: pooled(f, "cls", "left"),
    "no prompts": lambda f: pooled(f, "mean", prompts=None),
    "dense, norm": dense,
    "truncated": lambda f: with_card(f, {"truncate_dim": 5}),
    "default prompt": lambda f: with_card(f, {"prompts": {"sts": "like: "}, "default_prompt_name": "sts"}),
    "prompt for passages": lambda f: with_card(f, {"prompts": {"query": "ask: ", "passage": "from: "}}),
    "prompts that are null": lambda f: with_card(f, {"prompts": {"query": None, "document": "from: "}}),
    "old layout": old_layout,
    "oldest layout": lambda f: old_layout(f, "0_Transformer"),
    "asym": asym,
    "static": lambda f: put(f, static(), prompts=PROMPTS),
    "static, normalised": lambda f: put(f, static(), Normalize()),
    "router": lambda f: put(f / "m", Router.for_query_document([static()], whole(f / "p")), prompts=PROMPTS),
    "router of two": lambda f: put(f / "m", Router.for_query_document(whole(f / "query"), whole(f / "p")), Normalize()),
    "router of static": lambda f: put(f, Router.for_query_document([static(4)], [static(5)]), prompts=PROMPTS),
    "router at the end": last_way,
    "words": lambda f: put(f, words(f), st.Pooling(16, "mean")),
    "words, cnn": lambda f: put(f, words(f), st.CNN(16, 12, [1, 3]), st.Pooling(24, "mean")),
    "words, lstm": lambda f: put(f, words(f), st.LSTM(16, 8), st.Pooling(16, "mean")),
    "words, weights": lambda f: put(
        f, words(f), st.WordWeights(["PADDING_TOKEN", *WORDS], dict.fromkeys(WORDS[:9], 0.2)), st.Pooling(16, "mean")
    ),
    "bag of words": lambda f: put(f, st.BoW(list(WORDS)), Dense(len(WORDS), 8)),
    "decoder": decoder,
    "decoder with a chat template": lambda f: decoder(f, chat=True),
    "qwen": lambda f: decoding(f, kind="Qwen2"),
    "qwen3": lambda f: decoding(f, kind="Qwen3", head_dim=8),
    "capitals": cased,
    "layers": layered,
    "lengths": limited,
    "sharded": sharded,
    **{kind: (lambda f, k=kind: from_hub(f, k)) for kind in ("MPNet", "XLMRoberta", "DistilBert", "T5", "ModernBert")},
    "MiniLM": copied,
}
