"""Measures at small size what docs/scaling.md multiplies: bytes, seconds, requests and memory, each per row or per shard.

    python -m benchmarks.scale.scaling_measure JSON

Everything runs on this machine; object stores are a server on localhost. Sizes come in two, so that what is fixed
(imports, a JVM, a footer) falls out of the difference. Takes about 10 minutes on 2 cores and writes JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.harness import in_own_process, peak_memory
from benchmarks.harness.collections import numbered
from dagr_ray import recipes
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.joins import Positives, Rows, Twins
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_pool import map_shards
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import Inputs, Output, Run, Stage, walk
from dagr_ray.core.tables import table
from dagr_ray.engines.crop import CropEngine
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir, PyDocs, Sample
from dagr_ray.strategies.crop import Crop

SAMPLES = 8
SIZES = (400, 1600)
NOISE = 8 << 20  # bytes by which the peak memory of one and the same work differs
# several shards for each stage that has them: of 64 queries in a search, of 1,024 passages in an index
HERE = Placement(
    generate=Pool(workers=0, shard_rows=512), light=Pool(workers=0, shard_rows=1024), retrieve=Pool(workers=0, shard_rows=1)
)  # fmt: skip
Json = dict[str, Any]


def recipe(passages: int) -> Stage:
    """The data part of a recipe, from passages of the standard library to mined examples."""
    asked = Sample(corpus=PyDocs(part="stdlib"), n=passages, min_words=20)
    return recipes.augment(asked, asked, Crop(), CropEngine(), exemplars=None, samples=SAMPLES, max_rank=20)[1]


def name_of(stage: Stage) -> str:
    """``score round-trip``, ``generate``: what the document calls a stage."""
    own = getattr(stage, "filter", None)
    return f"{stage.type} {own.type}" if own is not None else stage.type


def child(*words: str) -> Json:
    """Runs this file's ``_WORD`` function in a process of its own; returns its JSON."""
    return in_own_process(__file__, *words)


def _stage(runs: str, passages: str, number: str) -> Json:
    stage = walk(recipe(int(passages)))[int(number)]
    started = time.monotonic()
    folder = materialize(stage, runs, HERE)
    return {"peak": peak_memory(), "wall_s": time.monotonic() - started,
            "sharded": len((folder.read_json("plan.json") or {})["shards"]) > 1}  # fmt: skip


def stages(home: Path) -> Json:
    """By stage: seconds and bytes of memory per passage, as the slope between two sizes; by table: rows, bytes a row."""
    found: dict[str, Json] = {}
    tables: dict[str, Json] = {}
    for passages, attempt in itertools.product(SIZES, range(2)):
        runs = str(home / f"runs-{passages}-{attempt}")
        for number, stage in enumerate(walk(recipe(passages))):
            made = child("stage", runs, str(passages), str(number))
            entry = found.setdefault(name_of(stage), {"sharded": False})
            # the less of two: what else the machine does, and how an allocator rounds, only adds
            before = entry.setdefault(str(passages), made)
            entry[str(passages)] = {what: min(made[what], before[what]) for what in ("wall_s", "peak")}
            entry["sharded"] |= made["sharded"]
            manifest = stage.folder(runs).manifest
            assert manifest is not None
            for name, each in manifest["tables"].items():
                if each["rows"] and passages == SIZES[-1]:
                    key = f"{name_of(stage)}/{name}"
                    tables[key] = {"rows": each["rows"] / passages, "bytes": each["bytes"] / each["rows"]}
    few, many = map(str, SIZES)
    for entry in found.values():
        first, last = entry.pop(few), entry.pop(many)
        step = SIZES[1] - SIZES[0]
        entry["seconds"] = max(last["wall_s"] - first["wall_s"], 0.0) / step
        grown = max(last["peak"] - first["peak"], 0)
        entry["memory"] = grown / step if grown > NOISE else 0.0
    return {"stages": found, "tables": tables, "passages": SIZES[-1]}


class Many(Stage):
    """Passages and queries without sense, to see what is held of each."""

    passages: int
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "queries", "qrels")

    def size(self, inputs: Inputs) -> int:
        return self.passages

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            rows = [{"doc_id": f"d{i:09}", "title": "", "text": f"passage {i}"} for i in range(start, stop)]
            asked = [
                (f"q{i:09}{j}", f"query {j} of {i}", f"d{i:09}") for i in range(start, stop) for j in range(SAMPLES)
            ]
            made = {"corpus": table("corpus", rows),
                    "queries": table("queries", [{"query_id": q, "text": text} for q, text, _ in asked]),
                    "qrels": table("qrels", [{"query_id": q, "doc_id": d, "relevance": 1} for q, _, d in asked])}  # fmt: skip
            return Output(made, counts={"in": stop - start, "out": stop - start})

        return run


def _held(runs: str, passages: str) -> Json:
    folder = materialize(Many(passages=int(passages)), runs, HERE)

    found = {}
    for name, hold in (
        ("score round-trip", lambda: (Twins(folder),)),
        ("mine", lambda: (Twins(folder, titled=True), Positives(folder), Rows(folder))),
    ):
        tracemalloc.start()
        hold()
        found[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


def held() -> Json:
    """Bytes for a passage that each worker of a step holds whatever its shard, as slopes; with ``SAMPLES`` queries each."""
    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        few, many = (child("held", home, str(passages)) for passages in (10_000, 60_000))
    return {name: (many[name] - few[name]) / 50_000 for name in many}


def text_of_passages() -> Json:
    """How long the passages are that were measured."""
    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        folder = materialize(Sample(corpus=PyDocs(part="stdlib"), n=SIZES[-1], min_words=20), home, HERE)
        rows = folder.read("corpus").to_pylist()
    return {"words": float(np.mean([len(row["text"].split()) for row in rows])),
            "characters": float(np.mean([len(row["text"]) for row in rows]))}  # fmt: skip


def requests() -> Json:
    """Requests to an object store: for each shard of a Generate stage, for each shard found at a resume, for a listing."""
    from benchmarks.scale.counting_store import BUCKET, CountingStore

    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home, CountingStore() as store:
        data = Beir(path=str(numbered(Path(home) / "set", 400)))
        stage = Generate(corpus=data, strategy=Crop(), engine=CropEngine(), samples=SAMPLES)
        seen: dict[str, list[Counter[str]]] = {"shard": [], "resumed": []}

        def asked(act: Callable[[], Any]) -> Counter[str]:
            store.requests.clear()
            act()
            return Counter(store.requests)

        for shards in (20, 40):
            runs = f"s3://{BUCKET}/runs-{shards}"
            placement = Placement(generate=Pool(workers=0, shard_rows=400 // shards))
            materialize(data, runs, HERE)
            seen["shard"].append(asked(lambda: materialize(stage, runs, placement)))  # noqa: B023
            stage.folder(runs).remove("manifest.json")
            seen["resumed"].append(asked(lambda: materialize(stage, runs, placement)))  # noqa: B023
        many = Artifact(f"s3://{BUCKET}/many", "folder")
        keys = 2000
        for i in range(keys):
            many.write_bytes(f"receipts/{i:05d}.json", b"{}")
        listing = asked(lambda: many.listing("receipts"))
    # what both sizes have alike is of the stage, not of a shard
    per = {what: {k: (two[1][k] - two[0][k]) / 20 for k in two[1]} for what, two in seen.items()}
    return {**per, "keys_per_listing": keys / listing["LIST"]}


def _driver(shards: str) -> Json:
    connect()
    pool = Pool(workers=1, cpus=1)
    list(map_shards(lambda: lambda shard: shard, [{"shard": -1}] * 4, pool))
    started = time.monotonic()
    work = [{"shard": i, "start": i * 8192, "stop": (i + 1) * 8192} for i in range(int(shards))]
    assert sum(1 for _ in map_shards(lambda: lambda shard: shard, work, pool)) == int(shards)
    wall = time.monotonic() - started
    import ray

    peak = peak_memory()
    ray.shutdown()
    return {"wall_s": wall, "peak": peak}


def driver() -> Json:
    """What a shard costs the driver: seconds and bytes for handing it out through Ray Data."""
    few, many = child("driver", "500"), child("driver", "4500")
    seconds, size = (max(many[k] - few[k], 0.0) / 4000 for k in ("wall_s", "peak"))
    return {"seconds": seconds, "bytes": size}


def receipts() -> Json:
    """Bytes of a receipt, a plan's and a manifest's entry on disk; and seconds and bytes in memory to read one back."""
    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        data = Beir(path=str(numbered(Path(home) / "set", 1000)))
        stage = Generate(corpus=data, strategy=Crop(), engine=CropEngine(), samples=SAMPLES)
        sizes = {}
        for shards in (100, 500):
            runs = f"{home}/{shards}"
            materialize(stage, runs, Placement(generate=Pool(workers=0, shard_rows=1000 // shards)))
            folder = stage.folder(runs)
            tracemalloc.start()
            started = time.monotonic()
            found = folder.receipts()
            seconds, memory = time.monotonic() - started, tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert len(found) == shards
            on_disk = {name: os.path.getsize(f"{folder.path}/{name}.json") for name in ("plan", "manifest")}
            sizes[shards] = {"receipt": sum(folder.listing("receipts").values()), "memory": memory, **on_disk}
        few, many = sizes[100], sizes[500]
        per = {name: (many[name] - few[name]) / 400 for name in many}
        # timed without tracemalloc, which is slower
        started = time.monotonic()
        folder.receipts()
        return {**per, "read_s": (time.monotonic() - started) / 500, "traced_s": seconds}


def _lucene(passages: str, copies: str) -> Json:
    from dagr_ray.miners.bm25 import BM25

    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        folder = materialize(Sample(corpus=PyDocs(part="stdlib"), n=int(passages), min_words=20), home, HERE)
        texts = [row["text"].split() for row in folder.read("corpus").to_pylist()]
        target = Path(home) / "index"
        BM25().build(folder.scan("corpus"), Path(home) / "warm")
        started = time.monotonic()
        BM25().build((part for _ in range(int(copies)) for part in folder.scan("corpus")), target)
        build = time.monotonic() - started
        size = sum(path.stat().st_size for path in target.rglob("*"))
        searcher = BM25().open(target)
        queries = [" ".join(words[:12]) for words in texts[:500]]
        searcher.search(queries[:100], 100)
        started = time.monotonic()
        searcher.search(queries, 100)
        return {"bytes": size, "build_s": build, "query_s": (time.monotonic() - started) / len(queries)}


def lucene() -> Json:
    """Bytes and seconds a passage of Lucene's index, as slopes; seconds a query. Copies give time, not size: few words."""
    few, many, copied = child("lucene", "800", "1"), child("lucene", "3200", "1"), child("lucene", "3200", "12")
    size = (many["bytes"] - few["bytes"]) / 2400
    seconds = (copied["build_s"] - many["build_s"]) / (3200 * 11)
    return {"bytes": size, "build_s": seconds, "query_s": many["query_s"], "passages": 3200}


def vectors() -> Json:
    """Bytes and seconds a vector of faiss's flat and IVF-PQ indexes, 384 dimensions, random."""
    import faiss

    rng, dimension, count = np.random.default_rng(0), 384, 60_000
    data = rng.standard_normal((count, dimension), np.float32)
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    made: Json = {"dimension": dimension}
    for name, words in {"flat": "Flat", "ivf_pq": "IVF256,PQ48"}.items():
        index = faiss.index_factory(dimension, words, faiss.METRIC_INNER_PRODUCT)
        started = time.monotonic()
        index.train(data[:12_000])
        train = time.monotonic() - started
        empty, started = len(faiss.serialize_index(index)), time.monotonic()
        index.add(data)
        added = time.monotonic() - started
        started = time.monotonic()
        index.search(data[:256], 100)
        query = (time.monotonic() - started) / 256
        size = (len(faiss.serialize_index(index)) - empty) / count
        made[name] = {"bytes": size, "add_s": added / count, "train_s": train, "query_s": query}
    return made


def _encode() -> Json:
    from dagr_ray.quickstart.models import minilm
    from dagr_ray.retrieval.encoder import Encoder, encode, load

    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        folder = materialize(Sample(corpus=PyDocs(part="stdlib"), n=600, min_words=20), home, HERE)
        texts = folder.read("corpus").column("text").to_pylist()
    encoder = Encoder(model=str(minilm()))
    model = load(encoder)
    encode(model, texts[:64])
    started = time.monotonic()
    encode(model, texts)
    return {"passages_s": len(texts) / (time.monotonic() - started)}


def measure() -> Json:
    """All of it."""
    found: Json = {"text": text_of_passages()}
    with tempfile.TemporaryDirectory(prefix="dagr-scaling-") as home:
        found |= stages(Path(home))
    for part in (held, receipts, requests, driver, lucene, vectors):
        found[part.__name__] = part()
        print(part.__name__, json.dumps(found[part.__name__]), file=sys.stderr)
    found["encode"] = child("encode")
    return found


if __name__ == "__main__":
    children: dict[str, Callable[..., Any]] = {
        "stage": _stage,
        "held": _held,
        "driver": _driver,
        "lucene": _lucene,
        "encode": _encode,
    }
    inner = children.get(sys.argv[1])
    if inner is not None:
        print(json.dumps(inner(*sys.argv[2:])))
    else:
        Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n")
