"""Summarises a study as one JSON value: arms with scores (see ``boards``), curves, costs, filters, verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import ConfigError
from dagr_ray.core.cost import Rates
from dagr_ray.report.arms import TrialResult, group_seeds, use_same_set_names
from dagr_ray.report.boards import MEASURE, averages, boards_of
from dagr_ray.report.decision import ALPHA, WORTH
from dagr_ray.report.leaks import leaks
from dagr_ray.report.lexical import lexical
from dagr_ray.report.lineage import Folders, funnel
from dagr_ray.report.verdict import verdict


def study_of(folder: Artifact) -> Json:
    """``study.json`` of a folder. Raises ConfigError if the folder is not a study, or if the file is damaged."""
    study = folder.read_json("study.json")
    if study is None:
        problem = folder.problem("study.json")
        raise ConfigError(
            f"{folder.path}/{problem}; run the study again: finished stages are kept"
            if problem
            else f"no study.json in {folder.path!r}; give a folder that starts with study-"
        )
    return study


def summarise(runs: str, study_folder: str) -> Json:
    """Everything that the tables and the page show, as plain JSON values. Reads finished folders only.

    Raises ConfigError if ``study_folder`` is not a study.
    """
    study = study_of(Artifact(runs, study_folder))
    folders = Folders(runs)
    warnings: list[str] = []
    rows = [TrialResult(folders, trial, study.get("defaults", {})) for trial in study["trials"]]
    use_same_set_names(rows)
    for row in rows:
        row.name(rows)
    arms = group_seeds(rows, warnings)
    worth, alpha = study.get("worth", WORTH), study.get("alpha", ALPHA)
    boards = boards_of(arms, warnings, worth, alpha)
    trials = sorted((row.described(rows) for row in arms), key=_place)
    for trial in trials:
        trial["scores"] = {}
    by_name = {trial["trial"]: trial for trial in trials}
    for board in boards:
        board.score(by_name)
    sets = [board.described() for board in boards]
    curves = [curve for board in boards for curve in board.curves(by_name)]
    summary: Json = {
        "name": study["name"],
        "study": study_folder,
        "job": study.get("job", ""),
        "axes": study.get("axes", {}),
        "created": study.get("created"),
        "machine": study.get("machine", {}),
        "wall_s": study.get("wall_s", 0.0),
        "measure": MEASURE,
        "worth": worth,
        "alpha": alpha,
        "interval": f"{100 * (1 - alpha):g} % CI",
        "sets": sets,
        "averages": averages(boards, by_name),
        "trials": trials,
        "curves": curves,
        "generators": (funnels := generators(rows)),
        "leaks": leaks(folders, arms, funnels, MEASURE),
        "changes": [change for board in boards for change in board.changes(by_name)],
        "stages": _stages(folders, rows),
        "lexical": lexical(folders, (row.trial["folder"] for row in rows if row.kind == "bm25"), warnings),
        "warnings": warnings,
        "damaged": folders.damaged,
    }
    warnings += [f"left out because it is damaged: {problem}" for problem in folders.damaged.values()]
    summary |= _versions(folders, rows)
    summary["total"] = folders.sums(stage["folder"] for stage in summary["stages"])
    summary["rates"] = sorted({str(Rates.from_json(b["rates"])) for b in _bills(folders, summary["stages"])})
    summary["verdict"] = verdict(summary)
    return summary


def _place(trial: Json) -> tuple[Any, ...]:
    """The order in the tables: BM25, then each base, first frozen, then its arms by generator and size."""
    kind = ("bm25", "frozen", "augmented").index(trial["kind"])
    return kind > 0, trial["base"], kind, trial["label"], trial["used"], trial["trial"]


def generators(rows: list[TrialResult]) -> list[Json]:
    """The funnel of each set of generated examples that arms were drawn from, each once."""
    seen: dict[str, TrialResult] = {}
    for row in rows:
        if row.kind == "augmented" and row.arm.mined and row.arm.generation:
            seen.setdefault(row.arm.mined, row)
    uses = Counter(row.generator for row in seen.values())
    funnels = []
    for mined, row in seen.items():
        label = row.generator if uses[row.generator] == 1 else f"{row.label or row.generator} ({mined[-4:]})"
        funnels.append(funnel(row.arm, label) | {"name": row.generator, "mined": mined, "trial": row.id})
    return funnels


def _stages(folders: Folders, rows: list[TrialResult]) -> list[Json]:
    """Every finished folder of the study once, inputs first, with its cost and the number of trials that need it."""
    used = Counter[str]()
    for row in rows:
        used.update(folders.ancestors(row.trial["folder"]) or [n for n in row.trial["stages"] if folders.manifest(n)])
    stages = []
    for name, trials in used.items():
        manifest = folders.manifest_or_empty(name)
        counts, cost = manifest["counts"], manifest["cost"]
        stages.append(
            {
                "folder": name,
                "fingerprint": manifest.get("fingerprint", ""),
                "in": counts.get("in"),
                "out": counts.get("out"),
                "seconds": cost.get("wall_s", 0.0),
                "price": manifest.get("price") or 0.0,
                "wasted": bill["usd"]["waste"] if (bill := manifest.get("bill")) else 0.0,
                "busy": bill["seconds"]["busy"] / bill["seconds"]["held"] if bill and bill["seconds"]["held"] else None,
                "attempts": manifest.get("attempts", 1),
                "recall": counts.get("recall"),  # measured for an approximate search
                "exact": bool(counts.get("exact")),
                "trials": trials,
            }
        )
    return stages


def _bills(folders: Folders, stages: list[Json]) -> list[Json]:
    """The bills of the folders that cost something."""
    bills = [folders.manifest_or_empty(stage["folder"]).get("bill") for stage in stages]
    return [bill for bill in bills if bill and bill["usd"]["total"]]


def _versions(folders: Folders, rows: list[TrialResult]) -> Json:
    """The versions that built the folders; several if they differ."""
    packages: dict[str, set[str]] = {}
    code: set[str] = set()
    for name in {n for row in rows for n in folders.ancestors(row.trial["folder"])}:
        manifest: dict[str, Any] = folders.manifest_or_empty(name)
        code.add(str(manifest.get("code", "")))
        for package, version in manifest.get("packages", {}).items():
            packages.setdefault(package, set()).add(version)
    return {
        "code": " and ".join(sorted(code)),
        "packages": {name: " and ".join(sorted(versions)) for name, versions in sorted(packages.items())},
    }
