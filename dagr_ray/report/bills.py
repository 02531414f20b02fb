"""Bills: of a stage with its shards, of a study with its stages, trials and generators, or of a whole runs folder."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable

from dagr_ray.core.artifact import Artifact, Json, add_up, folders_of
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.cost import Rates, attempts, find_attempt, shard_bill, stage_bill, unfinished_ranges
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import load_stage
from dagr_ray.report.arms import TrialResult
from dagr_ray.report.lineage import Folders
from dagr_ray.report.summary import generators, study_of
from dagr_ray.report.verdict import dollars, duration

SUMMED = ("tokens", "seconds", "waste", "usd")


def _has_plan(folder: Artifact) -> bool:
    """Whether it is a stage's folder. Its plan may be damaged."""
    return folder.read_json("plan.json") is not None or folder.problem("plan.json") is not None


def stage_line(folder: Artifact, fresh: bool = False) -> Json:
    """A stage's bill with its folder and state, from its manifest.

    With ``fresh``, and for an unfinished stage, the bill is computed from the receipts. ``under_way`` counts rows that were
    started and have no receipt yet.
    """
    manifest, plan = folder.manifest, folder.read_json("plan.json")
    names = {"folder": folder.name, "type": (manifest or plan or {"stage": {"type": ""}})["stage"].get("type", "")}
    if manifest and not fresh and "bill" in manifest:
        return {**names, "state": "complete", **manifest["bill"]}
    receipts = folder.receipts()
    bill = stage_bill(folder, receipts.values(), _rates(folder, manifest))
    if manifest:
        return {**names, "state": "complete", **bill}
    open_rows = unfinished_ranges(folder, receipts.values())
    under_way = {key: sum(line[key] for line in open_rows) for key in ("rows", "tokens")}
    planned = len(plan["shards"]) if plan else 0
    return {**names, "state": f"{len(receipts)}/{planned} shards", **bill, "under_way": under_way}


def _rates(folder: Artifact, manifest: Json | None) -> Rates:
    """The recorded rates; for an unfinished stage, the rates in the placement of its last attempt."""
    if manifest and "bill" in manifest:
        return Rates.from_json(manifest["bill"]["rates"])
    names = sorted(folder.listing("attempts"))
    events = folder.lines(f"attempts/{names[-1]}") if names else []
    prices = Placement().prices
    with contextlib.suppress(ConfigError):  # written by another version
        prices = next((from_json(e["placement"], Placement).prices for e in events if "placement" in e), prices)
    try:
        return Rates.from_prices(prices, load_stage(folder).engine_asked())
    except ConfigError:  # from a plugin that is not installed here
        return Rates.from_prices(prices)


def total(lines: Iterable[Json]) -> Json:
    """The total tokens, seconds, waste and dollars of several stages."""
    sums: Json = {}
    for line in lines:
        add_up(sums, {key: line[key] for key in SUMMED})
    return sums


def stage(runs: str, name: str) -> Json:
    """A stage's bill, the bill of each shard, and the cost of each row including all folders that the stage was built from."""
    folder = Artifact(runs, name)
    line = stage_line(folder, fresh=True)
    rates, receipts = Rates.from_json(line["rates"]), folder.receipts()
    tries = attempts(folder, [*receipts.values(), *folder.revoked()])
    shards = [{"shard": n, **shard_bill(r, find_attempt(r, tries), rates)} for n, r in sorted(receipts.items())]
    bill: Json = {**line, "shards": shards}
    if line["state"] == "complete":
        folders = Folders(runs)
        chain = total(stage_line(folders.artifact(ancestor)) for ancestor in folders.ancestors(name))["usd"]["total"]
        rows = line["rows"]["out"]
        bill |= {"chain_usd": chain, "chain_usd_per_row": chain / rows if rows else None}
    return bill


def study(runs: str, name: str) -> Json:
    """The bill of a study: each folder once, each trial, and each generator.

    The cost of a folder is divided among the trials that need it, so stages and trials add up to the same total.
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
    rows = [TrialResult(folders, trial, value.get("defaults", {})) for trial in value["trials"]]
    stages = [{**line, "trials": users[n]} for n, line in lines.items()]
    return {"study": name, "stages": stages, "trials": trials, "generators": generators(rows), "total": total(stages)}


def everything(runs: str) -> Json:
    """The bill of a runs folder, including canaries and stages of other versions of a job."""
    lines = [stage_line(Artifact(runs, name)) for name, _ in folders_of(runs) if _has_plan(Artifact(runs, name))]
    return {"runs": runs, "stages": lines, "total": total(lines)}


# -- for a terminal -----------------------------------------------------------------------------------------------------


def text(bill: Json) -> str:
    """Any of the bills as a table for the terminal."""
    if "shards" in bill:
        return "\n".join([f"{bill['folder']}: {bill['state']}, {bill['attempts']} attempts", *_described(bill)])
    if not bill["stages"]:
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
        for line in bill["stages"]
    ]
    lines = _table(head, rows)
    if "trials" in bill:
        shown = [
            [t["trial"], t["kind"], t["state"], " ".join(f"{k}={v}" for k, v in t["params"].items()), dollars(t["usd"])]
            for t in bill["trials"]
        ]
        lines += ["", *_table(["trial", "kind", "state", "parameters", "cost"], shown)]
    lines += ["", *_described({"total": True, **bill["total"]})]
    for g in bill.get("generators", []):
        if g["accepted"]:
            price = f"{dollars(g['price_per_accepted'])} for each of {g['accepted']:,} accepted queries"
            lines.append(f"{g['generator']}: {price} of {g['completions']:,} completions")
    return "\n".join(lines)


def _described(line: Json) -> list[str]:
    tokens, seconds, waste, usd = line["tokens"], line["seconds"], line["waste"], line["usd"]
    lines = []
    if "rows" in line:
        rejected = ", ".join(f"{n:,} {reason}" for reason, n in line["rows"]["rejected"].items())
        counts = f"{line['rows']['in']:,} in, {line['rows']['out']:,} out, {line['rows']['errors']:,} errors"
        lines.append(f"rows     {counts}{f'; rejected: {rejected}' if rejected else ''}")
    if tokens["prompt"]:
        computed = tokens["prompt"] - tokens["cached"]
        lines.append(
            f"tokens   {tokens['prompt']:,} of prompts ({computed:,} computed, {tokens['cached']:,} cached), "
            f"{tokens['completion']:,} of completions"
        )
    if any(waste.values()):
        lines.append(
            f"waste    at most {waste['tokens']:,} tokens: {waste['shards']} shards revoked, {waste['tries']} attempts lost, "
            f"{waste['retries']} requests repeated"
        )
    if line.get("under_way", {}).get("rows"):
        lines.append(f"started  {line['under_way']['rows']:,} rows, about {line['under_way']['tokens']:,} tokens")
    parts = {**{kind: seconds[kind] for kind in ("start", "busy", "idle")}, "waste": waste["seconds"]}
    parts["rest"] = seconds["rest"]
    shown = " + ".join(f"{value:,.1f} {kind}" for kind, value in parts.items())
    lines.append(f"seconds  {seconds['held']:,.1f} of workers = {shown}")
    at = f" at {Rates.from_json(line['rates'])}" if "rates" in line else ""
    lines.append(f"cost     {dollars(usd['total'])} = {dollars(usd['work'])} busy + {dollars(usd['waste'])} waste{at}")
    extra = f"{dollars(usd.get('setup', 0.0))} set-up and {dollars(usd.get('waiting', 0.0))} waiting"
    lines.append(
        f"not in it {extra}; {dollars(usd.get('held', usd['total']))} for the whole time that workers were reserved"
    )
    if line.get("chain_usd_per_row") is not None:
        rows = line["rows"]["out"]
        lines.append(
            f"a row    {dollars(line['chain_usd_per_row'])} of {rows:,}, including all folders that it was built from "
            f"({dollars(line['chain_usd'])})"
        )
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
