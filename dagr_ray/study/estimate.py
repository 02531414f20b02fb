"""What a stage will take, before it is run: from finished folders of its kind (a canary is one), else from constants.

A folder is the better a guide the more it has in common with the stage: the same corpus, the same request to the same
engine, the same type. Time is what its workers needed for a row, and what came before the first; bytes are those of a
row, and those of a part whatever its rows.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
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
from dagr_ray.core.stage import Stage
from dagr_ray.core.storage import filesystem
from dagr_ray.miners.dense import Dense
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.retrieve import Index
from dagr_ray.stages.sources import Beir, PyDocs, Sample
from dagr_ray.stages.take import Take
from dagr_ray.stages.train import Train

PYDOCS_ROWS = {"stdlib": 3400, "numeric": 2100}
PROMPT_TOKENS = 600  # six exemplars of up to 60 words, a passage of about 120 words, both at 1.4 tokens a word
# Seconds per row, and before the first, on two CPU cores with the quick start's models: used until a runs folder has
# its own. Rows of a completion are few tokens; of an index, passages to encode.
DEFAULT_ROW_S = {"generate": 0.07, "train": 0.08, "index": 0.007, "search": 0.0003}
DEFAULT_START_S = {"generate": 15.0, "train": 15.0, "search": 0.5}
DEFAULT_FIXED_S = 0.3
# Bytes a row of tables takes that are compressed: a query and its ids; longer ones by type. Of a Lucene index of passages
# of a hundred words (145 to 220 on Cranfield, SQuADShifts and SciFact); of a number in a vector.
ROW_BYTES, POSTINGS_BYTES, VECTOR_BYTES = 60.0, 180.0, 4.0
DEFAULT_ROW_BYTES = {
    "beir": 400.0,
    "pydocs": 400.0,
    "sample": 400.0,
    "search": 1200.0,
    "fuse": 1200.0,
    "evaluate": 3000.0,
}
# How much a finished folder has in common with a stage: what the estimate says it is based on, best first.
BASES = ("this corpus", "another corpus", "its type")


@dataclass(frozen=True)
class Record:
    """What a finished folder tells about others of its kind. Times are those of one worker."""

    manifest: Json
    rows: int
    fixed_s: float  # before and after the work, whatever its size
    start_s: float  # to open the stage, for each worker
    row_s: float
    tokens: dict[str, float]  # for a row, by kind
    row_bytes: float
    fixed_bytes: float  # whatever its rows: the model of a training
    kept: float  # rows that come out for each that goes in

    @classmethod
    def of(cls, manifest: Json, pool: str) -> Record | None:
        """None where the folder had no rows, or was made before bills were written."""
        bill, rows = manifest.get("bill"), manifest["counts"].get("in", 0)
        if not bill or not rows:
            return None
        seconds, tries = bill["seconds"], max(bill["attempts"], 1)
        shards = max((len(entry["parts"]) for entry in manifest["tables"].values()), default=1)
        workers = max(manifest["placement"][pool]["workers"], 1)
        at_work = max(min(workers, shards), 1)
        start_s, busy_s = seconds["start"] / at_work / tries, seconds["busy"] / at_work
        wasted_s = bill["waste"]["seconds"] / at_work
        stored = sum(
            entry["bytes"] - len(entry["parts"]) * _part_bytes(name) for name, entry in manifest["tables"].items()
        )
        files = sum(entry["bytes"] for entry in manifest["files"].values())
        is_model = manifest["stage"]["type"] == "train"
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
    """What a part takes whatever its rows: its size with one short row, as pages without any rows have no headers."""
    fields = {field.name: _short(field.type) for field in tables.schema(table)}
    sink = io.BytesIO()
    pq.write_table(tables.table(table, [fields]), sink, compression="zstd")
    return sink.tell()


def _short(kind: pa.DataType) -> object:
    if pa.types.is_large_string(kind):
        return "0"
    return [] if pa.types.is_list(kind) else pa.scalar(0).cast(kind).as_py()


def _records(runs: str) -> list[Json]:
    """The manifests of a runs folder."""
    manifests = (Artifact(runs, name).manifest for name, _ in folders_of(runs))
    return [manifest for manifest in manifests if manifest and manifest.get("stage", {}).get("type")]


def _origin(value: Json) -> object:
    """The corpus that a stage's passages come from, samples taken off, in any of its inputs (as JSON)."""
    if value.get("type") == "sample":
        return _origin(value["corpus"])
    if "corpus" in value:
        return _origin(value["corpus"])
    for name in ("generations", "parsed", "selected", "queries", "mined", "examples", "data", "index"):
        if isinstance(value.get(name), dict):
            return _origin(value[name])
    return value


# What decides the work on a row; the rest of a stage's fields are its inputs.
_ASKED = ("engine", "strategy", "sampling", "samples", "filter", "miner", "base")


def _likeness(stage: Json, other: Json) -> int | None:
    """The place in BASES that ``other`` has for ``stage``; None where they have not even their type in common."""
    if stage["type"] != other["type"]:
        return None
    same = all(stage.get(name) == other.get(name) for name in _ASKED)
    kinds = [
        [(value.get(name) or {}).get("type") for name in ("engine", "filter", "miner")] for value in (stage, other)
    ]
    if kinds[0] != kinds[1]:
        return None
    filters = [[score["filter"]["type"] for score in value.get("scores", ())] for value in (stage, other)]
    if same and filters[0] == filters[1]:
        return 0 if _origin(stage) == _origin(other) else 1
    return 2


class _Guess:
    """Rates of a stage from the records that are most like it: by row over all of them, the rest by their median."""

    def __init__(self, stage: Stage, manifests: Sequence[Json]) -> None:
        same = [manifest for manifest in manifests if manifest["stage"]["type"] == stage.type]
        mine = stage.to_json() if same else {}
        likeness = [(place, m) for m in same if (place := _likeness(mine, m["stage"])) is not None]
        self.records: list[Record] = []
        self.basis = "constants"
        for place, basis in enumerate(BASES):
            found = [Record.of(m, stage.pool) for at, m in likeness if at == place]
            self.records = [record for record in found if record is not None]
            if self.records:
                self.basis = basis
                break
        self.rows = sum(record.rows for record in self.records)

    def mean(self, value: str) -> float:
        return sum(getattr(record, value) * record.rows for record in self.records) / self.rows

    def middle(self, value: str) -> float:
        return median(getattr(record, value) for record in self.records)

    def tokens(self, kind: str) -> float:
        return sum(record.tokens[kind] * record.rows for record in self.records) / self.rows


class _Estimator:
    """Estimates for the stages of one job, each once."""

    def __init__(self, runs: str, placement: Placement) -> None:
        self.runs, self.placement, self.manifests = runs, placement, _records(runs)
        self._guesses: dict[str, _Guess] = {}
        self._made: dict[str, int | None] = {}

    def guess(self, stage: Stage) -> _Guess:
        key = stage.fingerprint()
        if key not in self._guesses:
            self._guesses[key] = _Guess(stage, self.manifests)
        return self._guesses[key]

    def made(self, stage: Stage) -> int | None:
        """Rows that a stage gives to those that read it; None where nothing tells."""
        key = stage.fingerprint()
        if key not in self._made:
            self._made[key] = self._rows_made(stage)
        return self._made[key]

    def _rows_made(self, stage: Stage) -> int | None:
        manifest = stage.folder(self.runs).manifest
        if manifest is not None and stage.outputs and stage.type not in ("search", "fuse", "evaluate"):
            return manifest["tables"][stage.outputs[0]]["rows"]
        if isinstance(stage, PyDocs):
            return PYDOCS_ROWS[stage.part]
        if isinstance(stage, Beir):
            return _lines(stage.path, "corpus.jsonl")
        rows = self.read(stage)
        if isinstance(stage, Sample):
            if stage.n is not None:
                return min(stage.n, rows) if rows is not None else stage.n
            return rows and round(rows * (stage.share or 1.0))
        if rows is None:
            return stage.n if isinstance(stage, Take) else None
        if isinstance(stage, Generate):
            return rows * stage.samples * len(stage.strategy.asked())
        guess = self.guess(stage)
        if stage.type in ("parse", "select", "mine") and guess.records and guess.basis != BASES[2]:
            rows = round(rows * guess.mean("kept"))
        return min(rows, stage.n) if isinstance(stage, Take) and stage.n else rows

    def read(self, stage: Stage) -> int | None:
        """Rows that a stage works on: those of its first input that has any."""
        names = (
            "generations",
            "parsed",
            "selected",
            "mined",
            "examples",
            "queries",
            "search",
            "corpus",
            "data",
            "index",
        )
        inputs = stage.inputs()
        name = next((name for name in names if name in inputs), next(iter(inputs), None))
        if name is None:
            return None
        found = inputs[name]
        if name == "queries" and found.outputs[0] == "corpus":  # human queries, which lie beside a corpus
            manifest = found.folder(self.runs).manifest
            if manifest is not None:
                return manifest["tables"]["queries"]["rows"]
            return _lines(found.path, "queries.jsonl") if isinstance(found, Beir) else None
        return self.made(found)

    def of(self, stage: Stage) -> Json:
        rows = self.made(stage) if not stage.inputs() else self.read(stage)
        guess, pool = self.guess(stage), getattr(self.placement, stage.pool)
        left, to_do = _left(stage, self.runs), rows or 0
        shards = max(ceil(to_do / pool.shard_rows), 1)
        workers = max(min(pool.workers, shards), 1)
        per_row = [0.0] * len(KINDS)
        if guess.records:
            busy_s = to_do * left * guess.mean("row_s")
            seconds = guess.middle("fixed_s") + guess.middle("start_s") + busy_s / workers
            per_row = [guess.tokens(kind) for kind in KINDS]
            stored = to_do * guess.mean("row_bytes") + guess.middle("fixed_bytes")
        else:
            busy_s, start_s = _default_seconds(stage, to_do * left)
            seconds, stored = start_s + busy_s / workers, _default_bytes(stage, to_do)
            if isinstance(stage, Generate) and stage.engine.has_model:
                prompts = stage.per_passage() // stage.per_request()
                per_row = [PROMPT_TOKENS * prompts, 0, stage.per_passage() * stage.sampling.max_tokens]
        tokens = {kind: round(to_do * left * each) for kind, each in zip(KINDS, per_row, strict=True)}
        return {
            "rows": rows,
            "tokens": tokens["prompt"] + tokens["completion"] or None,
            **{f"{kind}_tokens": number for kind, number in tokens.items()},
            "seconds": seconds,
            "busy_seconds": busy_s,
            "bytes": round(left * (stored + shards * sum(map(_part_bytes, stage.outputs)))),
            "price": self._price(stage, busy_s, tokens, pool),
            "rates": str(Rates.of(self.placement.prices, stage.engine_asked())),
            "basis": guess.basis,
        }

    def _price(self, stage: Stage, busy_s: float, tokens: dict[str, int], pool: Pool) -> float:
        rates = Rates.of(self.placement.prices, stage.engine_asked())
        if rates.tokens is not None:
            return rates.tokens.usd(**tokens)
        an_hour = pool.gpus * rates.gpu_hour + stage.cores_held(pool) * rates.cpu_hour
        return busy_s / 3600 * an_hour


def _default_seconds(stage: Stage, rows: float) -> tuple[float, float]:
    """(busy, start) seconds of a worker."""
    free = isinstance(stage, Generate) and not stage.engine.has_model
    per_row = 0.0005 if free else DEFAULT_ROW_S.get(stage.type, 0.0)
    start = DEFAULT_FIXED_S if free else DEFAULT_START_S.get(stage.type, DEFAULT_FIXED_S)
    return rows * per_row, start


def _default_bytes(stage: Stage, rows: int) -> float:
    """What a stage stores besides its parts: a training a model as large as its base, an index its vectors or postings."""
    if isinstance(stage, Train):
        return _folder_bytes(stage.base.model)
    if isinstance(stage, Index):
        if isinstance(stage.miner, Dense):
            return rows * VECTOR_BYTES * _dimensions(stage.miner.encoder.model)
        return rows * POSTINGS_BYTES
    return rows * DEFAULT_ROW_BYTES.get(stage.type, ROW_BYTES) if stage.outputs else 0.0


@lru_cache(maxsize=64)
def _folder_bytes(folder: str) -> int:
    """The size of a model's files that a training writes again; 0 for a model that is not on this machine yet."""
    path = Path(folder).expanduser()
    kinds = (".safetensors", ".json", ".txt", ".model")
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in kinds) if path.is_dir() else 0


@lru_cache(maxsize=64)
def _dimensions(folder: str) -> int:
    """Numbers of a model's vector, from its configuration; 768, as most have, if that does not tell."""
    try:
        found = json.loads((Path(folder).expanduser() / "config.json").read_text()).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        found = None
    return found if isinstance(found, int) and 0 < found < 1 << 20 else 768


def _left(stage: Stage, runs: str) -> float:
    """The share of a stage's shards that is not done."""
    folder = stage.folder(runs)
    plan = folder.read_json("plan.json")
    return 1 - len(folder.listing("receipts")) / max(len(plan["shards"]), 1) if plan else 1.0


@lru_cache(maxsize=64)
def _lines(path: str, name: str) -> int | None:
    """Lines of a file of a BEIR folder that has not been read yet."""
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
    """By fingerprint, for stages that are to be done: ``rows`` to work on, ``tokens`` (and each kind), ``seconds`` on the
    clock, ``bytes`` to store, ``price`` in dollars, and ``basis``, what the guess rests on. None for what is not known.
    """
    with fingerprint_cache():
        estimator = _Estimator(runs, placement)
        return {stage.fingerprint(): estimator.of(stage) for stage in stages}


def remaining_seconds(trials: Sequence[Sequence[Stage]], runs: str, placement: Placement) -> float | None:
    """Seconds on the clock until all trials have ended, each given as the stages that it builds one after the other.

    ``placement.trials`` of them run side by side, so it takes at least as long as the longest one. What finished folders
    of the same kind took decides, and the guess gets better as a study goes on. None as long as most of it would rest on
    constants of another machine.
    """
    estimator = _Estimator(runs, placement)
    known = guessed = longest = 0.0
    for stages in trials:
        whole = 0.0
        for stage in (each for each in stages if each.folder(runs).manifest is None):
            seconds = estimator.of(stage)["seconds"]
            seconds = max(seconds - _under_way_s(stage, runs), seconds * 0.05)
            whole += seconds
            if estimator.guess(stage).records:
                known += seconds
            else:
                guessed += seconds
        longest = max(longest, whole)
    return max((known + guessed) / placement.trials, longest) if known >= guessed else None


def _under_way_s(stage: Stage, runs: str) -> float:
    """How long the last attempt at a stage of one shard has lasted; of several, their receipts tell what is done."""
    folder = stage.folder(runs)
    plan = folder.read_json("plan.json")
    names = sorted(folder.listing("attempts")) if plan and len(plan["shards"]) == 1 else []
    if not names:
        return 0.0
    first = (folder.read_bytes(f"attempts/{names[-1]}") or b"").splitlines()[:1]
    return max(time.time() - json.loads(first[0])["at"], 0.0) if first else 0.0
