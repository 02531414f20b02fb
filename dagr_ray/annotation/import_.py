"""Reads people's ratings, and says what they mean for a teacher's scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dagr_ray.annotation.agreement import GRADES, Agreement, agreement, best_cuts, graded, held_out
from dagr_ray.annotation.sampling import Cuts, Pair, pairs_of
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement
from dagr_ray.stages.human_labels import AGREEMENT, People, all_ratings

JUDGE = "llm-judge"
# Its scores are on the scale of the grades, and rounded.
ROUNDED = (0.5, 1.5, 2.5)


def thresholds_named(words: Sequence[str], scorers: Iterable[str], earlier: Artifact | None = None) -> dict[str, Cuts]:
    """Cut points by teacher: from SCORER=A[,B,C], else as an earlier import set them, else 0.5, 1.5, 2.5 for a judge.

    A judge is the teacher ``llm-judge`` in its pointwise form: its scores are expected grades. Raises ConfigError for a
    name or number that means nothing.
    """
    names = list(scorers)
    found: dict[str, Cuts] = {name: ROUNDED for name in names if name.partition(" (")[0] == JUDGE}
    for name, entry in ((earlier.read_json(AGREEMENT) or {}) if earlier else {}).get("teachers", {}).items():
        if name in names:
            found[name] = tuple(entry["recalibrated"]["cuts"])
    for word in words:
        name, equals, values = word.rpartition("=")
        try:
            cuts = tuple(float(value) for value in values.split(","))
        except ValueError:
            cuts = ()
        finite = all(map(math.isfinite, cuts))
        if not equals or name not in names or len(cuts) not in (1, 3) or list(cuts) != sorted(cuts) or not finite:
            raise ConfigError(
                f"--threshold {word!r}: give SCORER=VALUE with one number or three rising ones (0.5, or 0.5,1.5,2.5); "
                f"scorers here: {', '.join(names) or 'none, the folders have no scores'}"
            )
        found[name] = cuts
    return found


# -- import ---------------------------------------------------------------------------------------------------------------


def import_ratings(
    folders: Sequence[Artifact], files: Sequence[str], runs: str, threshold: Sequence[str] = ()
) -> tuple[Artifact, dict[str, Any]]:
    """Checks ratings, writes them as a folder of ``People`` in ``runs``, and its ``agreement.json``; folder and report.

    The report has, for each teacher of ``folders``, the agreement with its given cut points (if any), the cut points that
    agree best with people, and what these give on labels they were not set on. Raises ConfigError, and writes nothing,
    where a file is bad or rates a pair that is in none of the folders.
    """
    pairs = pairs_of(folders)
    cuts = thresholds_named(threshold, pairs.scores)
    row_of = {pair: i for i, pair in enumerate(pairs.ids)}
    ratings = all_ratings(tuple(files))
    unknown = [rating for rating in ratings if (rating.query_id, rating.doc_id) not in row_of]
    if unknown:
        first, more = unknown[0], f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{first.where}: ({first.query_id}, {first.doc_id}) is no pair of {', '.join(f.name for f in folders)}{more}; "
            "give the folders that were exported, and ids as they were; nothing was imported"
        )
    folder = materialize(People(files=tuple(files)), runs, Placement())
    rows = folder.read("qrels").to_pylist()
    labels = {(row["query_id"], row["doc_id"]): row["relevance"] for row in rows}
    report: dict[str, Any] = {
        "labels": len(labels),
        "grades": [sum(grade == each for grade in labels.values()) for each in range(GRADES)],
        "claimed": [sum(labels[p] == grade for p in labels if p in pairs.claimed) for grade in range(GRADES)],
        "people": _between(folder.read("ratings").to_pylist()),
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
    """A teacher beside people on the same pairs, as JSON values.

    One cut point alone says relevant or not: it is compared with grades of 2 and 3 against 0 and 1, as 3 and 0.
    """
    best, outside = best_cuts(scores, grades), held_out(scores, grades, ids)
    before = None
    if given is not None:
        theirs = [3 * (grade >= 2) for grade in grades] if len(given) == 1 else grades
        before = {
            "cuts": list(given),
            **_agreement_json(agreement(theirs, graded(scores, (*given, *given, *given)[:3]))),
        }
    return {
        "labels": len(grades),
        "given": before,
        "recalibrated": {"cuts": list(best), **_agreement_json(agreement(grades, graded(scores, best)))},
        "held_out": None if outside is None else _agreement_json(outside),
    }


def _agreement_json(found: Agreement) -> dict[str, Any]:
    values = {"kappa": found.kappa, "quadratic": found.quadratic, "exact": found.exact}
    rounded = {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}
    return {**rounded, "confusion": found.confusion.tolist()}


def _between(ratings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratings by person, and the agreement of each two on the pairs that both rated."""
    by: dict[str, dict[Pair, int]] = {}
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
                **_agreement_json(agreement([by[a][p] for p in both], [by[b][p] for p in both])),
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
            f"of {claimed} pairs that the data call relevant, people grade {sum(report['claimed'][2:])} at 2 or 3"
        )
    for each in report["people"]["agreement"]:
        lines.append(f"{' and '.join(each['between'])} on {each['labels']} pairs: {_figures(each)}")
    for scorer, entry in report["teachers"].items():
        lines += ["", f"{scorer}, {entry['labels']} labels"]
        for name in ("given", "recalibrated"):
            if entry[name]:
                shown = ", ".join(f"{cut:.4g}" for cut in entry[name]["cuts"])
                lines.append(f"  {name} cut points {shown}: {_figures(entry[name])}")
        if entry["held_out"]:
            lines.append(f"  recalibrated, on labels held out: {_figures(entry['held_out'])}")
        elif entry["labels"] < 20:
            lines.append("  fewer than 20 labels: the cut points may be chance")
        lines.append("  people \\ teacher      0     1     2     3")
        for grade, row in enumerate((entry["given"] or entry["recalibrated"])["confusion"]):
            lines.append(f"  {grade:>16}" + "".join(f"{count:>6}" for count in row))
    return "\n".join(lines)


def _figures(each: Mapping[str, Any]) -> str:
    kappa, quadratic = ("undefined" if each[k] is None else f"{each[k]:.2f}" for k in ("kappa", "quadratic"))
    return f"kappa {kappa}, quadratic {quadratic}, same grade {each['exact']:.0%}"
