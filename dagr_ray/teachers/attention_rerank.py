"""Attention as a re-ranker: where a language model looks when it reads a query after many passages."""

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
from dagr_ray.teachers import Cost, Pair, Scorer, Teacher, by_query

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
    """The attention that a query's tokens pay to each passage, all passages of the query in one prompt before it.

    Attention as a ranking is Chen et al. 2024 (arXiv 2410.02642), with its calibration: what the content-free query
    "N/A" attends to is taken off, token by token, and tokens that fall more than two standard deviations under the mean
    are left out. ``heads`` are the contrastive retrieval heads of Tran et al. 2025 (arXiv 2510.02219): a few (layer,
    head) that the stage ``Heads`` finds on a labelled sample; none given means all heads. Layers above the last of them are
    not even loaded.

    The passages stand in the order of a hash, so that where a pair comes from says nothing; each is one line of up to
    ``max_words`` words. A query with more than ``window`` passages is asked in several prompts. Scores compare within a
    query.

    >>> AttentionRerank(heads=((7, 2), (11, 0))).layers()
    12
    """

    abstract: ClassVar[bool] = False
    reads_heads: ClassVar[bool] = True
    version: ClassVar[int] = 2  # texts are cut by words of any script
    pool: ClassVar[str] = "retrieve"
    model: ModelName = "HuggingFaceTB/SmolLM2-135M-Instruct"
    heads: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] = ()
    max_words: Annotated[int, Field(ge=8)] = 80
    window: Annotated[int, Field(ge=2)] = 40
    dtype: Dtype = "auto"

    def label(self) -> str:
        return f"{len(self.heads)}heads" if self.heads else "all"

    def layers(self) -> int | None:
        """How many layers are computed; None for all."""
        return max(layer for layer, _ in self.heads) + 1 if self.heads else None

    def open(self, pool: Pool) -> Scorer:
        return AttentionSession(self)


class Judged(NamedTuple):
    """A query's passages, of which at least one is known to be relevant; the others are hard negatives."""

    pairs: Sequence[Pair]
    relevant: frozenset[str]


def best_heads(scores: np.ndarray, keep: int) -> tuple[Head, ...]:
    """The ``keep`` (layer, head) of the highest scores [layers, heads], best first.

    >>> best_heads(np.array([[0.1, 0.4], [0.3, 0.2]]), 2)
    ((0, 1), (1, 0))
    """
    best = np.argsort(-scores, axis=None, kind="stable")[:keep]
    return tuple((int(i // scores.shape[1]), int(i % scores.shape[1])) for i in best)


def head_scores(measured: Sequence[tuple[np.ndarray, Judged]], temperature: float) -> np.ndarray:
    """The contrastive score [layers, heads] of each head, 0 to 1: the mean over queries of the share that a relevant
    passage has in a softmax over the attention masses of it and the query's other passages, at ``temperature``.

    ``measured`` has the masses [layers, heads, passages] of each query. After arXiv 2510.02219, whose heads are scored
    with such a softmax; several relevant passages of a query count in turn, each against the negatives alone.
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
    """A language model without its head, cut after the last layer that is looked at."""

    def __init__(self, config: AttentionRerank) -> None:
        self.config, self.lock = config, threading.Lock()
        self.model, self.tokenizer = _load(config)
        shape = self.model.config
        self.shape = (shape.num_hidden_layers, shape.num_attention_heads)
        wanted = config.heads or tuple((i, h) for i in range(self.shape[0]) for h in range(self.shape[1]))
        beyond = next((head for head in wanted if head[0] >= self.shape[0] or head[1] >= self.shape[1]), None)
        if beyond is not None:
            raise ConfigError(
                f"attention-rerank: heads hold {beyond}, and {config.model!r} has {self.shape}; find them anew"
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

    def score(self, pairs: Sequence[Pair], cost: Cost | None = None) -> list[float]:
        """See ``Scorer``: the sum over the kept heads of the calibrated attention to the passage. Cost: ``prompt_tokens``."""
        before, found = self.tokens, []
        for own in by_query(pairs):
            found += self.masses(own).sum(axis=(0, 1)).tolist()
        if cost is not None:
            cost["prompt_tokens"] = cost.get("prompt_tokens", 0) + self.tokens - before
        return found

    def masses(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Calibrated attention [layers, heads, passages] to the passages of one query; 0 for heads that are not kept."""
        order = sorted(range(len(pairs)), key=lambda i: tables.unit_of("attention", pairs[i].query_id, pairs[i].doc_id))
        found = np.zeros((*self.shape, len(pairs)))
        windows = -(-len(pairs) // self.config.window)
        for w in range(windows):
            rows = order[w::windows]
            with self.lock:
                found[..., rows] = self._window([pairs[i] for i in rows])
        return found

    def _window(self, pairs: Sequence[Pair]) -> np.ndarray:
        import torch

        start = self.tokenizer("").input_ids[:1]  # what the tokenizer puts before every text, if anything
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
                f"attention-rerank: {len(pairs)} passages make {len(tokens)} tokens, and {self.config.model!r} reads "
                f"{limit}; lower window or max_words"
            )
        self.tokens += len(tokens) + 2 * len(ask) + len(query) + len(nothing)
        with torch.inference_mode():
            cache = self.model(input_ids=self._tensor(tokens), use_cache=True).past_key_values
            paid = self._paid(cache, len(tokens), ask, query) - self._paid(cache, len(tokens), ask, nothing)
            found = torch.zeros(*self.shape, len(pairs))
            for at, (first, last) in enumerate(spans):
                own = paid[..., first:last]
                if last - first > 1:  # a token that the content-free query wants far more says nothing about this one
                    low = own.mean(dim=-1, keepdim=True) - 2 * own.std(dim=-1, keepdim=True)
                    own = own.masked_fill(own < low, 0.0)
                found[..., at] = own.sum(dim=-1)
        return found.numpy()

    def _paid(self, cache: Any, prefix: int, ask: list[int], query: list[int]) -> torch.Tensor:
        """The mean attention [layers, heads, prefix] of the tokens of ``query`` to what stands before."""
        import torch

        self.seen, self.looking = {}, len(query)
        try:
            self.model(input_ids=self._tensor(ask + query), past_key_values=cache, use_cache=True)
        finally:
            self.looking = 0
        cache.crop(-len(ask) - len(query))
        found = torch.zeros(*self.shape, prefix)
        for layer, weights in self.seen.items():
            found[layer, self.of_layer[layer]] = weights[:, :prefix].cpu()
        self.seen = {}
        return found

    def _look(self, module: Any, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Notes the attention of the last ``looking`` rows: the softmax that fused attention keeps to itself."""
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
        # chat markers inside a text are characters
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
    """Fused attention, with a look at some rows of the weights that it does not hand out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    look: Callable[..., None] | None = getattr(module, "dagr_look", None)
    if look is not None:
        look(module, query, key, more.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


def _load(config: AttentionRerank) -> tuple[Any, Any]:
    """The model's layers up to the last one needed, and its tokenizer. Raises ConfigError where it cannot be loaded."""
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
        # layers that the config does not name are not loaded; the heads' own check comes later
        shape.num_hidden_layers = min(config.layers() or whole, whole)
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[: shape.num_hidden_layers]
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of the layers that are left out
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
            f"attention-rerank: {config.model!r} computes attention in a way that is not known here; give a model of the "
            "Llama, Qwen, Mistral or Gemma kind"
        )
    return model.eval().to(device), tokenizer
