"""The verbs that plan and run work. Each returns an exit code, or None for 0."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dagr_ray.cli.inspect import folders
from dagr_ray.cli.progress import Reporter, duration, size
from dagr_ray.core import ray_start
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import Status, materialize, plan
from dagr_ray.core.config import ConfigError, fingerprint_cache, plugins as registered
from dagr_ray.core.placement import Placement, Pool, load_placement
from dagr_ray.core.stage import Stage, parts, walk
from dagr_ray.core.storage import check_writable
from dagr_ray.core.terminal import print_json, print_table, say
from dagr_ray.study.job import Job, load_job, parse_axes
from dagr_ray.study.plan import Study, plan_study
from dagr_ray.study.preflight import check_data
from dagr_ray.study.run import run_study

if TYPE_CHECKING:
    from dagr_ray.report.decision.power import Power

log = logging.getLogger("dagr")
Args = argparse.Namespace


def _one(args: Args) -> tuple[Job, Stage]:
    job = load_job(args.job)
    values = {name: axis[0] for name, axis in parse_axes(job, args.values, sweep=False).items()}
    return job, job.stage(**values)


def _study(args: Args) -> Study:
    job = load_job(args.job)
    return plan_study(job, parse_axes(job, args.values, sweep=True), args.worth, args.alpha)


def _validate(stages: Iterable[Stage], placement: Placement) -> None:
    """Checks everything that can be checked before work starts: packages, models, keys, options. Raises ConfigError."""
    from dagr_ray.engines import Engine
    from dagr_ray.retrieval import model_opening
    from dagr_ray.retrieval.encoder import Encoder, Pinned

    encoders: list[Encoder] = []
    for stage in stages:
        stage.check()
        for name in stage.__class__.model_fields:
            value = getattr(stage, name)
            if isinstance(value, Engine):
                value.check(getattr(placement, stage.pool))
            elif callable(getattr(value, "check", None)) and not isinstance(value, Stage):
                value.check()
            for part in parts(value):  # for example, of a miner or a filter
                if isinstance(part, Pinned):
                    part.check()
                encoders += [part] if isinstance(part, Encoder) else []
    model_opening.check(encoders)


def _check_budget(stages: Iterable[Stage], runs: str) -> None:
    """Raises ConfigError if an unfinished stage has already spent its engine's budget."""
    from dagr_ray.core.cost import with_remaining_budget

    for stage in stages:
        engine = stage.engine_asked()
        if engine is not None and stage.folder(runs).manifest is None:
            with_remaining_budget(engine, stage.folder(runs), 1, at_work=False)


# -- before and during a run --------------------------------------------------------------------------------------------


def check(args: Args) -> int | None:
    """``dagr check``."""
    from dagr_ray.study.estimate import estimate
    from dagr_ray.study.visible import powers

    placement = load_placement(args.placement)
    with fingerprint_cache():
        planned = None if args.one else _study(args)
        stages = planned.stages() if planned else walk(_one(args)[1])
        _validate(stages, placement)
        data_lines = check_data(stages, args.runs, whole=True)
        visible = powers(planned, args.runs) if planned else []
        _check_budget(stages, args.runs)
    if args.canary:
        _canary(args, stages, placement, Reporter(quiet=args.quiet))
    with fingerprint_cache():
        lines = list(plan(stages, args.runs, deep=args.deep, repair=args.deep))
        estimates = estimate([line.stage for line in lines if line.state != "cached"], args.runs, placement)
        return _print_plan(args, lines, estimates, data_lines, visible)


def _print_plan(
    args: Args,
    lines: Sequence[Status],
    estimates: dict[str, Any],
    data_lines: Sequence[str],
    visible: Sequence[Power],
) -> int | None:
    """Prints the result of a dry run."""
    damaged = [line for line in lines if line.problem]
    if args.json:
        stages = [
            {
                "folder": s.stage.folder_name(), "type": s.stage.type, "state": s.state, "done": s.done,
                "shards": s.of, "problem": s.problem or None, "estimate": estimates.get(s.stage.fingerprint()),
            }
            for s in lines
        ]  # fmt: skip
        print_json({"data": data_lines, "power": [power.to_json() for power in visible], "stages": stages})
        return 1 if damaged else None
    rows = []
    for line in lines:
        values = estimates.get(line.stage.fingerprint(), {})
        shards = f"{line.done}/{line.of}" if line.of else ""
        tokens = f"{values['tokens']:,}" if values.get("tokens") else ""
        hours = duration(values["seconds"]) if values.get("seconds") is not None else ""
        stored = size(values["bytes"]) if values.get("bytes") is not None else ""
        money = f"${values['price']:.4f}" if values.get("price") is not None else ""
        basis = values.get("basis", "")
        rows.append([line.stage.folder_name(), line.state, shards, tokens, hours, stored, money, basis, line.problem])
    print_table(rows, ["stage", "state", "shards", "tokens ~", "time ~", "storage ~", "cost ~", "as in", "problem"])
    todo = [line for line in lines if line.state != "cached"]
    for data_line in [*data_lines, *(power.sentence() for power in visible)]:
        say(data_line)
    say(f"{len(lines)} stages, {len(lines) - len(todo)} cached; {_remaining_work(estimates.values())}")
    if any(values["basis"] != "this corpus" for values in estimates.values() if values["tokens"]):
        say("token counts are estimated; `--canary` measures 64 passages first")
    for line in damaged:
        say(f"damaged: {line.stage.folder_name()}: {line.problem}; the next run rebuilds the damaged shards")
    return 1 if damaged else None


def _canary(args: Args, stages: Sequence[Stage], placement: Placement, reporter: Reporter) -> None:
    """Runs 64 passages of each unfinished generation. Raises GuardFailed if prompts or answers are bad."""
    from dagr_ray.study.canary import Guards, run_canaries
    from dagr_ray.study.estimate import estimate

    guards = Guards.of(args.guard)
    todo = [line.stage for line in plan(list(stages), args.runs) if line.state != "cached"]
    if todo:
        ray_start.connect(args.address)
    for canary, findings in run_canaries(todo, args.runs, placement, guards, reporter):
        shares = ", ".join(f"{finding.guard} {finding.share:.0%}" for finding in findings)
        say(f"canary {canary.generate.label()}: {shares}", to=sys.stderr)
    say(f"canary: {_remaining_work(estimate(todo, args.runs, placement).values())}", to=sys.stderr)


def _remaining_work(estimates: Iterable[dict[str, Any]]) -> str:
    estimates = list(estimates)
    total = {key: sum(values.get(key) or 0 for values in estimates) for key in ("seconds", "tokens", "bytes", "price")}
    at = "; ".join(sorted({values["rates"] for values in estimates if values.get("price")}))
    return (
        f"about {duration(total['seconds'])} of work, {total['tokens']:,} tokens, {size(total['bytes'])} and "
        f"${total['price']:.4f} to do" + (f" (busy workers, at {at})" if at else "")
    )


def preview(args: Args) -> int | None:
    """``dagr preview``: in a temporary runs folder, in this process only."""
    from dagr_ray.study.preview import generation_of, preview_lines

    if args.rows < 1:
        raise ConfigError(f"--rows {args.rows} must be 1 or more")
    generate = generation_of(_one(args)[1])
    if generate is None:
        raise ConfigError(
            f"{args.job} generates nothing with these parameters; choose a volume above 0 and a generator"
        )
    here = Placement(generate=Pool(workers=0))
    _validate([generate], here)
    with tempfile.TemporaryDirectory(prefix="dagr-preview-") as runs:
        check_data([generate], runs, whole=False)
        for line in preview_lines(generate, args.rows, runs, here):
            say(line)
    return None


def run(args: Args) -> int | None:
    """``dagr run``."""
    placement = load_placement(args.placement)
    check_writable(args.runs)
    _, stage = _one(args)
    todo = [line.stage for line in plan([stage], args.runs) if line.state != "cached"]
    _validate(todo, placement)
    check_data(todo, args.runs, whole=False)
    _check_budget(walk(stage), args.runs)
    ray_start.connect(args.address)
    reporter = Reporter(quiet=args.quiet)
    if args.canary:
        _canary(args, walk(stage), placement, reporter)
    folder = materialize(stage, args.runs, placement, reporter)
    if "metrics" in folder.table_names():
        means = [r for r in folder.read("metrics").to_pylist() if r["query_id"] is None]
        print_table([[r["data"] or "", r["measure"], f"{r['value']:.4f}"] for r in means], ["data", "measure", "mean"])
    say(folder.path)
    return None


def study(args: Args) -> int | None:
    """``dagr study``."""
    from dagr_ray import report
    from dagr_ray.study.estimate import remaining_seconds

    started = time.time()
    placement = load_placement(args.placement)
    check_writable(args.runs)
    with fingerprint_cache():
        planned = _study(args)
        todo = [s.stage for s in plan(planned.stages(), args.runs) if s.state != "cached"]
        _validate(todo, placement)
        check_data(todo, args.runs, whole=False)
        _check_budget(todo, args.runs)
    reporter = Reporter(quiet=args.quiet)
    if todo:
        ray_start.connect(args.address)
    if args.canary:
        _canary(args, todo, placement, reporter)
    mirror = _Mirror(args.runs, enabled=not args.no_track)
    of_trials = planned.unshared()
    reporter.remaining = lambda: remaining_seconds(of_trials, args.runs, placement)
    try:
        folder = run_study(planned, args.runs, placement, reporter, mirror.soon)
    except BaseException:
        mirror.finish(planned.folder(args.runs))  # so that the store shows that the study stopped
        raise
    summary = report.summarise(args.runs, folder.name)
    if summary["damaged"]:  # damage is found when the results are read, after the work
        list(plan(planned.stages(), args.runs, deep=True, repair=True))
        ray_start.connect(args.address)
        folder = run_study(planned, args.runs, placement, reporter, mirror.soon)
        summary = report.summarise(args.runs, folder.name)
    page = report.write_page(summary, args.runs, folder.name)
    say(report.terminal_table(summary))
    problem = mirror.finish(folder)
    count = len(planned.stages())
    took = duration(time.time() - started)
    say(f"{len(planned.trials)} trials; {count - len(todo)} of {count} stages were already finished; {took}")
    say(f"page: {page}")
    if problem:
        say(f"not tracked: {problem}; run `dagr track {args.runs}` later", to=sys.stderr)
    elif not args.no_track:
        say(f"mlflow: {mirror.uri}")
    failed = [trial for trial in planned.trials if trial.state != "done"]
    for trial in failed:
        say(f"{trial.state}: {trial.name} {trial.params}: {trial.error or 'not run'}")
    return 1 if failed else None


class _Mirror:
    """Mirrors a study to MLflow in a thread, without delaying the study."""

    def __init__(self, runs: str, enabled: bool) -> None:
        self.runs, self.enabled = runs, enabled
        self.uri = ""
        self.thread: threading.Thread | None = None

    def soon(self, folder: Artifact) -> None:
        """Starts a pass unless a pass is running."""
        if self.enabled and (self.thread is None or not self.thread.is_alive()):
            self.thread = threading.Thread(target=self._pass, args=(folder.name,), daemon=True)
            self.thread.start()

    def _pass(self, name: str) -> str | None:
        from dagr_ray.study import mlflow_mirror

        result = mlflow_mirror.mirror(self.runs, name)
        self.uri = result.uri
        return result.problem

    def finish(self, folder: Artifact) -> str | None:
        """Makes a last pass over the study. Returns the problem, or None."""
        if not self.enabled:
            return None
        if self.thread is not None:
            self.thread.join(timeout=60)
        return self._pass(folder.name)


def track(args: Args) -> int | None:
    """``dagr track``."""
    from dagr_ray.study import mlflow_mirror

    names = [name for name, _ in folders(args.runs) if name.startswith("study-")]
    if not names:
        raise ConfigError(f"no study in {args.runs!r}; give the runs folder of `dagr study --runs`")
    mlflow_mirror.check()
    for name in names:
        result = mlflow_mirror.mirror(args.runs, name)
        if result.problem:
            say(f"{name}: not tracked: {result.problem}")
            return 1
        say(
            f"{name}: {result.parents} parent and {result.children} child runs logged, {result.skipped} were logged before"
        )
    return None


def plugins(args: Args) -> int | None:
    """``dagr plugins``."""
    from dagr_ray.engines import Engine
    from dagr_ray.filters import Filter
    from dagr_ray.losses import Loss
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
        ("loss", Loss),
        ("stage", Stage),
    ):
        for name, c in registered(base).items():
            rows.append([kind, name, (c.__doc__ or "").strip().splitlines()[0], c.__module__])
    print_table(rows, ["kind", "name", "what it does", "module"])
    return None


def doctor(args: Args) -> int | None:
    """``dagr doctor``."""
    from dagr_ray.cli.doctor import run as diagnose

    return diagnose(args.json)
