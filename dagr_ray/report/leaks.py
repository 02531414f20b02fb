"""What the leak gates of a study found: counts by mechanism, examples, and the scores without the touched test queries."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.leakage.joins import COMMON
from dagr_ray.report.arms import Row
from dagr_ray.report.lineage import Folders

EXAMPLES = 3  # of each kind and mechanism
ASKED = ("query-query", "exemplar-query")  # kinds by which a test query is touched


def leaks(folders: Folders, rows: list[Row], generators: list[Json], measure: str) -> list[Json]:
    """An entry for each generator whose data went through a gate."""
    found = []
    for generator in generators:
        chain = folders.ancestors(generator["mined"])
        gate = next((n for n in reversed(chain) if {"leaks", "queries"} <= set(folders.found(n)["tables"])), None)
        if gate is None:
            continue
        counts = folders.found(gate)["counts"]
        seen = folders.soundly(gate, _Seen, None)
        if seen is None:
            continue
        arms = [row for row in rows if row.kind == "augmented" and row.arm.mined == generator["mined"] and row.scores]
        found.append(
            {
                "generator": generator["generator"],
                "folder": gate,
                "queries": counts.get("in", 0),
                "dropped": counts.get("in", 0) - counts.get("out", 0),
                "drop": folders.found(gate)["stage"].get("drop", []),
                **_bounds(folders, gate),
                "kinds": seen.described(),
                "arms": [line for arm in arms for line in _with_and_without(arm, seen, measure)],
            }
        )
    return found


def _bounds(folders: Folders, gate: str) -> Json:
    """``common``: how much of the held-out texts is boilerplate, by which nothing is found; ``left_out``: pairs that are not
    listed, because each of their texts resembles others more.
    """
    counts = folders.found(folders.found(gate)["inputs"].get("scan", ""))["counts"]
    common: Counter[str] = Counter()
    for kinds in counts.get("common", {}).values():
        for of in kinds.values():
            common.update(of)
    return {"common": dict(common) | {"limit": COMMON}, "left_out": sum(counts.get("left_out", {}).values())}


class _Seen:
    """A table of leaks, read part by part: a training query's rows stand in one part."""

    def __init__(self, gate: Artifact) -> None:
        self.pairs, self.texts = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self.held_out: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        self.examples: dict[tuple[str, str], list[Json]] = defaultdict(list)
        # the data's fingerprint ends its folder's name; what stands before it may be another name of the same data
        self.touched: dict[str, set[str]] = defaultdict(set)
        for part in gate.scan("leaks"):
            for kind, mechanism in {
                (r["kind"], r["mechanism"]) for r in part.select(["kind", "mechanism"]).to_pylist()
            }:
                mine = part.filter(pc.and_(pc.equal(part["kind"], kind), pc.equal(part["mechanism"], mechanism)))
                self._add(kind, mechanism, mine)

    def _add(self, kind: str, mechanism: str, rows: pa.Table) -> None:
        key = kind, mechanism
        self.pairs[key] += rows.num_rows
        self.texts[key] += pc.count_distinct(rows["id"]).as_py()
        held = set(zip(rows["data"].to_pylist(), rows["held_out_id"].to_pylist(), strict=True))
        self.held_out[key] |= held
        if kind in ASKED:
            for data, query_id in held:
                self.touched[data.rpartition("-")[2]].add(query_id)
        best = rows.sort_by([("score", "descending"), ("id", "ascending"), ("held_out_id", "ascending")]).slice(
            0, EXAMPLES
        )
        shown = self.examples[key] + best.select(["id", "held_out_id", "score", "text", "held_out"]).to_pylist()
        self.examples[key] = sorted(shown, key=lambda r: (-r["score"], r["id"], r["held_out_id"]))[:EXAMPLES]

    def described(self) -> list[Json]:
        """Rows by kind and mechanism, how many texts of each side they are, and some to read."""
        return [
            {
                "kind": key[0],
                "mechanism": key[1],
                "pairs": pairs,
                "texts": self.texts[key],
                "held_out": len(self.held_out[key]),
                "examples": self.examples[key],
            }
            for key, pairs in sorted(self.pairs.items())
        ]


def _with_and_without(row: Row, seen: _Seen, measure: str) -> list[Json]:
    """A line for each data set: the mean over all test queries, and over those that nothing touches."""
    found = []
    for name, scores in row.scores.items():
        touched = seen.touched[str(row.judged_by_name.get(name, {}).get("data"))]
        values = scores.get(measure, {})
        left = [value for query_id, value in values.items() if query_id not in touched]
        found.append(
            {
                "set": name,
                "trial": row.id,
                "base": row.base,
                "label": row.label,
                "used": row.arm.used,
                "queries": len(values),
                "touched": len(values) - len(left),
                "mean": float(np.mean(list(values.values()))) if values else None,
                "untouched": float(np.mean(left)) if left else None,
            }
        )
    return found
