"""The ``dagr`` command: its verbs and options, and how errors and interruptions reach a person.

Nothing heavy is imported before a verb runs, so that help is at once there.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

VERBS = {
    "check": "validate a job before anything is spent: each stage cached, partial or to do, with an estimate",
    "preview": "exact prompts and parsed outputs of a few rows; writes nothing",
    "run": "build one recipe (parameters as NAME=VALUE)",
    "study": "sweep axes (NAME=A,B,C), train and judge every combination, write the report",
    "ls": "list the folders of a runs folder",
    "show": "one folder: counts, cost, inputs, rows of a table",
    "bill": "what a stage, a study or a whole runs folder cost, and where that went",
    "trace": "one row back to its passage, prompt, raw output, scores and price",
    "report": "the table and the page of a study",
    "compare": "score TREC runs by the judgements of a data set, and compare them with the first",
    "export": "write a folder as a BEIR, sentence-transformers or TREC data set",
    "annotate": "export the pairs that a person should rate first, import the ratings",
    "plugins": "the strategies, engines, filters, miners and stages that are installed",
    "doctor": "what is installed, and the command for what is missing",
    "track": "log finished studies to MLflow",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="dagr", description="Turn a pile of documents into a better retriever.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    made = {
        name: verbs.add_parser(name, help=text, description=text.capitalize() + ".") for name, text in VERBS.items()
    }
    for name in ("check", "preview", "run", "study"):
        made[name].add_argument("job", help="a Python file with a recipe, such as jobs/quickstart.py")
        made[name].add_argument("values", nargs="*", metavar="NAME=VALUE", help="the recipe's parameters")
    for name in ("check", "run", "study"):
        made[name].add_argument(
            "--placement", default="local", help="local, or a TOML file such as cluster/one_gpu.toml"
        )
        made[name].add_argument("--address", help="a running Ray cluster (default: RAY_ADDRESS, else this machine)")
        made[name].add_argument("--quiet", action="store_true", help="no progress")
        made[name].add_argument(
            "--canary",
            action="store_true",
            help="ask for 64 passages first: estimate from them, stop at bad prompts or answers",
        )
        made[name].add_argument(
            "--guard", action="append", default=[], metavar="NAME=SHARE",
            help="the largest share of truncated, cut_off, unparsed or copied rows with which a canary passes",
        )  # fmt: skip
    for name in ("check", "run", "study", "ls", "show", "bill", "trace", "report", "compare", "export", "annotate"):
        default = os.environ.get("DAGR_RUNS", "runs")
        made[name].add_argument("--runs", default=default, help="folder or URI of the results (default: %(default)s)")
    for name in ("check", "ls", "show", "bill", "report", "compare", "trace", "doctor", "annotate"):
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["check"].add_argument("--one", action="store_true", help="the single run of `dagr run`, not the job's sweep")
    made["check"].add_argument(
        "--deep", action="store_true", help="verify every checksum; damaged shards are built again"
    )
    made["preview"].add_argument("--rows", type=int, default=3, help="passages to show (default: 3)")
    made["study"].add_argument("--no-track", action="store_true", help="do not log to MLflow")
    made["show"].add_argument("folder", help="a folder's name, or a unique beginning or part of it")
    made["show"].add_argument("--table", help="print rows of this table")
    made["show"].add_argument("--rows", type=int, default=5, help="rows to print (default: 5)")
    made["bill"].add_argument(
        "folder", nargs="?", help="a stage's or a study's folder (default: all of the runs folder)"
    )
    made["trace"].add_argument("id", help="a query_id or gen_id")
    made["report"].add_argument("study", nargs="?", help="a study's folder (default: the newest)")
    made["report"].add_argument("--markdown", action="store_true", help="print a Markdown table")
    made["compare"].add_argument("data", help="a BEIR folder, or a TREC qrels file")
    made["compare"].add_argument(
        "run", nargs="+", help="a TREC run file (.gz too), or an evaluate or search folder; the first is the baseline"
    )
    made["compare"].add_argument("--split", default="test", help="the BEIR folder's split (default: %(default)s)")
    made["compare"].add_argument(
        "--measure", default="nDCG@10", help="the one whose changed queries are shown (default: %(default)s)"
    )
    made["export"].add_argument("folder", help="a select, mine or take folder, or an evaluate folder for TREC")
    made["export"].add_argument(
        "target",
        help="folder (beir), JSONL file (sentence-transformers) or run file (trec; the qrels file is put beside it)",
    )
    made["export"].add_argument("--format", choices=("beir", "sentence-transformers", "trec"), default="beir")
    _annotate(made["annotate"])
    made["track"].add_argument("runs", nargs="?", default=os.environ.get("DAGR_RUNS", "runs"), help="runs folder")
    return top


def _annotate(made: argparse.ArgumentParser) -> None:
    made.add_argument("action", choices=("export", "import"))
    made.add_argument(
        "words", nargs="+", metavar="FOLDER... TARGET|FILE",
        help="folders with scores or qrels; then the folder to write to (export), or files of ratings (import)",
    )  # fmt: skip
    made.add_argument("--items", type=int, default=200, help="pairs to export (default: %(default)s)")
    made.add_argument(
        "--threshold", action="append", default=[], metavar="SCORER=A[,B,C]",
        help="a teacher's threshold, or its cut points between the grades 0 to 3",
    )  # fmt: skip
    made.add_argument(
        "--encoder", metavar="MODEL", help="minilm or a model's folder: also look for new regions of queries"
    )
    made.add_argument("--people", metavar="FOLDER", help="an earlier import: leave its pairs out, take its cut points")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits: 0 done or told to stop (SIGTERM), 1 failed, 2 the user's mistake, 130 interrupted."""
    args, more = parser().parse_known_args(argv)
    if more:
        # argparse takes the list of values once; people write some of them after an option
        late = [word for word in more if "=" in word and not word.startswith("-")]
        if len(late) < len(more) or not hasattr(args, "values"):
            parser().error(f"unrecognized arguments: {' '.join(w for w in more if w not in late) or more[0]}")
        args.values = [*args.values, *late]
    if args.version:
        from dagr_ray import __version__

        print(__version__)
        sys.exit(0)
    if args.verb is None:
        parser().print_help()
        sys.exit(2)
    _calm()
    _Stopped.heard = False
    signal.signal(signal.SIGTERM, _stop)
    code = 1
    try:
        from dagr_ray import commands, results

        code = (getattr(commands, args.verb, None) or getattr(results, args.verb))(args) or 0
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second one would leave processes behind
        told = _Stopped.heard
        code = 0 if told else 130
        if isinstance(stop, KeyboardInterrupt):
            again = shlex.join(["dagr", *(sys.argv[1:] if argv is None else argv)])
            what = "told to stop" if told else "interrupted"
            print(f"\n{what}; what is finished is kept. Resume with: {again}", file=sys.stderr, flush=True)
        _leave(code, grace_s=4)
    except Exception as error:
        code = _explain(error)
    _leave(code, grace_s=20)


class _Stopped(KeyboardInterrupt):
    """SIGTERM: a cluster takes the machine back, which is no failure of the job.

    ``heard`` says so too: what waits inside Ray's own code raises a plain KeyboardInterrupt in this one's place.
    """

    heard = False


def _stop(number: int, frame: Any) -> NoReturn:
    _Stopped.heard = True
    raise _Stopped


def _calm() -> None:
    """One line per message of ours, and quiet from the libraries; DAGR_DEBUG=1 shows all."""
    debug = bool(os.environ.get("DAGR_DEBUG"))
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dagr").setLevel(logging.INFO if debug else logging.WARNING)
    for name, value in {
        "RAY_DEDUP_LOGS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)
    if not debug:
        import warnings

        warnings.simplefilter("ignore")


def _explain(error: Exception) -> int:
    """Prints one line for an error that a user can act on; a traceback for a defect. Returns the exit code."""
    if os.environ.get("DAGR_DEBUG"):
        raise error
    from dagr_ray.config import ConfigError

    failed = getattr(sys.modules.get("dagr_ray.worker"), "StageFailed", ())  # its module needs more packages
    seen: set[int] = set()
    link: BaseException | None = error
    by_the_way = False
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, ConfigError):
            print(f"dagr: error: {_one_line(link)}", file=sys.stderr)
            return 2
        if isinstance(link, failed):
            print("\n  ".join([f"dagr: failed: {_one_line(link)}", *getattr(link, "rows", ())]), file=sys.stderr)
            return 1
        if isinstance(link, ModuleNotFoundError) and not by_the_way and (told := _missing(link)):
            print(f"dagr: error: {told}", file=sys.stderr)
            return 2
        named = getattr(link, "cause", None) or link.__cause__
        by_the_way = by_the_way or named is None  # a library that looked for another one before it failed
        link = named or link.__context__
    last = _one_line(error)
    # An error that came out of a worker carries its own message in text; find ours in it.
    for mark, code in (("ConfigError: ", 2), ("StageFailed: ", 1)):
        if mark in str(error):
            print(f"dagr: error: {str(error).rsplit(mark, 1)[1].splitlines()[0]}", file=sys.stderr)
            return code
    print(f"dagr: failed: {type(error).__name__}: {last}; set DAGR_DEBUG=1 to see where", file=sys.stderr)
    return 1


def _missing(error: ModuleNotFoundError) -> str:
    """What to install where a package is missing; nothing where a module of ours is, which is a defect."""
    import importlib.util

    from dagr_ray.doctor import pip_install

    package, _, inner = (error.name or "").partition(".")
    if package in ("", "dagr_ray"):
        return ""
    there = inner and importlib.util.find_spec(package) is not None
    what = f"{package} has no {error.name}: it is another version" if there else f"{package} is not installed"
    return f"{what}; run: {pip_install(package)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def _leave(code: int, grace_s: float) -> NoReturn:
    """Ends this process and every process that it started, within seconds: engines must not outlive their driver."""
    sys.stdout.flush()
    sys.stderr.flush()
    ray = sys.modules.get("ray")
    if ray is None:
        atexit._run_exitfuncs()
        # not sys.exit: what C++ libraries take down after that has been seen to abort a finished `dagr trace`
        os._exit(code)
    import threading

    import psutil

    children = set(psutil.Process().children(recursive=True))
    closing = threading.Thread(target=ray.shutdown, daemon=True)
    closing.start()
    closing.join(timeout=grace_s)
    children |= set(psutil.Process().children(recursive=True))  # workers may have been starting
    _, alive = psutil.wait_procs(children, timeout=2)
    for process in alive:
        process.kill()
    os._exit(code)


if __name__ == "__main__":
    main()
