"""The bi-encoder: load, encode, save. A sentence-transformers model that maps texts to unit vectors."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from dagr_ray.core.config import Config, ConfigError, OmitWhenDefault, content_hash
from dagr_ray.core.paths import ModelName, part_of_name
from dagr_ray.quickstart.models import unpacked
from dagr_ray.retrieval import model_folder, weights

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Opened = TypeVar("Opened")
Dtype = Literal["auto", "float32", "bfloat16"]
Task = Literal["query", "document"]
TASKS: tuple[Task, Task] = ("query", "document")
log = logging.getLogger("dagr")
# Other names of a model card's prompt for passages. The library uses none of them for documents.
PASSAGE_PROMPTS = ("passage", "corpus")
# Raise it when the same fields give other vectors.
READING = 2
# Texts that are tokenised at once: enough to sort by length, few enough not to hold a corpus in memory as lists.
WINDOW = 8192
# The same if the library forms padded batches of them.
PADDED_WINDOW = 1024
# Padded tokens of one forward pass. On 2 cores 512, 1,024, 2,048 and 4,096 gave 106, 111, 109 and 104 passages/s.
TOKENS = {"cpu": 1024, "cuda": 131072}
# A static model only looks up vectors, so its batches have so many times as many tokens.
STATIC_FACTOR = 64
# Batches that are computed at once on a CPU; more would wait for Python's global lock.
THREADS = 8


class Pinned(Config):
    """A model identified by its content: a folder (a path, or a URI that is fetched once), or a hub id with a commit."""

    model: ModelName
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The model's folder on this machine, fetched if ``model`` is a URI; not an existing folder for a hub id."""
        return unpacked(self.model)

    @property
    def local(self) -> bool:
        return self.folder.is_dir()

    def identity(self) -> dict[str, Any]:
        """A folder by its content, a hub model by its commit. Raises ConfigError if there is neither."""
        if self.local:
            return super().identity() | {"model": content_hash(self.folder), "revision": None}
        self.check()
        return super().identity()

    def check(self) -> None:
        """Raises ConfigError unless the model is a complete folder with safetensors, or a hub id with a full commit."""
        if self.local:
            if not any(self.folder.rglob("*.safetensors")):
                raise ConfigError(f"{self.type}: no *.safetensors in {self.model!r}; save the model as safetensors")
            model_folder.check_complete(self.folder, self.type)
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.model):
            raise ConfigError(f"{self.type}: no folder at {self.model!r}; give a folder, or a hub id and its revision")
        elif not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ConfigError(
                f"{self.type}: revision = {self.revision!r} for {self.model!r}: no folder of that name, and a hub id needs "
                "the 40 hex digits of a commit; set revision, or give the path of a local model"
            )

    def load_with(self, opener: Callable[..., Opened], device: str | None, **options: Any) -> Opened:
        """The model opened by ``opener`` of sentence-transformers: float32 weights, safetensors, no code from the model.

        Raises ConfigError if it cannot be loaded.
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
        except (MemoryError, torch.OutOfMemoryError, ModuleNotFoundError):
            raise
        except Exception as error:  # libraries raise many types for a damaged folder
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{self.type}: model = {self.model!r} cannot be loaded: {reason}") from error


class Encoder(Pinned):
    """A bi-encoder: a model folder (a path, or a URI that is fetched once), or a hub id with its commit.

    Any text encoder that sentence-transformers opens without code from the model. Its vectors are the library's
    ``encode_query`` and ``encode_document``, normalised to length 1.

    ``max_length`` cuts texts to so many tokens; the default is the model's own (a module without a transformer always keeps
    its own). ``layers`` keeps only the first layers of the transformer. ``reinitialise`` is a seed: the embeddings stay, all
    other weights are initialised again, which gives a retriever without pre-training. ``dtype`` ``auto`` computes in bfloat16
    if the processor supports it (the weights stay float32), otherwise in float32.

    Prefixes precede the text, as E5 and other models require. A configured prefix overrides the model's own, and a trained
    model is saved with it. By default, the prefixes are the prompts ``query`` and ``document`` of the model's card
    (``config_sentence_transformers.json``), if it has them: see ``prompts``. The default ``pooling`` is that of the model's
    modules; a model without modules is pooled by its last token if it is a causal language model, otherwise by the mean.
    """

    model: ModelName = "sentence-transformers/all-MiniLM-L6-v2"
    query_prefix: str | None = None
    doc_prefix: str | None = None
    max_length: Annotated[int, Field(ge=8)] | None = None
    dtype: Dtype = "auto"
    reinitialise: Annotated[int, Field(ge=0)] | None = None
    layers: Annotated[int, Field(ge=1)] | None = None
    pooling: Annotated[Literal["mean", "cls", "lasttoken"] | None, OmitWhenDefault()] = None

    def identity(self) -> dict[str, Any]:
        """With the effective prefixes, if the model's folder is on this machine."""
        identity = super().identity() | {"reading": READING}
        if self.local:
            identity["query_prefix"], identity["doc_prefix"] = self.prompts()
        return identity

    def check(self) -> None:
        """Raises ConfigError if the model's files show that it is not a text encoder, or cannot be opened."""
        super().check()
        if self.local:
            model_folder.check_encoder(self.folder, self.type)

    def prompts(self) -> tuple[str, str]:
        """The texts before a query and before a passage: the configured prefixes, or the model's own prompts.

        Fetches the card of a hub model, unless both prefixes are set. Raises ConfigError if the card is damaged.
        """
        prefixes = (self.query_prefix, self.doc_prefix)
        own = {} if None not in prefixes else model_folder.prompts(self._card(), self.model, self.type)
        query, passage = (
            own.get(task, "") if prefix is None else prefix for task, prefix in zip(TASKS, prefixes, strict=True)
        )
        return query, passage

    def _card(self) -> dict[str, Any]:
        if self.local:
            return model_folder.card(self.folder, self.type)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        self.check()
        try:
            return json.loads(Path(hf_hub_download(self.model, model_folder.CARD, revision=self.revision)).read_text())
        except EntryNotFoundError:
            return {}

    def label(self) -> str:
        name = part_of_name(self.folder.name.lower())
        name += "" if self.layers is None else f"-{self.layers}layers"
        return name + ("" if self.reinitialise is None else f"-reinit{self.reinitialise}")


def load(encoder: Encoder, device: str | None = None, model: str | Path | None = None) -> SentenceTransformer:
    """The encoder with float32 weights, on ``device`` (CUDA if available). Safetensors only, no remote code.

    ``model`` is a folder that ``save`` wrote. It replaces the encoder's own weights, and then nothing is re-initialised or
    cut. Raises ConfigError if the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    if model is not None:
        encoder = encoder.model_copy(update={"model": str(model), "reinitialise": None, "layers": None})
    loaded = encoder.load_with(SentenceTransformer, device)
    modules = transformers(loaded)
    for module in modules:
        limit, own = positions(module), module.max_seq_length
        if limit is not None and (encoder.max_length or 0) > limit:
            raise ConfigError(
                f"encoder: max_length = {encoder.max_length}: {encoder.model!r} reads at most {limit} tokens"
            )
        module.max_seq_length = encoder.max_length or min(own, limit or own)
        if module.tokenizer.pad_token is None:  # a decoder for one text at a time
            module.tokenizer.pad_token = module.tokenizer.eos_token
    _pool(loaded, encoder)
    _prompt(loaded, encoder)
    if len(modules) != 1 and (encoder.layers is not None or encoder.reinitialise is not None):
        name = "reinitialise" if encoder.layers is None else "layers"
        raise ConfigError(f"encoder: {name}: {encoder.model!r} has {len(modules)} transformers, not one; remove {name}")
    if encoder.layers is not None:
        weights.keep_layers(modules[0].auto_model, encoder.layers)
    if encoder.reinitialise is not None:
        weights.reinitialise(modules[0].auto_model, encoder.reinitialise)
    return loaded.eval()


def transformers(model: SentenceTransformer) -> list[Any]:
    """The modules that read tokens, including those inside a router; none in a static model."""
    from sentence_transformers.base.modules import Transformer

    return [module for module in model.modules() if isinstance(module, Transformer) and module.tokenizer is not None]


def positions(module: Any) -> int | None:
    """The most tokens that a transformer can read; None if unlimited."""
    transformer = module.auto_model
    limit = getattr(transformer.config, "max_position_embeddings", None)
    # RoBERTa and MPNet number positions from the index after the padding's
    unused = getattr(
        getattr(getattr(transformer, "embeddings", None), "position_embeddings", None), "padding_idx", None
    )
    limit = limit if limit is None or unused is None else limit - unused - 1
    return limit if limit is not None and limit > 0 else None  # XLNet has -1


def _pool(model: SentenceTransformer, encoder: Encoder) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    if encoder.pooling is None:
        return
    at = next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)
    if at is None:
        raise ConfigError(f"encoder: pooling = {encoder.pooling!r}: {encoder.model!r} does not pool; remove pooling")
    old = model[at]
    model[at] = Pooling(old.embedding_dimension, encoder.pooling, include_prompt=old.include_prompt)


def _prompt(model: SentenceTransformer, encoder: Encoder) -> None:
    """Makes the effective prompts the model's own, so that they are saved with it."""
    others = [name for name in PASSAGE_PROMPTS if model.prompts.get(name)]
    for task, prefix in zip(TASKS, (encoder.query_prefix, encoder.doc_prefix), strict=True):
        model.prompts[task] = (model.prompts.get(task) or "") if prefix is None else prefix
    if encoder.doc_prefix is not None:
        model.prompts |= dict.fromkeys(others, encoder.doc_prefix)
    elif others and not model.prompts["document"]:
        log.warning(
            "encoder: %r has the prompt %r but none for 'document', so none is used, like encode_document; set doc_prefix",
            encoder.model, others[0],
        )  # fmt: skip


def compute_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The type for matrix products. bfloat16 is 2 to 2.6 times as fast on a CPU that supports it."""
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
    task: Task | None = None,
    tokens_per_batch: int | None = None,
) -> np.ndarray:
    """Unit vectors of texts, float32 [len(texts), dimension], in the order of the texts.

    The vectors equal the library's ``encode`` with the prompt ``prefix``; ``task`` selects a router's path. Texts are
    batched by length under a budget of padded tokens. Only transformers compute in ``dtype``; all other modules use float32,
    because a mean over 256 bfloat16 values loses precision. Raises FloatingPointError if a vector is not finite, which
    happens if the training of the model diverged.
    """
    import torch
    from sentence_transformers.util import truncate_embeddings

    device, chain = model.device.type, _chain(model, task)
    heavy = set(transformers(model))
    budget = tokens_per_batch or TOKENS.get(device, TOKENS["cpu"])
    budget *= 1 if heavy.intersection(module for module, _ in chain) else STATIC_FACTOR
    amp = compute_dtype(dtype, device)
    vectors = np.empty((len(texts), int(model.get_embedding_dimension() or 0)), np.float32)

    def compute(window: _Window | _Padded, batches: Sequence[np.ndarray]) -> np.ndarray:
        parts: list[torch.Tensor] = []
        # one autocast for all batches, so that weights are cast once
        with torch.inference_mode(), torch.autocast(device, dtype=amp, enabled=amp != torch.float32):
            for rows in batches:
                out = {
                    name: value.to(model.device, non_blocking=True) if torch.is_tensor(value) else value
                    for name, value in window.batch(rows)
                }
                for module, arguments in chain:
                    if module in heavy:
                        out = module(out, **arguments)
                        out = {
                            k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in out.items()
                        }
                    else:
                        with torch.autocast(device, enabled=False):
                            out = module(out, **arguments)
                cut = truncate_embeddings(out["sentence_embedding"], model.truncate_dim)
                parts.append(torch.nn.functional.normalize(cut.float(), dim=1))
            # one transfer for all batches, because a GPU idles while a batch is waited for
            return torch.cat(parts).cpu().numpy()

    cores = torch.get_num_threads() if device == "cpu" else 1
    for start, window in _read_ahead(model, texts, prefix, task, budget):
        for rows, part in _compute_in_threads(partial(compute, window), window.cut(budget), cores):
            vectors[start + rows] = part
    if not np.isfinite(vectors).all():
        raise FloatingPointError("the encoder returns vectors that are not finite: its training diverged; lower lr")
    return vectors


def _chain(model: SentenceTransformer, task: Task | None) -> list[tuple[Any, dict[str, Any]]]:
    """The modules that process a text, with their extra arguments. A router is replaced by its path for ``task``."""
    from sentence_transformers.base.modules import Router

    chain: list[tuple[Any, dict[str, Any]]] = []
    for name, module in model.named_children():
        if isinstance(module, Router):
            path = module.sub_modules[module._resolve_route(task=task, modality="text")]
            chain += [(step, {}) for step in path]
        else:
            takes_task = task is not None and "task" in (model.module_kwargs or {}).get(name, ())
            chain.append((module, {"task": task} if takes_task else {}))
    return chain


def _compute_in_threads(
    compute: Callable[[Sequence[np.ndarray]], np.ndarray], batches: Sequence[np.ndarray], cores: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and their results of ``compute``. On several cores, each thread computes its own batches.

    Cores that share a batch wait for the slowest core after every operator, and on a busy machine some core is often not
    running.
    """
    import torch

    threads = min(cores, THREADS, len(batches))
    shares = [batches[i::threads] for i in range(threads)]
    rows = map(np.concatenate, shares)
    if threads == 1:
        yield from zip(rows, map(compute, shares), strict=True)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,)) as pool:
            yield from zip(rows, pool.map(compute, shares), strict=True)
    finally:
        torch.set_num_threads(cores)  # new threads take the last number that was set


class _Window:
    """Texts as concatenated tokens of a transformer."""

    def __init__(
        self, model: SentenceTransformer, texts: Sequence[str], prefix: str = "", task: Task | None = None
    ) -> None:
        self.tokenizer, self.extra = _chain(model, task)[0][0].tokenizer, dict[str, Any]()
        tokens = self.tokenizer([prefix + text for text in texts], truncation=True)  # to the tokenizer's length
        self.lengths = np.fromiter(map(len, tokens["input_ids"]), np.int64, len(texts))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.ids = np.fromiter(itertools.chain.from_iterable(tokens["input_ids"]), np.int64, int(self.lengths.sum()))
        self.typed = "token_type_ids" in tokens

    def cut(self, budget: int) -> list[np.ndarray]:
        """The rows of each batch."""
        return list(_batches(self.lengths, budget))

    def batch(self, rows: np.ndarray) -> Iterator[tuple[str, Any]]:
        """The same as the tokenizer's ``pad`` of these rows, but without a Python object for each token."""
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
        yield from self.extra.items()


class _Padded:
    """Texts as batches formed by the library: for chat templates, static models and other tokenizers."""

    def __init__(
        self, model: SentenceTransformer, texts: Sequence[str], prefix: str, task: Task | None, budget: int
    ) -> None:
        most = getattr(_chain(model, task)[0][0], "max_seq_length", None)
        # a token has at least one character
        lengths = np.fromiter((len(prefix) + len(text) for text in texts), np.int64, len(texts))
        self.rows = list(_batches(np.minimum(lengths, most or lengths.max()), budget))
        self.features = {int(rows[0]): _preprocess(model, [texts[i] for i in rows], prefix, task) for rows in self.rows}

    def cut(self, budget: int) -> list[np.ndarray]:
        """The rows of each batch."""
        return self.rows

    def batch(self, rows: np.ndarray) -> Iterator[tuple[str, Any]]:
        """The features of a batch."""
        return iter(self.features[int(rows[0])].items())


def _preprocess(model: SentenceTransformer, texts: Sequence[str], prefix: str, task: Task | None) -> dict[str, Any]:
    return dict(model.preprocess(list(texts), prompt=prefix or None, **({} if task is None else {"task": task})))


def _extra_features(
    model: SentenceTransformer, texts: Sequence[str], prefix: str, task: Task | None
) -> dict[str, Any] | None:
    """The library's features besides tokens; None if its tokens differ from those of ``_Window``."""
    import torch

    [first, *_] = [module for module, _ in _chain(model, task)]
    if first not in transformers(model):
        return None
    probes = [min(texts, key=len), max(texts, key=len)]
    theirs = _preprocess(model, probes, prefix, task)
    for name, value in _Window(model, probes, prefix, task).batch(np.arange(2)):
        if name not in theirs or not torch.equal(theirs.pop(name), value):
            return None
    return None if any(torch.is_tensor(value) for value in theirs.values()) else theirs


def _read_ahead(
    model: SentenceTransformer, texts: Sequence[str], prefix: str, task: Task | None, budget: int
) -> Iterator[tuple[int, _Window | _Padded]]:
    """The texts in windows of tokens. While one is encoded, a thread tokenises the next."""
    extra = _extra_features(model, texts, prefix, task) if texts else None
    size = PADDED_WINDOW if extra is None else WINDOW

    def read(start: int) -> _Window | _Padded:
        part = texts[start : start + size]
        if extra is None:
            return _Padded(model, part, prefix, task, budget)
        window = _Window(model, part, prefix, task)
        window.extra = extra
        return window

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(read, 0) if texts else None
        for start in range(0, len(texts), size):
            assert following is not None
            window, after = following.result(), start + size
            following = thread.submit(read, after) if after < len(texts) else None
            yield start, window


def _batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Batches of rows by descending length, with rows x longest within the budget (at least one row each)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, budget // max(int(lengths[order[start]]), 1))
        yield order[start:stop]
        start = stop


def save(model: SentenceTransformer, folder: str | Path) -> list[str]:
    """Writes the model as a sentence-transformers folder with safetensors; returns its files, relative, sorted.

    The saved folder has the model's current text length and prompts.
    """
    root = Path(folder)
    model.save_pretrained(str(root), create_model_card=False, safe_serialization=True)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
