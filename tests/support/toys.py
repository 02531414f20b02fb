"""A small training set of random words, and what tests of training share."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dagr_ray.core import tables
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage
from dagr_ray.quickstart import models
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.train import Train

WORDS = (
    "amber birch cedar dune ember fjord grove heath islet jetty knoll lagoon marsh north ocean pine quay river".split()
)
HERE = Placement(train=Pool(workers=0))
TWO = Placement(train=Pool(workers=2, cpus=1))


class Toy(Stage):
    """``n`` passages of random words, a query for each, others as its negatives, with scores if they are ``scored``.

    The last ``dev`` of them are judged in ``qrels.dev`` and no examples. ``shuffled`` gives all rows other ids and another
    order, and changes nothing else.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "examples", "qrels.dev")
    n: int = 64
    negatives: tuple[int, ...] = (1,)
    scored: bool = False
    dev: int = 0
    shuffled: int | None = None

    def open(self, inputs: Any, folder: Any, pool: Any) -> Any:
        def run(start: int, stop: int) -> Output:
            return Output({name: tables.table(name, rows) for name, rows in self.rows().items()})

        return run

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each table."""
        rng, rows = random.Random(0), {name: [] for name in self.outputs}
        names = list(range(self.n))
        other = random.Random(self.shuffled)
        if self.shuffled is not None:
            other.shuffle(names)
        for i in range(self.n):
            text = " ".join(rng.choices(WORDS, k=rng.randint(4, 24)))
            k = self.negatives[i % len(self.negatives)]
            others = [f"d{names[(i * 7 + 3 + j) % self.n]}" for j in range(k)]
            scores = [rng.random() for _ in range(1 + k)] if self.scored else [None] * (1 + k)
            rows["corpus"].append({"doc_id": f"d{names[i]}", "title": f"number {i}", "text": text})
            rows["queries"].append({"query_id": f"q{names[i]}", "text": f"where is {text.split()[0]} {i}"})
            if i >= self.n - self.dev:
                rows["qrels.dev"].append({"query_id": f"q{names[i]}", "doc_id": f"d{names[i]}", "relevance": 1})
                continue
            example = {"query_id": f"q{names[i]}", "positive_id": f"d{names[i]}", "negative_ids": others}
            rows["examples"].append(example | {"positive_score": scores[0], "negative_scores": scores[1:]})
        if self.shuffled is not None:
            for each in rows.values():
                other.shuffle(each)
        return rows


def small(**fields: Any) -> Encoder:
    """MiniLM, of which two layers are enough for what is no matter of quality."""
    return Encoder(**{"model": str(models.minilm()), "max_length": 64, "dtype": "float32", "layers": 2} | fields)


def tiny(**fields: Any) -> Encoder:
    """A BERT of two random layers and a million weights: steps and checkpoints take no time."""
    return Encoder(**{"model": str(_tiny_bert()), "max_length": 64, "dtype": "float32"} | fields)


@cache
def _tiny_bert() -> Path:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = Path(tempfile.mkdtemp(prefix="tiny-")) / "tiny-bert"
    atexit.register(shutil.rmtree, folder.parent, True)
    tokenizer = AutoTokenizer.from_pretrained(models.minilm())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_train(toy: Stage | None = None, **fields: Any) -> Train:
    """A training on a toy."""
    toy = toy or Toy()
    asked = {"examples": toy, "queries": toy, "corpus": toy, "base": small(), "batch_size": 16, "max_length": 32}
    return Train(**asked | fields)


def weights(path: str | Path) -> dict[str, np.ndarray]:
    """The weights of a trained model's folder."""
    from safetensors.numpy import load_file

    return load_file(f"{path}/model/model.safetensors")


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of a weight."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)
