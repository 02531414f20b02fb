"""A language model as a relevance judge, scored by the probabilities of the grades."""

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
from dagr_ray.teachers import NO_SCORE, Cost, QueryPassage, Scorer, Teacher, by_query

GRADES = (" 0", " 1", " 2", " 3")
SIDES = (" A", " B")
CONTENT_FREE = "N/A"
CHARACTERS_PER_WORD = 12


class GradedExample(NamedTuple):
    """A graded example in the prompt."""

    query: str
    passage: str
    grade: int


# One example of each grade, in an order that a model cannot continue, and none from a benchmark.
EXAMPLES = (
    GradedExample(
        "how tall is the eiffel tower",
        "Lake Baikal in southern Siberia is the deepest lake in the world, reaching 1,642 metres.",
        0,
    ),
    GradedExample(
        "how tall is the eiffel tower",
        "The Eiffel Tower is 330 metres tall, about the same height as an 81-storey building.",
        3,
    ),
    GradedExample(
        "how long to rest a sprained ankle",
        "The ankle is a joint of three bones: the tibia, the fibula and the talus.",
        1,
    ),
    GradedExample(
        "overwrite existing file when renaming",
        "os.rename Rename a file or directory. On Windows an error is raised if the target exists; see os.replace.",
        2,
    ),
)


class LLMJudge(Teacher):
    """Relevance by a language model, from the probabilities of the few tokens that can be an answer.

    ``pointwise`` asks for a grade from 0 (unrelated to the query) to 3 (answers it), the scale of TREC's judges and of
    UMBRELA (Upadhyay et al. 2024, arXiv 2406.06519). The score is the expected grade: the mean of 0 to 3 weighted by the
    grades' probabilities, which also orders pairs with the same most likely grade (Zhuang et al. 2024, arXiv 2310.14122).
    ``pairwise`` asks which of two passages answers better (Qin et al. 2024, arXiv 2306.17563), in both orders. The score
    is the mean probability of being better, 0 to 1. Each passage of a query is compared with the ``rivals`` after it and
    the ``rivals`` before it in a circle ordered by hash, or with all others if there are no more.

    ``calibrate`` subtracts the passage's grade for the content-free query "N/A" (Zhao et al. 2021, arXiv 2102.09690),
    because a small model prefers some passages for any query. The score is then between -3 and 3. Each passage needs two
    prompts, but its own tokens are computed once.

    Only the probabilities of the answer tokens count, so no text is parsed or rejected. Passages and queries are folded
    to one line and cut to ``max_words``. The prompt is text to continue, with four examples.

    >>> judge = LLMJudge()
    >>> prompt = judge.prompt(QueryPassage("q1", "copy a dict", "d1", "Return a shallow copy."))
    >>> prompt.passage, prompt.after
    (' Return a shallow copy.', '\\nQuery: copy a dict\\nGrade:')
    >>> judge.duel(QueryPassage("q1", "copy a dict", "d1", "Return a shallow copy."), "Sort a list.").after
    '\\nPassage B: Sort a list.\\nBetter passage:'
    """

    abstract: ClassVar[bool] = False
    version: ClassVar[int] = 2  # cuts texts by words of any script
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
                f"llm-judge: engine {self.engine.type!r} does not report the probabilities of given tokens; give vllm"
            )
        if self.calibrate and self.form == "pairwise":
            raise ConfigError(
                "llm-judge: calibrate has no effect on form = 'pairwise', which uses both orders; remove it"
            )
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
        return _JudgeSession(self, self.engine.open(pool))

    def prompt(self, pair: QueryPassage) -> Prompt:
        """The prompt for a pair. Examples come first, so that engines compute them once."""
        shown = "".join(f"Passage: {s.passage}\nQuery: {s.query}\nGrade: {s.grade}\n\n" for s in EXAMPLES)
        return Prompt(
            f"{_line(self.task)}\n\n{shown}Passage:",
            # with its space, as in running text, because the parts of a prompt are tokenised separately
            f" {self._cut(pair.passage)}",
            f"\nQuery: {self._cut(pair.query)}\nGrade:",
        )

    def duel(self, pair: QueryPassage, rival: str) -> Prompt:
        """The prompt that compares a pair's passage, A, with another passage, B."""
        (worse, better), shown = EXAMPLES[:2], f"{_line(self.duel_task)}\n\n"
        for query, a, b, answer in (
            (better.query, better.passage, worse.passage, "A"),
            (EXAMPLES[2].query, better.passage, EXAMPLES[2].passage, "B"),
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
    """Folds white space. A text on one line cannot look like the next part of a prompt."""
    if words is None:
        return " ".join(tables.clean(text).split())
    return first_words(tables.clean(text), words)[: words * CHARACTERS_PER_WORD]


class _JudgeSession:
    def __init__(self, config: LLMJudge, session: Any) -> None:
        self.config, self.session = config, session

    def score(self, pairs: Sequence[QueryPassage], cost: Cost | None = None) -> list[float]:
        """See ``Scorer``. Cost: ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``, ``truncated`` prompts."""
        if self.config.form == "pairwise":
            return self._duels(pairs, cost)
        if not self.config.calibrate:
            answers = self._ask([self.config.prompt(pair) for pair in pairs], GRADES, cost)
            return [_expected_grade(answer) for answer in answers]
        prompts = [
            self.config.prompt(version) for pair in pairs for version in (pair, pair._replace(query=CONTENT_FREE))
        ]
        grades = [_expected_grade(answer) for answer in self._ask(prompts, GRADES, cost)]
        return [grade - content_free for grade, content_free in zip(grades[::2], grades[1::2], strict=True)]

    def _duels(self, pairs: Sequence[QueryPassage], cost: Cost | None) -> list[float]:
        duels: list[tuple[int, int]] = []
        at = 0
        for group in by_query(pairs):
            order = sorted(range(len(group)), key=lambda i: tables.unit_of("duel", group[i].query_id, group[i].doc_id))
            duels += [(at + order[i], at + order[j]) for i, j in _pairings(len(group), self.config.rivals)]
            at += len(group)
        both = [order for a, b in duels for order in ((a, b), (b, a))]
        answers = self._ask([self.config.duel(pairs[a], pairs[b].passage) for a, b in both], SIDES, cost)
        wins: list[list[float]] = [[] for _ in pairs]
        for (a, b), first, second in zip(duels, answers[::2], answers[1::2], strict=True):
            # the model favours the first passage; the mean over both orders cancels that
            share = (_second_probability(second) + 1 - _second_probability(first)) / 2
            if not math.isnan(share):
                wins[a].append(share)
                wins[b].append(1 - share)
        without_rival = {pair.query_id for pair in pairs} - {pairs[a].query_id for a, _ in duels}
        return [
            sum(shares) / len(shares) if shares else 0.5 if pair.query_id in without_rival else NO_SCORE
            for pair, shares in zip(pairs, wins, strict=True)
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


def _pairings(n: int, rivals: int) -> list[tuple[int, int]]:
    """All comparisons, each once: in a circle, everyone is compared with the next ``rivals``.

    >>> _pairings(5, 1)
    [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    >>> len(_pairings(5, 2)), len(_pairings(5, 9)), _pairings(1, 3)
    (10, 10, [])
    """
    steps = range(1, min(rivals, n - 1) + 1)
    return sorted({(min(i, j), max(i, j)) for step in steps for i in range(n) for j in [(i + step) % n]})


def _choice_probabilities(answer: NextToken) -> list[float]:
    """The probabilities of the choices, normalised to 1; empty if there are none."""
    top = max(answer.logprobs, default=-math.inf)
    if answer.error is not None or not math.isfinite(top):
        return []
    weights = [math.exp(value - top) for value in answer.logprobs]
    return [weight / sum(weights) for weight in weights]


def _expected_grade(answer: NextToken) -> float:
    shares = _choice_probabilities(answer)
    return sum(grade * share for grade, share in enumerate(shares)) if shares else NO_SCORE


def _second_probability(answer: NextToken) -> float:
    shares = _choice_probabilities(answer)
    return shares[1] if shares else NO_SCORE
