"""Writes the (query, passage) pairs that people should rate, as a page, CSV and JSON lines."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagr_ray.annotation.import_ import thresholds_named
from dagr_ray.annotation.sampling import REASONS, pairs_of, rank
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import rows_with
from dagr_ray.core.storage import filesystem
from dagr_ray.formats.export import ancestor, full_corpus
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.human_labels import plain_cell

FILES = ("items.jsonl", "items.csv", "annotate.html")
# The grades of TREC Deep Learning's passages (arXiv 2003.07820).
MEANINGS = (
    (0, "Irrelevant", "has nothing to do with it"),
    (1, "Related", "on the topic, does not answer"),
    (2, "Relevant", "answers in part, or between the lines"),
    (3, "Perfect", "is about it and answers it"),
)


# -- export ---------------------------------------------------------------------------------------------------------------


def export(
    folders: Sequence[Artifact],
    target: str,
    items: int = 200,
    threshold: Sequence[str] = (),
    encoder: Encoder | None = None,
    people: Artifact | None = None,
) -> dict[str, int]:
    """Writes ``items.jsonl``, ``items.csv`` and ``annotate.html`` into ``target``; returns the number of items by reason.

    ``people`` is the folder of an earlier import: its pairs are not exported again, and its cut points are the
    thresholds. The page and the CSV do not show the teachers' scores, which would bias the raters. Raises ConfigError.
    """
    if items < 1:
        raise ConfigError(f"--items {items}: the number of items must be 1 or more")
    pairs = pairs_of(folders)
    cuts = thresholds_named(threshold, pairs.scores, people)
    rated = {(row["query_id"], row["doc_id"]) for row in people.read("qrels").to_pylist()} if people else set()
    texts = _texts(folders, "queries", "query_id", {query_id for query_id, _ in pairs.ids})
    queries = {query_id: row["text"] for query_id, row in texts.items()}
    selected = rank(pairs, items, cuts, encoder, queries, rated)
    if not selected:
        raise ConfigError(f"nothing to rate: {len(pairs.ids)} pairs, {len(rated)} of them rated; give other folders")
    passages = _texts(folders, "corpus", "doc_id", {pairs.ids[i][1] for i, _, _ in selected})
    rows = []
    for position, (i, reason, why) in enumerate(selected, 1):
        query_id, doc_id = pairs.ids[i]
        scores = {scorer: values[i] for scorer, values in pairs.scores.items() if not math.isnan(values[i])}
        row = {"rank": position, "query_id": query_id, "doc_id": doc_id, "reason": reason, "why": why}
        row |= {"query": queries[query_id], "title": passages[doc_id]["title"], "passage": passages[doc_id]["text"]}
        rows.append(row | {"scores": scores})
    _write(target, dict(zip(FILES, (_jsonl(rows), _csv(rows), page(rows)), strict=True)))
    return {reason: sum(row["reason"] == reason for row in rows) for reason in REASONS}


def _texts(folders: Sequence[Artifact], table: str, key: str, ids: set[str]) -> dict[str, dict[str, str]]:
    """The rows of queries or passages by id, from the inputs of the folders."""
    row_of: dict[str, dict[str, str]] = {}
    for folder in folders:
        source = full_corpus(folder) if table == "corpus" else ancestor(folder, table)
        row_of |= {row[key]: row for row in rows_with(source, table, key, ids - row_of.keys()).to_pylist()}
    if ids - row_of.keys():
        absent = sorted(ids - row_of.keys())
        raise ConfigError(
            f"{len(absent)} of {len(ids)} {key}s are in no table {table!r} of the folders' inputs, such as {absent[0]!r}; "
            "give the folders that these pairs come from"
        )
    return row_of


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: one file without network access. Its content security policy allows only its own script, by hash."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    script = (Path(__file__).parent / "annotate.js").read_text()
    shown = [{k: row[k] for k in ("query_id", "doc_id", "query", "title", "passage")} for row in rows]
    for item, row in zip(shown, rows, strict=True):
        item["reason"] = REASONS[row["reason"]]
    name = tables.id_of(*(part for row in rows for part in (row["query_id"], row["doc_id"])))
    template = Environment(
        loader=PackageLoader("dagr_ray.annotation", "."), autoescape=True, undefined=StrictUndefined
    ).get_template("annotate.html")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"id": name, "items": shown}
    return template.render(data=data, script=script, script_hash=f"sha256-{digest}", grades=MEANINGS)


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("rank", "query_id", "doc_id", "reason", "query", "title", "passage", "grade", "who")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        writer.writerow([plain_cell(str(row.get(name, ""))) for name in names])
    return text.getvalue()


def _write(target: str, files: Mapping[str, str]) -> None:
    fs, root = filesystem(target)
    for name, text in files.items():
        info = fs.get_file_info(f"{root}/{name}")
        if info.is_file:
            with fs.open_input_stream(info.path) as before:
                if before.read() != text.encode():
                    raise ConfigError(f"{target}/{name} exists with other content; give another folder")
    fs.create_dir(root, recursive=True)
    for name, text in files.items():
        with fs.open_output_stream(f"{root}/{name}") as stream:
            stream.write(text.encode())
