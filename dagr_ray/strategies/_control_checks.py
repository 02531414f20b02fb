"""Whether a written text is what ``strategies.controls`` asked for."""

from __future__ import annotations

import re

from dagr_ray.core.language import language_of, likeness
from dagr_ray.core.words import words
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._controls import Controls
from dagr_ray.strategies._written import Written

# Under it a text counts as in another language: the threshold of the filter on languages.
LEAST_LIKENESS = 0.1
# Marks of involved, spoken language (Biber 1988, "Variation across Speech and Writing", dimension 1) and of chats.
_CASUAL = re.compile(
    r"\b(?:\w+n['’]t|\w+['’](?:ll|re|ve|d|m)|(?:it|that|what|how|who|there|here|where|he|she)['’]s|let['’]s"
    r"|i|me|my|mine|we|our|us|im|ive|dont|doesnt|cant|wont|isnt|whats|hows"
    r"|gonna|wanna|gotta|kinda|sorta|dunno|lemme|gimme|yeah|yep|nope|hey|hi|ok|okay|btw|pls|plz|thx|lol|omg|idk|tbh"
    r"|stuff|guys|cool|awesome|crap|u|ur|cuz)\b|!|\?\?|\.\.\.|[\U0001F300-\U0001FAFF]",
    re.IGNORECASE,
)
_FUNCTION_WORDS = frozenset(
    """
    d don ll m re s t ve
    a about an and any are as at be been by can could did do does for from get had has have how i if in into is it
    its like me much my of off on one or our out over should so some than that the their them then there these they
    this those to under up was way we were what when where which while who whose why will with without would you your
    """.split()
)


def controlled(strategy: Strategy) -> Controls | None:
    """What a strategy asks its texts to be like; None where it does not care."""
    controls = strategy.checked() if isinstance(strategy, Written) else getattr(strategy, "controls", None)
    return controls if controls is not None and controls.given() else None


def missed(controls: Controls, text: str) -> tuple[str, str] | None:
    """The first attribute that a text misses, and what was measured; None where it has all that was asked for.

    A query is broad up to three content words and specific from four: queries grow with how narrow a need is (Phan,
    Bailey and Wilkinson, SIGIR 2007).

    >>> missed(Controls(language="de", length=(3, 8)), "wie kopiere ich einen Ordner") is None
    True
    >>> missed(Controls(language="de"), "how do I copy a folder with everything in it")
    ('language', 'en')
    >>> missed(Controls(length=(3, 8)), "copy folder"), missed(Controls(formality="formal"), "how can't I copy this")
    (('length', '2 words'), ('formality', "can't"))
    """
    code = controls.code()
    if code is not None and likeness(text, code) < LEAST_LIKENESS:
        return "language", language_of(text)[0]
    said = words(text)
    if controls.length is not None and not controls.length[0] <= len(said) <= controls.length[1]:
        return "length", f"{len(said)} words"
    if controls.formality is not None:
        mark = _CASUAL.search(text)
        if (mark is None) == (controls.formality == "casual"):
            return "formality", mark.group() if mark else "no mark of casual language"
    if controls.specificity is not None:
        content = [word for word in said if word.casefold() not in _FUNCTION_WORDS]
        if (len(content) >= 4) != (controls.specificity == "specific"):
            return "specificity", f"{len(content)} content words"
    return None
