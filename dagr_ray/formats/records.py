"""Rows of a file in any format: JSON lines, JSON, CSV, TSV, columns separated by white space, Parquet; maybe compressed.

Collections name their columns differently, so columns are found by any of their usual names. Ambiguous files are refused
with file, line and reason.
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

from dagr_ray.formats.lines import (
    COLUMN_NAMES,
    EXPECTED_COLUMNS,
    Kind,
    SourceFile,
    find_columns,
    is_number,
    lines_of,
    open_unpacked,
)

SAMPLE = 200  # lines that decide the format of a file
LONGEST = 1000  # the most lines of a quoted cell
BATCH = 4096


def rows(source: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, values by column) of each row of a file, without values for absent columns.

    The columns are ``id``, ``title`` and ``text``, or ``query``, ``doc`` and ``score``. Lines count from 1, rows of
    Parquet from 0. Lines without the right columns are recorded in ``source.problems``. Raises ConfigError if the file
    cannot be read at all.
    """
    with open_unpacked(source.fs, source.path) as stream:
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


def _refuse_other_formats(source: SourceFile, start: bytes) -> None:
    if start[:4] == b"PK\x03\x04":
        raise source.error("a ZIP archive; unpack it")
    if start.startswith(b"version https://git-lfs"):
        raise source.error("a pointer of Git LFS, not the file itself; run: git lfs pull")
    if start[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"):
        raise source.error("UTF-32; save it as UTF-8")
    lead = start.lstrip()[:64].lower()
    if lead.startswith((b"<top>", b"<doc>", b"<?xml", b"<docs", b"<!doctype", b"<html")):
        raise source.error(
            f"markup ({lead[:10].decode('latin-1')!r}) is not supported; write rows of {EXPECTED_COLUMNS[source.kind]}"
        )


# -- JSON -----------------------------------------------------------------------------------------------------------------


def _json(source: SourceFile, stream: io.BufferedReader, whole: bool) -> Iterator[tuple[int, dict[str, Any]]]:
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
        row = _fields(value, source.kind)
        missing = [c for c in ("id", "query", "doc") if c in COLUMN_NAMES[source.kind] and c not in row]
        if missing:
            names = ", ".join(list(value)[:8]) or "none"
            source.bad(number, "broken-json", f"no {_display_name(missing[0])} among its names: {names}")
        else:
            yield number, row


def _display_name(column: str) -> str:
    return {"id": "_id", "query": "query-id", "doc": "corpus-id"}.get(column, column)


def _fields(value: dict[str, Any], kind: Kind) -> dict[str, Any]:
    if kind != "qrels" and "_id" in value and "text" in value:  # the usual names, a fast path
        return {"id": value["_id"], "title": value.get("title"), "text": value["text"]}
    return {column: value[name] for column, name in find_columns(list(value), kind).items()}


def _json_lines(source: SourceFile, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, text in lines:
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            source.bad(number, "broken-json", f"{type(error).__name__}: {error}")


def _one_value(source: SourceFile, text: str) -> list[Any]:
    """The rows of a file that is one JSON value: a list of objects, or objects by id; empty if it is JSON lines."""
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
    if source.kind != "qrels" and not find_columns(list(value), source.kind).get("id"):
        if all(isinstance(inner, str) for inner in value.values()):
            return [{"_id": key, "text": inner} for key, inner in value.items()]
        if all(isinstance(inner, dict) for inner in value.values()):
            return [{"_id": key, **inner} for key, inner in value.items()]
    return []


# -- columns in lines -----------------------------------------------------------------------------------------------------


def _delimited(source: SourceFile, stream: io.BufferedReader, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = lines_of(source, stream, blank=True)
    beginning = list(itertools.islice(lines, SAMPLE))
    sample = [(number, text.rstrip("\r")) for number, text in beginning if text.strip()]
    if not sample:
        if next(lines, None) is not None:
            raise source.error(f"the first {SAMPLE} lines are blank; a row has {EXPECTED_COLUMNS[source.kind]}")
        return
    first = sample[0][1]
    options = "\t,;" if suffix != "csv" else ",;\t"
    header: list[str] | None = None
    # a text may contain any of the other separators
    mark = next((option for option in options if option in first), " ")
    cells = _cells(first, mark)
    if len(cells) > 1 and find_columns(cells, source.kind).keys() - {"title", "score"}:
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
    # an id begins with a quotation mark only if it is quoted; a text may begin with one
    quoted = mark in ",;" or (mark == "\t" and source.kind == "qrels")
    quoted |= (
        mark == "\t"
        and header is not None
        and all(
            _parse_csv(text, mark) is not None for _, text in sample if _quotes(text, mark) and text.count('"') % 2 == 0
        )
    )
    after = 0 if header is None else sample[0][0]
    rest = itertools.chain((line for line in beginning if line[0] > after), lines)
    for number, cells in _records(source, rest, mark, width, quoted):
        if len(cells) != width:
            expected = f"the header names {width}" if header is not None else f"the other lines have {width}"
            source.bad(number, "broken-line", f"{len(cells)} columns, {expected}: {(mark.join(cells))[:80]}")
        else:
            yield number, {column: cells[place] for column, place in places.items()}


def _mark(source: SourceFile, sample: list[str], options: str) -> str:
    """The separator of the columns of a file without a header; a space means any white space."""
    if source.kind != "qrels":
        if not any(options[0] in text for text in sample):
            raise source.error(
                f"no {'tab' if options[0] == chr(9) else 'comma'} in the lines; write rows of {EXPECTED_COLUMNS[source.kind]}"
            )
        return options[0]
    best = (0.0, 0.0, options[0])
    for mark in [*options, " "]:
        widths = Counter(len(_cells(text, mark)) for text in sample)
        width, lines = widths.most_common(1)[0]
        fit = (lines / len(sample) * (width > 2), lines / len(sample), mark)
        if 2 <= width <= 6 and fit[:2] > best[:2]:
            best = fit
    return best[2]


def _by_position(source: SourceFile, sample: list[tuple[int, str]], mark: str) -> tuple[dict[str, int], int]:
    """The position of each column in a file without a header, and the number of columns. Raises ConfigError if unclear."""
    split = [_cells(text, mark) for _, text in sample]
    width = Counter(map(len, split)).most_common(1)[0][0]
    line, first = sample[0][0], split[0]
    shown = mark.join(first)[:80]
    if source.kind == "qrels":
        if len(first) == width > 2 and not is_number(first[-1]) and (len(split) == 1 or is_number(split[1][-1])):
            raise source.error(
                f"{shown!r}: neither a row with a score at its end nor a header of known names; a row has "
                f"{EXPECTED_COLUMNS['qrels']}",
                line,
            )
        if width == 4:
            if not all(re.fullmatch(r"Q?0|\d{1,3}", cells[1], re.IGNORECASE) for cells in split if len(cells) == 4):
                raise source.error(
                    f"{shown!r}: four columns, but the second is not TREC's iteration (0); a row has {EXPECTED_COLUMNS['qrels']}",
                    line,
                )
            return {"query": 0, "doc": 2, "score": 3}, 4
        if width in (2, 3):
            return dict(zip(("query", "doc", "score"), range(width), strict=False)), width
        hint = "; a TREC run has six" if width == 6 else ""
        raise source.error(
            f"{shown!r}: {width} column{'s' * (width > 1)}{hint}; a row has {EXPECTED_COLUMNS['qrels']}", line
        )
    if _unknown_header(split, width):
        raise source.error(f"{shown!r}: unknown column names; a header names {EXPECTED_COLUMNS[source.kind]}", line)
    if width == 2:
        return {"id": 0, "text": 1}, 2
    if source.kind == "corpus" and width == 4 and all("://" in c[1] for c in split if len(c) == 4):
        return {"id": 0, "title": 2, "text": 3}, 4  # MS MARCO's documents: id, address, title, body
    raise source.error(
        f"{shown!r}: {width} column{'s' * (width > 1)} and no header; add a first line that names {EXPECTED_COLUMNS[source.kind]}",
        line,
    )


def _unknown_header(split: list[list[str]], width: int) -> bool:
    """Whether the first line is a header: single words above ids with digits and texts of several words."""
    rest = [cells for cells in split[1:] if len(cells) == width]
    if len(split[0]) != width or not rest:
        return False
    single = all(len(cell.split()) <= 1 and not any(map(str.isdigit, cell)) for cell in split[0])
    return single and all(any(map(str.isdigit, c[0])) for c in rest) and all(len(c[-1].split()) > 1 for c in rest)


def _places(source: SourceFile, header: list[str], line: int) -> dict[str, int]:
    columns = find_columns(header, source.kind)
    required = ("query", "doc") if source.kind == "qrels" else ("id", "text")
    titled = source.kind == "queries" and "title" in columns  # TREC's topics
    absent = [c for c in required if c not in columns and not (titled and c == "text")]
    missing = list(map(_display_name, absent))
    if missing:
        raise source.error(
            f"no {' and no '.join(missing)} among the columns {', '.join(header)}; a header names {EXPECTED_COLUMNS[source.kind]}",
            line,
        )
    if source.kind == "qrels" and "score" not in columns and len(header) > 2:
        raise source.error(
            f"no score among the columns {', '.join(header)}; a header names {EXPECTED_COLUMNS['qrels']}", line
        )
    _refuse_repeated_columns(source, header, columns)
    return {column: header.index(name) for column, name in columns.items()}


def _refuse_repeated_columns(source: SourceFile, names: list[str], columns: dict[str, str]) -> None:
    repeated = next((name for name in columns.values() if names.count(name) > 1), None)
    if repeated is not None:
        raise source.error(f"two columns are called {repeated!r}; rename the one that should not be read")


def _quotes(text: str, mark: str) -> bool:
    """Whether a cell begins with a quotation mark."""
    return text.startswith('"') or f'{mark}"' in text


def _parse_csv(text: str, mark: str) -> list[str] | None:
    """The cells of a record by the rules of CSV; None if it breaks them."""
    csv.field_size_limit(1 << 31)
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None


def _cells(text: str, mark: str) -> list[str]:
    if mark == " ":
        return re.split(r"[ \t\r\x0b\x0c]+", text.strip(" \t\r\x0b\x0c"))  # other white space may be part of an id
    if _quotes(text, mark) and (cells := _parse_csv(text, mark)) is not None:
        return cells
    return text.split(mark)


def _records(
    source: SourceFile, lines: Iterator[tuple[int, str]], mark: str, width: int, quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record; a quoted cell may span several lines."""
    pending: list[tuple[int, str]] = []
    while True:
        number, text = pending.pop(0) if pending else next(lines, (0, ""))
        if not number:
            return
        if not text.strip():
            continue
        if not quoted or not _quotes(text, mark):
            yield number, _cells(text.rstrip("\r"), mark) if mark == " " else text.rstrip("\r").split(mark)
            continue
        group, marks = [(number, text)], text.count('"')
        while marks % 2 and len(group) < LONGEST:
            following = pending.pop(0) if pending else next(lines, None)
            if following is None:
                break
            group.append(following)
            marks += following[1].count('"')
        cells = _parse_csv("\n".join(line for _, line in group).rstrip("\r"), mark) if marks % 2 == 0 else None
        plain = all(len(line.split(mark)) == width for _, line in group)
        if cells is not None and (source.kind == "qrels" or len(group) == 1 or not plain):
            source.lines -= sum(bool(line.strip()) for _, line in group[1:])
            yield number, cells
        elif mark in ",;":
            raise source.error("a quotation mark is not closed; write the file as CSV again", number)
        else:
            pending = group[1:] + pending
            yield number, text.rstrip("\r").split(mark)


# -- Parquet --------------------------------------------------------------------------------------------------------------


def _parquet(source: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.fs.open_input_file(source.path) as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            names = file.schema_arrow.names
            columns = find_columns(names, source.kind)
            required = ("query", "doc") if source.kind == "qrels" else ("id", "text")
            missing = [_display_name(column) for column in required if column not in columns]
            if missing:
                raise source.error(
                    f"no {' and no '.join(missing)} among the columns {', '.join(names)}; give {EXPECTED_COLUMNS[source.kind]}"
                )
            if source.kind == "qrels" and "score" not in columns and len(names) > 2:
                raise source.error(f"no score among the columns {', '.join(names)}; give {EXPECTED_COLUMNS['qrels']}")
            _refuse_repeated_columns(source, names, columns)
            for column, name in columns.items():
                _check_type(source, column, name, file.schema_arrow.field(name).type)
            row = 0
            for batch in file.iter_batches(BATCH, columns=list(columns.values())):
                values = {column: _values(batch[name]) for column, name in columns.items()}
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
            raise source.error(f"not a complete Parquet file ({error}); write it again") from None


def _check_type(source: SourceFile, column: str, name: str, kind: pa.DataType) -> None:
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
        raise source.error(
            f"column {name!r} is of type {kind}, which cannot be {column}; give {EXPECTED_COLUMNS[source.kind]}"
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
    return [None if raw is None else _decode(raw) for raw in column.to_pylist()]


def _decode(raw: bytes) -> Any:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return error
