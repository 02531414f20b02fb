"""Makes the paths that users name absolute, and derives short names from them.

A worker has another working directory than the person who typed a path. So a path is made absolute when it is read (a
config's field, a command's argument, the environment) and at no other time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field

from dagr_ray.core import environment
from dagr_ray.core.config import ConfigError

NAME_LENGTH = 40
NAME_BYTES = 120


def is_uri(text: str) -> bool:
    """Whether a text is an address (``s3://bucket/key``) and not a path.

    >>> is_uri("s3://bucket/key"), is_uri("a folder/x://y")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def absolute(path_or_uri: str | Path) -> str:
    """An absolute path; ``~`` is the home folder. An address is returned unchanged, except ``file://``, which is a path.

    Symbolic links are kept. ``..`` after a link is resolved as the system does: it leaves the link's target. Raises
    ConfigError if the text cannot be a path.
    """
    text = os.fspath(path_or_uri)
    if is_uri(text):
        if not text.lower().startswith("file://"):
            return text
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{text!r} names a file of another machine; give a path, or file:///PATH")
        text = unquote(parts.path)
    if not text:
        raise ConfigError("an empty path; give the path of a file or folder")
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a NUL character, which paths cannot hold; give another path")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{text!a} is not UTF-8; rename it, or give a symbolic link to it that has another name"
        ) from None
    path = os.path.expanduser(text)
    if not os.path.isabs(path):
        try:
            path = os.path.join(os.getcwd(), path)
        except FileNotFoundError:
            raise ConfigError(f"{text!r} is relative, but the current folder was deleted; cd to another one") from None
    names = path.split("/")
    if ".." in names:
        last = len(names) - names[::-1].index("..")
        path = os.path.join(os.path.realpath("/".join(names[:last])), *names[last:])
    # POSIX leaves the meaning of two leading slashes open; Linux reads them as one
    return re.sub("^//", "/", os.path.normpath(path))


def model_path(name: str) -> str:
    """A model folder's absolute path; an address or a hub id (``org/name``, no folder of that name) is unchanged."""
    hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return name if hub and not os.path.isdir(name) else absolute(name)


# Types of fields and of recipe parameters that hold a path. They are validated when a config or a command is read.
FileOrFolder = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
ModelName = Annotated[str, Field(min_length=1), AfterValidator(model_path)]


def make_environment_absolute() -> None:
    """Makes the folders named by environment variables absolute: workers inherit them and run in another folder."""
    for name in environment.FOLDERS:
        if os.environ.get(name):
            os.environ[name] = absolute(os.environ[name])


def split_values(text: str, mark: str) -> tuple[str, ...]:
    """Splits a text at ``mark``, except if the mark is inside the path of an existing file or folder.

    >>> split_values("0,8,16", ",")
    ('0', '8', '16')
    """
    parts = text.split(mark)
    values: list[str] = []
    at = 0
    while at < len(parts):
        ends = range(len(parts), at + 1, -1)
        end = next((end for end in ends if _is_there(mark.join(parts[at:end]))), at + 1)
        values.append(mark.join(parts[at:end]))
        at = end
    return tuple(values)


def _is_there(text: str) -> bool:
    try:
        return not is_uri(text) and os.path.exists(absolute(text))
    except (ConfigError, OSError):
        return False


def last_name(place: str) -> str:
    """The last name of a path or address, without the address's options.

    >>> last_name("s3://bucket/set?region=x"), last_name("/sets/a?b/")
    ('set', 'a?b')
    """
    return _without_options(place).rstrip("/").rsplit("/", 1)[-1]


def _without_options(place: str) -> str:
    return place.partition("?")[0] if is_uri(place) else place


def word_of(text: str) -> str:
    """A text as part of a folder's name: lower-case letters and digits of any script, at most 40 characters.

    >>> word_of("../My Set#1")
    '___my_set_1'
    """
    return "".join(c if c.isalnum() else "_" for c in text.lower())[:NAME_LENGTH]


def part_of_name(text: str) -> str:
    """A text as part of a file name: without path separators, at most 120 bytes long.

    >>> part_of_name("crop-my model/../x"), part_of_name("all-minilm-l6-v2")
    ('crop-my_model_.._x', 'all-minilm-l6-v2')
    """
    kept = "".join(c if c.isalnum() or c in "._-+@" else "_" for c in text)
    return kept.encode()[:NAME_BYTES].decode(errors="ignore")


def distinct_names(places: Iterable[str]) -> dict[str, str]:
    """The shortest suffix of each path or address that differs from all others.

    >>> distinct_names(["/a/set", "/b/set", "/b/other"])
    {'/a/set': 'a/set', '/b/set': 'b/set', '/b/other': 'other'}
    """
    names = {place: _without_options(place).rstrip("/").split("/") for place in places}

    def end(place: str, length: int) -> str:
        return "/".join(names[place][-length:])

    short_names: dict[str, str] = {}
    for place, parts in names.items():
        lengths = range(1, len(parts) + 1)
        unique = (n for n in lengths if all(end(other, n) != end(place, n) for other in names if other != place))
        short_names[place] = end(place, next(unique, len(parts)))
    return short_names


def is_same(one: str, other: str) -> bool:
    """Whether two names lead to the same local file or folder."""
    try:
        return one == other or (not (is_uri(one) or is_uri(other)) and os.path.samefile(one, other))
    except OSError:
        return False
