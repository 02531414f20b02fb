"""People's data: addresses, telephone and account numbers in queries and passages."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pyarrow as pa
from pydantic import field_validator

from dagr_ray.core.config import ConfigError, Threshold
from dagr_ray.core.words import UNSPACED
from dagr_ray.filters import Candidate, Filter

Kind = Literal["email", "phone", "card", "iban", "national-id", "ip"]
# The order is part of the score: a kind's position is its bit. Add at the end, and raise the version.
KINDS: tuple[Kind, ...] = ("email", "card", "iban", "national-id", "ip", "phone")
# A letter or digit that what is looked for cannot begin or end beside; one of a script without spaces it can.
_BESIDE = rf"[^\W{UNSPACED}]"
_EMAIL = re.compile(
    rf"(?<!{_BESIDE})(?:(?:{_BESIDE}|[.+-]){{1,64}}|[{UNSPACED}.+-]{{1,64}})@((?:[\w-]{{1,63}}\.){{1,8}}[a-z]{{2,24}})(?!{_BESIDE})",
    re.IGNORECASE,
)
# Set aside for examples (RFC 2606): nobody's.
_RESERVED = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE)
_IP = re.compile(
    rf"(?<!{_BESIDE})(?<![.:])(?:\d{{1,3}}(?:\.\d{{1,3}}){{3}}|[0-9a-f]{{0,4}}(?::[0-9a-f]{{0,4}}){{3,7}})(?!{_BESIDE}|:|\.\d)",
    re.IGNORECASE,
)
_CARD = re.compile(rf"(?<!{_BESIDE})(?<![.-])\d(?:[ -]?\d){{12,18}}(?!{_BESIDE}|-)")
_IBAN = re.compile(rf"(?<!{_BESIDE})[A-Z]{{2}}\d{{2}}(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?(?!{_BESIDE})")
_NUMBER = re.compile(
    rf"(?<!{_BESIDE})(?<![.-])(?=[\w./ -]{{0,5}}\d)[A-Z0-9]{{2,16}}(?:[./ -][A-Z0-9]{{1,10}}){{0,5}}(?!{_BESIDE}|-)"
)
MIN_DIGITS = 5  # of a national id; 7 of a telephone number


class Found(NamedTuple):
    """Where in a text something of a kind stands."""

    start: int
    stop: int
    kind: Kind


class Pii(Filter):
    """Refuses queries that hold people's data, or masks them: e-mail and IP addresses, telephone, card, account and id numbers.

    The score has one bit for each of ``KINDS``, and with ``passages`` as many for the query's passage, so 0 is none of
    them; ``allow`` tolerates some. With ``mask``, a query is kept with "[email]" and the like in the place of what was
    found: it has a new text under its old id, and ``Select`` writes what was done into ``masked``. Only a query is masked
    there; passages are by the stage ``Mask``.

    Telephone numbers are judged by libphonenumber's rules of all countries (those without + by ``region``), cards, IBANs
    and the national ids of ``ids`` (modules of python-stdnum) by their check digits: most numbers are nobody's. Names of
    people are not looked for: a retriever is asked about people by their names. That models give back such data from
    their training is shown by Carlini et al. 2020 (arXiv 2012.07805).

    >>> texts = ["mail jane.doe@gmail.com about it", "call +44 20 7946 0958", "who is at 127.0.0.1", "order 4111 1111 1111 1111"]
    >>> rows = [Candidate(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> [Pii().keep(score) for score in Pii().score(rows, None)]
    ['email', 'phone', None, 'card']
    >>> Pii(mask=True).keep(1.0), Pii(mask=True).mend(texts[0], 1.0)
    (None, ('mail [email] about it', '1 email'))
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # beside letters of scripts without spaces
    rowwise: ClassVar[bool] = True
    region: str = "US"
    ids: tuple[str, ...] = ("us.ssn",)
    passages: bool = False
    mask: Annotated[bool, Threshold()] = False
    allow: Annotated[tuple[Kind, ...], Threshold()] = ()

    @field_validator("region")
    @classmethod
    def _known_region(cls, value: str) -> str:
        from phonenumbers import SUPPORTED_REGIONS

        if value not in SUPPORTED_REGIONS:
            raise ConfigError(f"pii: region = {value!r}; allowed: {', '.join(sorted(SUPPORTED_REGIONS))}")
        return value

    @field_validator("ids")
    @classmethod
    def _known_ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _checker(name)
        return value

    @property
    def needs_passage(self) -> bool:  # type: ignore[override]
        return self.passages

    def score(self, rows: Sequence[Candidate], search: pa.Table | None) -> list[float]:
        scores, passage, inside = [], None, 0
        for row in rows:
            if self.passages and row.passage != passage:  # queries of one passage mostly stand together
                passage, inside = row.passage, self._bits(row.passage)
            scores.append(float(self._bits(row.text) | inside << len(KINDS)))
        return scores

    def _bits(self, text: str) -> int:
        return sum(1 << KINDS.index(kind) for kind in {each.kind for each in self.find(text)})

    def keep(self, score: float) -> str | None:
        bits = int(score)
        refused = [kind for bit, kind in enumerate(KINDS) if bits >> bit & 1 and kind not in self.allow]
        inside = [kind for bit, kind in enumerate(KINDS, len(KINDS)) if bits >> bit & 1 and kind not in self.allow]
        if inside:
            return f"{inside[0]}-in-passage"
        return refused[0] if refused and not self.mask else None

    def mend(self, text: str, score: float) -> tuple[str, str] | None:
        """The text with each find in brackets by its kind, and how many of which there were."""
        if not self.mask or not int(score) & ((1 << len(KINDS)) - 1):
            return None
        return self.masked(text)

    def masked(self, text: str) -> tuple[str, str] | None:
        """A text without people's data, and what was taken out; None where nothing was found."""
        found = [each for each in self.find(text) if each.kind not in self.allow]
        if not found:
            return None
        parts, at = [], 0
        for each in found:
            parts += [text[at : each.start], f"[{each.kind}]"]
            at = each.stop
        counts = Counter(each.kind for each in found)
        return "".join([*parts, text[at:]]), ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))

    def find(self, text: str) -> list[Found]:
        """What is people's data in a text, in order and without overlap; of what overlaps, the kind that comes first."""
        taken: list[Found] = []
        for kind in KINDS:
            for start, stop in self._of_kind(kind, text):
                if all(stop <= other.start or start >= other.stop for other in taken):
                    taken.append(Found(start, stop, kind))
        return sorted(taken)

    def _of_kind(self, kind: Kind, text: str) -> Iterator[tuple[int, int]]:
        digits = sum(map(str.isdigit, text))
        if kind == "email" and "@" in text:
            yield from (m.span() for m in _EMAIL.finditer(text) if not _RESERVED.search(m[1]))
        elif kind == "card" and digits >= 13:
            yield from (m.span() for m in _CARD.finditer(text) if _checker("luhn")(re.sub("[ -]", "", m[0])))
        elif kind == "iban" and digits >= 8:
            yield from (m.span() for m in _IBAN.finditer(text) if _checker("iban")(m[0]))
        elif kind == "national-id" and digits >= MIN_DIGITS:
            yield from (m.span() for m in _NUMBER.finditer(text) if any(self._is_id(name, m[0]) for name in self.ids))
        elif kind == "ip" and (digits >= 4 or text.count(":") > 2):
            yield from (m.span() for m in _IP.finditer(text) if _public(m[0]))
        elif kind == "phone" and digits >= 7:
            from phonenumbers import Leniency, PhoneNumberMatcher

            for match in PhoneNumberMatcher(text, self.region, leniency=Leniency.VALID, max_tries=100):
                # ten digits in a row are as often a number of something else
                if not match.raw_string.isdigit():
                    yield match.start, match.end

    @staticmethod
    def _is_id(name: str, number: str) -> bool:
        # a number without a sign or letter passes one check digit in ten
        return not number.isdigit() and _checker(name)(number)


@lru_cache(maxsize=64)
def _checker(name: str) -> Callable[[str], bool]:
    """Whether a number is valid, by a module of python-stdnum. Raises ConfigError where there is none."""
    import importlib

    try:
        module: Any = importlib.import_module(f"stdnum.{name}")
        check: Callable[[str], bool] = module.is_valid
    except (ImportError, AttributeError):
        raise ConfigError(
            f"pii: ids: {name!r} is no module of python-stdnum; give such as us.ssn, gb.nhs, de.idnr or br.cpf"
        ) from None
    return check


def _public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False
