"""What a person names: paths that are absolute once they are read, and short names of what lies there.

A worker stands in another folder than the person who typed a path, so a path is made absolute where it is read (a
config's field, a command's argument, the environment) and nowhere else.
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


def absolute(given: str | Path) -> str:
    """A path made absolute, with ``~`` for the home folder; an address as it is, but for ``file://``, which is a path.

    A symbolic link stays one. ``..`` after a link leaves what the link points to, as the system reads it. Raises
    ConfigError where the text cannot be a path.
    """
    text = os.fspath(given)
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
        raise ConfigError(f"{text!r} holds a NUL character, which no path can; give another path")
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
            raise ConfigError(f"{text!r} is relative, and the current folder was deleted; cd to one that is") from None
    names = path.split("/")
    if ".." in names:
        last = len(names) - names[::-1].index("..")
        path = os.path.join(os.path.realpath("/".join(names[:last])), *names[last:])
    # POSIX leaves it open what two slashes at the beginning mean; Linux takes them for one
    return re.sub("^//", "/", os.path.normpath(path))


def model_named(given: str) -> str:
    """A model's folder made absolute; an address or a hub id (``org/name``, no folder of that name) as it is."""
    hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", given)
    return given if hub and not os.path.isdir(given) else absolute(given)


# The types of fields, and of a recipe's parameters, that name something: validated where a config or a command is read.
FileOrFolder = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
ModelName = Annotated[str, Field(min_length=1), AfterValidator(model_named)]


def make_environment_absolute() -> None:
    """Makes the folders absolute that the environment names: workers inherit it, and stand elsewhere."""
    for name in environment.FOLDERS:
        if os.environ.get(name):
            os.environ[name] = absolute(os.environ[name])


def several(text: str, mark: str) -> tuple[str, ...]:
    """The values that ``mark`` joins. A mark inside the path of an existing file or folder joins nothing.

    >>> several("0,8,16", ",")
    ('0', '8', '16')
    """
    parts = text.split(mark)
    found: list[str] = []
    at = 0
    while at < len(parts):
        ends = range(len(parts), at + 1, -1)
        end = next((end for end in ends if _is_there(mark.join(parts[at:end]))), at + 1)
        found.append(mark.join(parts[at:end]))
        at = end
    return tuple(found)


def _is_there(text: str) -> bool:
    try:
        return not is_uri(text) and os.path.exists(absolute(text))
    except (ConfigError, OSError):
        return False


def last_name(place: str) -> str:
    """The last name of a path or address, without an address's options.

    >>> last_name("s3://bucket/set?region=x"), last_name("/sets/a?b/")
    ('set', 'a?b')
    """
    return _without_options(place).rstrip("/").rsplit("/", 1)[-1]


def _without_options(place: str) -> str:
    return place.partition("?")[0] if is_uri(place) else place


def word_of(text: str) -> str:
    """A text as part of a folder's name: letters and digits of any script, at most 40 characters, in small letters.

    >>> word_of("../My Set#1")
    '___my_set_1'
    """
    return "".join(c if c.isalnum() else "_" for c in text.lower())[:NAME_LENGTH]


def part_of_name(text: str) -> str:
    """A text as part of a name on disk: nothing in it leads elsewhere, and it is at most 120 bytes long.

    >>> part_of_name("crop-my model/../x"), part_of_name("all-minilm-l6-v2")
    ('crop-my_model_.._x', 'all-minilm-l6-v2')
    """
    kept = "".join(c if c.isalnum() or c in "._-+@" else "_" for c in text)
    return kept.encode()[:NAME_BYTES].decode(errors="ignore")


def told_apart(places: Iterable[str]) -> dict[str, str]:
    """Each path or address with the fewest of its last names by which it differs from all others.

    >>> told_apart(["/a/set", "/b/set", "/b/other"])
    {'/a/set': 'a/set', '/b/set': 'b/set', '/b/other': 'other'}
    """
    names = {place: _without_options(place).rstrip("/").split("/") for place in places}

    def end(place: str, length: int) -> str:
        return "/".join(names[place][-length:])

    found: dict[str, str] = {}
    for place, parts in names.items():
        lengths = range(1, len(parts) + 1)
        alone = (n for n in lengths if all(end(other, n) != end(place, n) for other in names if other != place))
        found[place] = end(place, next(alone, len(parts)))
    return found


def is_same(one: str, other: str) -> bool:
    """Whether two names lead to one local file or folder."""
    try:
        return one == other or (not (is_uri(one) or is_uri(other)) and os.path.samefile(one, other))
    except OSError:
        return False
