"""Where bytes lie: the file system behind a path or URI, and what of it is fetched to this machine."""

from __future__ import annotations

import os
import shutil
import uuid
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
    """Where this machine keeps what it can make or fetch again: DAGR_SCRATCH."""
    return os.environ.get("DAGR_SCRATCH", "/tmp/dagr-scratch")


def fetch(fs: pafs.FileSystem, source: str, cache: str) -> None:
    """Copies a file or folder to a place on this machine, unless it is there; complete or absent whenever it is seen."""
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
