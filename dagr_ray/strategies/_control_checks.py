"""Checks that a generated text has the attributes that its strategy's controls require."""

from __future__ import annotations

import re

from dagr_ray.core.language import language_of, likeness
from dagr_ray.core.words import words
from dagr_ray.strategies import Strategy
from dagr_ray.strategies._controls import Controls
from dagr_ray.strategies._one_query import OneQuery

# A text below this is in another language. The default threshold of the filter on languages.
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


def controls_of(strategy: Strategy) -> Controls | None:
    """The controls that a strategy's texts must satisfy; None if it sets none."""
    controls = strategy.effective_controls() if isinstance(strategy, OneQuery) else getattr(strategy, "controls", None)
    return controls if controls is not None and controls.any_set() else None


def first_violation(controls: Controls, text: str) -> tuple[str, str] | None:
    """The first attribute that a text misses, and its measured value; None if the text has all required attributes.

    A query is broad up to three content words and specific from four: queries grow with how narrow a need is (Phan,
    Bailey and Wilkinson, SIGIR 2007).

    >>> first_violation(Controls(language="de", length=(3, 8)), "wie kopiere ich einen Ordner") is None
    True
    >>> first_violation(Controls(language="de"), "how do I copy a folder with everything in it")
    ('language', 'en')
    >>> first_violation(Controls(length=(3, 8)), "copy folder")
    ('length', '2 words')
    >>> first_violation(Controls(formality="formal"), "how can't I copy this")
    ('formality', "can't")
    """
    code = controls.code()
    if code is not None and likeness(text, code) < LEAST_LIKENESS:
        return "language", language_of(text)[0]
    text_words = words(text)
    if controls.length is not None and not controls.length[0] <= len(text_words) <= controls.length[1]:
        return "length", f"{len(text_words)} words"
    if controls.formality is not None:
        mark = _CASUAL.search(text)
        if (mark is None) == (controls.formality == "casual"):
            return "formality", mark.group() if mark else "no mark of casual language"
    if controls.specificity is not None:
        content = [word for word in text_words if word.casefold() not in _FUNCTION_WORDS]
        if (len(content) >= 4) != (controls.specificity == "specific"):
            return "specificity", f"{len(content)} content words"
    return None
