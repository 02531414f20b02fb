"""A stage's folder: plan first, shards committed by receipts, manifest last.

    runs/generate-promptagator-3f9c1a2b7d04/
      plan.json                                 written first: config, inputs, shard -> row range
      generations/part-00000-1f0c9a3e.parquet   a part is named by its content
      receipts/00000.json                       names the parts of one shard with their checksums: present == committed
      attempts/001-9c1f.jsonl                   event log; a resume adds a file
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
import logging
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dagr_ray.core import checksums, disk, shapes, tables as schemas
from dagr_ray.core.checksums import Damaged
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.folder import Folder, folders_of
from dagr_ray.core.shapes import Json

__all__ = ["Artifact", "AttemptLog", "Damaged", "Json", "add_up", "folders_of"]
log = logging.getLogger("dagr")
READERS = 32  # small files read at once from an object store, which takes about 30 ms for each
ROW_GROUP = 8192  # small, so that a few rows of a large part can be read alone
PLAN = -1  # stands for the folder's plan among shards
# Two writers of a shard give their files unique suffixes, which do not belong to the content.
_OWN = re.compile(r"-[0-9a-f]{8}(?=/)")
_EMPTY: Json = {"stage": {}, "inputs": {}, "files": {}, "counts": {}, "cost": {}, "price": 0.0}


@dataclass
class _Known:
    """A manifest as it was read, and values derived from it."""

    path: str
    stamp: tuple[Any, ...]
    manifest: Json
    offsets: dict[str, list[int]] = field(default_factory=dict)

    def parts(self, name: str) -> list[Json]:
        """The parts of a table in shard order."""
        manifest_tables = self.manifest["tables"]
        assert name in manifest_tables, f"{self.path} has no table {name!r}; it has {sorted(manifest_tables)}"
        return manifest_tables[name]["parts"]

    def starts(self, name: str) -> list[int]:
        """The first row of each part, and the number of rows at the end."""
        if name not in self.offsets:
            self.offsets[name] = list(accumulate((part["rows"] for part in self.parts(name)), initial=0))
        return self.offsets[name]


# Manifests that this process has read: with 10,000 shards, a manifest takes 0.1 s to parse.
_folders: dict[tuple[str, str], _Known] = {}
_plans: dict[tuple[str, str], tuple[tuple[Any, ...], Json]] = {}
_contents: dict[tuple[str, str], tuple[tuple[Any, ...], str]] = {}


def _receipt(shard: int) -> str:
    return f"receipts/{shard:05d}.json"


def _revoked(shard: int) -> str:
    return f"revoked/{shard:05d}-{uuid.uuid4().hex[:4]}.json"


class Artifact(Folder):
    """One folder below a runs folder. Cheap to make and to pickle: it holds two strings until it is used."""

    def local_path(self, *parts: str) -> str:
        """The local path of a file or folder, after its checksums are verified; a remote one is copied to a cache first.
        A folder holds only the files that the stage has written. Raises Damaged.
        """
        target = "/".join([self.path, *parts])
        below = "/".join(parts)
        files = (self.manifest or {}).get("files", {})
        entries = {
            name[len(below) :].lstrip("/"): entry
            for name, entry in files.items()
            if name == below or not below or name.startswith(f"{below}/")
        }
        if self.local:
            checksums.require_all(self.fs, ((f"{self.path}/{entry['file']}", entry) for entry in entries.values()))
            path = target
        else:
            path = checksums.local_copy(self.fs, target, entries)
        return checksums.only_listed(path, entries) if entries and "" not in entries else path

    def json_of(self, relative: str) -> Any:
        """The value of a JSON file that the stage has written itself. Raises Damaged."""
        entry = (self.manifest or {}).get("files", {}).get(relative)
        if entry is not None:
            checksums.require(self.fs, f"{self.path}/{relative}", entry)
        value = self.read_json(relative)
        if value is None:
            raise Damaged(f"{self.path}/{relative} is missing or damaged")
        return value

    @property
    def plan(self) -> Json:
        """``plan.json``, cached while the file is unchanged. Shared: do not modify it. Raises Damaged."""
        key, stamp = (self.runs, self.path), checksums.stamp(self.fs, f"{self.path}/plan.json")
        cached = _plans.get(key)
        if cached is None or cached[0] != stamp:
            plan = self.read_json("plan.json")
            if plan is None:
                raise Damaged(f"{self.path}/plan.json is missing or damaged")
            cached = (stamp or (), plan)
            checksums.remember(_plans, key, cached, 8)
        return cached[1]

    # -- shards -----------------------------------------------------------------------------------------------------

    def commit(self, shard: int, rows: dict[str, pa.Table], more: Json, files: Iterable[str] = ()) -> Json:
        """Writes every table of a shard, then its receipt. ``more`` (counts, cost) goes into the receipt.

        Files named in ``files`` (already in the folder, relative paths) are recorded with their checksums. If another
        writer committed the same rows (``more["rows"]``) meanwhile, its receipt stands and is returned.
        """
        parts = {name: self._write_part(name, shard, value) for name, value in rows.items()}
        file_entries = {f: {"file": f, **checksums.checksum(self.fs, f"{self.path}/{f}")} for f in files}
        receipt = {"shard": shard, "tables": parts, "files": file_entries, **more}
        if self.local:  # the receipt must not outlive its files: one flush for all files of a shard
            paths = [f"{self.path}/{entry['file']}" for entry in (*parts.values(), *file_entries.values())]
            disk.flush([*paths, *dict.fromkeys(path.rsplit("/", 1)[0] for path in paths)])
        earlier = self.receipt(shard)
        if earlier is not None:
            if earlier.get("rows") == receipt.get("rows"):
                return self._too_late(receipt, earlier)
            self._too_late(earlier, receipt)
        if earlier is not None or self.read_bytes(_receipt(shard)) is not None:
            self.remove(_receipt(shard))
        try:
            self.write_json(_receipt(shard), receipt, once=True)
        except FileExistsError:
            stands = self.receipt(shard)
            if stands is not None:
                return self._too_late(receipt, stands)
            self.write_json(_receipt(shard), receipt)
        return receipt

    def receipt(self, shard: int) -> Json | None:
        """The receipt of a shard; None if the shard is not committed."""
        return self.read_json(_receipt(shard))

    def _too_late(self, receipt: Json, stands: Json) -> Json:
        self.write_json(_revoked(receipt["shard"]), receipt)  # its cost stays in the bill
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

    def receipts(self) -> dict[int, Json]:
        """Shard -> receipt, for committed shards."""
        return {receipt["shard"]: receipt for receipt in self._read_all("receipts").values() if receipt is not None}

    def _read_all(self, folder: str) -> dict[str, Json | None]:
        """Base name -> value of the files in a sub-folder; None for a damaged file."""
        names = sorted(self.listing(folder))
        paths = [f"{folder}/{name}" for name in names]
        if self.local or len(names) < 2:
            return dict(zip(names, map(self.read_json, paths), strict=True))
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(names, pool.map(self.read_json, paths), strict=True))

    def damaged(self, deep: bool = False) -> dict[int, str]:
        """Committed shards with files that are missing or of another size (``deep``: or checksum) -> what is wrong.

        The manifest of a finished folder lists the expected files; its receipts and plan are only checked if ``deep``.
        ``PLAN`` stands for the plan.
        """
        manifest = self.manifest
        problems: dict[int, str] = {}
        receipts: dict[str, Json | None] = {}
        if manifest is None or deep or any("shard" not in entry for entry in manifest["files"].values()):
            receipts = self._read_all("receipts")
        if manifest is None or deep:
            problems = {
                shapes.shard_of(name): f"receipts/{name} is damaged"
                for name, receipt in receipts.items()
                if receipt is None
            }
        if manifest is not None and deep and shapes.is_stage(self.name):
            problems |= self._missing(receipts)
        sizes: dict[str, dict[str, int]] = {}
        for shard, part in self._committed(manifest, receipts):
            folder, _, base = part["file"].rpartition("/")
            if folder not in sizes:
                sizes[folder] = self.listing(folder)
            size = sizes[folder].get(base)
            if size is None:
                problems[shard] = f"{part['file']} is missing"
            elif size != part["bytes"]:
                problems[shard] = f"{part['file']} has {size} bytes, not {part['bytes']}"
            elif deep and (wrong := checksums.problem(self.fs, f"{self.path}/{part['file']}", part)):
                problems[shard] = wrong
        return problems

    def _missing(self, receipts: dict[str, Json | None]) -> dict[int, str]:
        """Problems of a finished folder's plan, or receipts that are missing."""
        plan = self.read_json("plan.json")
        if plan is None:
            return {PLAN: self.problem("plan.json") or "plan.json is missing"}
        names = (f"{i:05d}.json" for i in range(len(plan["shards"])))
        return {shapes.shard_of(name): f"receipts/{name} is missing" for name in names if name not in receipts}

    def _committed(self, manifest: Json | None, receipts: dict[str, Json | None]) -> Iterator[tuple[int, Json]]:
        """(shard, part or file) of all committed shards: from the manifest if there is one, because it is a single file."""
        sound_ones = [receipt for receipt in receipts.values() if receipt is not None]
        if manifest is None:
            for receipt in sound_ones:
                for part in [*receipt["tables"].values(), *receipt["files"].values()]:
                    yield receipt["shard"], part
            return
        for table in manifest["tables"].values():
            for part in table["parts"]:
                yield shapes.shard_of(part["file"]), part
        owners = {file: receipt["shard"] for receipt in sound_ones for file in receipt["files"]}
        for file, entry in manifest["files"].items():
            yield entry.get("shard", owners.get(file, 0)), entry

    def revoke(self, shards: Iterable[int]) -> None:
        """Revokes shards, so that they are built again. Their cost stays in the bill: see ``revoked``."""
        self.remove("manifest.json")
        checksums.remember(_folders, (self.runs, self.path), None, 64)
        marks = self.listing("tries")
        for shard in shards:
            if shard == PLAN:
                self.remove("plan.json")
                continue
            receipt = self.receipt(shard)
            if receipt is not None:
                for mark in (name for name in marks if name.startswith(f"{shard:05d}-")):
                    self.remove(f"tries/{mark}")  # the receipt has its cost
                self.write_json(_revoked(shard), receipt)
            self.remove(_receipt(shard))

    def restart(self) -> None:
        """Revokes all shards and the plan, because an input has other content now."""
        self.revoke([shapes.shard_of(name) for name in self.listing("receipts")])
        self.remove("plan.json")

    def revoked(self) -> list[Json]:
        """The receipts of revoked shards: work that was paid for and is not in the tables."""
        return [receipt for receipt in self._read_all("revoked").values() if receipt is not None]

    # -- the finished folder ----------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Json | None:
        """The manifest; None while the folder is incomplete. Shared: do not modify it."""
        known = self._known()
        return known.manifest if known else None

    def _known(self) -> _Known | None:
        self._demand_readable()
        stamp, key = checksums.stamp(self.fs, f"{self.path}/manifest.json"), (self.runs, self.path)
        known = _folders.get(key)
        if known is None or known.stamp != stamp:
            manifest = self.read_json("manifest.json") if stamp else None
            known = _Known(self.path, stamp, _EMPTY | manifest) if stamp and manifest is not None else None
            checksums.remember(_folders, key, known, 64)
        return known

    def content(self) -> str | None:
        """A hash of a finished folder's content, without names and times; None while it is incomplete."""
        key, stamp = (self.runs, self.path), checksums.stamp(self.fs, f"{self.path}/manifest.json")
        cached = _contents.get(key)
        if cached is None or cached[0] != stamp:
            manifest = self.manifest
            if manifest is None or stamp is None:
                return None
            tables_by_name = {
                name: [part["sha256"] for part in entry["parts"]] for name, entry in manifest["tables"].items()
            }
            files = sorted((_OWN.sub("", name), entry["sha256"]) for name, entry in manifest["files"].items())
            cached = (stamp, digest([tables_by_name, files], 32))
            checksums.remember(_contents, key, cached, 16384)
        return cached[1]

    def stale(self) -> str | None:
        """The input whose content has changed since this folder was made from it; None if there is none.

        A missing input is no evidence. A folder from before contents were recorded counts as current, unless an input with
        files (which were not checked then), or one that was rebuilt since, is newer.
        """
        own = self.manifest or self.read_json("plan.json") or {}
        for name, folder in own.get("inputs", {}).items():
            source = Artifact(self.runs, folder)
            now = source.content()
            if now is None:
                continue
            recorded = own.get("made_from", {}).get(name)
            if recorded is not None and recorded != now:
                return name
            if recorded is None and "finished" in own:
                input_manifest = source.manifest or {}
                if (input_manifest["files"] or input_manifest.get("remade")) and input_manifest.get(
                    "finished", 0
                ) > own["finished"]:
                    return name
        return None

    def table_names(self) -> list[str]:
        return sorted(self._finished().manifest["tables"])

    def _finished(self) -> _Known:
        known = self._known()
        if known is None:
            raise FileNotFoundError(errno.ENOENT, "incomplete or unreachable", self.path)
        return known

    def count(self, name: str) -> int:
        """Rows of a table, from the manifest."""
        return self._finished().starts(name)[-1]

    def qrels_table(self, split: str | None, reader: str) -> str:
        """The name of the table of a split's judgements: ``qrels.<split>``, or ``qrels`` without a split.

        Raises ConfigError, in the name of the stage ``reader``, if the folder has no such table.
        """
        names = self.table_names()
        if split is not None:
            return schemas.qrels_table(names, split, reader, self.name)
        if "qrels" not in names:
            splits = ", ".join(name.removeprefix("qrels.") for name in names if name.startswith("qrels."))
            raise ConfigError(f"{reader}: no table 'qrels' in {self.name}; name a split: {splits or None}")
        return "qrels"

    def qrels(self, split: str | None, reader: str, columns: list[str] | None = None) -> pa.Table:
        """The judgements of a split: see ``qrels_table``."""
        return self.read(self.qrels_table(split, reader), columns)

    def scan(self, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table part by part, in shard order."""
        for part in self._finished().parts(name):
            yield self.read_part(part, columns)

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table. Raises FileNotFoundError if the folder is not complete, AssertionError if it has no such table."""
        parts = list(self.scan(name, columns))
        return pa.concat_tables(parts) if parts else schemas.empty(name)

    def slice(self, name: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Rows ``start`` to ``stop`` of a table; reads only the parts with these rows."""
        empty = schemas.empty(name)
        tables = [empty if columns is None else empty.select(columns)]
        known = self._finished()
        parts, offsets = known.parts(name), known.starts(name)
        at = bisect.bisect_right(offsets, start) - 1
        while at < len(parts) and offsets[at] < stop:
            first, last = max(start - offsets[at], 0), min(stop, offsets[at + 1]) - offsets[at]
            if first == 0 and last == parts[at]["rows"]:
                tables.append(self.read_part(parts[at], columns))
            elif first < last:
                tables.append(self._read_rows(parts[at], columns, first, last))
            at += 1
        return pa.concat_tables(tables)

    def ranges(self, name: str, step: int) -> list[tuple[int, int]]:
        """Ranges of rows that are whole parts: as many parts as fit into ``step`` rows, at least one."""
        ends = self._finished().starts(name)[1:]
        ranges, start = [], 0
        for end, after in zip(ends, [*ends[1:], None], strict=False):
            if end > start and (after is None or after - start > step):
                ranges.append((start, end))
                start = end
        return ranges

    def source_rows(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """The input rows, rounded to whole shards, from which rows ``start`` to ``stop`` of a table were made."""
        offsets, shards = self._finished().starts(name), self.plan["shards"]
        if start >= stop:
            return 0, 0
        if len(offsets) != len(shards) + 1:
            raise Damaged(f"{self.path}/plan.json is damaged: {len(shards)} shards, {len(offsets) - 1} parts")
        first, last = bisect.bisect_right(offsets, start) - 1, bisect.bisect_left(offsets, stop) - 1
        return shards[first]["start"], shards[last]["stop"]

    def read_part(self, part: Json, columns: list[str] | None = None) -> pa.Table:
        """The rows of a part of a receipt or a manifest. Raises Damaged."""
        # without this, a flipped bit would be an obscure error, or a wrong row that nobody notices
        data = self.read_bytes(part["file"])
        if data is None or hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise Damaged(f"{self.path}/{part['file']} is {'missing' if data is None else 'damaged'}")
        with pq.ParquetFile(pa.BufferReader(data)) as opened:
            return schemas.fill_columns(part["file"].split("/")[0], opened.read(columns), columns)

    def _read_rows(self, part: Json, columns: list[str] | None, first: int, last: int) -> pa.Table:
        """Some rows of a part. The whole part is checked once per process, later only the pages that are read."""
        file = f"{self.path}/{part['file']}"
        checksums.require(self.fs, file, part)
        with self.fs.open_input_file(file) as stream:
            opened = pq.ParquetFile(stream, page_checksum_verification=True)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = list(accumulate(sizes, initial=0))
            groups = [i for i, (a, b) in enumerate(pairwise(starts)) if a < last and b > first]
            rows = schemas.fill_columns(part["file"].split("/")[0], opened.read_row_groups(groups, columns), columns)
        return rows.slice(first - starts[groups[0]], last - first)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Allows one builder at a time on a local disk: a second driver waits here and then finds the work done.

        The kernel releases the lock of a killed process. Object stores have no locks; there only the receipts protect two
        builders from each other, and some shards may be built twice.
        """
        if not self.local:
            yield
            return
        import fcntl

        disk.make_folder(self.path, self.path)
        if os.path.isdir(f"{self.path}/.lock"):
            disk.remove(f"{self.path}/.lock")
        with open(
            f"{self.path}/.lock", "a+", encoding="utf-8", errors="replace"
        ) as handle:  # its text describes the holder
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = " ".join(handle.read(200).split()) or "another process"
                log.warning("waiting for %s: %s is building it", self.path, holder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            handle.truncate()
            handle.write(f"process {os.getpid()} of {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}")
            handle.flush()
            disk.remove_abandoned(self.path)
            yield


class AttemptLog:
    """The event log of one attempt at a folder: ``attempts/001-9c1f.jsonl``. A later attempt never overwrites it."""

    def __init__(self, folder: Artifact) -> None:
        self.folder = folder
        self.number = max((int(re.split(r"[-.]", name)[0]) for name in folder.listing("attempts")), default=0) + 1
        # two drivers on an object store, which has no locks, may get the same number
        self.name = f"{self.number:03d}-{uuid.uuid4().hex[:4]}"
        self.lines: list[str] = []

    def note(self, event: str, **detail: Any) -> None:
        """Adds an event with its time and writes the log."""
        place = f"attempts/{self.name}.jsonl"
        self.lines.append(shapes.line(self.folder.name, place, {"at": time.time(), "event": event, **detail}))
        self.folder.write_bytes(place, ("\n".join(self.lines) + "\n").encode())


def add_up(total: Json, more: Json) -> Json:
    """Adds two trees of numbers key by key (counts, rejections by reason, cost)."""
    for key, value in more.items():
        total[key] = add_up(total.get(key, {}), value) if isinstance(value, dict) else total.get(key, 0) + value
    return total
