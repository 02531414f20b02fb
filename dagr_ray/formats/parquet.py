"""Passages in Parquet files: checks every row in one pass of bounded memory, then reads any range of rows.

A source is a file, or a folder whose ``.parquet`` files are read in the order of their names (including folders of Spark
and Hive), at a path or any URI that pyarrow opens. Columns: ``doc_id`` (or ``_id``, ``id``), ``text`` and optionally
``title``.
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
from dagr_ray.formats.lines import MAX_BAD_SHARE, LineProblem, stream_sha

BATCH = 16384
# a larger row group is read in pieces of so many rows
LARGE = 131072
IDS = ("doc_id", "_id", "id")
Layout = list[dict[str, Any]]  # for each file, its name and the rows of each row group


@dataclass
class RowCheck:
    """The result of ``check``: the files of a source with their rows, and the bad rows (counted from 0 in their file)."""

    layout: Layout = field(default_factory=list)
    problems: list[LineProblem] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of all files, including bad ones."""
        return sum(sum(each["groups"]) for each in self.layout)


def _members(path: str) -> tuple[pafs.FileSystem, dict[str, pafs.FileInfo]]:
    """The Parquet files of a source by name, sorted. Raises ConfigError if there are none."""
    fs, root = filesystem(path)
    info = fs.get_file_info(root)
    if info.is_file:
        return fs, {root.rpartition("/")[2]: info}
    inside = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = {file.path[len(root) + 1 :]: file for file in inside if file.is_file and file.path.endswith(".parquet")}
    # Spark and others keep metadata in such files
    files = {name: file for name, file in files.items() if not any(p.startswith(("_", ".")) for p in name.split("/"))}
    if not files:
        raise ConfigError(f"no Parquet file at {path!r}; give a .parquet file or a folder of them")
    return fs, dict(sorted(files.items()))


def content(path: str) -> str:
    """Hash of the names and bytes of a source's files."""
    _, members = _members(path)
    return digest([(name, stream_sha(path, i.path, i.size, i.mtime_ns)) for name, i in members.items()], 16)


def check(path: str) -> RowCheck:
    """Checks every row. Raises ConfigError for a wrong column, or if over 1 % of a file's rows are bad.

    Takes about 16 bytes of disk for each row, and the memory of a few batches of rows.
    """
    fs, members = _members(path)
    result, first = RowCheck(), 0
    total = sum(_rows(fs, info, f"{path} ({name})") for name, info in members.items())
    with tempfile.TemporaryDirectory(prefix="dagr-ids-") as scratch:
        ids = _Ids(Path(scratch), total)
        for name, info in members.items():
            with fs.open_input_file(info.path) as stream:
                file = _open(stream, f"{path} ({name})")
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                problems: list[LineProblem] = []
                row = 0
                for batch in _read_batches(file):
                    corpus, bad = _passages(batch)
                    problems += [LineProblem(name, row + i, *why) for i, why in sorted(bad.items())]
                    _check_limit(sum(groups), len(problems), problems, f"{path} ({name})")
                    good = np.setdiff1d(np.arange(len(batch)), list(bad), assume_unique=True)
                    ids.add(tables.texts(corpus["doc_id"].take(pa.array(good, pa.int64()))), first + row + good)
                    row += len(batch)
            result.layout.append({"file": name, "groups": groups})
            result.problems += problems
            first += row
        suspects, repeats = ids.suspects(int(MAX_BAD_SHARE * total))
    repeated_ids = list(_repeats(path, result.layout, suspects))
    _check_limit(total, repeats, repeated_ids, path)
    result.problems += repeated_ids
    bad_in = Counter(problem.file for problem in result.problems)
    for entry in result.layout:
        if bad_in[entry["file"]] > MAX_BAD_SHARE * sum(entry["groups"]):
            problems = [problem for problem in result.problems if problem.file == entry["file"]]
            _check_limit(sum(entry["groups"]), len(problems), problems, f"{path} ({entry['file']})")
    return result


def _rows(fs: pafs.FileSystem, info: pafs.FileInfo, where: str) -> int:
    with fs.open_input_file(info.path) as stream:
        return _open(stream, where).metadata.num_rows


def _check_limit(rows: int, bad: int, problems: list[LineProblem], where: str) -> None:
    if bad > MAX_BAD_SHARE * rows:
        shown = "; ".join(f"row {p.line}: {p.reason}" + (f" ({p.detail})" if p.detail else "") for p in problems[:3])
        raise ConfigError(
            f"{where}: at least {bad} of {rows} rows are bad, over the limit of {MAX_BAD_SHARE:.0%} ({shown}); "
            "repair the file"
        )


def _open(stream: Any, where: str) -> pq.ParquetFile:
    try:
        # without a pre-buffer, which would hold all requested row groups until the last one is read
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{where}: not a complete Parquet file ({error}); write it again") from None
    types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    columns = _columns(file)
    for name in ("doc_id", "text"):
        if name not in columns:
            raise ConfigError(f"{where}: no column {name!r}, only {', '.join(types) or 'none'}; rename one of them")
    for name, column in columns.items():
        kind = types[column]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not is_text and not (name == "doc_id" and pa.types.is_integer(kind)):
            raise ConfigError(
                f"{where}: column {column!r} is of type {kind}; allowed: string" + (" or integer" * (name == "doc_id"))
            )
    return file


def _columns(file: pq.ParquetFile) -> dict[str, str]:
    """Our column names mapped to the file's. A title column of type null, as some writers produce, is ignored."""
    types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    spellings = {"doc_id": IDS, "title": ("title",), "text": ("text",)}
    columns = {name: next((n for n in names if n in types), None) for name, names in spellings.items()}
    return {n: c for n, c in columns.items() if c is not None and not (n == "title" and pa.types.is_null(types[c]))}


def _read_batches(file: pq.ParquetFile, groups: list[int] | None = None) -> Iterator[pa.Table]:
    """The columns under our names, in batches."""
    names = {column: name for name, column in _columns(file).items()}
    for batch in file.iter_batches(BATCH, groups, list(names)):
        yield batch.rename_columns([names[column] for column in batch.schema.names])


def _passages(rows: pa.Table | pa.RecordBatch) -> tuple[pa.Table, dict[int, tuple[str, str]]]:
    """Rows as a ``corpus`` table, and the bad ones: position -> (reason, detail)."""
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
        columns["text"] = pc.if_else(blank, columns["title"], columns["text"])  # the title becomes the text
        columns["title"] = pc.if_else(blank, "", columns["title"])
    return pa.table(columns, schema=tables.schema("corpus")), bad


def _text(column: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, list[int]]:
    """A column as clean text without nulls, and the positions of values that are not UTF-8."""
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
    # checking the bytes is ten times as fast as searching each text
    if data is not None and (np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] == 0).any():
        array = pc.replace_substring(array, "\x00", "\ufffd")
    return array, wrong


def _blank(texts: pa.Array) -> pa.Array:
    return pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))


def _positions(mask: pa.Array) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()


class _Ids:
    """Finds repeated ids by their hashes, which are distributed over small files so that equal ids share a file."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.paths = [folder / f"{i}" for i in range(min(max(rows >> 18, 1), 512))]
        self.stack = ExitStack()
        self.files = [self.stack.enter_context(open(path, "wb")) for path in self.paths]

    def add(self, ids: list[str], rows: np.ndarray) -> None:
        """Records the row of each id."""
        # Python's own hash differs between processes, but these stay in one process
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        records = np.stack([hashes, rows.astype(np.int64)], axis=1)
        target = hashes.view(np.uint64) % np.uint64(len(self.files))
        order = np.argsort(target, kind="stable")
        cuts = np.searchsorted(target[order], np.arange(1, len(self.files), dtype=np.uint64))
        for file, part in zip(self.files, np.split(records[order], cuts), strict=True):
            file.write(part.tobytes())

    def suspects(self, most: int) -> tuple[np.ndarray, int]:
        """Rows whose id has the same hash as another row's id, sorted, and the number of repetitions.

        With over ``most`` repetitions, only three of these rows are returned, each with the row that it repeats.
        """
        self.stack.close()
        suspects: list[np.ndarray] = [np.empty(0, np.int64)]
        repeats = 0
        for path in self.paths:
            records = np.fromfile(path, np.int64).reshape(-1, 2)
            records = records[np.lexsort((records[:, 1], records[:, 0]))]
            same = records[1:, 0] == records[:-1, 0]
            repeats += int(same.sum())
            if repeats > most:
                pairs = np.flatnonzero(same)[:3]
                return np.unique(records[np.concatenate([pairs, pairs + 1]), 1]), repeats
            suspects.append(records[np.append(same, False) | np.append(False, same), 1])
        return np.sort(np.concatenate(suspects)), repeats


def _repeats(path: str, layout: Layout, suspects: np.ndarray) -> Iterator[LineProblem]:
    """The suspects whose id occurs in an earlier row."""
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
                    yield LineProblem(group.file, row - group.file_start, "duplicate-id", doc_id[:100])
                seen.add(doc_id)
            at += corpus.num_rows


class _Group(NamedTuple):
    """A row group. Rows are counted over the whole source."""

    file: str
    file_start: int
    number: int
    start: int
    rows: int


def _groups(layout: Layout) -> Iterator[_Group]:
    start = 0
    for entry in layout:
        file_start = start
        for number, rows in enumerate(entry["groups"]):
            yield _Group(entry["file"], file_start, number, start, rows)
            start += rows


def ranges(layout: Layout, step: int) -> list[tuple[int, int]]:
    """Ranges of about ``step`` rows to read at once. A range has complete row groups unless these are large.

    >>> ranges([{"file": "a", "groups": [3, 4, 9]}], 7)
    [(0, 7), (7, 16)]
    """
    ends = [
        min(piece + LARGE, group.start + group.rows)
        for group in _groups(layout)
        for piece in range(group.start, group.start + group.rows, LARGE)
    ]
    ranges: list[tuple[int, int]] = []
    first = 0
    for i, end in enumerate(ends):
        if i + 1 == len(ends) or ends[i + 1] - first > step:
            ranges.append((first, end))
            first = end
    return ranges


def read(path: str, layout: Layout, start: int, stop: int) -> Iterator[tuple[str, int, pa.Table]]:
    """Rows ``start`` to ``stop`` of a source as ``corpus`` tables: (file, the table's first row in it, table).

    Includes bad rows; the caller must skip the rows that ``check`` reported.
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
        parquet = _open(stream, f"{path} ({group.file})")
        at = 0
        for batch in _read_batches(parquet, [group.number]):
            first, last = max(start - at, 0), min(stop - at, len(batch))
            if first < last:
                yield _passages(batch.slice(first, last - first))[0]
            at += len(batch)
            if at >= stop:
                return


def head(path: str, n: int) -> list[str]:
    """Title and text of the first ``n`` passages of a source."""
    fs, members = _members(path)
    for name, info in sorted(members.items()):
        with fs.open_input_file(info.path) as stream:
            for batch in _read_batches(_open(stream, name)):
                rows = _passages(batch.slice(0, n))[0]
                return list(map(tables.passage_text, rows["title"].to_pylist(), rows["text"].to_pylist()))
    return []
