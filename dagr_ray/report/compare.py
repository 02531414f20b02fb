"""Compares runs on the same judgements: means, differences with intervals and tests, queries won and lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import ConfigError
from dagr_ray.core.paths import is_same
from dagr_ray.core.storage import filesystem
from dagr_ray.formats import beir, trec
from dagr_ray.report import stats
from dagr_ray.report.verdict import QUERIES, is_gain, is_loss, p_text, signed
from dagr_ray.stages.evaluate import MEASURES, Qrels, as_qrels, measure, rankings

CHANGED_QUERIES = 10
# A smaller difference is due to rounding.
ROUNDING = 1e-9


class Judgements(NamedTuple):
    """Judgements to evaluate runs with: the name of the data, the qrels, and the texts of queries if known."""

    name: str
    qrels: Qrels
    texts: dict[str, str]


def load_judgements(data: str, split: str) -> Judgements:
    """The judgements of a folder's split, or of a file (TREC or BEIR). Raises ConfigError if there are none."""
    fs, path = filesystem(data)
    if fs.get_file_info(path).is_file:
        qrels = beir.read_qrels_file(data)
        if not qrels.num_rows:
            raise ConfigError(f"{data!r} has no judgements; give a file of judgements, or the folder of a collection")
        return Judgements(data, as_qrels(qrels), {})
    qrels, queries = beir.read_qrels(data, split)
    if not qrels.num_rows:
        raise ConfigError(f"split {split!r} of {data!r} has no judgements; choose another --split")
    return Judgements(f"{data} ({split})", as_qrels(qrels), tables.texts_of(queries))


def load_runs(words: Sequence[str], find: Callable[[str], Artifact]) -> dict[str, pa.Table]:
    """The ``candidates`` of TREC run files and of folders (looked up with ``find``), by name."""
    runs: dict[str, pa.Table] = {}
    for word in words:
        fs, path = filesystem(word)
        if fs.get_file_info(path).is_file:
            name, table = word, trec.read_run(word).table
        else:
            folder = find(word)
            name = folder.name
            if folder.manifest is None or "candidates" not in folder.table_names():
                raise ConfigError(
                    f"{folder.name} has no table 'candidates'; give a run file, an evaluate or search folder"
                )
            table = folder.read("candidates")
        if any(is_same(name, other) for other in runs):
            raise ConfigError(f"the run {name!r} is given twice; give each once")
        runs[name] = table
    return runs


def compare(data: Judgements, systems: Mapping[str, pa.Table], shown: str = MEASURES[0]) -> Json:
    """Each system's measures with 95 % intervals and, except for the first system, its differences to the first.

    A difference has a paired bootstrap interval, the p value of a paired randomisation test, and this p value after Holm's
    correction over all systems (``p_holm``); see ``stats``. The sample is the queries: a query without results scores 0.
    ``changes`` lists the queries won, lost and tied by the measure ``shown``, and the ten queries that changed most.
    """
    if shown not in MEASURES:
        raise ConfigError(f"measure = {shown!r}; allowed: {', '.join(MEASURES)}")
    queries, first = sorted(data.qrels), next(iter(systems))
    runs: list[Json] = []
    columns = []
    for name, table in systems.items():
        hits, itself = rankings(table, data.qrels)
        values = measure(data.qrels, hits)
        columns.append(np.array([[values[m][q] for m in MEASURES] for q in queries]))
        runs.append({"run": name, "no_hits": len(queries) - len(hits), "itself": itself, "scores": {}})
    cells = np.stack(columns, axis=2)  # [queries, measures, systems]
    boots = stats.resampled_means(cells.reshape(len(queries), -1)).reshape(-1, len(MEASURES), len(runs))
    for i, name in enumerate(MEASURES):
        gains = cells[:, i, 1:] - cells[:, i, :1]
        p = stats.randomisation_p(gains).tolist()
        for j, run in enumerate(runs):
            low, high = stats.interval(boots[:, i, j])
            run["scores"][name] = score = {"mean": float(cells[:, i, j].mean()), "low": low, "high": high}
            if j:
                low, high = stats.interval(boots[:, i, j] - boots[:, i, 0])
                score |= {"delta": float(gains[:, j - 1].mean()), "delta_low": low, "delta_high": high}
                score |= {"p": p[j - 1], "p_holm": stats.holm(p)[j - 1]}
    at = MEASURES.index(shown)
    for j, run in enumerate(runs[1:], 1):
        run["changes"] = changed_queries(queries, cells[:, at, 0], cells[:, at, j], data.texts)
    return {
        "data": data.name,
        "queries": len(queries),
        "baseline": first,
        "measure": shown,
        "measures": list(MEASURES),
        "runs": runs,
    }


def changed_queries(
    queries: Sequence[str], before: stats.Floats, after: stats.Floats, texts: Mapping[str, str]
) -> Json:
    """Queries won, lost and tied, and the ten queries that changed most, with their texts if known."""
    gains = after - before
    most = [i for i in np.argsort(-np.abs(gains), kind="stable")[:CHANGED_QUERIES] if abs(gains[i]) > ROUNDING]
    return {
        "won": int((gains > ROUNDING).sum()),
        "lost": int((gains < -ROUNDING).sum()),
        "same": int((np.abs(gains) <= ROUNDING).sum()),
        "queries": [
            {
                "query_id": queries[i],
                "text": texts.get(queries[i], ""),
                "before": float(before[i]),
                "after": float(after[i]),
            }
            for i in most
        ],
    }


def text(comparison: Json) -> str:
    """A comparison for the terminal. A star marks gains and losses that are significant after correction."""
    names, shown = comparison["measures"], comparison["measure"]
    wide = max(len(run["run"]) for run in comparison["runs"])
    lines = [f"{comparison['data']}: {comparison['queries']:,} judged queries", ""]
    lines.append("  ".join(["run".ljust(wide), *(name.rjust(10) for name in names)]))
    for run in comparison["runs"]:
        cells = [f"{run['scores'][name]['mean']:.4f}".rjust(10) for name in names]
        lines.append("  ".join([run["run"].ljust(wide), *cells]))
    for run in comparison["runs"][1:]:
        lines += ["", f"{run['run']} over {comparison['baseline']}:"]
        for name in names:
            score = run["scores"][name]
            star = "*" if is_gain(score) or is_loss(score) else ""
            between = f"95 % CI {signed(score['delta_low'])} to {signed(score['delta_high'])}"
            lines.append(f"  {name:<10}  {signed(score['delta'])}, {between}, {p_text(score['p_holm'])}{star}")
        own = run["changes"]
        lines.append(
            f"  by {shown}: {own['won']} queries won, {own['lost']} lost, {own['same']} tied; the most changed:"
        )
        for query in own["queries"]:
            words = " ".join((query["text"] or query["query_id"]).split())[:90]
            lines.append(f"    {query['before']:.3f} -> {query['after']:.3f}  {words}")
    if len(comparison["runs"]) > 2:
        lines += ["", f"p by paired randomisation, corrected (Holm) for {len(comparison['runs']) - 1} runs"]
    if comparison["queries"] < QUERIES:
        lines.append("note: there are too few judged queries: a difference outside the intervals is still possible")
    for run in comparison["runs"]:
        if run["no_hits"]:
            lines.append(f"note: {run['run']} has no results for {run['no_hits']:,} judged queries; they score 0")
    return "\n".join(lines)
