"""Attributes that a generated query must have: language, length, register (formality) and specificity."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dagr_ray.core.config import Config, ConfigError

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew",
    "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay", "nl": "Dutch", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
# The forms of 31 December 2025, of a four-digit number with a half, and of prices: the patterns of Unicode CLDR.
LOCALES = {
    "ar-EG": "Egypt: dates as 31/12/2025, Egyptian pounds",
    "cs-CZ": "Czechia: 1 234,5, dates as 31. 12. 2025, koruna",
    "da-DK": "Denmark: 1.234,5, dates as 31.12.2025, kroner",
    "de-AT": "Austria: 1 234,5, dates as 31.12.2025, euros, Austrian words",
    "de-CH": "Switzerland: 1’234.5, dates as 31.12.2025, francs, ss in place of ß",
    "de-DE": "Germany: 1.234,5, dates as 31.12.2025, euros",
    "en-AU": "Australia: British spelling, dates as 31/12/2025, Australian dollars, metric units",
    "en-CA": "Canada: Canadian spelling, dates as 2025-12-31, Canadian dollars, metric units",
    "en-GB": "the United Kingdom: British spelling, dates as 31/12/2025, pounds",
    "en-IN": "India: British spelling, 1,00,000 for a lakh, dates as 31/12/2025, rupees",
    "en-US": "the United States: American spelling, dates as 12/31/2025, dollars, feet and pounds",
    "es-ES": "Spain: 1234,5, dates as 31/12/2025, euros",
    "es-MX": "Mexico: 1,234.5, dates as 31/12/2025, pesos",
    "fr-CA": "Canada: 1 234,5, dates as 2025-12-31, dollars, words of Quebec",
    "fr-FR": "France: 1 234,5, dates as 31/12/2025, euros",
    "hi-IN": "India: 1,00,000 for a lakh, dates as 31/12/2025, rupees",
    "it-IT": "Italy: 1.234,5, dates as 31/12/2025, euros",
    "ja-JP": "Japan: dates as 2025/12/31, yen",
    "ko-KR": "Korea: dates as 2025. 12. 31., won",
    "nl-NL": "the Netherlands: 1.234,5, dates as 31-12-2025, euros",
    "pl-PL": "Poland: 1 234,5, dates as 31.12.2025, zlotys",
    "pt-BR": "Brazil: 1.234,5, dates as 31/12/2025, reais",
    "pt-PT": "Portugal: 1234,5, dates as 31/12/2025, euros",
    "ru-RU": "Russia: 1 234,5, dates as 31.12.2025, roubles",
    "sv-SE": "Sweden: 1 234,5, dates as 2025-12-31, kronor",
    "tr-TR": "Türkiye: 1.234,5, dates as 31.12.2025, lira",
    "zh-CN": "mainland China: simplified characters, dates as 2025/12/31, yuan",
    "zh-TW": "Taiwan: traditional characters, dates as 2025/12/31, New Taiwan dollars",
}
_FORMALITY = {"formal": "formal language", "casual": "casual language, as in a chat"}
_SPECIFICITY = {"broad": "broad, a few words on the topic", "specific": "specific, with details"}
Count = Annotated[int, Field(ge=1)]


class Controls(Config):
    """Attributes that a strategy requires besides its task. Every answer is checked (``_control_checks``).

    ``language`` is a BCP-47 tag: a language ("de"), or a locale ("de-CH") whose conventions the prompt names. Only the
    language is checked. ``length`` is (least, most) words, as the filters count them. ``formality`` is the register
    (pydantic reserves that word); it can be measured in English only.

    >>> Controls(language="de-CH", length=(3, 8)).requirement()
    'in German as in Switzerland: 1’234.5, dates as 31.12.2025, francs, ss in place of ß; 3 to 8 words'
    >>> Controls().requirement()
    ''
    """

    abstract: ClassVar[bool] = True  # not a plugin: a value inside strategies
    check_version: ClassVar[int] = 2  # counts words of any script
    language: str | None = None
    length: tuple[Count, Count] | None = None
    formality: Literal["formal", "casual"] | None = None
    specificity: Literal["broad", "specific"] | None = None

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None or value in LANGUAGES or value in LOCALES:
            return value
        code = value.split("-")[0]
        allowed = [code, *(tag for tag in LOCALES if tag.startswith(f"{code}-"))] if code in LANGUAGES else LANGUAGES
        raise ConfigError(f"allowed are {', '.join(allowed)}, and locales such as de-CH")

    @model_validator(mode="after")
    def _can_be_checked(self) -> Controls:
        if self.length is not None and self.length[0] > self.length[1]:
            raise ConfigError(f"controls: length = {self.length}: the minimum is over the maximum; swap them")
        if self.formality is not None and self.code() not in (None, "en"):
            raise ConfigError(
                f"controls: formality = {self.formality!r} can be measured in English only, not in {self.language!r}; "
                "remove formality or language"
            )
        if self.specificity == "specific" and self.length is not None and self.length[1] < 4:
            raise ConfigError(
                f"controls: length = {self.length} allows under 4 words, but a specific query has 4 or more; raise it"
            )
        return self

    def code(self) -> str | None:
        """The ISO 639 code of the language."""
        return None if self.language is None else self.language.split("-")[0]

    def any_set(self) -> bool:
        """Whether any attribute is required."""
        return (self.language or self.length or self.formality or self.specificity) is not None

    def requirement(self) -> str:
        """The required attributes in words, for the prompt; empty if none is set."""
        parts = []
        if self.language is not None:
            region = LOCALES.get(self.language)
            parts.append(f"in {LANGUAGES[self.language.split('-')[0]]}" + (f" as in {region}" if region else ""))
        if self.length is not None:
            parts.append(f"{self.length[0]} to {self.length[1]} words")
        parts += [_FORMALITY[self.formality]] if self.formality else []
        parts += [_SPECIFICITY[self.specificity]] if self.specificity else []
        return "; ".join(parts)

    def prompt_line(self) -> str:
        """``requirement`` as a prompt line, placed between the passage and the label of the answer."""
        requirement = self.requirement()
        return f"\nWanted: {requirement}" if requirement else ""

    def identity(self) -> dict[str, Any]:
        """The controls that are set."""
        return {name: value for name, value in super().identity().items() if value is not None}
