r"""What reaches a person's terminal: every text goes through ``say``, which shows control characters and sends none.

Texts of corpora, models, stores and servers may hold sequences that a terminal obeys (set the clipboard, clear the
screen, write over a line) and marks that make a line read otherwise than it is. They are written as JSON writes them
(``\u001b``), so that what is printed as JSON stays JSON of the same value.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

# Controls (C0 without tab and line feed, DEL, C1), soft hyphen, marks of direction, of invisible operators and of
# annotation, zero width, line and paragraph separators, fillers, tags, variation selectors without an emoji or a CJK
# character, halves of surrogates, noncharacters. Sources: Unicode 16.0, UAX 9 (marks of direction), UTR 36 and UTS 55
# (source code spoofing), DerivedCoreProperties (Default_Ignorable_Code_Point); ECMA-48 for what terminals obey.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Scripts in which a joiner or a non-joiner after a letter is spelling: Arabic and Syriac to N'Ko, the scripts of India
# and of South-East Asia, Mongolian, and those of the supplementary plane that derive from them.
_JOINED = (
    "\u0600-\u08ff\u0900-\u109f\u1700-\u18af\u1a00-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
)
_EMOJI = "#*0-9\xa9\xae\u203c-\u3299\U0001f000-\U0001faff"
_CJK = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KEPT = re.compile(
    f"(?<=[{_JOINED}])[\u200c\u200d]"  # joiners: Persian, Hindi, Sinhala, ...
    f"|(?<=[{_EMOJI}\ufe0f])\u200d|(?<=[{_EMOJI}])[\ufe0e\ufe0f]"  # a family, a heart that is red
    "|(?<=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b(?=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"  # between words
    "|(?<=[\u1820-\u18aa])[\u180b-\u180f]"  # forms of Mongolian letters
    f"|(?<=[{_CJK}])[\ufe00-\ufe0f\U000e0100-\U000e01ef]"  # forms of CJK characters
)
_ANY = re.compile(f"[{_HIDDEN}]")
_SHOWN = re.compile(f"({_KEPT.pattern})|[{_HIDDEN}]")
CLEAR_LINE = "\r\x1b[2K"


def shown(text: object, lines: bool = True) -> str:
    r"""A text as it may be printed: what a terminal would obey, or a person could not see, is spelled out.

    Letters, marks and spaces of every script stay, and joiners where a script or an emoji is spelled with them. Tabs and
    line feeds stay unless ``lines`` is False, for what must be one line.

    >>> print(shown("\x1b[2J\r\u202egnp.exe"))
    \u001b[2J\r\u202egnp.exe
    >>> shown("می\u200cخواهم क्\u200dष") == "می\u200cخواهم क्\u200dष"
    True
    """
    found = str(text)
    if not lines:
        found = found.replace("\n", r"\n").replace("\t", r"\t")
    if (found.isascii() and found.isprintable()) or not _ANY.search(found):
        return found
    return _SHOWN.sub(lambda match: match[1] or _spelled(match[0]), found)


def _spelled(char: str) -> str:
    short = {"\b": r"\b", "\r": r"\r", "\f": r"\f"}.get(char)
    if short:
        return short
    units = char.encode("utf-16-be", "surrogatepass")  # one beyond U+FFFF is two of them in JSON
    return "".join(rf"\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def say(*texts: object, to: TextIO | None = None, end: str = "\n", over: bool = False) -> None:
    """Prints texts with spaces between them, to standard output or ``to``, at once. Nothing else of this package prints.

    ``over`` writes over the line where the cursor is, for progress on a terminal.
    """
    stream = to or sys.stdout
    text = shown(" ".join(map(str, texts))) + end
    encoding = getattr(stream, "encoding", None)
    if encoding and getattr(stream, "errors", "strict") == "strict":  # the command line's own streams have a better way
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    stream.write((CLEAR_LINE if over else "") + text)
    stream.flush()


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    from dagr_ray.core.config import packed  # not above: help is to be there at once

    text = json.dumps(packed(value), indent=1, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # signs of ours would be printed as others, which is no JSON of this value
        text = json.dumps(packed(value), indent=1)
    say(text)


def print_table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> None:
    """Prints rows below their head, in columns as wide as their widest cell."""
    cells = [list(head), *[[shown(cell, lines=False) for cell in row] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Shown(logging.Formatter):
    """Log records with nothing in them that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text."""
        return shown(super().format(record))


class Parser(argparse.ArgumentParser):
    """A parser whose messages, which quote what was typed, are printed by ``say``."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            say(message, to=file or sys.stderr, end="")
