"""The verbs that show folders: ls, show, bill, trace. Each returns an exit code, or None for 0."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dagr_ray.core.artifact import Artifact, Json, folders_of
from dagr_ray.core.config import ConfigError, packed
from dagr_ray.core.stage import origin_of
from dagr_ray.core.storage import filesystem
from dagr_ray.core.terminal import print_json, print_table, say

Args = argparse.Namespace


def folders(runs: str) -> list[tuple[str, float]]:
    """(name, time of the last change in seconds) of each folder in a runs folder, sorted by name."""
    fs, _ = filesystem(runs)
    dirs = [info for _, info in folders_of(runs)]
    if dirs and dirs[0].mtime is None:  # folders of an object store have no time, but their first file has one
        names = [[f"{d.path}/plan.json", f"{d.path}/study.json"] for d in dirs]
        times = [max((f.mtime.timestamp() for f in fs.get_file_info(two) if f.mtime), default=0.0) for two in names]
    else:
        times = [f.mtime.timestamp() for f in dirs]
    return sorted((f.base_name, changed) for f, changed in zip(dirs, times, strict=True))


def find(runs: str, name: str) -> Artifact:
    """The one folder whose name is or contains ``name``. Raises ConfigError if no folder or several folders match."""
    names = [n for n, _ in folders(runs)]
    part = name.rstrip("/").rsplit("/", 1)[-1]
    for match in ([n for n in names if n == part], [n for n in names if part in n]):
        if len(match) == 1:
            return Artifact(runs, match[0])
        if match:
            raise ConfigError(
                f"{name!r} matches {len(match)} folders in {runs!r}: {', '.join(match[:4])}; give more of the name"
            )
    raise ConfigError(f"no folder {name!r} in {runs!r}; `dagr ls --runs {runs}` lists them")


def ls(args: Args) -> int | None:
    """``dagr ls``."""
    rows: list[dict[str, Any]] = []
    for name, changed in folders(args.runs):
        folder = Artifact(args.runs, name)
        if name.startswith("study-"):
            value = folder.read_json("study.json")
            if value is None and folder.problem("study.json") is None:
                continue
            done = sum(t.get("state") == "done" for t in (value or {"trials": []})["trials"])
            state = f"{done}/{len(value['trials'])} trials" if value else "damaged: study.json"
            rows.append({"folder": name, "state": state, "rows": None, "price": None, "changed": changed})
            continue
        manifest = folder.manifest
        plan = folder.read_json("plan.json")
        bad = [
            f for f, value in (("plan.json", plan), ("manifest.json", manifest)) if value is None and folder.problem(f)
        ]
        if plan is None and not bad:
            continue
        counts = {t: entry["rows"] for t, entry in (manifest or {}).get("tables", {}).items()}
        planned = len(plan["shards"]) if plan else "?"
        state = "complete" if manifest and plan else f"{len(folder.receipts())}/{planned} shards"
        state = f"damaged: {', '.join(bad)}" if bad else state
        price = manifest.get("price") if manifest else None
        rows.append({"folder": name, "state": state, "rows": counts, "price": price, "changed": changed})
    if args.json:
        print_json(rows)
        return None
    if not rows:
        say(f"nothing in {args.runs}")
        return None
    by_time = sorted(rows, key=lambda row: row["changed"])
    table = []
    for row in by_time:
        tables = " ".join(f"{t}:{n:,}" for t, n in (row["rows"] or {}).items())
        table.append([row["folder"], row["state"], f"${row['price']:.5f}" if row["price"] is not None else "", tables])
    print_table(table, ["folder", "state", "price", "rows"])
    return None


def _indented(value: object) -> str:
    """A text with its further lines indented, so that they cannot be mistaken for fields."""
    return str(value).replace("\n", "\n    ")


def show(args: Args) -> int | None:
    """``dagr show``."""
    folder = find(args.runs, args.folder)
    manifest = folder.manifest or folder.read_json("plan.json") or folder.read_json("study.json")
    if manifest is None:
        problems = [p for file in ("manifest.json", "plan.json", "study.json") if (p := folder.problem(file))]
        raise ConfigError(
            f"{folder.path}: {'; '.join(problems) or 'no plan.json, manifest.json or study.json in it'}; "
            "run its job again to rebuild it"
        )
    if args.table:
        if folder.manifest is None or args.table not in folder.table_names():
            allowed = ", ".join(folder.table_names()) if folder.manifest else "none, because it is not complete"
            raise ConfigError(f"{folder.name} has no table {args.table!r}; allowed: {allowed}")
        rows = folder.slice(args.table, 0, args.rows).to_pylist()
        if args.json:
            print_json(rows)
        else:
            for row in rows:
                say("\n".join(f"{key}: {_indented(value)}" for key, value in row.items()), end="\n\n")
        return None
    if args.json:
        print_json(manifest)
        return None
    if manifest.get("inputs"):
        say("inputs:")
        print_inputs(manifest)
    for key in ("fingerprint", "counts", "cost", "price", "attempts", "placement", "packages"):
        if key in manifest:
            say(f"{key}: {json.dumps(manifest[key], ensure_ascii=False)}")
    for name, entry in manifest.get("tables", {}).items():
        rows, stored = (sum(part[key] for part in entry["parts"]) for key in ("rows", "bytes"))
        say(f"table {name}: {rows:,} rows, {stored:,} bytes, {len(entry['parts'])} parts")
    for name, entry in manifest.get("files", {}).items():
        say(f"file {name}: {entry['bytes']:,} bytes")
    say(f"stage: {json.dumps(packed(manifest.get('stage', manifest.get('axes'))), ensure_ascii=False)}")
    return None


def print_inputs(made: Json) -> None:
    """The folders that a stage reads, each with the name that the stage gives it: a field, or an input of another origin."""
    notes = {"field": "", "declared": "  (declared by its class)", "built": "  (built by the stage)"}
    inputs = made.get("inputs", {})
    width = max(map(len, inputs), default=0)
    for place, (name, folder) in enumerate(inputs.items(), 1):
        corner = "`-" if place == len(inputs) else "|-"
        say(f"{corner} {name.ljust(width)}  {folder}{notes[origin_of(made, name)]}")


def bill(args: Args) -> int | None:
    """``dagr bill``."""
    from dagr_ray.report import bills

    if args.folder is None:
        if not folders(args.runs):
            raise ConfigError(
                f"no folder in {args.runs!r}; give the runs folder of `dagr run` or `dagr study` by --runs"
            )
        result = bills.everything(args.runs)
    else:
        name = find(args.runs, args.folder).name
        result = (bills.study if name.startswith("study-") else bills.stage)(args.runs, name)
    if args.json:
        print_json(result)
    else:
        say(bills.text(result))
    return None


def trace(args: Args) -> int | None:
    """``dagr trace``."""
    from dagr_ray import report

    result = report.trace(args.runs, args.id)
    if args.json:
        print_json(result)
        return None
    for key, value in result.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        say(f"{key}:\n    {_indented(text)}" if "\n" in text else f"{key}: {text}")
    return None
