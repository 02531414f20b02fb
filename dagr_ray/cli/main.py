"""The ``dagr`` command: its verbs and options, and how errors and interruptions reach a person.

Nothing heavy is imported before a verb runs, so that help is at once there.
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import contextlib
import errno
import logging
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dagr_ray.core import environment
from dagr_ray.core.terminal import EscapingFormatter, Parser, say

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
    top = Parser(prog="dagr", description="Turn a pile of documents into a better retriever.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    made = {
        name: verbs.add_parser(name, help=text, description=text.capitalize() + ".") for name, text in VERBS.items()
    }
    for name in ("check", "preview", "run", "study"):
        made[name].add_argument("job", help="a Python file with a recipe, such as jobs/quickstart.py")
        made[name].add_argument("values", nargs="*", metavar="NAME=VALUE", help="the recipe's parameters")
    for name in ("check", "study"):
        made[name].add_argument(
            "--worth", type=float, default=0.01, metavar="GAIN",
            help="the smallest gain in nDCG@10 that is worth having, fixed beforehand (default: %(default)s)",
        )  # fmt: skip
        made[name].add_argument(
            "--alpha", type=float, default=0.05,
            help="the share of studies that may claim what is not so (default: %(default)s)",
        )  # fmt: skip
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
        default = environment.get("DAGR_RUNS")
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
    made["track"].add_argument("runs", nargs="?", default=environment.get("DAGR_RUNS"), help="runs folder")
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
    """Runs a verb and exits: 0 done, 1 failed, 2 the user's mistake; interrupted 130 (Ctrl-C), told to stop 143 (SIGTERM) or
    129 (SIGHUP: the terminal is gone), 141 if nobody reads the output any more.
    """
    _open_streams()
    if argv is None:
        _use_utf8()
    try:
        args, more = parser().parse_known_args(argv)
    except BrokenPipeError:
        sys.exit(_flushed(128 + signal.SIGPIPE))
    except SystemExit as end:  # of help, or a mistake
        sys.exit(_flushed(end.code if isinstance(end.code, int) else 1))
    if more:
        # argparse takes the list of values once; people write some of them after an option
        late = [word for word in more if "=" in word and not word.startswith("-")]
        if len(late) < len(more) or not hasattr(args, "values"):
            parser().error(f"unrecognized arguments: {' '.join(w for w in more if w not in late) or more[0]}")
        args.values = [*args.values, *late]
    if args.version:
        from dagr_ray import __version__

        say(__version__)
        sys.exit(0)
    if args.verb is None:
        parser().print_help()
        sys.exit(2)
    _configure_logging()
    stops = _Stops(shlex.join(["dagr", *(sys.argv[1:] if argv is None else argv)]))
    code = 1
    try:
        make_absolute(args)
        from dagr_ray.cli import inspect, results, run

        verbs = next(module for module in (run, inspect, results) if hasattr(module, args.verb))
        code = getattr(verbs, args.verb)(args) or 0
    except KeyboardInterrupt:
        stops.end()
    except Exception as error:
        if stops.heard:  # what the signal broke off may have failed in a way of its own
            stops.end()
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _end_process(128 + signal.SIGPIPE, grace_s=4)
        code = _explain(error)
    stops.ignore()
    _end_process(code, grace_s=20)


def make_absolute(args: argparse.Namespace) -> None:
    """Makes the paths absolute that a command and the environment give to workers, which stand in other folders."""
    from dagr_ray.core import paths

    paths.make_environment_absolute()
    if getattr(args, "runs", None) is not None:
        args.runs = paths.absolute(args.runs)


class _Stopped(KeyboardInterrupt):
    """A signal that tells this program to stop: a cluster takes the machine back, or the terminal is gone."""


class _Stops:
    """Ends the program when a signal says so, by an exception in the main thread that lets everything be closed.

    Python runs a signal's handler between two steps of its own; what waits inside a library for long would hold the end up,
    and a library may swallow the exception. So a thread hears of the signal too, and ends the program if nothing else does.
    """

    WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "told to stop", signal.SIGHUP: "told to stop: no terminal"}
    GRACE_S = 6.0

    def __init__(self, command: str) -> None:
        self.command, self.heard, self.raised, self.ending = command, 0, False, threading.Lock()
        # nohup and a shell's background jobs have some of them ignored, which stays so
        self.numbers = [n for n in self.WORDS if signal.getsignal(n) != signal.SIG_IGN or n == signal.SIGTERM]
        for number in self.numbers:
            signal.signal(number, self._stop)
        ear, mouth = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(ear, True)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, args=(ear,), name="dagr-stops", daemon=True).start()

    def _stop(self, number: int, frame: Any) -> None:
        self.heard = self.heard or number
        if not self.raised:  # a second one would break off what the first one has begun to close
            self.raised = True
            raise _Stopped

    def _listen(self, ear: int) -> None:
        while not self.heard:
            self.heard = next((n for n in os.read(ear, 64) if n in self.numbers), 0)
        time.sleep(self.GRACE_S)
        self.end()

    def end(self) -> NoReturn:
        """Says how to go on and ends this process with all that it started."""
        number = self.heard or signal.SIGINT
        if not self.ending.acquire(blocking=False):  # the other thread is at it
            time.sleep(2 * self.GRACE_S)
            _kill(_children(), 128 + number)
        self.ignore()
        with contextlib.suppress(OSError, ValueError):
            text = f"\n{self.WORDS[signal.Signals(number)]}; what is finished is kept. Resume with: {self.command}"
            say(text, to=sys.stderr)
        _end_process(128 + number, grace_s=4)

    def ignore(self) -> None:
        """From now on: a second signal would leave processes behind."""
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                signal.signal(number, signal.SIG_IGN)


def _configure_logging() -> None:
    """One line per message of ours, and quiet from the libraries; DAGR_DEBUG=1 shows all."""
    debug = environment.debug()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EscapingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, handlers=[handler])
    logging.getLogger("dagr").setLevel(logging.INFO if debug else logging.WARNING)
    environment.set_defaults(environment.COMMAND)
    if not debug:
        import warnings

        warnings.simplefilter("ignore")


def _explain(error: Exception) -> int:
    """Prints one line for an error that a user can act on; a traceback for a defect. Returns the exit code."""
    if environment.debug():
        say("".join(traceback.format_exception(error)), to=sys.stderr, end="")
        return 1
    from dagr_ray.core import blame
    from dagr_ray.core.config import ConfigError

    failed = getattr(sys.modules.get("dagr_ray.core.worker"), "StageFailed", ())  # its module needs more packages
    damaged = getattr(sys.modules.get("dagr_ray.core.checksums"), "Damaged", ())
    seen: set[int] = set()
    link: BaseException | None = error
    by_the_way = False
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, ConfigError):
            say(f"dagr: error: {_one_line(link)}", to=sys.stderr)
            return 2
        if isinstance(link, damaged):
            say(f"dagr: failed: {_one_line(link)}; run its job again to rebuild it", to=sys.stderr)
            return 1
        if isinstance(link, failed):
            say("\n  ".join([f"dagr: failed: {_one_line(link)}", *getattr(link, "rows", ())]), to=sys.stderr)
            return 1
        if isinstance(link, ModuleNotFoundError) and not by_the_way and (told := _missing(link)):
            say(f"dagr: error: {told}", to=sys.stderr)
            return 2
        if isinstance(link, OSError) and not by_the_way and (told := _place_at_fault(link)):
            say(f"dagr: error: {told}", to=sys.stderr)
            return 2
        named = getattr(link, "cause", None) or link.__cause__
        by_the_way = by_the_way or named is None  # a library that looked for another one before it failed
        link = named or link.__context__
    # An error that came out of a worker carries its own message in text; find ours in it.
    for mark, code in (("ConfigError: ", 2), ("StageFailed: ", 1)):
        if mark in str(error):
            say(f"dagr: error: {str(error).rsplit(mark, 1)[1].splitlines()[0]}", to=sys.stderr)
            return code
    say(f"dagr: failed: {blame.reason(error)}; set DAGR_DEBUG=1 to see where", to=sys.stderr)
    return 1


def _place_at_fault(error: OSError) -> str:
    """What to do about a path that the system refuses; nothing for other errors."""
    remedies = {
        errno.EACCES: "give one that you may read and write",
        errno.EPERM: "give one that you may read and write",
        errno.EROFS: "give one that can be written",
        errno.ENOTDIR: "a part of the path is a file; give a folder",
        errno.EISDIR: "give a file",
        errno.ENAMETOOLONG: "give a shorter path (at most 255 bytes a name, 4,095 in all)",
        errno.ELOOP: "its symbolic links go in a circle; mend them",
    }
    if error.errno not in remedies:
        return ""
    named = re.search(r"'(/.+?)'(?=[.,;:\s]|$)", str(error))  # pyarrow's errors have no file name of their own
    path = str(error.filename) if error.filename else named[1] if named else ""
    return f"{path!r}: {os.strerror(error.errno).lower()}; {remedies[error.errno]}" if path else ""


def _missing(error: ModuleNotFoundError) -> str:
    """What to install where a package is missing; nothing where a module of ours is, which is a defect."""
    import importlib.util

    from dagr_ray.packages import pip_install

    package, _, inner = (error.name or "").partition(".")
    if package in ("", "dagr_ray"):
        return ""
    there = inner and importlib.util.find_spec(package) is not None
    what = f"{package} has no {error.name}: it is another version" if there else f"{package} is not installed"
    return f"{what}; run: {pip_install(package)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def _open_streams() -> None:
    """Gives a closed standard stream a place to go, and lets every text be printed whatever the terminal's encoding.

    A file that is opened in the place of a closed stream would get what libraries write to it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    codecs.register_error("dagr", _in_other_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="dagr")


def _use_utf8() -> None:
    """Starts this program anew in Python's UTF-8 mode if the locale has other letters.

    Libraries write their files in the locale's encoding, and Arrow knows paths in UTF-8 alone. What is printed keeps the
    terminal's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or environment.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _in_other_letters(error: UnicodeError) -> tuple[str, int]:
    """What stands for a letter that a terminal's encoding lacks: signs of ours in ASCII, else an escape as JSON has it."""
    assert isinstance(error, UnicodeEncodeError)
    shown = []
    for letter in error.object[error.start : error.end]:
        units = letter.encode("utf-16-be", "surrogatepass")
        escaped = "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))
        shown.append({"−": "-", "–": "-", "×": "x", "…": "...", "≤": "<=", "≥": ">="}.get(letter, escaped))
    return "".join(shown), error.end


def _nobody_reads() -> bool:
    """Whether the reader of this program's output is gone (``dagr ls | head -1``)."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_process(code: int, grace_s: float) -> NoReturn:
    """Ends this process and every process that it started, within seconds: engines must not outlive their driver."""
    code = _flushed(code)
    ray = sys.modules.get("ray")
    if ray is None:
        # Arrow's own waits for a store's answer, which may never come
        atexit.unregister(getattr(sys.modules.get("pyarrow.fs"), "ensure_s3_finalized", lambda: None))
        if threading.current_thread() is threading.main_thread():  # else that one is stuck, and they may be too
            atexit._run_exitfuncs()
        # not sys.exit: what C++ libraries take down after that has been seen to abort a finished `dagr trace`
        os._exit(code)
    children = _children()
    # not there yet if a signal came while Ray was imported
    closing = threading.Thread(target=getattr(ray, "shutdown", lambda: None), daemon=True)
    closing.start()
    closing.join(timeout=grace_s)
    _kill(children | _children(), code)  # workers may have been starting


def _children() -> set[Any]:
    import psutil

    return set(psutil.Process().children(recursive=True))


def _kill(children: set[Any], code: int) -> NoReturn:
    import psutil

    _, alive = psutil.wait_procs(children, timeout=2)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(code)


def _flushed(code: int) -> int:
    """Writes out what was printed; the exit code, another one if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python itself tries once more at its end
    except OSError as error:
        code = code or 1
        with contextlib.suppress(OSError):
            say(f"dagr: failed: the output cannot be written: {error.strerror}", to=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
