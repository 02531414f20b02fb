"""Where bytes lie: the file system behind a path or URI, and what of it is fetched to this machine."""

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

LONGEST_NAME, LONGEST_PATH = 255, 1024  # bytes: what Linux's file systems take for a name, and S3 for a key
FETCHERS = 8  # files of a folder at once
PART = ".part"
ABANDONED_S = 6 * 3600.0
_IS_PART = re.compile(r"\.[0-9a-f]{8}\.part$")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a path or URI (``s3://``, ``gs://``, ``file://``) and the path inside it.

    Options follow a question mark (``s3://bucket/path?endpoint_override=host:port&scheme=http&region=...``). Credentials
    come from the environment alone: a URI is written into plans and manifests. Raises ConfigError.
    """
    uri = absolute(uri)
    if is_uri(uri):
        scheme, _, rest = uri.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        if at and (scheme == "s3" or ":" in user):
            raise ConfigError(
                f"an address ({scheme}://) holds credentials; leave them out and set them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else the store's own tools read)"
            )
        if scheme == "s3" and "allow_delayed_open" not in uri:
            # a small file is one request instead of three
            uri += ("&" if "?" in uri else "?") + "allow_delayed_open=true"
        try:
            fs, path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, pa.ArrowKeyError, pa.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"{uri.partition('?')[0]!r} is no address ({error}); write a space as %20, and give a path, "
                "or s3://, gs:// or file:// and the place"
            ) from None
        return fs, path.rstrip("/")
    return pafs.LocalFileSystem(), uri


def check_can_be_written(runs: str) -> None:
    """Raises ConfigError if a local runs folder cannot be made or written; makes nothing that stays."""
    fs, path = filesystem(runs)
    if not isinstance(fs, pafs.LocalFileSystem):
        return
    there = path
    try:
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        with tempfile.TemporaryFile(dir=there):
            pass
        if f"{path}/".find("/runtime_resources/working_dir_files/") >= 0:
            log.warning(
                "%s lies in the copy of a job's working directory, which Ray deletes; give --runs an absolute path or a URI",
                path,
            )
    except NotADirectoryError:
        raise ConfigError(f"runs folder {path!r}: {there!r} is no folder; give another --runs") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"runs folder {path!r}: {there!r} cannot be written ({why}); give another --runs") from None


def scratch() -> str:
    """Where this machine keeps what it can make or fetch again, in a folder that no other user can write.

    DAGR_SCRATCH, or a folder below it if others may write there too; else ``user_cache``. Raises ConfigError.
    """
    given = environment.get("DAGR_SCRATCH")
    return _given(os.path.realpath(os.path.expanduser(given))) if given else user_cache()


def user_cache() -> str:
    """``dagr`` in the user's cache folder (XDG_CACHE_HOME, ``~/.cache``), else a folder of the user's below the temporary one."""
    for folder in _cache_folders():
        with contextlib.suppress(OSError, ConfigError):
            return own_folder(folder)
    folder = own_temporary()
    if os.path.basename(folder) != _own_name():
        os.environ["DAGR_SCRATCH"] = folder  # for the processes that this one starts
    return folder


def _given(folder: str) -> str:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
        if not found.st_mode & 0o022 and _is_own(found, folder):
            return folder
        return own_folder(os.path.join(folder, _own_name()))
    except OSError as error:
        raise ConfigError(
            f"DAGR_SCRATCH = {folder!r} cannot be written ({error.strerror}); give a folder of your own, or unset it"
        ) from None


def _cache_folders() -> Iterator[str]:
    """By the XDG base directory specification, which has relative paths ignored."""
    base, home = environment.get("XDG_CACHE_HOME"), os.path.expanduser("~")
    if os.path.isabs(base):
        yield os.path.join(base, "dagr")
    # another user's HOME (`sudo -E`) is that user's to fill
    with contextlib.suppress(OSError):
        if os.path.isabs(home) and os.stat(home).st_uid == os.geteuid():
            yield os.path.join(home, ".cache", "dagr")


def own_temporary(below: str | None = None) -> str:
    """The user's own folder ``dagr-<user id>`` below the temporary one (``below``), or a new one if another user has made that."""
    below = below or tempfile.gettempdir()
    try:
        return own_folder(os.path.join(below, _own_name()))
    except ConfigError:
        return tempfile.mkdtemp(prefix=f"{_own_name()}-", dir=below)


def _own_name() -> str:
    return f"dagr-{os.geteuid()}"


def own_folder(folder: str) -> str:
    """Makes a folder with mode 0700. Raises ConfigError if it is a link or another user's, OSError if it cannot be written."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or not _is_own(found, folder):
        kind = f"belongs to user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is a link or a file"
        raise ConfigError(f"{folder!r} {kind}: it is not yours; remove it, or set DAGR_SCRATCH to a folder of your own")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(folder, 0o700)
    if not os.access(folder, os.W_OK):  # a file system that is read-only
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)
    return folder


def _is_own(found: os.stat_result, folder: str) -> bool:
    """Whether a folder is this user's. A file system may know the user by another number (NFS does so with root)."""
    if found.st_uid == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid == found.st_uid
    except OSError:
        return False


def _check_own(path: str) -> None:
    """Raises ConfigError if something on the way from the scratch folder to a path was not put there by this user."""
    root = scratch()
    first, *more = os.path.relpath(path, root).split(os.sep)
    at = own_folder(os.path.join(root, first))  # nobody else gets below it, whatever the mode of what lies there
    owner = os.lstat(at).st_uid
    for part in more:
        at = os.path.join(at, part)
        try:
            found = os.lstat(at)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(found.st_mode) or found.st_uid != owner:
            kind = "is a link" if stat.S_ISLNK(found.st_mode) else f"belongs to user {found.st_uid}"
            raise ConfigError(f"{at!r} in the scratch folder {kind}: it may hold anything; remove it and run again")


def below(folder: str | os.PathLike[str], name: str, of: str = "") -> str:
    """The path of ``name`` inside a folder of this machine, for a name that somebody else chose.

    A key in a store's listing, a file in a list, an id or a label may be any text. Allowed are parts joined by ``/`` that
    every file system takes for names. Raises ConfigError, with the name, for one that is absolute or empty, has a part
    that is empty, ``.`` or ``..``, a backslash, a drive, a control character or over 255 bytes, or goes through a symlink
    that leads out of the folder. ``of`` says in the message where the name stands.

    >>> below("cache", "models/m.bin")
    'cache/models/m.bin'
    """
    root = os.fspath(folder)
    problem = _problem(name) or (None if _is_inside(root, name) else "a symlink in it leads out of its folder")
    if problem:
        raise ConfigError(
            f"the name {_quoted(name)}{f' in {_quoted(of)}' if of else ''} is refused: {problem}; allowed are names joined "
            "by / that stay below their folder; rename it where it comes from"
        )
    return os.path.join(root, name)


def one_name(name: str, of: str = "") -> str:
    """A name that may be that of one file or folder anywhere. Raises ConfigError as ``below``, for a slash too.

    >>> one_name("search-bm25-test-3f9c1a2b7d04")
    'search-bm25-test-3f9c1a2b7d04'
    """
    problem = _problem(name) or ("it has a slash" if "/" in name else None)
    if problem:
        raise ConfigError(f"the name {_quoted(name)}{f' of {of}' if of else ''} is refused: {problem}; give another")
    return name


def _problem(name: str) -> str | None:
    """What is wrong with a name, whatever the folder is."""
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
            return f"it has {part!r} for a part" if part else "it has an empty part"
        if len(part.encode()) > LONGEST_NAME:
            return f"it has a part of over {LONGEST_NAME} bytes"
    return None


def _is_inside(root: str, name: str) -> bool:
    real = os.path.realpath(root)
    return os.path.commonpath([real, os.path.realpath(os.path.join(real, name))]) == real


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:117]}...")


def fetch(fs: pafs.FileSystem, source: str, cache: str) -> None:
    """Copies a file or folder to a place in the scratch folder, unless it is there; complete or absent whenever it is seen.

    Markers of empty folders (keys that end in a slash) are left out. What a fetch that failed has brought is removed; what
    one that was killed has left is removed by a later one. Raises ConfigError for a key that is no path below the folder,
    for two keys that would be one file, and if what is there was not put there by this user.
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
        except OSError:  # another process of this machine may have brought the same folder first
            if not os.path.isdir(cache):
                raise
            _check_own(cache)
    finally:
        _remove(part)


def _fetch_folder(fs: pafs.FileSystem, source: str, part: str) -> None:
    files = [each for each in fs.get_file_info(pafs.FileSelector(source, recursive=True)) if each.is_file]
    targets: dict[str, pafs.FileInfo] = {}
    for each in files:
        if not each.path.startswith(f"{source}/"):
            raise ConfigError(f"the store lists {_quoted(each.path)} below {_quoted(source)}; it is refused")
        targets[below(part, each.path[len(source) + 1 :], of=source)] = each
    for target in targets:  # a store may have a file and a folder of one name
        above = next((folder for folder in _folders_above(target, part) if folder in targets), None)
        if above:
            raise ConfigError(
                f"{_quoted(targets[above].path)} is a file and a folder in the store; remove one of the two"
            )
        os.makedirs(os.path.dirname(target), exist_ok=True)

    def bring(target: str) -> None:
        each = targets[target]
        if os.path.exists(target):  # on a disk to which upper and lower case are the same
            raise ConfigError(
                f"{_quoted(each.path)} is one file with another of its folder here; rename it in the store"
            )
        try:
            pafs.copy_files(each.path, target, source_filesystem=fs, destination_filesystem=None)
        except FileNotFoundError:
            raise ConfigError(
                f"{_quoted(each.path)} is in the store's list, but not there; put it there again"
            ) from None
        if os.path.getsize(target) != each.size:
            raise OSError(
                f"{each.path!r} came with {os.path.getsize(target)} bytes, the store lists {each.size}; try again"
            )

    with ThreadPoolExecutor(FETCHERS) as pool:
        for _ in pool.map(bring, targets):
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
    """Removes what killed fetches left: parts in which nothing has been written for hours. Looks once in a process."""
    for entry in os.scandir(place):
        if _IS_PART.search(entry.name):
            inside = [os.path.join(top, name) for top, _, names in os.walk(entry.path) for name in names]
            with contextlib.suppress(FileNotFoundError):  # another process is done with it
                if time.time() - max(map(os.path.getmtime, [entry.path, *inside])) > ABANDONED_S:
                    _remove(entry.path)


@lru_cache(maxsize=64)
def local_folder(folder: str) -> Path:
    """A folder on this machine: one given as a path is where it is; one behind a URI is fetched, once for each content.

    What is fetched lies below DAGR_SCRATCH, by the names, sizes and times of its files, and keeps the folder's name.
    Raises ConfigError where there is nothing at a URI.
    """
    if not is_uri(folder):
        return Path(absolute(folder))
    fs, root = filesystem(folder)
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = sorted((f.path, f.size, f.mtime_ns) for f in found if f.is_file)
    if not files:
        raise ConfigError(f"no files at {folder!r}; give the address of a folder")
    cache = below(os.path.join(scratch(), "folders", digest(files)), root.rsplit("/", 1)[-1])
    fetch(fs, root, cache)
    return Path(cache)
