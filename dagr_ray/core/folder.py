"""A folder below a runs folder as files: read and written whole, JSON in the shapes and under the seals of ``shapes``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray.core import disk, shapes
from dagr_ray.core.checksums import remember
from dagr_ray.core.config import packed
from dagr_ray.core.paths import absolute
from dagr_ray.core.shapes import Json
from dagr_ray.core.storage import filesystem

log = logging.getLogger("dagr")
_told: dict[str, int] = {}
TOLD = 3  # warnings about the files of one kind in one folder


def folders_of(runs: str) -> list[tuple[str, pafs.FileInfo]]:
    """The folders of stages and studies below a runs folder, by name; what others have put there is left out."""
    fs, root = filesystem(runs)
    found = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return sorted((f.base_name, f) for f in found if f.type == pafs.FileType.Directory and shapes.is_ours(f.base_name))


class Folder:
    """Its files. Cheap to make and to pickle: it holds two strings until it is used."""

    def __init__(self, runs: str, name: str) -> None:
        self.runs, self.name = absolute(runs), name  # a worker that this is sent to stands elsewhere
        self.fs, root = filesystem(self.runs)
        self.path = f"{root}/{name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.runs, self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path})"

    @property
    def local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def write_bytes(self, relative: str, data: bytes | pa.Buffer, once: bool = False, lasting: bool = False) -> None:
        """Writes a file that is whole whenever it is seen (renamed into place; one put on an object store).

        ``once``: raises FileExistsError where the file is there already. An object store cannot tell: there the last
        writer stands. ``lasting``: a power cut after this does not undo it.
        """
        target = f"{self.path}/{relative}"
        if self.local:
            disk.write(target, data, self.path, once, lasting)
            return
        with self.fs.open_output_stream(target) as stream:
            stream.write(data)

    def read_bytes(self, relative: str) -> bytes | None:
        """A file's content, or None where there is none."""
        for more_tries in (True, True, False):
            try:
                with self.fs.open_input_stream(f"{self.path}/{relative}") as stream:
                    return stream.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError:
                if self.local and os.path.isdir(f"{self.path}/{relative}"):
                    return b""  # no file of ours, and none that is missing
                # an object store opens and reads in two requests: another driver may remove the file between them
                if self.local or not more_tries:
                    raise
        return None

    def write_json(self, relative: str, value: Any, once: bool = False) -> None:
        """Writes a JSON file, one of this folder's own kinds with its seal."""
        if shapes.is_known(relative):
            data = shapes.written(self.name, relative, value)
        else:
            data = json.dumps(packed(value), indent=1, ensure_ascii=False).encode()
        self.write_bytes(relative, data, once, lasting=True)

    def read_json(self, relative: str) -> Any:
        """A JSON file's value, or None where there is no file or it is damaged: see ``shapes``."""
        data = self.read_bytes(relative)
        if data is None:
            return None
        try:
            return shapes.read(self.name, relative, data)
        except shapes.Misshapen as error:
            self._tell(relative, str(error))
            return None

    def _tell(self, relative: str, why: str) -> None:
        path = f"{self.path}/{relative}"
        kind = path.rpartition("/")[0] if "/" in relative else path
        if path not in _told and _told.get(kind, 0) < TOLD:
            remember(_told, kind, _told.get(kind, 0) + 1, 4096)
            log.warning("%s is damaged and counts as missing: %s", path, why)
        remember(_told, path, 1, 4096)

    def problem(self, relative: str) -> str | None:
        """What is wrong with a JSON file of ours; None where it is sound, or not there."""
        data = self.read_bytes(relative)
        try:
            if data is not None:
                shapes.read(self.name, relative, data)
        except shapes.Misshapen as error:
            return f"{relative} is not as it was written: {error}"
        return None

    def lines(self, relative: str) -> list[Json]:
        """The objects of a log; what is damaged of it is left out, with a warning."""
        found, bad = shapes.lines(self.name, relative, self.read_bytes(relative) or b"")
        if bad:
            self._tell(relative, f"{bad} of its lines are not as they were written")
        return found

    def listing(self, relative: str) -> dict[str, int]:
        """Base name -> size of the finished files in a sub-folder: one listing call. Of our own, only those of our names."""
        selector = pafs.FileSelector(f"{self.path}/{relative}", allow_not_found=True)
        try:
            found = self.fs.get_file_info(selector)
        except FileNotFoundError:  # made by another writer after Arrow had not found it, and before it looked once more
            found = self.fs.get_file_info(selector)
        except OSError:
            if not self.local or not os.path.isfile(f"{self.path}/{relative}"):
                raise
            return {}  # a file where our folder should be
        ours = shapes.NAMES.get(relative)
        return {
            f.base_name: f.size
            for f in found
            if f.is_file and not f.base_name.endswith(".tmp") and (ours is None or ours.fullmatch(f.base_name))
        }

    def remove(self, relative: str) -> None:
        """Removes a file, if there is one."""
        if self.local:
            disk.remove(f"{self.path}/{relative}")
            return
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path}/{relative}")
