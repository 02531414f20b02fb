"""Index a corpus with a miner, and search it: BM25, a frozen encoder or a fine-tuned one, alone or fused."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
from pydantic import Field, model_validator

from dagr_ray import approximate, fusion, tables
from dagr_ray.approximate import Method
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Pool
from dagr_ray.config import ConfigError
from dagr_ray.miners import Miner, Searcher
from dagr_ray.miners.dense import Dense, DenseIndex
from dagr_ray.stage import Inputs, Output, Run, Stage

log = logging.getLogger("dagr")
ROWS_AT_ONCE = 8192
QUERIES_AT_ONCE = 16384
# Queries of one shard of a search, in rows of a placement's shard: an exact search reads all vectors for each shard.
SEARCHED = 64
PART = re.compile(r"index/(\d{10}-[0-9a-f]{8})/")


def _model(inputs: Inputs, name: str) -> Path | None:
    return Path(inputs[name].local_path("model")) if name in inputs else None


class Index(Stage):
    """The index of a corpus as files below ``index/``, in parts. ``trained`` (a training stage) replaces the encoder's weights.

    A part is a shard: it is built once, on any worker, and what is built stays when others fail. How the corpus is cut
    into parts (``Miner.part``) changes nothing that a search finds. Miners that differ only in how they search share it.
    Cost: ``passages`` and ``index_s``, the seconds spent on them (for a dense miner, encoding).
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    corpus: Stage
    miner: Miner
    trained: Stage | None = None

    def label(self) -> str:
        return "-".join(part for part in (self.miner.type, "trained" if self.trained else self.miner.label()) if part)

    def identity(self) -> dict[str, Any]:
        """The miner by what its index is made of."""
        return super().identity() | {"miner": self.miner.built().fingerprint()}

    def size(self, inputs: Inputs) -> int | None:
        return None if self.miner.part is None else inputs["corpus"].count("corpus")

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """An empty corpus has an empty index."""
        return super().ranges(inputs, step * (self.miner.part or 1)) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        build = self.miner.builder(_model(inputs, "trained"))

        def run(start: int, stop: int) -> Output:
            started = time.time()
            if self.miner.part is None:
                stop = inputs["corpus"].count("corpus")
            files = _written(folder, f"index/{start:010d}", lambda place: build(_passages(inputs, start, stop), place))
            cost = {"passages": stop - start, "index_s": time.time() - started}
            return Output({}, files, {"in": stop - start, "out": stop - start}, cost)

        return run


def _passages(inputs: Inputs, start: int, stop: int) -> Iterator[pa.Table]:
    for first in range(start, stop, ROWS_AT_ONCE):
        yield inputs["corpus"].slice("corpus", first, min(first + ROWS_AT_ONCE, stop))


def _written(folder: Artifact, name: str, write: Any) -> list[str]:
    """What ``write`` put into a sub-folder ``name`` of its own: two writers of one shard cannot mix their files."""
    with tempfile.TemporaryDirectory(prefix="dagr-index-") as scratch:
        home = Path(folder.path if folder.local else scratch)
        for left in home.glob(f"{name}-*") if folder.local else ():
            shutil.rmtree(left, ignore_errors=True)  # by an earlier try, which no receipt names
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        target = home / name
        target.mkdir(parents=True)
        write(target)
        files = sorted(f"{name}/{p.relative_to(target).as_posix()}" for p in target.rglob("*") if p.is_file())
        if not folder.local:
            folder.fs.create_dir(f"{folder.path}/{name}", recursive=True)
            pafs.copy_files(str(target), f"{folder.path}/{name}", destination_filesystem=folder.fs)
    return files


def _parts(index: Artifact) -> list[Path]:
    """The folders of an index's parts on this machine, in the order of the corpus."""
    named = (PART.match(file) for file in (index.manifest or {})["files"])
    # one without parts has its files below index/ itself
    return [
        Path(index.local_path("index", *part))
        for part in dict.fromkeys(name.groups() if name else () for name in named)
    ]


class Approximate(Stage):
    """The structure by which an approximate method of a dense miner searches, as a file below ``approximate/``.

    Nothing where there are too few vectors for one. Cost: ``passages`` and ``approximate_s``.
    """

    abstract: ClassVar[bool] = False
    pool: ClassVar[str] = "retrieve"
    index: Index

    def label(self) -> str:
        return _method(self.index).type

    def identity(self) -> dict[str, Any]:
        """The method by what its structure is made of."""
        return super().identity() | {"method": _method(self.index).built().fingerprint()}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            started = time.time()
            vectors = approximate.VectorIndex.open(*_parts(inputs["index"]))
            made = _method(self.index)
            files = _written(folder, "approximate/0", lambda place: approximate.write(made, vectors, place))
            cost = {"passages": len(vectors), "approximate_s": time.time() - started}
            return Output({}, files, {"in": len(vectors), "out": len(vectors) if files else 0}, cost)

        return run


def _method(index: Index) -> Method:
    assert isinstance(index.miner, Dense), f"{index.miner.type} has no approximate search"
    return index.miner.search


class Asking(Stage):
    """What a search and its probe have in common."""

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "retrieve"
    index: Index
    queries: Stage
    split: str | None = None
    depth: Annotated[int, Field(ge=1)] = 100

    def label(self) -> str:
        return "-".join(part for part in (self.index.miner.type, self.split) if part)

    def identity(self) -> dict[str, Any]:
        """The miner too, where its index stands for several."""
        miner = self.index.miner
        shared = miner.built().fingerprint() != miner.fingerprint()
        return super().identity() | ({"miner": miner.fingerprint()} if shared else {})

    @property
    def _approximate(self) -> bool:
        return isinstance(self.index.miner, Dense) and self.index.miner.search.approximate

    def inputs(self) -> dict[str, Stage]:
        """The index's trained encoder encodes the queries; an approximate search has a structure of its own."""
        found = super().inputs()
        if self.index.trained is not None:
            found["index.trained"] = self.index.trained
        if self._approximate:
            found["index.approximate"] = Approximate(index=self.index)
        return found

    def _searcher(self, inputs: Inputs) -> Searcher:
        """Of the whole index, exact."""
        return self.index.miner.open(*_parts(inputs["index"]), model=_model(inputs, "index.trained"))

    def _approximately(self, inputs: Inputs, searcher: Searcher) -> DenseIndex | None:
        made = inputs["index.approximate"]
        files = list((made.manifest or {})["files"])
        assert isinstance(searcher, DenseIndex)
        return (
            searcher.approximately(_method(self.index), Path(made.local_path(*files[0].split("/")))) if files else None
        )


class Probe(Asking):
    """How many of the exact hits an approximate search finds, for a sample of the queries: ``recall@<depth>`` in ``metrics``."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            queries = _wanted(inputs["queries"], self.split)
            drawn = sorted((tables.unit_of("probe", q), i) for i, q in enumerate(queries["query_id"].to_pylist()))
            sample = [i for _, i in drawn[: _method(self.index).sample]]
            texts = queries["text"].take(pa.array(sample, pa.int64())).to_pylist()
            exact = self._searcher(inputs)
            quick = self._approximately(inputs, exact)
            found, times = 1.0, {}
            if quick is not None:
                truth, times["exact_s"] = _timed(exact, texts, self.depth)
                hits, times["approximate_s"] = _timed(quick, texts, self.depth)
                found = approximate.recall(hits, truth)
            rows = [{"measure": f"recall@{self.depth}", "value": found}] if quick is not None else []
            counts = {"in": queries.num_rows, "out": len(texts)}
            return Output({"metrics": tables.table("metrics", rows)}, counts=counts, cost=times)

        return run


def _timed(searcher: Searcher, texts: Sequence[str], depth: int) -> tuple[list[list[tuple[str, float]]], float]:
    began = time.time()
    return searcher.search(texts, depth), time.time() - began


class Search(Asking):
    """The ``depth`` best passages of each query, rank 1 first; ``split`` takes the queries judged in ``qrels.<split>``.

    Sharded over the queries. An approximate search is probed first (``Probe``) and is exact where its recall is under
    what its method asks for; the counts then have ``exact`` = 1, and ``recall`` in any case.
    Cost: ``queries`` and ``search_s``; the counts have ``no_hits``, the queries that found nothing.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)

    def inputs(self) -> dict[str, Stage]:
        """And the probe of an approximate search."""
        shared = {"index": self.index, "queries": self.queries, "split": self.split, "depth": self.depth}
        return super().inputs() | ({"probe": Probe(**shared)} if self._approximate else {})  # type: ignore[arg-type]

    def size(self, inputs: Inputs) -> int:
        return _wanted(inputs["queries"], self.split).num_rows

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        return super().ranges(inputs, step * SEARCHED) or [(0, 0)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        searcher = self._searcher(inputs)
        probed = self._probed(inputs) if self._approximate else {}
        if probed and not probed["exact"]:
            searcher = self._approximately(inputs, searcher) or searcher
        queries = _wanted(inputs["queries"], self.split)

        def run(start: int, stop: int) -> Output:
            started = time.time()
            some = queries.slice(start, stop - start)
            ids, texts = some["query_id"].to_pylist(), some["text"].to_pylist()
            parts = list(_candidates(searcher, ids, texts, self.depth))
            found = pa.concat_tables([tables.empty("candidates"), *parts])
            no_hits = len(ids) - pc.count_distinct(found["query_id"]).as_py()
            counts = {"in": len(ids), "out": found.num_rows, "no_hits": no_hits} | (probed if start == 0 else {})
            return Output({"candidates": found}, [], counts, {"queries": len(ids), "search_s": time.time() - started})

        return run

    def _probed(self, inputs: Inputs) -> dict[str, float]:
        """What the probe found: ``recall``, and ``exact`` = 1 where the search falls back."""
        found = inputs["probe"].read("metrics")["value"].to_pylist()
        method = _method(self.index)
        if not found:
            log.warning("%s: too few passages for %s; searched exactly", self.folder_name(), method.type)
            return {"recall": 1.0, "exact": 1}
        low = found[0] < method.min_recall
        if low:
            log.warning(
                "%s: %s finds %.3f of the exact hits, under min_recall = %g; searched exactly",
                *(self.folder_name(), method.type, found[0], method.min_recall),
            )
        return {"recall": found[0], "exact": int(low)}


def _wanted(queries: Artifact, split: str | None) -> pa.Table:
    """The query rows, or those with a judgement in a split. Raises ConfigError where there is no such split."""
    rows = queries.read("queries")
    if split is None:
        return rows
    judged = _judgements(queries, split, "search")["query_id"].unique()
    return rows.filter(pc.is_in(rows["query_id"], value_set=judged))


def _judgements(data: Artifact, split: str, who: str) -> pa.Table:
    name = f"qrels.{split}"
    if name not in data.table_names():
        splits = [t.removeprefix("qrels.") for t in data.table_names() if t.startswith("qrels.")]
        raise ConfigError(f"{who}: split = {split!r} is not in {data.name}; allowed: {', '.join(splits) or 'none'}")
    return data.read(name)


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


class Fuse(Stage):
    """Several searches of the same queries as one: ``candidates`` ordered by all of them, the ``depth`` best of each query.

    ``rrf``: reciprocal ranks, sum of 1 / (``k`` + rank). Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    ``weights``: the weighted sum of the searches' scores, each scaled by the query's hits to mean 0 and deviation 1
    (``z-score``) or from 0 to 1 (``min-max``); a passage that a search did not find has its lowest. ``weights`` are given,
    or tuned: those of a grid of ``steps`` on the simplex whose nDCG@10 on the judgements ``dev_split`` of ``dev`` is best,
    where the same searches are made of those queries. Source: Bruch, Gai and Ingber, arXiv 2210.11934.

    The counts have ``weights`` by search and, where they were tuned, ``dev_ndcg`` of the fusion and of each search alone.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("candidates",)
    searches: tuple[Search, ...]
    method: Literal["rrf", "weights"] = "rrf"
    k: Annotated[int, Field(ge=1)] = 60
    scale: Literal["z-score", "min-max"] = "min-max"
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    dev: Stage | None = None
    dev_split: str = "dev"
    steps: Annotated[int, Field(ge=1, le=100)] = 20
    depth: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _fields_agree(self) -> Fuse:
        if len(self.searches) < 2:
            raise ConfigError(f"fuse: {len(self.searches)} searches; give at least two")
        asked = {(search.queries.fingerprint(), search.split) for search in self.searches}
        if len(asked) > 1:
            raise ConfigError("fuse: the searches are not of the same queries and split; give them the same")
        if self.weights is not None and len(self.weights) != len(self.searches):
            raise ConfigError(f"fuse: weights = {self.weights} for {len(self.searches)} searches; give one for each")
        if self.weights is not None and not any(self.weights):
            raise ConfigError(f"fuse: weights = {self.weights} are all 0; give one that is not")
        if self.method == "rrf" and (self.weights is not None or self.dev is not None):
            raise ConfigError(
                "fuse: method = 'rrf' has no weights; leave weights and dev out, or set method = 'weights'"
            )
        if self.method == "weights" and (self.weights is None) == (self.dev is None):
            raise ConfigError("fuse: method = 'weights' wants either weights, or dev (judged queries) to tune them on")
        if self.dev is not None and (self.dev.fingerprint(), self.dev_split) in asked:
            raise ConfigError(
                f"fuse: dev_split = {self.dev_split!r} is what is searched: weights tuned on it would say too much; give another"
            )
        return self

    def label(self) -> str:
        tuned = "tuned" if self.dev is not None else self.method
        return "-".join([tuned, *(search.index.miner.type for search in self.searches)])[:60]

    def inputs(self) -> dict[str, Stage]:
        """And the same searches of the queries that weights are tuned on."""
        found = super().inputs()
        if self.dev is not None:
            change = {"queries": self.dev, "split": self.dev_split}
            found |= {f"tuning.{i}": search.model_copy(update=change) for i, search in enumerate(self.searches)}
        return found

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            names = [f"{i} {search.label()}" for i, search in enumerate(self.searches)]
            counts: dict[str, Any] = {}
            weights = self.weights
            if self.dev is not None:
                qrels = _judgements(inputs["dev"], self.dev_split, "fuse")
                lists = fusion.Lists([inputs[f"tuning.{i}"].read("candidates") for i in range(len(names))])
                weights, tuned, alone = fusion.tune(lists, qrels, self.scale, self.steps)
                counts["dev_ndcg"] = {"fused": tuned} | dict(zip(names, alone, strict=True))
            lists = fusion.Lists([inputs[f"searches.{i}"].read("candidates") for i in range(len(names))])
            if weights is None:
                made = lists.ranked(lists.reciprocal(self.k), self.depth)
            else:
                counts["weights"] = dict(zip(names, weights, strict=True))
                made = lists.ranked(lists.weighted(weights, self.scale), self.depth)
            counts |= {"in": lists.rows, "out": made.num_rows}
            return Output({"candidates": made}, counts=counts)

        return run
