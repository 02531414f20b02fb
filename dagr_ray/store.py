"""Where bytes lie: the file system behind a path or URI, and what of it is fetched to this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow.fs as pafs

from dagr_ray.config import ConfigError, digest


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a path or URI (``s3://``, ``gs://``, ``file://``) and the path inside it.

    Options follow a question mark (``s3://bucket/path?endpoint_override=host:port&scheme=http&region=...``). Credentials
    come from the environment alone: a URI is written into plans and manifests. Raises ConfigError.
    """
    if "://" in uri:
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
        fs, path = pafs.FileSystem.from_uri(uri)
        return fs, path.rstrip("/")
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))


def scratch() -> str:
    """Where this machine keeps what it can make or fetch again, in a folder that no other user can write.

    DAGR_SCRATCH, or a folder below it if others may write there too; else ``user_cache``. Raises ConfigError.
    """
    given = os.environ.get("DAGR_SCRATCH")
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
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
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


def fetch(fs: pafs.FileSystem, source: str, cache: str) -> None:
    """Copies a file or folder to a place in the scratch folder, unless it is there; complete or absent whenever it is seen.

    Raises ConfigError if what is there was not put there by this user.
    """
    _check_own(cache)
    if os.path.exists(cache):
        return
    part = f"{cache}.{uuid.uuid4().hex[:8]}.part"
    # copy_files makes the folders inside a folder but not the folder itself
    is_folder = fs.get_file_info(source).type == pafs.FileType.Directory
    os.makedirs(part if is_folder else os.path.dirname(part), exist_ok=True)
    pafs.copy_files(source, part, source_filesystem=fs, destination_filesystem=None)
    try:
        os.replace(part, cache)
    except OSError:  # another process of this machine brought the same folder first
        shutil.rmtree(part)
        _check_own(cache)


@lru_cache(maxsize=64)
def local_folder(folder: str) -> Path:
    """A folder on this machine: one given as a path is where it is; one behind a URI is fetched, once for each content.

    What is fetched lies below DAGR_SCRATCH, by the names, sizes and times of its files, and keeps the folder's name.
    Raises ConfigError where there is nothing at a URI.
    """
    if "://" not in folder:
        return Path(folder).expanduser()
    fs, root = filesystem(folder)
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = sorted((f.path, f.size, f.mtime_ns) for f in found if f.is_file)
    if not files:
        raise ConfigError(f"no files at {folder!r}; give the address of a folder")
    cache = os.path.join(scratch(), "folders", digest(files), root.rsplit("/", 1)[-1])
    fetch(fs, root, cache)
    return Path(cache)
