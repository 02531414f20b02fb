"""What an error says about its cause: the machine (disks, servers, permissions), memory, or anything else, such as a row.

Rows are given up for what they cause themselves, and only for that. What the machine causes ends a stage, which goes on
later with all its rows.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

# What a text can cause by itself, as the name of a file or an argument.
OF_A_ROW = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.E2BIG, errno.EILSEQ, errno.EDOM, errno.ERANGE})
MEMORY = re.compile(
    r"MemoryError|OutOfMemory|out of memory|Unable to allocate|(can't|[Cc]annot|[Ff]ailed to) allocate memory|bad_alloc"
    r"|memory monitor|due to memory pressure|Java heap space|MapDB|realloc of size \d+ failed|malloc of size \d+ failed"
)
# Ray's page about a process that ended by itself or was killed.
DIED = re.compile(r"worker process has died|actor is dead|actor died|Worker exit type|worker died|WorkerCrashedError")
# The last line of a traceback, with or without the colours and the process that Ray puts before it.
LAST_LINE = re.compile(
    r"^(?:\x1b\[\d+m)?(?:\([^)]*\) )?(?:\w+\.)*(\w*(?:Error|Exception|Failed|Damaged|Died|Exit|Interrupt|Reach))\b:? ?(.*)$"
)
# Wrappers of Ray, whose own words hold no reason.
WRAPPERS = frozenset(
    "RayTaskError UserCodeException SystemException ControllerError WorkerGroupError TrainingFailedError TuneError "
    "ActorDiedError RayActorError WorkerCrashedError WorkerDied ActorUnavailableError ObjectLostError "
    "WorkerHealthCheckFailedError".split()
)
# Where Ray's errors keep the one that they stand for.
HELD = ("cause", "health_check_failure", "controller_failure", "_base_exc")


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, the innermost last."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        workers = getattr(link, "worker_failures", None) or {}
        held = [getattr(link, name, None) for name in HELD] + [workers[rank] for rank in sorted(workers)]
        link = next((each for each in held if isinstance(each, BaseException)), link.__cause__)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether a disk, a server or a permission is at fault, whose state no row can change."""
    found = next((each for each in chain(error) if isinstance(each, OSError)), None)
    return found is not None and found.errno not in OF_A_ROW


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: an allocation that failed, or a process that was ended for it."""
    if any(isinstance(each, MemoryError) or getattr(each, "errno", None) == errno.ENOMEM for each in chain(error)):
        return True
    return any(MEMORY.search(f"{type(each).__name__}: {each}") for each in chain(error))


def is_of_a_death(error: BaseException) -> bool:
    """Whether a worker's process ended without a word, most often because the system was out of memory."""
    texts = [f"{type(each).__name__}: {each}" for each in chain(error)]
    # a worker that could not be opened "died", too, and the page holds its error
    return any(DIED.search(text) for text in texts) and not any("its creation task" in text for text in texts)


def reason(error: BaseException | str) -> str:
    """Why something failed, in one line of at most 600 characters: the innermost cause, in its own words.

    What comes out of Ray's workers is a page of text, tracebacks within tracebacks; its reason is the last line of one.

    >>> reason("RayTaskError: dump\\n  File x\\nValueError: a weight is no number\\n\\nduring: y\\nTuneError: failed")
    'ValueError: a weight is no number'
    >>> reason(OSError(28, "No space left on device", "/runs/a"))
    "OSError: No space left on device: '/runs/a'"
    """
    if isinstance(error, BaseException):
        links = list(chain(error))
        # Ray Data puts an exception without a word below the one that tells
        innermost = next((link for link in reversed(links) if str(link).strip()), links[-1])
        text = str(innermost)
        if isinstance(innermost, OSError) and innermost.strerror and innermost.filename is not None:
            return _line(f"{type(innermost).__name__}: {innermost.strerror}: {os.fspath(innermost.filename)!r}")
        if type(innermost).__name__ not in WRAPPERS and "Traceback" not in text and "\n" not in text.strip():
            return _line(f"{type(innermost).__name__}: {text}")
    else:
        text = error
    # what follows is another error, which happened while the one before was dealt with
    text = text.split("During handling of the above exception, another exception occurred:")[-1]
    found = [match for line in text.splitlines() if (match := LAST_LINE.match(line.strip()))]
    inner = [match for match in found if match[1] not in WRAPPERS] or found
    if inner:
        return _line(f"{inner[0][1]}: {inner[0][2]}")
    lines = [line for line in text.splitlines() if line.strip()]
    return _line(lines[-1] if lines else text)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-295:]}"
