"""Lucene's analyzers for BM25: one for each language, by ISO 639-1 code."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from dagr_ray.core.config import ConfigError
from dagr_ray.core.language import UNDETERMINED, base_language, languages
from dagr_ray.core.words import searchable, spaced

AUTO, ENGLISH = "auto", "en"
_LUCENE = "org.apache.lucene.analysis"
# Analyzers with their own stop words and stemmer; for Chinese and Korean with pairs of letters; for Japanese and
# Ukrainian with a dictionary. Polish is stemmed by a dictionary and keeps its stop words.
_CLASSES = {
    code: f"{_LUCENE}.{code}.{name}Analyzer"
    for code, name in (
        pair.split(":")
        for pair in """
        ar:Arabic bg:Bulgarian bn:Bengali ca:Catalan ckb:Sorani da:Danish de:German el:Greek es:Spanish et:Estonian eu:Basque
        fa:Persian fi:Finnish fr:French ga:Irish gl:Galician hi:Hindi hu:Hungarian hy:Armenian id:Indonesian it:Italian
        ja:Japanese lt:Lithuanian lv:Latvian ne:Nepali nl:Dutch no:Norwegian pt:Portuguese ro:Romanian ru:Russian
        sr:Serbian sv:Swedish ta:Tamil te:Telugu tr:Turkish uk:UkrainianMorfologik
        """.split()
    )
} | {
    "cs": f"{_LUCENE}.cz.CzechAnalyzer",
    "ko": f"{_LUCENE}.cjk.CJKAnalyzer",
    "pl": f"{_LUCENE}.morfologik.MorfologikAnalyzer",
    "zh": f"{_LUCENE}.cjk.CJKAnalyzer",
}
_STANDARD = f"{_LUCENE}.standard.StandardAnalyzer"
# Languages whose vowel points are removed: most people type without them, and they are not part of the spelling.
_POINTED = ("he", "yi")


class Analyzer(NamedTuple):
    """Splits passages and queries into the words that BM25 counts. ``java`` is the class; None for Anserini's English."""

    language: str
    java: str | None

    @property
    def description(self) -> str:
        """A description for people.

        >>> Analyzer("en", None).description
        'English words, Porter stems, without stop words'
        """
        if self.java is None:
            return "English words, Porter stems, without stop words"
        if self.java != _STANDARD:
            return f"Lucene's {self.java.rpartition('.')[2]}"
        return "words by Unicode's rules and ICU's dictionaries, as they are written"

    def preprocess(self, text: str) -> str:
        """The text for Lucene: one spelling for equal texts, and spaces between words of scripts without spaces."""
        if text.isascii():
            return text
        text = searchable(text)
        if self.language in _POINTED:
            text = "".join(c for c in text if not 0x591 <= ord(c) <= 0x5C7 or unicodedata.category(c) != "Mn")
        return spaced(text) if self.java == _STANDARD else text


def analyzer(language: str) -> Analyzer:
    """The analyzer for a language; if Lucene has none for it, an analyzer that only splits words.

    >>> analyzer("th").description, analyzer("fr").description
    ("words by Unicode's rules and ICU's dictionaries, as they are written", "Lucene's FrenchAnalyzer")
    """
    return Analyzer(language, None if language == ENGLISH else _CLASSES.get(language, _STANDARD))


def canonical_code(language: str) -> str:
    """The code of a language without its region. Raises ConfigError for an unknown code.

    >>> canonical_code("pt-BR"), canonical_code("nb"), canonical_code("auto")
    ('pt', 'no', 'auto')
    """
    code = base_language(language)
    if code not in (AUTO, ENGLISH, UNDETERMINED) and code not in _CLASSES and code not in languages():
        raise ConfigError(
            f"language = {language!r} is not a known ISO 639 code; give {AUTO}, {ENGLISH}, "
            f"{', '.join(sorted({*_CLASSES, *languages()} - {ENGLISH}))}, or {UNDETERMINED} for several languages"
        )
    return code
