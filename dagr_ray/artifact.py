"""A stage's folder: plan first, shards committed by receipts, manifest last.

    runs/generate-promptagator-3f9c1a2b7d04/
      plan.json                                 written first: config, inputs, shard -> row range
      generations/part-00000-1f0c9a3e.parquet   a part is named by its content
      receipts/00000.json                       names the parts of one shard with their checksums: present == committed
      attempts/001-9c1f.jsonl                   what happened; a resume adds a file
      manifest.json                             written last: its presence == complete

A shard writes all its parts and then its receipt, so every table of a shard appears at once or not at all. Parts are
named by content, and readers follow receipts and manifests only: two writers of one shard cannot mix their bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from dagr_ray import tables as schemas
from dagr_ray.config import packed, unpacked
from dagr_ray.store import fetch, filesystem, scratch

Json = dict[str, Any]
log = logging.getLogger("dagr")
READERS = 32  # small files read at once from an object store, which takes about 30 ms for each
ROW_GROUP = 8192  # so that a few rows of a large part are read without the others


@dataclass
class _Known:
    """A manifest as it lay in its folder, and what follows from it."""

    path: str
    stamp: tuple[Any, ...]
    manifest: Json
    shards: list[Json] = field(default_factory=list)  # of the plan
    offsets: dict[str, list[int]] = field(default_factory=dict)

    def parts(self, name: str) -> list[Json]:
        """The parts of a table in shard order."""
        made = self.manifest["tables"]
        assert name in made, f"{self.path} has no table {name!r}; it has {sorted(made)}"
        return made[name]["parts"]

    def starts(self, name: str) -> list[int]:
        """The row that each part begins with; the number of rows last."""
        if name not in self.offsets:
            self.offsets[name] = list(accumulate((part["rows"] for part in self.parts(name)), initial=0))
        return self.offsets[name]


# What this process has read of finished folders: with 10,000 shards, a manifest takes 0.1 s to parse.
_memory = threading.Lock()
_folders: dict[tuple[str, str], _Known] = {}
_sound: dict[str, tuple[Any, ...]] = {}


def _remember(memory: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    with _memory:
        memory.pop(key, None)
        if value is not None:
            memory[key] = value
        while len(memory) > limit:
            memory.pop(next(iter(memory)))


class Damaged(RuntimeError):
    """A part whose bytes are not those that were written. ``materialize`` rebuilds it and goes on."""


def _receipt(shard: int) -> str:
    return f"receipts/{shard:05d}.json"


def _revoked(shard: int) -> str:
    return f"revoked/{shard:05d}-{uuid.uuid4().hex[:4]}.json"


class Artifact:
    """One folder below a runs folder. Cheap to make and to pickle: it holds two strings until it is used."""

    def __init__(self, runs: str, name: str) -> None:
        self.runs, self.name = str(runs), name
        self.fs, root = filesystem(self.runs)
        self.path = f"{root}/{name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Artifact, (self.runs, self.name)

    def __repr__(self) -> str:
        return f"Artifact({self.path})"

    @property
    def local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def local_path(self, *parts: str) -> str:
        """A path on this machine's disk; files of a remote folder are copied to a cache named by the folder first."""
        target = "/".join([self.path, *parts])
        if self.local:
            return target
        cache = os.path.join(scratch(), *self.path.split("/"), *parts)
        fetch(self.fs, target, cache)
        return cache

    # -- small files ------------------------------------------------------------------------------------------------

    def write_bytes(self, relative: str, data: bytes | pa.Buffer, once: bool = False) -> None:
        """Writes a file that is whole whenever it is seen (renamed into place; one put on an object store).

        ``once``: raises FileExistsError where the file is there already. An object store cannot tell: there the last
        writer stands.
        """
        target = f"{self.path}/{relative}"
        if self.local:  # an object store has no folders; to make them is a request for each level
            os.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        written = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.local else target
        try:
            with self.fs.open_output_stream(written) as stream:
                stream.write(data)
        except OSError as error:  # Arrow does not say which file, or how much room there is
            with contextlib.suppress(OSError):
                self.fs.delete_file(written)
            raise OSError(error.errno, os.strerror(error.errno) if error.errno else str(error), target) from error
        if written == target:
            return
        if once:
            try:
                os.link(written, target)
                return
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links: there, too, the last writer stands
                os.replace(written, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(written)
        else:
            os.replace(written, target)

    def read_bytes(self, relative: str) -> bytes | None:
        """A file's content, or None where there is none."""
        for more_tries in (True, True, False):
            try:
                with self.fs.open_input_stream(f"{self.path}/{relative}") as stream:
                    return stream.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError:
                # an object store opens and reads in two requests: another driver may remove the file between them
                if self.local or not more_tries:
                    raise
        return None

    def write_json(self, relative: str, value: Any) -> None:
        self.write_bytes(relative, json.dumps(packed(value), indent=1, ensure_ascii=False).encode())

    def read_json(self, relative: str) -> Any:
        """A JSON file's value, or None where there is no file or it is not whole."""
        data = self.read_bytes(relative)
        try:
            return None if data is None else unpacked(data)
        except ValueError:
            return None

    def listing(self, relative: str) -> dict[str, int]:
        """Base name -> size of the finished files in a sub-folder: one listing call."""
        selector = pafs.FileSelector(f"{self.path}/{relative}", allow_not_found=True)
        try:
            found = self.fs.get_file_info(selector)
        except FileNotFoundError:  # made by another writer after Arrow had not found it, and before it looked once more
            found = self.fs.get_file_info(selector)
        return {f.base_name: f.size for f in found if f.is_file and not f.base_name.endswith(".tmp")}

    def remove(self, relative: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path}/{relative}")

    # -- shards -----------------------------------------------------------------------------------------------------

    def commit(self, shard: int, rows: dict[str, pa.Table], more: Json, files: Iterable[str] = ()) -> Json:
        """Writes every table of a shard, then its receipt. ``more`` (counts, cost) is kept in the receipt.

        Files named in ``files`` (already in the folder, relative paths) are recorded with their checksums. If another
        writer committed the same rows (``more["rows"]``) meanwhile, its receipt stands and is returned.
        """
        parts = {name: self._write_part(name, shard, value) for name, value in rows.items()}
        receipt = {"shard": shard, "tables": parts, "files": {f: self._checksum(f) for f in files}, **more}
        earlier = self.receipt(shard)
        if earlier is not None:
            if earlier.get("rows") == receipt.get("rows"):
                return self._too_late(receipt, earlier)
            self._too_late(earlier, receipt)
            self.remove(_receipt(shard))
        try:
            self.write_bytes(_receipt(shard), json.dumps(receipt, indent=1, ensure_ascii=False).encode(), once=True)
        except FileExistsError:
            return self._too_late(receipt, self.read_json(_receipt(shard)))
        return receipt

    def receipt(self, shard: int) -> Json | None:
        """The receipt of a shard, or None where it is not committed."""
        return self.read_json(_receipt(shard))

    def _too_late(self, receipt: Json, stands: Json) -> Json:
        self.write_json(_revoked(receipt["shard"]), receipt)  # it was paid for
        return stands

    def _write_part(self, name: str, shard: int, value: pa.Table) -> Json:
        sink = io.BytesIO()
        pq.write_table(
            schemas.check(name, value), sink, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True
        )
        data = sink.getvalue()
        sha = hashlib.sha256(data).hexdigest()
        file = f"{name}/part-{shard:05d}-{sha[:8]}.parquet"
        self.write_bytes(file, data)
        return {"file": file, "rows": value.num_rows, "bytes": len(data), "sha256": sha}

    def _checksum(self, relative: str) -> Json:
        with self.fs.open_input_stream(f"{self.path}/{relative}") as stream:
            sha, size = hashlib.sha256(), 0
            while block := stream.read(1 << 20):
                sha.update(block)
                size += len(block)
        return {"file": relative, "bytes": size, "sha256": sha.hexdigest()}

    def receipts(self) -> dict[int, Json]:
        """Shard -> receipt, for the shards that are committed."""
        return {receipt["shard"]: receipt for receipt in self._read_all("receipts")}

    def _read_all(self, folder: str) -> list[Json]:
        names = [f"{folder}/{name}" for name in sorted(self.listing(folder))]
        if self.local or len(names) < 2:
            found = [self.read_json(name) for name in names]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                found = list(pool.map(self.read_json, names))
        return [value for value in found if value is not None]

    def damaged(self, deep: bool = False) -> dict[int, str]:
        """Committed shards whose parts are missing or of another size (``deep``: or of another checksum) -> what is wrong."""
        problems: dict[int, str] = {}
        sizes: dict[str, dict[str, int]] = {}
        for shard, part in self._committed():
            folder, _, base = part["file"].rpartition("/")
            if folder not in sizes:
                sizes[folder] = self.listing(folder)
            size = sizes[folder].get(base)
            if size is None:
                problems[shard] = f"{part['file']} is missing"
            elif size != part["bytes"]:
                problems[shard] = f"{part['file']} has {size} bytes, not {part['bytes']}"
            elif deep and self._checksum(part["file"])["sha256"] != part["sha256"]:
                problems[shard] = f"{part['file']} has another checksum"
        return problems

    def _committed(self) -> Iterator[tuple[int, Json]]:
        """(shard, part or file) of all committed shards: from the manifest where there is one, which is one file to read."""
        manifest = self.manifest
        if manifest is not None and not manifest.get("files"):
            for made in manifest["tables"].values():
                for part in made["parts"]:
                    yield int(part["file"].rpartition("/part-")[2].partition("-")[0]), part
            return
        for shard, receipt in self.receipts().items():
            for part in [*receipt["tables"].values(), *receipt["files"].values()]:
                yield shard, part

    def revoke(self, shards: Iterable[int]) -> None:
        """Takes shards back, so that they are built again. What they cost stays in the bill: see ``revoked``."""
        self.remove("manifest.json")
        _remember(_folders, (self.runs, self.path), None, 64)
        marks = self.listing("tries")
        for shard in shards:
            receipt = self.read_bytes(_receipt(shard))
            if receipt is not None:
                for mark in (name for name in marks if name.startswith(f"{shard:05d}-")):
                    self.remove(f"tries/{mark}")  # its cost is the receipt's
                self.write_bytes(_revoked(shard), receipt)
                self.remove(_receipt(shard))

    def revoked(self) -> list[Json]:
        """The receipts of shards that were taken back: work that was paid for and is not in the tables."""
        return self._read_all("revoked")

    # -- the finished folder ----------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Json | None:
        """The manifest, or None while the folder is not complete. Shared by all who ask: not to be changed."""
        known = self._known()
        return known.manifest if known else None

    def _known(self) -> _Known | None:
        stamp = self._stamp("manifest.json")
        with _memory:
            known = _folders.get((self.runs, self.path))
        if known is None or known.stamp != stamp:
            manifest = self.read_json("manifest.json") if stamp else None
            known = _Known(self.path, stamp, manifest) if stamp and manifest is not None else None
            _remember(_folders, (self.runs, self.path), known, 64)
        return known

    def _stamp(self, relative: str) -> tuple[Any, ...] | None:
        """What changes when a file is written again; None where there is none."""
        if self.local:
            try:
                found = os.stat(f"{self.path}/{relative}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_ino, found.st_mtime_ns, found.st_size
        info = self.fs.get_file_info(f"{self.path}/{relative}")
        return (info.mtime_ns, info.size) if info.is_file else None

    def table_names(self) -> list[str]:
        return sorted(self._finished().manifest["tables"])

    def _finished(self) -> _Known:
        known = self._known()
        if known is None:
            raise FileNotFoundError(errno.ENOENT, "not complete, or away", self.path)
        return known

    def count(self, name: str) -> int:
        """Rows of a table, from the manifest."""
        return self._finished().starts(name)[-1]

    def scan(self, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table part by part, in shard order."""
        for part in self._finished().parts(name):
            yield self._read_part(part, columns)

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table. Raises FileNotFoundError if the folder is not complete, AssertionError if it has no such table."""
        found = list(self.scan(name, columns))
        return pa.concat_tables(found) if found else schemas.empty(name)

    def slice(self, name: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows ``start`` to ``stop`` of a table, reading only what holds them."""
        empty = schemas.empty(name)
        found = [empty if columns is None else empty.select(columns)]
        known = self._finished()
        parts, offsets = known.parts(name), known.starts(name)
        at = bisect.bisect_right(offsets, start) - 1
        while at < len(parts) and offsets[at] < stop:
            first, last = max(start - offsets[at], 0), min(stop, offsets[at + 1]) - offsets[at]
            if first == 0 and last == parts[at]["rows"]:
                found.append(self._read_part(parts[at], columns))
            elif first < last:
                found.append(self._read_rows(parts[at], columns, first, last))
            at += 1
        return pa.concat_tables(found)

    def ranges(self, name: str, step: int) -> list[tuple[int, int]]:
        """The rows of a table in ranges of whole parts: as many as fit into ``step`` rows, at least one."""
        ends = self._finished().starts(name)[1:]
        found, start = [], 0
        for end, after in zip(ends, [*ends[1:], None], strict=False):
            if end > start and (after is None or after - start > step):
                found.append((start, end))
                start = end
        return found

    def source_rows(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of the input, widened to whole shards, that rows ``start`` to ``stop`` of a table were made from."""
        known = self._finished()
        offsets = known.starts(name)
        if not known.shards:
            known.shards = self.read_json("plan.json")["shards"]
        if start >= stop:
            return 0, 0
        assert len(offsets) == len(known.shards) + 1, (
            f"{self.path}: {len(offsets) - 1} parts, {len(known.shards)} shards"
        )
        first, last = bisect.bisect_right(offsets, start) - 1, bisect.bisect_left(offsets, stop) - 1
        return known.shards[first]["start"], known.shards[last]["stop"]

    def _read_part(self, part: Json, columns: list[str] | None) -> pa.Table:
        # a flipped bit would else be an error from deep inside, or a wrong row that nobody sees
        data = self.read_bytes(part["file"])
        if data is None or hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise Damaged(f"{self.path}/{part['file']} is {'missing' if data is None else 'not as it was written'}")
        with pq.ParquetFile(pa.BufferReader(data)) as opened:
            return schemas.widened(part["file"].split("/")[0], opened.read(columns), columns)

    def _read_rows(self, part: Json, columns: list[str] | None, first: int, last: int) -> pa.Table:
        """Some rows of a part. All of it is checked once in a process, later only the pages that are read."""
        stamp, file = self._stamp(part["file"]), f"{self.path}/{part['file']}"
        with _memory:
            sound = _sound.get(file) == stamp
        if stamp is None or (not sound and self._checksum(part["file"])["sha256"] != part["sha256"]):
            raise Damaged(f"{file} is {'missing' if stamp is None else 'not as it was written'}")
        _remember(_sound, file, stamp, 4096)
        with self.fs.open_input_file(file) as stream:
            opened = pq.ParquetFile(stream, page_checksum_verification=True)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = list(accumulate(sizes, initial=0))
            groups = [i for i, (a, b) in enumerate(pairwise(starts)) if a < last and b > first]
            rows = schemas.widened(part["file"].split("/")[0], opened.read_row_groups(groups, columns), columns)
        return rows.slice(first - starts[groups[0]], last - first)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One builder at a time on a local disk: a second driver waits here and then finds the work done.

        The kernel drops the lock of a killed process. Object stores have no locks; there the receipts alone keep two
        builders from harming each other, at the price of doing some shards twice.
        """
        if not self.local:
            yield
            return
        import fcntl

        os.makedirs(self.path, exist_ok=True)
        with open(f"{self.path}/.lock", "a+", encoding="utf-8") as handle:  # what it says is of its holder
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = " ".join(handle.read(200).split()) or "another process"
                log.warning("waiting for %s: %s is at work on it", self.path, holder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            handle.truncate()
            handle.write(f"process {os.getpid()} of {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
            handle.flush()
            yield


class Attempt:
    """The event log of one try at a folder: ``attempts/001-9c1f.jsonl``, whole lines, never overwritten by a later try."""

    def __init__(self, folder: Artifact) -> None:
        self.folder = folder
        self.number = len(folder.listing("attempts")) + 1
        # two drivers on an object store, which has no locks, may count the same
        self.name = f"{self.number:03d}-{uuid.uuid4().hex[:4]}"
        self.lines: list[str] = []

    def note(self, event: str, **detail: Any) -> None:
        """Adds an event with the time and writes the log out."""
        self.lines.append(json.dumps({"at": time.time(), "event": event, **detail}, ensure_ascii=False))
        self.folder.write_bytes(f"attempts/{self.name}.jsonl", ("\n".join(self.lines) + "\n").encode())


def add_up(total: Json, more: Json) -> Json:
    """Sums two trees of numbers key by key (counts, rejections by reason, cost)."""
    for key, value in more.items():
        total[key] = add_up(total.get(key, {}), value) if isinstance(value, dict) else total.get(key, 0) + value
    return total
