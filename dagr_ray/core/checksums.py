"""Whether files are as they were written: by checksum, once in a process for each file as it lies there.

A file is known by its place on the disk, its size and the time of its last change (an object store: size and time), so
what has been read through once costs a look at these afterwards. Reading through takes about a second for each GB.
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
READERS = 4  # files read through at once: hashing is what takes the time
KNOWN = 1 << 17  # files that a process remembers, about 300 bytes each

_lock = threading.Lock()
_sound: dict[str, Stamp] = {}


class Damaged(RuntimeError):
    """A file whose bytes are not those that were written. ``materialize`` rebuilds it and goes on."""


def remember(memory: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Keeps a value as the newest of at most ``limit``; None forgets it."""
    with _lock:
        memory.pop(key, None)
        if value is not None:
            memory[key] = value
        while len(memory) > limit:
            memory.pop(next(iter(memory)))


def stamp(fs: pafs.FileSystem, path: str) -> Stamp | None:
    """What changes when a file is written again; None where there is none."""
    if isinstance(fs, pafs.LocalFileSystem):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
    info = fs.get_file_info(path)
    return (info.mtime_ns, info.size) if info.is_file else None


def checksum(fs: pafs.FileSystem, path: str) -> Json:
    """``bytes`` and ``sha256`` of a file, read as a stream. Raises FileNotFoundError, IsADirectoryError."""
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
    """What is wrong with a file that should have the bytes of ``entry``, read through anew; None where nothing is."""
    name = entry["file"]
    try:
        found = checksum(fs, path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is missing"
    except IsADirectoryError:
        return f"{name} is a folder"
    if found["bytes"] != entry["bytes"]:
        return f"{name} has {found['bytes']} bytes, not {entry['bytes']}"
    return None if found["sha256"] == entry["sha256"] else f"{name} has another checksum"


def require(fs: pafs.FileSystem, path: str, entry: Json) -> None:
    """Reads a file through, unless this process has done so since it was written. Raises Damaged."""
    seen = stamp(fs, path)
    with _lock:
        known = _sound.get(path)
    if seen is not None and known == (*seen, entry["sha256"]):
        return
    wrong = problem(fs, path, entry)
    if wrong is not None:
        raise Damaged(f"{path} is {'missing' if 'missing' in wrong else 'not as it was written'}: {wrong}")
    remember(_sound, path, (*(seen or ()), entry["sha256"]), KNOWN)


def require_all(fs: pafs.FileSystem, files: Iterable[tuple[str, Json]]) -> None:
    """``require`` of several files at once."""
    listed = list(files)
    if len(listed) < 2:
        for path, entry in listed:
            require(fs, path, entry)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda each: require(fs, *each), listed):
            pass


def fetched(fs: pafs.FileSystem, source: str, entries: dict[str, Json]) -> str:
    """A copy on this machine of a file or folder of an object store whose files are ``entries``, by their paths below it
    ("" where it is a file). A copy that is not as it was written is fetched once more. Raises Damaged.
    """
    cache = os.path.join(scratch(), *source.split("/"))
    local = pafs.LocalFileSystem()
    for again in (True, False):
        fetch(fs, source, cache)
        try:
            require_all(local, ((os.path.join(cache, name) if name else cache, each) for name, each in entries.items()))
            break
        except Damaged:
            if not again:
                raise
            shutil.rmtree(cache, ignore_errors=True)
            Path(cache).unlink(missing_ok=True)
    return cache


def without_strangers(folder: str, entries: dict[str, Json]) -> str:
    """The folder, or where it holds more than ``entries`` a folder of links to these alone.

    What another program has left there (a synchroniser's copy, a half-written file) may have a name that a library opens.
    """
    root = Path(folder)
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    if there <= entries.keys():
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
