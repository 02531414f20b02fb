"""Imports human ratings, and compares them with the teachers' scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dagr_ray.annotation.agreement import GRADES, Agreement, agreement, best_cuts, graded, held_out
from dagr_ray.annotation.sampling import Cuts, PairId, pairs_of
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement
from dagr_ray.stages.human_labels import AGREEMENT, People, all_ratings

JUDGE = "llm-judge"
# The cut points that round the judge's scores, which are on the scale of the grades.
ROUNDED = (0.5, 1.5, 2.5)


def thresholds_named(words: Sequence[str], scorers: Iterable[str], earlier: Artifact | None = None) -> dict[str, Cuts]:
    """Cut points by teacher: from SCORER=A[,B,C], else from an earlier import, else 0.5, 1.5, 2.5 for a judge.

    A judge is the pointwise teacher ``llm-judge``, whose scores are expected grades. Raises ConfigError for an unknown
    name or invalid numbers.
    """
    names = list(scorers)
    cuts_of: dict[str, Cuts] = {name: ROUNDED for name in names if name.partition(" (")[0] == JUDGE}
    for name, entry in ((earlier.read_json(AGREEMENT) or {}) if earlier else {}).get("teachers", {}).items():
        if name in names:
            cuts_of[name] = tuple(entry["recalibrated"]["cuts"])
    for word in words:
        name, equals, values = word.rpartition("=")
        try:
            cuts = tuple(float(value) for value in values.split(","))
        except ValueError:
            cuts = ()
        finite = all(map(math.isfinite, cuts))
        if not equals or name not in names or len(cuts) not in (1, 3) or list(cuts) != sorted(cuts) or not finite:
            raise ConfigError(
                f"--threshold {word!r}: give SCORER=VALUE with one number or three ascending ones (0.5, or 0.5,1.5,2.5); "
                f"scorers: {', '.join(names) or 'none, the folders have no scores'}"
            )
        cuts_of[name] = cuts
    return cuts_of


# -- import ---------------------------------------------------------------------------------------------------------------


def import_ratings(
    folders: Sequence[Artifact], files: Sequence[str], runs: str, threshold: Sequence[str] = ()
) -> tuple[Artifact, dict[str, Any]]:
    """Checks ratings, writes them as a folder of ``People`` in ``runs`` with ``agreement.json``; returns folder and report.

    For each teacher of ``folders`` the report has the agreement with its given cut points (if any), the cut points that
    agree best with people, and their agreement on held-out labels. Raises ConfigError, and writes nothing, if a file is
    bad or rates a pair that is in none of the folders.
    """
    pairs = pairs_of(folders)
    cuts = thresholds_named(threshold, pairs.scores)
    row_of = {pair: i for i, pair in enumerate(pairs.ids)}
    ratings = all_ratings(tuple(files))
    unknown = [rating for rating in ratings if (rating.query_id, rating.doc_id) not in row_of]
    if unknown:
        first, more = unknown[0], f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{first.where}: ({first.query_id}, {first.doc_id}) is not a pair of {', '.join(f.name for f in folders)}{more}; "
            "give the exported folders, with unchanged ids; nothing was imported"
        )
    folder = materialize(People(files=tuple(files)), runs, Placement())
    rows = folder.read("qrels").to_pylist()
    labels = {(row["query_id"], row["doc_id"]): row["relevance"] for row in rows}
    report: dict[str, Any] = {
        "labels": len(labels),
        "grades": [sum(label == grade for label in labels.values()) for grade in range(GRADES)],
        "claimed": [sum(labels[p] == grade for p in labels if p in pairs.claimed) for grade in range(GRADES)],
        "people": _inter_rater(folder.read("ratings").to_pylist()),
        "teachers": {},
    }
    for scorer, scores in pairs.scores.items():
        judged = [pair for pair in labels if not math.isnan(scores[row_of[pair]])]
        if judged:
            values = [float(scores[row_of[pair]]) for pair in judged]
            grades = [labels[pair] for pair in judged]
            ids = ["\n".join(pair) for pair in judged]
            report["teachers"][scorer] = compare(values, grades, ids, cuts.get(scorer))
    folder.write_json(AGREEMENT, report)
    return folder, report


def compare(scores: list[float], grades: list[int], ids: list[str], given: Cuts | None) -> dict[str, Any]:
    """Compares a teacher with people on the same pairs; returns JSON values.

    A single cut point only separates relevant from irrelevant. Human grades are then reduced to 3 (for 2 and 3) and 0.
    """
    best, on_new_pairs = best_cuts(scores, grades), held_out(scores, grades, ids)
    with_given = None
    if given is not None:
        human = [3 * (grade >= 2) for grade in grades] if len(given) == 1 else grades
        with_given = {"cuts": list(given), **_as_json(agreement(human, graded(scores, (*given, *given, *given)[:3])))}
    return {
        "labels": len(grades),
        "given": with_given,
        "recalibrated": {"cuts": list(best), **_as_json(agreement(grades, graded(scores, best)))},
        "held_out": None if on_new_pairs is None else _as_json(on_new_pairs),
    }


def _as_json(result: Agreement) -> dict[str, Any]:
    values = {"kappa": result.kappa, "quadratic": result.quadratic, "exact": result.exact}
    rounded = {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
    return {**rounded, "confusion": result.confusion.tolist()}


def _inter_rater(ratings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The number of ratings by person, and the agreement of every two people on the pairs that both rated."""
    by: dict[str, dict[PairId, int]] = {}
    for row in ratings:
        by.setdefault(row["who"], {})[row["query_id"], row["doc_id"]] = row["grade"]
    names = sorted(by)
    shared = {(a, b): sorted(by[a].keys() & by[b].keys()) for i, a in enumerate(names) for b in names[i + 1 :]}
    return {
        "ratings": {name: len(by[name]) for name in names},
        "agreement": [
            {
                "between": [a, b],
                "labels": len(both),
                **_as_json(agreement([by[a][p] for p in both], [by[b][p] for p in both])),
            }
            for (a, b), both in shared.items()
            if both
        ],
    }


def text(report: Mapping[str, Any]) -> str:
    """The report of an import for a terminal."""
    by = ", ".join(f"{name} {count}" for name, count in report["people"]["ratings"].items())
    lines = [f"{report['labels']} pairs rated ({by}); grades 0 to 3: {' '.join(map(str, report['grades']))}"]
    if sum(report["claimed"]):
        claimed = sum(report["claimed"])
        lines.append(
            f"of {claimed} pairs that the data label as relevant, people grade {sum(report['claimed'][2:])} at 2 or 3"
        )
    for raters in report["people"]["agreement"]:
        lines.append(f"{' and '.join(raters['between'])} on {raters['labels']} pairs: {_figures(raters)}")
    for scorer, entry in report["teachers"].items():
        lines += ["", f"{scorer}, {entry['labels']} labels"]
        for name in ("given", "recalibrated"):
            if entry[name]:
                shown = ", ".join(f"{cut:.4g}" for cut in entry[name]["cuts"])
                lines.append(f"  {name} cut points {shown}: {_figures(entry[name])}")
        if entry["held_out"]:
            lines.append(f"  recalibrated, on held-out labels: {_figures(entry['held_out'])}")
        elif entry["labels"] < 20:
            lines.append("  fewer than 20 labels: the cut points may be due to chance")
        lines.append("  people \\ teacher      0     1     2     3")
        for grade, row in enumerate((entry["given"] or entry["recalibrated"])["confusion"]):
            lines.append(f"  {grade:>16}" + "".join(f"{count:>6}" for count in row))
    return "\n".join(lines)


def _figures(result: Mapping[str, Any]) -> str:
    kappa, quadratic = ("undefined" if result[k] is None else f"{result[k]:.2f}" for k in ("kappa", "quadratic"))
    return f"kappa {kappa}, quadratic {quadratic}, same grade {result['exact']:.0%}"
