"""Names, shapes and seals of the files in a stage's folder.

A file is either exactly what was written or damaged (another program's copy, part of a file, a disk error). A damaged
file is treated as missing, and its content is built again. The seal is the SHA-256 of the file's place in the runs
folder and its text, so that flipped bits and swapped files are both noticed. A file without a seal is older than seals;
it is accepted if it has the right shape.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot inspect the one of typing before Python 3.12

from dagr_ray.core.config import packed, unpacked
from dagr_ray.core.storage import name_problem

Json = dict[str, Any]
LARGEST = 1 << 53  # every JSON reader holds integers up to this exactly


class Malformed(ValueError):
    """A file that is damaged or not one of this package's; the message says why."""


# -- names --------------------------------------------------------------------------------------------------------------

# Files that other programs leave here (a synchroniser's copy, an editor's, a file manager's) have other names.
NAMES = {
    "receipts": re.compile(r"\d{5,9}\.json"),
    "revoked": re.compile(r"\d{5,9}-[0-9a-f]{4}\.json"),
    "tries": re.compile(r"\d{5,9}-[0-9a-f]{12}\.json"),
    "attempts": re.compile(r"\d{3,9}-[0-9a-f]{4}\.jsonl"),
    "starts": re.compile(r"\d{3,9}-[0-9a-f]{4}-[0-9a-f]{12}"),
    "checkpoints": re.compile(r"[0-9]{8,12}-[0-9A-Za-z_-]{1,64}"),
}
_STAGE = re.compile(r"[^/\x00-\x1f.][^/\x00-\x1f]*-[0-9a-f]{12}")
_STUDY = re.compile(r"study-\w[\w-]*")


def is_stage(name: str) -> bool:
    """Whether a folder of this name can hold a stage: the name ends with a fingerprint.

    >>> is_stage("generate-crop-crop-3f9c1a2b7d04"), is_stage("generate-crop-crop-3f9c1a2b7d04 (1)"), is_stage("mlruns")
    (True, False, False)
    """
    return _STAGE.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a folder of this name can hold a stage or a study.

    >>> is_ours("study-beir-3f9c1a2b7d04"), is_ours("study-beir-3f9c1a2b7d04.bak"), is_ours(".DS_Store")
    (True, False, False)
    """
    return is_stage(name) or _STUDY.fullmatch(name) is not None


def shard_of(file: str) -> int:
    """The shard number in the name of a receipt or a part.

    >>> shard_of("receipts/00012.json"), shard_of("queries/part-00003-77ab01cd.parquet")
    (12, 3)
    """
    match = re.search(r"(?:^|/)(?:part-)?(\d+)", file.rpartition("/")[2] if "/" in file else file)
    return int(match[1]) if match else -1


def _below(path: str) -> str:
    """Refuses a path that leaves its folder."""
    if problem := name_problem(path):
        raise ValueError(f"a path that may leave its folder: {problem}")
    return path


def _folder(name: str) -> str:
    if "/" in _below(name):
        raise ValueError("not the name of a folder")
    return name


# -- shapes -------------------------------------------------------------------------------------------------------------


def _tree(value: Any, depth: int = 8) -> Any:
    """Checks that a value is a tree of objects with finite numbers."""
    if isinstance(value, dict) and depth:
        for name, item in value.items():
            _tree(item, depth - 1 if isinstance(name, str) else 0)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is not a number between -2^53 and 2^53")
    return value


_LAX = ConfigDict(extra="allow", strict=True)
Count = Annotated[int, Field(ge=0, le=LARGEST)]
# an integer or a float, as it was written
Amount = Count | Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Finite = (
    Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    | Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
)
Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Path = Annotated[str, AfterValidator(_below)]
FolderName = Annotated[str, AfterValidator(_folder)]
PartName = Annotated[str, StringConstraints(pattern=r"^[^/\\.][^/\\]*/part-[0-9]{5,9}-[0-9a-f]{8}\.parquet$")]
Rows = Annotated[list[Count], Field(min_length=2, max_length=2)]


def _numbers(value: Json) -> Json:
    _tree(value)
    for name in ("in", "out", "errors"):
        if value.get(name, 0) < 0:
            raise ValueError(f"{name} is below 0")
    return value


def _costs(value: Json) -> Json:
    _tree(value)
    if any(not isinstance(amount, dict) and amount < 0 for amount in value.values()):
        raise ValueError("a cost below 0")
    return value


Counts = Annotated[dict[str, Any], AfterValidator(_numbers)]
Cost = Annotated[dict[str, Any], AfterValidator(_costs)]


class Part(TypedDict, total=False):
    """A part of a table."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    file: Required[PartName]
    rows: Required[Count]
    bytes: Required[Count]
    sha256: Required[Sha]


class File(TypedDict, total=False):
    """A file that a stage wrote itself."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    file: Required[Path]
    bytes: Required[Count]
    sha256: Required[Sha]
    shard: Count


class Receipt(TypedDict, total=False):
    """``receipts/00000.json``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    shard: Required[Count]
    tables: Required[dict[str, Part]]
    files: Required[dict[Path, File]]
    counts: Counts
    cost: Cost
    rows: Rows
    attempt: Count
    at: Amount
    cpus: Amount


class Shard(TypedDict, total=False):
    """A range of input rows."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    shard: Count
    start: Required[Count]
    stop: Required[Count]


class Plan(TypedDict, total=False):
    """``plan.json``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    shards: Required[list[Shard]]
    stage: dict[str, Any]
    fingerprint: str
    inputs: dict[str, FolderName]
    role: str
    rows_from: list[str]
    made_from: dict[str, str]
    rows: Count | None


class Table(TypedDict, total=False):
    """A table in a manifest."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    parts: Required[list[Part]]
    rows: Count
    bytes: Count


class Bill(TypedDict, total=False):
    """The cost section of a manifest: see ``cost``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    tokens: Required[dict[str, Count]]
    seconds: Required[dict[str, Finite]]
    waste: Required[dict[str, Finite]]
    usd: Required[dict[str, Finite]]
    attempts: Required[Count]
    rates: Required[dict[str, Any]]


class PlacedPool(TypedDict, total=False):
    """A pool of a placement."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    workers: Required[Count]


class Placed(TypedDict, total=False):
    """The placement of a manifest."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    light: PlacedPool
    generate: PlacedPool
    retrieve: PlacedPool
    train: PlacedPool


class Manifest(TypedDict, total=False):
    """``manifest.json``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    tables: Required[dict[str, Table]]
    stage: dict[str, Any]
    fingerprint: str
    inputs: dict[str, FolderName]
    role: str
    rows_from: list[str]
    made_from: dict[str, str]
    files: dict[Path, File]
    counts: Counts
    cost: Cost
    waste: dict[str, Any]
    bill: Bill
    price: Amount | None
    placement: Placed
    attempts: Count
    finished: Amount
    code: str
    packages: dict[str, str]


class Mark(TypedDict, total=False):
    """``tries/00000-5c1e22ab90d4.json``: see ``poison_rows``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    shard: Required[Count]
    start: Required[Count]
    stop: Required[Count]
    attempt: Required[Annotated[str, StringConstraints(pattern=r"^[0-9]+(-.*)?$")]]
    name: Required[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]]
    began: Required[Amount]
    inline: bool
    cause: str
    detail: str


class Trial(TypedDict, total=False):
    """A trial of ``study.json``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    trial: Required[str]
    params: Required[dict[str, Any]]
    kind: Required[Literal["bm25", "frozen", "augmented"]]
    folder: Required[FolderName]
    stages: Required[dict[FolderName, Any]]
    state: str
    error: str | None
    seconds: Amount


class Study(TypedDict, total=False):
    """``study.json``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    name: Required[str]
    trials: Required[list[Trial]]
    job: str
    axes: dict[str, list[Any]]
    defaults: dict[str, Any]
    created: Amount
    machine: dict[str, Any]
    wall_s: Amount


class HeldResources(TypedDict, total=False):
    """The resources that an attempt holds."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    workers: Required[Count]
    cpus: Required[Amount]
    gpus: Required[Amount]
    workers_of_a_shard: Required[Count]


class Event(TypedDict, total=False):
    """A line of ``attempts/001-9c1f.jsonl``."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    at: Required[Amount]
    event: Required[str]
    holds: HeldResources
    placement: dict[str, Any]


class Rank(TypedDict, total=False):
    """``checkpoints/00000200-5c1e/rank-0.json``: the files written by one training worker."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    workers: Required[Annotated[int, Field(ge=1, le=1 << 16)]]
    files: Required[dict[Path, Sha]]


class _Cuts(TypedDict, total=False):
    __pydantic_config__ = _LAX  # type: ignore[misc]
    cuts: Required[Annotated[list[float], Field(min_length=3, max_length=3)]]  # infinite for a grade that never occurs


class _Teacher(TypedDict, total=False):
    __pydantic_config__ = _LAX  # type: ignore[misc]
    recalibrated: Required[_Cuts]


class Agreement(TypedDict, total=False):
    """``agreement.json``: agreement of human grades and teacher scores."""

    __pydantic_config__ = _LAX  # type: ignore[misc]
    teachers: Required[dict[str, _Teacher]]


_SHAPES: dict[str, Any] = {
    "plan.json": Plan,
    "manifest.json": Manifest,
    "study.json": Study,
    "agreement.json": Agreement,
    "receipts": Receipt,
    "revoked": Receipt,
    "tries": Mark,
    "attempts": Event,
    "checkpoints": Rank,
}
_OF_A_STAGE = ("stage", "fingerprint", "inputs", "files", "counts", "cost", "finished")


@lru_cache(maxsize=32)
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_SHAPES[kind])


# -- reading and writing ------------------------------------------------------------------------------------------------

_SEAL = re.compile(rb',\s*"seal":\s*"([0-9a-f]{64})"\s*}\s*$')


def _seal(folder: str, place: str, body: bytes) -> str:
    # the fingerprint identifies the folder: a data set's folder may have another label
    where = folder.rpartition("-")[2] if is_stage(folder) else folder
    return hashlib.sha256(f"{where}/{place}\n".encode("utf-8", "surrogatepass") + body).hexdigest()


def is_known(place: str) -> bool:
    """Whether files of this path have a shape, and so a seal."""
    return (place if "/" not in place else place.partition("/")[0]) in _SHAPES


def sealed_json(folder: str, place: str, value: Json, indent: int | None = 1) -> bytes:
    """A JSON object as the file ``place`` (relative) of a folder, with the seal as its last key."""
    text = json.dumps(packed(value), indent=indent, ensure_ascii=False)
    body = text.encode("utf-8", "replace").rstrip()[:-1].rstrip()
    if body == b"{":
        return body + b"}"
    return body + f', "seal": "{_seal(folder, place, body)}"}}'.encode()


def read(folder: str, place: str, data: bytes) -> Any:
    """The value of the file ``place`` (relative) of a folder, without its seal. Raises Malformed."""
    seal = _SEAL.search(data[-120:])
    if seal is not None:
        body = data[: len(data) - (len(data[-120:]) - seal.start())]
        if _seal(folder, place, body) != seal[1].decode():
            raise Malformed("its bytes differ from those that were written")
    kind = place if "/" not in place else place.partition("/")[0]
    try:
        if kind not in _SHAPES:
            value = unpacked(data)
        elif b'"$same"' in data:
            value = _adapter(kind).validate_python(unpacked(data))
        else:
            value = _adapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(key) for key in first["loc"])[:80]
        raise Malformed(f"{where + ': ' if where else ''}{first['msg']}"[:200]) from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}"[:200]) from None
    if isinstance(value, dict):
        value.pop("seal", None)
        _fits(folder, place, value)
    return value


def _fits(folder: str, place: str, value: Json) -> None:
    """Raises Malformed if a file's content contradicts its place."""
    kind, _, name = place.partition("/")
    if kind in ("receipts", "revoked", "tries") and value["shard"] != shard_of(name):
        raise Malformed(f"it belongs to shard {value['shard']}")
    if kind in ("receipts", "manifest.json") and any(
        part["file"].rpartition("/")[0] != table
        for table, entry in value["tables"].items()
        for part in (entry["parts"] if kind == "manifest.json" else [entry])
    ):
        raise Malformed("it names a part of another table")
    if kind == "manifest.json":
        for table, entry in value["tables"].items():
            for what in ("rows", "bytes"):
                in_all = sum(part[what] for part in entry["parts"])
                if is_stage(folder):
                    entry.setdefault(what, in_all)
                if entry.get(what, in_all) != in_all:
                    raise Malformed(f"{table} has {in_all} {what} in its parts, not {entry[what]}")
    if kind == "plan.json":
        if [shard.get("shard", i) for i, shard in enumerate(value["shards"])] != list(range(len(value["shards"]))):
            raise Malformed("its shards are not numbered consecutively")
        if any(shard["stop"] < shard["start"] for shard in value["shards"]):
            raise Malformed("a shard ends before it starts")
    if kind in ("receipts", "revoked"):
        if is_stage(folder) and not {"counts", "cost"} <= value.keys():
            raise Malformed("counts and cost: Fields required")
        value.setdefault("counts", {})
        value.setdefault("cost", {})
    if kind in ("plan.json", "manifest.json"):
        if folder in value.get("inputs", {}).values():
            raise Malformed("it lists itself as an input")
        if is_stage(folder):
            wanted = _OF_A_STAGE if kind == "manifest.json" else _OF_A_STAGE[:3]
            missing = next((key for key in wanted if key not in value), None)
            if missing is not None:
                raise Malformed(f"{missing}: Field required")
            if not folder.endswith(f"-{value['fingerprint']}"):
                raise Malformed(f"it belongs to another stage ({value['fingerprint'][:40]})")
            if not isinstance(value["stage"].get("type", ""), str):
                raise Malformed("stage.type is not a name")


def line(folder: str, place: str, value: Json) -> str:
    """An object as a line of a log, with its seal."""
    return sealed_json(folder, place, value, indent=None).decode()


def lines(folder: str, place: str, data: bytes) -> tuple[list[Json], int]:
    """The objects of a log, and the number of damaged lines."""
    values, bad = [], 0
    for text in data.splitlines():
        try:
            values.append(read(folder, place, text))
        except Malformed:
            bad += 1
    return values, bad
