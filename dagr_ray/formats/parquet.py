"""Passages in Parquet files: every row checked in one pass of bounded memory, then read in any range of rows.

A source is a file, or a folder whose ``.parquet`` files are read in the order of their names (Spark's and Hive's
folders too), behind any URI that pyarrow opens. Columns: ``doc_id`` (or ``_id``, ``id``) and ``text``, ``title`` where
there is one.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.storage import filesystem
from dagr_ray.formats.lines import MAX_BAD_SHARE, Problem, stream_sha

BATCH = 16384
# a row group of more rows than this is read in pieces of so many
LARGE = 131072
IDS = ("doc_id", "_id", "id")
Layout = list[dict[str, Any]]  # of each file: its name, and the rows of each row group


@dataclass
class Checked:
    """What a source holds: its files with their rows, and the rows that are left out (counted from 0 in their file)."""

    layout: Layout = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of all files, bad ones included."""
        return sum(sum(each["groups"]) for each in self.layout)


def _members(path: str) -> tuple[pafs.FileSystem, dict[str, pafs.FileInfo]]:
    """The Parquet files of a source by name, sorted. Raises ConfigError where there are none."""
    fs, root = filesystem(path)
    info = fs.get_file_info(root)
    if info.is_file:
        return fs, {root.rpartition("/")[2]: info}
    inside = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    found = {each.path[len(root) + 1 :]: each for each in inside if each.is_file and each.path.endswith(".parquet")}
    # what Spark and others keep beside the data
    found = {name: each for name, each in found.items() if not any(p.startswith(("_", ".")) for p in name.split("/"))}
    if not found:
        raise ConfigError(f"no Parquet file at {path!r}; give a .parquet file or a folder of them")
    return fs, dict(sorted(found.items()))


def content(path: str) -> str:
    """Hash of the names and bytes of a source's files."""
    _, members = _members(path)
    return digest([(name, stream_sha(path, i.path, i.size, i.mtime_ns)) for name, i in members.items()], 16)


def check(path: str) -> Checked:
    """Looks at every row. Raises ConfigError for a wrong column, and where over 1 % of a file's rows are bad.

    Takes about 16 bytes of disk for each row, and of memory no more than some batches of rows.
    """
    fs, members = _members(path)
    found, first = Checked(), 0
    total = sum(_rows(fs, info, f"{path} ({name})") for name, info in members.items())
    with tempfile.TemporaryDirectory(prefix="dagr-ids-") as scratch:
        ids = _Ids(Path(scratch), total)
        for name, info in members.items():
            with fs.open_input_file(info.path) as stream:
                opened = _open(stream, f"{path} ({name})")
                groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
                here: list[Problem] = []
                row = 0
                for batch in _read_batches(opened):
                    corpus, bad = _passages(batch)
                    here += [Problem(name, row + i, *why) for i, why in sorted(bad.items())]
                    _stop_if_over(sum(groups), len(here), here, f"{path} ({name})")
                    good = np.setdiff1d(np.arange(len(batch)), list(bad), assume_unique=True)
                    ids.add(tables.texts(corpus["doc_id"].take(pa.array(good, pa.int64()))), first + row + good)
                    row += len(batch)
            found.layout.append({"file": name, "groups": groups})
            found.problems += here
            first += row
        suspects, repeats = ids.suspects(int(MAX_BAD_SHARE * total))
    again = list(_repeats(path, found.layout, suspects))
    _stop_if_over(total, repeats, again, path)
    found.problems += again
    bad_in = Counter(problem.file for problem in found.problems)
    for each in found.layout:
        if bad_in[each["file"]] > MAX_BAD_SHARE * sum(each["groups"]):
            here = [problem for problem in found.problems if problem.file == each["file"]]
            _stop_if_over(sum(each["groups"]), len(here), here, f"{path} ({each['file']})")
    return found


def _rows(fs: pafs.FileSystem, info: pafs.FileInfo, where: str) -> int:
    with fs.open_input_file(info.path) as stream:
        return _open(stream, where).metadata.num_rows


def _stop_if_over(rows: int, bad: int, problems: list[Problem], where: str) -> None:
    if bad > MAX_BAD_SHARE * rows:
        shown = "; ".join(f"row {p.line}: {p.reason}" + (f" ({p.detail})" if p.detail else "") for p in problems[:3])
        raise ConfigError(
            f"{where}: at least {bad} of {rows} rows are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); "
            "mend the file"
        )


def _open(stream: Any, where: str) -> pq.ParquetFile:
    try:
        # piece by piece: else all row groups that are asked for are held until the last is done
        opened = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{where}: not a whole Parquet file ({error}); write it again") from None
    types = dict(zip(opened.schema_arrow.names, opened.schema_arrow.types, strict=True))
    spelled = _wanted(opened)
    for name in ("doc_id", "text"):
        if name not in spelled:
            raise ConfigError(f"{where}: no column {name!r}, only {', '.join(types) or 'none'}; rename the one it is")
    for name, column in spelled.items():
        kind = types[column]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not is_text and not (name == "doc_id" and pa.types.is_integer(kind)):
            raise ConfigError(
                f"{where}: column {column!r} is of type {kind}; allowed: string" + (" or integer" * (name == "doc_id"))
            )
    return opened


def _wanted(opened: pq.ParquetFile) -> dict[str, str]:
    """Which of the file's columns are read, by what they are. A title of nulls alone, as others write it, is none."""
    there = dict(zip(opened.schema_arrow.names, opened.schema_arrow.types, strict=True))
    spelled = {"doc_id": IDS, "title": ("title",), "text": ("text",)}
    found = {name: next((n for n in names if n in there), None) for name, names in spelled.items()}
    return {n: c for n, c in found.items() if c is not None and not (n == "title" and pa.types.is_null(there[c]))}


def _read_batches(opened: pq.ParquetFile, groups: list[int] | None = None) -> Iterator[pa.Table]:
    """The wanted columns under the names that we know them by, in batches."""
    wanted = {column: name for name, column in _wanted(opened).items()}
    for batch in opened.iter_batches(BATCH, groups, list(wanted)):
        yield batch.rename_columns([wanted[column] for column in batch.schema.names])


def _passages(rows: pa.Table | pa.RecordBatch) -> tuple[pa.Table, dict[int, tuple[str, str]]]:
    """Rows as a ``corpus`` table, and which of them are bad: position -> (reason, detail)."""
    bad: dict[int, tuple[str, str]] = {}
    columns = {}
    for name in ("doc_id", "title", "text"):
        if name not in rows.schema.names:
            columns[name] = pa.repeat(pa.scalar("", tables.TEXT), rows.num_rows)
            continue
        columns[name], wrong = _text(rows[name])
        bad |= dict.fromkeys(wrong, ("wrong-encoding", f"{name} is not UTF-8"))
    blank_id = pc.equal(columns["doc_id"], "")
    if pc.any(blank_id).as_py():
        bad = dict.fromkeys(_positions(blank_id), ("no-id", "")) | bad
    blank = _blank(columns["text"])
    if pc.any(blank).as_py():
        untitled = pc.and_(blank, _blank(columns["title"]))
        for i in set(_positions(untitled)) - bad.keys():
            bad[i] = ("empty-text", columns["doc_id"][i].as_py()[:100])
        columns["text"] = pc.if_else(blank, columns["title"], columns["text"])  # the title stands in, and stands once
        columns["title"] = pc.if_else(blank, "", columns["title"])
    return pa.table(columns, schema=tables.schema("corpus")), bad


def _text(column: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, list[int]]:
    """A column as clean text without nulls, and the positions of what is no text."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    array = array.cast(tables.TEXT)
    if array.null_count:
        array = array.fill_null("")
    if not len(array):
        return array, []
    wrong: list[int] = []
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        values: list[str] = []
        for i, raw in enumerate(array.view(pa.large_binary()).to_pylist()):
            try:
                values.append(raw.decode())
            except UnicodeDecodeError:
                wrong.append(i)
                values.append("")
        array = pa.array(values, tables.TEXT)
    ends = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)
    data = array.buffers()[2]
    # looking at bytes is ten times as fast as a search in each text
    if data is not None and (np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] == 0).any():
        array = pc.replace_substring(array, "\x00", "\ufffd")
    return array, wrong


def _blank(texts: pa.Array) -> pa.Array:
    return pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))


def _positions(mask: pa.Array) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()


class _Ids:
    """Finds ids that occur twice by their hashes: dealt to files by hash, so that equal ones meet in one small file."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.paths = [folder / f"{i}" for i in range(min(max(rows >> 18, 1), 512))]
        self.stack = ExitStack()
        self.files = [self.stack.enter_context(open(path, "wb")) for path in self.paths]

    def add(self, ids: list[str], rows: np.ndarray) -> None:
        """Notes the row of each id."""
        # Python's own hash differs from process to process, but these never leave this one
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        noted = np.stack([hashes, rows.astype(np.int64)], axis=1)
        target = hashes.view(np.uint64) % np.uint64(len(self.files))
        order = np.argsort(target, kind="stable")
        cuts = np.searchsorted(target[order], np.arange(1, len(self.files), dtype=np.uint64))
        for file, dealt in zip(self.files, np.split(noted[order], cuts), strict=True):
            file.write(dealt.tobytes())

    def suspects(self, most: int) -> tuple[np.ndarray, int]:
        """Rows whose id has the hash of another row's id, sorted, and how many rows repeat one.

        Where over ``most`` do, the rows are three of them, each with one that it repeats.
        """
        self.stack.close()
        found: list[np.ndarray] = [np.empty(0, np.int64)]
        repeats = 0
        for path in self.paths:
            noted = np.fromfile(path, np.int64).reshape(-1, 2)
            noted = noted[np.lexsort((noted[:, 1], noted[:, 0]))]
            same = noted[1:, 0] == noted[:-1, 0]
            repeats += int(same.sum())
            if repeats > most:
                pairs = np.flatnonzero(same)[:3]
                return np.unique(noted[np.concatenate([pairs, pairs + 1]), 1]), repeats
            found.append(noted[np.append(same, False) | np.append(False, same), 1])
        return np.sort(np.concatenate(found)), repeats


def _repeats(path: str, layout: Layout, suspects: np.ndarray) -> Iterator[Problem]:
    """The suspects whose id stands in an earlier row."""
    seen: set[str] = set()
    for group in _groups(layout):
        first, last = np.searchsorted(suspects, [group.start, group.start + group.rows])
        if first == last:
            continue
        at = group.start
        for corpus in _read_group(path, group, 0, group.rows):
            for row in suspects[(suspects >= at) & (suspects < at + corpus.num_rows)].tolist():
                doc_id = corpus["doc_id"][row - at].as_py()
                if doc_id in seen:
                    yield Problem(group.file, row - group.file_start, "duplicate-id", doc_id[:100])
                seen.add(doc_id)
            at += corpus.num_rows


class _Group(NamedTuple):
    """A row group: rows are counted over the whole source."""

    file: str
    file_start: int
    number: int
    start: int
    rows: int


def _groups(layout: Layout) -> Iterator[_Group]:
    start = 0
    for each in layout:
        file_start = start
        for number, rows in enumerate(each["groups"]):
            yield _Group(each["file"], file_start, number, start, rows)
            start += rows


def ranges(layout: Layout, step: int) -> list[tuple[int, int]]:
    """Ranges of rows to read at once: of about ``step`` rows, and of whole row groups where these are not large.

    >>> ranges([{"file": "a", "groups": [3, 4, 9]}], 7)
    [(0, 7), (7, 16)]
    """
    ends = [
        min(piece + LARGE, group.start + group.rows)
        for group in _groups(layout)
        for piece in range(group.start, group.start + group.rows, LARGE)
    ]
    found: list[tuple[int, int]] = []
    first = 0
    for i, end in enumerate(ends):
        if i + 1 == len(ends) or ends[i + 1] - first > step:
            found.append((first, end))
            first = end
    return found


def read(path: str, layout: Layout, start: int, stop: int) -> Iterator[tuple[str, int, pa.Table]]:
    """Rows ``start`` to ``stop`` of a source as ``corpus`` tables: (file, the table's first row in it, table).

    Bad rows are there too; what ``check`` told of them has to be left out.
    """
    for group in _groups(layout):
        at, end = max(start, group.start), min(stop, group.start + group.rows)
        if at < end:
            for corpus in _read_group(path, group, at - group.start, end - group.start):
                yield group.file, at - group.file_start, corpus
                at += corpus.num_rows


def _read_group(path: str, group: _Group, start: int, stop: int) -> Iterator[pa.Table]:
    """Rows ``start`` to ``stop`` of a row group, in batches."""
    fs, root = filesystem(path)
    file = root if fs.get_file_info(root).is_file else f"{root}/{group.file}"
    with fs.open_input_file(file) as stream:
        opened = _open(stream, f"{path} ({group.file})")
        at = 0
        for batch in _read_batches(opened, [group.number]):
            first, last = max(start - at, 0), min(stop - at, len(batch))
            if first < last:
                yield _passages(batch.slice(first, last - first))[0]
            at += len(batch)
            if at >= stop:
                return


def head(path: str, n: int) -> list[str]:
    """Title and text of the first ``n`` good passages of a source."""
    fs, members = _members(path)
    for name, info in sorted(members.items()):
        with fs.open_input_file(info.path) as stream:
            opened = _open(stream, name)
            for batch in _read_batches(opened):
                rows = _passages(batch.slice(0, n))[0]
                return list(map(tables.passage_text, rows["title"].to_pylist(), rows["text"].to_pylist()))
    return []
