"""The beginning of a query, as it stands in a search box while somebody types."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError, content_hash
from dagr_ray.core.paths import FileOrFolder
from dagr_ray.core.words import characters
from dagr_ray.prompts import Exemplar, Parsed, Passage, Prompt
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.promptagator import Promptagator

NEAREST = 100  # logged queries, the nearest in length, among which the length of a prefix is drawn
Weight = Annotated[float, Field(ge=0)]


class Prefix(Strategy):
    """Cuts whole queries to prefixes, so that autocomplete is trained on unbiased ones (Rajan et al. 2025, arXiv 2510.01574).

    ``of`` is the strategy whose queries are cut. With None, the text of each row is the query: a corpus of logged
    queries, each the answer to its own prefixes, for the engine without a model. Lengths come from ``log``, a text file
    (identified by its content) with a line for each use of a search box: the prefix typed, a tab, and the query that was
    meant, as in the paper's distribution of prefix lengths given the query's length; or only what was typed. Else they
    have the weights ``lengths`` of 1, 2, ... characters, or all are alike. Prefixes are shorter than their query and
    have ``min_characters``; leave ``Length`` and ``Format`` out of their filters, which are for whole queries.

    >>> row = Passage("q1", "", "copy a folder with everything in it")
    >>> Prefix(of=None, lengths=(0, 0, 0, 0, 0, 0, 1)).prompt(row, (), random.Random(0)).text
    'copy a'
    >>> Prefix(lengths=(0, 0, 0, 0, 1)).parse(row, " how to copy a folder\\nPassage:").kept
    ['how t']
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # characters as people see them
    parse_version: ClassVar[int] = 2
    writes_whole_queries: ClassVar[bool] = False
    of: Strategy | None = Promptagator()
    log: FileOrFolder | None = None
    lengths: tuple[Weight, ...] = ()
    min_characters: Annotated[int, Field(ge=1)] = 3

    @model_validator(mode="after")
    def _can_cut(self) -> Prefix:
        if self.log is not None and self.lengths:
            raise ConfigError("prefix: log and lengths both say how long prefixes are; leave one out")
        if self.lengths and not any(self.lengths):
            raise ConfigError(f"prefix: lengths = {self.lengths} has no weight over 0; give one")
        for one in self.of.asked() if self.of else ():
            if (one.reads, one.writes) != ("corpus", "queries"):
                raise ConfigError(f"prefix: of = {one.type!r} writes {one.writes}; give one that writes queries")
            controls = getattr(one, "controls", None)
            if controls is not None and controls.given():
                raise ConfigError(f"prefix: the controls of {one.type!r} hold for whole queries; take them out")
        return self

    def identity(self) -> dict[str, Any]:
        """The log stands for its content. Raises ConfigError where it is not there."""
        return super().identity() | ({"log": content_hash(self.log)} if self.log else {})

    def name(self) -> str:
        return f"{self.type}/{self.of.name()}" if self.of else self.type

    def asked(self) -> tuple[Strategy, ...]:
        asked = self.of.asked() if self.of else ()
        return tuple(self._of(one) for one in asked) if len(asked) > 1 else (self,)

    def draws(self) -> bool:
        return self.of.draws() if self.of else True

    def drawn(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        if self.of is None or not self.draws():
            return [self] * samples
        return [self._of(one) for one in self.of.drawn(rng, samples)]

    def _of(self, other: Strategy) -> Prefix:
        return self.model_copy(update={"of": other})

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """That of ``of``; without it, the prefix itself."""
        if self.of is not None:
            return self.of.prompt(row, exemplars, rng)
        return Prompt("", self.cut(row.text or row.title, rng), "", whole=True)

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Prefixes of the queries that ``of`` finds; where the answer is a prefix already, that."""
        if self.of is None:
            found, cut = Parsed(kept=[tables.clean(" ".join(raw.split()))]), False
        else:
            found, cut = self.of.parse(row, tables.clean(raw)), True
        parsed = Parsed(rejected=found.rejected)
        for query in found.kept:
            rng = random.Random(tables.seed_of("prefix", row.doc_id, query))
            text = self.cut(query, rng) if cut else query
            if not text:
                parsed.rejected.append(("too-short" if query else "empty", query[:200]))
            elif not any(c.isalpha() for c in text):
                parsed.rejected.append(("no-text", text[:200]))
            else:
                parsed.kept.append(text)
        return parsed

    def cut(self, query: str, rng: random.Random) -> str:
        """A prefix of the query, of a length drawn with ``rng``; empty for a query that is too short to have one."""
        text = characters(" ".join(query.split()))
        return "".join(text[: self._length(len(text), rng)]).rstrip()

    def _length(self, longest: int, rng: random.Random) -> int:
        """A length from ``min_characters`` to ``longest`` - 1; 0 where there is none."""
        allowed = range(self.min_characters, longest)
        if not allowed:
            return 0
        if self.log is not None:
            return min(max(_logged(self.log, content_hash(self.log)).draw(longest, rng), allowed[0]), allowed[-1])
        weights = [self.lengths[i - 1] if i <= len(self.lengths) else 0.0 for i in allowed] if self.lengths else None
        if weights is not None and not any(weights):
            return 0
        return rng.choices(allowed, weights)[0]


class _Log:
    """Lengths of what was typed into a search box: with the lengths of the queries meant, or without."""

    def __init__(self, path: str) -> None:
        pairs: list[tuple[int, int]] = []
        alone: list[int] = []
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            typed, tab, meant = line.partition("\t")
            sizes = len(characters(" ".join(typed.split()))), len(characters(" ".join(meant.split())))
            if tab and 0 < sizes[0] <= sizes[1]:
                pairs.append((sizes[1], sizes[0]))
            elif sizes[0] and not tab:
                alone.append(sizes[0])
        self.pairs, self.alone = sorted(pairs), sorted(alone)
        if not (pairs or alone):
            raise ConfigError(f"prefix: log = {path!r} has no line with a prefix; give one on each line")

    def draw(self, longest: int, rng: random.Random) -> int:
        """A length for a query of ``longest`` characters."""
        if self.pairs:  # as far into the query as with one of the logged queries of about its length
            first = last = bisect.bisect_left(self.pairs, (longest, 0))
            while last - first < min(NEAREST, len(self.pairs)):
                below = longest - self.pairs[first - 1][0] if first else math.inf
                above = self.pairs[last][0] - longest if last < len(self.pairs) else math.inf
                first, last = (first - 1, last) if below < above else (first, last + 1)
            meant, typed = rng.choice(self.pairs[first:last])
            return round(typed / meant * longest)
        shorter = bisect.bisect_left(self.alone, longest)
        return rng.choice(self.alone[:shorter]) if shorter else 0


@lru_cache(maxsize=4)
def _logged(path: str, content: str) -> _Log:
    return _Log(path)
