"""Runs beside each other on the same judgements: means, differences with intervals and tests, queries won and lost."""

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

SHOWN = 10
# A difference smaller than this is one of rounding.
SAME = 1e-9


class Judged(NamedTuple):
    """What runs are judged by: the name of the data, the judgements, and the wording of queries where it is known."""

    name: str
    qrels: Qrels
    texts: dict[str, str]


def judged(data: str, split: str) -> Judged:
    """The judgements of a folder's split, or of a file (TREC's or BEIR's). Raises ConfigError where there are none."""
    fs, path = filesystem(data)
    if fs.get_file_info(path).is_file:
        qrels = beir.judgement_file(data)
        if not qrels.num_rows:
            raise ConfigError(f"{data!r} has no judgement; give a file of judgements, or the folder of a collection")
        return Judged(data, as_qrels(qrels), {})
    qrels, queries = beir.judgements(data, split)
    if not qrels.num_rows:
        raise ConfigError(f"split {split!r} of {data!r} has no judgement; give another --split")
    return Judged(f"{data} ({split})", as_qrels(qrels), tables.texts_of(queries))


def named(words: Sequence[str], find: Callable[[str], Artifact]) -> dict[str, pa.Table]:
    """``candidates`` by name: of TREC run files, and of folders (which ``find`` gives) that hold some."""
    found: dict[str, pa.Table] = {}
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
        if any(is_same(name, other) for other in found):
            raise ConfigError(f"the run {name!r} is given twice; give each once")
        found[name] = table
    return found


def compare(data: Judged, systems: Mapping[str, pa.Table], shown: str = MEASURES[0]) -> Json:
    """Each system's measures with 95 % intervals and, but for the first, its differences to the first.

    A difference has a paired bootstrap interval, the p of a paired randomisation test, and that p corrected by Holm over
    all systems (``p_holm``); see ``stats``. Queries are the sample: a query without results scores 0. ``changes`` holds
    the queries won, lost and tied by the measure ``shown``, and the ten that changed most.
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
        run["changes"] = changed(queries, cells[:, at, 0], cells[:, at, j], data.texts)
    return {
        "data": data.name,
        "queries": len(queries),
        "baseline": first,
        "measure": shown,
        "measures": list(MEASURES),
        "runs": runs,
    }


def changed(queries: Sequence[str], before: stats.Floats, after: stats.Floats, texts: Mapping[str, str]) -> Json:
    """Queries won, lost and tied, and the ten that changed most, with their wording where it is known."""
    gains = after - before
    most = [i for i in np.argsort(-np.abs(gains), kind="stable")[:SHOWN] if abs(gains[i]) > SAME]
    return {
        "won": int((gains > SAME).sum()),
        "lost": int((gains < -SAME).sum()),
        "same": int((np.abs(gains) <= SAME).sum()),
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


def text(found: Json) -> str:
    """A comparison for a terminal. A star marks gains and losses that stand after correction."""
    names, shown = found["measures"], found["measure"]
    wide = max(len(run["run"]) for run in found["runs"])
    lines = [f"{found['data']}: {found['queries']:,} judged queries", ""]
    lines.append("  ".join(["run".ljust(wide), *(name.rjust(10) for name in names)]))
    for run in found["runs"]:
        cells = [f"{run['scores'][name]['mean']:.4f}".rjust(10) for name in names]
        lines.append("  ".join([run["run"].ljust(wide), *cells]))
    for run in found["runs"][1:]:
        lines += ["", f"{run['run']} over {found['baseline']}:"]
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
            said = " ".join((query["text"] or query["query_id"]).split())[:90]
            lines.append(f"    {query['before']:.3f} -> {query['after']:.3f}  {said}")
    if len(found["runs"]) > 2:
        lines += ["", f"p by paired randomisation, corrected (Holm) for {len(found['runs']) - 1} runs"]
    if found["queries"] < QUERIES:
        lines.append("note: so few judged queries bound nothing: what the intervals leave out may well be there")
    for run in found["runs"]:
        if run["no_hits"]:
            lines.append(f"note: {run['run']} has no results for {run['no_hits']:,} judged queries; they score 0")
    return "\n".join(lines)
