"""Reads a model's folder before it is opened: its kind, its modules, its prompts, and if its files are complete.

No code of the model runs here. Only JSON, the headers of safetensors files and a tokenizer's ids are read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from dagr_ray.core.config import ConfigError, content_hash
from dagr_ray.core.storage import below

log = logging.getLogger("dagr")
CARD = "config_sentence_transformers.json"
MODULES = "modules.json"
OWN = "sentence_transformers."
KIND = "SentenceTransformer"
# Weights that would have to be unpickled, or that belong to another program.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib")
# Parts of a transformer's config for images or audio.
OTHER_SENSES = ("vision_config", "audio_config")
# Modules with weights that a training changes.
TRAINABLE = ("Transformer", "StaticEmbedding", "Dense", "CNN", "LSTM", "LayerNorm", "WeightedLayerPooling")
# Files with a tokenizer's vocabulary, and tokenizers that need none because they read bytes or characters.
WORDS = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spiece.model")
WITHOUT_WORDS = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
REMEDY = "; copy the folder again, or give another model"


def card(folder: Path, who: str) -> dict[str, Any]:
    """The content of sentence-transformers' config; empty if the folder has no modules. Raises ConfigError."""
    return _object(folder, folder / CARD, who) if (folder / MODULES).is_file() else {}


def prompts(content: dict[str, Any], folder: str, who: str) -> dict[str, str]:
    """The prompts of a card by name. Raises ConfigError if they are not texts."""
    texts = content.get("prompts") or {}
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values() if text is not None):
        raise ConfigError(f"{who}: {folder!r}: prompts in {CARD} must be texts by name{REMEDY}")
    return {name: text or "" for name, text in texts.items()}


def kinds(folder: Path, who: str) -> list[str]:
    """The classes of the modules, including those inside a router; empty if the folder is a plain transformer."""
    return [kind.rsplit(".", 1)[-1] for kind, _ in _modules(folder, who)]


def has_trainable_weights(folder: Path, who: str) -> bool:
    """Whether a module has weights that training may change. Word vectors, for example, are mostly frozen."""
    modules = _modules(folder, who)
    trainable = (
        _object(folder, place / "wordembedding_config.json", who).get("update_embeddings", kind.endswith(TRAINABLE))
        for kind, place in modules
    )
    return not modules or any(trainable)


@lru_cache(maxsize=256)
def _check_complete(folder: Path, content: str, who: str) -> None:
    # hidden files are not part of a model: some systems create hidden files with the same suffixes
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.suffix == ".json":
            _read(folder, path, who)
        elif path.suffix == ".safetensors":
            _check_weights_file(folder, path, who)
    for path in files:
        if not path.name.endswith(".safetensors.index.json"):
            continue
        listed = _object(folder, path, who).get("weight_map")
        for name in sorted(set(listed.values())) if isinstance(listed, dict) else ():
            if not isinstance(name, str) or not (path.parent / name).is_file():
                raise ConfigError(f"{who}: {str(folder)!r}: {name!r} of {path.name} is missing{REMEDY}")


def check_complete(folder: Path, who: str) -> None:
    """Raises ConfigError if a JSON file cannot be read or a safetensors file does not match its header."""
    _check_complete(folder, content_hash(folder), who)


@lru_cache(maxsize=256)
def _encoder(folder: Path, content: str, who: str) -> None:
    where = f"{who}: {str(folder)!r}"
    content_of_card = card(folder, who)
    prompts(content_of_card, str(folder), who)
    kind = content_of_card.get("model_type", KIND)
    if kind != KIND:
        raise ConfigError(f"{where} is a {kind}; give a {KIND}: one vector for each text")
    modules = _modules(folder, who)
    for name, _ in modules:
        if not name.startswith(OWN):
            raise ConfigError(f"{where}: {MODULES} names {name!r}, a third-party class; such code is not run here")
        if "sparse_encoder" in name or "cross_encoder" in name or "multi_vector" in name:
            raise ConfigError(f"{where}: {name!r} returns no dense vector; give a {KIND}: one vector for each text")
        if name.endswith("CLIPModel"):
            raise ConfigError(f"{where}: {name!r} reads images; give a model of texts only")
    for place in [place for name, place in modules if name.endswith(".Transformer")] or ([] if modules else [folder]):
        _check_transformer(folder, place, plain=not modules, who=who)
    _notice_readme(folder, who)
    for place in [place for _, place in modules]:
        others = sorted(path for path in _files(place) if path.suffix in OTHER_WEIGHTS and "training" not in path.name)
        if others and not any(path.suffix == ".safetensors" for path in _files(place)):
            raise ConfigError(
                f"{where}: {others[0].relative_to(folder)} is not a safetensors file; save the model as safetensors"
            )


def check_encoder(folder: Path, who: str) -> None:
    """Raises ConfigError if the folder is not a text encoder that can be opened without its own code."""
    check_complete(folder, who)
    _encoder(folder, content_hash(folder), who)


def _notice_readme(folder: Path, who: str) -> None:
    """Warns if the readme cannot be parsed. No vector depends on it, but hubs refuse such a folder."""
    import yaml

    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.startswith("---\n"):
            yaml.safe_load(text[4:].partition("\n---")[0])
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0][:120]
        log.warning("%s: %r: README.md cannot be read (%s); it is not needed here", who, str(folder), reason)


def _check_transformer(folder: Path, place: Path, plain: bool, who: str) -> None:
    where, config = f"{who}: {str(folder)!r}", _object(folder, place / "config.json", who)
    if (place / "adapter_config.json").is_file():
        raise ConfigError(f"{where} has adapters but no weights of its own; merge them into their base first")
    if not config:
        raise ConfigError(f"{where}: no config.json in {place.name!r}{REMEDY}")
    classes = config.get("architectures") or [""]
    if plain and isinstance(classes, list) and str(classes[0]).endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{where} is a {classes[0]}, like cross-encoders: it scores pairs; give a model of single texts"
        )
    reads = _object(folder, place / "sentence_bert_config.json", who).get("modality_config") or {"text": {}}
    senses = [name for name in OTHER_SENSES if config.get(name)]
    if senses or set(reads) - {"text", "message"}:
        raise ConfigError(
            f"{where} reads more than texts ({', '.join(senses or sorted(reads))}); give a model of texts only"
        )
    if not _has_vocabulary(folder, place, who):
        raise ConfigError(
            f"{where}: no vocabulary of a tokenizer ({', '.join(WORDS[:3])}, ...) in {place.name!r}{REMEDY}"
        )
    highest, rows = _highest_id(folder, place, who), config.get("vocab_size")
    if highest is not None and isinstance(rows, int) and highest >= rows:
        raise ConfigError(
            f"{where}: its tokenizer has ids up to {highest}, but vocab_size = {rows} in config.json{REMEDY}"
        )


def _has_vocabulary(folder: Path, place: Path, who: str) -> bool:
    """Whether there is a tokenizer's vocabulary. Without one, transformers silently creates an empty tokenizer."""
    if _object(folder, place / "tokenizer_config.json", who).get("tokenizer_class") in WITHOUT_WORDS:
        return True
    return any(path.name in WORDS or path.suffix in (".model", ".spm", ".tiktoken") for path in _files(place))


def _highest_id(folder: Path, place: Path, who: str) -> int | None:
    """The highest id of the tokenizer; None if it has neither tokenizer.json nor vocab.txt."""
    if not (place / "tokenizer.json").is_file() and (place / "vocab.txt").is_file():
        return len((place / "vocab.txt").read_bytes().splitlines()) - 1
    content = _object(folder, place / "tokenizer.json", who)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids = [number for number in vocabulary.values() if isinstance(number, int)]
    else:
        ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    added = content.get("added_tokens")
    ids += [token["id"] for token in added if isinstance(token.get("id"), int)] if isinstance(added, list) else []
    return max(ids, default=None)


def _modules(folder: Path, who: str) -> list[tuple[str, Path]]:
    """(class, folder) of each module, including those inside a router."""
    path = folder / MODULES
    if not path.is_file():
        return []
    entries = _read(folder, path, who)
    wrong = ConfigError(f"{who}: {str(folder)!r}: {MODULES} is not a list of modules{REMEDY}")
    if not isinstance(entries, list) or not entries:
        raise wrong
    modules: list[tuple[str, Path]] = []
    for entry in entries:
        fields = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not all(isinstance(value, str) for value in fields):
            raise wrong
        place = _inside(folder, folder / entry["path"], who)
        modules.append((entry["type"], place))
        if entry["type"].rsplit(".", 1)[-1] in ("Router", "Asym"):
            router = _object(folder, place / "router_config.json", who) or _object(folder, place / "config.json", who)
            types = router.get("types")
            if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
                raise wrong
            modules += [(kind, _inside(folder, place / name, who)) for name, kind in types.items()]
    return modules


def _inside(folder: Path, place: Path, who: str) -> Path:
    if place != folder:  # a module may be in the model's own folder
        try:
            below(folder, os.path.relpath(place, folder), source=MODULES)
        except ConfigError as error:
            raise ConfigError(
                f"{who}: {str(folder)!r}: {MODULES} points outside the folder ({error}){REMEDY}"
            ) from None
    return place


def _files(place: Path) -> Iterator[Path]:
    return (path for path in place.iterdir() if path.is_file()) if place.is_dir() else iter(())


def _object(folder: Path, path: Path, who: str) -> dict[str, Any]:
    value = _read(folder, path, who) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} is not a JSON object{REMEDY}")
    return value


def _read(folder: Path, path: Path, who: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] or type(error).__name__
        raise ConfigError(
            f"{who}: {str(folder)!r}: {path.relative_to(folder)} is not JSON: {reason}{REMEDY}"
        ) from error


def _check_weights_file(folder: Path, path: Path, who: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} is damaged: {reason}{REMEDY}") from error
    if not shapes:
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} has no weights{REMEDY}")
