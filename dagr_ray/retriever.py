"""The bi-encoder: load, encode, save. A sentence-transformers model that turns texts into unit vectors. No Ray."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from dagr_ray.config import Config, ConfigError, Later, content_hash
from dagr_ray.store import local_folder
from dagr_ray.tables import seed_of

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Opened = TypeVar("Opened")
Dtype = Literal["auto", "float32", "bfloat16"]
# The names under which a model's card may give its prompt for passages.
PASSAGE_PROMPTS = ("document", "passage", "corpus")
CARD = "config_sentence_transformers.json"
# Texts tokenised at once: enough to sort by length, few enough that a corpus does not stand in memory as lists.
WINDOW = 8192
# Padded tokens of one forward pass. On 2 cores 512, 1,024, 2,048 and 4,096 gave 106, 111, 109 and 104 passages/s.
TOKENS = {"cpu": 1024, "cuda": 131072}
# Batches computed at once on a CPU; more would wait for Python's lock.
THREADS = 8


class Pinned(Config):
    """A model that is known by its content: a folder (a path, or a URI to fetch it from once), or a hub id with a commit."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The model's folder on this machine, fetched where ``model`` is a URI; no folder where it is a hub id."""
        return local_folder(self.model)

    @property
    def local(self) -> bool:
        return self.folder.is_dir()

    def identity(self) -> dict[str, Any]:
        """A folder is named by its content, a hub model by its commit. Raises ConfigError where there is neither."""
        if self.local:
            return super().identity() | {"model": content_hash(self.folder), "revision": None}
        self.check()
        return super().identity()

    def check(self) -> None:
        """Raises ConfigError where the model is no folder with safetensors and no hub id with a full commit."""
        if self.local:
            if not any(self.folder.rglob("*.safetensors")):
                raise ConfigError(f"{self.type}: no *.safetensors in {self.model!r}; save the model as safetensors")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.model):
            raise ConfigError(f"{self.type}: no folder at {self.model!r}; give one, or a hub id and its revision")
        elif not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ConfigError(
                f"{self.type}: revision = {self.revision!r} for {self.model!r}: no folder of that name, and a hub id needs "
                "the 40 hex digits of a commit; set revision, or give the path of a local model"
            )

    def opened(self, opener: Callable[..., Opened], device: str | None, **options: Any) -> Opened:
        """What ``opener`` of sentence-transformers makes of the model: float32 weights, safetensors, no code of the model's.

        Raises ConfigError where it cannot be loaded.
        """
        import torch
        from transformers.utils import logging

        self.check()
        logging.disable_progress_bar()
        try:
            return opener(
                str(self.folder) if self.local else self.model,
                device=device,
                revision=None if self.local else self.revision,
                local_files_only=self.local,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{self.type}: model = {self.model!r} cannot be loaded: {reason}") from error


class Encoder(Pinned):
    """A bi-encoder: a model folder (a path, or a URI to fetch it from once), or a hub id with the commit that pins it.

    Anything that sentence-transformers opens, decoders too. ``layers`` keeps only the first of the transformer's layers.
    ``reinitialise`` is a seed: the same embeddings, with all other weights drawn anew, which makes a retriever that is
    not pre-trained. ``dtype`` ``auto`` computes in bfloat16 where the processor has it (the weights stay float32), and
    else in float32. Prefixes are put before the text, as E5 and others want. Where they are not given, they are the
    prompts of the model's card (``config_sentence_transformers.json``), if it has some: see ``prompts``. So is
    ``pooling`` that of its modules; a model without any is pooled by its last token if it is a causal language model, else by
    the mean.
    """

    model: Annotated[str, Field(min_length=1)] = "sentence-transformers/all-MiniLM-L6-v2"
    query_prefix: str | None = None
    doc_prefix: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 256
    dtype: Dtype = "auto"
    reinitialise: Annotated[int, Field(ge=0)] | None = None
    layers: Annotated[int, Field(ge=1)] | None = None
    pooling: Annotated[Literal["mean", "cls", "lasttoken"] | None, Later()] = None

    def identity(self) -> dict[str, Any]:
        """By the prefixes that are used, where the model is here to say them."""
        said = super().identity()
        if self.local:
            said["query_prefix"], said["doc_prefix"] = self.prompts()
        return said

    def prompts(self) -> tuple[str, str]:
        """What is put before a query and before a passage: the prefixes, or the model's own prompts.

        Fetches the card of a hub model, unless both prefixes are given.
        """
        if self.query_prefix is not None and self.doc_prefix is not None:
            return self.query_prefix, self.doc_prefix
        card = self._card().get("prompts") or {}
        passage = next((card[name] for name in PASSAGE_PROMPTS if card.get(name)), "")
        query = card.get("query") or ""
        given = (self.query_prefix, self.doc_prefix)
        return query if given[0] is None else given[0], passage if given[1] is None else given[1]

    def _card(self) -> dict[str, Any]:
        if self.local:
            path = self.folder / CARD
            return json.loads(path.read_text()) if path.is_file() else {}
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        self.check()
        try:
            return json.loads(Path(hf_hub_download(self.model, CARD, revision=self.revision)).read_text())
        except EntryNotFoundError:
            return {}

    def label(self) -> str:
        name = self.folder.name.lower()
        name += "" if self.layers is None else f"-{self.layers}layers"
        return name + ("" if self.reinitialise is None else f"-reinit{self.reinitialise}")


def load(encoder: Encoder, device: str | None = None, model: str | Path | None = None) -> SentenceTransformer:
    """The encoder with float32 weights, on ``device`` (CUDA where there is one). Safetensors only, no remote code.

    ``model`` is a folder that ``save`` wrote, and takes the place of the encoder's own weights (then nothing is
    re-initialised or cut). Raises ConfigError where the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    if model is not None:
        encoder = encoder.model_copy(update={"model": str(model), "reinitialise": None, "layers": None})
    loaded = encoder.opened(SentenceTransformer, device)
    transformer: Any = loaded[0].auto_model
    limit = getattr(transformer.config, "max_position_embeddings", None)
    # RoBERTa and MPNet number positions from the one after their padding's
    unused = getattr(
        getattr(getattr(transformer, "embeddings", None), "position_embeddings", None), "padding_idx", None
    )
    limit = limit if limit is None or unused is None else limit - unused - 1
    if limit is not None and encoder.max_length > limit:
        raise ConfigError(f"encoder: max_length = {encoder.max_length}: {encoder.model!r} reads at most {limit} tokens")
    loaded.max_seq_length = encoder.max_length
    _pool(loaded, encoder.pooling)
    if loaded.tokenizer.pad_token is None:  # a decoder that was made to write one text at a time
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    if encoder.layers is not None:
        _keep_layers(transformer, encoder.layers)
    if encoder.reinitialise is not None:
        _reinitialise(transformer, encoder.reinitialise)
    return loaded.eval()


def _pool(model: SentenceTransformer, pooling: str | None) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    at = next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)
    if pooling is not None and at is not None:
        model[at] = Pooling(model[0].get_embedding_dimension(), pooling)


def _keep_layers(transformer: Any, layers: int) -> None:
    import torch

    stack = next((m for m in transformer.modules() if isinstance(m, torch.nn.ModuleList)), None)
    if stack is None or len(stack) < layers:
        raise ConfigError(f"encoder: layers = {layers}: the model has {len(stack or [])}; give no more than that")
    del stack[layers:]
    transformer.config.num_hidden_layers = layers


def _reinitialise(transformer: Any, seed: int) -> None:
    """Draws all weights outside the embeddings as BERT does: matrices from N(0, initializer_range), norms 1, biases 0.

    Source: Devlin et al., arXiv 1810.04805, and the initialisation in its code. Each matrix has a seed of its own, made
    from its name, so that the order in which a library lists them does not matter.
    """
    import torch

    embeddings = getattr(transformer, "embeddings", None) or transformer.get_input_embeddings()
    kept = {id(parameter) for parameter in embeddings.parameters()}
    deviation = getattr(transformer.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if id(parameter) in kept:
                continue
            if parameter.ndim > 1:
                generator = torch.Generator().manual_seed(seed_of(seed, name))
                drawn = torch.empty(parameter.shape).normal_(0, deviation, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def compute_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The type that the matrices are multiplied in. bfloat16 is 2 to 2.6 times as fast on a CPU that has it."""
    import torch

    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device == "cpu" and has else torch.float32


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    prefix: str = "",
    dtype: Dtype = "auto",
    tokens_per_batch: int | None = None,
) -> np.ndarray:
    """Unit vectors of texts, float32 [len(texts), dimension], in the order of the texts.

    Texts are batched by length under a budget of padded tokens. Pooling is done in float32 whatever the transformer
    computes in: a mean over 256 bfloat16 values loses digits for nothing. Raises FloatingPointError where a vector is
    not finite, which is what a model looks like whose training diverged.
    """
    import torch

    device = model.device.type
    budget = tokens_per_batch or TOKENS.get(device, TOKENS["cpu"])
    amp = compute_dtype(dtype, device)
    vectors = np.empty((len(texts), int(model.get_embedding_dimension() or 0)), np.float32)

    def some(window: _Window, batches: Sequence[np.ndarray]) -> np.ndarray:
        found: list[torch.Tensor] = []
        # around all batches: weights are cast once for it
        with torch.inference_mode(), torch.autocast(device, dtype=amp, enabled=amp != torch.float32):
            for rows in batches:
                features = {name: values.to(model.device, non_blocking=True) for name, values in window.batch(rows)}
                out = model[0](features)
                out = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in out.items()}
                with torch.autocast(device, enabled=False):
                    for module in list(model)[1:]:
                        out = module(out)
                    found.append(torch.nn.functional.normalize(out["sentence_embedding"], dim=1))
            # once for all: a GPU would stand still for every batch that is waited for
            return torch.cat(found).cpu().numpy()

    cores = torch.get_num_threads() if device == "cpu" else 1
    for start, window in _read_ahead(model, texts, prefix):
        batches = list(_batches(window.lengths, budget))
        for rows, found in _shared_out(partial(some, window), batches, cores):
            vectors[start + rows] = found
    if not np.isfinite(vectors).all():
        raise FloatingPointError("the encoder gives vectors that are not finite: its training has diverged; lower lr")
    return vectors


def _shared_out(
    compute: Callable[[Sequence[np.ndarray]], np.ndarray], batches: Sequence[np.ndarray], cores: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and what ``compute`` makes of them: on several cores each thread does batches of its own.

    Cores that share one batch wait for the slowest of them after every operator, and on a machine with other work that is
    one which does not run.
    """
    import torch

    threads = min(cores, THREADS, len(batches))
    dealt = [batches[i::threads] for i in range(threads)]
    rows = map(np.concatenate, dealt)
    if threads == 1:
        yield from zip(rows, map(compute, dealt), strict=True)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            yield from zip(rows, pool.map(compute, dealt), strict=True)
    finally:
        torch.set_num_threads(cores)  # threads that are started from now on take the last number that was set


class _Window:
    """Texts as tokens, laid end to end."""

    def __init__(self, model: SentenceTransformer, texts: Sequence[str]) -> None:
        self.tokenizer = model.tokenizer
        tokens = self.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
        self.lengths = np.fromiter(map(len, tokens["input_ids"]), np.int64, len(texts))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids = np.fromiter(itertools.chain.from_iterable(tokens["input_ids"]), np.int64, int(self.lengths.sum()))
        self.typed = "token_type_ids" in tokens

    def batch(self, rows: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
        """What the tokenizer's own ``pad`` makes of these rows, without a Python number for each token."""
        import torch

        lengths, longest = self.lengths[rows], max(int(self.lengths[rows].max()), 1)
        places = np.arange(longest)
        left = self.tokenizer.padding_side == "left"
        mask = places >= (longest - lengths)[:, None] if left else places < lengths[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_token_id or 0, np.int64)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids[mask] = self.ids[np.repeat(self.starts[rows], lengths) + within]
        yield "input_ids", torch.from_numpy(ids)
        yield "attention_mask", torch.from_numpy(mask.astype(np.int64))
        if self.typed:
            yield "token_type_ids", torch.full(mask.shape, 0, dtype=torch.int64)


def _read_ahead(model: SentenceTransformer, texts: Sequence[str], prefix: str) -> Iterator[tuple[int, _Window]]:
    """The texts in windows of tokens; while one is encoded, the next is read in a thread."""

    def read(start: int) -> _Window:
        return _Window(model, [prefix + text for text in texts[start : start + WINDOW]])

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(read, 0) if texts else None
        for start in range(0, len(texts), WINDOW):
            assert following is not None
            window, after = following.result(), start + WINDOW
            following = thread.submit(read, after) if after < len(texts) else None
            yield start, window


def _batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Rows by falling length, cut so that rows x longest stays within the budget (one row always goes)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, budget // max(int(lengths[order[start]]), 1))
        yield order[start:stop]
        start = stop


def save(model: SentenceTransformer, folder: str | Path) -> list[str]:
    """Writes the model as a sentence-transformers folder with safetensors; returns its files, relative, sorted."""
    root = Path(folder)
    model.save_pretrained(str(root), create_model_card=False, safe_serialization=True)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
