"""Estimates the time, tokens, storage and cost of a stage from finished folders of its type, or else from constants.

A canary's folders count as finished folders. The more a folder has in common with the stage, the better the estimate: the
same corpus, the same request to the same engine, or only the same type. Time is a start-up time plus a time for each row;
storage is a size for each part plus a size for each row.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Json, folders_of
from dagr_ray.core.config import fingerprint_cache
from dagr_ray.core.cost import KINDS, Rates
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, main_inputs_of, role_of
from dagr_ray.core.storage import filesystem
from dagr_ray.miners.dense import Dense
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.retrieve import Index
from dagr_ray.stages.sources import Beir, PyDocs, Sample
from dagr_ray.stages.take import Take
from dagr_ray.stages.train import Train

PYDOCS_ROWS = {"stdlib": 3400, "numeric": 2100}
PROMPT_TOKENS = 600  # six exemplars of up to 60 words, a passage of about 120 words, both at 1.4 tokens a word
# Seconds for each row, and before the first row, on two CPU cores with the quick start's models. Used until a runs folder has
# its own measurements. A row is a short completion for a generation, and a passage to encode for an index.
DEFAULT_ROW_S = {"generate": 0.07, "train": 0.08, "index": 0.007, "search": 0.0003}
DEFAULT_START_S = {"generate": 15.0, "train": 15.0, "search": 0.5}
DEFAULT_FIXED_S = 0.3
# Bytes of a row in a compressed table (a query and its ids; types with longer rows are listed below), of a passage of a
# hundred words in a Lucene index (145 to 220 on Cranfield, SQuADShifts and SciFact), and of a number in a vector.
ROW_BYTES, POSTINGS_BYTES, VECTOR_BYTES = 60.0, 180.0, 4.0
DEFAULT_ROW_BYTES = {
    "beir": 400.0,
    "pydocs": 400.0,
    "sample": 400.0,
    "search": 1200.0,
    "fuse": 1200.0,
    "evaluate": 3000.0,
}
# What an estimate is based on, the best basis first.
BASES = ("this corpus", "another corpus", "its type")


@dataclass(frozen=True)
class Record:
    """The rates of a finished folder, to estimate other stages of its type. Times are for one worker."""

    manifest: Json
    rows: int
    fixed_s: float  # before and after the work, for any number of rows
    start_s: float  # to open the stage, for each worker
    row_s: float
    tokens: dict[str, float]  # for each row, by kind
    row_bytes: float
    fixed_bytes: float  # for any number of rows: the model of a training
    yielded: float  # output rows for each input row

    @classmethod
    def of(cls, manifest: Json, pool: str) -> Record | None:
        """None if the folder had no rows, or was built before bills were written."""
        bill, rows = manifest.get("bill"), manifest["counts"].get("in", 0)
        if not bill or not rows:
            return None
        seconds, tries = bill["seconds"], max(bill["attempts"], 1)
        shards = max((len(entry["parts"]) for entry in manifest["tables"].values()), default=1)
        workers = max(manifest["placement"][pool]["workers"], 1)
        parallel = max(min(workers, shards), 1)
        start_s, busy_s = seconds["start"] / parallel / tries, seconds["busy"] / parallel
        wasted_s = bill["waste"]["seconds"] / parallel
        stored = sum(
            entry["bytes"] - len(entry["parts"]) * _part_bytes(name) for name, entry in manifest["tables"].items()
        )
        files = sum(entry["bytes"] for entry in manifest["files"].values())
        is_model = role_of(manifest) == "train"
        stored += 0 if is_model else files
        return cls(
            manifest,
            rows,
            max((seconds["wall"] - busy_s - wasted_s) / tries - start_s, 0.0),
            start_s,
            seconds["busy"] / rows,
            {kind: bill["tokens"][kind] / rows for kind in KINDS},
            max(stored, 0) / rows,
            files if is_model else 0.0,
            manifest["counts"].get("out", rows) / rows,
        )


@lru_cache
def _part_bytes(table: str) -> int:
    """The size of a part apart from its rows: its size with one short row, because an empty part lacks page headers."""
    fields = {field.name: _short_value(field.type) for field in tables.schema(table)}
    sink = io.BytesIO()
    pq.write_table(tables.table(table, [fields]), sink, compression="zstd")
    return sink.tell()


def _short_value(kind: pa.DataType) -> object:
    if pa.types.is_large_string(kind):
        return "0"
    return [] if pa.types.is_list(kind) else pa.scalar(0).cast(kind).as_py()


def _manifests(runs: str) -> dict[str, Json]:
    """The manifests of a runs folder, by the name of the folder."""
    manifests = {name: Artifact(runs, name).manifest for name, _ in folders_of(runs)}
    return {
        name: manifest for name, manifest in manifests.items() if manifest and manifest.get("stage", {}).get("type")
    }


def _corpus_of(stage: Stage) -> str:
    """The fingerprint of the corpus that a stage's passages come from: equal for a copy of the corpus elsewhere."""
    names = stage.main_inputs()
    return _corpus_of(stage.inputs()[names[0]]) if names else stage.fingerprint()


def _corpus_of_folder(name: str, manifests: Mapping[str, Json]) -> str:
    """The same fingerprint for a finished folder, out of the manifests of its runs folder."""
    sources = main_inputs_of(manifests[name]) if name in manifests else []
    return _corpus_of_folder(sources[0], manifests) if sources else name.rpartition("-")[2]


# The fields that decide the work on a row; most other fields of a stage are its inputs.
_WORK_FIELDS = ("engine", "strategy", "sampling", "samples", "filter", "miner", "base")


def _similarity(stage: Json, other: Json) -> int | None:
    """The place in BASES of ``other`` as a basis for ``stage``, if both read one corpus; None for different kinds of work."""
    if stage["type"] != other["type"]:
        return None
    kinds = [
        [(value.get(name) or {}).get("type") for name in ("engine", "filter", "miner")] for value in (stage, other)
    ]
    if kinds[0] != kinds[1]:
        return None
    same_work = all(stage.get(name) == other.get(name) for name in _WORK_FIELDS)
    filters = [[score["filter"]["type"] for score in value.get("scores", ())] for value in (stage, other)]
    return 0 if same_work and filters[0] == filters[1] else 2


class _StageRates:
    """Rates for a stage from the most similar records: means weighted by rows, and medians for the fixed parts."""

    def __init__(self, stage: Stage, manifests: Mapping[str, Json]) -> None:
        candidates = {name: manifest for name, manifest in manifests.items() if manifest["stage"]["type"] == stage.type}
        own, corpus = (stage.to_json(), _corpus_of(stage)) if candidates else ({}, "")
        places: list[tuple[int, Json]] = []
        for name, manifest in candidates.items():
            place = _similarity(own, manifest["stage"])
            if place == 0 and _corpus_of_folder(name, manifests) != corpus:
                place = 1
            places += [(place, manifest)] if place is not None else []
        self.records: list[Record] = []
        self.basis = "constants"
        for best, basis in enumerate(BASES):
            records = [Record.of(manifest, stage.pool) for place, manifest in places if place == best]
            self.records = [record for record in records if record is not None]
            if self.records:
                self.basis = basis
                break
        self.rows = sum(record.rows for record in self.records)

    def mean(self, value: str) -> float:
        return sum(getattr(record, value) * record.rows for record in self.records) / self.rows

    def median(self, value: str) -> float:
        return median(getattr(record, value) for record in self.records)

    def tokens(self, kind: str) -> float:
        return sum(record.tokens[kind] * record.rows for record in self.records) / self.rows


class _Estimator:
    """Estimates for the stages of one job, each once."""

    def __init__(self, runs: str, placement: Placement) -> None:
        self.runs, self.placement, self.manifests = runs, placement, _manifests(runs)
        self._rates: dict[str, _StageRates] = {}
        self._output_rows: dict[str, int | None] = {}

    def rates(self, stage: Stage) -> _StageRates:
        key = stage.fingerprint()
        if key not in self._rates:
            self._rates[key] = _StageRates(stage, self.manifests)
        return self._rates[key]

    def output_rows(self, stage: Stage) -> int | None:
        """Rows that a stage writes for the stages that read it; None if unknown."""
        key = stage.fingerprint()
        if key not in self._output_rows:
            self._output_rows[key] = self._count_output_rows(stage)
        return self._output_rows[key]

    def _count_output_rows(self, stage: Stage) -> int | None:
        manifest = stage.folder(self.runs).manifest
        if manifest is not None and stage.outputs and stage.role not in ("search", "evaluate"):
            return manifest["tables"][stage.outputs[0]]["rows"]
        if isinstance(stage, PyDocs):
            return PYDOCS_ROWS[stage.part]
        if isinstance(stage, Beir):
            return _count_lines(stage.path, "corpus.jsonl")
        rows = self.input_rows(stage)
        if isinstance(stage, Sample):
            if stage.n is not None:
                return min(stage.n, rows) if rows is not None else stage.n
            return rows and round(rows * (stage.share or 1.0))
        if rows is None:
            return stage.n if isinstance(stage, Take) else None
        if isinstance(stage, Generate):
            return rows * stage.samples * len(stage.strategy.members())
        rates = self.rates(stage)
        if stage.role in ("parse", "select", "mine") and rates.records and rates.basis != BASES[2]:
            rows = round(rows * rates.mean("yielded"))
        return min(rows, stage.n) if isinstance(stage, Take) and stage.n else rows

    def input_rows(self, stage: Stage) -> int | None:
        """Rows that a stage processes: the rows of its main input; None if unknown."""
        names = stage.main_inputs()
        if not names:
            return None
        source = stage.inputs()[names[0]]
        if names[0] in stage.judged and source.outputs[0] == "corpus":  # human queries, stored with their corpus
            manifest = source.folder(self.runs).manifest
            if manifest is not None:
                return manifest["tables"]["queries"]["rows"]
            return _count_lines(source.path, "queries.jsonl") if isinstance(source, Beir) else None
        return self.output_rows(source)

    def of(self, stage: Stage) -> Json:
        rows = self.output_rows(stage) if not stage.inputs() else self.input_rows(stage)
        rates, pool = self.rates(stage), getattr(self.placement, stage.pool)
        unfinished, count = _unfinished_share(stage, self.runs), rows or 0
        shards = max(ceil(count / pool.shard_rows), 1)
        workers = max(min(pool.workers, shards), 1)
        per_row = [0.0] * len(KINDS)
        if rates.records:
            busy_s = count * unfinished * rates.mean("row_s")
            seconds = rates.median("fixed_s") + rates.median("start_s") + busy_s / workers
            per_row = [rates.tokens(kind) for kind in KINDS]
            stored = count * rates.mean("row_bytes") + rates.median("fixed_bytes")
        else:
            busy_s, start_s = _default_seconds(stage, count * unfinished)
            seconds, stored = start_s + busy_s / workers, _default_bytes(stage, count)
            if isinstance(stage, Generate) and stage.engine.has_model:
                prompts = stage.per_passage() // stage.per_request()
                per_row = [PROMPT_TOKENS * prompts, 0, stage.per_passage() * stage.sampling.max_tokens]
        tokens = {kind: round(count * unfinished * number) for kind, number in zip(KINDS, per_row, strict=True)}
        return {
            "rows": rows,
            "tokens": tokens["prompt"] + tokens["completion"] or None,
            **{f"{kind}_tokens": number for kind, number in tokens.items()},
            "seconds": seconds,
            "busy_seconds": busy_s,
            "bytes": round(unfinished * (stored + shards * sum(map(_part_bytes, stage.outputs)))),
            "price": self._price(stage, busy_s, tokens, pool),
            "rates": str(Rates.from_prices(self.placement.prices, stage.engine_asked())),
            "basis": rates.basis,
        }

    def _price(self, stage: Stage, busy_s: float, tokens: dict[str, int], pool: Pool) -> float:
        rates = Rates.from_prices(self.placement.prices, stage.engine_asked())
        if rates.tokens is not None:
            return rates.tokens.usd(**tokens)
        an_hour = pool.gpus * rates.gpu_hour + stage.cores_held(pool) * rates.cpu_hour
        return busy_s / 3600 * an_hour


def _default_seconds(stage: Stage, rows: float) -> tuple[float, float]:
    """Seconds of a worker: (busy, start)."""
    free = isinstance(stage, Generate) and not stage.engine.has_model
    per_row = 0.0005 if free else DEFAULT_ROW_S.get(stage.type, 0.0)
    start = DEFAULT_FIXED_S if free else DEFAULT_START_S.get(stage.type, DEFAULT_FIXED_S)
    return rows * per_row, start


def _default_bytes(stage: Stage, rows: int) -> float:
    """Bytes stored besides the parts. A training stores a model as large as its base, an index its vectors or postings."""
    if isinstance(stage, Train):
        return _folder_bytes(stage.base.model)
    if isinstance(stage, Index):
        if isinstance(stage.miner, Dense):
            return rows * VECTOR_BYTES * _dimensions(stage.miner.encoder.model)
        return rows * POSTINGS_BYTES
    return rows * DEFAULT_ROW_BYTES.get(stage.type, ROW_BYTES) if stage.outputs else 0.0


@lru_cache(maxsize=64)
def _folder_bytes(folder: str) -> int:
    """The size of the model files that a training writes; 0 for a model that is not on this machine yet."""
    path = Path(folder).expanduser()
    kinds = (".safetensors", ".json", ".txt", ".model")
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in kinds) if path.is_dir() else 0


@lru_cache(maxsize=64)
def _dimensions(folder: str) -> int:
    """Dimensions of a model's vectors, from its configuration; 768, the most common number, if it is unknown."""
    try:
        size = json.loads((Path(folder).expanduser() / "config.json").read_text()).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        size = None
    return size if isinstance(size, int) and 0 < size < 1 << 20 else 768


def _unfinished_share(stage: Stage, runs: str) -> float:
    """The share of a stage's shards that are not finished."""
    folder = stage.folder(runs)
    plan = folder.read_json("plan.json")
    return 1 - len(folder.listing("receipts")) / max(len(plan["shards"]), 1) if plan else 1.0


@lru_cache(maxsize=64)
def _count_lines(path: str, name: str) -> int | None:
    """The number of lines in a file of a BEIR folder; None if there is no such file."""
    fs, root = filesystem(path)
    for file in (f"{root}/{name}", f"{root}/{name}.gz"):
        try:
            with fs.open_input_stream(file, compression="detect") as stream:
                count, last = 0, b"\n"
                while block := stream.read(1 << 20):
                    count, last = count + block.count(b"\n"), block[-1:]
                return count + (last != b"\n")
        except OSError:
            continue
    return None


def estimate(stages: Sequence[Stage], runs: str, placement: Placement) -> dict[str, Json]:
    """Estimates for stages that are to be built, by fingerprint: ``rows`` to process, ``tokens`` (and each kind),
    wall-clock ``seconds``, ``bytes`` to store, ``price`` in dollars, and the ``basis`` of the estimate. Unknown values are
    None.
    """
    with fingerprint_cache():
        estimator = _Estimator(runs, placement)
        return {stage.fingerprint(): estimator.of(stage) for stage in stages}


def remaining_seconds(trials: Sequence[Sequence[Stage]], runs: str, placement: Placement) -> float | None:
    """Wall-clock seconds until all trials have ended. Each trial is the list of stages that it builds one after the other.

    ``placement.trials`` trials run at the same time, so the result is at least the time of the longest trial. It is
    estimated from finished folders of the same types and gets better as a study proceeds. None while most of it would be
    based on constants measured on another machine.
    """
    estimator = _Estimator(runs, placement)
    measured = assumed = longest = 0.0
    for stages in trials:
        trial_s = 0.0
        for stage in (stage for stage in stages if stage.folder(runs).manifest is None):
            seconds = estimator.of(stage)["seconds"]
            seconds = max(seconds - _elapsed_s(stage, runs), seconds * 0.05)
            trial_s += seconds
            if estimator.rates(stage).records:
                measured += seconds
            else:
                assumed += seconds
        longest = max(longest, trial_s)
    return max((measured + assumed) / placement.trials, longest) if measured >= assumed else None


def _elapsed_s(stage: Stage, runs: str) -> float:
    """Seconds since the last attempt at a stage of one shard began; 0 for several shards, whose receipts show the progress."""
    folder = stage.folder(runs)
    plan = folder.read_json("plan.json")
    names = sorted(folder.listing("attempts")) if plan and len(plan["shards"]) == 1 else []
    if not names:
        return 0.0
    first = (folder.read_bytes(f"attempts/{names[-1]}") or b"").splitlines()[:1]
    return max(time.time() - json.loads(first[0])["at"], 0.0) if first else 0.0
