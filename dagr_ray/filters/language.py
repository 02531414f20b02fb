"""The language of a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyarrow as pa
from pydantic import Field, field_validator

from dagr_ray.core.config import ConfigError, Threshold
from dagr_ray.core.language import UNDETERMINED, language_of, languages, likeness
from dagr_ray.filters import Filter, ScoredQuery

PASSAGE = "passage"  # instead of a code: the language of the source passage


class Language(Filter):
    """Rejects queries in another language than ``language``: an ISO 639 code, or "passage" for the passage's language.

    The score is ``likeness``: the probability of the wanted language divided by the probability of the most likely one
    (langid.py, Lui and Baldwin 2012; probabilities by py3langid, trained on 139 languages). Comparing with the most
    likely language only would reject names and terms. The default rejects none of 4,318 English queries of six
    collections (SciFact to MedQuAD), and accepts 1.6 % of 4,126 lines of 3 to 12 words in 28 other languages (Django's
    translations). Similar languages such as Danish and Norwegian are separated less well. The loss of multilingual
    retrieval if query and passage differ in language: Asai et al. 2021, arXiv 2010.11856.

    >>> texts = ["how do I copy a folder", "wie kopiere ich einen Ordner", "42"]
    >>> scores = Language().score([ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)], None)
    >>> [Language().keep(score) for score in scores]
    [None, 'language', None]
    """

    abstract: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    language: str = "en"
    min_likeness: Annotated[float, Field(ge=0, le=1), Threshold()] = 0.1

    @field_validator("language")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != PASSAGE and value != "en" and value not in languages():
            raise ConfigError(f"language = {value!r} is unknown; allowed: {PASSAGE}, {', '.join(languages())}")
        return value

    @property
    def needs_passage(self) -> bool:  # type: ignore[override]
        return self.language == PASSAGE

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        scores, passage, wanted = [], None, self.language
        for row in rows:
            if self.language == PASSAGE and row.passage != passage:  # queries of one passage are mostly adjacent
                passage, wanted = row.passage, language_of(row.passage)[0]
            scores.append(1.0 if wanted == UNDETERMINED else likeness(row.text, wanted))
        return scores

    def keep(self, score: float) -> str | None:
        return "language" if score < self.min_likeness else None
