"""What a model's folder says of itself before it is opened: its kind, its modules, its prompts, whether its files are whole.

Nothing of the model runs here: JSON, the heads of safetensors files, and the numbers of a tokenizer's words.
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
# Weights that Python would have to unpickle, or that another program runs.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib")
# Parts of a transformer's config that read pictures or sounds.
OTHER_SENSES = ("vision_config", "audio_config")
# Modules with weights that a training changes.
LEARNING = ("Transformer", "StaticEmbedding", "Dense", "CNN", "LSTM", "LayerNorm", "WeightedLayerPooling")
# Files that hold a tokenizer's words, and tokenizers that read bytes or letters by their numbers.
WORDS = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spiece.model")
WITHOUT_WORDS = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
MORE = "; copy the folder anew, or give another model"


def card(folder: Path, who: str) -> dict[str, Any]:
    """What sentence-transformers reads of a folder before its modules; nothing where it has no modules. Raises ConfigError."""
    return _object(folder, folder / CARD, who) if (folder / MODULES).is_file() else {}


def prompts(said: dict[str, Any], folder: str, who: str) -> dict[str, str]:
    """The prompts of a card by name. Raises ConfigError where they are no texts."""
    found = said.get("prompts") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values() if text is not None):
        raise ConfigError(f"{who}: {folder!r}: prompts in {CARD} must be texts by name{MORE}")
    return {name: text or "" for name, text in found.items()}


def kinds(folder: Path, who: str) -> list[str]:
    """The classes of the modules, those inside a router too; none where the folder is a plain transformer."""
    return [kind.rsplit(".", 1)[-1] for kind, _ in _modules(folder, who)]


def learns(folder: Path, who: str) -> bool:
    """Whether some module has weights that a training may change: word vectors, say, are mostly kept as they are."""
    found = _modules(folder, who)
    changed = (
        _object(folder, place / "wordembedding_config.json", who).get("update_embeddings", kind.endswith(LEARNING))
        for kind, place in found
    )
    return not found or any(changed)


@lru_cache(maxsize=256)
def _whole(folder: Path, content: str, who: str) -> None:
    # a hidden file is no part of a model: systems leave some behind under its files' names
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.suffix == ".json":
            _read(folder, path, who)
        elif path.suffix == ".safetensors":
            _head(folder, path, who)
    for path in files:
        if not path.name.endswith(".safetensors.index.json"):
            continue
        listed = _object(folder, path, who).get("weight_map")
        for name in sorted(set(listed.values())) if isinstance(listed, dict) else ():
            if not isinstance(name, str) or not (path.parent / name).is_file():
                raise ConfigError(f"{who}: {str(folder)!r}: {name!r} of {path.name} is missing{MORE}")


def check_whole(folder: Path, who: str) -> None:
    """Raises ConfigError where a JSON file cannot be read or a safetensors file is not what its head says."""
    _whole(folder, content_hash(folder), who)


@lru_cache(maxsize=256)
def _encoder(folder: Path, content: str, who: str) -> None:
    where = f"{who}: {str(folder)!r}"
    said = card(folder, who)
    prompts(said, str(folder), who)
    kind = said.get("model_type", KIND)
    if kind != KIND:
        raise ConfigError(f"{where} is a {kind}; give a {KIND}: one vector for each text")
    modules = _modules(folder, who)
    for name, _ in modules:
        if not name.startswith(OWN):
            raise ConfigError(f"{where}: {MODULES} names {name!r}, a class of somebody else; no such code is run here")
        if "sparse_encoder" in name or "cross_encoder" in name or "multi_vector" in name:
            raise ConfigError(f"{where}: {name!r} gives no dense vector; give a {KIND}: one vector for each text")
        if name.endswith("CLIPModel"):
            raise ConfigError(f"{where}: {name!r} reads pictures; give a model of texts alone")
    for place in [place for name, place in modules if name.endswith(".Transformer")] or ([] if modules else [folder]):
        _check_transformer(folder, place, plain=not modules, who=who)
    _notice_readme(folder, who)
    for place in [place for _, place in modules]:
        others = sorted(path for path in _files(place) if path.suffix in OTHER_WEIGHTS and "training" not in path.name)
        if others and not any(path.suffix == ".safetensors" for path in _files(place)):
            raise ConfigError(
                f"{where}: {others[0].relative_to(folder)} is no safetensors file; save the model as safetensors"
            )


def check_encoder(folder: Path, who: str) -> None:
    """Raises ConfigError where the folder is no text encoder that can be opened without code of its own."""
    check_whole(folder, who)
    _encoder(folder, content_hash(folder), who)


def _notice_readme(folder: Path, who: str) -> None:
    """A warning where the readme cannot be read: no vector depends on it, but hubs do not take the folder as it is."""
    import yaml

    path = folder / "README.md"
    try:
        said = path.read_text(encoding="utf-8") if path.is_file() else ""
        if said.startswith("---\n"):
            yaml.safe_load(said[4:].partition("\n---")[0])
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0][:120]
        log.warning("%s: %r: README.md cannot be read (%s); it is not needed here", who, str(folder), reason)


def _check_transformer(folder: Path, place: Path, plain: bool, who: str) -> None:
    where, config = f"{who}: {str(folder)!r}", _object(folder, place / "config.json", who)
    if (place / "adapter_config.json").is_file():
        raise ConfigError(f"{where} holds adapters and no weights of its own; merge them into their base first")
    if not config:
        raise ConfigError(f"{where}: no config.json in {place.name!r}{MORE}")
    named = config.get("architectures") or [""]
    if plain and isinstance(named, list) and str(named[0]).endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{where} is a {named[0]}, as cross-encoders are: it scores pairs; give a model of single texts"
        )
    reads = _object(folder, place / "sentence_bert_config.json", who).get("modality_config") or {"text": {}}
    senses = [name for name in OTHER_SENSES if config.get(name)]
    if senses or set(reads) - {"text", "message"}:
        raise ConfigError(
            f"{where} reads more than texts ({', '.join(senses or sorted(reads))}); give a model of texts"
        )
    if not _spelled(folder, place, who):
        raise ConfigError(f"{where}: no words of a tokenizer ({', '.join(WORDS[:3])}, ...) in {place.name!r}{MORE}")
    highest, rows = _highest(folder, place, who), config.get("vocab_size")
    if highest is not None and isinstance(rows, int) and highest >= rows:
        raise ConfigError(
            f"{where}: its tokenizer has ids up to {highest}, and vocab_size = {rows} in config.json{MORE}"
        )


def _spelled(folder: Path, place: Path, who: str) -> bool:
    """Whether there is a tokenizer's list of words. Without one, transformers makes an empty tokenizer and says nothing."""
    if _object(folder, place / "tokenizer_config.json", who).get("tokenizer_class") in WITHOUT_WORDS:
        return True
    return any(path.name in WORDS or path.suffix in (".model", ".spm", ".tiktoken") for path in _files(place))


def _highest(folder: Path, place: Path, who: str) -> int | None:
    """The highest id of the tokenizer; None where it has neither tokenizer.json nor vocab.txt."""
    if not (place / "tokenizer.json").is_file() and (place / "vocab.txt").is_file():
        return len((place / "vocab.txt").read_bytes().splitlines()) - 1
    said = _object(folder, place / "tokenizer.json", who)
    model = said.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids = [number for number in vocabulary.values() if isinstance(number, int)]
    else:
        ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    added = said.get("added_tokens")
    ids += [each["id"] for each in added if isinstance(each.get("id"), int)] if isinstance(added, list) else []
    return max(ids, default=None)


def _modules(folder: Path, who: str) -> list[tuple[str, Path]]:
    """(class, folder) of each module, those inside a router too."""
    path = folder / MODULES
    if not path.is_file():
        return []
    listed = _read(folder, path, who)
    wrong = ConfigError(f"{who}: {str(folder)!r}: {MODULES} is no list of modules{MORE}")
    if not isinstance(listed, list) or not listed:
        raise wrong
    found: list[tuple[str, Path]] = []
    for each in listed:
        if not isinstance(each, dict) or not isinstance(each.get("type"), str) or not isinstance(each.get("path"), str):
            raise wrong
        place = _below(folder, folder / each["path"], who)
        found.append((each["type"], place))
        if each["type"].rsplit(".", 1)[-1] in ("Router", "Asym"):
            said = _object(folder, place / "router_config.json", who) or _object(folder, place / "config.json", who)
            types = said.get("types")
            if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
                raise wrong
            found += [(kind, _below(folder, place / name, who)) for name, kind in types.items()]
    return found


def _below(folder: Path, place: Path, who: str) -> Path:
    if place != folder:  # a module may lie in the model's own folder
        try:
            below(folder, os.path.relpath(place, folder), source=MODULES)
        except ConfigError as error:
            raise ConfigError(f"{who}: {str(folder)!r}: {MODULES} points outside the folder ({error}){MORE}") from None
    return place


def _files(place: Path) -> Iterator[Path]:
    return (path for path in place.iterdir() if path.is_file()) if place.is_dir() else iter(())


def _object(folder: Path, path: Path, who: str) -> dict[str, Any]:
    found = _read(folder, path, who) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} is no object of names and values{MORE}")
    return found


def _read(folder: Path, path: Path, who: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] or type(error).__name__
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} is no JSON: {reason}{MORE}") from error


def _head(folder: Path, path: Path, who: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} is damaged: {reason}{MORE}") from error
    if not shapes:
        raise ConfigError(f"{who}: {str(folder)!r}: {path.relative_to(folder)} holds no weights{MORE}")
