"""Frozen configs: a registry of types, JSON round trip, and content fingerprints.

A config describes *what* is computed. Configs with equal fingerprints describe the same result, on any machine.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dagr_ray import moved

PLUGIN_PACKAGES = ("strategies", "engines", "filters", "miners", "teachers", "stages")
Self = TypeVar("Self", bound="Config")


class ConfigError(ValueError):
    """A user's mistake, found before anything starts. One line: what, the bad value, what is allowed, what to do."""


class Threshold:
    """Marks a field (``Annotated[float, Threshold()]``) that only filters stored scores: changing it needs no new scoring."""


class OmitWhenDefault:
    """Marks a field added after a release. Left at its default, it is omitted from the fingerprint, so old folders stay valid."""


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


class Config(BaseModel):
    """A frozen value with a ``type`` name (the class name in kebab case unless ``type`` is set) and a ``version``.

    Fields may hold other configs. A subclass raises its ``version`` when equal fields come to mean another result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)
    type: ClassVar[str] = ""
    version: ClassVar[int] = 1
    _registry: ClassVar[dict[str, builtins.type[Config]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "type" not in cls.__dict__:
            cls.type = _kebab(cls.__name__)
        other = Config._registry.get(cls.type)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two configs are called {cls.type!r}: {other.__module__} and {cls.__module__}")
        Config._registry[cls.type] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_type(cls, value: Any, handler: Any) -> Any:
        """Lets a field annotated with a base class accept ``{"type": ..., **fields}`` or a bare type name."""
        if isinstance(value, str):
            value = {"type": value}
        if isinstance(value, dict) and "type" in value:
            return _resolve(value, cls, handler)
        return handler(value)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values, ``type`` first; ``from_json`` restores an equal config.

        A config that occurs in several places is the same dict in all of them: ``packed`` writes it once.
        """
        with _memory(_json_values) as memo:
            if id(self) not in memo:
                fields = {
                    name: _walk(getattr(self, name), lambda c: c.to_json()) for name in self.__class__.model_fields
                }
                memo[id(self)] = (self, {"type": self.type, **fields})
            return memo[id(self)][1]

    def identity(self) -> dict[str, Any]:
        """What the fingerprint hashes. Override it if a field stands for content (a folder, a model's files)."""
        model_fields = self.__class__.model_fields.items()
        names = [
            name
            for name, field in model_fields
            if not (_is(OmitWhenDefault, field) and getattr(self, name) == field.default)
        ]
        fields = {name: _walk(getattr(self, name), lambda config: config.fingerprint()) for name in names}
        return {"type": self.type, "version": self.version, **fields}

    def scoring_identity(self) -> dict[str, Any]:
        """The identity without the fields marked ``Threshold``: everything that decides which scores are computed."""
        marked = {name for name, field in self.__class__.model_fields.items() if _is(Threshold, field)}
        return {key: value for key, value in self.identity().items() if key not in marked}

    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 of the identity, in which each inner config is replaced by its fingerprint."""
        with fingerprint_cache() as memo:
            if id(self) not in memo:
                memo[id(self)] = (self, digest(self.identity()))
            return memo[id(self)][1]

    def label(self) -> str:
        """A short word for folder names; never part of the fingerprint."""
        return ""


# id of a config -> the config, which keeps the id from being reused, and its memoised value; or a path's content hash
_Memo = dict[Any, tuple["Config | None", Any]]
_fingerprints: ContextVar[_Memo | None] = ContextVar("fingerprints", default=None)
_json_values: ContextVar[_Memo | None] = ContextVar("json_values", default=None)
# id of a JSON object and the type requested for it -> the object and the resulting config
_Parsed = dict[tuple[int, type], tuple[Any, "Config"]]
_parsed: ContextVar[_Parsed | None] = ContextVar("parsed", default=None)
_AnyMemo = TypeVar("_AnyMemo", bound=dict[Any, Any])


@contextlib.contextmanager
def _memory(var: ContextVar[_AnyMemo | None]) -> Iterator[_AnyMemo]:
    """A memo shared by everything inside. Without it, a graph of stages is walked as a tree, which may never end."""
    outer = var.get()
    if outer is not None:
        yield outer
        return
    memo: Any = {}
    token = var.set(memo)
    try:
        yield memo
    finally:
        var.reset(token)


def fingerprint_cache() -> contextlib.AbstractContextManager[_Memo]:
    """Inside, each config is fingerprinted once. Outside, it is computed anew: files that it stands for may have changed."""
    return _memory(_fingerprints)


def cached_content(kind: str, path: str, compute_hash: Callable[[], str]) -> str:
    """The hash of a path's content; inside ``fingerprint_cache`` it is computed once, however many configs hold the path."""
    memo = _fingerprints.get()
    if memo is None:
        return compute_hash()
    if (kind, path) not in memo:
        memo[kind, path] = None, compute_hash()
    return memo[kind, path][1]


def _resolve(value: dict[str, Any], cls: type[Config], handler: Any) -> Any:
    """Not part of the validator, which is pickled by value with a class of a job's file: a ContextVar cannot be pickled."""
    with _memory(_parsed) as memo:
        if (id(value), cls) not in memo:
            config_type = lookup(value["type"], cls)
            fields = {k: v for k, v in value.items() if k != "type"}
            memo[id(value), cls] = value, handler(fields) if config_type is cls else config_type.model_validate(fields)
        return memo[id(value), cls][1]


class Frozen(dict[str, Any]):
    """An immutable JSON object; equal ones have equal hashes."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a config cannot be changed; make another config")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(digest(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (dict(self),)


def _frozen(value: dict[str, Any]) -> Frozen:
    try:
        return Frozen(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error}; give strings, numbers, true, false, null, lists and objects of these") from None


# A config field that holds free JSON, such as another program's options.
JsonObject = Annotated[dict[str, Any], AfterValidator(_frozen)]


def _is(mark: type, field: FieldInfo) -> bool:
    return any(isinstance(item, mark) for item in field.metadata)


def digest(value: Any, length: int = 12) -> str:
    """Hash of a JSON value in canonical form (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def _walk(value: Any, config: Any) -> Any:
    if isinstance(value, Config):
        return config(value)
    if isinstance(value, dict):
        return {str(k): _walk(v, config) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(v, config) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


_SAME = "$same"


def _rebuilt(value: Any, change: Callable[[dict[str, Any], str, Callable[[], Any]], Any], place: str = "") -> Any:
    """A JSON value in which ``change(object, JSON pointer, function that rebuilds its items)`` replaces each object."""
    if isinstance(value, list):
        return [_rebuilt(item, change, f"{place}/{number}") for number, item in enumerate(value)]
    if isinstance(value, dict):
        items = value.items()
        return change(value, place, lambda: {name: _rebuilt(item, change, f"{place}/{name}") for name, item in items})
    return value


def packed(value: Any) -> Any:
    """A JSON value with each nested config written once; further occurrences are ``{"$same": JSON pointer}``."""
    places: dict[int, str] = {}

    def change(config: dict[str, Any], place: str, rebuilt: Callable[[], Any]) -> Any:
        if "type" in config and any(isinstance(item, (dict, list)) for item in config.values()):
            if id(config) in places:
                return {_SAME: places[id(config)]}
            places[id(config)] = place
        return rebuilt()

    return _rebuilt(value, change)


def unpacked(text: bytes) -> Any:
    """Reads a ``packed`` value; each config is one dict in all its places."""
    places: dict[str, Any] = {}

    def change(item: dict[str, Any], place: str, rebuilt: Callable[[], Any]) -> Any:
        if list(item) == [_SAME] and isinstance(item[_SAME], str) and item[_SAME] in places:
            return places[item[_SAME]]
        config = rebuilt()
        if "type" in config:
            places[place] = config
        return config

    value = json.loads(text)
    # receipts are read by the hundred thousand and hold no such reference
    return _rebuilt(value, change) if f'"{_SAME}"'.encode() in text else value


@lru_cache(maxsize=1)
def discover() -> dict[str, type[Config]]:
    """Imports every plugin file of this package and of the packages that ``dagr_ray.plugins`` entry points name; returns the
    registry."""
    for package in PLUGIN_PACKAGES:
        folder = importlib.import_module(f"dagr_ray.{package}")
        for info in pkgutil.iter_modules(folder.__path__):
            if not info.name.startswith("_"):  # a helper of plugins; one of them imports vLLM
                importlib.import_module(f"{folder.__name__}.{info.name}")
    for entry in entry_points(group="dagr_ray.plugins"):
        plugin = entry.load()
        for info in pkgutil.iter_modules(getattr(plugin, "__path__", ())):
            if not info.name.startswith("_"):
                importlib.import_module(f"{plugin.__name__}.{info.name}")
    return Config._registry


def plugins(base: type[Self]) -> dict[str, type[Self]]:
    """The concrete registered types below ``base``, by name."""
    types = sorted(discover().items())
    return {n: c for n, c in types if issubclass(c, base) and c is not base and not c.__dict__.get("abstract")}


def lookup(name: Any, base: type[Self]) -> type[Self]:
    """The registered type called ``name``, which must be ``base`` or below it."""
    config_type = Config._registry.get(name) or discover().get(name)
    if config_type is None and name in moved.TYPES:
        raise ConfigError(f"type {name!r} of 0.1 is {moved.TYPES[name]!r} now; write the new name")
    if config_type is None or not issubclass(config_type, base):
        raise ConfigError(f"type {name!r} is not a {_kebab(base.__name__)}; allowed: {', '.join(plugins(base))}")
    return config_type


def from_json(value: dict[str, Any], base: type[Self]) -> Self:
    """A config from its ``to_json`` form. Raises ConfigError with the field, the value and what is allowed."""
    try:
        return base.model_validate(value)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """One line for a failed validation: the field, the bad value and what is allowed."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError) and not first["loc"]:
        return str(cause)  # about the whole config: the message is complete
    field = ".".join(str(part) for part in first["loc"]) or "value"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{error.title}: unknown field {field!r} = {first['input']!r}; remove it or check its spelling{more}"
    return f"{error.title}: {field} = {first.get('input')!r}: {first['msg']}{more}"


@lru_cache(maxsize=4096)
def _file_sha(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path.relative_to(folder).as_posix(), path


def content_hash(path: str | Path) -> str:
    """Hash of a local file or folder, by names and bytes, without hidden files. Cached by size and modification time."""
    return cached_content("files", str(path), lambda: _content_hash(Path(path)))


def _content_hash(root: Path) -> str:
    if root.is_file():
        stat = root.stat()
        return _file_sha(str(root), stat.st_size, stat.st_mtime_ns)[:16]
    if not root.is_dir():
        raise ConfigError(f"no file or folder at {str(root)!r}; give an existing path")
    entries = [(name, _file_sha(str(p), p.stat().st_size, p.stat().st_mtime_ns)) for name, p in _files(root)]
    return digest(entries, 16)
