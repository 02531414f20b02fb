"""Finds the files with passages, queries and judgements in a folder, for the common layouts of collections.

BEIR (``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``), MTEB and NanoBEIR on Hugging Face (a folder of Parquet
shards for each of ``corpus``, ``queries`` and ``qrels``, ``default`` or ``data``), MS MARCO (``collection.tsv``,
``queries.<split>.tsv``, ``qrels.<split>.tsv``), and the same names with other suffixes. Sources: BEIR (Thakur et al., arXiv
2104.08663); MTEB's ``RetrievalDatasetLoader``; huggingface.co/docs/hub/datasets-data-files-configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.core.storage import filesystem

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
ENDINGS = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".txt", ".trec", ".qrels", ".parquet")
SPLITS = ("test", "train", *tables.DEV)
WORDS = {
    "qrels": ("qrels", "qrel", "judgments", "judgements"),
    "queries": ("queries", "query", "topics"),
    "corpus": ("corpus", "collection", "documents", "docs", "passages"),
}
NOT_OURS = ("readme", "license", "licence", "notes", "source", "citation", "instruction", "diff", "ranked")


@dataclass
class Layout:
    """The files of a collection by content: relative path -> file; the files of ``qrels`` by split."""

    fs: pafs.FileSystem
    corpus: dict[str, pafs.FileInfo] = field(default_factory=dict)
    queries: dict[str, pafs.FileInfo] = field(default_factory=dict)
    qrels: dict[str, dict[str, pafs.FileInfo]] = field(default_factory=dict)

    def files(self) -> dict[str, pafs.FileInfo]:
        """All files by their name without ``.gz``, so that a plain and a compressed copy are the same collection."""
        every = [self.corpus, self.queries, *self.qrels.values()]
        return {name.removesuffix(".gz"): info for group in every for name, info in group.items()}


def find_layout(path: str) -> Layout:
    """The files of a collection. Raises ConfigError if passages or queries are missing, or files are ambiguous."""
    fs, root = filesystem(path)
    info = fs.get_file_info(root)
    if info.is_file:
        raise ConfigError(
            f"{path!r} is a file; give the folder that contains it, {path.rstrip('/').rpartition('/')[0]!r}"
        )
    classified = [(*role, name, file) for name, file in _files(fs, root) for role in _classify(name)]
    groups: dict[str, dict[str, list[tuple[str, pafs.FileInfo]]]] = {kind: {} for kind in WORDS}
    for kind, rank, part, name, file in classified:
        if rank == min(r for k, r, *_ in classified if k == kind):
            groups[kind].setdefault(part, []).append((name, file))
    for kind in ("corpus", "queries"):
        if not groups[kind]:
            raise ConfigError(
                f"no {kind}.jsonl in {path!r}; give a BEIR folder (corpus.jsonl, queries.jsonl, qrels/<split>.tsv), or one "
                f"with folders or files corpus, queries and qrels of JSON lines, CSV, TSV or Parquet"
            )
    if len(groups["corpus"]) > 1:
        shown = " and ".join(sorted(part[0][0] for part in groups["corpus"].values())[:3])
        raise ConfigError(
            f"{path!r} has {len(groups['corpus'])} sets of passages ({shown}); give a folder with only the passages "
            "that are judged"
        )
    files = {kind: {part: _shards(path, group) for part, group in parts.items()} for kind, parts in groups.items()}
    queries = {name: file for part in files["queries"].values() for name, file in part.items()}
    return Layout(fs, next(iter(files["corpus"].values())), queries, files["qrels"])


def _files(fs: pafs.FileSystem, root: str) -> list[tuple[str, pafs.FileInfo]]:
    """Files of the folder and of its subfolders with a known name, without hidden files."""
    entries = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    infos = [entry for entry in entries if entry.is_file]
    for folder in entries:
        if folder.type == pafs.FileType.Directory and _kind(folder.base_name) is not None:
            infos += fs.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    files = [(info.path[len(root) + 1 :], info) for info in infos if info.is_file]
    return sorted(
        (n, i) for n, i in files if not any(part.startswith((".", "_")) for part in n.split("/")[:-1]) and _stem(n)
    )


def _stem(name: str) -> str:
    """A file's name without its suffixes; empty if the file is not a table."""
    base = name.rpartition("/")[2]
    if base.startswith((".", "~")) or base.startswith("_SUCCESS"):
        return ""
    for packing in PACKED:
        base = base.removesuffix(packing)
    ending = next((each for each in ENDINGS if base.lower().endswith(each)), None)
    return "" if ending is None else base[: -len(ending)]


def _kind(name: str) -> str | None:
    """The content of a file or folder of that name; ``data`` if it may have any content."""
    words = re.split(r"[^a-z]+", name.lower())
    if any(word in words for word in NOT_OURS):
        return None
    for kind, known in WORDS.items():
        if any(word in known for word in words) or (kind == "qrels" and "qrels" in name.lower()):
            return kind
    return "data" if name.lower() in ("default", "data") else None


def _classify(name: str) -> list[tuple[str, int, str]]:
    """The role of a file by its path: its kind, its rank (only files of the lowest rank are read), its part or split.

    >>> _classify("queries.dev.tsv"), _classify("data/test-00000-of-00001.parquet"), _classify("corpus/train/0000.parquet")
    ([('queries', 1, 'queries.dev')], [('qrels', 2, 'test')], [('corpus', 1, 'corpus/train')])
    """
    folders, stem = name.split("/")[:-1], _stem(name)
    bare = re.sub(r"[-_.]?\d+-of-\d+.*$", "", stem)
    if folders:
        bare = re.sub(r"^(part|shard)?[-_.]?\d+([-_.][\w-]*)?$", "", bare)  # 0000.parquet, part-00000-1f0c.parquet
    own = _kind(bare)
    kinds = [kind for folder in folders if (kind := _kind(folder)) is not None]
    if any(word in NOT_OURS for word in re.split(r"[^a-z]+", bare.lower())):
        return []
    if not folders and bare.lower() in SPLITS:
        return [("qrels", 3, bare)]
    # files in qrels/ are judgements, whatever their names; in data/ the file's own name decides
    kind = own if own and own != "data" and (not kinds or kinds[0] == "data") else kinds[0] if kinds else own
    if kind is None or (kind == "data" and not folders):
        return []
    plain = re.sub(r"\.gz$", "", name)
    if kind in ("corpus", "queries"):
        if plain == f"{kind}.jsonl":
            return [(kind, 0, kind)]
        numbered = re.sub(r"[-_.]?\d+$", "", bare) if own == kind else bare
        return [(kind, 1, "/".join(part for part in (*folders, numbered) if part))]
    split = re.sub("|".join(WORDS["qrels"]), "", bare, flags=re.IGNORECASE).strip("-_.") if own == "qrels" else bare
    split = split or (folders[-1] if len(folders) > 1 else "test")
    if re.fullmatch(r"qrels/[^/]+\.tsv", plain):
        return [("qrels", 0, bare)]
    return [("qrels", 2 if kind == "data" else 1, split)]


def _shards(path: str, part: list[tuple[str, pafs.FileInfo]]) -> dict[str, pafs.FileInfo]:
    """The files of one table: a single file, or all of its numbered parts. A plain file replaces its compressed copy.

    Raises ConfigError if files are ambiguous or parts are missing.
    """
    every = {name for name, _ in part}
    files = {n: i for n, i in part if not any(n.endswith(e) and n.removesuffix(e) in every for e in PACKED)}
    names = list(files)
    numbers = [_OF.search(name) for name in names]
    counts = {int(match[2]) for match in numbers if match}
    endings = {_ending(name) for name in names}
    numbered = all(match or re.search(r"\d", _stem(name)) for name, match in zip(names, numbers, strict=True))
    if len(names) > 1 and (len(endings) > 1 or not numbered or len(counts) > 1 or (counts and None in numbers)):
        raise ConfigError(f"{path}: it is unclear which of {' and '.join(names[:3])} to read; keep one of them")
    for count in counts:
        missing = sorted(set(range(count)) - {int(match[1]) for match in numbers if match})
        if missing and len(names) < count:
            raise ConfigError(
                f"{path}/{names[0]}: {len(names)} of {count} parts are present, number {missing[0]} is missing; fetch it"
            )
    return files


def _ending(name: str) -> str:
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name.rpartition(".")[2].lower()


_OF = re.compile(r"(\d+)-of-(\d+)")
