"""Decompresses and decodes files into lines, maps the usual names of columns, and reads relevance grades."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import filesystem

Kind = Literal["corpus", "queries", "qrels"]
MAX_BAD_SHARE = 0.01
# The usual names of each column, in lower case without separators. The first name that a file has is used.
COLUMN_NAMES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "corpus": {
        "id": ("_id", "docid", "corpusid", "id", "docno", "pid", "passageid", "documentid", "did"),
        "title": ("title",),
        "text": ("text", "contents", "content", "passage", "body", "document", "passagetext", "segment"),
    },
    "queries": {
        "id": ("_id", "queryid", "qid", "id", "topicid", "qno"),
        "title": ("title",),
        "text": ("text", "query", "question", "contents", "content", "querytext", "topic"),
    },
    "qrels": {
        "query": ("queryid", "qid", "query", "topicid", "topic", "qno"),
        "doc": ("corpusid", "docid", "docno", "doc", "document", "documentid", "pid", "passageid", "passage", "did"),
        "score": ("score", "relevance", "rel", "label", "grade", "judgment", "judgement", "relevancelabel", "qrel"),
    },
}
EXPECTED_COLUMNS: dict[Kind, str] = {
    "corpus": "_id, text and maybe title",
    "queries": "_id and text",
    "qrels": "query-id, corpus-id and score, a whole number (without a header: query, document, score separated by tabs, or "
    "TREC's query, iteration, document, relevance)",
}


@dataclass
class LineProblem:
    """A line that was skipped or repaired: its file and number, the reason, and a detail."""

    file: str
    line: int
    reason: str
    detail: str = ""
    repaired: bool = False


@dataclass
class SourceFile:
    """A file while it is read: its display ``name``, the number of ``lines`` read, and the ``problems`` so far.

    ``where`` precedes the name in errors. ``spaced`` is set if white space separates the columns.
    """

    fs: pafs.FileSystem
    path: str
    name: str
    where: str
    kind: Kind
    problems: list[LineProblem] = field(default_factory=list)
    lines: int = 0
    spaced: bool = False

    def error(self, why: str, line: int | None = None) -> ConfigError:
        """A ConfigError with the file's name and line number."""
        path = f"{self.where}/{self.name}" if self.where else self.name
        return ConfigError(f"{path}{'' if line is None else f': line {line}'}: {why}")

    def bad(self, line: int, reason: str, detail: str) -> None:
        """Records a skipped line."""
        self.problems.append(LineProblem(self.name, line, reason, " ".join(detail.split())[:200]))


@lru_cache(maxsize=65536)
def stream_sha(uri: str, file: str, size: int, mtime_ns: int | None) -> str:
    """SHA-256 of a file (a path in ``uri``'s file system), recomputed only if its size or modification time changes."""
    fs, _ = filesystem(uri)
    with fs.open_input_stream(file, compression=None) as stream:
        sha = hashlib.sha256()
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def normalise_name(name: str) -> str:
    """A column's name in lower case without separators: ``Query-ID`` and ``query_id`` are equal.

    >>> normalise_name("Query-ID"), normalise_name("_id"), normalise_name(" corpus_id ")
    ('queryid', '_id', 'corpusid')
    """
    bare = name.strip().lower()
    return "_id" if bare == "_id" else re.sub(r"[\W_]+", "", bare)


def find_columns(names: Sequence[str], kind: Kind) -> dict[str, str]:
    """Maps the columns of a table of that kind to the ``names`` in a file.

    >>> find_columns(["Query-ID", "iteration", "doc_id", "rel"], "qrels")
    {'query': 'Query-ID', 'doc': 'doc_id', 'score': 'rel'}
    """
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(normalise_name(name), name)
    columns = {}
    for column, spellings in COLUMN_NAMES[kind].items():
        spelling = next((s for s in spellings if s in known), None)
        if spelling is not None:
            columns[column] = known[spelling]
    return columns


def open_unpacked(fs: pafs.FileSystem, path: str) -> io.BufferedReader:
    """Opens a file, decompressed if its first bytes are those of gzip, bzip2, xz or zstd. The suffix does not matter."""
    raw = io.BufferedReader(fs.open_input_stream(path, compression=None))
    start = raw.peek(6)[:6]
    if start[:2] == b"\x1f\x8b":
        packed: Any = gzip.GzipFile(fileobj=raw)
    elif start[:3] == b"BZh":
        packed = bz2.BZ2File(raw)
    elif start == b"\xfd7zXZ\x00":
        packed = lzma.LZMAFile(raw)
    elif start[:4] == b"\x28\xb5\x2f\xfd":
        raw.close()
        packed = pa.CompressedInputStream(fs.open_input_stream(path, compression=None), "zstd")
    else:
        return raw
    unpacked = io.BufferedReader(packed)
    try:
        unpacked.peek(1)
    except UNPACKING as error:
        raise ConfigError(f"{path}: {describe_damage(path, error)}") from None
    return unpacked


# exceptions of the libraries for a truncated or damaged compressed file
UNPACKING = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError)


def describe_damage(name: str, error: BaseException) -> str:
    """The message for a truncated or damaged compressed file. Re-raises the error if the disk caused it."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    kind = {"bz2": "bzip2", "xz": "xz", "zst": "zstd", "zstd": "zstd"}.get(name.rpartition(".")[2].lower(), "gzip")
    return f"not a complete {kind} file ({error}); fetch it again"


def lines_of(source: SourceFile, stream: io.BufferedReader, blank: bool = False) -> Iterator[tuple[int, str]]:
    r"""(number, text without line end) of the non-blank lines. A line that is not UTF-8 is recorded as a problem.

    With ``blank``, yields blank lines too and strips only the line feed, because a cell may span several lines.
    """
    end = "\n" if blank else "\r\n"
    start = stream.peek(4)[:4]
    wide = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(start[:2])
    if wide is None and len(start) == 4 and (start[1::2] == b"\0\0") != (start[::2] == b"\0\0"):
        wide = "utf-16-le" if start[1] == 0 else "utf-16-be"
    number = 0
    try:
        if wide:
            for number, text in enumerate(io.TextIOWrapper(stream, wide, newline="\n"), 1):
                bare = (text.removeprefix("\ufeff") if number == 1 else text).rstrip(end)
                source.lines += bool(bare.strip())
                if blank or bare.strip():
                    yield number, bare
            return
        for number, raw in enumerate(stream, 1):
            if not blank and not raw.strip():
                continue
            source.lines += bool(raw.strip())
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip(end)
            except UnicodeDecodeError as error:
                source.bad(number, "wrong-encoding", f"byte {error.start} is not UTF-8")
    except UnicodeDecodeError as error:
        raise source.error(
            f"not {wide.upper() if wide else 'UTF-8'} ({error.reason}); save it as UTF-8", number
        ) from None
    except UNPACKING as error:
        raise source.error(describe_damage(source.path, error)) from None


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def is_number(cell: str) -> bool:
    """Whether a cell is a decimal number."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def grade_of(value: Any) -> int | str:
    """The relevance grade of a judgement's score, or a description of the error.

    >>> grade_of("1.0"), grade_of(2.0), grade_of("-1"), grade_of(0.5), grade_of("3e9"), grade_of(None)
    (1, 2, -1, 'score 0.5 is not a whole number: grades are 0, 1, 2 and so on', 'score 3e9 is too large', 'no score')
    """
    if value is None or value == "" or value != value:
        return "no score"
    if isinstance(value, str):
        if not is_number(value):
            return f"score {value[:40]!r} is not a number"
        shown, number = value.strip(), float(value)
    else:
        try:
            shown, number = str(value), float(value)
        except (TypeError, ValueError, OverflowError):
            return f"score {str(value)[:40]!r} is not a number"
    if abs(number) >= 2**31:
        return f"score {shown[:40]} is too large"
    if number != int(number):
        return f"score {shown[:40]} is not a whole number: grades are 0, 1, 2 and so on"
    return int(number)
