"""Reports the leaks that a study's gates found: counts by mechanism, examples, and scores without leaked test queries."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.leakage.joins import COMMON
from dagr_ray.report.arms import TrialResult
from dagr_ray.report.lineage import Folders

EXAMPLES = 3  # of each kind and mechanism
LEAKED_QUERIES = ("query-query", "exemplar-query")  # kinds of leaks that affect a test query


def leaks(folders: Folders, rows: list[TrialResult], generators: list[Json], measure: str) -> list[Json]:
    """An entry for each generator whose data passed through a leak gate."""
    entries = []
    for generator in generators:
        chain = folders.ancestors(generator["mined"])
        gate = next(
            (n for n in reversed(chain) if {"leaks", "queries"} <= set(folders.manifest_or_empty(n)["tables"])), None
        )
        if gate is None:
            continue
        counts = folders.manifest_or_empty(gate)["counts"]
        leaked = folders.read_or(gate, _LeakTable, None)
        if leaked is None:
            continue
        arms = [row for row in rows if row.kind == "augmented" and row.arm.mined == generator["mined"] and row.scores]
        entries.append(
            {
                "generator": generator["generator"],
                "folder": gate,
                "queries": counts.get("in", 0),
                "dropped": counts.get("in", 0) - counts.get("out", 0),
                "drop": folders.manifest_or_empty(gate)["stage"].get("drop", []),
                **_bounds(folders, gate),
                "kinds": leaked.described(),
                "arms": [line for arm in arms for line in _with_and_without(arm, leaked, measure)],
            }
        )
    return entries


def _bounds(folders: Folders, gate: str) -> Json:
    """``common``: how many word n-grams of the held-out texts are boilerplate, which is not used to find leaks.
    ``left_out``: pairs that are not listed because each of their texts resembles other texts more.
    """
    counts = folders.manifest_or_empty(next(iter(folders.inputs_with(gate, "leak-scan")), ""))["counts"]
    common: Counter[str] = Counter()
    for kinds in counts.get("common", {}).values():
        for of in kinds.values():
            common.update(of)
    return {"common": dict(common) | {"limit": COMMON}, "left_out": sum(counts.get("left_out", {}).values())}


class _LeakTable:
    """A summary of a table of leaks, read part by part. All rows of a training query are in one part."""

    def __init__(self, gate: Artifact) -> None:
        self.pairs, self.texts = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self.held_out: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        self.examples: dict[tuple[str, str], list[Json]] = defaultdict(list)
        # by the data's fingerprint, which ends its folder's name: the rest of the name may differ for the same data
        self.touched: dict[str, set[str]] = defaultdict(set)
        for part in gate.scan("leaks"):
            for kind, mechanism in {
                (r["kind"], r["mechanism"]) for r in part.select(["kind", "mechanism"]).to_pylist()
            }:
                rows = part.filter(pc.and_(pc.equal(part["kind"], kind), pc.equal(part["mechanism"], mechanism)))
                self._add(kind, mechanism, rows)

    def _add(self, kind: str, mechanism: str, rows: pa.Table) -> None:
        key = kind, mechanism
        self.pairs[key] += rows.num_rows
        self.texts[key] += pc.count_distinct(rows["id"]).as_py()
        held = set(zip(rows["data"].to_pylist(), rows["held_out_id"].to_pylist(), strict=True))
        self.held_out[key] |= held
        if kind in LEAKED_QUERIES:
            for data, query_id in held:
                self.touched[data.rpartition("-")[2]].add(query_id)
        best = rows.sort_by([("score", "descending"), ("id", "ascending"), ("held_out_id", "ascending")]).slice(
            0, EXAMPLES
        )
        shown = self.examples[key] + best.select(["id", "held_out_id", "score", "text", "held_out"]).to_pylist()
        self.examples[key] = sorted(shown, key=lambda r: (-r["score"], r["id"], r["held_out_id"]))[:EXAMPLES]

    def described(self) -> list[Json]:
        """Counts of pairs and texts by kind and mechanism, with examples."""
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


def _with_and_without(row: TrialResult, leaked: _LeakTable, measure: str) -> list[Json]:
    """A line for each data set: the mean over all test queries, and over the queries without a leak."""
    lines = []
    for name, scores in row.scores.items():
        touched = leaked.touched[str(row.judged_by_name.get(name, {}).get("data"))]
        values = scores.get(measure, {})
        untouched = [value for query_id, value in values.items() if query_id not in touched]
        lines.append(
            {
                "set": name,
                "trial": row.id,
                "base": row.base,
                "label": row.label,
                "used": row.arm.used,
                "queries": len(values),
                "touched": len(values) - len(untouched),
                "mean": float(np.mean(list(values.values()))) if values else None,
                "untouched": float(np.mean(untouched)) if untouched else None,
            }
        )
    return lines
