"""Finished folders in other tools' formats: BEIR folders, sentence-transformers JSONL, TREC runs and qrels."""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import is_uri
from dagr_ray.core.storage import filesystem
from dagr_ray.formats import beir, trec

log = logging.getLogger("dagr")


def ancestor(folder: Artifact, table: str) -> Artifact:
    """The folder itself or the nearest input that has ``table``. Raises ConfigError where there is none."""
    waiting, seen = [folder], set()
    while waiting:
        each = waiting.pop(0)
        manifest = each.manifest
        if manifest is None or each.name in seen:
            continue
        seen.add(each.name)
        if table in manifest["tables"]:
            return each
        waiting += [Artifact(folder.runs, name) for name in manifest["inputs"].values()]
    raise ConfigError(f"{folder.name} has no table {table!r}, nor have its inputs; give a select, mine or take folder")


def whole_corpus(folder: Artifact) -> Artifact:
    """The whole corpus below a folder: the largest of those that it was made from. Raises ConfigError where there is none."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        each = waiting.pop()
        manifest = each.manifest
        if manifest is None or each.name in seen:
            continue
        seen.add(each.name)
        if "corpus" in manifest["tables"]:
            found.append((manifest["tables"]["corpus"]["rows"], each.name))
        waiting += [Artifact(folder.runs, name) for name in manifest["inputs"].values()]
    if not found:
        raise ConfigError(f"{folder.name} was made from no corpus; give a select, mine or take folder")
    return Artifact(folder.runs, max(found)[1])


def to_beir(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """``corpus.jsonl``, ``queries.jsonl`` and ``qrels/train.tsv`` of the generated queries; returns lines by file."""
    queries = ancestor(folder, "queries").read("queries")
    if "examples" in (folder.manifest or {"tables": {}})["tables"]:
        examples = folder.read("examples")
        wanted = set(examples["query_id"].to_pylist())
        rows = [r for r in queries.to_pylist() if r["query_id"] in wanted]
        queries = tables.table("queries", rows)
        pairs = zip(examples["query_id"].to_pylist(), examples["positive_id"].to_pylist(), strict=True)
        qrels = tables.table("qrels", ({"query_id": q, "doc_id": d, "relevance": 1} for q, d in pairs))
    else:
        qrels = ancestor(folder, "qrels").read("qrels")
    return beir.write(target, whole_corpus(folder), queries, {"train": qrels})


def to_sentence_transformers(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """JSON lines with ``anchor``, ``positive``, ``negative_1``..: what SentenceTransformerTrainer takes.

    That reads columns, so each line has as many negatives as the longest. A query with fewer has its own again, in turn; one
    without any has passages of other queries, none of which is known to be relevant to it.
    """
    examples = ancestor(folder, "examples").read("examples").to_pylist()
    queries = dict(
        zip(*ancestor(folder, "queries").read("queries", ["query_id", "text"]).to_pydict().values(), strict=True)
    )
    corpus = {
        row["doc_id"]: tables.passage_text(row["title"], row["text"])
        for part in whole_corpus(folder).scan("corpus")
        for row in part.to_pylist()
    }

    columns = max((len(row["negative_ids"]) for row in examples), default=0)
    relevant: dict[str, set[str]] = defaultdict(set)
    for row in examples:
        relevant[queries[row["query_id"]]].add(corpus[row["positive_id"]])
    passages = sorted({text for found in relevant.values() for text in found})
    filled = sum(len(row["negative_ids"]) < columns for row in examples)

    def negatives(row: dict[str, Any]) -> list[str]:
        own = [corpus[doc_id] for doc_id in row["negative_ids"]]
        if not own:
            start, known = tables.seed_of(row["query_id"], row["positive_id"]), relevant[queries[row["query_id"]]]
            others = (passages[(start + i) % len(passages)] for i in range(len(passages)))
            own = list(itertools.islice((text for text in others if text not in known), columns))
        if columns and not own:
            raise ConfigError(
                f"export: query {row['query_id']!r} has no negatives, and every passage of {folder.name} is relevant to it; "
                "mine some, or leave it out"
            )
        return list(itertools.islice(itertools.cycle(own), columns))

    def lines() -> Iterator[str]:
        for row in examples:
            record = {"anchor": queries[row["query_id"]], "positive": corpus[row["positive_id"]]}
            record |= {f"negative_{i}": text for i, text in enumerate(negatives(row), 1)}
            yield json.dumps(record, ensure_ascii=False)

    if filled:
        log.info("export: %d of %d lines had fewer than %d negatives and are filled up", filled, len(examples), columns)
    return {target: _write_lines(target, lines())}


def to_trec(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """A TREC run file of a folder's candidates and, where its queries are judged, a qrels file beside it.

    The qrels file is named as the run with ``.qrels`` for its last ending. They are those that the folder was judged by
    (for an evaluation, of the queries that count), so ``trec_eval -c`` of both files gives the folder's own figures.
    """
    found = ancestor(folder, "candidates")
    rows = zip(*(c.to_pylist() for c in found.read("candidates").columns), strict=True)
    counts = {target: _write_lines(target, trec.run_lines(rows, folder.name))}
    judged = _judgements(found)
    if judged is not None:
        where = judged_beside(target)
        lines = trec.qrels_lines(zip(*(c.to_pylist() for c in judged.columns), strict=True))
        counts[where] = _write_lines(where, lines)
    return counts


def judged_beside(target: str) -> str:
    """The qrels file that is written beside a run.

    >>> judged_beside("out/bm25.trec"), judged_beside("out/bm25.qrels")
    ('out/bm25.qrels', 'out/bm25.qrels.qrels')
    """
    where, mark, options = target.partition("?") if is_uri(target) else (target, "", "")
    folder, slash, name = where.rpartition("/")
    stem = name.rsplit(".", 1)[0] if "." in name and not name.endswith(".qrels") else name
    return f"{folder}{slash}{stem}.qrels{mark}{options}"


def _judgements(found: Artifact) -> pa.Table | None:
    """What the queries of a search or an evaluation are judged by; None where they are not."""
    manifest = found.manifest or {"inputs": {}, "stage": {}, "tables": {}}
    split = manifest["stage"].get("split")
    for field in ("data", "queries"):
        source = manifest["inputs"].get(field)
        there = ((Artifact(found.runs, source).manifest or {}).get("tables") or {}) if source else {}
        splits = [name.removeprefix("qrels.") for name in there if name.startswith("qrels.")]
        name = f"qrels.{tables.split_of(splits, split)}" if split else "qrels"
        if source and name in there:
            rows = Artifact(found.runs, source).read(name)
            if "metrics" in manifest["tables"]:
                counted = found.read("metrics", ["query_id"])["query_id"].drop_null().unique()
                rows = rows.filter(pc.is_in(rows["query_id"], value_set=counted))
            return rows
    return None


def _write_lines(target: str, lines: Iterator[str]) -> int:
    fs, path = filesystem(target)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    count = 0
    with fs.open_output_stream(path) as stream:
        for line in lines:
            stream.write(line.encode() + b"\n")
            count += 1
    return count
