"""Traces a generated row back to its passage, prompt, raw output, scores and price. Also samples rows for the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Damaged, Json, folders_of
from dagr_ray.core.config import ConfigError
from dagr_ray.core.joins import rows_with
from dagr_ray.core.stage import load_stage
from dagr_ray.report.lineage import Folders


def trace(runs: str, row_id: str) -> Json:
    """The origin of the row with this query_id or gen_id, and its result in every folder of ``runs``.

    Raises ConfigError if no folder has the row.
    """
    folders = Folders(runs)
    names = _complete(folders)
    for name in names:
        if folders.role(name) != "parse":
            continue
        lineage = _rows_if_sound(folders, name, "lineage", "id", [row_id]) or _rows_if_sound(
            folders, name, "lineage", "gen_id", [row_id]
        )
        if lineage:
            return _trace_row(folders, names, name, lineage[0]["gen_id"], lineage[0]["id"])
        if row_id in {r["id"] for r in _rows_if_sound(folders, name, "rejected", "id", [row_id])}:
            return _trace_row(folders, names, name, row_id, None)
    raise ConfigError(
        f"no generated row {row_id!r} in {runs!r}; give a query_id or gen_id, such as `dagr show FOLDER --table examples` lists"
    )


def _complete(folders: Folders) -> list[str]:
    return [name for name, _ in folders_of(folders.runs) if folders.manifest(name) is not None]


def _rows_if_sound(folders: Folders, name: str, table: str, key: str, values: list[str]) -> list[dict[str, Any]]:
    """``_rows`` of a folder; none if the folder is damaged."""
    return folders.read_or(name, lambda artifact: _rows(artifact, table, key, values), [])


def _rows(artifact: Artifact, table: str, key: str, values: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a table whose ``key`` is one of ``values``; none if the folder has no such table."""
    if table not in artifact.table_names():
        return []
    return rows_with(artifact, table, key, values).to_pylist()


def _trace_row(folders: Folders, names: list[str], parsed: str, gen_id: str, query_id: str | None) -> Json:
    [generation] = folders.main(parsed)
    manifest = folders.manifest_or_empty(generation)
    row = _rows(folders.artifact(generation), "generations", "gen_id", [gen_id])[0]
    [corpus] = folders.main(generation)
    prompts = Prompts(folders, generation)
    queries = _rows(folders.artifact(parsed), "queries", "query_id", [query_id]) if query_id else []
    result: Json = {
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
        if query_id and folders.role(name) == "score" and folders.main(name) == [parsed]:
            for score in _rows_if_sound(folders, name, "scores", "query_id", [query_id]):
                result["scores"][score["scorer"]] = score["score"]
        descends = parsed in folders.ancestors(name)
        if descends:
            result["rejected"] += [r | {"folder": name} for r in _rows_if_sound(folders, name, "rejected", "id", ids)]
        if descends and query_id and (used := _rows_if_sound(folders, name, "examples", "query_id", [query_id])):
            result["used_by"].append(name)
            result["negatives"] = used[0]["negative_ids"]
    trained = [n for n in names if folders.role(n) == "train" and set(folders.main(n)) & set(result["used_by"])]
    result["used_by"] += trained
    result["price"] = _price(folders, generation, result["used_by"])
    result["folders"] = folders.ancestors(parsed)
    return result


def _price(folders: Folders, generation: str, used_by: list[str]) -> Json:
    """Dollars for one completion, and for one accepted row of each set of examples that contains the row."""
    manifest = folders.manifest_or_empty(generation)
    completions = manifest["tables"]["generations"]["rows"]
    spent = folders.sums([generation])
    prices = {"completion": spent["price"] / completions if completions else 0.0}
    mined = [n for n in used_by if folders.role(n) == "mine"]
    for name in mined:
        rows = folders.manifest_or_empty(name)["tables"]["examples"]["rows"]
        prices[f"accepted row of {name}"] = folders.sums(folders.ancestors(name))["price"] / rows
    return prices


def passages(corpus: Artifact, ids: Iterable[str]) -> dict[str, Json]:
    """doc_id -> title and text, from a corpus or from the pairs that a generation read. Unknown ids are left out."""
    rows = [row for table in ("corpus", "pairs") for row in _rows(corpus, table, "doc_id", ids)]
    return {row["doc_id"]: {k: row[k] for k in ("doc_id", "title", "text")} for row in rows}


class Prompts:
    """The prompts of a folder of completions, rebuilt from its configuration and compared with their stored hashes."""

    def __init__(self, folders: Folders, generation: str) -> None:
        self.folders, self.generation = folders, generation

    def of(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """gen_id -> prompt of some ``generations``. If this version words a prompt differently, a note takes its place."""
        artifact = self.folders.artifact(self.generation)
        inputs = {
            n: self.folders.artifact(f) for n, f in self.folders.manifest_or_empty(self.generation)["inputs"].items()
        }
        prompts: dict[str, str] = {}
        for sample in {row["sample"] for row in rows}:
            by_source = {row["source_id"]: row for row in rows if row["sample"] == sample}
            try:
                texts = load_stage(artifact).prompts(inputs, list(by_source), sample)  # type: ignore[attr-defined]
            except (ConfigError, OSError, AttributeError, Damaged) as error:
                return {row["gen_id"]: f"(the prompt cannot be rebuilt here: {error})" for row in rows}
            for source_id, text in texts.items():
                same = tables.prompt_sha(text) == by_source[source_id]["prompt_sha"]
                prompts[by_source[source_id]["gen_id"]] = (
                    text if same else "(this version words the prompt differently)"
                )
        return prompts


def samples(folders: Folders, generator: Json, accepted: int = 6, rejected: int = 10) -> list[Json]:
    """Some rows of a generator for people to read: accepted ones, and refused ones with one of each reason first.

    ``generator`` is an entry of a summary's ``generators``.
    """
    mined = generator["mined"]
    chain = folders.ancestors(mined)
    generation = generator["folder"]
    parsed = next((n for n in chain if folders.role(n) == "parse" and folders.main(n) == [generation]), None)
    if parsed is None:
        return []
    rejections = [r for n in reversed(chain) for r in _first(folders, n, "rejected")]
    # human pairs have no completion; among this many rows enough are generated
    examples = sorted(_first(folders, mined, "examples"), key=lambda r: r["query_id"])[: 100 * accepted]
    accepted_ids = list(
        dict.fromkeys(i for r in examples for i in (r["query_id"], r["positive_id"], *r["negative_ids"]))
    )
    artifact, written = folders.artifact(parsed), folders.artifact(generation)
    gen_of = {
        r["id"]: r["gen_id"] for r in _rows(artifact, "lineage", "id", [*accepted_ids, *(r["id"] for r in rejections)])
    }
    accepted_ids = [query_id for query_id in accepted_ids if query_id in gen_of][:accepted]
    known = {r["gen_id"] for r in _rows(written, "generations", "gen_id", [r["id"] for r in rejections])}
    chosen: list[tuple[str, str | None, Json | None]] = [(gen_of[i], i, None) for i in accepted_ids]
    rejected_rows = [
        (gen_of.get(r["id"], r["id"]), r["id"] if r["id"] in gen_of else None, r)
        for r in sorted(rejections, key=lambda r: r["id"])
        if r["id"] in gen_of or r["id"] in known
    ]
    chosen += list(_one_of_each(rejected_rows))[:rejected]
    ids = [i for _, i, _ in chosen if i]
    text_of = {r["query_id"]: r["text"] for r in _rows(artifact, "queries", "query_id", ids)}
    text_of |= {r["doc_id"]: r["text"] for r in _rows(artifact, "corpus", "doc_id", ids)}
    rows = {r["gen_id"]: r for r in _rows(written, "generations", "gen_id", [g for g, _, _ in chosen])}
    sources = list({r["source_id"] for r in rows.values()})
    text = passages(folders.artifact(folders.main(generation)[0]), sources)
    prompts = Prompts(folders, generation).of(list(rows.values()))
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
    """The first rows of a table, as a pool to choose from."""
    artifact = folders.artifact(name)
    return artifact.slice(table, 0, rows).to_pylist() if table in artifact.table_names() else []


def _one_of_each(rows: list[tuple[str, str | None, Json]]) -> Iterator[tuple[str, str | None, Json]]:
    """Rows in turn: first one row of each reason, then the next row of each reason, and so on."""
    groups: dict[str, list[tuple[str, str | None, Json]]] = {}
    for row in rows:
        groups.setdefault(f"{row[2]['by']}/{row[2]['reason']}", []).append(row)
    longest = max(map(len, groups.values()), default=0)
    for i in range(longest):
        yield from (group[i] for group in groups.values() if i < len(group))
