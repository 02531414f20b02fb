"""One generated row back to its passage, prompt, raw output, scores, fate and price. Also what the page shows of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Damaged, Json, folders_of
from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import load_stage
from dagr_ray.report.lineage import Folders


def trace(runs: str, row_id: str) -> Json:
    """Where the row with this query_id or gen_id came from and what became of it in every folder of ``runs``.

    Raises ConfigError where no folder holds it.
    """
    folders = Folders(runs)
    names = _complete(folders)
    for name in names:
        manifest = folders.found(name)
        if "generations" not in manifest["inputs"] or "lineage" not in manifest["tables"]:
            continue
        found = _some(folders, name, "lineage", "id", [row_id]) or _some(folders, name, "lineage", "gen_id", [row_id])
        if found:
            return _traced(folders, names, name, found[0]["gen_id"], found[0]["id"])
        if row_id in {r["id"] for r in _some(folders, name, "rejected", "id", [row_id])}:
            return _traced(folders, names, name, row_id, None)
    raise ConfigError(
        f"no generated row {row_id!r} in {runs!r}; give a query_id or gen_id, such as `dagr show FOLDER --table examples` lists"
    )


def _complete(folders: Folders) -> list[str]:
    return [name for name, _ in folders_of(folders.runs) if folders.manifest(name) is not None]


def _some(folders: Folders, name: str, table: str, key: str, values: list[str]) -> list[dict[str, Any]]:
    """``_rows`` of one folder of many: one that is damaged is left out."""
    return folders.soundly(name, lambda artifact: _rows(artifact, table, key, values), [])


def _rows(artifact: Artifact, table: str, key: str, values: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a table whose ``key`` is one of ``values``; none where the folder has no such table."""
    if table not in artifact.table_names():
        return []
    wanted = pa.array(list(values), tables.TEXT)
    parts = [part.filter(pc.is_in(part[key], value_set=wanted)) for part in artifact.scan(table)]
    return pa.concat_tables([tables.empty(table), *parts]).to_pylist()


def _traced(folders: Folders, names: list[str], parsed: str, gen_id: str, query_id: str | None) -> Json:
    generated = folders.found(parsed)["inputs"]["generations"]
    manifest = folders.found(generated)
    row = _rows(folders.artifact(generated), "generations", "gen_id", [gen_id])[0]
    corpus = manifest["inputs"]["corpus"]
    prompts = Prompts(folders, generated)
    queries = _rows(folders.artifact(parsed), "queries", "query_id", [query_id]) if query_id else []
    found: Json = {
        "id": query_id or gen_id,
        "query": queries[0]["text"] if queries else None,
        "passage": passages(folders.artifact(corpus), [row["source_id"]]).get(row["source_id"]),
        "prompt": prompts.of([row]).get(gen_id),
        "raw": row["raw"],
        "made_by": manifest["stage"]["strategy"]
        | {"engine": manifest["stage"]["engine"], "sampling": manifest["stage"]["sampling"]},
        "generation": {k: v for k, v in row.items() if k != "raw"},
        "scores": {},
        "rejected": [],
        "negatives": [],
        "used_by": [],
    }
    ids = [i for i in (query_id, gen_id) if i]
    for name in names:
        inputs = folders.found(name)["inputs"]
        if inputs.get("parsed") == parsed and query_id:
            for score in _some(folders, name, "scores", "query_id", [query_id]):
                found["scores"][score["scorer"]] = score["score"]
        mine = parsed in folders.ancestors(name)
        if mine:
            found["rejected"] += [r | {"folder": name} for r in _some(folders, name, "rejected", "id", ids)]
        if mine and query_id and (used := _some(folders, name, "examples", "query_id", [query_id])):
            found["used_by"].append(name)
            found["negatives"] = used[0]["negative_ids"]
    trained = [n for n in names if folders.found(n)["inputs"].get("examples") in found["used_by"]]
    found["used_by"] += trained
    found["price"] = _price(folders, generated, found["used_by"])
    found["folders"] = folders.ancestors(parsed)
    return found


def _price(folders: Folders, generated: str, used_by: list[str]) -> Json:
    """Dollars for one completion, and for one accepted row of each set of examples that the row is in."""
    manifest = folders.found(generated)
    completions = manifest["tables"]["generations"]["rows"]
    spent = folders.sums([generated])
    found = {"completion": spent["price"] / completions if completions else 0.0}
    mined = [n for n in used_by if "selected" in folders.found(n)["inputs"]]
    for name in mined:
        rows = folders.found(name)["tables"]["examples"]["rows"]
        found[f"accepted row of {name}"] = folders.sums(folders.ancestors(name))["price"] / rows
    return found


def passages(corpus: Artifact, ids: Iterable[str]) -> dict[str, Json]:
    """doc_id -> title and text, for those that the corpus has, or the pairs that were asked about."""
    found = [row for table in ("corpus", "pairs") for row in _rows(corpus, table, "doc_id", ids)]
    return {row["doc_id"]: {k: row[k] for k in ("doc_id", "title", "text")} for row in found}


class Prompts:
    """The prompts of a folder of completions, made again from its configuration and checked against their stored hashes."""

    def __init__(self, folders: Folders, generated: str) -> None:
        self.folders, self.generated = folders, generated

    def of(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """gen_id -> prompt of some ``generations``. In place of one that this version would word otherwise, a note of that."""
        artifact = self.folders.artifact(self.generated)
        inputs = {n: self.folders.artifact(f) for n, f in self.folders.found(self.generated)["inputs"].items()}
        found: dict[str, str] = {}
        for sample in {row["sample"] for row in rows}:
            asked = {row["source_id"]: row for row in rows if row["sample"] == sample}
            try:
                made = load_stage(artifact).prompts(inputs, list(asked), sample)  # type: ignore[attr-defined]
            except (ConfigError, OSError, AttributeError, Damaged) as error:
                return {row["gen_id"]: f"(cannot be made again here: {error})" for row in rows}
            for source_id, text in made.items():
                same = _sha(text) == asked[source_id]["prompt_sha"]
                found[asked[source_id]["gen_id"]] = text if same else "(this version words the prompt otherwise)"
        return found


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def samples(folders: Folders, generator: Json, accepted: int = 6, rejected: int = 10) -> list[Json]:
    """Some rows of a generator for people to read: accepted ones, and refused ones with one of each reason first.

    ``generator`` is an entry of a summary's ``generators``.
    """
    mined = generator["mined"]
    chain = folders.ancestors(mined)
    generated = generator["folder"]
    parsed = next((n for n in chain if folders.found(n)["inputs"].get("generations") == generated), None)
    if parsed is None:
        return []
    refusals = [r for n in reversed(chain) for r in _first(folders, n, "rejected")]
    # some may be people's, which have no completion: of many rows enough are generated
    examples = sorted(_first(folders, mined, "examples"), key=lambda r: r["query_id"])[: 100 * accepted]
    kept = list(dict.fromkeys(i for r in examples for i in (r["query_id"], r["positive_id"], *r["negative_ids"])))
    artifact, written = folders.artifact(parsed), folders.artifact(generated)
    gen_of = {r["id"]: r["gen_id"] for r in _rows(artifact, "lineage", "id", [*kept, *(r["id"] for r in refusals)])}
    kept = [query_id for query_id in kept if query_id in gen_of][:accepted]
    known = {r["gen_id"] for r in _rows(written, "generations", "gen_id", [r["id"] for r in refusals])}
    chosen: list[tuple[str, str | None, Json | None]] = [(gen_of[i], i, None) for i in kept]
    refused = [
        (gen_of.get(r["id"], r["id"]), r["id"] if r["id"] in gen_of else None, r)
        for r in sorted(refusals, key=lambda r: r["id"])
        if r["id"] in gen_of or r["id"] in known
    ]
    chosen += list(_one_of_each(refused))[:rejected]
    ids = [i for _, i, _ in chosen if i]
    text_of = {r["query_id"]: r["text"] for r in _rows(artifact, "queries", "query_id", ids)}
    text_of |= {r["doc_id"]: r["text"] for r in _rows(artifact, "corpus", "doc_id", ids)}
    rows = {r["gen_id"]: r for r in _rows(written, "generations", "gen_id", [g for g, _, _ in chosen])}
    sources = list({r["source_id"] for r in rows.values()})
    text = passages(folders.artifact(folders.found(generated)["inputs"]["corpus"]), sources)
    prompts = Prompts(folders, generated).of(list(rows.values()))
    return [
        {
            "id": query_id or gen_id,
            "query": text_of.get(query_id) if query_id else None,
            "passage": text.get(rows[gen_id]["source_id"]),
            "prompt": prompts.get(gen_id),
            "raw": rows[gen_id]["raw"],
            "accepted": why is None,
            "why": f"{why['by']}: {why['reason']}" if why else None,
            "detail": why["detail"] if why else None,
        }
        for gen_id, query_id, why in chosen
    ]


def _first(folders: Folders, name: str, table: str, rows: int = 20_000) -> list[dict[str, Any]]:
    """The first rows of a table, enough to choose from."""
    artifact = folders.artifact(name)
    return artifact.slice(table, 0, rows).to_pylist() if table in artifact.table_names() else []


def _one_of_each(refused: list[tuple[str, str | None, Json]]) -> Iterator[tuple[str, str | None, Json]]:
    """Rows in turn: one of each reason, then the next of each."""
    groups: dict[str, list[tuple[str, str | None, Json]]] = {}
    for row in refused:
        groups.setdefault(f"{row[2]['by']}/{row[2]['reason']}", []).append(row)
    longest = max(map(len, groups.values()), default=0)
    for i in range(longest):
        yield from (group[i] for group in groups.values() if i < len(group))
