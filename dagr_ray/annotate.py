"""Co-annotation: which (query, passage) pairs a person should see first, and what people's grades say about a teacher."""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray import tables
from dagr_ray.agreement import GRADES, Agreement, agreement, best_cuts, graded, held_out
from dagr_ray.artifact import Artifact
from dagr_ray.cluster import Placement
from dagr_ray.config import ConfigError
from dagr_ray.export import ancestor, whole_corpus
from dagr_ray.items import REASONS, Cuts, Pair, pairs_of, rank
from dagr_ray.models import minilm
from dagr_ray.retriever import Encoder
from dagr_ray.stage import materialize
from dagr_ray.stages.people import AGREEMENT, People, all_ratings, plain_cell
from dagr_ray.store import filesystem
from dagr_ray.terminal import say

Find = Callable[[str], Artifact]
JUDGE = "llm-judge"
# Its scores are on the scale of the grades, and rounded.
ROUNDED = (0.5, 1.5, 2.5)
FILES = ("items.jsonl", "items.csv", "annotate.html")
# The grades of TREC Deep Learning's passages (arXiv 2003.07820).
MEANINGS = (
    (0, "Irrelevant", "has nothing to do with it"),
    (1, "Related", "on the topic, does not answer"),
    (2, "Relevant", "answers in part, or between the lines"),
    (3, "Perfect", "is about it and answers it"),
)


def run(args: argparse.Namespace, find: Find) -> None:
    """The verb: ``words`` are folders of the runs folder, and last what is written to, or the files that are read."""
    folders, files = list(args.words), []
    if args.action == "import":
        files = [word for word in args.words if word.lower().endswith((".jsonl", ".csv"))]
        folders = [word for word in args.words if word not in files]
    elif len(folders) > 1:
        files.append(folders.pop())
    if not folders or not files:
        want = "a folder to write to" if args.action == "export" else "files of ratings (.jsonl or .csv)"
        raise ConfigError(
            f"annotate {args.action} {' '.join(args.words)}: give folders of the runs folder, and after them {want}"
        )
    chosen = [find(name) for name in folders]
    if args.action == "import":
        folder, report = take(chosen, files, args.runs, args.threshold)
        say(json.dumps(report, indent=1, ensure_ascii=False) if args.json else text(report))
        say(folder.path, to=sys.stderr if args.json else sys.stdout)
        return
    encoder = None
    if args.encoder:
        model = str(minilm()) if args.encoder == "minilm" else args.encoder
        encoder = Encoder(model=model)
    people = find(args.people) if args.people else None
    counts = export(chosen, files[0], args.items, args.threshold, encoder, people)
    if args.json:
        say(json.dumps(counts))
        return
    say("; ".join(f"{count} {REASONS[reason]}" for reason, count in counts.items() if count))
    for name in FILES:
        say(f"{files[0].rstrip('/')}/{name}")


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


# -- export ---------------------------------------------------------------------------------------------------------------


def export(
    folders: Sequence[Artifact],
    target: str,
    items: int = 200,
    threshold: Sequence[str] = (),
    encoder: Encoder | None = None,
    people: Artifact | None = None,
) -> dict[str, int]:
    """Writes ``items.jsonl``, ``items.csv`` and ``annotate.html`` into ``target``; items by reason.

    ``people``: the folder of an earlier import, whose pairs are not asked again, and whose cut points are the thresholds.
    The page and the CSV do not show what the teachers said: a person should not be led. Raises ConfigError.
    """
    if items < 1:
        raise ConfigError(f"--items {items} is not a number of items; give 1 or more")
    pairs = pairs_of(folders)
    cuts = thresholds_named(threshold, pairs.scores, people)
    rated = {(row["query_id"], row["doc_id"]) for row in people.read("qrels").to_pylist()} if people else set()
    texts = _texts(folders, "queries", "query_id", {query_id for query_id, _ in pairs.ids})
    queries = {query_id: row["text"] for query_id, row in texts.items()}
    chosen = rank(pairs, items, cuts, encoder, queries, rated)
    if not chosen:
        raise ConfigError(f"nothing to rate: {len(pairs.ids)} pairs, {len(rated)} of them rated; give other folders")
    passages = _texts(folders, "corpus", "doc_id", {pairs.ids[i][1] for i, _, _ in chosen})
    rows = []
    for place, (i, reason, why) in enumerate(chosen, 1):
        query_id, doc_id = pairs.ids[i]
        said = {scorer: scores[i] for scorer, scores in pairs.scores.items() if not math.isnan(scores[i])}
        row = {"rank": place, "query_id": query_id, "doc_id": doc_id, "reason": reason, "why": why}
        row |= {"query": queries[query_id], "title": passages[doc_id]["title"], "passage": passages[doc_id]["text"]}
        rows.append(row | {"scores": said})
    _write(target, dict(zip(FILES, (_jsonl(rows), _csv(rows), page(rows)), strict=True)))
    return {reason: sum(row["reason"] == reason for row in rows) for reason in REASONS}


def _texts(folders: Sequence[Artifact], table: str, key: str, wanted: set[str]) -> dict[str, dict[str, str]]:
    """The rows of some queries or passages, by id, from what the folders were made from."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        source = whole_corpus(folder) if table == "corpus" else ancestor(folder, table)
        missing = pa.array(sorted(wanted - found.keys()), tables.TEXT)
        for part in source.scan(table) if len(missing) else ():
            found |= {row[key]: row for row in part.filter(pc.is_in(part[key], value_set=missing)).to_pylist()}
    if wanted - found.keys():
        absent = sorted(wanted - found.keys())
        raise ConfigError(
            f"{len(absent)} of {len(wanted)} {key}s are in no table {table!r} below the folders, such as {absent[0]!r}; "
            "give the folders whose pairs these are"
        )
    return found


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: one file without network. Only the script that is in it may run, by its hash in the page's policy."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    script = (Path(__file__).parent / "report" / "annotate.js").read_text()
    shown = [{k: row[k] for k in ("query_id", "doc_id", "query", "title", "passage")} for row in rows]
    for item, row in zip(shown, rows, strict=True):
        item["reason"] = REASONS[row["reason"]]
    name = tables.mint(*(part for row in rows for part in (row["query_id"], row["doc_id"])))
    template = Environment(
        loader=PackageLoader("dagr_ray.report", "."), autoescape=True, undefined=StrictUndefined
    ).get_template("annotate.html")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"id": name, "items": shown}
    return template.render(data=data, script=script, script_hash=f"sha256-{digest}", grades=MEANINGS)


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("rank", "query_id", "doc_id", "reason", "query", "title", "passage", "grade", "who")
    made = io.StringIO()
    writer = csv.writer(made)
    writer.writerow(names)
    for row in rows:
        writer.writerow([plain_cell(str(row.get(name, ""))) for name in names])
    return made.getvalue()


def _write(target: str, files: Mapping[str, str]) -> None:
    fs, root = filesystem(target)
    for name, text in files.items():
        info = fs.get_file_info(f"{root}/{name}")
        if info.is_file:
            with fs.open_input_stream(info.path) as before:
                if before.read() != text.encode():
                    raise ConfigError(f"{target}/{name} is there and holds something else; give another folder")
    fs.create_dir(root, recursive=True)
    for name, text in files.items():
        with fs.open_output_stream(f"{root}/{name}") as stream:
            stream.write(text.encode())


# -- import ---------------------------------------------------------------------------------------------------------------


def take(
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
        before = {"cuts": list(given), **_told(agreement(theirs, graded(scores, (*given, *given, *given)[:3])))}
    return {
        "labels": len(grades),
        "given": before,
        "recalibrated": {"cuts": list(best), **_told(agreement(grades, graded(scores, best)))},
        "held_out": None if outside is None else _told(outside),
    }


def _told(found: Agreement) -> dict[str, Any]:
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
                **_told(agreement([by[a][p] for p in both], [by[b][p] for p in both])),
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
