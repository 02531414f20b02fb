"""A language model as a judge: how relevant it finds a passage, from the probabilities of the grades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from dagr_ray.core import tables
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool, PricedEngine
from dagr_ray.core.words import first_words
from dagr_ray.engines import Engine
from dagr_ray.engines._next_token import NextToken, next_token
from dagr_ray.engines.vllm import VLLM
from dagr_ray.prompts import Prompt
from dagr_ray.teachers import NO_SCORE, Cost, Pair, Scorer, Teacher, by_query

GRADES = (" 0", " 1", " 2", " 3")
SIDES = (" A", " B")
CONTENT_FREE = "N/A"
CHARACTERS_PER_WORD = 12


class Shown(NamedTuple):
    """An example in the prompt."""

    query: str
    passage: str
    grade: int


# One of each grade, in no order that a model could go on with, and none from a benchmark.
SHOWN = (
    Shown(
        "how tall is the eiffel tower",
        "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
        0,
    ),
    Shown(
        "how tall is the eiffel tower",
        "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building.",
        3,
    ),
    Shown(
        "how long to rest a sprained ankle",
        "The ankle is a joint of three bones: the tibia, the fibula and the talus.",
        1,
    ),
    Shown(
        "overwrite existing file when renaming",
        "os.rename Rename a file or directory. On Windows an error is raised if the target exists; see os.replace.",
        2,
    ),
)


class LLMJudge(Teacher):
    """Relevance by a language model, from the probabilities of the few tokens that can be an answer.

    ``pointwise`` asks for a grade from 0 (nothing to do with the query) to 3 (answers it), the scale of TREC's judges
    and of UMBRELA (Upadhyay et al. 2024, arXiv 2406.06519), and the score is the expected grade: the mean of 0 to 3
    weighted by the grades' probabilities, which orders pairs that would get the same grade (Zhuang et al. 2024, arXiv
    2310.14122). ``pairwise`` asks which of two passages answers better (Qin et al. 2024, arXiv 2306.17563), each two in
    both orders, and the score is the mean probability of being better, 0 to 1: each passage of a query meets the
    ``rivals`` after it and the ``rivals`` before it in a round drawn by hash, all where there are no more.

    ``calibrate`` takes off what the passage gets for the content-free query "N/A" (Zhao et al. 2021, arXiv 2102.09690), so
    that the score is from -3 to 3: a small model likes some passages whatever is asked. It asks twice, the passage's
    own tokens once.

    Only the answers' tokens count, so there is no text to parse, and nothing to refuse. Passages and queries are folded
    to one line and cut to ``max_words``; the prompt is text to be continued, with four examples.

    >>> judge = LLMJudge()
    >>> prompt = judge.prompt(Pair("q1", "copy a dict", "d1", "Return a shallow copy."))
    >>> prompt.passage, prompt.after
    (' Return a shallow copy.', '\\nQuery: copy a dict\\nGrade:')
    >>> judge.duel(Pair("q1", "copy a dict", "d1", "Return a shallow copy."), "Sort a list.").after
    '\\nPassage B: Sort a list.\\nBetter passage:'
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # texts are cut by words of any script
    type: ClassVar[str] = "llm-judge"
    pool: ClassVar[str] = "generate"
    engine: Engine = VLLM(model="HuggingFaceTB/SmolLM2-135M-Instruct")
    form: Literal["pointwise", "pairwise"] = "pointwise"
    task: str = (
        "Grade how well each passage answers the query: 3 it answers the query, 2 it answers it in part, "
        "1 it is on the topic, 0 it has nothing to do with it."
    )
    duel_task: str = "Which of the two passages answers the query better, A or B?"
    max_words: Annotated[int, Field(ge=8)] = 120
    rivals: Annotated[int, Field(ge=1)] = 4
    calibrate: bool = False

    @model_validator(mode="after")
    def _engine_tells_probabilities(self) -> LLMJudge:
        if not self.engine.tells_probabilities:
            raise ConfigError(
                f"llm-judge: engine {self.engine.type!r} does not tell the probabilities of given tokens; give vllm"
            )
        if self.calibrate and self.form == "pairwise":
            raise ConfigError("llm-judge: calibrate means nothing to pairwise, whose orders cancel; leave it out")
        return self

    def label(self) -> str:
        return "calibrated" if self.calibrate else "" if self.form == "pointwise" else self.form

    def engine_asked(self) -> PricedEngine:
        return self.engine

    def with_engine(self, engine: PricedEngine) -> LLMJudge:
        return self.model_copy(update={"engine": engine})

    def check(self) -> None:
        self.engine.check()

    def open(self, pool: Pool) -> Scorer:
        return _Judge(self, self.engine.open(pool))

    def prompt(self, pair: Pair) -> Prompt:
        """What is asked about a pair. Examples first, so that engines compute them once."""
        shown = "".join(f"Passage: {s.passage}\nQuery: {s.query}\nGrade: {s.grade}\n\n" for s in SHOWN)
        return Prompt(
            f"{_line(self.task)}\n\n{shown}Passage:",
            # with its space, as in running text: the pieces of a prompt are tokenised one by one
            f" {self._cut(pair.passage)}",
            f"\nQuery: {self._cut(pair.query)}\nGrade:",
        )

    def duel(self, pair: Pair, rival: str) -> Prompt:
        """What is asked about a pair's passage, A, beside another passage, B."""
        (worse, better), shown = SHOWN[:2], f"{_line(self.duel_task)}\n\n"
        for query, a, b, answer in (
            (better.query, better.passage, worse.passage, "A"),
            (SHOWN[2].query, better.passage, SHOWN[2].passage, "B"),
        ):
            shown += f"Query: {query}\nPassage A: {a}\nPassage B: {b}\nBetter passage: {answer}\n\n"
        return Prompt(
            f"{shown}Query: {self._cut(pair.query)}\nPassage A:",
            f" {self._cut(pair.passage)}",
            f"\nPassage B: {self._cut(rival)}\nBetter passage:",
        )

    def _cut(self, text: str) -> str:
        return _line(text[: 4 * self.max_words * CHARACTERS_PER_WORD], self.max_words)


def _line(text: str, words: int | None = None) -> str:
    """One line: white space folded, so that no text looks like the next part of a prompt."""
    if words is None:
        return " ".join(tables.clean(text).split())
    return first_words(tables.clean(text), words)[: words * CHARACTERS_PER_WORD]


class _Judge:
    def __init__(self, config: LLMJudge, session: Any) -> None:
        self.config, self.session = config, session

    def score(self, pairs: Sequence[Pair], cost: Cost | None = None) -> list[float]:
        """See ``Scorer``. Cost: ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``, ``truncated`` prompts."""
        if self.config.form == "pairwise":
            return self._duels(pairs, cost)
        if not self.config.calibrate:
            answers = self._ask([self.config.prompt(pair) for pair in pairs], GRADES, cost)
            return [_expected(answer) for answer in answers]
        both = [each for pair in pairs for each in (pair, pair._replace(query=CONTENT_FREE))]
        grades = [_expected(answer) for answer in self._ask([self.config.prompt(each) for each in both], GRADES, cost)]
        return [asked - anything for asked, anything in zip(grades[::2], grades[1::2], strict=True)]

    def _duels(self, pairs: Sequence[Pair], cost: Cost | None) -> list[float]:
        met: list[tuple[int, int]] = []
        at = 0
        for own in by_query(pairs):
            order = sorted(range(len(own)), key=lambda i: tables.unit_of("duel", own[i].query_id, own[i].doc_id))
            met += [(at + order[i], at + order[j]) for i, j in _round(len(own), self.config.rivals)]
            at += len(own)
        both = [order for a, b in met for order in ((a, b), (b, a))]
        answers = self._ask([self.config.duel(pairs[a], pairs[b].passage) for a, b in both], SIDES, cost)
        won: list[list[float]] = [[] for _ in pairs]
        for (a, b), first, second in zip(met, answers[::2], answers[1::2], strict=True):
            # a passage that stands first is favoured: in both orders, that cancels
            share = (_second(second) + 1 - _second(first)) / 2
            if not math.isnan(share):
                won[a].append(share)
                won[b].append(1 - share)
        alone = {pair.query_id for pair in pairs} - {pairs[a].query_id for a, _ in met}
        return [
            sum(own) / len(own) if own else 0.5 if pair.query_id in alone else NO_SCORE
            for pair, own in zip(pairs, won, strict=True)
        ]

    def _ask(self, prompts: list[Prompt], choices: Sequence[str], cost: Cost | None) -> list[NextToken]:
        answers = next_token(self.session, prompts, choices)
        if cost is not None:
            spent = {
                "prompt_tokens": sum(a.prompt_tokens for a in answers),
                "cached_tokens": sum(a.cached_tokens for a in answers),
                "completion_tokens": sum(a.error is None for a in answers),
                "truncated": sum(a.truncated for a in answers),
            }
            for name, value in spent.items():
                cost[name] = cost.get(name, 0) + value
        return answers

    def close(self) -> None:
        self.session.close()


def _round(n: int, rivals: int) -> list[tuple[int, int]]:
    """Who meets whom, each two once: in a circle everybody meets the next ``rivals``.

    >>> _round(5, 1)
    [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    >>> len(_round(5, 2)), len(_round(5, 9)), _round(1, 3)
    (10, 10, [])
    """
    steps = range(1, min(rivals, n - 1) + 1)
    return sorted({(min(i, j), max(i, j)) for step in steps for i in range(n) for j in [(i + step) % n]})


def _shares(answer: NextToken) -> list[float]:
    """The probabilities of the choices among themselves; no number where there is none."""
    top = max(answer.logprobs, default=-math.inf)
    if answer.error is not None or not math.isfinite(top):
        return []
    weights = [math.exp(value - top) for value in answer.logprobs]
    return [weight / sum(weights) for weight in weights]


def _expected(answer: NextToken) -> float:
    shares = _shares(answer)
    return sum(grade * share for grade, share in enumerate(shares)) if shares else NO_SCORE


def _second(answer: NextToken) -> float:
    shares = _shares(answer)
    return shares[1] if shares else NO_SCORE
