"""Exports complete folders to other formats: BEIR folders, sentence-transformers JSONL, TREC runs and qrels."""

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
    """The folder itself or its nearest input that has ``table``. Raises ConfigError if there is none."""
    queue, seen = [folder], set()
    while queue:
        current = queue.pop(0)
        manifest = current.manifest
        if manifest is None or current.name in seen:
            continue
        seen.add(current.name)
        if table in manifest["tables"]:
            return current
        queue += [Artifact(folder.runs, name) for name in manifest["inputs"].values()]
    raise ConfigError(f"{folder.name} and its inputs have no table {table!r}; give a select, mine or take folder")


def full_corpus(folder: Artifact) -> Artifact:
    """The largest corpus among a folder and its inputs. Raises ConfigError if there is none."""
    corpora, queue, seen = [], [folder], set()
    while queue:
        current = queue.pop()
        manifest = current.manifest
        if manifest is None or current.name in seen:
            continue
        seen.add(current.name)
        if "corpus" in manifest["tables"]:
            corpora.append((manifest["tables"]["corpus"]["rows"], current.name))
        queue += [Artifact(folder.runs, name) for name in manifest["inputs"].values()]
    if not corpora:
        raise ConfigError(f"{folder.name} has no corpus among its inputs; give a select, mine or take folder")
    return Artifact(folder.runs, max(corpora)[1])


def to_beir(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """Writes ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/train.tsv`` of the generated queries; returns lines by file."""
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
    return beir.write(target, full_corpus(folder), queries, {"train": qrels})


def to_sentence_transformers(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """Writes JSON lines with ``anchor``, ``positive``, ``negative_1``.. for SentenceTransformerTrainer; lines by file.

    The trainer reads columns, so all lines have the same number of negatives. A query with fewer repeats its own in turn.
    A query without negatives gets passages of other queries that are not known to be relevant to it.
    """
    examples = ancestor(folder, "examples").read("examples").to_pylist()
    queries = dict(
        zip(*ancestor(folder, "queries").read("queries", ["query_id", "text"]).to_pydict().values(), strict=True)
    )
    corpus = {
        row["doc_id"]: tables.passage_text(row["title"], row["text"])
        for part in full_corpus(folder).scan("corpus")
        for row in part.to_pylist()
    }

    columns = max((len(row["negative_ids"]) for row in examples), default=0)
    relevant: dict[str, set[str]] = defaultdict(set)
    for row in examples:
        relevant[queries[row["query_id"]]].add(corpus[row["positive_id"]])
    passages = sorted({text for texts in relevant.values() for text in texts})
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
                "mine negatives for it, or remove the query"
            )
        return list(itertools.islice(itertools.cycle(own), columns))

    def lines() -> Iterator[str]:
        for row in examples:
            record = {"anchor": queries[row["query_id"]], "positive": corpus[row["positive_id"]]}
            record |= {f"negative_{i}": text for i, text in enumerate(negatives(row), 1)}
            yield json.dumps(record, ensure_ascii=False)

    if filled:
        log.info("export: %d of %d lines had fewer than %d negatives; they repeat some", filled, len(examples), columns)
    return {target: _write_lines(target, lines())}


def to_trec(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """Writes a TREC run file of a folder's candidates and, if its queries are judged, a qrels file beside it.

    The qrels file has the name of the run with the suffix ``.qrels``. It has the judgements that evaluated the folder
    (for an evaluation, of the evaluated queries), so ``trec_eval -c`` of both files gives the folder's own figures.
    """
    searched = ancestor(folder, "candidates")
    rows = zip(*(c.to_pylist() for c in searched.read("candidates").columns), strict=True)
    counts = {target: _write_lines(target, trec.run_lines(rows, folder.name))}
    qrels = _judgements(searched)
    if qrels is not None:
        path = qrels_path(target)
        lines = trec.qrels_lines(zip(*(c.to_pylist() for c in qrels.columns), strict=True))
        counts[path] = _write_lines(path, lines)
    return counts


def qrels_path(target: str) -> str:
    """The path of the qrels file for a run.

    >>> qrels_path("out/bm25.trec"), qrels_path("out/bm25.qrels")
    ('out/bm25.qrels', 'out/bm25.qrels.qrels')
    """
    path, mark, options = target.partition("?") if is_uri(target) else (target, "", "")
    folder, slash, name = path.rpartition("/")
    stem = name.rsplit(".", 1)[0] if "." in name and not name.endswith(".qrels") else name
    return f"{folder}{slash}{stem}.qrels{mark}{options}"


def _judgements(searched: Artifact) -> pa.Table | None:
    """The qrels of a search's or evaluation's queries; None if they are not judged."""
    manifest = searched.manifest or {"inputs": {}, "stage": {}, "tables": {}}
    split = manifest["stage"].get("split")
    for field in ("data", "queries"):
        source = manifest["inputs"].get(field)
        present = ((Artifact(searched.runs, source).manifest or {}).get("tables") or {}) if source else {}
        splits = [name.removeprefix("qrels.") for name in present if name.startswith("qrels.")]
        name = f"qrels.{tables.split_of(splits, split)}" if split else "qrels"
        if source and name in present:
            rows = Artifact(searched.runs, source).read(name)
            if "metrics" in manifest["tables"]:
                evaluated = searched.read("metrics", ["query_id"])["query_id"].drop_null().unique()
                rows = rows.filter(pc.is_in(rows["query_id"], value_set=evaluated))
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
