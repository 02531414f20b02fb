"""Reads a job: the recipe in a Python file, and the values that the command line gives to its parameters."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dagr_ray.core import job_imports
from dagr_ray.core.artifact import Json
from dagr_ray.core.config import ConfigError, explain
from dagr_ray.core.paths import absolute, split_values
from dagr_ray.core.stage import Stage
from dagr_ray.packages import is_known, pip_install

Recipe = Callable[..., Stage]


@dataclass(frozen=True)
class Job:
    """A recipe function from a file, and the axes that a study sweeps by default."""

    path: str
    name: str
    recipe: Recipe
    defaults: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.recipe).parameters)

    def values_by_default(self) -> Json:
        """The default value of each parameter that has one."""
        return {name: p.default for name, p in self.parameters().items() if p.default is not p.empty}

    def value(self, name: str, text: Any) -> Any:
        """A parameter's value, from the command line's text. Raises ConfigError that names the parameter and the allowed values."""
        allowed = self.parameters()
        if name not in allowed:
            raise ConfigError(f"{self.path} has no parameter {name!r}; allowed: {', '.join(allowed)}")
        hint = self.hint(name)
        # for a parameter that is a text, "none" may be an ordinary value
        if text in ("none", "None", "") and (hint is Any or type(None) in _kinds(hint)):
            text = None
        _check_digits(name, text, hint)
        try:
            return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True)).validate_python(text)
        except ValidationError as error:
            shown = explain(error).split(": ", 2)[-1]
            raise ConfigError(f"{name} = {text!r}: {shown}; it must be {_spelled(hint)}") from None

    def hint(self, name: str) -> Any:
        """The type of a parameter, with its annotations."""
        return get_type_hints(self.recipe, include_extras=True).get(name, Any)

    def stage(self, **params: Any) -> Stage:
        """The recipe's stage for these parameters; the other parameters have their defaults."""
        missing = [n for n, p in self.parameters().items() if p.default is p.empty and n not in params]
        if missing:
            raise ConfigError(f"{self.path} needs {missing[0]}=VALUE; add it to the command")
        try:
            return self.recipe(**params)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None


def _kinds(hint: Any) -> list[Any]:
    """The types that a value may have, without their annotations."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for option in get_args(hint) for kind in _kinds(option)]
    return [hint]


def _spelled(hint: Any) -> str:
    names = ("none" if kind is type(None) else getattr(kind, "__name__", None) or str(kind) for kind in _kinds(hint))
    return " or ".join(names).replace("typing.", "")


def _check_digits(name: str, text: Any, hint: Any) -> None:
    """Raises ConfigError if a number can be read in two ways, such as 1,000, 1.000 or 08."""
    kinds = _kinds(hint)
    if not isinstance(text, str) or str in kinds or not {int, float} & set(kinds):
        return
    word = text.strip()
    whole = int in kinds and float not in kinds
    if re.fullmatch(r"[+-]?0[\d_]+(\.\d*)?", word) or (whole and re.fullmatch(r"[+-]?[\d_]*\.[\d_]*", word)):
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{name} = {text!r}: write a {kind} without separators or leading zeros, such as 1000")
    if re.fullmatch(r"[+-]?\d{1,3}([,' ]\d{3})+(\.\d*)?", word):
        plain = re.sub("[,' ]", "", word)
        raise ConfigError(f"{name} = {text!r}: write {plain}, without a thousands separator")


def load_job(path: str) -> Job:
    """The recipe in a Python file: the function with the file's name, or the only public one that the file defines."""
    file = Path(absolute(path))
    if not file.is_file():
        raise ConfigError(f"no job file at {path!r}; give the path of a Python file, such as jobs/quickstart.py")
    module = _module(path, file)
    own = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    public = {name: function for name, function in own.items() if not name.startswith("_")}
    recipe = public.get(file.stem) or (next(iter(public.values())) if len(public) == 1 else None)
    if recipe is None:
        raise ConfigError(f"{path} defines {sorted(public)}; it must define one public function, named {file.stem!r}")
    return Job(str(path), recipe.__name__, recipe, getattr(module, "STUDY", {}))


def _module(path: str, file: Path) -> ModuleType:
    """Imports the job's file. It can import modules from its own folder, after all installed packages."""
    loader = SourceFileLoader(f"dagr_job_{file.stem}", str(file))
    spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with job_imports.loading_job(str(file.parent)):
            loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(_missing(path, file, error)) from None
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f"{path}, line {lines[-1]}" if lines and lines[-1] else path
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise ConfigError(f"{where}: {reason}; correct the job file") from None
    return module


def _missing(path: str, file: Path, error: ModuleNotFoundError) -> str:
    """What to do about a missing module that a job imports. An install command is given for known packages only."""
    package, _, inner = (error.name or "").partition(".")
    if not package or package == "dagr_ray" or (inner and importlib.util.find_spec(package) is not None):
        return f"{path}: {error}; correct the job file"
    if is_known(package):
        return f"{path} imports {package}, which is not installed; run: {pip_install(package)}"
    return (
        f"{path} imports {package!r}, which is neither installed nor a file in the job's folder; put {package}.py into "
        f"{str(file.parent)!r}, check the spelling, or install the package that provides it"
    )


def parse_axes(job: Job, words: Sequence[str], sweep: bool) -> dict[str, list[Any]]:
    """Words such as ``scale=1000,10000`` as lists of checked values. With ``sweep``, the job's own axes are the defaults.

    A comma inside the path of an existing file or folder does not separate values. Raises ConfigError if a parameter, or
    one of its values, is given twice.
    """
    unknown = [name for name in job.defaults if name not in job.parameters()]
    if unknown:
        allowed = ", ".join(job.parameters())
        raise ConfigError(f"{job.path}: STUDY has an axis {unknown[0]!r}, which is not a parameter; allowed: {allowed}")
    axes: dict[str, list[Any]] = {k: list(v) for k, v in job.defaults.items()} if sweep else {}
    texts: dict[str, str] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise ConfigError(f"argument {word!r} is not NAME=VALUE; allowed names: {', '.join(job.parameters())}")
        if name in texts:
            remedy = f"join the values: {name}={texts[name]},{text}" if sweep else "give it once"
            raise ConfigError(f"{name} is given twice, as {texts[name]!r} and {text!r}; {remedy}")
        texts[name] = text
        values = _split(name, text, job.hint(name) if name in job.parameters() else Any) if sweep else [text]
        axes[name] = [job.value(name, value) for value in values]
        _check_repeats(name, axes[name], values)
    return axes


def _split(name: str, text: str, hint: Any) -> Sequence[str]:
    kinds = _kinds(hint)
    if str in kinds or hint is Any:
        return split_values(text, ",")
    values = text.split(",")
    if len(values) > 1 and any(re.fullmatch(r"0\d+", value) for value in values[1:]):
        _check_digits(name, text, hint)  # 1,000 is not meant as the two values 1 and 0
    return values


def _check_repeats(name: str, values: Sequence[Any], words: Sequence[str]) -> None:
    seen: dict[Any, str] = {}
    for value, word in zip(values, words, strict=True):
        key = value
        if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
            status = os.stat(value)
            key = status.st_dev, status.st_ino
        if key in seen:
            same = "" if seen[key] == word else f", which is the same as {seen[key]!r}"
            raise ConfigError(f"{name} has the value {word!r} twice{same}; give each value once")
        seen[key] = word
