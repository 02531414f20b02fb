"""Checkpoints of a training as files below the stage's folder, on a disk or an object store.

    checkpoints/00000200-5c1e/weights.safetensors ...   the files of each worker at step 200
    checkpoints/00000200-5c1e/rank-0.json               written last by a worker: its files with their checksums

A checkpoint is complete once each of its workers has written its list. Nothing is renamed, and a driver that is wrongly
assumed dead cannot damage a checkpoint, because each attempt uses its own names.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from dagr_ray.core import disk
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.shapes import NAMES
from dagr_ray.core.storage import below

log = logging.getLogger("dagr")
FOLDER = "checkpoints"
MOST_WORKERS = 65536


class Checkpoints:
    """The checkpoints of one training. ``attempt`` is a name that no other attempt uses."""

    def __init__(self, folder: Artifact, attempt: str, rank: int = 0, workers: int = 1) -> None:
        self.folder, self.attempt, self.rank, self.workers = folder, attempt, rank, workers
        self.root = f"{folder.path}/{FOLDER}"
        self._before = ""  # the last complete checkpoint, kept in case the next one fails

    def put(self, step: int, files: Path) -> None:
        """Adds this worker's files of a step. The first worker removes all but this checkpoint and the one before."""
        name = f"{step:08d}-{self.attempt}"
        listed = {}
        for path in sorted(path for path in files.rglob("*") if path.is_file()):
            relative = path.relative_to(files).as_posix()
            listed[relative] = _sha256(path)
            target = f"{self.root}/{name}/{relative}"
            if self.folder.local:  # an object store has no folders
                self.folder.fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
            pafs.copy_files(str(path), target, destination_filesystem=self.folder.fs)
        manifest = {"workers": self.workers, "files": listed}
        if self.folder.local:
            disk.flush(f"{self.root}/{name}/{relative}" for relative in listed)
        self.folder.write_json(f"{FOLDER}/{name}/rank-{self.rank}.json", manifest)
        if self.rank == 0:
            for old in set(self._names()) - {name, self._before}:
                self._remove(old)
        self._before = name  # all workers synchronise before the next checkpoint

    def last(self, into: Path) -> int | None:
        """Copies the last complete checkpoint into a folder and returns its step; None if there is none."""
        for name in self._names():
            target = into / name
            if self._fetch(name, target):
                for path in target.iterdir():
                    path.rename(into / path.name)
                target.rmdir()
                self._before = name
                return int(name.split("-")[0])
            shutil.rmtree(target)
            log.warning("%s: checkpoint %s is not complete; an older one is used", self.folder.name, name)
        return None

    def clear(self) -> None:
        """Removes all checkpoints."""
        self._remove("")

    def _names(self) -> list[str]:
        """The names of the checkpoints, newest first. Other folders are ignored."""
        entries = self.folder.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        names = (entry.base_name for entry in entries if entry.type == pafs.FileType.Directory)
        return sorted(filter(NAMES[FOLDER].fullmatch, names), reverse=True)

    def _fetch(self, name: str, target: Path) -> bool:
        target.mkdir(parents=True)
        rank, workers = 0, 1
        while rank < workers:
            manifest = _worker_files(self.folder.read_json(f"{FOLDER}/{name}/rank-{rank}.json"))
            if manifest is None:
                return False
            workers, files = manifest
            rank += 1
            for relative, sha in files.items():
                try:
                    path = Path(below(target, relative, source=name))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pafs.copy_files(f"{self.root}/{name}/{relative}", str(path), source_filesystem=self.folder.fs)
                except (ConfigError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
                    return False
                if _sha256(path) != sha:
                    return False
        return True

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.folder.fs.delete_dir(f"{self.root}/{name}".rstrip("/"))


def _worker_files(value: Any) -> tuple[int, dict[str, str]] | None:
    """The number of workers, and a worker's files with their checksums; None if the value is not valid."""
    if not isinstance(value, dict):
        return None
    workers, files = value.get("workers"), value.get("files")
    if type(workers) is not int or not 1 <= workers <= MOST_WORKERS or not isinstance(files, dict):
        return None
    return (workers, files) if all(isinstance(sha, str) for sha in files.values()) else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
