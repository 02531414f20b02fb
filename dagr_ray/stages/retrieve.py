"""Index a corpus with a miner, and search it: BM25, a frozen encoder or a fine-tuned one, through one interface."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from pydantic import Field

from dagr_ray import tables
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.miners import Miner, Searcher
from dagr_ray.stage import Inputs, Output, Run, Stage

QUERIES_AT_ONCE = 1024


def _model(inputs: Inputs, name: str) -> Path | None:
    return Path(inputs[name].local_path("model")) if name in inputs else None


class Index(Stage):
    """The index of a corpus as files below ``index/``. ``trained`` (a training stage) replaces the encoder's weights.

    Cost: ``passages`` and ``index_s``, the seconds spent on them (for a dense miner, loading and encoding).
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    corpus: Stage
    miner: Miner
    trained: Stage | None = None

    def label(self) -> str:
        return "-".join(part for part in (self.miner.type, "trained" if self.trained else self.miner.label()) if part)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            started = time.time()
            with tempfile.TemporaryDirectory(prefix="dagr-index-") as scratch:
                target = Path(folder.path if folder.local else scratch) / "index"
                # what an earlier try left is no part of this index
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
                self.miner.build(inputs["corpus"].scan("corpus"), target, _model(inputs, "trained"))
                files = sorted(f"index/{p.relative_to(target).as_posix()}" for p in target.rglob("*") if p.is_file())
                if not folder.local:
                    folder.fs.create_dir(f"{folder.path}/index", recursive=True)
                    pafs.copy_files(str(target), f"{folder.path}/index", destination_filesystem=folder.fs)
            passages = inputs["corpus"].count("corpus")
            cost = {"passages": passages, "index_s": time.time() - started}
            return Output({}, files, {"in": passages, "out": passages}, cost)

        return run


class Search(Stage):
    """The ``depth`` best passages of each query, rank 1 first; ``split`` takes the queries judged in ``qrels.<split>``.

    Cost: ``queries`` and ``search_s``; the counts have ``no_hits``, the queries that found nothing.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)
    index: Index
    queries: Stage
    split: str | None = None
    depth: Annotated[int, Field(ge=1)] = 100

    def label(self) -> str:
        return "-".join(part for part in (self.index.miner.type, self.split) if part)

    def inputs(self) -> dict[str, Stage]:
        """The index's trained encoder is an input of the search too: it encodes the queries."""
        trained = self.index.trained
        return super().inputs() | ({"index.trained": trained} if trained is not None else {})

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        searcher = self.index.miner.open(Path(inputs["index"].local_path("index")), _model(inputs, "index.trained"))

        def run(start: int, stop: int) -> Output:
            started = time.time()
            queries = _wanted(inputs["queries"], self.split)
            ids, texts = queries["query_id"].to_pylist(), queries["text"].to_pylist()
            parts = list(_candidates(searcher, ids, texts, self.depth))
            found = pa.concat_tables([tables.empty("candidates"), *parts])
            no_hits = len(ids) - pc.count_distinct(found["query_id"]).as_py()
            counts = {"in": len(ids), "out": found.num_rows, "no_hits": no_hits}
            return Output({"candidates": found}, [], counts, {"queries": len(ids), "search_s": time.time() - started})

        return run


def _wanted(queries: Artifact, split: str | None) -> pa.Table:
    """The query rows, or those with a judgement in a split. Raises ConfigError where there is no such split."""
    rows = queries.read("queries")
    if split is None:
        return rows
    name = f"qrels.{split}"
    if name not in queries.table_names():
        splits = [t.removeprefix("qrels.") for t in queries.table_names() if t.startswith("qrels.")]
        raise ConfigError(f"search: split = {split!r} is not in {queries.name}; allowed: {', '.join(splits) or 'none'}")
    judged = queries.read(name, ["query_id"])["query_id"].unique()
    return rows.filter(pc.is_in(rows["query_id"], value_set=judged))


def _candidates(searcher: Searcher, ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[pa.Table]:
    schema = tables.schema("candidates")
    for start in range(0, len(ids), QUERIES_AT_ONCE):
        names = ids[start : start + QUERIES_AT_ONCE]
        found = searcher.search(texts[start : start + QUERIES_AT_ONCE], depth)
        columns = {
            "query_id": [name for name, hits in zip(names, found, strict=True) for _ in hits],
            "doc_id": [doc_id for hits in found for doc_id, _ in hits],
            "rank": [rank for hits in found for rank in range(1, len(hits) + 1)],
            "score": [score for hits in found for _, score in hits],
        }
        yield pa.table(columns, schema=schema)
