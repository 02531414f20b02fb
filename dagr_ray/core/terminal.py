r"""Output for a terminal: every text is printed by ``say``, which shows control characters instead of sending them.

Texts from corpora, models, stores and servers may hold sequences that a terminal obeys (set the clipboard, clear the
screen, write over a line) and marks that make a line read differently. They are written as in JSON (``\u001b``), so that
printed JSON stays JSON of the same value.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

# C0 controls without tab and line feed, DEL, C1 controls, soft hyphen, direction marks, invisible operators, annotation
# marks, zero-width characters, line and paragraph separators, fillers, tags, variation selectors without an emoji or CJK
# character, surrogates, noncharacters. Sources: Unicode 16.0, UAX 9 (direction marks), UTR 36 and UTS 55
# (source code spoofing), DerivedCoreProperties (Default_Ignorable_Code_Point); ECMA-48 for terminal controls.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Scripts in which a joiner or non-joiner after a letter is part of the spelling: Arabic and Syriac to N'Ko, the scripts
# of India and of South-East Asia, Mongolian, and the scripts of the supplementary plane that derive from them.
_JOINED = (
    "\u0600-\u08ff\u0900-\u109f\u1700-\u18af\u1a00-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
)
_EMOJI = "#*0-9\xa9\xae\u203c-\u3299\U0001f000-\U0001faff"
_CJK = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KEPT = re.compile(
    f"(?<=[{_JOINED}])[\u200c\u200d]"  # joiners: Persian, Hindi, Sinhala, ...
    f"|(?<=[{_EMOJI}\ufe0f])\u200d|(?<=[{_EMOJI}])[\ufe0e\ufe0f]"  # a family, a red heart
    "|(?<=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b(?=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"  # between words
    "|(?<=[\u1820-\u18aa])[\u180b-\u180f]"  # forms of Mongolian letters
    f"|(?<=[{_CJK}])[\ufe00-\ufe0f\U000e0100-\U000e01ef]"  # forms of CJK characters
)
_ANY = re.compile(f"[{_HIDDEN}]")
_SHOWN = re.compile(f"({_KEPT.pattern})|[{_HIDDEN}]")
CLEAR_LINE = "\r\x1b[2K"


def shown(text: object, lines: bool = True) -> str:
    r"""A printable text: characters that a terminal obeys or that are invisible are spelled out.

    Letters, marks and spaces of every script stay, and so do joiners that belong to a script's or an emoji's spelling.
    Tabs and line feeds stay unless ``lines`` is False, which gives one line.

    >>> print(shown("\x1b[2J\r\u202egnp.exe"))
    \u001b[2J\r\u202egnp.exe
    >>> shown("می\u200cخواهم क्\u200dष") == "می\u200cخواهم क्\u200dष"
    True
    """
    plain = str(text)
    if not lines:
        plain = plain.replace("\n", r"\n").replace("\t", r"\t")
    if (plain.isascii() and plain.isprintable()) or not _ANY.search(plain):
        return plain
    return _SHOWN.sub(lambda match: match[1] or _spelled(match[0]), plain)


def _spelled(char: str) -> str:
    short = {"\b": r"\b", "\r": r"\r", "\f": r"\f"}.get(char)
    if short:
        return short
    units = char.encode("utf-16-be", "surrogatepass")  # JSON writes a character beyond U+FFFF as two units
    return "".join(rf"\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def say(*texts: object, to: TextIO | None = None, end: str = "\n", over: bool = False) -> None:
    """Prints texts separated by spaces, to standard output or ``to``, and flushes. Nothing else in this package prints.

    ``over`` overwrites the current line, for progress on a terminal.
    """
    stream = to or sys.stdout
    text = shown(" ".join(map(str, texts))) + end
    encoding = getattr(stream, "encoding", None)
    if (
        encoding and getattr(stream, "errors", "strict") == "strict"
    ):  # the command line's own streams escape by themselves
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    stream.write((CLEAR_LINE if over else "") + text)
    stream.flush()


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    from dagr_ray.core.config import packed  # imported here so that help is printed at once

    text = json.dumps(packed(value), indent=1, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # replaced characters would be JSON of another value
        text = json.dumps(packed(value), indent=1)
    say(text)


def print_table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Prints rows below a header, in aligned columns."""
    cells = [list(head), *[[shown(cell, lines=False) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class EscapingFormatter(logging.Formatter):
    """Formats log records and escapes what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's escaped text."""
        return shown(super().format(record))


class Parser(argparse.ArgumentParser):
    """A parser that prints its messages, which quote the user's input, by ``say``."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message, to=file or sys.stderr, end="")
