"""Files as other people write them: unpacked and decoded into lines, the usual names of columns, and what a score says."""

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
# The usual names of each column, small letters without signs between them; the first that is there is taken.
NAMES: dict[Kind, dict[str, tuple[str, ...]]] = {
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
WANTED: dict[Kind, str] = {
    "corpus": "_id, text and maybe title",
    "queries": "_id and text",
    "qrels": "query-id, corpus-id and score, a whole number (as a line without names: query, document, score by tabs, or "
    "TREC's query, iteration, document, relevance)",
}


@dataclass
class Problem:
    """A line that was left out (or mended), where it stands, and why."""

    file: str
    line: int
    reason: str
    detail: str = ""
    mended: bool = False


@dataclass
class Source:
    """A file to read: ``name`` is what people know it by; ``lines`` counts what was read, and ``problems`` are added to.

    ``where`` stands before the name in errors. ``spaced`` is set where white space stands between the columns.
    """

    fs: pafs.FileSystem
    path: str
    name: str
    where: str
    kind: Kind
    problems: list[Problem] = field(default_factory=list)
    lines: int = 0
    spaced: bool = False

    def refuse(self, why: str, line: int | None = None) -> ConfigError:
        """The error that says what is wrong with the file."""
        place = f"{self.where}/{self.name}" if self.where else self.name
        return ConfigError(f"{place}{'' if line is None else f': line {line}'}: {why}")

    def bad(self, line: int, reason: str, detail: str) -> None:
        """Notes a line that is left out."""
        self.problems.append(Problem(self.name, line, reason, " ".join(detail.split())[:200]))


@lru_cache(maxsize=65536)
def stream_sha(uri: str, file: str, size: int, mtime_ns: int | None) -> str:
    """SHA-256 of a file (a path in ``uri``'s file system), computed again only where size or time have changed."""
    fs, _ = filesystem(uri)
    with fs.open_input_stream(file, compression=None) as stream:
        sha = hashlib.sha256()
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def known_as(name: str) -> str:
    """A column's name without case and the signs that differ: ``Query-ID`` and ``query_id`` are one.

    >>> known_as("Query-ID"), known_as("_id"), known_as(" corpus_id ")
    ('queryid', '_id', 'corpusid')
    """
    bare = name.strip().lower()
    return "_id" if bare == "_id" else re.sub(r"[\W_]+", "", bare)


def columns_named(names: Sequence[str], kind: Kind) -> dict[str, str]:
    """Which of the ``names`` is which column of a table of that kind.

    >>> columns_named(["Query-ID", "iteration", "doc_id", "rel"], "qrels")
    {'query': 'Query-ID', 'doc': 'doc_id', 'score': 'rel'}
    """
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(known_as(name), name)
    found = {}
    for column, spellings in NAMES[kind].items():
        spelled = next((s for s in spellings if s in known), None)
        if spelled is not None:
            found[column] = known[spelled]
    return found


def opened(fs: pafs.FileSystem, path: str) -> io.BufferedReader:
    """A file's bytes, unpacked if they begin as gzip, bzip2, xz or zstd do, whatever the file is called."""
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
        raise ConfigError(f"{path}: {not_whole(path, error)}") from None
    return unpacked


# what the libraries raise for a packed file that is cut or damaged
UNPACKING = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError)


def not_whole(name: str, error: BaseException) -> str:
    """What to say of a packed file that ends early or is damaged. Raises the error again where it is the disk's."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    kind = {"bz2": "bzip2", "xz": "xz", "zst": "zstd", "zstd": "zstd"}.get(name.rpartition(".")[2].lower(), "gzip")
    return f"not a whole {kind} file ({error}); fetch it again"


def lines_of(source: Source, stream: io.BufferedReader, blank: bool = False) -> Iterator[tuple[int, str]]:
    r"""(number, text without its end) of the lines that are not blank; a line that is not UTF-8 is noted.

    With ``blank`` those too, and of its end a line loses the line feed alone: a cell may go on over several lines.
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
        raise source.refuse(
            f"not {wide.upper() if wide else 'UTF-8'} ({error.reason}); save it as UTF-8", number
        ) from None
    except UNPACKING as error:
        raise source.refuse(not_whole(source.path, error)) from None


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def is_number(cell: str) -> bool:
    """Whether a cell is written as a number."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def grade_of(value: Any) -> int | str:
    """The grade that a judgement's score is, or what is wrong with it.

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
