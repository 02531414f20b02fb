"""Verifies files by checksum, once per process and version of a file.

A file is known by its inode, size and modification time (on an object store: size and time). After the first full read,
a check costs one look at these. A full read takes about a second per GB.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from dagr_ray.core.config import digest
from dagr_ray.core.storage import fetch, scratch

Json = dict[str, Any]
Stamp = tuple[Any, ...]
READERS = 4  # files read at once: hashing takes the time
KNOWN = 1 << 17  # files remembered by a process, about 300 bytes each

_lock = threading.Lock()
_sound: dict[str, Stamp] = {}


class Damaged(RuntimeError):
    """A file's bytes are not the bytes that were written. ``materialize`` rebuilds the file and goes on."""


def remember(memory: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Stores a value as the newest of at most ``limit``; None removes it."""
    with _lock:
        memory.pop(key, None)
        if value is not None:
            memory[key] = value
        while len(memory) > limit:
            memory.pop(next(iter(memory)))


def stamp(fs: pafs.FileSystem, path: str) -> Stamp | None:
    """Values that change when a file is rewritten; None if there is no file."""
    if isinstance(fs, pafs.LocalFileSystem):
        try:
            info = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info.st_ino, info.st_mtime_ns, info.st_size
    info = fs.get_file_info(path)
    return (info.mtime_ns, info.size) if info.is_file else None


def checksum(fs: pafs.FileSystem, path: str) -> Json:
    """``bytes`` and ``sha256`` of a file, read as a stream. Raises FileNotFoundError or IsADirectoryError."""
    if isinstance(fs, pafs.LocalFileSystem):
        with open(path, "rb") as local:
            return {
                "bytes": os.fstat(local.fileno()).st_size,
                "sha256": hashlib.file_digest(local, "sha256").hexdigest(),
            }
    with fs.open_input_stream(path) as stream:
        sha, size = hashlib.sha256(), 0
        while block := stream.read(1 << 20):
            sha.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha.hexdigest()}


def problem(fs: pafs.FileSystem, path: str, entry: Json) -> str | None:
    """How a file differs from ``entry``, after reading all of it; None if it does not differ."""
    name = entry["file"]
    try:
        actual = checksum(fs, path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except IsADirectoryError:
        return f"{name} is a folder"
    if actual["bytes"] != entry["bytes"]:
        return f"{name} has {actual['bytes']} bytes, not {entry['bytes']}"
    return None if actual["sha256"] == entry["sha256"] else f"{name} has another checksum"


def require(fs: pafs.FileSystem, path: str, entry: Json) -> None:
    """Checks a file against ``entry``, unless this process checked the same version before. Raises Damaged."""
    now = stamp(fs, path)
    with _lock:
        known = _sound.get(path)
    if now is not None and known == (*now, entry["sha256"]):
        return
    wrong = problem(fs, path, entry)
    if wrong is not None:
        raise Damaged(f"{path} is {'missing' if 'missing' in wrong else 'damaged'}: {wrong}")
    remember(_sound, path, (*(now or ()), entry["sha256"]), KNOWN)


def require_all(fs: pafs.FileSystem, files: Iterable[tuple[str, Json]]) -> None:
    """``require`` for several files at once."""
    pairs = list(files)
    if len(pairs) < 2:
        for path, entry in pairs:
            require(fs, path, entry)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda file: require(fs, *file), pairs):
            pass


def local_copy(fs: pafs.FileSystem, source: str, entries: dict[str, Json]) -> str:
    """A copy on this machine of a file or folder of an object store. ``entries`` lists its files by relative path ("" if
    the source is a file). A damaged copy is fetched once more. Raises Damaged.
    """
    cache = os.path.join(scratch(), *source.split("/"))
    local = pafs.LocalFileSystem()
    for may_retry in (True, False):
        fetch(fs, source, cache)
        try:
            require_all(
                local, ((os.path.join(cache, name) if name else cache, entry) for name, entry in entries.items())
            )
            break
        except Damaged:
            if not may_retry:
                raise
            shutil.rmtree(cache, ignore_errors=True)
            Path(cache).unlink(missing_ok=True)
    return cache


def only_listed(folder: str, entries: dict[str, Json]) -> str:
    """The folder itself if it holds only ``entries``, else a folder of links to these.

    A library may open by name a file that another program left there (a synchroniser's copy, a half-written file).
    """
    root = Path(folder)
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    if present <= entries.keys():
        return folder
    name = digest([folder, sorted((name, entry["sha256"]) for name, entry in entries.items())])
    clean = Path(scratch(), "clean", name, root.name)
    for relative in entries:
        link = clean / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.is_symlink() and os.readlink(link) == str(root / relative)):
            link.unlink(missing_ok=True)
            link.symlink_to(root / relative)
    return str(clean)
