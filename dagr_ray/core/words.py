"""Words and sentences in any script, for everything that counts, compares or cuts text.

A word is a run of letters, digits and underscores with their marks (UAX 29, rule WB4): vowel signs, points, harakat,
accents. Scripts written without spaces have no such runs; there, ICU's dictionaries find the words (Thai, Lao, Khmer,
Burmese, Chinese, Japanese). They need no model and take 0.1 µs a letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

# Thai, Lao, Tibetan, Burmese, Tai scripts, Khmer, kana, Han: written without spaces. U+1361 separates Ethiopic words.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1361\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U000323af"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSPACED = re.compile(f"[{UNSPACED}]")
_RUN = re.compile(f"(?:[{UNSPACED}][\u0300-\u036f\u3099\u309a]*)+")
_SYLLABIC = re.compile(f"[{UNSPACED}\u1200-\u137f\uac00-\ud7a3]")
# Format characters belong to the word around them (UAX 29, WB4), and so do the Armenian signs that stand inside a word
# instead of after the sentence. U+200B is a space without width and no part of a word.
_FORMAT = "\u00ad\u061c\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
_ARMENIAN = "\u055a-\u055f"
# Invisible characters that occur in words and that Unicode's NFKC_Casefold removes.
_UNSEEN = re.compile(f"[{_FORMAT}{_ARMENIAN}\u034f\u115f\u1160\u180b-\u180f\u3164\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_LETTERS = re.compile(r"\w+")
# Neither Latin, Greek, Cyrillic nor a sign: words without these characters need no check for marks.
_ODD = re.compile(
    "[^\u0000-\u00ac\u00ae-\u02ff\u0370-\u0482\u048a-\u0530\u1e00-\u200a\u2010-\u2027\u202f-\u205f\u2070-\u20cf\u2100-\u2bff]"
)
_TOKEN = re.compile(r"\w+(?:[.,]\d+)*|[^\w\s]")
_PLAIN = re.compile(r"\w+", re.ASCII)
# One sign that can be typed as two, also in another order: sara am and sara ae of Thai, and the same of Lao.
_VARIANTS = (
    (re.compile("\u0e4d([\u0e48-\u0e4b]?)\u0e32"), "\\1\u0e33"),
    (re.compile("\u0ecd([\u0ec8-\u0ecb]?)\u0eb2"), "\\1\u0eb3"),
    (re.compile("\u0e40\u0e40"), "\u0e41"),
    (re.compile("\u0ec0\u0ec0"), "\u0ec1"),
)
_THAI_LAO = re.compile("[\u0e40\u0e4d\u0ec0\u0ecd]")


def words(text: str) -> list[str]:
    """The words of a text, without signs and spaces, in Unicode's composed form (NFC).

    >>> words("Copy a file: shutil.copy(src, dst)")
    ['Copy', 'a', 'file', 'shutil', 'copy', 'src', 'dst']
    >>> words("तीर और तारा।"), words("ข้าวหอมมะลิ"), words("蜂蜜和蜜蜂")
    (['तीर', 'और', 'तारा'], ['ข้าว', 'หอม', 'มะลิ'], ['蜂蜜', '和', '蜜蜂'])
    """
    if text.isascii():
        return _PLAIN.findall(text)
    text = unicodedata.normalize("NFC", text)
    if _ODD.search(text) is None:
        return _LETTERS.findall(text)
    text = _composed(text)
    runs: list[str] = _word().findall(text)
    if _UNSPACED.search(text) is None:
        return runs
    return [word for run in runs for word in _segments(run) if _word().match(word)]


def folded(text: str) -> list[str]:
    """The words of a text in the form for comparison: without differences of case, width or invisible characters.

    Unicode's NFKC_Casefold; also, a dotted capital I becomes i. Marks stay: they distinguish words.

    >>> folded("Straße CAFE\u0301 ＡＢＣ"), folded("קָמָץ") == folded("קמץ")
    (['strasse', 'café', 'abc'], False)
    """
    if text.isascii():
        return _PLAIN.findall(text.lower())
    text = unicodedata.normalize("NFKC", text).casefold()
    if _ODD.search(text) is None:
        return _LETTERS.findall(text)
    return words(_UNSEEN.sub("", text.replace("i\u0307", "i")))


def tokens(text: str) -> list[str]:
    """The words and signs of a text; a number keeps its points and commas.

    >>> tokens("Lake Baikal is 1,642 metres deep.")
    ['Lake', 'Baikal', 'is', '1,642', 'metres', 'deep', '.']
    >>> tokens("เธอกินข้าว!")
    ['เธอ', 'กิน', 'ข้าว', '!']
    """
    if text.isascii():
        return _TOKEN.findall(text)
    text = _composed(text)
    runs = [match.group() for match in re.finditer(rf"{_word().pattern}(?:[.,]\d+)*|[^\w\s]", text)]
    return [token for run in runs for token in _segments(run)]


def characters(text: str) -> list[str]:
    """The characters of a text as people see them (UAX 29, grapheme clusters): a letter keeps its marks.

    >>> characters("añ"), characters("हिन्दी"), characters("กำ")
    (['a', 'ñ'], ['हि', 'न्दी'], ['กำ'])
    """
    if text.isascii():
        return list(text)
    from icu4py.breakers import CharacterBreaker

    clusters: list[str] = []
    for cluster in CharacterBreaker(text, "en"):
        if clusters and unicodedata.category(cluster[0])[0] == "M":  # Burmese vowels, which Unicode separates
            clusters[-1] += cluster
        else:
            clusters.append(cluster)
    return clusters


def pieces(text: str) -> list[str]:
    """A text as words, each with the signs and the space after it; joined, they are the text with white space folded.

    A text with spaces is split at them: "re-use (of) it" has three pieces. Other texts are split at words.

    >>> pieces("Copy  a file.")
    ['Copy ', 'a ', 'file.']
    >>> pieces("今天，天气好。"), "".join(pieces("ข้าวหอมมะลิ  ดี"))
    (['今天，', '天气', '好。'], 'ข้าวหอมมะลิ ดี')
    """
    parts = text.split()
    if not unspaced(text):
        return [*(f"{part} " for part in parts[:-1]), *parts[-1:]]
    pieces_of_parts = [list(_with_signs(part)) if _UNSPACED.search(part) else [part] for part in parts]
    for part_pieces in pieces_of_parts[:-1]:
        part_pieces[-1] += " "
    return [piece for part_pieces in pieces_of_parts for piece in part_pieces]


def word_count(text: str) -> int:
    """The number of ``pieces`` of a text.

    >>> word_count("Copy  a file."), word_count("今天，天气好。")
    (3, 3)
    """
    return len(text.split()) if text.isascii() or not _UNSPACED.search(text) else len(pieces(text))


def first_words(text: str, n: int) -> str:
    """The first ``n`` pieces of a text, with white space folded.

    >>> first_words("Copy  a file.", 2), first_words("今天，天气好。", 2)
    ('Copy a', '今天，天气')
    """
    return "".join(pieces(text)[:n]).rstrip()


def searchable(text: str) -> str:
    """A text in normal form (NFC), without invisible characters.

    >>> searchable("cafe\u0301") == "café"
    True
    """
    return text if text.isascii() else _UNSEEN.sub("", _composed(text))


def wording(text: str) -> str:
    """The form in which two texts with the same words and signs are equal: case, spacing and spelling are normalised.

    >>> wording("Cafe\u0301  du Nord") == wording("CAFÉ du nord")
    True
    """
    return " ".join(searchable(text).casefold().split())


def spaced(text: str) -> str:
    """A text with spaces between the words of scripts that have none.

    >>> spaced("ข้าวหอมมะลิ rice")
    'ข้าว หอม มะลิ rice'
    """
    return _RUN.sub(lambda run: " ".join(_broken(run.group())), text) if unspaced(text) else text


def long(word: str) -> bool:
    """Whether a word is long enough to name something: over three ASCII letters, over two others, over one syllable sign.

    >>> [word for word in ("copy", "the", "蜂蜜", "和", "서울", "слова") if long(word)]
    ['copy', '蜂蜜', '서울', 'слова']
    """
    if len(word) == 2:
        return not word.isascii() and _SYLLABIC.search(word) is not None
    return len(word) > (3 if word.isascii() else 2)


def unspaced(text: str) -> bool:
    """Whether a text has letters of a script that is written without spaces."""
    return not text.isascii() and _UNSPACED.search(text) is not None


# A sentence ends at . ! ? before a space that no lower-case letter follows, at the stops of other scripts (Unicode's
# property Sentence_Terminal, with the Tibetan shad and without the Burmese comma), at a Greek question mark, and at the
# end of a paragraph; ! and ? also end one without a space. The signs come first in the patterns, because searching for a
# set of characters is fast and searching for a lookahead is not.
_STOPS = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u0f0d\u0f0e\u104b\u1362\u1367\u1368"
    "\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1c3b\u1c3c\u1c7e\u1c7f"
    "\u203c\u203d\u2047-\u2049\u2e2e\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"
    "\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)
_CLOSERS = "\"')\\]’”»›」』）】》〉］"
_AT_ASCII = r"(?<=[.!?])[\"')\]]*\s+(?![a-z])|(?<=\n)\s*\n"
_ASCII_END = re.compile(rf"[.!?\n](?:{_AT_ASCII}|(?<=[!?]))")
_STOP = re.compile(f"[{_STOPS}]")
_END = re.compile(
    rf"[.!?\n;\u037e{_STOPS}](?:{_AT_ASCII}"
    rf"|(?<=[{_STOPS}])(?<!\uff0e(?=[0-9\uff10-\uff19]))[.!?{_STOPS}]*[{_CLOSERS}]*"
    r"|(?<=[\u0370-\u03ff\u1f00-\u1fff][;\u037e])(?!\S)|(?<=[!?]))"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, unchanged; white space around them may be missing.

    >>> sentences("Copy a file. Links are followed, e.g. on macOS.")
    ['Copy a file.', 'Links are followed, e.g. on macOS.']
    >>> [len(sentences(text)) for text in ("यह है। वह है।", "هل هذا صحيح؟ نعم.", "元気？はい！", "Τι είναι; Ναι.")]
    [2, 2, 2, 2]
    """
    parts, start = [], 0
    for end in (_END if _stops(text) else _ASCII_END).finditer(text):
        at, stop = end.span()
        sign = text[at]
        foreign = sign in ".!?" and at + 1 < stop < len(text) and not text[at - 1].isascii()
        if foreign and text[stop].title() != text[stop] and not text[stop - 2].isspace():
            # a lower-case letter outside a to z continues the sentence (т. е.), but not after an English one. Georgian
            # letters have no title case: a sentence begins with lower case there.
            continue
        parts.append(text[start:at] if sign == "\n" else text[start : at + 1] if sign in ".!?" else text[start:stop])
        start = stop
    parts.append(text[start:])
    return [sentence for sentence in parts if sentence and not sentence.isspace()]


def _stops(text: str) -> bool:
    """Whether a text may contain sentence ends other than . ! and ?"""
    return not text.isascii() and (";" in text or "\u037e" in text or _STOP.search(text) is not None)


def _composed(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    if _THAI_LAO.search(text):
        for typed, meant in _VARIANTS:
            text = typed.sub(meant, text)
    return text


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    """A run of letters and their marks. Python's \\w excludes marks, and its `re` has no class for them."""
    marks, since = "", None
    for code in range(0x300, 0x1EF00):
        if unicodedata.category(chr(code))[0] == "M":
            since = code if since is None else since
        elif since is not None:
            marks, since = f"{marks}{chr(since)}-{chr(code - 1)}", None
    return re.compile(f"\\w[\\w{marks}\U000e0100-\U000e01ef{_FORMAT}{_ARMENIAN}]*")


@lru_cache(maxsize=1)
def _breaker() -> Any:
    from icu4py.breakers import WordBreaker

    return WordBreaker


def _broken(text: str) -> Iterator[str]:
    """The text between the boundaries of its words. ICU takes no lone surrogate, which a model may write."""
    start = 0
    for segment in _breaker()(_SURROGATE.sub("\ufffd", text), "en"):
        yield text[start : start + len(segment)]
        start += len(segment)


def _segments(run: str) -> Iterator[str]:
    return _broken(run) if _UNSPACED.search(run) else iter((run,))


def _with_signs(part: str) -> Iterator[str]:
    """The words of a part without spaces, each with the signs after it; an opening sign goes to the word after it."""
    piece, has_word = "", False
    for segment in _broken(part):
        is_word = _word().match(segment) is not None
        opens = not is_word and unicodedata.category(segment[0]) in ("Ps", "Pi")
        if has_word and (is_word or opens):
            yield piece
            piece, has_word = "", False
        piece, has_word = piece + segment, has_word or is_word
    if piece:
        yield piece
