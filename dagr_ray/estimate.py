"""What a stage will take, before it is run: from finished folders of its kind where there are any, else from constants."""

from __future__ import annotations

from statistics import median

import pyarrow.fs as pafs

from dagr_ray.artifact import Artifact, Json, filesystem
from dagr_ray.cluster import Placement
from dagr_ray.engines import Engine
from dagr_ray.engines.crop import CropEngine
from dagr_ray.stage import Stage
from dagr_ray.stages.corpus import Beir, PyDocs, Sample
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.select import Take

PYDOCS_ROWS = {"stdlib": 3400, "numeric": 2100}
PROMPT_TOKENS = 600  # six exemplars of up to 60 words, a passage of about 120 words, both at 1.4 tokens a word
# Seconds per row, and before the first, on two CPU cores with the quick start's models: used until a runs folder has
# its own. Rows of a completion are few tokens; of an index, passages to encode.
DEFAULT_ROW_S = {"generate": 0.07, "train": 0.08, "index": 0.007, "search": 0.0003}
DEFAULT_START_S = {"generate": 15.0, "train": 15.0, "search": 0.5}
DEFAULT_FIXED_S = 0.3


def rows_of(stage: Stage) -> int | None:
    """The most rows that a stage can have, known from its config alone; None where only running it can tell."""
    if isinstance(stage, PyDocs):
        return PYDOCS_ROWS[stage.part]
    if isinstance(stage, Sample):
        inner = rows_of(stage.corpus)
        if stage.n is not None:
            return min(stage.n, inner) if inner else stage.n
        return int(inner * (stage.share or 1.0)) if inner else None
    if isinstance(stage, Beir):
        return None
    if isinstance(stage, Generate):
        inner = rows_of(stage.corpus)
        return inner * stage.samples if inner else None
    if isinstance(stage, Take) and stage.n is not None:
        return stage.n
    known = [rows for rows in (rows_of(inner) for inner in stage.inputs().values()) if rows]
    return known[0] if known else None


def _recorded(stages: list[Stage], runs: str) -> dict[str, float]:
    """Median wall seconds per input row by ``type`` (for generators, by engine type too) of the finished folders."""
    fs, root = filesystem(runs)
    wanted = {_kind(stage) for stage in stages}
    found: dict[str, list[float]] = {}
    for info in fs.get_file_info(pafs.FileSelector(root, allow_not_found=True)):
        if info.type != pafs.FileType.Directory or not any(info.base_name.startswith(k.split("/")[0]) for k in wanted):
            continue
        manifest = Artifact(runs, info.base_name).manifest
        rows = (manifest or {}).get("counts", {}).get("in", 0)
        if manifest and rows:
            kind = manifest["stage"]["type"]
            if kind == "generate":
                kind += "/" + manifest["stage"]["engine"]["type"]
            found.setdefault(kind, []).append(manifest["cost"]["wall_s"] / rows)
    return {kind: median(values) for kind, values in found.items()}


def _kind(stage: Stage) -> str:
    engine = getattr(stage, "engine", None)
    return f"{stage.type}/{engine.type}" if isinstance(engine, Engine) else stage.type


def estimate(stages: list[Stage], runs: str, placement: Placement) -> dict[str, Json]:
    """By fingerprint: ``tokens`` (an upper bound), ``seconds`` and ``price`` of each stage that is to be done."""
    rates = _recorded(stages, runs)
    made: dict[str, Json] = {}
    for stage in stages:
        kind, rows = _kind(stage), rows_of(stage)
        free = isinstance(stage, Generate) and isinstance(stage.engine, CropEngine)
        per_row, start = rates.get(kind), 0.0
        if per_row is None:
            per_row = 0.0005 if free else DEFAULT_ROW_S.get(stage.type)
            start = DEFAULT_FIXED_S if free else DEFAULT_START_S.get(stage.type, DEFAULT_FIXED_S)
        pool = getattr(placement, stage.pool)
        seconds = start + (rows or 0) * (per_row or 0.0) / max(pool.workers, 1)
        guess: Json = {"seconds": seconds, "tokens": None}
        if isinstance(stage, Generate) and rows and not free:
            guess["tokens"] = rows // stage.samples * PROMPT_TOKENS + rows * stage.sampling.max_tokens
        hourly = pool.gpus * placement.prices.gpu_hour + max(pool.cpus, 1) * placement.prices.cpu_hour
        guess["price"] = seconds / 3600 * max(pool.workers, 1) * hourly
        made[stage.fingerprint()] = guess
    return made
