"""The documentation in the user's own Python as a search corpus, with queries and judgements written for it.

Passages are the docstrings of the running interpreter's standard library and the chunked texts of
``pydoc_data.topics``; the out-of-distribution part has the docstrings of numpy and pandas. The corpus is always
available, real, and unlike the search data that language models were trained on.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
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
# The first chunks of a docstring describe the object and its arguments; the rest is examples and notes.
CHUNKS = 1
# Importing these opens a window, a browser or a server, prints, or concerns the interpreter itself. The last two
# lines are os and os.path under the names of their platforms, and modules that Python 3.12 removed.
SKIPPED = {
    *("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "__main__"),
    *("ensurepip", "pip", "pydoc_data"),
    *("posix", "nt", "ntpath", "posixpath", "genericpath", "nturl2path"),
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),
}
# numpy loads its parts on demand, so the attributes of a module do not list them. Masked arrays, array types and typing
# repeat the documentation of these parts.
PARTS = {
    "numpy": ("exceptions", "fft", "lib.scimath", "lib.stride_tricks", "linalg", "polynomial", "random"),
    "pandas": ("api.indexers", "api.types", "api.typing"),
}
# A text that several classes inherit is attributed to the best-known class.
KNOWN_FIRST = ("pandas.DataFrame.", "pandas.Series.")


class DocEntry(NamedTuple):
    """One row of the ``corpus`` table."""

    doc_id: str
    title: str
    text: str


@dataclass
class JudgedQueries:
    """Queries by id, judgements by split, and the judgements dropped because this Python lacks the passage.

    ``lost`` names the queries without any remaining judgement.
    """

    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def stdlib_passages() -> list[DocEntry]:
    """Passages of the standard library and of the language's help topics, sorted by doc_id."""
    return _passages(())


def package_passages(names: tuple[str, ...] = ("numpy", "pandas")) -> list[DocEntry]:
    """Passages of installed packages: the documentation of their public top-level names and public sub-modules."""
    return _passages(names)


@lru_cache(maxsize=4)
def _passages(names: tuple[str, ...]) -> list[DocEntry]:
    """Collects passages in a separate interpreter.

    Packages replace functions of others when they are imported (torch replaces some of inspect, ray and vllm more), so
    the texts in this process depend on its imports. Importing the whole standard library here would also have side
    effects.
    """
    done = subprocess.run([sys.executable, "-P", __file__, *names], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cannot read the documentation of {names or 'Python'}: {done.stderr.decode()[-2000:]}")
    return [DocEntry(*row) for row in json.loads(done.stdout)]


def _collect(names: list[str]) -> list[DocEntry]:
    if names:
        paths = [f"{name}.{part}".rstrip(".") for name in names for part in ("", *PARTS.get(name, ()))]
        modules = [m for m in map(_load, paths) if m is not None]
        return sorted(_documented(modules, lambda module: module.split(".")[0] in names).values())
    ours = sys.stdlib_module_names
    tops = sorted(n for n in ours if not n.startswith("_") and n not in SKIPPED)
    modules = [os.path, *(m for name in ("builtins", *tops) for m in _tree(name))]
    return sorted({**_documented(modules, lambda module: module.split(".")[0] in ours), **_topics()}.values())


def read_judgements(part: str, doc_ids: Collection[str]) -> JudgedQueries:
    """The committed queries and qrels of ``part``, without judgements of passages that are not in ``doc_ids``."""
    folder = DATA / part
    lines = (folder / "queries.jsonl").read_text().splitlines()
    texts = {row["_id"]: row["text"] for row in map(json.loads, lines)}
    judged = JudgedQueries()
    for path in sorted((folder / "qrels").glob("*.tsv")):
        rows = judged.qrels.setdefault(path.stem, [])
        for line in path.read_text().splitlines()[1:]:
            query_id, doc_id, relevance = line.split("\t")
            if doc_id in doc_ids:
                rows.append({"query_id": query_id, "doc_id": doc_id, "relevance": int(relevance)})
                judged.queries[query_id] = texts[query_id]
            else:
                judged.rejected.append({"id": query_id, "reason": "passage-absent", "detail": doc_id})
    judged.lost = sorted({row["id"] for row in judged.rejected} - judged.queries.keys())
    return judged


def _load(name: str) -> ModuleType | None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):  # a module of another platform may raise anything
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


def _documented(modules: list[ModuleType], ours: Callable[[str], bool]) -> dict[str, DocEntry]:
    """Every documented public object once, under the best of its names, usually the shortest."""
    public = {kind for m in modules for name, kind in vars(m).items() if inspect.isclass(kind) and name[0] != "_"}
    best: dict[str, tuple[tuple[Any, ...], str]] = {}
    for module in modules:
        for name, value, guest in _members(module, ours, public):
            doc = getattr(getattr(value, "__func__", value), "__doc__", None)
            if not isinstance(doc, str) or len(doc.split()) < MIN_WORDS:
                continue
            text = inspect.cleandoc(doc)
            alias = name.rsplit(".", 1)[-1] != getattr(value, "__name__", None)
            known = next((n for n, kind in enumerate(KNOWN_FIRST) if name.startswith(kind)), len(KNOWN_FIRST))
            home = (guest, name.count("."), alias, known, len(name), name)
            key = _norm(text)
            if key not in best or home < best[key][0]:
                best[key] = (home, text)
    entries: dict[str, DocEntry] = {}
    for (*_, name), text in best.values():
        for number, chunk in enumerate(_chunks(text)[:CHUNKS], 1):
            doc_id = name if number == 1 else f"{name}#{number}"
            entries[doc_id] = DocEntry(doc_id, name, chunk)
    return entries


def _members(module: ModuleType, ours: Callable[[str], bool], public: set[type]) -> Iterator[tuple[str, Any, bool]]:
    """Name, object, and whether the module only imported it, because many modules have no ``__all__``."""
    own = "os.path" if module is os.path else module.__name__
    prefix = "" if own == "builtins" else own + "."
    listed = set(getattr(module, "__all__", None) or vars(module))
    for name, value in sorted(vars(module).items()):
        maker = str(getattr(value, "__module__", None) or own)
        # asyncio's __all__ lacks TaskGroup
        shown = name in listed or (inspect.isclass(value) and maker.startswith(own + "."))
        if name.startswith("_") or not shown or not ours(maker) or not callable(value):
            continue
        guest = prefix != "" and maker.split(".")[0].lstrip("_") != own.split(".")[0]
        yield prefix + name, value, guest
        if inspect.isclass(value):
            yield from ((inner, member, guest) for inner, member in _attributes(prefix + name, value, public))


def _attributes(name: str, kind: type, public: set[type]) -> Iterator[tuple[str, Any]]:
    """The attributes of a class, with those inherited from classes that no public module has (pandas' ``NDFrame``)."""
    root = name.split(".")[0]
    for parent in kind.__mro__:
        hidden = root in PARTS and parent.__module__.startswith(root) and parent not in public
        if parent is not kind and not hidden:
            continue
        for member, inner in sorted(vars(parent).items()):
            wrapped = isinstance(inner, classmethod | staticmethod)
            if not member.startswith("_") and (wrapped or callable(inner) or inspect.isdatadescriptor(inner)):
                yield f"{name}.{member}", inner
    for accessor in sorted(getattr(kind, "_accessors", ())):
        yield from _attributes(f"{name}.{accessor}", getattr(kind, accessor), public)


def _topics() -> dict[str, DocEntry]:
    """The help topics in chunks. Long topics contain short ones, so chunks that mostly repeat shorter topics are skipped."""
    from pydoc_data.topics import topics

    entries: dict[str, DocEntry] = {}
    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        new = set()
        for number, chunk in enumerate(_chunks(text), 1):
            paragraphs = [(_norm(p), len(p.split())) for p in re.split(r"\n\s*\n", chunk)]
            if 2 * sum(words for p, words in paragraphs if p not in seen) > sum(words for _, words in paragraphs):
                entries[f"topic:{name}#{number}"] = DocEntry(f"topic:{name}#{number}", name, chunk)
            new |= {p for p, _ in paragraphs}
        seen |= new
    return entries


def _norm(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower())


def _chunks(text: str) -> list[str]:
    """Chunks of about ``CHUNK_WORDS`` words that end with a paragraph. A short last chunk is joined to the one before."""
    chunks: list[list[str]] = [[]]
    size = 0
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = len(paragraph.split())
        if size and size + words > CHUNK_WORDS:
            chunks.append([])
            size = 0
        chunks[-1].append(paragraph)
        size += words
    joined = ["\n\n".join(chunk) for chunk in chunks]
    if len(joined) > 1 and len(joined[-1].split()) < MIN_WORDS:
        joined[-2:] = ["\n\n".join(joined[-2:])]
    most = 2 * CHUNK_WORDS
    cut = [" ".join(chunk.split()[:most]) if len(chunk.split()) > most else chunk for chunk in joined]
    return [chunk for chunk in cut if len(chunk.split()) >= MIN_WORDS]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_collect(sys.argv[1:])))
