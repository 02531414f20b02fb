"""Human labels: grades that people gave to (query, passage) pairs, and tables in which these grades override."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.joins import rows_with
from dagr_ray.core.paths import FileOrFolder, last_name
from dagr_ray.core.placement import Pool
from dagr_ray.core.stage import Inputs, Output, Run, Stage
from dagr_ray.core.storage import filesystem

GRADES = (0, 1, 2, 3)
AGREEMENT = "agreement.json"  # written beside the labels of an import
# A spreadsheet reads a cell that starts with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")


class Rating(NamedTuple):
    """A person's grade; ``at`` is the time as the page or the person wrote it, ``where`` the file and line."""

    query_id: str
    doc_id: str
    grade: int
    who: str
    at: str | None
    where: str


def plain_cell(text: str) -> str:
    """Text as a cell that no spreadsheet runs; ``cell_text`` restores the text.

    >>> plain_cell("=1+1"), cell_text(plain_cell("=1+1")), plain_cell("a-b")
    ("'=1+1", '=1+1', 'a-b')
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def cell_text(cell: str) -> str:
    """The text of a cell that ``plain_cell`` encoded."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def read_ratings(path: str) -> list[Rating]:
    """Reads a file of ratings: JSON lines as the page writes them (``.jsonl``), or the exported CSV with ``grade`` filled in.

    Rows of a CSV without a grade are not ratings. Raises ConfigError, with the first bad line and the number of bad lines,
    if a line has no ids or no grade from 0 to 3, or rates a pair that the same person rated before.
    """
    fs, inside = filesystem(path)
    if not fs.get_file_info(inside).is_file:
        raise ConfigError(f"no file {path!r}; give the ratings that the page saved (.jsonl), or the filled-in .csv")
    with fs.open_input_stream(inside) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from None
    name = last_name(path)
    rows = _csv_rows(name, text) if name.lower().endswith(".csv") else _json_rows(text)
    bad: list[str] = []
    by_key: dict[tuple[str, str, str], Rating] = {}
    for line, row in rows:
        rating = _rating(row, f"{name}:{line}")
        if isinstance(rating, str):
            bad.append(f"{name}:{line}: {rating}")
            continue
        earlier = by_key.get(key := (rating.who, rating.query_id, rating.doc_id))
        if earlier is not None:
            pair = f"({rating.query_id}, {rating.doc_id})"
            bad.append(
                f"{rating.where}: {pair} was rated by {rating.who!r} in {earlier.where} already; keep one of them"
            )
        by_key.setdefault(key, rating)
    if bad:
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise ConfigError(f"{bad[0]}{more}; nothing was imported")
    if not by_key:
        raise ConfigError(f"{path}: no rating in it; rate some items and save them first")
    return list(by_key.values())


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, "not JSON; give one rating a line, as the page saves them"


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    head = text.split("\n", 1)[0]
    # spreadsheets of some countries separate columns by semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    missing = [column for column in ("query_id", "doc_id", "grade") if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"{name}: no column {missing[0]!r} in its first line; give the exported CSV with its header and grades"
        )
    try:
        for row in reader:
            if (row["grade"] or "").strip():
                yield reader.line_num, {key: cell_text(value) for key, value in row.items() if isinstance(value, str)}
    except csv.Error as error:
        yield reader.line_num, f"not CSV ({error}); save the file as CSV again"


def _rating(row: Any, where: str) -> Rating | str:
    """The rating in a line, or what is wrong with the line."""
    if isinstance(row, str):
        return row
    ids = [row.get(name) for name in ("query_id", "doc_id")] if isinstance(row, dict) else [None]
    if not all(isinstance(each, str) and each for each in ids):
        return "no query_id and doc_id; give lines as the page saves them"
    grade = row.get("grade")
    if isinstance(grade, str) and re.fullmatch(r"\s*[0-3](\.0*)?\s*", grade):
        grade = int(float(grade))
    if isinstance(grade, bool) or grade not in GRADES:
        return f"grade = {row.get('grade')!r} of ({ids[0]}, {ids[1]}): allowed are 0, 1, 2 and 3"
    who, at = (tables.clean(str(row.get(name) or "")).strip() for name in ("who", "at"))
    return Rating(tables.clean(str(ids[0])), tables.clean(str(ids[1])), int(grade), who or "unknown", at or None, where)


class People(Stage):
    """The grades in ``files`` (see ``read_ratings``): ``qrels`` with relevance 0 to 3, and ``ratings`` with who and when.

    If several people rated a pair, its relevance is the lower median of their grades. The grades are those of the TREC
    Deep Learning passages (Craswell et al., arXiv 2003.07820): 0 irrelevant, 1 on the topic but no answer, 2 answers
    in part or among other things, 3 answers.
    """

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("qrels", "ratings")
    files: Annotated[tuple[FileOrFolder, ...], Field(min_length=1)]

    def identity(self) -> dict[str, Any]:
        """The content of the files, whatever their paths."""
        return {"type": self.type, "version": self.version, "content": sorted(_content(path) for path in self.files)}

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        def run(start: int, stop: int) -> Output:
            ratings = all_ratings(self.files)
            by_pair: dict[tuple[str, str], list[int]] = {}
            for rating in ratings:
                by_pair.setdefault((rating.query_id, rating.doc_id), []).append(rating.grade)
            qrels = [
                {"query_id": query_id, "doc_id": doc_id, "relevance": sorted(grades)[(len(grades) - 1) // 2]}
                for (query_id, doc_id), grades in sorted(by_pair.items())
            ]
            by_person = sorted(ratings, key=lambda each: (each.query_id, each.doc_id, each.who))
            rows = [{name: getattr(each, name) for name in tables.schema("ratings").names} for each in by_person]
            output = {"qrels": tables.table("qrels", qrels), "ratings": tables.table("ratings", rows)}
            people = len({rating.who for rating in ratings})
            return Output(output, counts={"in": len(ratings), "out": len(qrels), "people": people})

        return run


def all_ratings(files: tuple[str, ...]) -> list[Rating]:
    """The ratings of several files. Raises ConfigError if one person rated a pair in two of them."""
    by_key: dict[tuple[str, str, str], Rating] = {}
    for path in files:
        for rating in read_ratings(path):
            earlier = by_key.setdefault((rating.who, rating.query_id, rating.doc_id), rating)
            if earlier is not rating:
                raise ConfigError(
                    f"{rating.where}: ({rating.query_id}, {rating.doc_id}) was rated by {rating.who!r} in {earlier.where} "
                    "already; keep one of them; nothing was imported"
                )
    return list(by_key.values())


def _content(path: str) -> str:
    fs, inside = filesystem(path)
    if not fs.get_file_info(inside).is_file:
        raise ConfigError(f"people: no file {path!r}; give the ratings that were imported, or a copy of them")
    with fs.open_input_stream(inside) as stream:
        return digest([path.lower().endswith(".csv"), hashlib.sha256(stream.read()).hexdigest()], 16)


def cut(folder: str, scorer: str, grade: int = 2) -> float:
    """The teacher score from which human grades are at least ``grade``, as calibrated by the import in ``folder``.

    For a filter that keeps what people would call relevant: ``Teacher(min_score=cut("runs/people-...", "llm-judge"))``.
    Raises ConfigError if the folder is no import, or has no labels for this teacher's scores.
    """
    runs, _, name = folder.rstrip("/").rpartition("/")
    agreement = Artifact(runs or ".", name).read_json(AGREEMENT)
    if agreement is None:
        raise ConfigError(f"people: no {AGREEMENT} in {folder!r}; give the folder that `dagr annotate import` wrote")
    if scorer not in agreement["teachers"] or grade not in GRADES[1:]:
        teachers = ", ".join(agreement["teachers"]) or "none"
        raise ConfigError(
            f"people: scorer = {scorer!r}, grade = {grade}; allowed in {folder!r}: {teachers}; grades 1 to 3"
        )
    return float(agreement["teachers"][scorer]["recalibrated"]["cuts"][grade - 1])


class WithHumanLabels(Stage):
    """The tables of ``source`` with human labels overriding its own values. Everything else is unchanged.

    * ``qrels`` (and ``qrels.<split>``): a pair graded below ``relevant_from`` gets relevance 0, any other its grade; a
      missing relevant pair is added if its query is judged. So ``Mine`` uses no positive that people reject, and no
      negative that they call relevant.
    * ``scores``: a graded pair gets the score ``scale[grade]``. Without a scale, a relevant pair gets the highest score of
      the table and any other the lowest, so that a filter or miner follows the human label, whatever its threshold.
    * With ``queries`` (the stage from which ``source`` selected), a relevant pair that a filter rejected is restored.

    Human labels override the filters: they can both reject and restore a query. ``relevant_from`` is 2 as for the TREC
    Deep Learning passages (arXiv 2003.07820). Shards are the shards of ``source``. Counts: ``overridden`` rows, ``added``
    rows, and restored rows (``back``).
    """

    abstract: ClassVar[bool] = False
    source: Stage
    people: Stage
    queries: Stage | None = None
    relevant_from: Annotated[int, Field(ge=1, le=3)] = 2
    scale: tuple[float, float, float, float] | None = None

    def label(self) -> str:
        return self.source.type

    def size(self, inputs: Inputs) -> int:
        """The source's shards, so that parts of its tables still correspond."""
        return max(_shards(inputs["source"]), 1)

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(self.size(inputs))]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        source, names, shards = inputs["source"], inputs["source"].table_names(), self.size(inputs)
        rows = inputs["people"].read("qrels").to_pylist()
        grade_of = {(row["query_id"], row["doc_id"]): row["relevance"] for row in rows}
        values = self._values(source) if "scores" in names else ()
        starts = {name: _starts(source, name, shards) for name in names}

        def run(start: int, stop: int) -> Output:
            output = {name: source.slice(name, starts[name][start], starts[name][stop]) for name in names}
            counts = {"in": sum(map(len, output.values())), "overridden": 0, "added": 0, "back": 0}
            query_ids = set(tables.texts(output["queries"]["query_id"])) if "queries" in names else set()
            for name in names:
                if name.split(".")[0] == "qrels":
                    output[name] = self._qrels(output[name], grade_of, query_ids if name == "qrels" else set(), counts)
                elif name == "scores":
                    output[name] = _scored(output[name], grade_of, values, counts)
            if stop == shards and "queries" in inputs:
                self._bring_back(output, inputs, grade_of, counts)
            if "rejected" in names and "queries" in inputs:
                restored = pa.array(
                    sorted({q for (q, _), grade in grade_of.items() if grade >= self.relevant_from}), tables.TEXT
                )
                output["rejected"] = output["rejected"].filter(
                    pc.invert(pc.is_in(output["rejected"]["id"], value_set=restored))
                )
            return Output(output, counts=counts | {"out": sum(map(len, output.values()))})

        return run

    def _relevance(self, grade: int) -> int:
        return grade if grade >= self.relevant_from else 0

    def _values(self, source: Artifact) -> tuple[float, ...]:
        if self.scale is not None:
            return self.scale
        ends = [pc.min_max(part["score"]).as_py() for part in source.scan("scores", ["score"])]
        lowest = min((extremes["min"] for extremes in ends if extremes["min"] is not None), default=0.0)
        highest = max((extremes["max"] for extremes in ends if extremes["max"] is not None), default=0.0)
        return tuple(highest if grade >= self.relevant_from else lowest for grade in GRADES)

    def _qrels(self, rows: pa.Table, judged: dict[Any, int], asked: set[str], counts: dict[str, int]) -> pa.Table:
        pairs = list(zip(tables.texts(rows["query_id"]), tables.texts(rows["doc_id"]), strict=True))
        relevance = np.array(rows["relevance"].to_numpy(), np.int32)
        for i, pair in enumerate(pairs):
            if pair in judged:
                relevance[i] = self._relevance(judged[pair])
                counts["overridden"] += 1
        pairs_there, queries_there = set(pairs), {query_id for query_id, _ in pairs} | asked
        absent = (pair for pair in judged if pair[0] in queries_there and pair not in pairs_there)
        new_pairs = [pair for pair in absent if judged[pair] >= self.relevant_from]
        counts["added"] += len(new_pairs)
        added = [{"query_id": q, "doc_id": d, "relevance": judged[q, d]} for q, d in new_pairs]
        rows = rows.set_column(2, rows.schema.field("relevance"), pa.array(relevance))
        return pa.concat_tables([rows, tables.table("qrels", added)])

    def _bring_back(self, made: dict[str, pa.Table], inputs: Inputs, judged: Any, counts: dict[str, int]) -> None:
        """Adds the relevant pairs of the queries that the source left out."""
        kept = inputs["source"].read("queries", ["query_id"])["query_id"].unique()
        relevant = {pair: grade for pair, grade in judged.items() if grade >= self.relevant_from}
        wanted = pa.array(sorted({query_id for query_id, _ in relevant}), tables.TEXT)
        wanted = wanted.filter(pc.invert(pc.is_in(wanted, value_set=kept)))
        keys = {"queries": "query_id", "lineage": "id"}
        for name in (each for each in keys if each in made and each in inputs["queries"].table_names()):
            made[name] = pa.concat_tables([made[name], rows_with(inputs["queries"], name, keys[name], wanted)])
        there = set(tables.texts(made["queries"]["query_id"])) & set(tables.texts(wanted))
        rows = [{"query_id": q, "doc_id": d, "relevance": g} for (q, d), g in sorted(relevant.items()) if q in there]
        counts["back"] += len(rows)
        made["qrels"] = pa.concat_tables([made["qrels"], tables.table("qrels", rows)])


def _scored(rows: pa.Table, judged: dict[Any, int], values: tuple[float, ...], counts: dict[str, int]) -> pa.Table:
    """Rows with the human scores; a graded pair without a row is added if its query has rows."""
    pairs = list(zip(tables.texts(rows["query_id"]), tables.texts(rows["doc_id"]), strict=True))
    score = np.array(rows["score"].to_numpy(), np.float32)
    for i, pair in enumerate(pairs):
        if pair in judged:
            score[i] = values[judged[pair]]
            counts["overridden"] += 1
    there, here, scorers = set(pairs), {query_id for query_id, _ in pairs}, rows["scorer"].unique().to_pylist()
    added = [
        {"query_id": q, "doc_id": d, "scorer": scorer, "score": values[grade]}
        for (q, d), grade in judged.items()
        if q in here and (q, d) not in there
        for scorer in scorers
    ]
    counts["added"] += len(added)
    rows = rows.set_column(3, rows.schema.field("score"), pa.array(score))
    return pa.concat_tables([rows, tables.table("scores", added)])


def _shards(source: Artifact) -> int:
    """The number of shards of a folder; 1 if its tables do not all have a part per shard."""
    parts = {len(entry["parts"]) for entry in (source.manifest or {})["tables"].values()}
    return parts.pop() if len(parts) == 1 else 1


def _starts(source: Artifact, name: str, shards: int) -> list[int]:
    """The first row of each shard in a table, and the number of rows at the end."""
    if shards == 1:
        return [0, source.count(name)]
    return list(accumulate((part["rows"] for part in (source.manifest or {})["tables"][name]["parts"]), initial=0))
