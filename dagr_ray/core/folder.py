"""The files of a folder below a runs folder: whole reads and writes; JSON is checked by ``shapes``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray.core import disk, shapes
from dagr_ray.core.checksums import remember
from dagr_ray.core.config import ConfigError, packed
from dagr_ray.core.paths import absolute
from dagr_ray.core.shapes import Json
from dagr_ray.core.storage import filesystem

log = logging.getLogger("dagr")
_warned: dict[str, int] = {}
MAX_WARNINGS = 3  # about the files of one kind in one folder


def folders_of(runs: str) -> list[tuple[str, pafs.FileInfo]]:
    """The folders of stages and studies below a runs folder, sorted by name; other entries are ignored."""
    fs, root = filesystem(runs)
    entries = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return sorted(
        (entry.base_name, entry)
        for entry in entries
        if entry.type == pafs.FileType.Directory and shapes.is_ours(entry.base_name)
    )


class _Bounds(NamedTuple):
    """Who reads, and the paths of the folders that it may read."""

    reader: str
    paths: set[str]


# Of the thread that works for a stage; None where nothing is bounded.
_bounds: ContextVar[_Bounds | None] = ContextVar("_bounds", default=None)


@contextlib.contextmanager
def reads_only(reader: str, folders: Iterable[Folder]) -> Iterator[set[str]]:
    """Inside, this thread can open ``folders`` and no other folder of a runs folder: ``Folder`` raises ConfigError.

    Yields the paths of those folders, to which more can be added. ``reader`` names the stage in the error.
    """
    paths = {folder.path for folder in folders}
    token = _bounds.set(_Bounds(reader, paths))
    try:
        yield paths
    finally:
        _bounds.reset(token)


@contextlib.contextmanager
def reads_all() -> Iterator[None]:
    """Inside, ``reads_only`` does not hold: for the builder of another stage."""
    token = _bounds.set(None)
    try:
        yield
    finally:
        _bounds.reset(token)


class Folder:
    """One folder. Cheap to make and to pickle: it holds two strings until it is used."""

    def __init__(self, runs: str, name: str) -> None:
        self.runs, self.name = absolute(runs), name  # absolute: a worker has another working directory
        self.fs, root = filesystem(self.runs)
        self.path = f"{root}/{name}"
        self._demand_readable()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.runs, self.name)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (other.runs, other.name) == (self.runs, self.name)

    def __hash__(self) -> int:
        return hash((self.runs, self.name))

    def _demand_readable(self) -> None:
        """Raises ConfigError if a stage opens a folder that is none of its inputs: see ``reads_only``."""
        bounds = _bounds.get()
        if bounds is not None and self.path not in bounds.paths:
            raise ConfigError(
                f"{bounds.reader}: opens {self.name!r}, which is none of its inputs; make it a field of the stage, "
                "or declare it with `derived`"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path})"

    @property
    def local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def write_bytes(self, relative: str, data: bytes | pa.Buffer, once: bool = False, lasting: bool = False) -> None:
        """Writes a file so that readers see a whole file or none (rename on a disk, one put on an object store).

        ``once``: raises FileExistsError if the file exists. An object store cannot tell: there the last writer wins.
        ``lasting``: the file survives a power cut after this returns.
        """
        target = f"{self.path}/{relative}"
        if self.local:
            disk.write(target, data, self.path, once, lasting)
            return
        with self.fs.open_output_stream(target) as stream:
            stream.write(data)

    def read_bytes(self, relative: str) -> bytes | None:
        """A file's content, or None if there is no file."""
        self._demand_readable()
        for more_tries in (True, True, False):
            try:
                with self.fs.open_input_stream(f"{self.path}/{relative}") as stream:
                    return stream.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError:
                if self.local and os.path.isdir(f"{self.path}/{relative}"):
                    return b""  # a folder in place of a file: not ours, but not missing
                # an object store opens and reads in two requests: another driver may remove the file in between
                if self.local or not more_tries:
                    raise
        return None

    def write_json(self, relative: str, value: Any, once: bool = False) -> None:
        """Writes a JSON file; a file of one of this folder's own kinds gets its seal."""
        if shapes.is_known(relative):
            data = shapes.sealed_json(self.name, relative, value)
        else:
            data = json.dumps(packed(value), indent=1, ensure_ascii=False).encode()
        self.write_bytes(relative, data, once, lasting=True)

    def read_json(self, relative: str) -> Any:
        """A JSON file's value, or None if the file is missing or damaged: see ``shapes``."""
        data = self.read_bytes(relative)
        if data is None:
            return None
        try:
            return shapes.read(self.name, relative, data)
        except shapes.Malformed as error:
            self._warn(relative, str(error))
            return None

    def _warn(self, relative: str, why: str) -> None:
        path = f"{self.path}/{relative}"
        kind = path.rpartition("/")[0] if "/" in relative else path
        if path not in _warned and _warned.get(kind, 0) < MAX_WARNINGS:
            remember(_warned, kind, _warned.get(kind, 0) + 1, 4096)
            log.warning("%s is damaged and is treated as missing: %s", path, why)
        remember(_warned, path, 1, 4096)

    def problem(self, relative: str) -> str | None:
        """What is wrong with a JSON file of this package; None if it is sound or missing."""
        data = self.read_bytes(relative)
        try:
            if data is not None:
                shapes.read(self.name, relative, data)
        except shapes.Malformed as error:
            return f"{relative} is damaged: {error}"
        return None

    def lines(self, relative: str) -> list[Json]:
        """The objects of a log; damaged lines are omitted, with a warning."""
        values, bad = shapes.lines(self.name, relative, self.read_bytes(relative) or b"")
        if bad:
            self._warn(relative, f"{bad} of its lines are damaged")
        return values

    def listing(self, relative: str) -> dict[str, int]:
        """Base name -> size of the finished files in a sub-folder, by one listing call. Files of other names are ignored."""
        selector = pafs.FileSelector(f"{self.path}/{relative}", allow_not_found=True)
        try:
            entries = self.fs.get_file_info(selector)
        except FileNotFoundError:  # Arrow checks twice, and another writer may make the folder in between
            entries = self.fs.get_file_info(selector)
        except OSError:
            if not self.local or not os.path.isfile(f"{self.path}/{relative}"):
                raise
            return {}  # a file in place of the folder
        ours = shapes.NAMES.get(relative)
        return {
            entry.base_name: entry.size
            for entry in entries
            if entry.is_file
            and not entry.base_name.endswith(".tmp")
            and (ours is None or ours.fullmatch(entry.base_name))
        }

    def remove(self, relative: str) -> None:
        """Removes a file if it exists."""
        if self.local:
            disk.remove(f"{self.path}/{relative}")
            return
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path}/{relative}")
