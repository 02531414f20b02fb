"""Writes files on a local disk so that a reader sees a whole file or none, also after a power cut.

Bytes are written to a file of another name and flushed to the disk; then the file is renamed and its folder flushed.
If something is in the way (a folder in place of a file, or the reverse), it is moved aside and kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def make_folder(folder: str, root: str) -> None:
    """Makes a folder that is ``root`` or lies below it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        path = Path(folder)
        path_and_parents = [path, *path.parents][: len(path.parts) - len(Path(root).parts) + 1]
        for parent in reversed(path_and_parents):
            if os.path.lexists(parent) and not parent.is_dir():
                _move_aside(str(parent))
        os.makedirs(folder, exist_ok=True)


def _move_aside(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, f"{path}.{uuid.uuid4().hex[:8]}.aside")


def write(target: str, data: Any, root: str, once: bool = False, lasting: bool = False) -> None:
    """Writes a file below ``root``. ``once``: raises FileExistsError if the file exists. ``lasting``: the file and its
    name are on the disk when this returns.
    """
    make_folder(target.rsplit("/", 1)[0], root)
    try:
        temporary, stream = _new_temporary(target)
        lock = os.dup(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error
    try:
        try:
            with stream:
                stream.write(data)
                if lasting:
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:  # a full disk raises one without a file name
            raise OSError(error.errno, error.strerror, target) from error
        if os.path.isdir(target) and not os.path.islink(target):
            _move_aside(target)
        if once:
            _link(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        os.close(lock)
    if lasting:
        flush([target.rsplit("/", 1)[0]])


def _new_temporary(target: str) -> tuple[str, BinaryIO]:
    """A new file beside ``target``, locked while it is open: one without a lock was left by a process that was killed."""
    while True:
        path = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        stream = open(path, "xb")
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is taken for abandoned either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.path.lexists(path):
            return path, stream
        stream.close()  # removed before it had its lock


def remove_abandoned(folder: str) -> None:
    """Removes the temporary files of ``write`` below a folder whose writers are gone, of any process on any machine."""
    for top, _, names in os.walk(folder):
        for path in (f"{top}/{name}" for name in names if _TEMPORARY.fullmatch(name)):
            with contextlib.suppress(OSError), open(path, "r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(path)


def _link(temporary: str, target: str) -> None:
    if os.path.islink(target) and not os.path.exists(target):
        _move_aside(target)  # a link to nothing
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the last writer wins
        os.replace(temporary, target)


def flush(paths: Iterable[str]) -> None:
    """Flushes files and folders to the disk. A path that is gone is ignored: another process removed it."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
            finally:
                os.close(handle)


_CANNOT = (22, 95)  # EINVAL, ENOTSUP: a file system that cannot flush


def remove(path: str) -> None:
    """Removes a file; a folder of that name is moved aside."""
    try:
        os.remove(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        if not os.path.isdir(path):
            raise
        _move_aside(path)
    except NotADirectoryError:
        return
