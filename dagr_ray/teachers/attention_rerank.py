"""Attention as a re-ranker: the attention of a query's tokens to the passages before it in the prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import ModelName
from dagr_ray.core.placement import Pool
from dagr_ray.core.words import first_words
from dagr_ray.retrieval.encoder import Dtype, Pinned, compute_dtype
from dagr_ray.teachers import Cost, QueryPassage, Scorer, Teacher, by_query

if TYPE_CHECKING:
    import torch

# the name under which transformers calls `_attend`
IMPLEMENTATION = "dagr-heads"
BEFORE = "Here are some passages:"
ASK = "\n\nFind the passages that answer the query.\nQuery:"
CONTENT_FREE = " N/A"
CHARACTERS_PER_WORD = 12

Head = tuple[int, int]


class AttentionRerank(Pinned, Teacher):
    """The attention of a query's tokens to each of its passages, which precede the query in one prompt.

    The method is Chen et al. 2024 (arXiv 2410.02642) with its calibration: the attention of the content-free query "N/A"
    is subtracted, token by token, and tokens more than two standard deviations below the mean are dropped. ``heads`` are
    the contrastive retrieval heads of Tran et al. 2025 (arXiv 2510.02219): a few (layer, head) that the stage
    ``RetrievalHeads`` selects on a labelled sample; an empty value means all heads. Layers above the last of these heads are
    not loaded.

    The passages are in the order of a hash, so that their origin has no effect; each is one line of up to ``max_words``
    words. A query with more than ``window`` passages is split over several prompts. Scores compare within a query.

    >>> AttentionRerank(heads=((7, 2), (11, 0))).layers()
    12
    """

    abstract: ClassVar[bool] = False
    reads_heads: ClassVar[bool] = True
    version: ClassVar[int] = 2  # cuts texts by words of any script
    pool: ClassVar[str] = "retrieve"
    model: ModelName = "HuggingFaceTB/SmolLM2-135M-Instruct"
    heads: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] = ()
    max_words: Annotated[int, Field(ge=8)] = 80
    window: Annotated[int, Field(ge=2)] = 40
    dtype: Dtype = "auto"

    def label(self) -> str:
        return f"{len(self.heads)}heads" if self.heads else "all"

    def layers(self) -> int | None:
        """The number of layers to compute; None for all."""
        return max(layer for layer, _ in self.heads) + 1 if self.heads else None

    def open(self, pool: Pool) -> Scorer:
        return AttentionSession(self)


class LabelledQuery(NamedTuple):
    """A query's passages with labels: at least one is known to be relevant, the others are hard negatives."""

    pairs: Sequence[QueryPassage]
    relevant: frozenset[str]


def best_heads(scores: np.ndarray, keep: int) -> tuple[Head, ...]:
    """The ``keep`` (layer, head) of the highest scores [layers, heads], best first.

    >>> best_heads(np.array([[0.1, 0.4], [0.3, 0.2]]), 2)
    ((0, 1), (1, 0))
    """
    best = np.argsort(-scores, axis=None, kind="stable")[:keep]
    return tuple((int(i // scores.shape[1]), int(i % scores.shape[1])) for i in best)


def head_scores(measured: Sequence[tuple[np.ndarray, LabelledQuery]], temperature: float) -> np.ndarray:
    """The contrastive score [layers, heads] of each head, 0 to 1, by arXiv 2510.02219.

    The score is the mean over queries of a relevant passage's share in a softmax over the attention masses of that
    passage and the query's negatives, at ``temperature``. ``measured`` has the masses [layers, heads, passages] of each
    query. Several relevant passages of a query count separately, each against the negatives only.
    """
    total, shares = 0, 0.0
    for masses, labelled in measured:
        relevant = np.array([pair.doc_id in labelled.relevant for pair in labelled.pairs])
        logits = masses.astype(np.float64) / temperature
        for i in np.flatnonzero(relevant):
            among = np.concatenate([logits[..., i : i + 1], logits[..., ~relevant]], axis=-1)
            weights = np.exp(among - among.max(axis=-1, keepdims=True))
            shares = shares + weights[..., 0] / weights.sum(axis=-1)
            total += 1
    if not total:
        raise ConfigError("heads: no query of the sample has a relevant passage; give a labelled sample")
    return shares / total  # type: ignore[return-value]


class AttentionSession:
    """A language model without its output head, cut after the last layer with a selected head."""

    def __init__(self, config: AttentionRerank) -> None:
        self.config, self.lock = config, threading.Lock()
        self.model, self.tokenizer = _load(config)
        shape = self.model.config
        self.shape = (shape.num_hidden_layers, shape.num_attention_heads)
        wanted = config.heads or tuple((i, h) for i in range(self.shape[0]) for h in range(self.shape[1]))
        beyond = next((head for head in wanted if head[0] >= self.shape[0] or head[1] >= self.shape[1]), None)
        if beyond is not None:
            raise ConfigError(
                f"attention-rerank: heads has {beyond}, but {config.model!r} has (layers, heads) = {self.shape}; "
                "select heads of this model"
            )
        self.of_layer: dict[int, list[int]] = {}
        for layer, head in wanted:
            self.of_layer.setdefault(layer, []).append(head)
        self.seen: dict[int, torch.Tensor] = {}
        self.tokens = 0
        layers = [
            module for module in self.model.modules() if hasattr(module, "layer_idx") and hasattr(module, "q_proj")
        ]
        for module in layers:
            module.dagr_look = self._look if module.layer_idx in self.of_layer else None
        self.looking = 0

    def score(self, pairs: Sequence[QueryPassage], cost: Cost | None = None) -> list[float]:
        """See ``Scorer``: the sum over the heads of the calibrated attention to the passage. Cost: ``prompt_tokens``."""
        before, scores = self.tokens, []
        for group in by_query(pairs):
            scores += self.masses(group).sum(axis=(0, 1)).tolist()
        if cost is not None:
            cost["prompt_tokens"] = cost.get("prompt_tokens", 0) + self.tokens - before
        return scores

    def masses(self, pairs: Sequence[QueryPassage]) -> np.ndarray:
        """Calibrated attention [layers, heads, passages] to the passages of one query; 0 for heads that are not used."""
        order = sorted(range(len(pairs)), key=lambda i: tables.unit_of("attention", pairs[i].query_id, pairs[i].doc_id))
        masses = np.zeros((*self.shape, len(pairs)))
        windows = -(-len(pairs) // self.config.window)
        for w in range(windows):
            rows = order[w::windows]
            with self.lock:
                masses[..., rows] = self._window([pairs[i] for i in rows])
        return masses

    def _window(self, pairs: Sequence[QueryPassage]) -> np.ndarray:
        import torch

        start = self.tokenizer("").input_ids[:1]  # the tokenizer's start token, if it has one
        tokens, spans = start + self._ids(BEFORE), []
        for number, pair in enumerate(pairs, 1):
            tokens += self._ids(f"\n\n[{number}] ")
            text = self._ids(self._cut(pair.passage))
            spans.append((len(tokens), len(tokens) + len(text)))
            tokens += text
        ask, query, nothing = self._ids(ASK), self._ids(" " + self._cut(pairs[0].query)), self._ids(CONTENT_FREE)
        limit = self.model.config.max_position_embeddings
        if len(tokens) + len(ask) + len(query) > limit:
            raise ConfigError(
                f"attention-rerank: {len(pairs)} passages have {len(tokens)} tokens, but {self.config.model!r} reads "
                f"{limit}; lower window or max_words"
            )
        self.tokens += len(tokens) + 2 * len(ask) + len(query) + len(nothing)
        with torch.inference_mode():
            cache = self.model(input_ids=self._tensor(tokens), use_cache=True).past_key_values
            asked = self._mean_attention(cache, len(tokens), ask, query)
            calibrated = asked - self._mean_attention(cache, len(tokens), ask, nothing)
            masses = torch.zeros(*self.shape, len(pairs))
            for at, (first, last) in enumerate(spans):
                span = calibrated[..., first:last]
                if last - first > 1:  # tokens that the content-free query attends to far more are noise
                    low = span.mean(dim=-1, keepdim=True) - 2 * span.std(dim=-1, keepdim=True)
                    span = span.masked_fill(span < low, 0.0)
                masses[..., at] = span.sum(dim=-1)
        return masses.numpy()

    def _mean_attention(self, cache: Any, prefix: int, ask: list[int], query: list[int]) -> torch.Tensor:
        """The mean attention [layers, heads, prefix] of the tokens of ``query`` to the tokens before it."""
        import torch

        self.seen, self.looking = {}, len(query)
        try:
            self.model(input_ids=self._tensor(ask + query), past_key_values=cache, use_cache=True)
        finally:
            self.looking = 0
        cache.crop(-len(ask) - len(query))
        attention = torch.zeros(*self.shape, prefix)
        for layer, weights in self.seen.items():
            attention[layer, self.of_layer[layer]] = weights[:, :prefix].cpu()
        self.seen = {}
        return attention

    def _look(self, module: Any, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Records the attention of the last ``looking`` rows: the softmax that fused attention does not return."""
        import torch

        if not self.looking:
            return
        heads = self.of_layer[module.layer_idx]
        group = query.shape[1] // key.shape[1]
        rows = query[0, heads, -self.looking :].float()
        keys = key[0, [head // group for head in heads]].float()
        scores = rows @ keys.transpose(1, 2) * (scaling or query.shape[-1] ** -0.5)
        ends = torch.arange(keys.shape[1] - self.looking, keys.shape[1], device=scores.device)
        later = torch.arange(keys.shape[1], device=scores.device)[None, :] > ends[:, None]
        self.seen[module.layer_idx] = scores.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=1)

    def _ids(self, text: str) -> list[int]:
        # special tokens inside a text are tokenised as characters
        ids = self.tokenizer(tables.clean(text), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(ids.input_ids)

    def _cut(self, text: str) -> str:
        words = self.config.max_words
        return first_words(text[: 4 * words * CHARACTERS_PER_WORD], words)[: words * CHARACTERS_PER_WORD]

    def _tensor(self, tokens: list[int]) -> torch.Tensor:
        import torch

        return torch.tensor([tokens], device=self.model.device)

    def close(self) -> None:
        self.model = None


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Fused attention that also records some rows of the attention weights, which it does not return."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    look: Callable[..., None] | None = getattr(module, "dagr_look", None)
    if look is not None:
        look(module, query, key, more.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


def _load(config: AttentionRerank) -> tuple[Any, Any]:
    """The model's layers up to the last one needed, and its tokenizer. Raises ConfigError if it cannot be loaded."""
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.utils import logging

    config.check()
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = {"revision": None if config.local else config.revision, "local_files_only": config.local}
    name = str(config.folder) if config.local else config.model
    try:
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
        whole = shape.num_hidden_layers
        # layers above this number are not loaded; the session checks the heads later
        shape.num_hidden_layers = min(config.layers() or whole, whole)
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[: shape.num_hidden_layers]
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers warns about the layers that are not loaded
        try:
            model = AutoModel.from_pretrained(
                name,
                config=shape,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=compute_dtype(config.dtype, device),
                attn_implementation=IMPLEMENTATION,
                **source,
            )
        finally:
            logging.set_verbosity(before)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **source)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"attention-rerank: model = {config.model!r} cannot be loaded: {reason}") from error
    if not any(hasattr(module, "layer_idx") and hasattr(module, "q_proj") for module in model.modules()):
        raise ConfigError(
            f"attention-rerank: the attention of {config.model!r} is not supported; give a model of the Llama, Qwen, "
            "Mistral or Gemma family"
        )
    return model.eval().to(device), tokenizer
