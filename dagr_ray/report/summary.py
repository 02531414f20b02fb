"""A study as one JSON value: its arms with what they scored (see ``boards``), curves, costs, filters, the verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import ConfigError
from dagr_ray.core.cost import Rates
from dagr_ray.report.arms import Row, _by_seed, _same_names
from dagr_ray.report.boards import MEASURE, averages, boards_of
from dagr_ray.report.leaks import leaks
from dagr_ray.report.lexical import lexical
from dagr_ray.report.lineage import Folders, funnel
from dagr_ray.report.verdict import verdict


def study_of(folder: Artifact) -> Json:
    """``study.json`` of a folder. Raises ConfigError where it is no study's, or damaged."""
    found = folder.read_json("study.json")
    if found is None:
        wrong = folder.problem("study.json")
        raise ConfigError(
            f"{folder.path}/{wrong}; run the study again: what is finished stays"
            if wrong
            else f"no study.json in {folder.path!r}; give a folder that starts with study-"
        )
    return found


def summarise(runs: str, study_folder: str) -> Json:
    """Everything that the tables and the page show, as plain JSON values. Reads finished folders only.

    Raises ConfigError where ``study_folder`` is no study.
    """
    study = study_of(Artifact(runs, study_folder))
    folders = Folders(runs)
    warnings: list[str] = []
    rows = [Row(folders, trial, study.get("defaults", {})) for trial in study["trials"]]
    _same_names(rows)
    for row in rows:
        row.name(rows)
    arms = _by_seed(rows, warnings)
    boards = boards_of(arms, warnings)
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
        "sets": sets,
        "averages": averages(boards, by_name),
        "trials": trials,
        "curves": curves,
        "generators": (made := generators(rows)),
        "leaks": leaks(folders, arms, made, MEASURE),
        "changes": [change for board in boards for change in board.changes(by_name)],
        "stages": _stages(folders, rows),
        "lexical": lexical(folders, (row.trial["folder"] for row in rows if row.kind == "bm25"), warnings),
        "warnings": warnings,
        "damaged": folders.damaged,
    }
    warnings += [f"left out, as it is damaged: {what}" for what in folders.damaged.values()]
    summary |= _versions(folders, rows)
    summary["total"] = folders.sums(stage["folder"] for stage in summary["stages"])
    summary["rates"] = sorted({str(Rates.from_json(b["rates"])) for b in _bills(folders, summary["stages"])})
    summary["verdict"] = verdict(summary)
    return summary


def _place(trial: Json) -> tuple[Any, ...]:
    """The order of the tables: BM25, then each base, frozen first, and its arms by generator and size."""
    kind = ("bm25", "frozen", "augmented").index(trial["kind"])
    return kind > 0, trial["base"], kind, trial["label"], trial["used"], trial["trial"]


def generators(rows: list[Row]) -> list[Json]:
    """The funnel of each set of examples that arms were drawn from, once; none for people's pairs."""
    seen: dict[str, Row] = {}
    for row in rows:
        if row.kind == "augmented" and row.arm.mined and row.arm.generated:
            seen.setdefault(row.arm.mined, row)
    twice = Counter(row.generator for row in seen.values())
    found = []
    for mined, row in seen.items():
        label = row.generator if twice[row.generator] == 1 else f"{row.label or row.generator} ({mined[-4:]})"
        found.append(funnel(row.arm, label) | {"mined": mined, "trial": row.id})
    return found


def _stages(folders: Folders, rows: list[Row]) -> list[Json]:
    """Every complete folder of the study once, inputs first, with what it cost and how many trials need it."""
    used = Counter[str]()
    for row in rows:
        used.update(folders.ancestors(row.trial["folder"]) or [n for n in row.trial["stages"] if folders.manifest(n)])
    found = []
    for name, trials in used.items():
        manifest = folders.found(name)
        counts, cost = manifest["counts"], manifest["cost"]
        found.append(
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
                "recall": counts.get("recall"),  # of an approximate search, by its probe
                "exact": bool(counts.get("exact")),
                "trials": trials,
            }
        )
    return found


def _bills(folders: Folders, stages: list[Json]) -> list[Json]:
    """The bills of the folders that something was paid for."""
    found = [folders.found(stage["folder"]).get("bill") for stage in stages]
    return [bill for bill in found if bill and bill["usd"]["total"]]


def _versions(folders: Folders, rows: list[Row]) -> Json:
    """Versions under which the folders were made; several where they differ."""
    packages: dict[str, set[str]] = {}
    code: set[str] = set()
    for name in {n for row in rows for n in folders.ancestors(row.trial["folder"])}:
        manifest: dict[str, Any] = folders.found(name)
        code.add(str(manifest.get("code", "")))
        for package, version in manifest.get("packages", {}).items():
            packages.setdefault(package, set()).add(version)
    return {
        "code": " and ".join(sorted(code)),
        "packages": {name: " and ".join(sorted(versions)) for name, versions in sorted(packages.items())},
    }
