"""The bill of a stage with its shards, of a study with its stages, trials and generators, or of a whole runs folder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable

from dagr_ray.core.artifact import Artifact, Json, add_up, folders_of
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.cost import Rates, attempts, find_attempt, shard_bill, stage_bill, unfinished_ranges
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import load_stage
from dagr_ray.report.arms import Row
from dagr_ray.report.lineage import Folders
from dagr_ray.report.summary import generators, study_of
from dagr_ray.report.verdict import dollars, duration

ADDED = ("tokens", "seconds", "waste", "usd")


def _has_plan(folder: Artifact) -> bool:
    """Whether it is a stage's, though its plan may be damaged."""
    return folder.read_json("plan.json") is not None or folder.problem("plan.json") is not None


def stage_line(folder: Artifact, fresh: bool = False) -> Json:
    """A stage's bill with its folder and state: that of its manifest or (``fresh``, and for a stage that is not complete)
    one made from its receipts, with ``under_way`` for rows that were begun and have no receipt.
    """
    manifest, plan = folder.manifest, folder.read_json("plan.json")
    named = {"folder": folder.name, "type": (manifest or plan or {"stage": {"type": ""}})["stage"].get("type", "")}
    if manifest and not fresh and "bill" in manifest:
        return {**named, "state": "complete", **manifest["bill"]}
    receipts = folder.receipts()
    made = stage_bill(folder, receipts.values(), _rates(folder, manifest))
    if manifest:
        return {**named, "state": "complete", **made}
    open_rows = unfinished_ranges(folder, receipts.values())
    under_way = {key: sum(line[key] for line in open_rows) for key in ("rows", "tokens")}
    of = len(plan["shards"]) if plan else 0
    return {**named, "state": f"{len(receipts)}/{of} shards", **made, "under_way": under_way}


def _rates(folder: Artifact, manifest: Json | None) -> Rates:
    """The recorded rates; for a stage that has not ended, those of its last attempt's placement."""
    if manifest and "bill" in manifest:
        return Rates.from_json(manifest["bill"]["rates"])
    names = sorted(folder.listing("attempts"))
    events = folder.lines(f"attempts/{names[-1]}") if names else []
    prices = Placement().prices
    with contextlib.suppress(ConfigError):  # of another version
        prices = next((from_json(e["placement"], Placement).prices for e in events if "placement" in e), prices)
    try:
        return Rates.from_prices(prices, load_stage(folder).engine_asked())
    except ConfigError:  # of a plugin that is not installed here
        return Rates.from_prices(prices)


def total(lines: Iterable[Json]) -> Json:
    """Tokens, seconds, waste and dollars of several stages together."""
    found: Json = {}
    for line in lines:
        add_up(found, {key: line[key] for key in ADDED})
    return found


def stage(runs: str, name: str) -> Json:
    """A stage's bill, each shard's, and what all that it was made from cost for each of its rows."""
    folder = Artifact(runs, name)
    line = stage_line(folder, fresh=True)
    rates, receipts = Rates.from_json(line["rates"]), folder.receipts()
    tries = attempts(folder, [*receipts.values(), *folder.revoked()])
    shards = [{"shard": n, **shard_bill(r, find_attempt(r, tries), rates)} for n, r in sorted(receipts.items())]
    made: Json = {**line, "shards": shards}
    if line["state"] == "complete":
        folders = Folders(runs)
        chain = total(stage_line(folders.artifact(each)) for each in folders.ancestors(name))["usd"]["total"]
        rows = line["rows"]["out"]
        made |= {"chain_usd": chain, "chain_usd_per_row": chain / rows if rows else None}
    return made


def study(runs: str, name: str) -> Json:
    """The bill of a study: each folder once, its trials (a folder's cost is shared by those that need it), generators.

    Stages and trials add up to the same total.
    """
    value = study_of(Artifact(runs, name))
    folders, users = Folders(runs), Counter[str]()
    for trial in value["trials"]:
        users.update(list(trial["stages"]))
    lines = {n: stage_line(folders.artifact(n)) for n in users if _has_plan(folders.artifact(n))}
    trials = [
        {
            **{key: trial[key] for key in ("trial", "kind", "state", "params")},
            "usd": sum(lines[n]["usd"]["total"] / users[n] for n in trial["stages"] if n in lines),
            "alone_usd": sum(lines[n]["usd"]["total"] for n in trial["stages"] if n in lines),
        }
        for trial in value["trials"]
    ]
    rows = [Row(folders, trial, value.get("defaults", {})) for trial in value["trials"]]
    made = [{**line, "trials": users[n]} for n, line in lines.items()]
    return {"study": name, "stages": made, "trials": trials, "generators": generators(rows), "total": total(made)}


def everything(runs: str) -> Json:
    """The bill of a runs folder: canaries and stages of other versions of a job included."""
    lines = [stage_line(Artifact(runs, name)) for name, _ in folders_of(runs) if _has_plan(Artifact(runs, name))]
    return {"runs": runs, "stages": lines, "total": total(lines)}


# -- for a terminal -----------------------------------------------------------------------------------------------------


def text(found: Json) -> str:
    """Any of the bills for people."""
    if "shards" in found:
        return "\n".join([f"{found['folder']}: {found['state']}, {found['attempts']} attempts", *_described(found)])
    if not found["stages"]:
        return "nothing was spent"
    head = ["stage", "state", "tokens", "cached", "held", "busy", "waste", "set-up", "waiting", "cost", "at"]
    rows = [
        [
            line["folder"],
            line["state"],
            f"{line['tokens']['prompt'] + line['tokens']['completion']:,}",
            f"{line['tokens']['cached'] / line['tokens']['prompt']:.0%}" if line["tokens"]["prompt"] else "",
            duration(line["seconds"]["held"]),
            f"{line['seconds']['busy'] / line['seconds']['held']:.0%}" if line["seconds"]["held"] else "",
            *(dollars(line["usd"].get(kind, 0.0)) for kind in ("waste", "setup", "waiting", "total")),
            str(Rates.from_json(line["rates"])),
        ]
        for line in found["stages"]
    ]
    lines = _table(head, rows)
    if "trials" in found:
        shown = [
            [t["trial"], t["kind"], t["state"], " ".join(f"{k}={v}" for k, v in t["params"].items()), dollars(t["usd"])]
            for t in found["trials"]
        ]
        lines += ["", *_table(["trial", "kind", "state", "parameters", "cost"], shown)]
    lines += ["", *_described({"total": True, **found["total"]})]
    for g in found.get("generators", []):
        if g["accepted"]:
            price = f"{dollars(g['price_per_accepted'])} for each of {g['accepted']:,} accepted queries"
            lines.append(f"{g['generator']}: {price} of {g['completions']:,} completions")
    return "\n".join(lines)


def _described(line: Json) -> list[str]:
    tokens, seconds, waste, usd = line["tokens"], line["seconds"], line["waste"], line["usd"]
    said = []
    if "rows" in line:
        refused = ", ".join(f"{n:,} {reason}" for reason, n in line["rows"]["rejected"].items())
        counted = f"{line['rows']['in']:,} in, {line['rows']['out']:,} out, {line['rows']['errors']:,} errors"
        said.append(f"rows     {counted}{f'; rejected: {refused}' if refused else ''}")
    if tokens["prompt"]:
        computed = tokens["prompt"] - tokens["cached"]
        said.append(
            f"tokens   {tokens['prompt']:,} of prompts ({computed:,} computed, {tokens['cached']:,} cached), "
            f"{tokens['completion']:,} of completions"
        )
    if any(waste.values()):
        said.append(
            f"waste    at most {waste['tokens']:,} tokens: {waste['shards']} shards taken back, {waste['tries']} tries lost, "
            f"{waste['retries']} requests repeated"
        )
    if line.get("under_way", {}).get("rows"):
        said.append(f"begun    {line['under_way']['rows']:,} rows, about {line['under_way']['tokens']:,} tokens")
    parts = {**{kind: seconds[kind] for kind in ("start", "busy", "idle")}, "waste": waste["seconds"]}
    parts["rest"] = seconds["rest"]
    shown = " + ".join(f"{value:,.1f} {kind}" for kind, value in parts.items())
    said.append(f"seconds  {seconds['held']:,.1f} of workers = {shown}")
    at = f" at {Rates.from_json(line['rates'])}" if "rates" in line else ""
    said.append(f"cost     {dollars(usd['total'])} = {dollars(usd['work'])} busy + {dollars(usd['waste'])} waste{at}")
    beside = f"{dollars(usd.get('setup', 0.0))} set-up and {dollars(usd.get('waiting', 0.0))} waiting"
    said.append(f"beside   {beside}; {dollars(usd.get('held', usd['total']))} for all the time that workers were held")
    if line.get("chain_usd_per_row") is not None:
        rows = line["rows"]["out"]
        said.append(
            f"a row    {dollars(line['chain_usd_per_row'])} of {rows:,}, with all that the folder was made from "
            f"({dollars(line['chain_usd'])})"
        )
    return said


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
