"""A query or a passage in another language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from dagr_ray.core import tables
from dagr_ray.prompts import Passage
from dagr_ray.strategies._controls import Controls
from dagr_ray.strategies._rewriting import FewShot, Rewriting, one_line

NAMES = {"de": "German", "es": "Spanish", "fr": "French"}
_QUERIES: tuple[Mapping[str, str], ...] = (
    {
        "en": "overwrite existing file when renaming",
        "de": "vorhandene Datei beim Umbenennen überschreiben",
        "es": "sobrescribir un archivo existente al cambiar el nombre",
        "fr": "écraser un fichier existant en le renommant",
    },
    {
        "en": "how deep is lake baikal",
        "de": "wie tief ist der Baikalsee",
        "es": "qué profundidad tiene el lago Baikal",
        "fr": "quelle est la profondeur du lac Baïkal",
    },
    {
        "en": "refund for a cancelled train",
        "de": "Erstattung für einen ausgefallenen Zug",
        "es": "reembolso por un tren cancelado",
        "fr": "remboursement d'un train supprimé",
    },
)
_PASSAGES: tuple[Mapping[str, str], ...] = (
    {
        "en": "Lake Baikal in southern Siberia is the deepest lake in the world.",
        "de": "Der Baikalsee in Südsibirien ist der tiefste See der Welt.",
        "es": "El lago Baikal, en el sur de Siberia, es el lago más profundo del mundo.",
        "fr": "Le lac Baïkal, au sud de la Sibérie, est le lac le plus profond du monde.",
    },
    {
        "en": "If your train is cancelled, you can claim the full price of the ticket within 28 days.",
        "de": "Fällt Ihr Zug aus, können Sie innerhalb von 28 Tagen den vollen Fahrpreis zurückverlangen.",
        "es": "Si su tren se cancela, puede reclamar el precio completo del billete en un plazo de 28 días.",
        "fr": "Si votre train est supprimé, vous pouvez demander le prix total du billet sous 28 jours.",
    },
)


class _Translation(Rewriting):
    """Base of the translations into three languages; another language needs its own examples. The language is checked."""

    abstract: ClassVar[bool] = True
    language: Literal["de", "es", "fr"] = "de"
    task: str = "Each line in English is followed by its translation."

    def effective_controls(self) -> Controls:
        """The controls, with the target language if they name none."""
        return self.controls.model_copy(update={"language": self.controls.language or self.language})

    def _few_shot(self, lines: tuple[Mapping[str, str], ...]) -> FewShot:
        name = NAMES[self.language]
        shown = tuple({"English": line["en"], name: line[self.language]} for line in lines)
        return FewShot(("English",), name, shown, least_words=1)


class Translate(_Translation):
    """The query in ``language``: data for retrieval across languages (translated queries as in mMARCO, arXiv 2108.13897).

    >>> import random
    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="how long do bees live")
    >>> Translate().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['English: how long do bees live', 'German:']
    >>> Translate().parse(row, "wie lange leben Bienen").kept
    ['wie lange leben Bienen']
    >>> Translate().parse(row, "how long do bees live").rejected
    [('unchanged', 'how long do bees live')]
    """

    abstract: ClassVar[bool] = False
    changes_language: ClassVar[bool] = True

    def few_shot(self) -> FewShot:
        return self._few_shot(_QUERIES)

    def lines(self, row: Passage) -> tuple[str, ...]:
        return (one_line(row.query),)


class TranslatePassage(_Translation):
    """The passage in ``language``, a further positive of its query (mMARCO, arXiv 2108.13897).

    >>> import random
    >>> row = Passage("p1", "", "Bees of summer live for six weeks.", query="how long do bees live")
    >>> TranslatePassage().prompt(row, (), random.Random(0)).text.splitlines()[-2:]
    ['English: Bees of summer live for six weeks.', 'German:']
    >>> TranslatePassage().parse(row, "Sommerbienen leben sechs Wochen.").kept
    ['Sommerbienen leben sechs Wochen.']
    """

    abstract: ClassVar[bool] = False
    writes: ClassVar[str] = "passages"

    def few_shot(self) -> FewShot:
        return self._few_shot(_PASSAGES)

    def lines(self, row: Passage) -> tuple[str, ...]:
        return (one_line(tables.passage_text(row.title, row.text)),)
