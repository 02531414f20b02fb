"""Cross-encoders: a model that reads query and passage together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import ModelName, last_name, part_of_name
from dagr_ray.core.placement import Pool
from dagr_ray.retrieval.encoder import Dtype, Pinned, compute_dtype
from dagr_ray.teachers import Cost, QueryPassage, Scorer, Teacher

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder as Model

BATCH = {"cpu": 16, "cuda": 256}


class CrossEncoder(Pinned, Teacher):
    """Any sentence-transformers CrossEncoder with one output, such as the ms-marco models (safetensors, no remote code).

    Source: Nogueira and Cho, Passage Re-ranking with BERT, arXiv 1901.04085; as the teacher of a retriever: Hofstätter
    et al., arXiv 2010.02666. ``activation`` ``none`` returns the logit, for distillation by margins; ``sigmoid`` returns
    a number in [0, 1]. A pair is cut to ``max_length`` tokens, its longer text first.

    >>> CrossEncoder(model="/models/ms-marco-MiniLM-L6-v2").scorer()
    'cross-encoder-ms-marco-minilm-l6-v2'
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    model: ModelName = "cross-encoder/ms-marco-MiniLM-L6-v2"
    max_length: Annotated[int, Field(ge=8)] = 512
    activation: Literal["none", "sigmoid"] = "none"
    dtype: Dtype = "auto"

    def label(self) -> str:
        return part_of_name(last_name(self.model).lower())

    def open(self, pool: Pool) -> Scorer:
        return _CrossEncoderSession(self)


class _CrossEncoderSession:
    def __init__(self, config: CrossEncoder) -> None:
        self.config, self.lock = config, threading.Lock()
        self.model: Any = load(config)

    def score(self, pairs: Sequence[QueryPassage], cost: Cost | None = None) -> list[float]:
        """See ``Scorer``. Cost: ``pairs_scored``."""
        import torch

        config, device = self.config, self.model.device.type
        activation = torch.nn.Sigmoid() if config.activation == "sigmoid" else torch.nn.Identity()
        amp = compute_dtype(config.dtype, device)
        texts = [(pair.query, pair.passage) for pair in pairs]
        with self.lock, torch.autocast(device, dtype=amp, enabled=amp != torch.float32):
            outputs = self.model.predict(
                texts,
                batch_size=BATCH.get(device, BATCH["cpu"]),
                activation_fn=activation,
                show_progress_bar=False,
            )
        scores = np.asarray(outputs, np.float32).reshape(-1)
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"cross-encoder: {config.model!r} returns scores that are not finite")
        if cost is not None:
            cost["pairs_scored"] = cost.get("pairs_scored", 0) + len(pairs)
        return scores.tolist()

    def close(self) -> None:
        self.model = None


def load(config: CrossEncoder, device: str | None = None) -> Model:
    """The model with float32 weights, on ``device`` (CUDA if available). Raises ConfigError if it cannot be loaded."""
    from sentence_transformers import CrossEncoder as Model

    loaded = config.load_with(Model, device, max_length=config.max_length)
    outputs = loaded.config.num_labels
    if outputs != 1:
        raise ConfigError(
            f"cross-encoder: {config.model!r} has {outputs} outputs, but a teacher needs one score; give a re-ranker"
        )
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(
            f"cross-encoder: max_length = {config.max_length}: {config.model!r} reads at most {limit} tokens"
        )
    return loaded.eval()
