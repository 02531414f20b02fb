"""Arrow schemas of all tables, schema checks, ids derived from content, and text that Arrow and JSON can hold.

Core tables hold only what BEIR holds; a row's origin is in a side table joined by id. A table may be split by a suffix:
``qrels.test`` has the schema of ``qrels``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import plain_name

TEXT = pa.large_string()
# Names that collections use for the development split.
DEV = ("dev", "validation", "valid", "val", "development")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def _schema(*required: tuple[str, pa.DataType], optional: Iterable[tuple[str, pa.DataType]] = ()) -> pa.Schema:
    fields = [pa.field(name, kind, nullable=False) for name, kind in required]
    return pa.schema(fields + [pa.field(name, kind) for name, kind in optional])


SCHEMAS: dict[str, pa.Schema] = {
    "corpus": _schema(("doc_id", TEXT), ("title", TEXT), ("text", TEXT)),
    "queries": _schema(("query_id", TEXT), ("text", TEXT)),
    "qrels": _schema(("query_id", TEXT), ("doc_id", TEXT), ("relevance", pa.int32())),
    # a strategy's input besides passages: doc_id names the pair, text is passage_id's text, other is other_id's text
    "pairs": _schema(
        ("doc_id", TEXT),
        ("title", TEXT),
        ("text", TEXT),
        ("query", TEXT),
        ("other", TEXT),
        ("passage_id", TEXT),
        optional=[("query_id", TEXT), ("other_id", TEXT)],
    ),
    "changes": _schema(("doc_id", TEXT), ("before", TEXT), ("after", TEXT)),
    "exemplars": _schema(("query_id", TEXT), ("doc_id", TEXT), ("query", TEXT), ("passage", TEXT)),
    "generations": _schema(
        ("gen_id", TEXT),
        ("source_id", TEXT),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("prompt_sha", TEXT),
        ("truncated", pa.bool_()),
        optional=[
            ("raw", TEXT),
            ("finish_reason", TEXT),
            ("prompt_tokens", pa.int32()),
            ("cached_tokens", pa.int32()),
            ("completion_tokens", pa.int32()),
            ("logprob", pa.float32()),
            ("error", TEXT),
        ],
    ),
    "lineage": _schema(
        ("id", TEXT), ("gen_id", TEXT), ("source_id", TEXT), ("strategy", TEXT), ("engine", TEXT), ("model", TEXT)
    ),
    "scores": _schema(("query_id", TEXT), ("doc_id", TEXT), ("scorer", TEXT), ("score", pa.float32())),
    "candidates": _schema(("query_id", TEXT), ("doc_id", TEXT), ("rank", pa.int32()), ("score", pa.float32())),
    "examples": _schema(
        ("query_id", TEXT),
        ("positive_id", TEXT),
        ("negative_ids", pa.list_(TEXT)),
        optional=[("positive_score", pa.float32()), ("negative_scores", pa.list_(pa.float32()))],
    ),
    "leaks": _schema(
        ("id", TEXT),
        ("kind", TEXT),
        ("mechanism", TEXT),
        ("data", TEXT),
        ("held_out_id", TEXT),
        ("score", pa.float32()),
        ("text", TEXT),
        ("held_out", TEXT),
    ),
    # each person's grade; the qrels beside it hold one relevance for each pair
    "ratings": _schema(
        ("query_id", TEXT), ("doc_id", TEXT), ("grade", pa.int32()), ("who", TEXT), optional=[("at", TEXT)]
    ),
    "rejected": _schema(("id", TEXT), ("by", TEXT), ("reason", TEXT), optional=[("detail", TEXT)]),
    "masked": _schema(("id", TEXT), ("by", TEXT), ("detail", TEXT)),
    "metrics": _schema(
        ("measure", TEXT), ("value", pa.float64()), optional=[("query_id", TEXT), ("data", TEXT), ("split", TEXT)]
    ),
}


def schema(name: str) -> pa.Schema:
    """The schema of a table; ``qrels.test`` has the schema of ``qrels``."""
    return SCHEMAS[name.split(".")[0]]


def table(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows (mappings from column to value) as a checked table of kind ``name``."""
    return check(name, pa.Table.from_pylist(list(rows), schema=schema(name)))


def columns(name: str, rows: int, **values: Any) -> pa.Table:
    """A checked table of kind ``name`` from columns: lists, arrays, or one value (or None) for all ``rows`` rows."""
    arrays = []
    for field in schema(name):
        value = values.pop(field.name, None)
        if isinstance(value, list):
            arrays.append(pa.array(value, field.type))
        elif isinstance(value, pa.Array | pa.ChunkedArray):
            arrays.append(value)
        else:
            arrays.append(pa.repeat(pa.scalar(value, field.type), rows))
    assert not values, f"table {name!r} has no columns {sorted(values)}"
    return check(name, pa.Table.from_arrays(arrays, schema=schema(name)))


def prompt_source(rows: pa.Table) -> pa.Table:
    """The columns of a ``corpus`` or ``pairs`` table that a strategy reads, in the order of ``Passage``."""
    return rows.select([name for name in ("doc_id", "title", "text", "query", "other") if name in rows.column_names])


def texts(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A text column as a list, in about half the time of ``to_pylist``."""
    return column.to_numpy(zero_copy_only=False).tolist()


class Rejected:
    """Collects rows of the ``rejected`` table, column by column."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.by: list[str] = []
        self.reasons: list[str] = []
        self.details: list[str | None] = []

    def add(self, id: str, by: str, reason: str, detail: str | None = None) -> None:
        """Adds a row."""
        self.ids.append(id)
        self.by.append(by)
        self.reasons.append(reason)
        self.details.append(detail)

    def counts_by_reason(self) -> dict[str, int]:
        """The number of rows for each ``by/reason``."""
        return dict(Counter(map("/".join, zip(self.by, self.reasons, strict=True))))

    def table(self) -> pa.Table:
        """The checked table."""
        values = {"id": self.ids, "by": self.by, "reason": self.reasons, "detail": self.details}
        return columns("rejected", len(self.ids), **values)


def empty(name: str) -> pa.Table:
    """A table of kind ``name`` with no rows."""
    return schema(name).empty_table()


def check(name: str, value: pa.Table) -> pa.Table:
    """Returns the table if it has exactly the schema of ``name`` and no unexpected nulls; else raises AssertionError.

    Raises ConfigError if the name cannot be a folder's name: a split may be called anything.
    """
    plain_name(name, owner="a table")
    expected = schema(name)
    assert value.schema.equals(expected), f"table {name!r} has schema {value.schema}, expected {expected}"
    for field in expected:
        nulls = 0 if field.nullable else value[field.name].null_count
        assert not nulls, f"table {name!r} has {nulls} nulls in {field.name!r}"
    return value


def fill_columns(name: str, value: pa.Table, names: Iterable[str] | None = None) -> pa.Table:
    """The columns ``names`` (None: all) of a table of kind ``name``; nullable columns that an older table lacks are null.

    >>> old = pa.table({"query_id": ["q1"], "value": [0.5], "measure": ["nDCG@10"]})
    >>> fill_columns("metrics", old, ["value", "split"]).to_pylist()
    [{'value': 0.5, 'split': None}]
    """
    known, present = schema(name), value.column_names
    wanted = list(known.names if names is None else names)
    for missing in (known.field(n) for n in wanted if n not in present and known.field(n).nullable):
        value = value.append_column(missing, pa.nulls(len(value), missing.type))
    return value.select(wanted)


def texts_of(queries: pa.Table) -> dict[str, str]:
    """The text of each query of a ``queries`` table by its id."""
    return dict(zip(queries["query_id"].to_pylist(), queries["text"].to_pylist(), strict=True))


def relevant(qrels: pa.Table) -> pa.Table:
    """The rows of a ``qrels`` table with relevance above 0."""
    return qrels.filter(pc.greater(qrels["relevance"], 0))


def split_of(splits: Iterable[str], wanted: str) -> str | None:
    """The split called ``wanted``; ``dev``, ``validation``, ``valid`` and ``val`` are synonyms. None if there is none.

    >>> split_of(["test", "validation"], "dev"), split_of(["dev", "val"], "val"), split_of(["test"], "dev")
    ('validation', 'val', None)
    """
    names = list(splits)
    if wanted in names:
        return wanted
    return next((name for name in DEV if name in names), None) if wanted in DEV else None


def qrels_table(tables: Iterable[str], split: str, who: str, where: str) -> str:
    """The name of a split's qrels table. Raises ConfigError if it is not in ``tables``.

    ``dev`` and ``validation`` are synonyms: see ``split_of``.
    """
    splits = sorted(name.removeprefix("qrels.") for name in tables if name.startswith("qrels."))
    named = split_of(splits, split)
    if named is None:
        raise ConfigError(f"{who}: split = {split!r} is not in {where}; allowed: {', '.join(splits) or 'none'}")
    return f"qrels.{named}"


def prompt_sha(prompt: str) -> str:
    """What ``generations`` keeps of a prompt, to tell later whether the same prompt is made again."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def clean(text: str) -> str:
    """Text that UTF-8 and Arrow can hold: NUL and lone surrogates become U+FFFD."""
    if text.isascii() and "\x00" not in text:
        return text
    return _UNSTORABLE.sub("\ufffd", text)


_SPACE = re.compile(r"[\s\ufeff]|\\(?=u[0-9a-f]{4})")
_SPELLED = re.compile(r"\\u([0-9a-f]{4})")


def escape_spaces(id: str) -> str:
    """An id without white space, for formats with space-separated columns; ``unescape_spaces`` restores the id.

    White space becomes ``\\u`` and four hexadecimal digits, and so does a backslash that would read as such an escape.

    >>> [escape_spaces(id) for id in ("a b", "a_b", "a\\tb", r"a\\u0020b")], unescape_spaces(escape_spaces("a b"))
    (['a\\\\u0020b', 'a_b', 'a\\\\u0009b', 'a\\\\u005cu0020b'], 'a b')
    """
    return _SPACE.sub(lambda match: f"\\u{ord(match[0]):04x}", id) or "\\u0000"


def unescape_spaces(word: str) -> str:
    """The id that ``escape_spaces`` encoded; any other word is returned unchanged."""
    return _SPELLED.sub(_spelt, word) if "\\u" in word else word


def _spelt(match: re.Match[str]) -> str:
    char = "" if match[1] == "0000" else chr(int(match[1], 16))
    return char if char in ("", "\\", "\ufeff") or char.isspace() else match[0]


def passage_text(title: str, text: str) -> str:
    """The text of a passage for every retriever: title, a space, text (the field of Anserini's flat BEIR runs)."""
    return f"{title} {text}" if title else text


def fold_texts(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts without differences of case, spacing and spelling (NFC). Equal results are one passage with two ids."""
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        texts = pc.utf8_normalize(texts, form="NFC")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"[\s\pZ]+", " "))


def id_of(*parts: object) -> str:
    """An id of 24 hex digits (96 bits: under 1e-9 odds of a collision in 1e9 rows) from its content."""
    return hash_id(b"".join(map(encode_id_part, parts)))


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**31) from content, the range that numpy, torch and vLLM all take."""
    return seed_for(b"".join(map(encode_id_part, parts)))


def unit_of(*parts: object) -> float:
    """A number in [0, 1) from content: ``unit_of(seed, id) < share`` selects the same nested subset everywhere."""
    return int.from_bytes(hashlib.blake2b(b"".join(map(encode_id_part, parts)), digest_size=7).digest(), "big") / 2**56


def encode_id_part(value: object) -> bytes:
    """One part of an id's content. Its length comes first, because ("ab", "c") and ("a", "bc") must differ."""
    text = str(value).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "big") + text


def hash_id(content: bytes) -> str:
    """``id_of`` for parts that are already joined: for many ids with the same first part.

    >>> hash_id(encode_id_part("d1") + encode_id_part(0)) == id_of("d1", 0)
    True
    """
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def seed_for(content: bytes) -> int:
    """``seed_of`` for parts that are already joined."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") % 2**31
