"""Indexes a corpus with a miner, and searches it: BM25, a frozen encoder or a fine-tuned one."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.language import PASSAGE_CHARACTERS, PASSAGES, language_of_all
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage, derived
from dagr_ray.miners import Miner, Searcher
from dagr_ray.miners.dense import Dense, DenseIndex
from dagr_ray.retrieval import approximate
from dagr_ray.retrieval.approximate import Approximation
from dagr_ray.retrieval.vectors import Ranking

log = logging.getLogger("dagr")
ROWS_AT_ONCE = 8192
QUERIES_AT_ONCE = 16384
NO_HITS = 0.2  # share of queries without a hit from which a warning is logged
# Queries per search shard, in units of the placement's shard rows: an exact search reads all vectors for each shard.
SEARCHED = 64
# A larger index is searched slab by slab, with this many queries at once, and the slabs' results are merged.
SLAB, CELL = 2_000_000, 16384
PART = re.compile(r"index/((\d{10})-[0-9a-f]{8})/")


def _model(inputs: Inputs, name: str) -> Path | None:
    return Path(inputs[name].local_path("model")) if name in inputs else None


class Index(Stage):
    """The index of a corpus as files below ``index/``, in parts. ``trained`` (a training stage) replaces the encoder's weights.

    A part is a shard: it is built once, on any worker, and stays if others fail. The division of the corpus into parts
    (``Miner.shards_per_part``) does not change search results. Miners that differ only in how they search share an index.
    Cost: ``passages`` and ``index_s``, the seconds spent on them (for a dense miner, encoding).
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "index"
    rows_from: ClassVar[str] = "corpus"
    pool: ClassVar[str] = "retrieve"
    corpus: Stage
    miner: Miner
    trained: Stage | None = None

    def label(self) -> str:
        return "-".join(part for part in (self.miner.type, "trained" if self.trained else self.miner.label()) if part)

    def identity(self) -> dict[str, Any]:
        """The miner enters only with the fields that decide the index."""
        return super().identity() | {"miner": self.settled().index_settings().fingerprint()}

    def to_json(self) -> dict[str, Any]:
        """With the settled miner, so that the plan records how its index was built and it is rebuilt in the same way."""
        found = super().to_json()
        found["miner"] = self.settled().to_json()
        return found

    def settled(self) -> Miner:
        """The miner for the language of the corpus."""
        return self.miner.for_language(_spoken(self.corpus))

    def _told(self, inputs: Inputs) -> Miner:
        """``settled``, by the passages themselves if no source knows the language."""
        language = _spoken(self.corpus)
        if language is None:
            rows = inputs["corpus"].slice("corpus", 0, PASSAGES).select(["title", "text"]).to_pylist()
            language = language_of_all(
                tables.passage_text(row["title"], row["text"])[:PASSAGE_CHARACTERS] for row in rows
            )
        return self.miner.for_language(language)

    def remark(self, counts: Json) -> str | None:
        """A warning if the passages are in another language than the miner reads."""
        return self.miner.language_mismatch(_spoken(self.corpus))

    def size(self, inputs: Inputs) -> int | None:
        return None if self.miner.shards_per_part is None else inputs["corpus"].count("corpus")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """An empty corpus has an empty index."""
        return super().ranges(inputs, step * (self.miner.shards_per_part or 1)) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        build = self._told(inputs).builder(_model(inputs, "trained"))

        def run(start: int, stop: int) -> Output:
            started = time.time()
            if self.miner.shards_per_part is None:
                stop = inputs["corpus"].count("corpus")
            files = _written(folder, f"index/{start:010d}", lambda place: build(_passages(inputs, start, stop), place))
            cost = {"passages": stop - start, "index_s": time.time() - started}
            return Output({}, files, {"in": stop - start, "out": stop - start}, cost)

        return run


def _spoken(corpus: Stage) -> str | None:
    """The language of the first source of a corpus."""
    seen: dict[int, Stage] = {}  # which keeps their ids from being used again
    ahead = [corpus]
    while ahead:
        stage = ahead.pop()
        if id(stage) in seen:
            continue
        seen[id(stage)] = stage
        if (language := stage.spoken()) is not None:
            return language
        inner = stage.inputs()
        # a field called corpus is followed first
        ahead += sorted(inner.values(), key=lambda each: each is inner.get("corpus"))
    return None


def _passages(inputs: Inputs, start: int, stop: int) -> Iterator[pa.Table]:
    for first in range(start, stop, ROWS_AT_ONCE):
        yield inputs["corpus"].slice("corpus", first, min(first + ROWS_AT_ONCE, stop))


def _written(folder: Artifact, name: str, write: Any) -> list[str]:
    """The files that ``write`` makes in a sub-folder of its own, so that two writers of one shard cannot mix them."""
    with tempfile.TemporaryDirectory(prefix="dagr-index-") as scratch:
        home = Path(folder.path if folder.local else scratch)
        for left in home.glob(f"{name}-*") if folder.local else ():
            shutil.rmtree(left, ignore_errors=True)  # from an earlier attempt without a receipt
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        target = home / name
        target.mkdir(parents=True)
        write(target)
        files = sorted(f"{name}/{p.relative_to(target).as_posix()}" for p in target.rglob("*") if p.is_file())
        if not folder.local:
            folder.fs.create_dir(f"{folder.path}/{name}", recursive=True)
            pafs.copy_files(str(target), f"{folder.path}/{name}", destination_filesystem=folder.fs)
    return files


def _parts(index: Artifact, slab: slice = slice(None)) -> list[Path]:
    """Local folders of an index's parts, in the order of the corpus."""
    named = (PART.match(file) for file in (index.manifest or {})["files"])
    # an index without parts has its files directly below index/
    names = dict.fromkeys(name.groups()[:1] if name else () for name in named)
    return [Path(index.local_path("index", *part)) for part in list(names)[slab]]


def _slabs(index: Artifact) -> list[slice]:
    """The parts of an index in groups of at most SLAB passages, or one part."""
    named = (PART.match(file) for file in (index.manifest or {})["files"])
    starts = sorted({int(name[2]) for name in named if name})
    ends = [*starts[1:], (index.manifest or {})["counts"]["in"]]
    groups, first = [], 0
    for part, end in enumerate(ends):
        if part > first and end - starts[first] > SLAB:
            groups.append(slice(first, part))
            first = part
    return [*groups, slice(first, len(ends))]


class Approximate(Stage):
    """The structure by which an approximate ``method`` searches the vectors of an index, as a file below ``approximate/``.

    Nothing where there are too few vectors for one. Cost: ``passages`` and ``approximate_s``.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    index: Index
    method: Approximation

    def label(self) -> str:
        return self.method.type

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            started = time.time()
            vectors = approximate.VectorIndex.open(*_parts(inputs["index"]))
            files = _written(folder, "approximate/0", lambda place: approximate.write(self.method, vectors, place))
            cost = {"passages": len(vectors), "approximate_s": time.time() - started}
            return Output({}, files, {"in": len(vectors), "out": len(vectors) if files else 0}, cost)

        return run


def _method(index: Index) -> Approximation | None:
    """How a dense index is searched where that is not exact."""
    found = index.miner.search if isinstance(index.miner, Dense) else None
    return found if isinstance(found, Approximation) else None


class QuerySet:
    """The queries of a stage, or those with a judgement in a split. Raises ConfigError if the split does not exist."""

    def __init__(self, inputs: Inputs, split: str | None) -> None:
        self.queries, self.judged = inputs["queries"], None
        if split is not None:
            judged = self.queries.qrels(split, "search", ["query_id"])["query_id"].unique()
            rows = self.queries.read("queries")
            self.judged = rows.filter(pc.is_in(rows["query_id"], value_set=judged))

    def __len__(self) -> int:
        return self.queries.count("queries") if self.judged is None else len(self.judged)

    def some(self, start: int, stop: int) -> tuple[list[str], list[str]]:
        """Ids and texts of queries ``start`` to ``stop``; without a split, no other queries are read."""
        rows = (
            self.queries.slice("queries", start, stop)
            if self.judged is None
            else self.judged.slice(start, stop - start)
        )
        return rows["query_id"].to_pylist(), rows["text"].to_pylist()


class SearchBase(Stage):
    """Common parts of a search and its probe."""

    abstract: ClassVar[bool] = True
    rows_from: ClassVar[str] = "queries"
    pool: ClassVar[str] = "retrieve"
    judged: ClassVar[dict[str, str]] = {"queries": "split"}
    index: Index
    queries: Stage
    split: str | None = None
    depth: Annotated[int, Field(ge=1)] = 100

    def label(self) -> str:
        return "-".join(part for part in (self.index.miner.type, self.split) if part)

    def identity(self) -> dict[str, Any]:
        """Includes the miner if its index serves several."""
        miner = self.index.settled()
        shared = miner.index_settings().fingerprint() != miner.fingerprint()
        return super().identity() | ({"miner": miner.fingerprint()} if shared else {})

    @derived("index.trained")
    def _trained(self) -> Stage | None:
        """The index's trained encoder encodes the queries too."""
        return self.index.trained

    @derived("index.approximate")
    def _approximate(self) -> Stage | None:
        """The structure of an approximate search."""
        method = _method(self.index)
        return None if method is None else Approximate(index=self.index, method=method.built())

    def _asked(self) -> dict[str, Any]:
        return {"index": self.index, "queries": self.queries, "split": self.split, "depth": self.depth}

    def _searcher(self, inputs: Inputs, slab: slice = slice(None)) -> Searcher:
        """Of the whole index or a slab, exact."""
        return self.index.miner.open(*_parts(inputs["index"], slab), model=_model(inputs, "index.trained"))

    def _approximately(self, inputs: Inputs, exact: Searcher) -> DenseIndex | None:
        """The same index searched by its structure; None where there were too few vectors for one."""
        made, method = inputs["index.approximate"], _method(self.index)
        assert isinstance(exact, DenseIndex) and method is not None
        files = [Path(made.local_path(*file.split("/"))) for file in (made.manifest or {})["files"]]
        return exact.approximately(method, files[0]) if files else None


class RecallProbe(SearchBase):
    """How many of the exact hits an approximate search finds, for a sample of the queries: ``recall@<depth>`` in ``metrics``."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            queries, method = QuerySet(inputs, self.split), _method(self.index)
            assert method is not None, f"{self.index.miner.type} is searched exactly: nothing to probe"
            drawn = sorted(
                (tables.unit_of("probe", q), text) for q, text in zip(*queries.some(0, len(queries)), strict=True)
            )
            texts = [text for _, text in drawn[: method.sample]]
            exact = self._searcher(inputs)
            quick = self._approximately(inputs, exact)
            found, times = 1.0, {}
            if quick is not None:
                truth, times["exact_s"] = _timed(exact, texts, self.depth)
                hits, times["approximate_s"] = _timed(quick, texts, self.depth)
                found = approximate.recall(hits, truth)
            rows = [{"measure": f"recall@{self.depth}", "value": found}] if quick is not None else []
            counts = {"in": len(queries), "out": len(texts)}
            return Output({"metrics": tables.table("metrics", rows)}, counts=counts, cost=times)

        return run


def _timed(searcher: Searcher, texts: Sequence[str], depth: int) -> tuple[list[Ranking], float]:
    began = time.time()
    return searcher.search(texts, depth), time.time() - began


class ShardedSearch(SearchBase):
    """The best hits in each slab of a large index, for ranges of queries: a worker holds one slab, not all vectors.

    Each query has candidates for each slab; ``Search`` merges them.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)

    def size(self, inputs: Inputs) -> int:
        return len(_slabs(inputs["index"])) * len(_cells(QuerySet(inputs, self.split)))

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """A shard is one slab and one range of queries."""
        return super().ranges(inputs, 1)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        slabs, queries = _slabs(inputs["index"]), QuerySet(inputs, self.split)
        cells = _cells(queries)
        whole = self._searcher(inputs, slabs[0])
        assert isinstance(whole, DenseIndex)
        over = lru_cache(maxsize=1)(lambda slab: whole.over(_parts(inputs["index"], slabs[slab])))
        encoded = lru_cache(maxsize=4)(lambda cell: whole.encoded(queries.some(*cells[cell])[1]))

        def run(start: int, stop: int) -> Output:
            began = time.time()
            slab, cell = divmod(start, len(cells))
            hits = over(slab).vectors.search(encoded(cell), self.depth)
            found = _table(queries.some(*cells[cell])[0], hits)
            counts = {"in": len(hits), "out": found.num_rows}
            return Output({"candidates": found}, counts=counts, cost={"search_s": time.time() - began})

        return run


def _cells(queries: QuerySet) -> list[tuple[int, int]]:
    """The ranges of queries that a slab is searched for."""
    return [(first, min(first + CELL, len(queries))) for first in range(0, len(queries), CELL)]


def _merged(slabs: Artifact, cell: int, cells: int, depth: int) -> pa.Table:
    """The best hits of each query over all slabs, for a range of queries."""
    rows = [part["rows"] for part in (slabs.manifest or {})["tables"]["candidates"]["parts"]]
    starts = [0, *accumulate(rows)]
    found = pa.concat_tables(slabs.slice("candidates", starts[i], starts[i + 1]) for i in range(cell, len(rows), cells))
    number = pc.index_in(found["query_id"], value_set=found["query_id"].unique())
    order = [("number", "ascending"), ("score", "descending"), ("doc_id", "descending")]
    found = found.append_column("number", number).sort_by(order)
    numbers = found["number"].to_numpy()
    rank = np.arange(len(numbers)) - np.searchsorted(numbers, numbers) + 1
    found = found.drop_columns("number").set_column(2, found.schema.field("rank"), pa.array(rank, pa.int32()))
    return found.filter(pa.array(rank <= depth)).combine_chunks()


class Search(SearchBase):
    """The ``depth`` best passages of each query, rank 1 first; ``split`` takes the queries judged in ``qrels.<split>``.

    Sharded over the queries, and over the vectors of a large index too (``ShardedSearch``). An approximate search is probed first
    (``RecallProbe``) and is exact where its recall is under what its method asks for; the counts then have ``exact`` = 1, and
    ``recall`` in any case. Cost: ``queries`` and ``search_s``; the counts have ``no_hits``, the queries that found nothing.
    """

    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "search"
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)

    @derived("probe")
    def _probe(self) -> Stage | None:
        """The probe of an approximate search."""
        return RecallProbe(**self._asked()) if _method(self.index) else None

    def shards_of(self) -> Stage | None:
        """The queries, unless a split selects some of them."""
        return self.queries if self.split is None else None

    def dynamic_inputs(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """A large index is searched slab by slab first."""
        method = _method(self.index)
        if method is not None:
            self._notice(inputs, method)  # here, because a worker's log is not shown
        elif isinstance(self.index.miner, Dense) and len(_slabs(inputs["index"])) > 1:
            return {"slabs": build(ShardedSearch(**self._asked()))}
        return {}

    def size(self, inputs: Inputs) -> int:
        return len(QuerySet(inputs, self.split))

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """The slabs' results are merged in the same ranges."""
        return super().ranges(inputs, CELL if "slabs" in inputs else step * SEARCHED) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        queries = QuerySet(inputs, self.split)
        method = _method(self.index)
        probed = self._probed(inputs, method) if method is not None else {}
        if "slabs" in inputs:
            find = self._merging(inputs, queries)
        else:
            find = self._searching(inputs, queries, exact=bool(probed.get("exact", True)))

        def run(start: int, stop: int) -> Output:
            started = time.time()
            found = find(start, stop)
            no_hits = stop - start - pc.count_distinct(found["query_id"]).as_py()
            counts = {"in": stop - start, "out": found.num_rows, "no_hits": no_hits} | (probed if start == 0 else {})
            return Output(
                {"candidates": found}, [], counts, {"queries": stop - start, "search_s": time.time() - started}
            )

        return run

    def remark(self, counts: Json) -> str | None:
        """A warning if many queries have no hits."""
        none, every = counts["no_hits"], counts["in"]
        if none <= NO_HITS * every:
            return None
        read = self.index.settled().describe_analyzer()
        return f"{none:,} of {every:,} queries found nothing" + (
            f"; passages and queries are read as {read}" if read else ""
        )

    def _merging(self, inputs: Inputs, queries: QuerySet) -> Callable[[int, int], pa.Table]:
        cells = len(_cells(queries))
        return lambda start, stop: _merged(inputs["slabs"], start // CELL, cells, self.depth)

    def _searching(self, inputs: Inputs, queries: QuerySet, exact: bool) -> Callable[[int, int], pa.Table]:
        searcher = self._searcher(inputs)
        if not exact:
            searcher = self._approximately(inputs, searcher) or searcher

        def find(start: int, stop: int) -> pa.Table:
            parts = [tables.empty("candidates")]
            for first in range(start, stop, QUERIES_AT_ONCE):
                ids, texts = queries.some(first, min(first + QUERIES_AT_ONCE, stop))
                parts.append(_table(ids, searcher.search(texts, self.depth)))
            return pa.concat_tables(parts)

        return find

    def _probed(self, inputs: Inputs, method: Approximation) -> dict[str, float]:
        """What the probe found: ``recall``, and ``exact`` = 1 where the search falls back."""
        found = inputs["probe"].read("metrics")["value"].to_pylist()
        low = not found or found[0] < method.min_recall
        return {"recall": found[0] if found else 1.0, "exact": int(low)}

    def _notice(self, inputs: Inputs, method: Approximation) -> None:
        """Says where an approximate search falls back, and why."""
        probed = self._probed(inputs, method)
        if not inputs["probe"].count("metrics"):
            log.warning("%s: too few passages for %s; searched exactly", self.folder_name(), method.type)
        elif probed["exact"]:
            log.warning(
                "%s: %s finds %.3f of the exact hits, under min_recall = %g; searched exactly",
                *(self.folder_name(), method.type, probed["recall"], method.min_recall),
            )


def _table(query_ids: Sequence[str], found: Sequence[Ranking]) -> pa.Table:
    """The candidates of queries."""
    return tables.columns(
        "candidates",
        sum(map(len, found)),
        query_id=[name for name, hits in zip(query_ids, found, strict=True) for _ in hits],
        doc_id=[doc_id for hits in found for doc_id, _ in hits],
        rank=[rank for hits in found for rank in range(1, len(hits) + 1)],
        score=[score for hits in found for _, score in hits],
    )
