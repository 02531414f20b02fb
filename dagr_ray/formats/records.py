"""Rows of a file, whatever its format: JSON lines, JSON, CSV, TSV, columns parted by white space, Parquet; packed or not.

What a column is called differs from one collection to the next, so columns are found by any of their usual names. What
cannot be read for certain is refused with file, line and reason.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dagr_ray.formats.lines import NAMES, WANTED, Kind, Source, columns_named, is_number, lines_of, opened

SAMPLE = 200  # lines that are looked at to tell how a file is made
LONGEST = 1000  # lines over which a quoted cell may go on
BATCH = 4096


def rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, values by column) of each row of a file; a column that is not there is not among the values.

    The columns are ``id``, ``title`` and ``text``, or ``query``, ``doc`` and ``score``. Lines count from 1, rows of
    Parquet from 0. Lines without the right columns are noted in ``source.problems``. Raises ConfigError where the file
    as a whole cannot be read.
    """
    with opened(source.fs, source.path) as stream:
        start = stream.peek(4096)[:4096]
        if start[:4] == b"PAR1":
            yield from _parquet(source)
            return
        _refuse_other_formats(source, start)
        suffix = re.sub(r"\.(gz|bz2|xz|zst|zstd)$", "", source.name.lower()).rpartition(".")[2]
        lead = start.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\x00")[:1]
        if suffix in ("json", "jsonl", "ndjson") or lead == b"{":
            yield from _json(source, stream, whole=suffix == "json" or lead == b"[")
        else:
            yield from _delimited(source, stream, suffix)


def _refuse_other_formats(source: Source, start: bytes) -> None:
    if start[:4] == b"PK\x03\x04":
        raise source.refuse("a ZIP archive; unpack it")
    if start.startswith(b"version https://git-lfs"):
        raise source.refuse("a pointer of Git LFS, not the file itself; run: git lfs pull")
    if start[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"):
        raise source.refuse("UTF-32; save it as UTF-8")
    lead = start.lstrip()[:64].lower()
    if lead.startswith((b"<top>", b"<doc>", b"<?xml", b"<docs", b"<!doctype", b"<html")):
        raise source.refuse(
            f"markup ({lead[:10].decode('latin-1')!r}) is not read; write rows of {WANTED[source.kind]}"
        )


# -- JSON -----------------------------------------------------------------------------------------------------------------


def _json(source: Source, stream: io.BufferedReader, whole: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    lines: Iterable[tuple[int, str]] = lines_of(source, stream)
    items: list[Any] = []
    if whole:
        lines = list(lines)
        items = _one_value(source, "\n".join(text for _, text in lines))
    if items:
        source.lines = len(items)
    parsed = enumerate(items, 1) if items else _json_lines(source, lines)
    for number, value in parsed:
        if not isinstance(value, dict):
            source.bad(number, "broken-json", f"{type(value).__name__} in place of an object")
            continue
        found = _fields(value, source.kind)
        missing = [c for c in ("id", "query", "doc") if c in NAMES[source.kind] and c not in found]
        if missing:
            there = ", ".join(list(value)[:8]) or "none"
            source.bad(number, "broken-json", f"no {_said(missing[0])} among its names: {there}")
        else:
            yield number, found


def _said(column: str) -> str:
    return {"id": "_id", "query": "query-id", "doc": "corpus-id"}.get(column, column)


def _fields(value: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind != "qrels" and "_id" in value and "text" in value:  # as nearly all are
        return {"id": value["_id"], "title": value.get("title"), "text": value["text"]}
    return {column: value[name] for column, name in columns_named(list(value), kind).items()}


def _json_lines(source: Source, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, text in lines:
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            source.bad(number, "broken-json", f"{type(error).__name__}: {error}")


def _one_value(source: Source, text: str) -> list[Any]:
    """The rows of a file that is one JSON value: a list of objects, or an object by id; none where it is lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value:
        return []
    if source.kind == "qrels" and all(isinstance(inner, dict) for inner in value.values()):
        return [{"query": q, "doc": d, "score": score} for q, docs in value.items() for d, score in docs.items()]
    if source.kind != "qrels" and not columns_named(list(value), source.kind).get("id"):
        if all(isinstance(inner, str) for inner in value.values()):
            return [{"_id": key, "text": inner} for key, inner in value.items()]
        if all(isinstance(inner, dict) for inner in value.values()):
            return [{"_id": key, **inner} for key, inner in value.items()]
    return []


# -- columns in lines -----------------------------------------------------------------------------------------------------


def _delimited(source: Source, stream: io.BufferedReader, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = lines_of(source, stream, blank=True)
    begun = list(itertools.islice(lines, SAMPLE))
    sample = [(number, text.rstrip("\r")) for number, text in begun if text.strip()]
    if not sample:
        if next(lines, None) is not None:
            raise source.refuse(f"its first {SAMPLE} lines are blank; a row has {WANTED[source.kind]}")
        return
    first = sample[0][1]
    options = "\t,;" if suffix != "csv" else ",;\t"
    header: list[str] | None = None
    # a text may hold any of the other marks
    mark = next((each for each in options if each in first), " ")
    cells = _cells(first, mark)
    if len(cells) > 1 and columns_named(cells, source.kind).keys() - {"title", "score"}:
        header = cells
    else:
        mark = _mark(source, [text for _, text in sample], options)
    if header is not None:
        places = _places(source, header, sample[0][0])
        source.lines -= 1
        width = len(header)
    else:
        places, width = _by_position(source, sample, mark)
    source.spaced = mark == " "
    # ids begin with a quotation mark where they are quoted; texts may begin with one
    quoted = mark in ",;" or (mark == "\t" and source.kind == "qrels")
    quoted |= (
        mark == "\t"
        and header is not None
        and all(
            _strict(text, mark) is not None for _, text in sample if _quotes(text, mark) and text.count('"') % 2 == 0
        )
    )
    after = 0 if header is None else sample[0][0]
    both = itertools.chain((each for each in begun if each[0] > after), lines)
    for number, cells in _records(source, both, mark, width, quoted):
        if len(cells) != width:
            others = f"the header names {width}" if header is not None else f"the other lines have {width}"
            source.bad(number, "broken-line", f"{len(cells)} columns, {others}: {(mark.join(cells))[:80]}")
        else:
            yield number, {column: cells[place] for column, place in places.items()}


def _mark(source: Source, sample: list[str], options: str) -> str:
    """What stands between the columns of lines without names; a space for any white space."""
    if source.kind != "qrels":
        if not any(options[0] in text for text in sample):
            raise source.refuse(
                f"no {'tab' if options[0] == chr(9) else 'comma'} in its lines; write rows of {WANTED[source.kind]}"
            )
        return options[0]
    best = (0.0, 0.0, options[0])
    for mark in [*options, " "]:
        widths = Counter(len(_cells(text, mark)) for text in sample)
        width, lines = widths.most_common(1)[0]
        if 2 <= width <= 6 and (found := (lines / len(sample) * (width > 2), lines / len(sample), mark))[:2] > best[:2]:
            best = found
    return best[2]


def _by_position(source: Source, sample: list[tuple[int, str]], mark: str) -> tuple[dict[str, int], int]:
    """Which column is which where the first line names none, and how many there are. Raises ConfigError where that is unclear."""
    split = [_cells(text, mark) for _, text in sample]
    width = Counter(map(len, split)).most_common(1)[0][0]
    line, first = sample[0][0], split[0]
    shown = mark.join(first)[:80]
    if source.kind == "qrels":
        if len(first) == width > 2 and not is_number(first[-1]) and (len(split) == 1 or is_number(split[1][-1])):
            raise source.refuse(
                f"{shown!r}: the last column is no score, and these are no known names; a row has {WANTED['qrels']}",
                line,
            )
        if width == 4:
            if not all(re.fullmatch(r"Q?0|\d{1,3}", cells[1], re.IGNORECASE) for cells in split if len(cells) == 4):
                raise source.refuse(
                    f"{shown!r}: four columns, and the second is no iteration as TREC's (0); a row has {WANTED['qrels']}",
                    line,
                )
            return {"query": 0, "doc": 2, "score": 3}, 4
        if width in (2, 3):
            return dict(zip(("query", "doc", "score"), range(width), strict=False)), width
        more = "; six are those of a run" if width == 6 else ""
        raise source.refuse(f"{shown!r}: {width} column{'s' * (width > 1)}{more}; a row has {WANTED['qrels']}", line)
    if _unknown_header(split, width):
        raise source.refuse(f"{shown!r}: these are no known names; a header names {WANTED[source.kind]}", line)
    if width == 2:
        return {"id": 0, "text": 1}, 2
    if source.kind == "corpus" and width == 4 and all("://" in c[1] for c in split if len(c) == 4):
        return {"id": 0, "title": 2, "text": 3}, 4  # MS MARCO's documents: id, address, title, body
    raise source.refuse(
        f"{shown!r}: {width} column{'s' * (width > 1)} and no names; put a first line that names {WANTED[source.kind]}",
        line,
    )


def _unknown_header(split: list[list[str]], width: int) -> bool:
    """Whether the first line is words where the ids below have digits and the texts several words."""
    rest = [cells for cells in split[1:] if len(cells) == width]
    if len(split[0]) != width or not rest:
        return False
    single = all(len(cell.split()) <= 1 and not any(map(str.isdigit, cell)) for cell in split[0])
    return single and all(any(map(str.isdigit, c[0])) for c in rest) and all(len(c[-1].split()) > 1 for c in rest)


def _places(source: Source, header: list[str], line: int) -> dict[str, int]:
    found = columns_named(header, source.kind)
    wanted = ("query", "doc") if source.kind == "qrels" else ("id", "text")
    titled = source.kind == "queries" and "title" in found  # TREC's topics
    missing = [_said(column) for column in wanted if column not in found and not (titled and column == "text")]
    if missing:
        raise source.refuse(
            f"no {' and no '.join(missing)} among the columns {', '.join(header)}; a header names {WANTED[source.kind]}",
            line,
        )
    if source.kind == "qrels" and "score" not in found and len(header) > 2:
        raise source.refuse(f"no score among the columns {', '.join(header)}; a header names {WANTED['qrels']}", line)
    _once_each(source, header, found)
    return {column: header.index(name) for column, name in found.items()}


def _once_each(source: Source, names: list[str], found: dict[str, str]) -> None:
    twice = next((name for name in found.values() if names.count(name) > 1), None)
    if twice is not None:
        raise source.refuse(f"two columns are called {twice!r}; rename the one that is not meant")


def _quotes(text: str, mark: str) -> bool:
    """Whether a cell begins with a quotation mark."""
    return text.startswith('"') or f'{mark}"' in text


def _strict(text: str, mark: str) -> list[str] | None:
    """The cells of a record by the rules of CSV; None where it does not keep to them."""
    csv.field_size_limit(1 << 31)
    try:
        found = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
    except csv.Error:
        return None
    return found[0] if len(found) == 1 else None


def _cells(text: str, mark: str) -> list[str]:
    if mark == " ":
        return re.split(r"[ \t\r\x0b\x0c]+", text.strip(" \t\r\x0b\x0c"))  # what else is white space may stand in an id
    if _quotes(text, mark) and (found := _strict(text, mark)) is not None:
        return found
    return text.split(mark)


def _records(
    source: Source, lines: Iterator[tuple[int, str]], mark: str, width: int, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record; a quoted cell may go on over several lines."""
    waiting: list[tuple[int, str]] = []
    while True:
        number, text = waiting.pop(0) if waiting else next(lines, (0, ""))
        if not number:
            return
        if not text.strip():
            continue
        if not quoted or not _quotes(text, mark):
            yield number, _cells(text.rstrip("\r"), mark) if mark == " " else text.rstrip("\r").split(mark)
            continue
        taken, marks = [(number, text)], text.count('"')
        while marks % 2 and len(taken) < LONGEST:
            more = waiting.pop(0) if waiting else next(lines, None)
            if more is None:
                break
            taken.append(more)
            marks += more[1].count('"')
        found = _strict("\n".join(each for _, each in taken).rstrip("\r"), mark) if marks % 2 == 0 else None
        plain = all(len(each.split(mark)) == width for _, each in taken)
        if found is not None and (source.kind == "qrels" or len(taken) == 1 or not plain):
            source.lines -= sum(bool(each.strip()) for _, each in taken[1:])
            yield number, found
        elif mark in ",;":
            raise source.refuse("a quotation mark that is not closed; write the file as CSV again", number)
        else:
            waiting = taken[1:] + waiting
            yield number, text.rstrip("\r").split(mark)


# -- Parquet --------------------------------------------------------------------------------------------------------------


def _parquet(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.fs.open_input_file(source.path) as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            names = file.schema_arrow.names
            found = columns_named(names, source.kind)
            wanted = ("query", "doc") if source.kind == "qrels" else ("id", "text")
            missing = [_said(column) for column in wanted if column not in found]
            if missing:
                raise source.refuse(
                    f"no {' and no '.join(missing)} among the columns {', '.join(names)}; wanted are {WANTED[source.kind]}"
                )
            if source.kind == "qrels" and "score" not in found and len(names) > 2:
                raise source.refuse(f"no score among the columns {', '.join(names)}; wanted are {WANTED['qrels']}")
            _once_each(source, names, found)
            for column, name in found.items():
                _check_type(source, column, name, file.schema_arrow.field(name).type)
            row = 0
            for batch in file.iter_batches(BATCH, columns=list(found.values())):
                values = {column: _values(batch[name]) for column, name in found.items()}
                for place, cells in enumerate(zip(*values.values(), strict=True)):
                    source.lines += 1
                    if any(isinstance(cell, UnicodeDecodeError) for cell in cells):
                        source.bad(row + place, "wrong-encoding", "not UTF-8")
                    else:
                        yield row + place, dict(zip(values, cells, strict=True))
                row += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise source.refuse(f"not a whole Parquet file ({error}); write it again") from None


def _check_type(source: Source, column: str, name: str, kind: pa.DataType) -> None:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = any(
        is_one(kind)
        for is_one in (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary,
        )
    )  # fmt: skip
    allowed = text or (column != "id" and pa.types.is_null(kind))
    if column in ("id", "query", "doc"):
        allowed = text or pa.types.is_integer(kind)
    elif column == "score":
        allowed = text or any(
            f(kind) for f in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
        )
    if not allowed:
        raise source.refuse(
            f"column {name!r} is of type {kind}, which is no {column}; wanted are {WANTED[source.kind]}"
        )


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    if not binary:
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            column = column.cast(pa.large_string()).view(pa.large_binary())
    return [None if raw is None else _decoded(raw) for raw in column.to_pylist()]


def _decoded(raw: bytes) -> Any:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return error
