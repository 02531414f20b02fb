"""The documentation inside the user's own Python as a search corpus, and the queries and judgements written for it.

Passages are the docstrings of the running interpreter's standard library and the chunked texts of ``pydoc_data.topics``;
out of distribution, those of numpy and pandas. It is always there, real, and different enough from what language models
were shown as search data.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

DATA = Path(__file__).parent / "data" / "pydocs"
MIN_WORDS = 12
CHUNK_WORDS = 180
# A docstring's first pieces say what a thing does and takes; the rest is examples and notes.
CHUNKS = 1
# Importing these opens a window, a browser or a server, prints, or is the interpreter's own business.
SKIPPED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "__main__", "ensurepip", "pip", "distutils", "pydoc_data"}


class Passage(NamedTuple):
    """One row of the ``corpus`` table."""

    doc_id: str
    title: str
    text: str


@dataclass
class Judged:
    """Queries by id, judgements by split, and what was dropped because this Python lacks the passage."""

    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)


@lru_cache(maxsize=1)
def stdlib_passages() -> list[Passage]:
    """Passages of the standard library and of the language's help topics, sorted by doc_id."""
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in SKIPPED)
    modules = [m for name in names for m in _tree(name)]
    import builtins

    found = _documented([builtins, *modules], lambda module: module.split(".")[0] in sys.stdlib_module_names)
    return sorted({**found, **_topics()}.values())


@lru_cache(maxsize=4)
def package_passages(names: tuple[str, ...] = ("numpy", "pandas")) -> list[Passage]:
    """Passages of installed packages: what their public top-level names and public sub-modules document."""
    modules = [m for name in names for m in [_load(name)] if m is not None]
    public = [m for module in modules for m in _public_modules(module)]
    return sorted(_documented([*modules, *public], lambda module: module.split(".")[0] in names).values())


def judgements(part: str, doc_ids: Collection[str]) -> Judged:
    """The committed queries and qrels of ``part``, less the judgements of passages that are not in ``doc_ids``."""
    folder = DATA / part
    lines = (folder / "queries.jsonl").read_text().splitlines()
    texts = {row["_id"]: row["text"] for row in map(json.loads, lines)}
    judged = Judged()
    for path in sorted((folder / "qrels").glob("*.tsv")):
        rows = judged.qrels.setdefault(path.stem, [])
        for line in path.read_text().splitlines()[1:]:
            query_id, doc_id, relevance = line.split("\t")
            if doc_id in doc_ids:
                rows.append({"query_id": query_id, "doc_id": doc_id, "relevance": int(relevance)})
                judged.queries[query_id] = texts[query_id]
            else:
                judged.rejected.append({"id": query_id, "reason": "passage-absent", "detail": doc_id})
    return judged


def _load(name: str) -> ModuleType | None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):  # a platform's module raises what it likes where it does not run
            return None


def _tree(name: str) -> Iterator[ModuleType]:
    """A module and its public sub-modules."""
    module = _load(name)
    if module is None:
        return
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not info.name.startswith("_") and info.name not in ("test", "tests", *SKIPPED):
            yield from _tree(f"{name}.{info.name}")


def _public_modules(package: ModuleType) -> list[ModuleType]:
    inside = (value for name, value in vars(package).items() if inspect.ismodule(value) and not name.startswith("_"))
    wanted = {m.__name__: m for m in inside if m.__name__.startswith(package.__name__ + ".")}
    # masked arrays and extension arrays repeat the documentation of plain ones
    hidden = ("core", "compat", "util", "tests", "testing", "_", "f2py", "typing", "ma", "arrays", "errors", "tseries", "plotting")
    return [m for name, m in sorted(wanted.items()) if not any(part.startswith(hidden) for part in name.split(".")[1:])]


def _documented(modules: list[ModuleType], ours: Callable[[str], bool]) -> dict[str, Passage]:
    """Every documented public object, once: under the shortest of the names that lead to it."""
    best: dict[str, tuple[tuple[int, int, str], str]] = {}
    for module in modules:
        for name, text in _members(module, ours):
            home = (name.count("."), len(name), name)
            key = _norm(text)
            if key not in best or home < best[key][0]:
                best[key] = (home, text)
    made: dict[str, Passage] = {}
    for (_, _, name), text in best.values():
        for number, chunk in enumerate(_chunks(text)[:CHUNKS], 1):
            doc_id = name if number == 1 else f"{name}#{number}"
            made[doc_id] = Passage(doc_id, name, chunk)
    return made


def _members(module: ModuleType, ours: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    prefix = "" if module.__name__ == "builtins" else module.__name__ + "."
    public = set(getattr(module, "__all__", None) or vars(module))
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name not in public or inspect.ismodule(value):
            continue
        if not ours(str(getattr(value, "__module__", None) or module.__name__)):
            continue
        if inspect.isclass(value):
            yield from _entry(prefix + name, value)
            for member, inner in sorted(vars(value).items()):
                if not member.startswith("_") and (callable(inner) or inspect.isdatadescriptor(inner) or isinstance(inner, classmethod | staticmethod)):
                    yield from _entry(f"{prefix}{name}.{member}", inner)
        elif callable(value):
            yield from _entry(prefix + name, value)


def _entry(name: str, value: Any) -> Iterator[tuple[str, str]]:
    doc = getattr(getattr(value, "__func__", value), "__doc__", None)
    if isinstance(doc, str) and len(doc.split()) >= MIN_WORDS:
        yield name, inspect.cleandoc(doc)


def _topics() -> dict[str, Passage]:
    from pydoc_data.topics import topics

    made = {}
    for name, text in sorted(topics.items()):
        for number, chunk in enumerate(_chunks(text), 1):
            made[f"topic:{name}#{number}"] = Passage(f"topic:{name}#{number}", name, chunk)
    return made


def _norm(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower())


def _chunks(text: str) -> list[str]:
    """Pieces of about ``CHUNK_WORDS`` words that end where paragraphs end; a piece too short to stand joins the last."""
    made: list[list[str]] = [[]]
    size = 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = len(paragraph.split())
        if size and size + words > CHUNK_WORDS:
            made.append([])
            size = 0
        made[-1].append(paragraph)
        size += words
    joined = ["\n\n".join(piece) for piece in made]
    if len(joined) > 1 and len(joined[-1].split()) < MIN_WORDS:
        joined[-2:] = ["\n\n".join(joined[-2:])]
    cut = [" ".join(piece.split()[: 2 * CHUNK_WORDS]) if len(piece.split()) > 2 * CHUNK_WORDS else piece for piece in joined]
    return [piece for piece in cut if len(piece.split()) >= MIN_WORDS]
