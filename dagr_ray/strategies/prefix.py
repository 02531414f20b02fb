"""Query prefixes, as in a search box while a person types."""

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

NEAREST = 100  # logged queries of the nearest lengths, from which a prefix length is sampled
Weight = Annotated[float, Field(ge=0)]


class Prefix(Strategy):
    """Cuts queries to prefixes, to train autocomplete on unbiased prefixes (Rajan et al. 2025, arXiv 2510.01574).

    ``of`` is the strategy whose queries are cut. If it is None, the text of each row is the query: a corpus of logged
    queries, each the answer to its own prefixes, for the engine without a model. Prefix lengths come from ``log``, a
    text file (identified by its content) with one line for each use of a search box: the typed prefix, a tab and the
    intended query, as in the paper's distribution of prefix lengths given the query's length; or only the typed text.
    Without a log, ``lengths`` are the weights of 1, 2, ... characters; without both, all lengths are equally likely.
    Prefixes are shorter than their query and have at least ``min_characters``. Do not filter prefixes by ``Length`` and
    ``Format``, which are for complete queries.

    >>> row = Passage("q1", "", "copy a folder with everything in it")
    >>> Prefix(of=None, lengths=(0, 0, 0, 0, 0, 0, 1)).prompt(row, (), random.Random(0)).text
    'copy a'
    >>> Prefix(lengths=(0, 0, 0, 0, 1)).parse(row, " how to copy a folder\\nPassage:").kept
    ['how t']
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # counts characters as people see them (grapheme clusters)
    parse_version: ClassVar[int] = 2
    writes_whole_queries: ClassVar[bool] = False
    of: Strategy | None = Promptagator()
    log: FileOrFolder | None = None
    lengths: tuple[Weight, ...] = ()
    min_characters: Annotated[int, Field(ge=1)] = 3

    @model_validator(mode="after")
    def _can_cut(self) -> Prefix:
        if self.log is not None and self.lengths:
            raise ConfigError("prefix: log and lengths both set the length of prefixes; remove one of them")
        if self.lengths and not any(self.lengths):
            raise ConfigError(f"prefix: lengths = {self.lengths} has no weight over 0; give at least one")
        for member in self.of.members() if self.of else ():
            if (member.reads, member.writes) != ("corpus", "queries"):
                raise ConfigError(
                    f"prefix: of = {member.type!r} writes {member.writes}; give a strategy that writes queries"
                )
            controls = getattr(member, "controls", None)
            if controls is not None and controls.any_set():
                raise ConfigError(f"prefix: the controls of {member.type!r} apply to complete queries; remove them")
        return self

    def identity(self) -> dict[str, Any]:
        """The log by its content. Raises ConfigError if the file does not exist."""
        return super().identity() | ({"log": content_hash(self.log)} if self.log else {})

    def name(self) -> str:
        return f"{self.type}/{self.of.name()}" if self.of else self.type

    def members(self) -> tuple[Strategy, ...]:
        members = self.of.members() if self.of else ()
        return tuple(self._of(member) for member in members) if len(members) > 1 else (self,)

    def per_sample(self) -> bool:
        return self.of.per_sample() if self.of else True

    def strategies_for(self, rng: random.Random, samples: int) -> Sequence[Strategy]:
        if self.of is None or not self.per_sample():
            return [self] * samples
        return [self._of(strategy) for strategy in self.of.strategies_for(rng, samples)]

    def _of(self, other: Strategy) -> Prefix:
        return self.model_copy(update={"of": other})

    def prompt(self, row: Passage, exemplars: tuple[Exemplar, ...], rng: random.Random) -> Prompt:
        """The prompt of ``of``; if there is none, the prefix itself."""
        if self.of is not None:
            return self.of.prompt(row, exemplars, rng)
        return Prompt("", self.cut(row.text or row.title, rng), "", is_cut=True)

    def parse(self, row: Passage, raw: str) -> Parsed:
        """Prefixes of the queries that ``of`` parses; without ``of``, the completion is a prefix already."""
        if self.of is None:
            complete, cut = Parsed(kept=[tables.clean(" ".join(raw.split()))]), False
        else:
            complete, cut = self.of.parse(row, tables.clean(raw)), True
        parsed = Parsed(rejected=complete.rejected)
        for query in complete.kept:
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
        """A prefix of the query, with a length sampled by ``rng``; empty for a query that is too short."""
        text = characters(" ".join(query.split()))
        return "".join(text[: self._length(len(text), rng)]).rstrip()

    def _length(self, longest: int, rng: random.Random) -> int:
        """A length from ``min_characters`` to ``longest`` - 1; 0 if that range is empty."""
        allowed = range(self.min_characters, longest)
        if not allowed:
            return 0
        if self.log is not None:
            lengths = _length_log(self.log, content_hash(self.log))
            return min(max(lengths.sample(longest, rng), allowed[0]), allowed[-1])
        weights = [self.lengths[i - 1] if i <= len(self.lengths) else 0.0 for i in allowed] if self.lengths else None
        if weights is not None and not any(weights):
            return 0
        return rng.choices(allowed, weights)[0]


class _LengthLog:
    """Lengths of typed prefixes from a search box, with or without the lengths of the intended queries."""

    def __init__(self, path: str) -> None:
        pairs: list[tuple[int, int]] = []  # (query length, prefix length)
        prefixes: list[int] = []
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            prefix, tab, query = line.partition("\t")
            sizes = len(characters(" ".join(prefix.split()))), len(characters(" ".join(query.split())))
            if tab and 0 < sizes[0] <= sizes[1]:
                pairs.append((sizes[1], sizes[0]))
            elif sizes[0] and not tab:
                prefixes.append(sizes[0])
        self.pairs, self.prefixes = sorted(pairs), sorted(prefixes)
        if not (pairs or prefixes):
            raise ConfigError(f"prefix: log = {path!r} has no line with a prefix; give one prefix on each line")

    def sample(self, longest: int, rng: random.Random) -> int:
        """A length for a query of ``longest`` characters."""
        if self.pairs:  # the relative length of a prefix in a logged query of about the same length
            first = last = bisect.bisect_left(self.pairs, (longest, 0))
            while last - first < min(NEAREST, len(self.pairs)):
                below = longest - self.pairs[first - 1][0] if first else math.inf
                above = self.pairs[last][0] - longest if last < len(self.pairs) else math.inf
                first, last = (first - 1, last) if below < above else (first, last + 1)
            query, prefix = rng.choice(self.pairs[first:last])
            return round(prefix / query * longest)
        shorter = bisect.bisect_left(self.prefixes, longest)
        return rng.choice(self.prefixes[:shorter]) if shorter else 0


@lru_cache(maxsize=4)
def _length_log(path: str, content: str) -> _LengthLog:
    return _LengthLog(path)
