"""A trial of at most 64 passages before a run: are the prompts and the answers sound, and what will the rest take?

A canary is made of ordinary stages, a sample of the passages drawn by hash, their completions, the parser and the
filters that need no search; so it is cached, resumed and billed like any other, and costs nothing twice. ``estimate``
reads its rates as it reads those of any finished folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow.compute as pc
from pydantic import Field

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.attempt import Observer
from dagr_ray.core.build import materialize
from dagr_ray.core.config import Config, ConfigError, from_json
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import Stage, StageFailed
from dagr_ray.engines.vllm import VLLM
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Sample

ROWS = 64
SHOWN = 3
Share = Annotated[float, Field(ge=0, le=1)]


class Guards(Config):
    """The largest shares with which a run goes on. A prompt with two start tokens, or without one, never passes.

    ``truncated`` of the passages, which were cut to fit; ``cut_off`` of the completions, which ended at ``max_tokens``;
    ``unparsed`` of the completions, in which the strategy found no query; ``copied`` of the queries, refused as copies
    of their passage.
    """

    truncated: Share = 0.25
    cut_off: Share = 0.25
    unparsed: Share = 0.25
    copied: Share = 0.25

    @classmethod
    def of(cls, words: Iterable[str]) -> Guards:
        """From the command line's ``NAME=SHARE``. Raises ConfigError naming what is allowed."""
        values: dict[str, str] = {}
        for word in words:
            name, sign, text = word.partition("=")
            if not sign or name not in cls.model_fields:
                raise ConfigError(
                    f"--guard {word!r} is not NAME=SHARE; allowed names: {', '.join(cls.model_fields)}, such as cut_off=0.6"
                )
            values[name] = text
        return from_json(values, cls)


class GuardFailed(StageFailed):
    """A canary that does not pass: one line, and ``rows`` to look at."""

    def __init__(self, message: str, rows: Sequence[str]) -> None:
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class Finding:
    """What one guard saw: how many of how many rows, the limit, and the first of those rows for people."""

    guard: str
    found: int
    of: int
    limit: float
    rows: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.found / self.of if self.of else 0.0

    @property
    def passes(self) -> bool:
        return self.share <= self.limit

    def to_json(self) -> Json:
        return {"guard": self.guard, "found": self.found, "of": self.of, "limit": self.limit, "passes": self.passes}


@dataclass(frozen=True)
class Canary:
    """The small twin of a Generate stage of a job, and what reads it."""

    generate: Generate
    parsed: Parse
    selected: Select


def canaries(stages: Sequence[Stage], rows: int = ROWS) -> list[Canary]:
    """One for each Generate among the stages, with the filters that the job has for it and that need no search."""
    made = []
    for stage in stages:
        if not isinstance(stage, Generate):
            continue
        few = Sample(corpus=stage.corpus, n=rows)
        small = stage.model_copy(update={"corpus": few})
        parsed = Parse(generations=small, corpus=few)
        filters = {
            score.filter.fingerprint(): score.filter
            for score in stages
            if isinstance(score, Score) and not score.filter.reads and _reads(score.parsed, stage)
        }
        scores = tuple(Score(parsed=parsed, corpus=few, filter=each) for each in filters.values())
        made.append(Canary(small, parsed, Select(parsed=parsed, scores=scores)))
    return made


def _reads(parsed: Stage, generate: Generate) -> bool:
    return isinstance(parsed, Parse) and parsed.generations.fingerprint() == generate.fingerprint()


def run_canaries(
    stages: Sequence[Stage], runs: str, placement: Placement, guards: Guards, observe: Observer | None = None
) -> list[tuple[Canary, list[Finding]]]:
    """Builds the canaries of the stages below ``runs`` and returns what the guards saw. Raises GuardFailed.

    Prompts are looked at before an engine starts.
    """
    made = []
    for canary in canaries(stages):
        for stage in canary.generate.inputs().values():
            materialize(stage, runs, placement, observe)
        found = _starts(canary, runs)
        _stop_at(found, canary)
        try:
            materialize(canary.selected, runs, placement, observe)
        except StageFailed as error:
            raise GuardFailed(str(error), _errors(canary.generate.folder(runs))) from error
        found += _look(canary, runs, guards)
        _stop_at(found, canary)
        made.append((canary, found))
    return made


def _stop_at(found: list[Finding], canary: Canary) -> None:
    bad = next((finding for finding in found if not finding.passes), None)
    if bad is None:
        return
    what = {
        "start": "prompts begin with more than one start token; take it out of the strategy's prompt or of the tokenizer",
        "no_start": "prompts begin without the start token that add_bos_token in tokenizer_config.json promises; add it to "
        "the post_processor of tokenizer.json, or correct add_bos_token",
        "truncated": "passages were cut to fit; raise max_model_len, split the passages",
        "cut_off": "completions were cut off at max_tokens; raise it, or give a prompt that stops",
        "unparsed": "completions hold no query; look at the prompt with `dagr preview`",
        "copied": "queries are copies of their passage; change the prompt or the temperature",
    }[bad.guard]
    never = bad.guard in ("start", "no_start")
    over = "" if never else f", or go on with --guard {bad.guard}={min(bad.share + 0.05, 1):.2f}"
    limit = "none may" if never else f"the limit is {bad.limit:.0%}"
    name = canary.generate.label()
    raise GuardFailed(f"canary {name}: {bad.found} of {bad.of} {what}{over} ({limit})", bad.rows)


# -- prompts ------------------------------------------------------------------------------------------------------------


def leading_starts(tokenizer: Any, text: str) -> int:
    """How many start tokens a text begins with once it is tokenised as engines do that add their own.

    Special tokens that are spelled out in the text count: a prompt that begins with ``<s>`` gets a second one.
    """
    if tokenizer.bos_token_id is None:
        return 0
    tokens = tokenizer(text).input_ids
    return next((i for i, token in enumerate(tokens) if token != tokenizer.bos_token_id), len(tokens))


def promised_starts(tokenizer: Any, settings: Json) -> int:
    """How many start tokens a text should begin with: one where the tokenizer adds it to an empty text, or where its
    ``tokenizer_config.json`` (``settings``) says ``add_bos_token``, which transformers 5 does not heed beside a
    ``tokenizer.json``.
    """
    start = tokenizer.bos_token_id
    return int(start is not None and (bool(settings.get("add_bos_token")) or start in tokenizer("").input_ids[:1]))


def _starts(canary: Canary, runs: str) -> list[Finding]:
    """Prompts that begin with more than one start token, or without the one that they should begin with.

    Only a model whose tokenizer is at hand can be looked at.
    """
    engine = canary.generate.engine
    if not isinstance(engine, VLLM):
        return [Finding("start", 0, 0, 0.0), Finding("no_start", 0, 0, 0.0)]
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = str(engine.folder) if engine.folder.is_dir() else engine.model
    tokenizer = AutoTokenizer.from_pretrained(source, revision=engine.revision)
    least = promised_starts(tokenizer, get_tokenizer_config(source, revision=engine.revision))
    inputs = {name: stage.folder(runs) for name, stage in canary.generate.inputs().items()}
    ids = inputs["corpus"].read("corpus", ["doc_id"])["doc_id"].to_pylist()
    prompts = canary.generate.prompts(inputs, ids)
    # what a prompt begins with, not all of it: a chat's turns may each begin with the same token
    counts = {doc_id: leading_starts(tokenizer, text[:500]) for doc_id, text in prompts.items()}
    found = []
    for guard, bad in (
        ("start", [doc_id for doc_id, n in counts.items() if n > 1]),
        ("no_start", [doc_id for doc_id, n in counts.items() if n < least]),
    ):
        rows = [f"{i}: {counts[i]} x {tokenizer.bos_token!r}, {prompts[i][:120]!r}" for i in bad[:SHOWN]]
        found.append(Finding(guard, len(bad), len(prompts), 0.0, rows))
    return found


# -- completions --------------------------------------------------------------------------------------------------------


def _look(canary: Canary, runs: str, guards: Guards) -> list[Finding]:
    rows = canary.generate.folder(runs).read("generations").to_pylist()
    parsed = canary.parsed.folder(runs)
    passages = {row["source_id"]: row for row in rows}
    truncated = [row for row in passages.values() if row["truncated"]]
    cut_off = [row for row in rows if row["finish_reason"] == "length"]
    refused = {row["id"]: row for row in parsed.read("rejected").to_pylist() if row["by"] in ("parse", "control")}
    unparsed = [row for row in rows if row["gen_id"] in refused]
    queries = {row["query_id"]: row["text"] for row in parsed.read("queries").to_pylist()}
    copied = [row for score in canary.selected.scores for row in _refused(score, runs) if score.filter.finds_copies]
    return [
        Finding(
            "truncated",
            len(truncated),
            len(passages),
            guards.truncated,
            [f"{row['source_id']}: prompt of {row['prompt_tokens']} tokens" for row in truncated[:SHOWN]],
        ),
        Finding("cut_off", len(cut_off), len(rows), guards.cut_off, [_said(row) for row in cut_off[:SHOWN]]),
        Finding(
            "unparsed",
            len(unparsed),
            len(rows),
            guards.unparsed,
            [f"{_said(row)} ({refused[row['gen_id']]['reason']})" for row in unparsed[:SHOWN]],
        ),
        Finding(
            "copied",
            len(copied),
            len(queries),
            guards.copied,
            [f"{row['doc_id']}: {queries[row['query_id']][:200]!r}" for row in copied[:SHOWN]],
        ),
    ]


def _refused(score: Score, runs: str) -> list[Json]:
    """Queries that one filter refuses, whatever others say."""
    return [row for row in score.folder(runs).read("scores").to_pylist() if score.filter.keep(row["score"])]


def _said(row: Json) -> str:
    return f"{row['source_id']}: {(row['raw'] or '')[:200]!r}"


def _errors(folder: Artifact) -> list[str]:
    """The first rows with errors of a stage that failed because of them."""
    found: list[str] = []
    for receipt in folder.receipts().values():
        part = receipt["tables"].get("generations")
        if part and receipt["counts"].get("errors"):
            rows = folder.read_part(part, ["source_id", "error"])
            bad = rows.filter(pc.is_valid(rows["error"])).to_pylist()
            found += [f"{row['source_id']}: {row['error']}" for row in bad]
    return found[:SHOWN]
