"""What each test set of a study can see, before anything is spent: judged queries, arms, and how much a gain varies."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from dagr_ray.core import tables
from dagr_ray.core.stage import Stage
from dagr_ray.formats import beir
from dagr_ray.quickstart import pydocs
from dagr_ray.report.boards import MEASURE
from dagr_ray.report.decision.power import SPREAD, Power
from dagr_ray.stages.evaluate import Evaluate
from dagr_ray.stages.sources import Beir, PyDocs
from dagr_ray.study.plan import Study, Trial

Scores = dict[tuple[str, str], dict[str, float]]  # (data set, split) -> query -> value


def powers(study: Study, runs: str) -> list[Power]:
    """One for each test set of a study whose queries can be counted yet, in the order of its scorecards.

    The spread is the largest among the arms that have ended, each against its frozen base; of a study without any, the
    one that ``decision.power`` assumes. Queries that are left out later (exemplars, leaks) are counted until an arm has ended.
    """
    arms = [trial for trial in study.trials if trial.kind == "augmented"]
    if not arms:
        return []
    # arms that differ by their seed alone are one arm
    count = len(
        {json.dumps({k: v for k, v in t.params.items() if k != "seed"}, sort_keys=True, default=str) for t in arms}
    )
    gains = list(_gains(study, arms, runs))
    found = []
    for evaluation in arms[0].card.evaluations:
        of_set = [g[evaluation.name, evaluation.split] for g in gains if (evaluation.name, evaluation.split) in g]
        spreads = [float(values.std(ddof=1)) for values in of_set if len(values) > 1]
        measured = [spread for spread in spreads if spread > 0]
        queries = len(of_set[0]) if of_set else _judged(evaluation, runs)
        if queries:
            spread = max(measured, default=SPREAD)
            found.append(
                Power(
                    evaluation.name, queries, count, spread, len(measured), study.worth, study.alpha, evaluation.split
                )
            )
    return found


def _gains(study: Study, arms: Iterable[Trial], runs: str) -> Iterable[dict[tuple[str, str], np.ndarray]]:
    """Of each arm that has ended, by data set: what each query gained over the frozen base."""
    frozen = {trial.params.get("base"): trial for trial in study.trials if trial.kind == "frozen"}
    before = {base: _scores(trial, runs) for base, trial in frozen.items()}
    for arm in arms:
        base = before.get(arm.params.get("base"), {})
        after = _scores(arm, runs) if base else {}
        yield {
            key: np.array([values[q] - base[key][q] for q in values if q in base[key]])
            for key, values in after.items()
            if key in base
        }


def _scores(trial: Trial, runs: str) -> Scores:
    folder = trial.card.folder(runs)
    found: Scores = {}
    if folder.manifest is None or folder.damaged():
        return found
    for row in folder.read("metrics").to_pylist():
        if row["measure"] == MEASURE and row["query_id"] is not None:
            found.setdefault((row["data"], row["split"]), {})[row["query_id"]] = row["value"]
    return found


def _judged(evaluation: Evaluate, runs: str) -> int:
    """Judged queries of a test set; 0 if that is not known before the data is read."""
    data, split = evaluation.data, evaluation.split
    folder = data.folder(runs)
    if folder.manifest is not None and not folder.damaged():
        there = [name.removeprefix("qrels.") for name in folder.table_names() if name.startswith("qrels.")]
        named = tables.split_of(there, split)
        return len(folder.read(f"qrels.{named}")["query_id"].unique()) if named else 0
    return _unread(data, split)


def _unread(data: Stage, split: str) -> int:
    if isinstance(data, Beir):
        glanced = beir.glance(data.path, 1, [split]).tables
        named = tables.split_of([name.removeprefix("qrels.") for name in glanced], split)
        return len(glanced[f"qrels.{named}"]["query_id"].unique()) if named else 0
    if isinstance(data, PyDocs):
        passages = pydocs.stdlib_passages() if data.part == "stdlib" else pydocs.package_passages()
        rows = pydocs.read_judgements(data.part, {passage.doc_id for passage in passages}).qrels.get(split, [])
        return len({row["query_id"] for row in rows})
    return 0
