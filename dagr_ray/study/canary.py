"""Runs a job on at most 64 passages first, to check its prompts and answers and to measure what the rest will cost.

A canary consists of ordinary stages: a sample of the passages drawn by hash, their completions, the parser, and the
filters that need no search. It is therefore cached, resumed and billed like any stage, and a second canary costs nothing.
``estimate`` reads the rates of a canary's folders as it reads the rates of any finished folder.
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
from dagr_ray.quickstart.models import unpacked
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Sample

CANARY_ROWS = 64
EXAMPLE_ROWS = 3
Share = Annotated[float, Field(ge=0, le=1)]


class Guards(Config):
    """The largest shares of bad rows with which a run continues. A prompt with two start tokens, or with a missing start
    token, always stops the run.

    ``truncated``: passages that were cut to fit. ``cut_off``: completions that ended at ``max_tokens``. ``unparsed``:
    completions in which the strategy found no query. ``copied``: queries rejected as copies of their passage.
    """

    truncated: Share = 0.25
    cut_off: Share = 0.25
    unparsed: Share = 0.25
    copied: Share = 0.25

    @classmethod
    def of(cls, words: Iterable[str]) -> Guards:
        """Reads the command line's ``NAME=SHARE``. Raises ConfigError that names the allowed values."""
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
    """A canary failed: a message of one line, and ``rows`` to look at."""

    def __init__(self, message: str, rows: Sequence[str]) -> None:
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class Finding:
    """The result of one guard: how many rows are bad, of how many, the limit, and the first bad rows as examples."""

    guard: str
    bad: int
    total: int
    limit: float
    rows: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.bad / self.total if self.total else 0.0

    @property
    def passes(self) -> bool:
        return self.share <= self.limit

    def to_json(self) -> Json:
        return {"guard": self.guard, "bad": self.bad, "total": self.total, "limit": self.limit, "passes": self.passes}


@dataclass(frozen=True)
class Canary:
    """A small copy of one of the job's Generate stages, with the stages that parse and filter its completions."""

    generate: Generate
    parsed: Parse
    selected: Select


def canaries(stages: Sequence[Stage], rows: int = CANARY_ROWS) -> list[Canary]:
    """One canary for each Generate among the stages, with the job's filters for it that need no search."""
    result = []
    for stage in stages:
        if not isinstance(stage, Generate):
            continue
        sample = Sample(corpus=stage.corpus, n=rows)
        generate = stage.model_copy(update={"corpus": sample})
        parsed = Parse(generations=generate, corpus=sample)
        filters = {
            score.filter.fingerprint(): score.filter
            for score in stages
            if isinstance(score, Score) and not score.filter.reads and _reads(score.parsed, stage)
        }
        scores = tuple(Score(parsed=parsed, corpus=sample, filter=filter) for filter in filters.values())
        result.append(Canary(generate, parsed, Select(parsed=parsed, scores=scores)))
    return result


def _reads(parsed: Stage, generate: Generate) -> bool:
    return isinstance(parsed, Parse) and parsed.generations.fingerprint() == generate.fingerprint()


def run_canaries(
    stages: Sequence[Stage], runs: str, placement: Placement, guards: Guards, observe: Observer | None = None
) -> list[tuple[Canary, list[Finding]]]:
    """Builds the canaries of the stages in ``runs`` and returns the findings of each. Raises GuardFailed.

    Prompts are checked before an engine starts.
    """
    results = []
    for canary in canaries(stages):
        for stage in canary.generate.inputs().values():
            materialize(stage, runs, placement, observe)
        findings = _check_start_tokens(canary, runs)
        _stop_if_bad(findings, canary)
        try:
            materialize(canary.selected, runs, placement, observe)
        except StageFailed as error:
            raise GuardFailed(str(error), _failed_rows(canary.generate.folder(runs))) from error
        findings += _check_completions(canary, runs, guards)
        _stop_if_bad(findings, canary)
        results.append((canary, findings))
    return results


def _stop_if_bad(findings: list[Finding], canary: Canary) -> None:
    failed = next((finding for finding in findings if not finding.passes), None)
    if failed is None:
        return
    problem = {
        "start": "prompts begin with more than one start token; remove it from the strategy's prompt or from the tokenizer",
        "no_start": "prompts begin without the start token that add_bos_token in tokenizer_config.json promises; add it to "
        "the post_processor of tokenizer.json, or correct add_bos_token",
        "truncated": "passages were cut to fit; raise max_model_len or split the passages",
        "cut_off": "completions were cut off at max_tokens; raise it, or use a prompt after which the model stops",
        "unparsed": "completions contain no query; look at the prompt with `dagr preview`",
        "copied": "queries are copies of their passage; change the prompt or the temperature",
    }[failed.guard]
    fixed = failed.guard in ("start", "no_start")
    override = "" if fixed else f", or continue with --guard {failed.guard}={min(failed.share + 0.05, 1):.2f}"
    limit = "the limit is 0" if fixed else f"the limit is {failed.limit:.0%}"
    name = canary.generate.label()
    raise GuardFailed(f"canary {name}: {failed.bad} of {failed.total} {problem}{override} ({limit})", failed.rows)


# -- prompts ------------------------------------------------------------------------------------------------------------


def leading_starts(tokenizer: Any, text: str) -> int:
    """The number of start tokens at the beginning of a text, tokenised as by an engine that adds its own start token.

    Special tokens spelled out in the text count too: a prompt that begins with ``<s>`` gets a second start token.
    """
    if tokenizer.bos_token_id is None:
        return 0
    tokens = tokenizer(text).input_ids
    return next((i for i, token in enumerate(tokens) if token != tokenizer.bos_token_id), len(tokens))


def promised_starts(tokenizer: Any, settings: Json) -> int:
    """The number of start tokens that a text should begin with, 0 or 1.

    It is 1 if the tokenizer adds a start token to an empty text, or if its ``tokenizer_config.json`` (``settings``) sets
    ``add_bos_token``, which transformers 5 ignores if there is a ``tokenizer.json``.
    """
    start = tokenizer.bos_token_id
    return int(start is not None and (bool(settings.get("add_bos_token")) or start in tokenizer("").input_ids[:1]))


def _check_start_tokens(canary: Canary, runs: str) -> list[Finding]:
    """Finds prompts that begin with more than one start token, or without the start token that they should begin with.

    Only a model whose tokenizer is available here can be checked.
    """
    engine = canary.generate.engine
    if not isinstance(engine, VLLM):
        return [Finding("start", 0, 0, 0.0), Finding("no_start", 0, 0, 0.0)]
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = unpacked(engine.model)
    source = str(folder) if folder.is_dir() else engine.model
    tokenizer = AutoTokenizer.from_pretrained(source, revision=engine.revision)
    expected = promised_starts(tokenizer, get_tokenizer_config(source, revision=engine.revision))
    inputs = {name: stage.folder(runs) for name, stage in canary.generate.inputs().items()}
    ids = inputs["corpus"].read("corpus", ["doc_id"])["doc_id"].to_pylist()
    prompts = canary.generate.prompts(inputs, ids)
    # only the beginning: each turn of a chat may begin with the same token
    counts = {doc_id: leading_starts(tokenizer, text[:500]) for doc_id, text in prompts.items()}
    findings = []
    for guard, bad_ids in (
        ("start", [doc_id for doc_id, n in counts.items() if n > 1]),
        ("no_start", [doc_id for doc_id, n in counts.items() if n < expected]),
    ):
        rows = [f"{i}: {counts[i]} x {tokenizer.bos_token!r}, {prompts[i][:120]!r}" for i in bad_ids[:EXAMPLE_ROWS]]
        findings.append(Finding(guard, len(bad_ids), len(prompts), 0.0, rows))
    return findings


# -- completions --------------------------------------------------------------------------------------------------------


def _check_completions(canary: Canary, runs: str, guards: Guards) -> list[Finding]:
    rows = canary.generate.folder(runs).read("generations").to_pylist()
    parsed = canary.parsed.folder(runs)
    passages = {row["source_id"]: row for row in rows}
    truncated = [row for row in passages.values() if row["truncated"]]
    cut_off = [row for row in rows if row["finish_reason"] == "length"]
    rejected = {row["id"]: row for row in parsed.read("rejected").to_pylist() if row["by"] in ("parse", "control")}
    unparsed = [row for row in rows if row["gen_id"] in rejected]
    queries = {row["query_id"]: row["text"] for row in parsed.read("queries").to_pylist()}
    copied = [row for score in canary.selected.scores for row in _rejected_by(score, runs) if score.filter.finds_copies]
    return [
        Finding(
            "truncated",
            len(truncated),
            len(passages),
            guards.truncated,
            [f"{row['source_id']}: prompt of {row['prompt_tokens']} tokens" for row in truncated[:EXAMPLE_ROWS]],
        ),
        Finding(
            "cut_off", len(cut_off), len(rows), guards.cut_off, [_described(row) for row in cut_off[:EXAMPLE_ROWS]]
        ),
        Finding(
            "unparsed",
            len(unparsed),
            len(rows),
            guards.unparsed,
            [f"{_described(row)} ({rejected[row['gen_id']]['reason']})" for row in unparsed[:EXAMPLE_ROWS]],
        ),
        Finding(
            "copied",
            len(copied),
            len(queries),
            guards.copied,
            [f"{row['doc_id']}: {queries[row['query_id']][:200]!r}" for row in copied[:EXAMPLE_ROWS]],
        ),
    ]


def _rejected_by(score: Score, runs: str) -> list[Json]:
    """The queries that one filter rejects, whatever the other filters decide."""
    return [row for row in score.folder(runs).read("scores").to_pylist() if score.filter.keep(row["score"])]


def _described(row: Json) -> str:
    return f"{row['source_id']}: {(row['raw'] or '')[:200]!r}"


def _failed_rows(folder: Artifact) -> list[str]:
    """The first failed rows of a generation that stopped because of them."""
    lines: list[str] = []
    for receipt in folder.receipts().values():
        part = receipt["tables"].get("generations")
        if part and receipt["counts"].get("errors"):
            rows = folder.read_part(part, ["source_id", "error"])
            failed = rows.filter(pc.is_valid(rows["error"])).to_pylist()
            lines += [f"{row['source_id']}: {row['error']}" for row in failed]
    return lines[:EXAMPLE_ROWS]
