"""What each verb of the command line does. Returns an exit code, or None for 0."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dagr_ray import cluster
from dagr_ray.artifact import Artifact
from dagr_ray.config import ConfigError, packed, plugins as registered
from dagr_ray.progress import Reporter, duration, size
from dagr_ray.stage import Stage, materialize, survey, walk
from dagr_ray.store import filesystem
from dagr_ray.study import Job, Study, load_job, parse_axes, plan_study, run_study

log = logging.getLogger("dagr")
Args = argparse.Namespace


def _print_json(value: Any) -> None:
    print(json.dumps(packed(value), indent=1, ensure_ascii=False))


def _print_table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    cells = [list(head), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _one(args: Args) -> tuple[Job, Stage]:
    job = load_job(args.job)
    values = {name: found[0] for name, found in parse_axes(job, args.values, sweep=False).items()}
    return job, job.stage(**values)


def _study(args: Args) -> Study:
    job = load_job(args.job)
    return plan_study(job, parse_axes(job, args.values, sweep=True))


def _validate(stages: Iterable[Stage], placement: cluster.Placement) -> None:
    """Everything that can be known to be wrong before anything starts (missing package, model or key, wrong option)."""
    from dagr_ray.engines import Engine

    for stage in stages:
        for name in stage.__class__.model_fields:
            value = getattr(stage, name)
            if isinstance(value, Engine):
                value.check(getattr(placement, stage.pool))
            elif callable(getattr(value, "check", None)):
                value.check()


def _afford(stages: Iterable[Stage], runs: str) -> None:
    """Raises ConfigError where what a stage has spent so far leaves nothing of its engine's budget."""
    from dagr_ray.bill import within_budget
    from dagr_ray.engines import Engine

    for stage in stages:
        engine = getattr(stage, "engine", None)
        if isinstance(engine, Engine) and stage.folder(runs).manifest is None:
            within_budget(engine, stage.folder(runs), 1, at_work=False)


# -- before and during a run --------------------------------------------------------------------------------------------


def check(args: Args) -> int | None:
    """``dagr check``."""
    from dagr_ray.estimate import estimate

    placement = cluster.load_placement(args.placement)
    stages = walk(_one(args)[1]) if args.one else _study(args).stages()
    _validate(stages, placement)
    _afford(stages, args.runs)
    if args.canary:
        _canary(args, stages, placement, Reporter(quiet=args.quiet))
    lines = list(survey(stages, args.runs, deep=args.deep, repair=args.deep))
    guesses = estimate([line.stage for line in lines if line.state != "cached"], args.runs, placement)
    damaged = [line for line in lines if line.problem]
    if args.json:
        told = [
            {
                "folder": s.stage.folder_name(), "type": s.stage.type, "state": s.state, "done": s.done,
                "shards": s.of, "problem": s.problem or None, "estimate": guesses.get(s.stage.fingerprint()),
            }
            for s in lines
        ]  # fmt: skip
        _print_json({"stages": told})
        return 1 if damaged else None
    rows = []
    for line in lines:
        guess = guesses.get(line.stage.fingerprint(), {})
        shown = f"{line.done}/{line.of}" if line.of else ""
        tokens = f"{guess['tokens']:,}" if guess.get("tokens") else ""
        hours = duration(guess["seconds"]) if guess.get("seconds") is not None else ""
        stored = size(guess["bytes"]) if guess.get("bytes") is not None else ""
        money = f"${guess['price']:.4f}" if guess.get("price") is not None else ""
        basis = guess.get("basis", "")
        rows.append([line.stage.folder_name(), line.state, shown, tokens, hours, stored, money, basis, line.problem])
    _print_table(rows, ["stage", "state", "shards", "tokens ~", "time ~", "storage ~", "cost ~", "as in", "problem"])
    todo = [line for line in lines if line.state != "cached"]
    print(f"{len(lines)} stages, {len(lines) - len(todo)} cached; {_to_do(guesses.values())}")
    if any(guess["basis"] != "this corpus" for guess in guesses.values() if guess["tokens"]):
        print("the tokens are a guess: --canary asks for 64 passages and knows better")
    for line in damaged:
        print(f"damaged: {line.stage.folder_name()}: {line.problem}; the next run rebuilds what is damaged")
    return 1 if damaged else None


def _canary(args: Args, stages: Sequence[Stage], placement: cluster.Placement, reporter: Reporter) -> None:
    """Asks for 64 passages of each generation that is to be done. Raises GuardFailed where prompts or answers are bad."""
    from dagr_ray.canary import Guards, fly
    from dagr_ray.estimate import estimate

    guards = Guards.of(args.guard)
    todo = [line.stage for line in survey(list(stages), args.runs) if line.state != "cached"]
    if todo:
        cluster.connect(args.address)
    for canary, findings in fly(todo, args.runs, placement, guards, reporter):
        seen = ", ".join(f"{finding.guard} {finding.share:.0%}" for finding in findings)
        print(f"canary {canary.generate.label()}: {seen}", file=sys.stderr)
    print(f"canary: {_to_do(estimate(todo, args.runs, placement).values())}", file=sys.stderr)


def _to_do(guesses: Iterable[dict[str, Any]]) -> str:
    guesses = list(guesses)
    total = {key: sum(guess.get(key) or 0 for guess in guesses) for key in ("seconds", "tokens", "bytes", "price")}
    return (
        f"about {duration(total['seconds'])} of work, {total['tokens']:,} tokens, {size(total['bytes'])} and "
        f"${total['price']:.4f} to do"
    )


def preview(args: Args) -> int | None:
    """``dagr preview``: in a temporary runs folder, on this process alone."""
    from dagr_ray.preview import generation_of, shown

    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows} is not a number of passages; give 1 or more")
    generate = generation_of(_one(args)[1])
    if generate is None:
        raise ConfigError(
            f"{args.job} generates nothing with these parameters; give volume and generator values that do"
        )
    here = cluster.Placement(generate=cluster.Pool(workers=0))
    _validate([generate], here)
    with tempfile.TemporaryDirectory(prefix="dagr-preview-") as runs:
        for line in shown(generate, args.rows, runs, here):
            print(line)
    return None


def run(args: Args) -> int | None:
    """``dagr run``."""
    placement = cluster.load_placement(args.placement)
    _, stage = _one(args)
    _validate([line.stage for line in survey([stage], args.runs) if line.state != "cached"], placement)
    _afford(walk(stage), args.runs)
    cluster.connect(args.address)
    reporter = Reporter(quiet=args.quiet)
    if args.canary:
        _canary(args, walk(stage), placement, reporter)
    folder = materialize(stage, args.runs, placement, reporter)
    if "metrics" in folder.table_names():
        means = [r for r in folder.read("metrics").to_pylist() if r["query_id"] is None]
        _print_table([[r["data"] or "", r["measure"], f"{r['value']:.4f}"] for r in means], ["data", "measure", "mean"])
    print(folder.path)
    return None


def study(args: Args) -> int | None:
    """``dagr study``."""
    from dagr_ray import report

    started = time.time()
    placement = cluster.load_placement(args.placement)
    planned = _study(args)
    todo = [s.stage for s in survey(planned.stages(), args.runs) if s.state != "cached"]
    _validate(todo, placement)
    _afford(todo, args.runs)
    reporter = Reporter(quiet=args.quiet)
    if todo:
        cluster.connect(args.address)
    if args.canary:
        _canary(args, todo, placement, reporter)
    mirror = _Mirror(args.runs, enabled=not args.no_track)
    folder = run_study(planned, args.runs, placement, reporter, mirror.soon)
    summary = report.summarise(args.runs, folder.name)
    page = report.write_page(summary, args.runs, folder.name)
    print(report.terminal_table(summary))
    problem = mirror.finish(folder)
    of = len(planned.stages())
    took = duration(time.time() - started)
    print(f"{len(planned.trials)} rows; {of - len(todo)} of {of} stages were there already; {took}")
    print(f"page: {page}")
    if problem:
        print(f"not tracked: {problem}; run `dagr track {args.runs}` later", file=sys.stderr)
    elif not args.no_track:
        print(f"mlflow: {mirror.where}")
    failed = [trial for trial in planned.trials if trial.state != "done"]
    for trial in failed:
        print(f"{trial.state}: {trial.name} {trial.params}: {trial.error or 'not run'}")
    return 1 if failed else None


class _Mirror:
    """Mirrors a study to MLflow beside the work, never in its way."""

    def __init__(self, runs: str, enabled: bool) -> None:
        self.runs, self.enabled = runs, enabled
        self.where = ""
        self.thread: threading.Thread | None = None

    def soon(self, folder: Artifact) -> None:
        """Starts a pass unless one is under way."""
        if self.enabled and (self.thread is None or not self.thread.is_alive()):
            self.thread = threading.Thread(target=self._pass, args=(folder.name,), daemon=True)
            self.thread.start()

    def _pass(self, name: str) -> str | None:
        from dagr_ray import tracking

        result = tracking.mirror(self.runs, name)
        self.where = result.uri
        return result.problem

    def finish(self, folder: Artifact) -> str | None:
        """A last pass over the finished study; returns what went wrong, if anything."""
        if not self.enabled:
            return None
        if self.thread is not None:
            self.thread.join(timeout=60)
        return self._pass(folder.name)


def track(args: Args) -> int | None:
    """``dagr track``."""
    from dagr_ray import tracking

    names = [name for name, _ in _folders(args.runs) if name.startswith("study-")]
    if not names:
        raise ConfigError(f"no study in {args.runs!r}; give the runs folder of `dagr study --runs`")
    tracking.check()
    for name in names:
        result = tracking.mirror(args.runs, name)
        if result.problem:
            print(f"{name}: not tracked: {result.problem}")
            return 1
        print(f"{name}: {result.parents} parent and {result.children} child runs logged, {result.skipped} were there")
    return None


# -- looking at results -------------------------------------------------------------------------------------------------


def _folders(runs: str) -> list[tuple[str, float]]:
    import pyarrow.fs as pafs

    fs, root = filesystem(runs)
    found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    dirs = [f for f in found if f.type == pafs.FileType.Directory and not f.base_name.startswith((".", "mlflow"))]
    if dirs and dirs[0].mtime is None:  # folders of an object store have no times; their first file has
        names = [[f"{d.path}/plan.json", f"{d.path}/study.json"] for d in dirs]
        times = [max((f.mtime.timestamp() for f in fs.get_file_info(two) if f.mtime), default=0.0) for two in names]
    else:
        times = [f.mtime.timestamp() for f in dirs]
    return sorted((f.base_name, changed) for f, changed in zip(dirs, times, strict=True))


def find(runs: str, name: str) -> Artifact:
    """The one folder whose name is, starts with or contains ``name``. Raises ConfigError where none or several match."""
    names = [n for n, _ in _folders(runs)]
    wanted = name.rstrip("/").rsplit("/", 1)[-1]
    for match in ([n for n in names if n == wanted], [n for n in names if wanted in n]):
        if len(match) == 1:
            return Artifact(runs, match[0])
        if match:
            raise ConfigError(
                f"{name!r} fits {len(match)} folders in {runs!r}: {', '.join(match[:4])}; give more of the name"
            )
    raise ConfigError(f"no folder {name!r} in {runs!r}; `dagr ls --runs {runs}` lists them")


def ls(args: Args) -> int | None:
    """``dagr ls``."""
    rows: list[dict[str, Any]] = []
    for name, changed in _folders(args.runs):
        folder = Artifact(args.runs, name)
        if name.startswith("study-"):
            value = folder.read_json("study.json") or {}
            done = sum(t["state"] == "done" for t in value.get("trials", []))
            state = f"{done}/{len(value.get('trials', []))} trials"
            rows.append({"folder": name, "state": state, "rows": None, "price": None, "changed": changed})
            continue
        manifest = folder.manifest
        plan = folder.read_json("plan.json")
        if plan is None:
            continue
        made = {t: entry["rows"] for t, entry in (manifest or {}).get("tables", {}).items()}
        state = "complete" if manifest else f"{len(folder.receipts())}/{len(plan['shards'])} shards"
        price = manifest["price"] if manifest else None
        rows.append({"folder": name, "state": state, "rows": made, "price": price, "changed": changed})
    if args.json:
        _print_json(rows)
        return None
    if not rows:
        print(f"nothing in {args.runs}")
        return None
    shown = sorted(rows, key=lambda row: row["changed"])
    table = []
    for row in shown:
        counts = " ".join(f"{t}:{n:,}" for t, n in (row["rows"] or {}).items())
        table.append([row["folder"], row["state"], f"${row['price']:.5f}" if row["price"] is not None else "", counts])
    _print_table(table, ["folder", "state", "price", "rows"])
    return None


def show(args: Args) -> int | None:
    """``dagr show``."""
    folder = find(args.runs, args.folder)
    manifest = folder.manifest or folder.read_json("plan.json") or folder.read_json("study.json")
    if args.table:
        if folder.manifest is None or args.table not in folder.table_names():
            allowed = ", ".join(folder.table_names()) if folder.manifest else "none, it is not complete"
            raise ConfigError(f"{folder.name} has no table {args.table!r}; allowed: {allowed}")
        rows = folder.slice(args.table, 0, args.rows).to_pylist()
        if args.json:
            _print_json(rows)
        else:
            for row in rows:
                print("\n".join(f"{key}: {value}" for key, value in row.items()), end="\n\n")
        return None
    if args.json:
        _print_json(manifest)
        return None
    assert manifest is not None
    for key in ("fingerprint", "inputs", "counts", "cost", "price", "attempts", "placement", "packages"):
        if key in manifest:
            print(f"{key}: {json.dumps(manifest[key], ensure_ascii=False)}")
    for name, entry in manifest.get("tables", {}).items():
        print(f"table {name}: {entry['rows']:,} rows, {entry['bytes']:,} bytes, {len(entry['parts'])} parts")
    for name, entry in manifest.get("files", {}).items():
        print(f"file {name}: {entry['bytes']:,} bytes")
    print(f"stage: {json.dumps(packed(manifest.get('stage', manifest.get('axes'))), ensure_ascii=False)}")
    return None


def bill(args: Args) -> int | None:
    """``dagr bill``."""
    from dagr_ray.report import bills

    if args.folder is None:
        if not _folders(args.runs):
            raise ConfigError(
                f"no folder in {args.runs!r}; give the runs folder of `dagr run` or `dagr study` by --runs"
            )
        found = bills.everything(args.runs)
    else:
        name = find(args.runs, args.folder).name
        found = (bills.study if name.startswith("study-") else bills.stage)(args.runs, name)
    if args.json:
        _print_json(found)
    else:
        print(bills.text(found))
    return None


def trace(args: Args) -> int | None:
    """``dagr trace``."""
    from dagr_ray import report

    found = report.trace(args.runs, args.id)
    if args.json:
        _print_json(found)
        return None
    for key, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{key}:\n    " + text.replace("\n", "\n    ") if "\n" in text else f"{key}: {text}")
    return None


def report(args: Args) -> int | None:
    """``dagr report``."""
    from dagr_ray import report as reports

    if args.study:
        name = find(args.runs, args.study).name
    else:
        studies = [(changed, n) for n, changed in _folders(args.runs) if n.startswith("study-")]
        if not studies:
            raise ConfigError(
                f"no study in {args.runs!r}; run `dagr study jobs/quickstart.py --runs {args.runs}` first"
            )
        name = max(studies)[1]
    if Artifact(args.runs, name).read_json("study.json") is None:
        raise ConfigError(f"{name!r} is not a study; `dagr ls --runs {args.runs}` lists them (study-...)")
    summary = reports.summarise(args.runs, name)
    if args.json:
        _print_json(summary)
    elif args.markdown:
        print(reports.markdown_table(summary))
    else:
        print(reports.terminal_table(summary))
        print(f"page: {reports.write_page(summary, args.runs, name)}")
    return None


def compare(args: Args) -> int | None:
    """``dagr compare``."""
    from dagr_ray.report import compare as comparing

    systems = comparing.named(args.run, lambda name: find(args.runs, name))
    found = comparing.compare(comparing.judged(args.data, args.split), systems, args.measure)
    if args.json:
        _print_json(found)
    else:
        print(comparing.text(found))
    return None


def export(args: Args) -> int | None:
    """``dagr export``."""
    from dagr_ray import export as exports

    folder = find(args.runs, args.folder)
    if folder.manifest is None:
        raise ConfigError(f"{folder.name} is not complete; run its job again to finish it")
    write = {
        "beir": exports.to_beir,
        "sentence-transformers": exports.to_sentence_transformers,
        "trec": exports.to_trec,
    }
    for name, lines in write[args.format](folder, args.runs, args.target).items():
        print(f"{Path(args.target) / name if args.format == 'beir' else name}: {lines:,} lines")
    return None


def annotate(args: Args) -> int | None:
    """``dagr annotate export`` and ``dagr annotate import``."""
    from dagr_ray import annotate as annotations

    annotations.run(args, lambda name: find(args.runs, name))
    return None


def plugins(args: Args) -> int | None:
    """``dagr plugins``."""
    from dagr_ray.engines import Engine
    from dagr_ray.filters import Filter
    from dagr_ray.miners import Miner
    from dagr_ray.strategies import Strategy
    from dagr_ray.teachers import Teacher

    rows = []
    for kind, base in (
        ("strategy", Strategy),
        ("engine", Engine),
        ("filter", Filter),
        ("miner", Miner),
        ("teacher", Teacher),
        ("stage", Stage),
    ):
        rows += [[kind, name, (c.__doc__ or "").strip().splitlines()[0]] for name, c in registered(base).items()]
    _print_table(rows, ["kind", "name", "what it does"])
    return None


def doctor(args: Args) -> int | None:
    """``dagr doctor``."""
    from dagr_ray.doctor import run as diagnose

    return diagnose(args.json)
