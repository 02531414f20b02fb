"""Checks the data of a job before anything starts: unreadable files, missing splits, splits without judgements."""

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
HEAD_PASSAGES = 1000  # enough before a run, which reads all passages itself


def check_data(stages: Iterable[Stage], runs: str, whole: bool) -> list[str]:
    """Checks the collections that ``stages`` read; returns a line on each. Raises ConfigError for a collection that is unusable.

    With ``whole``, everything that is not in ``runs`` yet is read; otherwise only the judgements and the first passages.
    """
    stages = list(stages)
    sources: dict[str, tuple[Stage, list[str]]] = {}
    for stage in stages:
        for source, split in _judged_splits(stage):
            splits = sources.setdefault(source.fingerprint(), (source, []))[1]
            splits += [split] if split not in splits else []
    lines: list[str] = []
    for stage in walk(*stages, *(source for source, _ in sources.values())):
        splits = sources.get(stage.fingerprint(), (stage, []))[1]
        folder = stage.folder(runs)
        if isinstance(stage, Beir):
            finished = folder.manifest is not None and not folder.damaged()
            lines += _check_folder(stage, folder, splits) if finished else _check_files(stage, splits, whole)
        elif folder.manifest is None:
            _check_readable(stage, whole)
    return lines


def _judged_splits(stage: Stage) -> Iterator[tuple[Stage, str]]:
    """The inputs of a stage whose judgements it reads, each with the split that it reads."""
    for name, split_name in stage.judged.items():
        value, split = getattr(stage, name), getattr(stage, split_name)
        for source in value if isinstance(value, tuple) else (value,):
            if isinstance(source, Stage) and split is not None:
                yield source, split


def _check_readable(stage: Stage, whole: bool) -> None:
    if isinstance(stage, ParquetCheck) and whole:
        parquet.check(stage.path)
    elif isinstance(stage, TrecRun):
        trec.read_run(stage.path)
    elif isinstance(stage, TrecQrels):
        trec.read_qrels(stage.path)
    elif isinstance(stage, People):
        all_ratings(stage.files)


def _check_folder(stage: Beir, folder: Artifact, splits: list[str]) -> list[str]:
    """Checks the splits of a collection that was read into a folder before."""
    unusable = {
        row["id"].removeprefix("qrels."): row["detail"]
        for row in folder.read("rejected").to_pylist()
        if row["reason"] == UNUSABLE
    }
    available = [name.removeprefix("qrels.") for name in folder.table_names() if name.startswith("qrels.")]
    names = {split: _split_name(stage, split, available, unusable) for split in splits}
    return _describe(stage, {split: folder.read(f"qrels.{name}") for split, name in names.items()})


def _check_files(stage: Beir, splits: list[str], whole: bool) -> list[str]:
    data = beir.read(stage.path) if whole else beir.glance(stage.path, HEAD_PASSAGES, splits)
    available = [name.removeprefix("qrels.") for name in data.tables if name.startswith("qrels.")]
    names = {split: _split_name(stage, split, available, data.unusable) for split in splits}
    if whole:
        beir.warn(stage.path, data.problems)
    return _describe(stage, {split: data.tables[f"qrels.{name}"] for split, name in names.items()})


def _split_name(stage: Beir, split: str, available: list[str], unusable: dict[str, str]) -> str:
    """The name that the collection gives to a split. Raises ConfigError if the split is missing or unusable."""
    name = tables.split_of([*available, *unusable], split)
    if name in unusable:
        raise ConfigError(unusable[name])
    if name is None:
        remedy = f"; choose one with split={available[0]}" if available else "; a job that evaluates needs judgements"
        allowed = ", ".join(available) or "none"
        raise ConfigError(f"split {split!r} is not in {stage.path!r}; allowed: {allowed}{remedy}")
    return name


def _describe(stage: Beir, judged: dict[str, pa.Table]) -> list[str]:
    lines = []
    for split, qrels in judged.items():
        queries, relevant = qrels["query_id"].unique(), tables.relevant(qrels)["query_id"].unique()
        if not len(queries):
            raise ConfigError(f"split {split!r} of {stage.path!r} has no judgements; choose another split")
        lines.append(f"{stage.label()} ({split}): {len(queries):,} judged queries, {len(qrels):,} judgements")
        without = len(queries) - len(relevant)
        if without:
            detail = (
                "none has a relevant passage, so"
                if without == len(queries)
                else f"{without:,} have no relevant passage:"
            )
            log.warning(
                "%s (%s): of %d judged queries, %s every retriever scores 0", stage.path, split, len(queries), detail
            )
    return lines
