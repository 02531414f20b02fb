"""The texts of a training on this machine's disk, by number: fetched by id from Parquet, a range of rows at a time.

Neither the corpus nor the texts are ever in memory: a training holds numbers (some bytes an example) and reads the texts
of a batch from a file. The file is made once for all workers of a machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import digest
from dagr_ray.core.storage import own_folder, scratch

ROWS = 65536  # of a table, read at once
DIGEST = 16  # bytes of a text's hash: equal hashes are equal texts


class Texts:
    """Texts in a file, by number from 0. Numbers follow the hashes of the texts, so they do not depend on ids or rows."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "texts", os.O_RDONLY)
        self._starts, self.bytes = np.load(folder / "starts.npy"), np.load(folder / "bytes.npy")

    def __len__(self) -> int:
        return len(self.bytes)

    def read(self, numbers: Iterable[int]) -> list[str]:
        """The texts with these numbers."""
        # a mapped file would count as memory of the process, page by page
        return [os.pread(self._file, int(self.bytes[i]), int(self._starts[i])).decode() for i in numbers]

    def close(self) -> None:
        """Gives the file back."""
        os.close(self._file)


class Examples(NamedTuple):
    """Examples as numbers of their texts, ordered by query and positive: ``negatives[starts[i]:starts[i + 1]]``."""

    query: np.ndarray  # [n]
    positive: np.ndarray  # [n]
    negatives: np.ndarray
    starts: np.ndarray  # [n + 1]
    positive_score: np.ndarray  # [n], NaN where there is none
    negative_scores: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def of(self, row: int) -> np.ndarray:
        """The negatives of an example."""
        return self.negatives[self.starts[row] : self.starts[row + 1]]

    def relevant(self, query: int) -> np.ndarray:
        """All passages that some example gives as positives of a query's text."""
        first, last = np.searchsorted(self.query, [query, query + 1])
        return self.positive[first:last]


class Data(NamedTuple):
    """What a training reads, and the folder of this machine where it lies."""

    queries: Texts
    passages: Texts
    examples: Examples
    folder: Path

    def remove(self) -> None:
        """Deletes the files; other workers that have them open can read on."""
        self.queries.close()
        self.passages.close()
        with _locked(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)


def fetch(examples: Artifact, queries: Artifact, corpus: Artifact) -> Data:
    """The texts of the examples. Made by the first worker of a machine, and found by the others and after a restart."""
    # by content: a part that was damaged and built again may hold other texts
    key = digest([(each.manifest or {})["tables"] for each in (examples, queries, corpus)])
    folder = Path(own_folder(f"{scratch()}/training")) / key
    with _locked(folder):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, examples, queries, corpus)
            (folder / "done").touch()
        arrays = {name: np.load(folder / f"{name}.npy") for name in Examples._fields}
        return Data(Texts(folder / "queries"), Texts(folder / "passages"), Examples(**arrays), folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path, examples: Artifact, queries: Artifact, corpus: Artifact) -> None:
    columns: dict[str, list[pa.Array]] = {name: [] for name in tables.schema("examples").names}
    for part in ranges(examples, "examples"):
        for name, chunks in columns.items():
            chunks.append(part[name].combine_chunks())
    negatives = [chunk.flatten() for chunk in columns["negative_ids"]]
    asked = pa.chunked_array(columns["query_id"], tables.TEXT)
    wanted = pa.chunked_array([*columns["positive_id"], *negatives], tables.TEXT)
    query = _numbers(folder / "queries", queries, "queries", asked)
    passage = _numbers(folder / "passages", corpus, "corpus", wanted)
    each = np.concatenate([np.diff(_offsets(chunk)) for chunk in columns["negative_ids"]] or [np.zeros(0, np.int64)])
    positive, negative = passage[: len(query)], passage[len(query) :]
    # whatever order the rows came in
    order = np.lexsort((positive, query))
    starts = np.concatenate([[0], np.cumsum(each)])
    own = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order] or [np.zeros(0, np.int64)])
    made = Examples(
        query[order],
        positive[order],
        negative[own],
        np.concatenate([[0], np.cumsum(each[order])]),
        _floats(columns["positive_score"])[order],
        _listed(columns["negative_scores"], each)[own],
    )
    for name, array in made._asdict().items():
        np.save(folder / f"{name}.npy", array)


def ranges(source: Artifact, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table by ranges of rows: what holds a few row groups, however long its parts are."""
    for start in range(0, source.count(name), ROWS):
        yield source.slice(name, start, start + ROWS, columns)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return lists.offsets.to_numpy()


def _floats(chunks: list[pa.Array]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(c.to_numpy(zero_copy_only=False) for c in chunks)])


def _listed(chunks: list[pa.ListArray], each: np.ndarray) -> np.ndarray:
    """The scores of all negatives; NaN for those of a list that is null or of another length."""
    whole = np.full(int(each.sum()), np.nan, np.float32)
    starts, row = np.concatenate([[0], np.cumsum(each)]), 0
    for chunk in chunks:
        values = _floats([chunk.flatten()])
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy()
        begin = np.concatenate([[0], np.cumsum(lengths)])
        for i in np.flatnonzero(lengths):
            if lengths[i] == each[row + i]:
                whole[starts[row + i] : starts[row + i + 1]] = values[begin[i] : begin[i + 1]]
        row += len(chunk)
    return whole


def _numbers(folder: Path, source: Artifact, name: str, ids: pa.ChunkedArray) -> np.ndarray:
    """Writes the texts of a table that have these ids; returns the number of the text of each id."""
    folder.mkdir(parents=True)
    wanted = ids.unique()
    key = tables.schema(name).field(0).name
    starts, sizes = np.full(len(wanted), -1, np.int64), np.zeros(len(wanted), np.int64)
    hashes, at = np.zeros(len(wanted), f"S{DIGEST}"), 0
    with open(folder / "texts", "wb") as file:
        for part in ranges(source, name):
            found = pc.index_in(part[key], value_set=wanted)
            part = part.filter(found.is_valid())
            for i, text in zip(found.drop_null().to_pylist(), _said(name, part), strict=True):
                data = text.encode()
                if starts[i] < 0:
                    starts[i], sizes[i] = at, len(data)
                    hashes[i] = hashlib.blake2b(data, digest_size=DIGEST).digest()
                    at += file.write(data)
    missing = np.flatnonzero(starts < 0)
    assert not len(missing), (
        f"{len(missing)} rows of the examples are not in {name} of {source.path}, such as {wanted[missing[0]].as_py()!r}"
    )
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    np.save(folder / "starts.npy", starts[first])
    np.save(folder / "bytes.npy", sizes[first])
    return number[pc.index_in(ids, value_set=wanted).to_numpy()].astype(np.int32)


def _said(name: str, rows: pa.Table) -> list[str]:
    texts = tables.texts(rows["text"])
    if name != "corpus":
        return texts
    return [tables.passage_text(title, text) for title, text in zip(tables.texts(rows["title"]), texts, strict=True)]
