"""Sources of passages and human judgements: Python's documentation, BEIR folders, Parquet, and samples of a corpus."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import ConfigError, cached_content, content_hash
from dagr_ray.core.language import PASSAGE_CHARACTERS, PASSAGES, language_of_all
from dagr_ray.core.paths import FileOrFolder, last_name, word_of
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.core.words import word_count
from dagr_ray.formats import beir, parquet
from dagr_ray.miners._analyzers import AUTO, analyzer, canonical_code
from dagr_ray.quickstart import pydocs

log = logging.getLogger("dagr")
UNUSABLE = "unusable"
Spoken = Annotated[str, AfterValidator(canonical_code)]


def _content(kind: ModuleType, path: str) -> str:
    return cached_content(kind.__name__, path, lambda: kind.content(path))


class PyDocs(Stage):
    """The documentation of the running Python, with queries and judgements for it.

    ``stdlib`` is the standard library; ``numeric`` is numpy and pandas, for out-of-distribution tests.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "source"
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "rejected")
    part: Literal["stdlib", "numeric"] = "stdlib"

    def label(self) -> str:
        return self.part

    def identity(self) -> dict[str, Any]:
        """The texts come from the interpreter and the packages, so their versions identify them."""
        return super().identity() | {"texts": _documented(self.part), "judged": content_hash(pydocs.DATA / self.part)}

    def spoken(self) -> str:
        """English, as Python's documentation is."""
        return "en"

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            passages = pydocs.stdlib_passages() if self.part == "stdlib" else pydocs.package_passages()
            judgements = pydocs.read_judgements(self.part, {p.doc_id for p in passages})
            output = {
                "corpus": tables.table("corpus", (p._asdict() for p in passages)),
                "queries": tables.table("queries", ({"query_id": k, "text": v} for k, v in judgements.queries.items())),
                "rejected": tables.table("rejected", ({"by": "pydocs", **row} for row in judgements.rejected)),
            }
            for split, rows in judgements.qrels.items():
                output[f"qrels.{split}"] = tables.table("qrels", rows)
            if judgements.rejected:
                log.warning(
                    "pydocs-%s: %d judgements dropped: this Python lacks the passage",
                    self.part,
                    len(judgements.rejected),
                )
            return Output(
                output,
                counts={"in": len(passages), "out": len(passages), "judgements_dropped": len(judgements.rejected)},
            )

        return run


@lru_cache(maxsize=2)
def _documented(part: str) -> dict[str, str]:
    names = ("numpy", "pandas") if part == "numeric" else ()
    return {"python": platform.python_version()} | {name: version(name) for name in names}


class Beir(Stage):
    """A collection in BEIR's layout or another one that ``layouts`` knows: a path or a URI that pyarrow opens.

    Bad lines (broken JSON, wrong encoding, empty text, duplicate or unknown id) are omitted, counted and listed in
    ``rejected`` with file and line; over 1 % of them in one file raises ConfigError. A split with unusable judgements has no
    table: its file is listed in ``rejected`` with the reason ``unusable``. ``language`` is the language of the passages
    (an ISO 639 code, "und" for several), for BM25's analyzer; "auto" detects it from the first ones.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "source"
    version: ClassVar[int] = (
        2  # a title without text is read once; TREC's four columns are distinguished from BEIR's three
    )
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "rejected")
    path: FileOrFolder
    language: Spoken = AUTO

    def label(self) -> str:
        return word_of(last_name(self.path))

    def identity(self) -> dict[str, Any]:
        """The content of the folder's files, whatever its path."""
        return {"type": self.type, "version": self.version, "content": _content(beir, self.path)}

    def spoken(self) -> str:
        """See ``Stage``."""
        return self._heard() if self.language == AUTO else self.language

    def _heard(self) -> str:
        return _heard(beir.head, self.path, _content(beir, self.path))

    def remark(self, counts: Json) -> str | None:
        """A warning if the passages look like another language than ``language``."""
        return _doubt(self.language, self._heard())

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            data = beir.read(self.path)
            beir.warn(self.path, data.problems)
            rejected = tables.Rejected()
            for problem in data.problems:
                rejected.add(f"{problem.file}:{problem.line}", "beir", problem.reason, problem.detail)
            for split, why in data.unusable.items():
                log.warning("the judgements %r cannot be used: %s", split, why)
                rejected.add(f"qrels.{split}", "beir", UNUSABLE, why)
            counts = {"in": sum(data.lines.values()), "out": sum(t.num_rows for t in data.tables.values())}
            output = {**data.tables, "rejected": rejected.table()}
            return Output(output, counts={**counts, "rejected": rejected.counts_by_reason()})

        return run


@lru_cache(maxsize=64)
def _heard(head: Callable[[str, int], list[str]], path: str, content: str) -> str:
    return language_of_all(text[:PASSAGE_CHARACTERS] for text in head(path, PASSAGES))


def _doubt(named: str, heard: str) -> str | None:
    if named == AUTO or analyzer(named).description == analyzer(heard).description:
        return None
    return (
        f"language = {named!r}, and the first passages look like {heard!r}; BM25 reads them as {analyzer(named).description}; "
        f"leave language out, or give language={heard}"
    )


class ParquetCheck(Stage):
    """The bad rows of a ``Parquet`` source, and ``files.json``: its files with the rows of each row group.

    Not sharded, because ids must be unique over all files; needs memory for some batches and 16 bytes of disk per row.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("rejected",)
    path: FileOrFolder

    def label(self) -> str:
        return word_of(last_name(self.path))

    def identity(self) -> dict[str, Any]:
        """The content of the files, whatever their path."""
        return {"type": self.type, "version": self.version, "content": _content(parquet, self.path)}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            report = parquet.check(self.path)
            rejected = tables.Rejected()
            beir.warn(self.path, report.problems)
            for problem in report.problems:
                rejected.add(f"{problem.file}:{problem.line}", "parquet", problem.reason, problem.detail)
            folder.write_json("files.json", report.layout)
            counts = {
                "in": report.rows,
                "out": report.rows - len(report.problems),
                "rejected": rejected.counts_by_reason(),
            }
            return Output({"rejected": rejected.table()}, ["files.json"], counts)

        return run


class Parquet(Stage):
    """Passages in Parquet: a file, a folder of files or a URI, with columns ``doc_id``, ``text`` and optionally ``title``.

    If there is no ``doc_id``, ``_id`` or ``id`` is used.

    Read in ranges of rows, so any number of passages fits. Bad rows (missing or duplicate id, empty text, wrong encoding)
    are omitted, counted and listed in ``rejected`` with file and row from 0; over 1 % of them in one file raises
    ConfigError. A title replaces an empty text. Integer ids become text. ``language`` is as in ``Beir``.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "source"
    version: ClassVar[int] = 2  # a title without text is read once
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "rejected")
    path: FileOrFolder
    language: Spoken = AUTO

    def label(self) -> str:
        return word_of(last_name(self.path))

    def identity(self) -> dict[str, Any]:
        """The content of the files, whatever their path."""
        return {"type": self.type, "version": self.version, "content": _content(parquet, self.path)}

    def spoken(self) -> str:
        """See ``Stage``."""
        return self._heard() if self.language == AUTO else self.language

    def _heard(self) -> str:
        return _heard(parquet.head, self.path, _content(parquet, self.path))

    def remark(self, counts: Json) -> str | None:
        """A warning if the passages look like another language than ``language``."""
        return _doubt(self.language, self._heard())

    @derived("check")
    def _check(self) -> Stage:
        """The source is checked in one pass before it is read."""
        return ParquetCheck(path=self.path)

    def size(self, inputs: Inputs) -> int:
        return sum(sum(file["groups"]) for file in inputs["check"].json_of("files.json"))

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """Whole row groups, unless these are large."""
        return parquet.ranges(inputs["check"].json_of("files.json"), step)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        layout = inputs["check"].json_of("files.json")
        bad_rows = inputs["check"].read("rejected")
        bad_ids = bad_rows["id"].combine_chunks()

        def run(start: int, stop: int) -> Output:
            passages, bad_parts = [tables.empty("corpus")], [tables.empty("rejected")]
            for file, first, rows in parquet.read(self.path, layout, start, stop):
                if bad_rows.num_rows:
                    names = pa.array([f"{file}:{i}" for i in range(first, first + rows.num_rows)], tables.TEXT)
                    rows = rows.filter(pc.invert(pc.is_in(names, value_set=bad_ids)))
                    bad_parts.append(bad_rows.filter(pc.is_in(bad_ids, value_set=names)))
                passages.append(rows)
            corpus, rejected = pa.concat_tables(passages), pa.concat_tables(bad_parts)
            reasons = Counter(f"parquet/{reason}" for reason in rejected["reason"].to_pylist())
            counts = {"in": stop - start, "out": corpus.num_rows, "rejected": dict(reasons)}
            return Output({"corpus": corpus, "rejected": rejected}, counts=counts)

        return run


class Sample(Stage):
    """A part of a corpus: ``n`` passages or a ``share`` of it, drawn by hash; smaller samples are part of larger ones.

    ``skip`` omits this many of the first drawn, for disjoint samples; ``min_words`` omits passages that are too short for
    a query. Passages of ``exclude`` (exemplars) are omitted and counted.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "sample"
    rows_from: ClassVar[str] = "corpus"
    version: ClassVar[int] = 2  # words of any script
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "rejected")
    corpus: Stage
    n: Annotated[int, Field(ge=1)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    min_words: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    exclude: Stage | None = None

    @model_validator(mode="after")
    def _not_both(self) -> Sample:
        if self.n is not None and self.share is not None:
            raise ConfigError(f"sample: n = {self.n} and share = {self.share} are both set; give one")
        return self

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            corpus = inputs["corpus"].read("corpus")
            held_out: pa.Array = pa.array([], tables.TEXT)
            if "exclude" in inputs:
                held_out = inputs["exclude"].read("exemplars", ["doc_id"])["doc_id"].unique()
            is_excluded = pc.is_in(corpus["doc_id"], value_set=held_out)
            rejected = [
                {"id": doc_id, "by": "sample", "reason": "exemplar", "detail": None}
                for doc_id in corpus.filter(is_excluded)["doc_id"].to_pylist()
            ]
            pool_of = corpus.filter(pc.invert(is_excluded))
            if self.min_words:
                words = pc.list_value_length(pc.utf8_split_whitespace(pool_of["text"])).to_numpy().copy()
                for row in np.flatnonzero(~pc.string_is_ascii(pool_of["text"]).to_numpy()):
                    words[row] = word_count(pool_of["text"][row].as_py())
                pool_of = pool_of.filter(pa.array(words >= self.min_words))
            hashes = [tables.unit_of(self.seed, doc_id) for doc_id in pool_of["doc_id"].to_pylist()]
            order = sorted(range(len(hashes)), key=hashes.__getitem__)
            if self.share is not None:
                order = [i for i in order if hashes[i] < self.share]
            order = order[self.skip : None if self.n is None else self.skip + self.n]
            sampled = pool_of.take(pa.array(sorted(order), pa.int64())).combine_chunks()
            counts = {"in": corpus.num_rows, "out": sampled.num_rows, "rejected": {"sample/exemplar": len(rejected)}}
            return Output({"corpus": sampled, "rejected": tables.table("rejected", rejected)}, counts=counts)

        return run
