"""Personal data in queries and passages: e-mail addresses, telephone and account numbers."""

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
from dagr_ray.filters import Filter, ScoredQuery

Kind = Literal["email", "phone", "card", "iban", "national-id", "ip"]
# The order is part of the score: a kind's position is its bit. Add at the end, and raise the version.
KINDS: tuple[Kind, ...] = ("email", "card", "iban", "national-id", "ip", "phone")
# A match must not touch such a letter or digit. Letters of scripts without spaces may touch it.
_BESIDE = rf"[^\W{UNSPACED}]"
_EMAIL = re.compile(
    rf"(?<!{_BESIDE})(?:(?:{_BESIDE}|[.+-]){{1,64}}|[{UNSPACED}.+-]{{1,64}})@((?:[\w-]{{1,63}}\.){{1,8}}[a-z]{{2,24}})(?!{_BESIDE})",
    re.IGNORECASE,
)
# Domains reserved for examples (RFC 2606).
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
MIN_DIGITS = 5  # of a national id; a telephone number has at least 7


class Span(NamedTuple):
    """The position of personal data of one kind in a text."""

    start: int
    stop: int
    kind: Kind


class Pii(Filter):
    """Rejects or masks queries with personal data: e-mail and IP addresses, telephone, card, account and id numbers.

    The score has one bit for each of ``KINDS``; with ``passages`` it has as many again for the query's passage. 0 means
    no personal data. Kinds in ``allow`` are tolerated. With ``mask``, a query is kept and its personal data replaced by
    "[email]" and similar: it keeps its id, and ``Select`` records the change in ``masked``. This filter masks queries
    only; the stage ``Mask`` masks passages.

    libphonenumber validates telephone numbers by the rules of all countries (numbers without + by ``region``). Check
    digits validate cards, IBANs and the national ids in ``ids`` (modules of python-stdnum), because most numbers are not
    personal data. Names of people are not masked, because people search for others by name. Carlini et al. 2020 (arXiv
    2012.07805) show that models reproduce such data from their training.

    >>> texts = ["mail jane.doe@gmail.com about it", "call +44 20 7946 0958", "who is at 127.0.0.1", "order 4111 1111 1111 1111"]
    >>> rows = [ScoredQuery(str(i), text, "d1", "") for i, text in enumerate(texts)]
    >>> [Pii().keep(score) for score in Pii().score(rows, None)]
    ['email', 'phone', None, 'card']
    >>> Pii(mask=True).keep(1.0), Pii(mask=True).rewrite(texts[0], 1.0)
    (None, ('mail [email] about it', '1 email'))
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # also matches beside letters of scripts without spaces
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

    def score(self, rows: Sequence[ScoredQuery], search: pa.Table | None) -> list[float]:
        scores, passage, passage_bits = [], None, 0
        for row in rows:
            if self.passages and row.passage != passage:  # queries of one passage are mostly adjacent
                passage, passage_bits = row.passage, self._bits(row.passage)
            scores.append(float(self._bits(row.text) | passage_bits << len(KINDS)))
        return scores

    def _bits(self, text: str) -> int:
        return sum(1 << KINDS.index(kind) for kind in {span.kind for span in self.find(text)})

    def keep(self, score: float) -> str | None:
        bits = int(score)
        in_query = [kind for bit, kind in enumerate(KINDS) if bits >> bit & 1 and kind not in self.allow]
        in_passage = [kind for bit, kind in enumerate(KINDS, len(KINDS)) if bits >> bit & 1 and kind not in self.allow]
        if in_passage:
            return f"{in_passage[0]}-in-passage"
        return in_query[0] if in_query and not self.mask else None

    def rewrite(self, text: str, score: float) -> tuple[str, str] | None:
        """The text with each span replaced by its kind in brackets, and the number of spans of each kind."""
        if not self.mask or not int(score) & ((1 << len(KINDS)) - 1):
            return None
        return self.masked(text)

    def masked(self, text: str) -> tuple[str, str] | None:
        """A text with its personal data masked, and the counts by kind; None if it has none."""
        spans = [span for span in self.find(text) if span.kind not in self.allow]
        if not spans:
            return None
        parts, at = [], 0
        for span in spans:
            parts += [text[at : span.start], f"[{span.kind}]"]
            at = span.stop
        counts = Counter(span.kind for span in spans)
        return "".join([*parts, text[at:]]), ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))

    def find(self, text: str) -> list[Span]:
        """The personal data in a text, in order. Of overlapping spans, the one whose kind comes first is kept."""
        spans: list[Span] = []
        for kind in KINDS:
            for start, stop in self._of_kind(kind, text):
                if all(stop <= other.start or start >= other.stop for other in spans):
                    spans.append(Span(start, stop, kind))
        return sorted(spans)

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
                # ten digits in a row are often another kind of number
                if not match.raw_string.isdigit():
                    yield match.start, match.end

    @staticmethod
    def _is_id(name: str, number: str) -> bool:
        # one in ten numbers has a valid check digit by chance, so a sign or letter is required
        return not number.isdigit() and _checker(name)(number)


@lru_cache(maxsize=64)
def _checker(name: str) -> Callable[[str], bool]:
    """The validity check of a python-stdnum module. Raises ConfigError if there is no such module."""
    import importlib

    try:
        module: Any = importlib.import_module(f"stdnum.{name}")
        check: Callable[[str], bool] = module.is_valid
    except (ImportError, AttributeError):
        raise ConfigError(
            f"pii: ids: {name!r} is not a module of python-stdnum; give for example us.ssn, gb.nhs, de.idnr or br.cpf"
        ) from None
    return check


def _public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False
