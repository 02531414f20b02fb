"""File systems behind paths and URIs, safe names, and local copies of remote files."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError, digest
from dagr_ray.core.paths import absolute, is_uri

log = logging.getLogger("dagr")

LONGEST_NAME, LONGEST_PATH = 255, 1024  # bytes: limits of Linux's file systems for a name, and of S3 for a key
FETCHERS = 8  # files of a folder fetched at once
PART = ".part"
ABANDONED_S = 6 * 3600.0
_IS_PART = re.compile(r"\.[0-9a-f]{8}\.part$")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a path or URI (``s3://``, ``gs://``, ``file://``) and the path inside it.

    Options follow a question mark (``s3://bucket/path?endpoint_override=host:port&scheme=http&region=...``). Credentials
    come from the environment only, because a URI is written into plans and manifests. Raises ConfigError.
    """
    uri = absolute(uri)
    if is_uri(uri):
        scheme, _, rest = uri.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        if at and (scheme == "s3" or ":" in user):
            raise ConfigError(
                f"an address ({scheme}://) holds credentials; remove them and set them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the variables of the store's own tools)"
            )
        option = ""
        if scheme == "s3" and "allow_delayed_open" not in uri:
            # one request for a small file instead of three
            option = ("&" if "?" in uri else "?") + "allow_delayed_open=true"
        try:
            fs, path = pafs.FileSystem.from_uri(uri + option)
        except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError) as error:
            reason = str(error).replace(option, "")  # nobody typed it
            raise ConfigError(
                f"{uri.partition('?')[0]!r} is not a valid address ({reason}); write a space as %20, and give a path or "
                "s3://, gs:// or file:// and the location"
            ) from None
        return fs, path.rstrip("/")
    return pafs.LocalFileSystem(), uri


def check_writable(runs: str) -> None:
    """Raises ConfigError if a local runs folder cannot be made or written; leaves nothing behind."""
    fs, path = filesystem(runs)
    if not isinstance(fs, pafs.LocalFileSystem):
        return
    parent = path
    try:
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        with tempfile.TemporaryFile(dir=parent):
            pass
        if f"{path}/".find("/runtime_resources/working_dir_files/") >= 0:
            log.warning(
                "%s is inside the copy of a job's working directory, which Ray deletes; give --runs an absolute path or a URI",
                path,
            )
    except NotADirectoryError:
        raise ConfigError(f"runs folder {path!r}: {parent!r} is not a folder; give another --runs") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"runs folder {path!r}: {parent!r} cannot be written ({why}); give another --runs") from None


def scratch() -> str:
    """The folder for files that this machine can build or fetch again. No other user can write to it.

    DAGR_SCRATCH, or a folder below it if others may write there too; else ``user_cache``. Raises ConfigError.
    """
    override = environment.get("DAGR_SCRATCH")
    return _usable_scratch(os.path.realpath(os.path.expanduser(override))) if override else user_cache()


def user_cache() -> str:
    """``dagr`` in the user's cache folder (XDG_CACHE_HOME, ``~/.cache``), else the user's folder below the temporary one."""
    for folder in _cache_folders():
        with contextlib.suppress(OSError, ConfigError):
            return own_folder(folder)
    folder = own_temporary()
    if os.path.basename(folder) != _own_name():
        os.environ["DAGR_SCRATCH"] = folder  # for child processes
    return folder


def user_cache_places() -> list[str]:
    """The folders that ``user_cache`` tries, best first, without those of other users. Makes none of them."""
    places = [*_cache_folders(), os.path.join(tempfile.gettempdir(), _own_name())]
    return [place for place in places if not os.path.lexists(place) or _is_own(os.lstat(place), place)]


def _usable_scratch(folder: str) -> str:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        info = os.stat(folder)
        if not info.st_mode & 0o022 and _is_own(info, folder):
            return folder
        return own_folder(os.path.join(folder, _own_name()))
    except OSError as error:
        raise ConfigError(
            f"DAGR_SCRATCH = {folder!r} cannot be written ({error.strerror}); give a folder of your own, or unset it"
        ) from None


def _cache_folders() -> Iterator[str]:
    """Candidates by the XDG base directory specification, which ignores relative paths."""
    base, home = environment.get("XDG_CACHE_HOME"), os.path.expanduser("~")
    if os.path.isabs(base):
        yield os.path.join(base, "dagr")
    # HOME may be another user's (`sudo -E`); then it is not ours to fill
    with contextlib.suppress(OSError):
        if os.path.isabs(home) and os.stat(home).st_uid == os.geteuid():
            yield os.path.join(home, ".cache", "dagr")


def own_temporary(below: str | None = None) -> str:
    """The user's folder ``dagr-<user id>`` below the temporary folder (``below``), or a new one if another user owns that."""
    below = below or tempfile.gettempdir()
    try:
        return own_folder(os.path.join(below, _own_name()))
    except ConfigError:
        return tempfile.mkdtemp(prefix=f"{_own_name()}-", dir=below)


def _own_name() -> str:
    return f"dagr-{os.geteuid()}"


def own_folder(folder: str) -> str:
    """Makes a folder with mode 0700. Raises ConfigError if it is a link or another user's, OSError if it is not writable."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode) or not _is_own(info, folder):
        kind = f"belongs to user {info.st_uid}" if stat.S_ISDIR(info.st_mode) else "is a link or a file"
        raise ConfigError(f"{folder!r} {kind}: it is not yours; remove it, or set DAGR_SCRATCH to a folder of your own")
    if stat.S_IMODE(info.st_mode) != 0o700:
        os.chmod(folder, 0o700)
    if not os.access(folder, os.W_OK):  # a read-only file system
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)
    return folder


def _is_own(info: os.stat_result, folder: str) -> bool:
    """Whether a folder is this user's. A file system may map the user to another number (NFS does so with root)."""
    if info.st_uid == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid == info.st_uid
    except OSError:
        return False


def _check_own(path: str) -> None:
    """Raises ConfigError if a part of a path in the scratch folder was not made by this user."""
    root = scratch()
    first, *more = os.path.relpath(path, root).split(os.sep)
    at = own_folder(os.path.join(root, first))  # with this, no other user gets below it, whatever the modes there
    owner = os.lstat(at).st_uid
    for part in more:
        at = os.path.join(at, part)
        try:
            info = os.lstat(at)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(info.st_mode) or info.st_uid != owner:
            kind = "is a link" if stat.S_ISLNK(info.st_mode) else f"belongs to user {info.st_uid}"
            raise ConfigError(f"{at!r} in the scratch folder {kind}: its content is unsafe; remove it and run again")


def below(folder: str | os.PathLike[str], name: str, source: str = "") -> str:
    """The path of ``name`` inside a local folder, for a name that comes from outside.

    A key in a store's listing, a file in a list, an id or a label may be any text. Allowed are parts joined by ``/`` that
    every file system accepts as names. Raises ConfigError for a name that is absolute or empty, has a part that is
    empty, ``.`` or ``..``, a backslash, a drive, a control character or over 255 bytes, or goes through a symlink out of
    the folder. ``source`` tells in the message where the name came from.

    >>> below("cache", "models/m.bin")
    'cache/models/m.bin'
    """
    root = os.fspath(folder)
    problem = name_problem(name) or (None if _is_inside(root, name) else "a symlink in it leads out of its folder")
    if problem:
        raise ConfigError(
            f"the name {_quoted(name)}{f' in {_quoted(source)}' if source else ''} is refused: {problem}; allowed are names joined "
            "by / that stay below their folder; rename it at its source"
        )
    return os.path.join(root, name)


def plain_name(name: str, owner: str = "") -> str:
    """A name that any file system accepts for one file or folder. Raises ConfigError as ``below`` does, and for a slash.

    >>> plain_name("search-bm25-test-3f9c1a2b7d04")
    'search-bm25-test-3f9c1a2b7d04'
    """
    problem = name_problem(name) or ("it has a slash" if "/" in name else None)
    if problem:
        raise ConfigError(
            f"the name {_quoted(name)}{f' of {owner}' if owner else ''} is refused: {problem}; give another"
        )
    return name


def name_problem(name: str) -> str | None:
    """Why a name could lead out of any folder, or be no name to some file system; None for a good one.

    The one rule for names that somebody else chose: ``below``, ``plain_name``, and the paths in a folder's own files.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "it is not Unicode"
    if len(encoded) > LONGEST_PATH:
        return f"it has over {LONGEST_PATH} bytes"
    if _CONTROLS.search(name) or "\\" in name:
        return "it has a backslash" if "\\" in name else "it has control characters"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "it is absolute"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"it has the part {part!r}" if part else "it has an empty part"
        if len(part.encode()) > LONGEST_NAME:
            return f"it has a part of over {LONGEST_NAME} bytes"
    return None


def _is_inside(root: str, name: str) -> bool:
    real = os.path.realpath(root)
    return os.path.commonpath([real, os.path.realpath(os.path.join(real, name))]) == real


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


def fetch(fs: pafs.FileSystem, source: str, cache: str) -> None:
    """Copies a file or folder into the scratch folder, unless it is there. A reader sees all of it or nothing.

    Markers of empty folders (keys that end in a slash) are ignored. A failed fetch removes its partial files; those of a
    killed fetch are removed by a later one. Raises ConfigError for a key that is not a path below the folder, for two
    keys that map to one file, and if the existing copy was not made by this user.
    """
    _check_own(cache)
    if os.path.exists(cache):
        return
    place = os.path.dirname(cache)
    os.makedirs(place, exist_ok=True)
    _remove_old_parts(place)
    part = f"{cache}.{uuid.uuid4().hex[:8]}{PART}"
    try:
        if fs.get_file_info(source).type == pafs.FileType.Directory:
            os.makedirs(part)
            _fetch_folder(fs, source, part)
        else:
            pafs.copy_files(source, part, source_filesystem=fs, destination_filesystem=None)
        try:
            os.replace(part, cache)
        except OSError:  # another process of this machine may have fetched the same folder first
            if not os.path.isdir(cache):
                raise
            _check_own(cache)
    finally:
        _remove(part)


def _fetch_folder(fs: pafs.FileSystem, source: str, part: str) -> None:
    files = [info for info in fs.get_file_info(pafs.FileSelector(source, recursive=True)) if info.is_file]
    sources: dict[str, pafs.FileInfo] = {}
    for info in files:
        if not info.path.startswith(f"{source}/"):
            raise ConfigError(f"the store lists {_quoted(info.path)} below {_quoted(source)}; it is refused")
        sources[below(part, info.path[len(source) + 1 :], source=source)] = info
    for target in sources:  # a store may have a file and a folder of one name
        above = next((folder for folder in _folders_above(target, part) if folder in sources), None)
        if above:
            raise ConfigError(
                f"{_quoted(sources[above].path)} is a file and a folder in the store; remove one of the two"
            )
        os.makedirs(os.path.dirname(target), exist_ok=True)

    def bring(target: str) -> None:
        info = sources[target]
        if os.path.exists(target):  # a disk may not tell upper from lower case
            raise ConfigError(
                f"{_quoted(info.path)} would overwrite another file of its folder here; rename it in the store"
            )
        try:
            pafs.copy_files(info.path, target, source_filesystem=fs, destination_filesystem=None)
        except FileNotFoundError:
            raise ConfigError(f"{_quoted(info.path)} is in the store's listing, but missing; upload it again") from None
        if os.path.getsize(target) != info.size:
            raise OSError(
                f"{info.path!r} came with {os.path.getsize(target)} bytes, the store lists {info.size}; try again"
            )

    with ThreadPoolExecutor(FETCHERS) as pool:
        for _ in pool.map(bring, sources):
            pass


def _folders_above(path: str, root: str) -> Iterator[str]:
    while len(path := os.path.dirname(path)) > len(root):
        yield path


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


@lru_cache(maxsize=1024)
def _remove_old_parts(place: str) -> None:
    """Removes partial files of killed fetches: parts unchanged for hours. Looks once per process."""
    for entry in os.scandir(place):
        if _IS_PART.search(entry.name):
            inside = [os.path.join(top, name) for top, _, names in os.walk(entry.path) for name in names]
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if time.time() - max(map(os.path.getmtime, [entry.path, *inside])) > ABANDONED_S:
                    _remove(entry.path)


@lru_cache(maxsize=64)
def local_folder(folder: str) -> Path:
    """A local folder: a path is returned as it is; a URI's folder is fetched, once for each content.

    The copy lies below DAGR_SCRATCH, keyed by the names, sizes and times of its files, and keeps the folder's name.
    Raises ConfigError if there is nothing at the URI.
    """
    if not is_uri(folder):
        return Path(absolute(folder))
    fs, root = filesystem(folder)
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = sorted((info.path, info.size, info.mtime_ns) for info in infos if info.is_file)
    if not files:
        raise ConfigError(f"no files at {folder!r}; give the address of a folder")
    cache = below(os.path.join(scratch(), "folders", digest(files)), root.rsplit("/", 1)[-1])
    fetch(fs, root, cache)
    return Path(cache)
