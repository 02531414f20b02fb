"""Decides what caused an error: the machine (disks, servers, permissions), memory, or something else, such as a row.

A row is skipped only if the row itself caused the error. A fault of the machine ends the stage, which is resumed later
with all its rows.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

# Errors that a text can cause by itself, as the name of a file or an argument.
OF_A_ROW = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.E2BIG, errno.EILSEQ, errno.EDOM, errno.ERANGE})
MEMORY = re.compile(
    r"MemoryError|OutOfMemory|out of memory|Unable to allocate|(can't|[Cc]annot|[Ff]ailed to) allocate memory|bad_alloc"
    r"|memory monitor|due to memory pressure|Java heap space|MapDB|realloc of size \d+ failed|malloc of size \d+ failed"
)
# Ray's report of a process that ended by itself or was killed.
DIED = re.compile(r"worker process has died|actor is dead|actor died|Worker exit type|worker died|WorkerCrashedError")
# The last line of a traceback, with or without the colours and the process name that Ray puts before it.
LAST_LINE = re.compile(
    r"^(?:\x1b\[\d+m)?(?:\([^)]*\) )?(?:\w+\.)*(\w*(?:Error|Exception|Failed|Damaged|Died|Exit|Interrupt|Reach))\b:? ?(.*)$"
)
# Ray's wrapper exceptions. Their own text holds no reason.
WRAPPERS = frozenset(
    "RayTaskError UserCodeException SystemException ControllerError WorkerGroupError TrainingFailedError TuneError "
    "ActorDiedError RayActorError WorkerCrashedError WorkerDied ActorUnavailableError ObjectLostError "
    "WorkerHealthCheckFailedError".split()
)
# Attributes in which Ray's errors keep the error that they wrap.
CAUSE_ATTRIBUTES = ("cause", "health_check_failure", "controller_failure", "_base_exc")


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and the errors that it was raised from, the innermost last."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        workers = getattr(link, "worker_failures", None) or {}
        causes = [getattr(link, name, None) for name in CAUSE_ATTRIBUTES] + [workers[rank] for rank in sorted(workers)]
        link = next((cause for cause in causes if isinstance(cause, BaseException)), link.__cause__)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a disk, a server or a permission is at fault, which no row can change."""
    os_error = next((link for link in chain(error) if isinstance(link, OSError)), None)
    return os_error is not None and os_error.errno not in OF_A_ROW


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: an allocation failed, or a process was killed for its memory."""
    if any(isinstance(link, MemoryError) or getattr(link, "errno", None) == errno.ENOMEM for link in chain(error)):
        return True
    return any(MEMORY.search(f"{type(link).__name__}: {link}") for link in chain(error))


def is_of_a_death(error: BaseException) -> bool:
    """Whether a worker's process ended without a message, most often because the system was out of memory."""
    texts = [f"{type(link).__name__}: {link}" for link in chain(error)]
    # Ray also says "died" of a worker that failed to open; its report holds the real error
    return any(DIED.search(text) for text in texts) and not any("its creation task" in text for text in texts)


def reason(error: BaseException | str) -> str:
    """The innermost cause of a failure in its own words, on one line of at most 600 characters.

    Ray's workers return a page of text with nested tracebacks. The reason is the last line of one of them.

    >>> reason("RayTaskError: dump\\n  File x\\nValueError: a weight is no number\\n\\nduring: y\\nTuneError: failed")
    'ValueError: a weight is no number'
    >>> reason(OSError(28, "No space left on device", "/runs/a"))
    "OSError: No space left on device: '/runs/a'"
    """
    if isinstance(error, BaseException):
        links = list(chain(error))
        # Ray Data raises an exception without a message from the real one
        innermost = next((link for link in reversed(links) if str(link).strip()), links[-1])
        text = str(innermost)
        if isinstance(innermost, OSError) and innermost.strerror and innermost.filename is not None:
            return _line(f"{type(innermost).__name__}: {innermost.strerror}: {os.fspath(innermost.filename)!r}")
        if type(innermost).__name__ not in WRAPPERS and "Traceback" not in text and "\n" not in text.strip():
            return _line(f"{type(innermost).__name__}: {text}")
    else:
        text = error
    # the text after this line is about another error, raised while the first one was handled
    text = text.split("During handling of the above exception, another exception occurred:")[-1]
    last_lines = [match for line in text.splitlines() if (match := LAST_LINE.match(line.strip()))]
    causes = [match for match in last_lines if match[1] not in WRAPPERS] or last_lines
    if causes:
        return _line(f"{causes[0][1]}: {causes[0][2]}")
    lines = [line for line in text.splitlines() if line.strip()]
    return _line(lines[-1] if lines else text)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-295:]}"
