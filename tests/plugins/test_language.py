"""Which language a text is in: short texts in many languages, names and terms, text that tells nothing."""

import doctest

import pytest

from dagr_ray.core import language
from dagr_ray.core.language import language_of, likeness
from dagr_ray.filters import ScoredQuery
from dagr_ray.filters.language import Language

TEXTS = {
    "en": ("how do I copy a folder", "symptoms of a sprained ankle", "who discovered penicillin?"),
    "de": ("wie kopiere ich einen Ordner", "Symptome eines verstauchten Knöchels", "wer hat Penicillin entdeckt?"),
    "fr": ("comment copier un dossier", "symptômes d'une entorse de la cheville", "qui a découvert la pénicilline ?"),
    "es": ("cómo puedo copiar una carpeta", "síntomas de un esguince de tobillo", "¿quién descubrió la penicilina?"),
    "pl": ("jak skopiować folder z plikami", "objawy skręcenia kostki", "kto odkrył penicylinę?"),
    "tr": ("klasör nasıl kopyalanır", "ayak bileği burkulması belirtileri", "penisilini kim keşfetti?"),
    "ru": ("как скопировать папку с файлами", "симптомы растяжения лодыжки", "кто открыл пенициллин?"),
    "ja": ("フォルダをコピーする方法", "足首の捻挫の症状", "ペニシリンを発見したのは誰ですか"),
    "zh": ("如何复制文件夹", "脚踝扭伤的症状", "谁发现了青霉素?"),
    "ar": ("كيف أنسخ مجلدا", "أعراض التواء الكاحل", "من اكتشف البنسلين؟"),
}


def test_docstrings():
    assert doctest.testmod(language).failed == 0


@pytest.mark.parametrize("code", TEXTS)
def test_short_queries(code):
    """Every query passes as one of its own language; of the 27 others, one with a loan word may pass."""
    wanted = Language(language=code)
    passed = {}
    for other, texts in TEXTS.items():
        scores = wanted.score([ScoredQuery("q", text, "d", "") for text in texts], None)
        passed[other] = sum(wanted.keep(score) is None for score in scores)
    assert passed.pop(code) == 3
    assert sum(passed.values()) <= 1, passed


def test_language_of():
    found = [(code, language_of(text)) for code, texts in TEXTS.items() for text in texts]
    assert sum(code == guess for code, (guess, _) in found) >= 0.9 * len(found)
    assert all(0 < probability <= 1 for _, (_, probability) in found)
    assert language_of("") == language_of("3.14 ?!") == ("und", 0.0)
    assert likeness("", "en") == likeness("3.14 ?!", "en") == 1


def test_the_language_of_the_passage():
    german = "Der Eiffelturm in Paris ist 330 Meter hoch und war bis 1930 das höchste Bauwerk der Welt."
    english = "The Eiffel Tower in Paris is 330 metres tall and was the tallest structure in the world until 1930."
    rows = [
        ScoredQuery("q1", "wie hoch ist der Eiffelturm", "d1", german),
        ScoredQuery("q2", "how tall is the eiffel tower", "d1", german),
        ScoredQuery("q3", "how tall is the eiffel tower", "d2", english),
        ScoredQuery("q4", "how tall is the eiffel tower", "d3", "330 = 1930"),
    ]
    follows = Language(language="passage")
    assert [follows.keep(score) for score in follows.score(rows, None)] == [None, "language", None, None]


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'xx' is unknown; allowed: passage, "):
        Language(language="xx")
