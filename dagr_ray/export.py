"""Finished folders in other tools' formats: BEIR folders, sentence-transformers JSONL, TREC runs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dagr_ray import beir, tables
from dagr_ray.artifact import Artifact, filesystem
from dagr_ray.config import ConfigError


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
    """JSON lines with ``anchor``, ``positive``, ``negative_1``..: what SentenceTransformerTrainer takes."""
    examples = ancestor(folder, "examples").read("examples").to_pylist()
    queries = dict(
        zip(*ancestor(folder, "queries").read("queries", ["query_id", "text"]).to_pydict().values(), strict=True)
    )
    corpus = {
        row["doc_id"]: tables.passage_text(row["title"], row["text"])
        for part in whole_corpus(folder).scan("corpus")
        for row in part.to_pylist()
    }

    def lines() -> Iterator[str]:
        for row in examples:
            record = {"anchor": queries[row["query_id"]], "positive": corpus[row["positive_id"]]}
            record |= {f"negative_{i}": corpus[doc_id] for i, doc_id in enumerate(row["negative_ids"], 1)}
            yield json.dumps(record, ensure_ascii=False)

    return {target: _write_lines(target, lines())}


def to_trec(folder: Artifact, runs: str, target: str) -> dict[str, int]:
    """A TREC run file of a folder's candidates: query id, Q0, doc id, rank, score, tag."""
    rows = ancestor(folder, "candidates").read("candidates").to_pylist()
    tag = folder.name
    lines = (f"{r['query_id']} Q0 {r['doc_id']} {r['rank']} {r['score']:.6f} {tag}" for r in rows)
    return {target: _write_lines(target, lines)}


def _write_lines(target: str, lines: Iterator[str]) -> int:
    fs, path = filesystem(target)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    count = 0
    with fs.open_output_stream(path) as stream:
        for line in lines:
            stream.write(line.encode() + b"\n")
            count += 1
    return count
