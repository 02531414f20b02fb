"""What is wrong with the data of a job, found before anything starts: files that cannot be read, splits that are not there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import pyarrow as pa

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Stage, walk
from dagr_ray.formats import beir, parquet, trec
from dagr_ray.stages.human_labels import People, all_ratings
from dagr_ray.stages.sources import UNUSABLE, Beir, ParquetCheck
from dagr_ray.stages.trec import TrecQrels, TrecRun

log = logging.getLogger("dagr")
HEAD = 1000  # passages that are read where the run itself is about to read them all


def look(stages: Iterable[Stage], runs: str, whole: bool) -> list[str]:
    """A line on each collection that ``stages`` read, and on what is to be known of it. Raises ConfigError for what is wrong.

    ``whole`` reads all of what is not in ``runs`` yet; else a collection's judgements and the beginning of its passages.
    """
    stages = list(stages)
    wanted: dict[str, tuple[Stage, list[str]]] = {}
    for stage in stages:
        for source, split in _judged(stage):
            splits = wanted.setdefault(source.fingerprint(), (source, []))[1]
            splits += [split] if split not in splits else []
    said: list[str] = []
    for stage in walk(*stages, *(source for source, _ in wanted.values())):
        splits = wanted.get(stage.fingerprint(), (stage, []))[1]
        folder = stage.folder(runs)
        if isinstance(stage, Beir):
            there = folder.manifest is not None and not folder.damaged()
            said += _built(stage, folder, splits) if there else _read(stage, splits, whole)
        elif folder.manifest is None:
            _try(stage, whole)
    return said


def _judged(stage: Stage) -> Iterator[tuple[Stage, str]]:
    """The inputs of a stage whose judgements it reads, and of which split."""
    for name, by in stage.judged.items():
        value, split = getattr(stage, name), getattr(stage, by)
        for source in value if isinstance(value, tuple) else (value,):
            if isinstance(source, Stage) and split is not None:
                yield source, split


def _try(stage: Stage, whole: bool) -> None:
    if isinstance(stage, ParquetCheck) and whole:
        parquet.check(stage.path)
    elif isinstance(stage, TrecRun):
        trec.read_run(stage.path)
    elif isinstance(stage, TrecQrels):
        trec.read_qrels(stage.path)
    elif isinstance(stage, People):
        all_ratings(stage.files)


def _built(stage: Beir, folder: Artifact, splits: list[str]) -> list[str]:
    """What a folder that is built already says of the splits."""
    unusable = {
        row["id"].removeprefix("qrels."): row["detail"]
        for row in folder.read("rejected").to_pylist()
        if row["reason"] == UNUSABLE
    }
    there = [name.removeprefix("qrels.") for name in folder.table_names() if name.startswith("qrels.")]
    found = {split: _split(stage, split, there, unusable) for split in splits}
    return _told(stage, {split: folder.read(f"qrels.{name}") for split, name in found.items()})


def _read(stage: Beir, splits: list[str], whole: bool) -> list[str]:
    data = beir.read(stage.path) if whole else beir.glance(stage.path, HEAD, splits)
    there = [name.removeprefix("qrels.") for name in data.tables if name.startswith("qrels.")]
    found = {split: _split(stage, split, there, data.unusable) for split in splits}
    if whole:
        beir.warn(stage.path, data.problems)
    return _told(stage, {split: data.tables[f"qrels.{name}"] for split, name in found.items()})


def _split(stage: Beir, split: str, there: list[str], unusable: dict[str, str]) -> str:
    """The name that a split goes by. Raises ConfigError where it is not there, or cannot be used."""
    named = tables.split_of([*there, *unusable], split)
    if named in unusable:
        raise ConfigError(unusable[named])
    if named is None:
        some = f"; name one with split={there[0]}" if there else "; a job that judges needs judgements"
        raise ConfigError(f"split {split!r} is not in {stage.path!r}; allowed: {', '.join(there) or 'none'}{some}")
    return named


def _told(stage: Beir, judged: dict[str, pa.Table]) -> list[str]:
    said = []
    for split, qrels in judged.items():
        queries, relevant = qrels["query_id"].unique(), tables.relevant(qrels)["query_id"].unique()
        if not len(queries):
            raise ConfigError(f"split {split!r} of {stage.path!r} has no judgement; give another split")
        said.append(f"{stage.label()} ({split}): {len(queries):,} judged queries, {len(qrels):,} judgements")
        without = len(queries) - len(relevant)
        if without:
            how = (
                "none has a relevant passage, so"
                if without == len(queries)
                else f"{without:,} have no relevant passage:"
            )
            log.warning(
                "%s (%s): of %d judged queries, %s every retriever scores 0", stage.path, split, len(queries), how
            )
    return said
