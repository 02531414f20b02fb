"""Selects queries by a set of filters."""

from __future__ import annotations

from collections.abc import Sequence

from dagr_ray.core.config import ConfigError
from dagr_ray.core.stage import Stage
from dagr_ray.filters import Filter
from dagr_ray.filters.diversity import Diversity
from dagr_ray.filters.language import Language
from dagr_ray.filters.logprob import Logprob
from dagr_ray.filters.pii import Pii
from dagr_ray.filters.teacher import Teacher
from dagr_ray.recipes.augmentation import filtered, gated
from dagr_ray.recipes.negatives import hybrid_scores
from dagr_ray.retrieval.encoder import Encoder
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select

EXTRA = ("logprob", "teacher-score", "diversity", "language", "pii")


def filtered_by(
    setting: str,
    parsed: Parse,
    passages: Stage,
    corpus: Stage,
    encoder: Encoder,
    *,
    max_rank: int,
    held_out: Sequence[Stage] = (),
    exemplars: Stage | None = None,
    split: str = "test",
) -> Stage:
    """The queries of ``parsed`` that pass ``all`` filters of ``filtered``, ``none``, ``without-NAME``, or also ``with-NAME``.

    NAME is a filter's type; ``logprob`` and ``teacher-score`` (the margin of a hybrid teacher) keep the better half, and
    ``diversity`` keeps the half of the remaining queries that covers the space best. With ``held_out`` (evaluation sets)
    and ``exemplars``, the leak gate comes last in all settings but ``none`` and ``without-leak``. Raises ConfigError for
    any other setting.
    """
    every = filtered(parsed, passages, corpus, max_rank=max_rank)
    names = [score.filter.type for score in every.scores]
    word, _, name = setting.partition("-")
    allowed = ["all", "none", *(f"without-{n}" for n in (*names, "leak")), *(f"with-{n}" for n in EXTRA)]
    if setting not in allowed:
        raise ConfigError(f"filters = {setting!r}; allowed: {', '.join(allowed)}")
    if setting == "none":
        return Select(parsed=parsed)
    if setting == "without-leak":
        return every
    selected = every
    if word == "without":
        selected = filtered(parsed, passages, corpus, max_rank=max_rank, without=(name,))
    elif name == "diversity":
        order = Score(parsed=every, corpus=passages, filter=Diversity(encoder=encoder, share=0.5))
        selected = Select(parsed=every, scores=(order,))
    elif word == "with":
        selected = every.model_copy(update={"scores": (*every.scores, _extra(name, parsed, passages, corpus, encoder))})
    return gated(selected, passages, held_out, encoder, exemplars=exemplars, split=split) if held_out else selected


def _extra(name: str, parsed: Parse, passages: Stage, corpus: Stage, encoder: Encoder) -> Score:
    """The score of a rowwise filter of ``EXTRA``."""
    if name != "teacher-score":
        filters: dict[str, Filter] = {"logprob": Logprob(top_share=0.5), "language": Language(), "pii": Pii()}
        return Score(parsed=parsed, corpus=passages, filter=filters[name])
    labels = hybrid_scores(parsed, corpus, encoder)
    return Score(parsed=parsed, corpus=corpus, filter=Teacher(by="margin", top_share=0.5), labels=labels)
