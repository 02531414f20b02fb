"""The parts that recipes share: a generator's whole arm from passages to mined examples, and the judging of a retriever."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dagr_ray import tables
from dagr_ray.config import ConfigError
from dagr_ray.engines import Engine, Sampling
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.vllm import VLLM
from dagr_ray.filters import Filter
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.length import Length
from dagr_ray.filters.refusal import Refusal
from dagr_ray.filters.repetition import Repetition
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.template import Template
from dagr_ray.goal import Reach
from dagr_ray.miners import Miner
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.paths import several, told_apart, word_of
from dagr_ray.retriever import Encoder
from dagr_ray.stage import Stage
from dagr_ray.stages.blend import Blend
from dagr_ray.stages.corpus import Beir
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.generate import Generate, Parse
from dagr_ray.stages.label import Label
from dagr_ray.stages.leak import LeakGate, LeakScan
from dagr_ray.stages.mine import Mine, Relabel
from dagr_ray.stages.mix import Mix
from dagr_ray.stages.pairs import Pairs
from dagr_ray.stages.people import Labelled
from dagr_ray.stages.refine import Best, Criticised, Left
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import Rewrite
from dagr_ray.stages.select import Score, Select, Take
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.critique import Critique
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.strategies.retry import Retry
from dagr_ray.teachers import Teacher
from dagr_ray.teachers.hybrid import Hybrid
from dagr_ray.training.losses import KL, InfoNCE, Loss

Rung = Literal["in-batch", "mined", "teacher", "filters"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
JUDGED = 100  # passages of a query that count: R@100 is the deepest measure

if TYPE_CHECKING:
    from dagr_ray.stages.train import Train


def generator_named(name: str, model: str | None = None) -> tuple[Strategy, Engine]:
    """The strategy and engine of a generator: ``crop`` (no LLM), ``smollm2`` (the small one), or ``llm`` with a model."""
    if name == "crop":
        return Crop(), CropEngine()
    if name == "smollm2":
        from dagr_ray.models import smollm2

        return Promptagator(), VLLM(model=str(smollm2()))
    if name == "llm" and model:
        return Promptagator(), VLLM(model=model)
    raise ConfigError(f"generator = {name!r} (model {model!r}): allowed are crop, smollm2, and llm with model=FOLDER")


def augment(
    passages: Stage,
    corpus: Stage,
    strategy: Strategy,
    engine: Engine,
    *,
    exemplars: Stage | None,
    samples: int,
    max_rank: int,
    negatives: int = 1,
    max_tokens: int = 32,
    extra_filters: Sequence[Filter] = (),
    accepted: int | None = None,
    max_candidates: int | None = None,
    max_cost: float | None = None,
    held_out: Sequence[Stage] = (),
    split: str = "test",
    base: Encoder | None = None,
    without: Collection[str] = (),
    people: Stage | None = None,
) -> tuple[Select | Reach | Labelled | LeakGate, Mine]:
    """Queries for ``passages``, filtered and with BM25 negatives from ``corpus``: the selected queries and the examples.

    With ``accepted``, passages are asked only until so many queries are accepted or a limit is reached: see ``Reach``.
    Queries that resemble those of ``split`` in ``held_out`` (evaluation sets) are left out: see ``LeakGate``; with the
    encoder ``base`` also those that only mean the same. ``without`` names filters, by type, that are left out. What
    ``people`` said (``People``) wins over the filters, in both directions. A cropped query is a copy of its passage by
    design, so the filter against copies is left out for it.
    """
    sampling = Sampling(max_tokens=max_tokens)
    shown = None if strategy.type == "crop" else exemplars
    raw = Generate(
        corpus=passages, strategy=strategy, engine=engine, sampling=sampling, samples=samples, exemplars=shown
    )
    parsed = Parse(generations=raw, corpus=passages)
    every = filtered(
        parsed,
        passages,
        corpus,
        max_rank=max_rank,
        copies=strategy.type == "crop",
        extra=extra_filters,
        without=without,
    )
    selected: Select | Reach | Labelled | LeakGate = every
    search = every.scores[-1].search
    if accepted is not None:
        selected = Reach(selected=every, accepted=accepted, max_candidates=max_candidates, max_cost=max_cost)
        search = Search(index=Index(corpus=corpus, miner=BM25()), queries=selected, depth=100)
    assert search is not None
    if people is not None:
        selected = Labelled(source=selected, people=people, queries=parsed)
    if held_out:
        selected = gated(selected, passages, held_out, base, exemplars=shown, split=split)
    return selected, Mine(selected=selected, corpus=corpus, searches=(search,), negatives=negatives)


def filtered(
    parsed: Stage,
    passages: Stage,
    corpus: Stage,
    *,
    max_rank: int,
    copies: bool = False,
    extra: Sequence[Filter] = (),
    without: Collection[str] = (),
    search: Search | None = None,
) -> Select:
    """The queries of ``parsed`` that pass the cheap filters, ``extra``, and a round trip through BM25 over ``corpus``.

    ``passages`` are those that they were written for; ``copies`` says that the queries may be copies of them. ``without``
    names filters, by type, that are left out. ``search``, of the queries of ``parsed``, takes the place of BM25's.
    """
    cheap: list[Filter] = [Format(), Length(), Repetition(), Refusal(), Template(), Duplicate()]
    cheap += [] if copies else [Copied()]
    scores = [Score(parsed=parsed, corpus=passages, filter=f, search=None) for f in [*cheap, *extra]]
    search = search or Search(index=Index(corpus=corpus, miner=BM25()), queries=parsed, depth=100)
    scores.append(Score(parsed=parsed, corpus=corpus, filter=RoundTrip(max_rank=max_rank), search=search))
    return Select(parsed=parsed, scores=tuple(score for score in scores if score.filter.type not in without))


def gated(
    selected: Stage,
    passages: Stage,
    held_out: Sequence[Stage],
    base: Encoder | None,
    *,
    exemplars: Stage | None = None,
    split: str = "test",
) -> LeakGate:
    """``selected`` without the queries that resemble those of ``split`` in ``held_out``; ``passages`` hold their positives.

    ``exemplars`` are looked at too. With the encoder ``base`` also those are left out that only mean the same.
    """
    sets = tuple(held_out)
    scan = LeakScan(
        selected=selected, corpus=passages, held_out=sets, exemplars=exemplars, encoder=base, split=split
    )  # fmt: skip
    return LeakGate(selected=selected, scan=scan)


def own_round_trip(
    parsed: Stage, corpus: Stage, base: Encoder, *, taught_by: Stage | None = None, depth: int = 100, **training: Any
) -> Search:
    """The search for a round trip by a retriever that has learnt from the same queries before the filter.

    Promptagator's own recipe in two passes (Dai et al. 2022, arXiv 2209.11755, section 3.2): ``base`` is trained on all
    queries of ``parsed``, or on those of ``taught_by`` (such as what the cheap filters keep), against the other passages
    of its batch; then it looks for every query's passage. Give it to a ``Score`` with a ``RoundTrip``, and train the final
    retriever from ``base`` again, on what is kept. ``training`` are fields of ``Train``.
    """
    from dagr_ray.stages.train import Train  # brings Ray Train and torch

    unfiltered = parsed if taught_by is None else taught_by
    examples = Mine(selected=unfiltered, corpus=corpus, negatives=0)
    trained = Train(examples=examples, queries=unfiltered, corpus=corpus, base=base, **training)
    return Search(index=Index(corpus=corpus, miner=Dense(encoder=base), trained=trained), queries=parsed, depth=depth)


def refreshed(
    selected: Stage,
    corpus: Stage,
    base: Encoder,
    *,
    rounds: int,
    steps: int,
    negatives: int = 4,
    margin: float | None = 0.95,
    searches: Sequence[Stage] = (),
    relabel: Callable[[Mine], Stage] | None = None,
    depth: int = 100,
    **training: Any,
) -> Train:
    """A training whose negatives are mined anew by its own last checkpoint every ``steps`` steps, ``rounds`` times.

    The first round mines with ``base``, each later one with the model of the one before, from which it goes on: ANCE
    (Xiong et al. 2020, arXiv 2007.00808), whose index lags behind in the same way. ``searches`` (BM25's, say) take turns
    with the retriever's own. ``relabel`` makes examples with a teacher's scores of what was mined. ``training`` are fields of
    ``Train``; the rate rises and falls once in each round unless they say ``schedule="constant"``. Every round is a
    stage, so a run that stopped goes on where it was.
    """
    from dagr_ray.stages.train import Train  # brings Ray Train and torch

    if rounds < 1:
        raise ConfigError(f"refreshed: rounds = {rounds}; give 1 or more")
    trained: Train | None = None
    seed = training.pop("seed", 0)
    for number in range(rounds):
        own = Search(
            index=Index(corpus=corpus, miner=Dense(encoder=base), trained=trained), queries=selected, depth=depth
        )
        mined = Mine(selected=selected, corpus=corpus, searches=(own, *searches), negatives=negatives, margin=margin)
        trained = Train(
            examples=relabel(mined) if relabel else mined, queries=selected, corpus=corpus, base=base, start=trained,
            steps=steps, seed=seed + number, **training,
        )  # fmt: skip
    assert trained is not None
    return trained


def refine(
    passages: Stage,
    corpus: Stage,
    strategy: Strategy,
    engine: Engine,
    *,
    exemplars: Stage | None,
    rounds: int,
    label: Callable[[Stage], Stage],
    samples: int = 1,
    max_rank: int = 20,
    k: int = 8,
    max_tokens: int = 32,
    until: Literal["filters", "evaluator"] = "filters",
) -> tuple[Mix, tuple[Select, ...]]:
    """Queries of at most ``rounds`` rounds of generator and evaluator: all that were accepted, and those of each step.

    In a round, the passages that have no accepted query yet are asked with the best accepted ones as exemplars (by the
    ``scores`` of ``label``, a teacher's stage for given queries); ``Critique`` names what is wrong with the answers, and
    ``Retry`` writes those again. What comes of either is accepted by the filters. ``until`` says who ends the loop for a
    passage: the filters alone, or also the evaluator where it finds nothing wrong with the last answer. Source: MetaSynth,
    arXiv 2510.01523. Every step is a stage, so a loop that stopped goes on, and the report tells what each of them added.
    """
    sampling = Sampling(max_tokens=max_tokens)
    accepted: list[Select] = []
    verdicts: list[Criticised] = []
    shown, left = exemplars, passages
    for number in range(rounds):
        if number:
            so_far = Mix(arms=tuple(accepted))
            shown = Best(selected=so_far, corpus=corpus, scores=label(so_far), k=k)
            done = tuple(verdicts) if until == "evaluator" else ()
            left = Left(corpus=passages, accepted=tuple(accepted), verdicts=done)
        raw = Generate(
            corpus=left, strategy=strategy, engine=engine, sampling=sampling, samples=samples, exemplars=shown
        )
        parsed = Parse(generations=raw, corpus=left)
        accepted.append(filtered(parsed, left, corpus, max_rank=max_rank))
        pairs = Pairs(queries=parsed, corpus=left)
        verdict = Generate(corpus=pairs, strategy=Critique(), engine=engine, sampling=sampling)
        verdicts.append(Criticised(critiques=verdict))
        again = Rewrite(generations=Generate(corpus=verdicts[-1], strategy=Retry(), engine=engine, sampling=sampling))
        accepted.append(filtered(again, left, corpus, max_rank=max_rank))
    return Mix(arms=tuple(accepted)), tuple(accepted)


class Source(NamedTuple):
    """Queries to train on: their weight, the stage that holds them, and the corpus that holds their passages."""

    weight: float
    queries: Stage
    passages: Stage


def climb(
    rung: Rung,
    sources: Sequence[Source],
    corpus: Stage,
    base: Encoder,
    *,
    n: int,
    negatives: int = 7,
    teacher: Teacher | None = None,
    bm25_share: float | None = None,
    held_out: Sequence[Stage] = (),
    split: str = "test",
) -> tuple[Stage, Stage, tuple[Loss, ...]]:
    """``n`` examples of some queries at a rung of the ladder, the stage with their queries, and the losses to train with.

    * ``in-batch``: a query and its passage, against the other passages of its batch;
    * ``mined``: and against one that BM25 or ``base`` confuse with it, by the positive-aware rule (``Mine``);
    * ``teacher`` and ``filters``: and ``negatives`` of them, which are learnt in the order and at the distances that a
      teacher finds (listwise KL, as in Ren et al., arXiv 2110.07367), with a tenth of the in-batch loss.

    The teacher is, unless another is given, the weighted mean of BM25's z-scores, with a weight of ``bm25_share`` (0.6), and
    ``base``'s; another's scores are logits, as a cross-encoder's are, and so at a temperature of 1. ``filters`` differs
    from ``teacher`` in the queries that are given: see ``filtered``. Several sources are blended by weight (``Blend``).
    Queries that resemble those of ``split`` in ``held_out`` are left out.
    """
    if teacher is not None and bm25_share is not None:
        raise ConfigError(
            f"climb: bm25_share = {bm25_share} is the hybrid teacher's; leave it out beside {teacher.type}"
        )
    bm25_share = 0.6 if bm25_share is None else bm25_share
    if not 0 <= bm25_share <= 1:
        raise ConfigError(f"climb: bm25_share = {bm25_share}; give BM25's share of the teacher, from 0 to 1")
    queries = [gated(s.queries, s.passages, held_out, base, split=split) if held_out else s.queries for s in sources]
    scores = teacher or Hybrid(fusion="z-score", weights=(bm25_share, round(1 - bm25_share, 6)))
    examples = [_examples(rung, each, corpus, base, negatives, scores) for each in queries]
    kl = KL() if teacher is None else KL(teacher_temperature=1.0)
    distilled: tuple[Loss, ...] = (kl, InfoNCE(weight=0.1))
    losses = (InfoNCE(),) if rung in ("in-batch", "mined") else distilled
    if len(sources) == 1:
        return Take(mined=examples[0], n=n), queries[0], losses
    weights = tuple(each.weight for each in sources)
    blend = Blend(examples=tuple(examples), queries=tuple(queries), weights=weights, n=n)
    return blend, blend, losses


def _examples(rung: Rung, queries: Stage, corpus: Stage, base: Encoder, negatives: int, teacher: Teacher) -> Stage:
    if rung == "in-batch":
        return Mine(selected=queries, corpus=corpus, negatives=0)
    miners: tuple[Miner, ...] = (BM25(), Dense(encoder=base))
    searches = tuple(Search(index=Index(corpus=corpus, miner=m), queries=queries, depth=100) for m in miners)
    if rung == "mined":
        return Mine(selected=queries, corpus=corpus, searches=searches, negatives=1)
    # what is relevant besides the positive is the teacher's to say: nothing is left out for scoring near it
    mined = Mine(selected=queries, corpus=corpus, searches=searches, negatives=negatives, margin=None)
    labels = Label(teacher=teacher, queries=queries, corpus=corpus, searches=searches, examples=mined)
    return Relabel(mined=mined, labels=labels)


def shown_split(split: str) -> str:
    """The split that exemplars are drawn from where ``split`` is judged: another one.

    >>> shown_split("test"), shown_split("dev"), shown_split("validation")
    ('dev', 'train', 'train')
    """
    return "train" if split in tables.DEV else "dev"


def named_sets(*data: Stage | str | None) -> dict[str, Stage]:
    """Data sets by a name for each, for ``judge``: what is given twice is there once, and no two have one name.

    A text stands for BEIR folders, joined by ``+``. The name is the stage's label; of a second one with that label, the
    path tells more, and else its content.
    """
    found: dict[str, Stage] = {}
    texts = {each: [Beir(path=path) for path in several(each, "+")] for each in data if isinstance(each, str)}
    for each in [stage for one in data if one for stage in (texts[one] if isinstance(one, str) else [one])]:
        if each.fingerprint() in {other.fingerprint() for other in found.values()}:
            continue
        name = each.label() or each.type
        if name in found:
            places = [str(getattr(other, "path", "")) for other in (each, found[name])]
            name = word_of(told_apart(places)[places[0]]) if all(places) and places[0] != places[1] else name
        found[f"{name}_{each.fingerprint()[:4]}" if name in found else name] = each
    return found


def judge(
    sets: Mapping[str, Stage],
    miner: Miner,
    *,
    trained: Stage | None = None,
    exclude: Stage | None = None,
    split: str = "test",
    leaks: Stage | None = None,
    prefixes: Mapping[str, tuple[str, str]] | None = None,
) -> Scorecard:
    """The scorecard of a retriever on several data sets, the in-distribution one first.

    ``prefixes`` gives a set its own query and passage prefixes in place of the encoder's, as models with instructions
    want them (``{"arguana": ("query: ", "query: ")}``); BM25 has none.

    The best 100 passages of a query count; one more is searched, because a query that is a passage itself is taken out.
    With ``leaks`` (a ``LeakGate``) each set is there twice: as it is, and as ``NAME-untouched`` without the queries that
    the training data resembles.
    """
    unknown = sorted((prefixes or {}).keys() - sets.keys())
    if unknown:
        raise ConfigError(f"judge: prefixes for {unknown[0]!r}, which is no set; allowed: {', '.join(sets)}")
    evaluations = []
    for position, (name, data) in enumerate(sets.items()):
        own = _prefixed(miner, prefixes[name]) if prefixes and name in prefixes else miner
        index = Index(corpus=data, miner=own, trained=trained)
        search = Search(index=index, queries=data, split=split, depth=JUDGED + 1)
        held_out = exclude if position == 0 else None
        evaluations.append(Evaluate(search=search, data=data, split=split, exclude=held_out, name=name, depth=JUDGED))
    if leaks is not None:
        clean = [each.model_copy(update={"name": f"{each.name}-untouched", "leaks": leaks}) for each in evaluations]
        evaluations += clean
    return Scorecard(evaluations=tuple(evaluations))


def _prefixed(miner: Miner, prefixes: tuple[str, str]) -> Miner:
    encoder = getattr(miner, "encoder", None)
    if not isinstance(encoder, Encoder):
        return miner
    query, passage = prefixes
    changed = encoder.model_copy(update={"query_prefix": query, "doc_prefix": passage})
    return miner.model_copy(update={"encoder": changed})
