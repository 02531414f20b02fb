"""The texts of a training in files on this machine's disk, addressed by number.

Neither the corpus nor the texts are in memory: a training holds numbers (a few bytes per example) and reads the texts of a
batch from a file. The file is written once for all workers of a machine, from Parquet, a range of rows at a time.
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

ROWS = 65536  # rows of a table that are read at once
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
        # a memory-mapped file would count as memory of the process, page by page
        return [os.pread(self._file, int(self.bytes[i]), int(self._starts[i])).decode() for i in numbers]

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Examples(NamedTuple):
    """Examples as text numbers, ordered by query and positive. Example i has ``negatives[starts[i]:starts[i + 1]]``."""

    query: np.ndarray  # [n]
    positive: np.ndarray  # [n]
    negatives: np.ndarray
    starts: np.ndarray  # [n + 1]
    positive_score: np.ndarray  # [n], NaN if missing
    negative_scores: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def of(self, row: int) -> np.ndarray:
        """The negatives of an example."""
        return self.negatives[self.starts[row] : self.starts[row + 1]]

    def relevant(self, query: int) -> np.ndarray:
        """All passages that are positives of a query's text in any example."""
        first, last = np.searchsorted(self.query, [query, query + 1])
        return self.positive[first:last]


class Data(NamedTuple):
    """The texts and examples of a training, and their folder on this machine."""

    queries: Texts
    passages: Texts
    examples: Examples
    folder: Path

    def remove(self) -> None:
        """Deletes the files. Other workers that have them open can continue to read."""
        self.queries.close()
        self.passages.close()
        with _locked(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)


def fetch(examples: Artifact, queries: Artifact, corpus: Artifact) -> Data:
    """The texts of the examples. The first worker of a machine writes the files; others, and restarts, reuse them."""
    # by content, because a part that was damaged and rebuilt may have other texts
    key = digest([(artifact.manifest or {})["tables"] for artifact in (examples, queries, corpus)])
    folder = Path(own_folder(f"{scratch()}/training")) / key
    with _locked(folder):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _write_files(folder, examples, queries, corpus)
            (folder / "done").touch()
        arrays = {name: np.load(folder / f"{name}.npy") for name in Examples._fields}
        return Data(Texts(folder / "queries"), Texts(folder / "passages"), Examples(**arrays), folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_files(folder: Path, examples: Artifact, queries: Artifact, corpus: Artifact) -> None:
    columns: dict[str, list[pa.Array]] = {name: [] for name in tables.schema("examples").names}
    for part in ranges(examples, "examples"):
        for name, chunks in columns.items():
            chunks.append(part[name].combine_chunks())
    negatives = [chunk.flatten() for chunk in columns["negative_ids"]]
    query_ids = pa.chunked_array(columns["query_id"], tables.TEXT)
    passage_ids = pa.chunked_array([*columns["positive_id"], *negatives], tables.TEXT)
    query = _numbers(folder / "queries", queries, "queries", query_ids)
    passage = _numbers(folder / "passages", corpus, "corpus", passage_ids)
    counts = np.concatenate([np.diff(_offsets(chunk)) for chunk in columns["negative_ids"]] or [np.zeros(0, np.int64)])
    positive, negative = passage[: len(query)], passage[len(query) :]
    # a fixed order, independent of the order of the rows
    order = np.lexsort((positive, query))
    starts = np.concatenate([[0], np.cumsum(counts)])
    reordered = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order] or [np.zeros(0, np.int64)])
    numbered = Examples(
        query[order],
        positive[order],
        negative[reordered],
        np.concatenate([[0], np.cumsum(counts[order])]),
        _floats(columns["positive_score"])[order],
        _negative_scores(columns["negative_scores"], counts)[reordered],
    )
    for name, array in numbered._asdict().items():
        np.save(folder / f"{name}.npy", array)


def ranges(source: Artifact, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table in ranges of rows, so that memory holds only a few row groups, however long the parts are."""
    for start in range(0, source.count(name), ROWS):
        yield source.slice(name, start, start + ROWS, columns)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return lists.offsets.to_numpy()


def _floats(chunks: list[pa.Array]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(c.to_numpy(zero_copy_only=False) for c in chunks)])


def _negative_scores(chunks: list[pa.ListArray], counts: np.ndarray) -> np.ndarray:
    """The scores of all negatives; NaN if a list of scores is null or has another length than the negatives."""
    scores = np.full(int(counts.sum()), np.nan, np.float32)
    starts, row = np.concatenate([[0], np.cumsum(counts)]), 0
    for chunk in chunks:
        values = _floats([chunk.flatten()])
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy()
        begin = np.concatenate([[0], np.cumsum(lengths)])
        for i in np.flatnonzero(lengths):
            if lengths[i] == counts[row + i]:
                scores[starts[row + i] : starts[row + i + 1]] = values[begin[i] : begin[i + 1]]
        row += len(chunk)
    return scores


def _numbers(folder: Path, source: Artifact, name: str, ids: pa.ChunkedArray) -> np.ndarray:
    """Writes the texts of these ids to files; returns the number of each id's text."""
    folder.mkdir(parents=True)
    unique_ids = ids.unique()
    key = tables.schema(name).field(0).name
    starts, sizes = np.full(len(unique_ids), -1, np.int64), np.zeros(len(unique_ids), np.int64)
    hashes, at = np.zeros(len(unique_ids), f"S{DIGEST}"), 0
    with open(folder / "texts", "wb") as file:
        for part in ranges(source, name):
            index = pc.index_in(part[key], value_set=unique_ids)
            part = part.filter(index.is_valid())
            for i, text in zip(index.drop_null().to_pylist(), _texts_of(name, part), strict=True):
                data = text.encode()
                if starts[i] < 0:
                    starts[i], sizes[i] = at, len(data)
                    hashes[i] = hashlib.blake2b(data, digest_size=DIGEST).digest()
                    at += file.write(data)
    missing = np.flatnonzero(starts < 0)
    assert not len(missing), (
        f"{len(missing)} ids of the examples are not in {name} of {source.path}, such as {unique_ids[missing[0]].as_py()!r}"
    )
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    np.save(folder / "starts.npy", starts[first])
    np.save(folder / "bytes.npy", sizes[first])
    return number[pc.index_in(ids, value_set=unique_ids).to_numpy()].astype(np.int32)


def _texts_of(name: str, rows: pa.Table) -> list[str]:
    texts = tables.texts(rows["text"])
    if name != "corpus":
        return texts
    return [tables.passage_text(title, text) for title, text in zip(tables.texts(rows["title"]), texts, strict=True)]
