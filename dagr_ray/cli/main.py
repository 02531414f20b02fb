"""The ``dagr`` command: its verbs and options, and how it reports errors and interruptions.

Heavy packages are imported only when a verb runs, so that help appears at once.
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
    "check": "validate a job before it costs anything: each stage finished, partial or to do, with an estimate",
    "preview": "show the exact prompts and parsed outputs of a few rows; writes nothing",
    "run": "build one recipe (parameters as NAME=VALUE)",
    "study": "sweep axes (NAME=A,B,C), train and evaluate every combination, write the report",
    "ls": "list the folders of a runs folder",
    "show": "show one folder: counts, cost, inputs, rows of a table",
    "bill": "show the cost of a stage, a study or a whole runs folder, and what it was spent on",
    "trace": "trace one row back to its passage, prompt, raw output, scores and price",
    "report": "print the table of a study and write its page",
    "compare": "evaluate TREC runs on a data set's judgements, and compare them with the first run",
    "export": "write a folder as a BEIR, sentence-transformers or TREC data set",
    "annotate": "export the pairs that a person should rate first, or import the ratings",
    "plugins": "the strategies, engines, filters, miners, teachers, losses and stages that are installed, with their modules",
    "doctor": "check what is installed, and show the command for what is missing",
    "track": "log finished studies to MLflow",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="dagr", description="Turn a pile of documents into a better retriever.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    parsers = {
        name: verbs.add_parser(name, help=text, description=text.capitalize() + ".") for name, text in VERBS.items()
    }
    for name in ("check", "preview", "run", "study"):
        parsers[name].add_argument("job", help="a Python file with a recipe, such as jobs/quickstart.py")
        parsers[name].add_argument("values", nargs="*", metavar="NAME=VALUE", help="the recipe's parameters")
    for name in ("check", "study"):
        parsers[name].add_argument(
            "--worth", type=float, default=0.01, metavar="GAIN",
            help="the smallest gain in nDCG@10 that is worth having, fixed beforehand (default: %(default)s)",
        )  # fmt: skip
        parsers[name].add_argument(
            "--alpha", type=float, default=0.05,
            help="the largest allowed share of studies with a false claim (default: %(default)s)",
        )  # fmt: skip
    for name in ("check", "run", "study"):
        parsers[name].add_argument(
            "--placement", default="local", help="local, or a TOML file such as cluster/one_gpu.toml"
        )
        parsers[name].add_argument("--address", help="a running Ray cluster (default: RAY_ADDRESS, else this machine)")
        parsers[name].add_argument("--quiet", action="store_true", help="do not show progress")
        parsers[name].add_argument(
            "--canary",
            action="store_true",
            help="run 64 passages first: measure costs, and stop if prompts or answers are bad",
        )
        parsers[name].add_argument(
            "--guard", action="append", default=[], metavar="NAME=SHARE",
            help="the largest allowed share of truncated, cut_off, unparsed or copied rows in a canary",
        )  # fmt: skip
    for name in ("check", "run", "study", "ls", "show", "bill", "trace", "report", "compare", "export", "annotate"):
        default = environment.get("DAGR_RUNS")
        parsers[name].add_argument(
            "--runs", default=default, help="folder or URI of the results (default: %(default)s)"
        )
    for name in ("check", "ls", "show", "bill", "report", "compare", "trace", "doctor", "annotate"):
        parsers[name].add_argument("--json", action="store_true", help="print JSON")
    parsers["check"].add_argument(
        "--one", action="store_true", help="check the single run of `dagr run`, not the job's sweep"
    )
    parsers["check"].add_argument(
        "--deep", action="store_true", help="verify every checksum; damaged shards are rebuilt by the next run"
    )
    parsers["preview"].add_argument("--rows", type=int, default=3, help="passages to show (default: 3)")
    parsers["study"].add_argument("--no-track", action="store_true", help="do not log to MLflow")
    parsers["show"].add_argument("folder", help="a folder's name, or a unique part of it")
    parsers["show"].add_argument("--table", help="print rows of this table")
    parsers["show"].add_argument("--rows", type=int, default=5, help="rows to print (default: 5)")
    parsers["bill"].add_argument(
        "folder", nargs="?", help="a stage's or a study's folder (default: the whole runs folder)"
    )
    parsers["trace"].add_argument("id", help="a query_id or gen_id")
    parsers["report"].add_argument("study", nargs="?", help="a study's folder (default: the newest)")
    parsers["report"].add_argument("--markdown", action="store_true", help="print a Markdown table")
    parsers["compare"].add_argument("data", help="a BEIR folder, or a TREC qrels file")
    parsers["compare"].add_argument(
        "run", nargs="+", help="a TREC run file (.gz too), or an evaluate or search folder; the first is the baseline"
    )
    parsers["compare"].add_argument("--split", default="test", help="the BEIR folder's split (default: %(default)s)")
    parsers["compare"].add_argument(
        "--measure", default="nDCG@10", help="show the queries that changed by this measure (default: %(default)s)"
    )
    parsers["export"].add_argument("folder", help="a select, mine or take folder, or an evaluate folder for TREC")
    parsers["export"].add_argument(
        "target",
        help="folder (beir), JSONL file (sentence-transformers) or run file (trec; a qrels file is written to the same folder)",
    )
    parsers["export"].add_argument("--format", choices=("beir", "sentence-transformers", "trec"), default="beir")
    _add_annotate_options(parsers["annotate"])
    parsers["track"].add_argument("runs", nargs="?", default=environment.get("DAGR_RUNS"), help="runs folder")
    return top


def _add_annotate_options(annotate: argparse.ArgumentParser) -> None:
    annotate.add_argument("action", choices=("export", "import"))
    annotate.add_argument(
        "words", nargs="+", metavar="FOLDER... TARGET|FILE",
        help="folders with scores or qrels; then the folder to write to (export), or files of ratings (import)",
    )  # fmt: skip
    annotate.add_argument("--items", type=int, default=200, help="pairs to export (default: %(default)s)")
    annotate.add_argument(
        "--threshold", action="append", default=[], metavar="SCORER=A[,B,C]",
        help="a teacher's threshold, or its cut points between the grades 0 to 3",
    )  # fmt: skip
    annotate.add_argument(
        "--encoder", metavar="MODEL", help="minilm or a model's folder: also select queries from new regions"
    )
    annotate.add_argument(
        "--people", metavar="FOLDER", help="an earlier import: leave its pairs out, use its cut points"
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits.

    Exit codes: 0 success, 1 failure, 2 a user's mistake, 130 interrupted (Ctrl-C), 143 stopped by SIGTERM, 129 stopped by
    SIGHUP (the terminal is gone), 141 if the reader of the output is gone.
    """
    _open_streams()
    if argv is None:
        _use_utf8()
    try:
        args, more = parser().parse_known_args(argv)
    except BrokenPipeError:
        sys.exit(_flushed(128 + signal.SIGPIPE))
    except SystemExit as end:  # after help, or a mistake
        sys.exit(_flushed(end.code if isinstance(end.code, int) else 1))
    if more:
        # argparse accepts the list of values only once, but users also write values after an option
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
        if stops.heard:  # the signal may have made the verb fail
            stops.end()
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _end_process(128 + signal.SIGPIPE, grace_s=4)
        code = _explain(error)
    stops.ignore()
    _end_process(code, grace_s=20)


def make_absolute(args: argparse.Namespace) -> None:
    """Makes the paths of the command and the environment absolute, because workers run in other folders."""
    from dagr_ray.core import paths

    paths.make_environment_absolute()
    if getattr(args, "runs", None) is not None:
        args.runs = paths.absolute(args.runs)


class _Stopped(KeyboardInterrupt):
    """A signal asked this program to stop: a cluster reclaims the machine, or the terminal is gone."""


class _Stops:
    """Ends the program after a signal, by an exception in the main thread, so that everything can be closed.

    Python runs a signal's handler only between two bytecodes, so a long wait inside a library would delay the end, and a
    library may swallow the exception. Therefore a thread receives the signal too, and ends the program if nothing else does.
    """

    WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM", signal.SIGHUP: "stopped: no terminal"}
    GRACE_S = 6.0

    def __init__(self, command: str) -> None:
        self.command, self.heard, self.raised, self.ending = command, 0, False, threading.Lock()
        # nohup and background jobs of a shell ignore some of these signals; they stay ignored
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
        if not self.raised:  # a second exception would interrupt the closing that the first one began
            self.raised = True
            raise _Stopped

    def _listen(self, ear: int) -> None:
        while not self.heard:
            self.heard = next((n for n in os.read(ear, 64) if n in self.numbers), 0)
        time.sleep(self.GRACE_S)
        self.end()

    def end(self) -> NoReturn:
        """Prints how to resume, and ends this process with all processes that it started."""
        number = self.heard or signal.SIGINT
        if not self.ending.acquire(blocking=False):  # the other thread is already ending the program
            time.sleep(2 * self.GRACE_S)
            _kill(_children(), 128 + number)
        self.ignore()
        with contextlib.suppress(OSError, ValueError):
            text = f"\n{self.WORDS[signal.Signals(number)]}; finished work is kept. Resume with: {self.command}"
            say(text, to=sys.stderr)
        _end_process(128 + number, grace_s=4)

    def ignore(self) -> None:
        """Ignores further signals: a second signal would leave processes running."""
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                signal.signal(number, signal.SIG_IGN)


def _configure_logging() -> None:
    """Shows our own messages as one line each, and none from libraries; DAGR_DEBUG=1 shows everything."""
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
    """Prints one line for an error, or its traceback with DAGR_DEBUG=1. Returns the exit code."""
    if environment.debug():
        say("".join(traceback.format_exception(error)), to=sys.stderr, end="")
        return 1
    from dagr_ray.core import blame
    from dagr_ray.core.config import ConfigError

    failed = getattr(sys.modules.get("dagr_ray.core.worker"), "StageFailed", ())  # its module imports heavy packages
    damaged = getattr(sys.modules.get("dagr_ray.core.checksums"), "Damaged", ())
    seen: set[int] = set()
    link: BaseException | None = error
    incidental = False
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
        if isinstance(link, ModuleNotFoundError) and not incidental and (message := _missing(link)):
            say(f"dagr: error: {message}", to=sys.stderr)
            return 2
        if isinstance(link, OSError) and not incidental and (message := _path_error(link)):
            say(f"dagr: error: {message}", to=sys.stderr)
            return 2
        named = getattr(link, "cause", None) or link.__cause__
        incidental = incidental or named is None  # a library may have tried to import another package before it failed
        link = named or link.__context__
    # An error from a worker contains our message inside its text.
    for mark, code in (("ConfigError: ", 2), ("StageFailed: ", 1)):
        if mark in str(error):
            say(f"dagr: error: {str(error).rsplit(mark, 1)[1].splitlines()[0]}", to=sys.stderr)
            return code
    say(f"dagr: failed: {blame.reason(error)}; set DAGR_DEBUG=1 to see where", to=sys.stderr)
    return 1


def _path_error(error: OSError) -> str:
    """What to do about a path that the system refuses; empty for other errors."""
    remedies = {
        errno.EACCES: "give one that you may read and write",
        errno.EPERM: "give one that you may read and write",
        errno.EROFS: "give one that can be written",
        errno.ENOTDIR: "a part of the path is a file; give a folder",
        errno.EISDIR: "give a file",
        errno.ENAMETOOLONG: "give a shorter path (at most 255 bytes a name, 4,095 in all)",
        errno.ELOOP: "its symbolic links form a circle; correct them",
    }
    if error.errno not in remedies:
        return ""
    match = re.search(r"'(/.+?)'(?=[.,;:\s]|$)", str(error))  # pyarrow's errors have no file name attribute
    path = str(error.filename) if error.filename else match[1] if match else ""
    return f"{path!r}: {os.strerror(error.errno).lower()}; {remedies[error.errno]}" if path else ""


def _missing(error: ModuleNotFoundError) -> str:
    """What to install if a package is missing; empty for a module of this package, because that is a defect."""
    import importlib.util

    from dagr_ray.packages import pip_install

    package, _, inner = (error.name or "").partition(".")
    if package in ("", "dagr_ray"):
        return ""
    package_exists = inner and importlib.util.find_spec(package) is not None
    problem = (
        f"{package} has no {error.name}: its version is wrong" if package_exists else f"{package} is not installed"
    )
    return f"{problem}; run: {pip_install(package)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def _open_streams() -> None:
    """Opens closed standard streams, and allows every text to be printed in any terminal encoding.

    Otherwise a file that happens to get the number of a closed stream would receive what libraries print.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    codecs.register_error("dagr", _replace_characters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="dagr")


def _use_utf8() -> None:
    """Restarts this program in Python's UTF-8 mode if the locale has another encoding.

    Libraries write files in the locale's encoding, and Arrow reads paths as UTF-8 only. Printed text keeps the encoding of
    the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or environment.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _replace_characters(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that the terminal's encoding lacks: our own signs by ASCII, others by JSON escapes."""
    assert isinstance(error, UnicodeEncodeError)
    replaced = []
    for letter in error.object[error.start : error.end]:
        units = letter.encode("utf-16-be", "surrogatepass")
        escaped = "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))
        replaced.append({"−": "-", "–": "-", "×": "x", "…": "...", "≤": "<=", "≥": ">="}.get(letter, escaped))
    return "".join(replaced), error.end


def _reader_is_gone() -> bool:
    """Whether the reader of this program's output is gone (``dagr ls | head -1``)."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_process(code: int, grace_s: float) -> NoReturn:
    """Ends this process and all processes that it started within seconds: engines must not outlive their driver."""
    code = _flushed(code)
    ray = sys.modules.get("ray")
    if ray is None:
        # Arrow's exit function waits for a store's answer, which may never come
        atexit.unregister(getattr(sys.modules.get("pyarrow.fs"), "ensure_s3_finalized", lambda: None))
        if (
            threading.current_thread() is threading.main_thread()
        ):  # otherwise the main thread is stuck, and exit functions may be too
            atexit._run_exitfuncs()
        # not sys.exit: destructors of C++ libraries were seen to abort a finished `dagr trace`
        os._exit(code)
    children = _children()
    # `shutdown` does not exist yet if a signal came while Ray was imported
    closing = threading.Thread(target=getattr(ray, "shutdown", lambda: None), daemon=True)
    closing.start()
    closing.join(timeout=grace_s)
    _kill(children | _children(), code)  # more workers may have started meanwhile


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
    """Flushes the output. Returns the exit code, or another one if the output cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 128 + signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python flushes again at exit
    except OSError as error:
        code = code or 1
        with contextlib.suppress(OSError):
            say(f"dagr: failed: the output cannot be written: {error.strerror}", to=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
