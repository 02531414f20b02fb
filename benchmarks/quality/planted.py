"""Queries with planted defects, a few cases for each filter: what ``benchmarks/quality/filters.py`` and its test look for.

A new filter gets a case here: a function that writes good rows and bad ones, and says which are bad.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from dagr_ray.core import tables
from dagr_ray.core.stage import Output, Stage
from dagr_ray.core.words import words
from dagr_ray.filters import Filter
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.diversity import Diversity
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.format import Format
from dagr_ray.filters.language import Language
from dagr_ray.filters.length import Length
from dagr_ray.filters.logprob import Logprob
from dagr_ray.filters.pii import Pii
from dagr_ray.filters.refusal import Refusal
from dagr_ray.filters.repetition import Repetition
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.teacher import Teacher
from dagr_ray.filters.template import Template
from dagr_ray.quickstart.models import minilm
from dagr_ray.retrieval.encoder import Encoder

SHARE = 0.3  # of the rows are bad
_THINGS = """
kettle|suspension bridge|barn owl|violin|glacier|bicycle pump|lighthouse|sourdough starter|ceiling fan|tax return
submarine|wind turbine|tomato plant|hard disk|passport|sewing machine|volcano|espresso machine|beehive|telescope
tent|piano|mortgage|solar panel|garden hose|chess clock|steam engine|water filter|snowboard|fire alarm
""".replace("\n", "|")
THINGS = tuple(thing for thing in _THINGS.split("|") if thing)
# A question, and a sentence that answers it in other words.
FACETS = (
    ("how heavy is a {it}", "Most models of the {it} weigh between {a} and {b} kilograms, and a little more in rain."),
    (
        "who came up with the first {it}",
        "An early drawing of the {it} from the year 1{a}{b} is signed by an unknown hand.",
    ),
    (
        "how often should I check my {it}",
        "Owners look after their {it} every {a} weeks in summer and every {b} in winter.",
    ),
    ("{it} keeps making noise at night", "Sounds from the {it} after dark stop once part {a} is fixed to part {b}."),
    ("cheapest way to repair a broken {it}", "Mending the {it} costs {a} crowns in a village and {b} in the capital."),
    (
        "is it allowed to bring a {it} on a train",
        "Carriers accept the {it} as luggage up to size {a} for a fee of {b}.",
    ),
    (
        "{it} compared with older kinds",
        "Since edition {a} of the standard, the {it} differs from its elders in {b} points.",
    ),
    (
        "what breaks first in a {it}",
        "The weakest member of the {it} is its joint, which fails after {a} to {b} cycles.",
    ),
)
FOREIGN = (
    """
wie kopiere ich einen Ordner mit allen Dateien|welche Symptome hat ein verstauchter Knöchel|comment copier un dossier entier
quels sont les symptômes d'une entorse|cómo puedo copiar una carpeta completa|síntomas de un esguince de tobillo
jak skopiować folder z plikami|kto odkrył penicylinę i kiedy|klasör nasıl kopyalanır ve taşınır|как скопировать папку с файлами
симптомы растяжения лодыжки|フォルダをコピーする方法|ペニシリンを発見したのは誰ですか|如何复制文件夹和文件|脚踝扭伤的症状
كيف أنسخ مجلدا كاملا
폴더를 복사하는 방법
πώς αντιγράφω έναν φάκελο|hoe kopieer ik een map met bestanden|kuinka kopioin kansion tiedostoineen
""".strip()
    .replace("\n", "|")
    .split("|")
)
REFUSALS = (
    """
As an AI language model, I cannot write about {}|I'm sorry, but I cannot help with that.|Sure! Here is a query about {}
I am unable to generate a question for this passage|Here are three possible queries about {}|I apologize, the text on {} is unclear
The passage does not contain enough information on {}|I'm just an AI and have no view of {}|Certainly, here is a question on {}
I cannot provide that information.|Unfortunately, I can't answer this question.|{} facts. Let me know if you need more queries
""".strip()
    .replace("\n", "|")
    .split("|")
)
TEMPLATES = (
    """
Query: {}|[insert topic here] {}|{} <|im_end|>|Write a search query for the passage about {}|Passage: {}|{} ____ {}
[/INST] {}|Question 2: {}|{}. Answer: yes|<query> {}|You are a helpful assistant. {}|Given the following passage, {}
### Response: {}|N/A|a relevant query for this passage: {}
""".strip()
    .replace("\n", "|")
    .replace("<|im_end|>", "<¦im_end¦>")
    .replace("|", "\n")
    .replace("¦", "|")
    .split("\n")
)
MARKED = (
    "<p>{}</p>",
    "1. {}",
    "- {}",
    "**{}**",
    "```{}```",
    "{}\n{}",
    "| {} | {} |",
    "Which of the following is true about it?",
    "What is the main idea of the passage?",
    "what does this text describe",
    "?? 12",
)
PERSONAL = (
    "{} jane.doe@mailbox.org",
    "{} call +44 20 7946 0958",
    "{} (202) 456-1111",
    "{} card 4111 1111 1111 1111",
    "{} DE89 3704 0044 0532 0130 00",
    "{} ssn 536-90-4399",
    "{} from 8.8.4.4",
)


class Pair(NamedTuple):
    """A good query and the passage that it is for."""

    query: str
    passage: str


@dataclass
class Case:
    """Rows of which some are bad. Of rows in one group (-1: in none), all but one are bad."""

    filter: Filter
    other: Filter  # the same scores, other thresholds
    texts: list[str]
    passages: list[int]
    bad: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    scores: list[dict[int, float]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def judge(self, refused: Sequence[bool]) -> tuple[float, float]:
        """Precision and recall of what was refused."""
        if self.groups:
            sizes = {g: self.groups.count(g) for g in set(self.groups) - {-1}}
            gone = {g: sum(r for r, own in zip(refused, self.groups, strict=True) if own == g) for g in sizes}
            found, bad = sum(min(gone[g], n - 1) for g, n in sizes.items()), sum(n - 1 for n in sizes.values())
        else:
            found, bad = sum(map(bool.__and__, map(bool, refused), self.bad)), sum(self.bad)
        return found / max(sum(refused), 1), found / max(bad, 1)


@lru_cache(maxsize=4)
def pairs(folder: str | None) -> tuple[Pair, ...]:
    """Made up ones, or those of a BEIR folder: each query judged relevant with the first of its passages."""
    if folder is None:
        rng = random.Random(0)
        made = []
        for thing, (question, answer) in product(THINGS, FACETS):
            a, b = rng.randrange(11, 99), rng.randrange(11, 99)
            other = rng.choice(FACETS)[1].format(it="last one", a=b, b=a)
            made.append(Pair(question.format(it=thing), f"{answer.format(it=thing, a=a, b=b)} {other}"))
        rng.shuffle(made)
        return tuple(made)
    root = Path(folder)
    docs = {row["_id"]: tables.passage_text(row.get("title", ""), row["text"]) for row in _lines(root / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _lines(root / "queries.jsonl")}
    found: dict[str, Pair] = {}
    for file in sorted(root.glob("qrels/*.tsv")):
        for line in file.read_text().splitlines()[1:]:
            query_id, doc_id, relevance = line.split("\t")
            if int(relevance) > 0 and query_id in queries and doc_id in docs:
                found.setdefault(query_id, Pair(queries[query_id], docs[doc_id]))
    every = list(found.values())
    random.Random(0).shuffle(every)
    return tuple(every)


def _lines(path: Path) -> Iterable[dict]:
    with path.open() as handle:
        yield from map(json.loads, handle)


def _mixed(
    rng: random.Random, good: Sequence[Pair], worsen: Callable[[Pair], str], filter: Filter, other: Filter
) -> Case:
    bad = [rng.random() < SHARE for _ in good]
    texts = [worsen(pair) if flag else pair.query for pair, flag in zip(good, bad, strict=True)]
    return Case(filter, other, texts, list(range(len(good))), bad)


def _of(rng: random.Random, forms: Sequence[str]) -> Callable[[Pair], str]:
    return lambda pair: rng.choice(forms).replace("{}", pair.query)


def _sentence(rng: random.Random, pair: Pair) -> list[str]:
    """8 to 14 words of the passage in a row."""
    said = pair.passage.split()
    size = min(rng.randrange(8, 15), len(said))
    start = rng.randrange(len(said) - size + 1)
    return said[start : start + size]


def _gaps(rng: random.Random, pair: Pair) -> str:
    said = _sentence(rng, pair)
    return " ".join(word for i, word in enumerate(said) if i % 4 != 2)


def _length(rng: random.Random, good: Sequence[Pair]) -> Case:
    return _mixed(
        rng,
        good,
        lambda pair: (
            pair.query.split()[-1] if rng.random() < 0.5 else " ".join((pair.query + " and ") for _ in range(40))
        ),
        Length(),
        Length(min_words=1),
    )


def _repetition(rng: random.Random, good: Sequence[Pair]) -> Case:
    def loop(pair: Pair) -> str:
        said = pair.query.split()
        return rng.choice(
            [" ".join([pair.query] * 3), " ".join(said + said[-2:] * 4), "ha" * 9, " ".join(said[:2] + said[-1:] * 6)]
        )

    return _mixed(rng, good, loop, Repetition(), Repetition(max_share=0.9))


def _groups(
    rng: random.Random, good: Sequence[Pair], vary: Callable[[str], str]
) -> tuple[list[str], list[int], list[int]]:
    """A third of the queries once more or twice more, each time a little different."""
    texts, groups, passages = [], [], []
    distinct = list(range(int(len(good) * 0.7)))
    for i in distinct:
        texts.append(good[i].query)
        passages.append(i)
        groups.append(-1)
    while len(texts) < len(good):
        i = rng.choice(distinct[: len(distinct) // 2])
        groups[i] = i
        texts.append(vary(good[i].query))
        passages.append(i)
        groups.append(i)
    return texts, groups, passages


def _duplicate(rng: random.Random, good: Sequence[Pair]) -> Case:
    good = list({" ".join(words(pair.query)).casefold(): pair for pair in good}.values())
    forms = (str.upper, str.title, lambda text: f"{text}?", lambda text: f"  {text} !", lambda text: text)
    texts, groups, passages = _groups(rng, good, lambda text: rng.choice(forms)(text))
    return Case(Duplicate(), Duplicate(copies=2), texts, passages, groups=groups)


def _near(rng: random.Random, good: Sequence[Pair]) -> Case:
    """Word sets of a Jaccard similarity of 0.8 or more; the good ones have less among them."""
    kept: dict[frozenset[str], Pair] = {}
    for pair in good:
        said = frozenset(word.casefold() for word in words(pair.query))
        if said and all(len(said & other) < 0.8 * len(said | other) for other in kept):
            kept[said] = pair

    def vary(text: str) -> str:
        said = text.split()
        rng.shuffle(said)
        return " ".join([*said, "please"] if len({word.casefold() for word in words(text)}) > 4 else said)

    texts, groups, passages = _groups(rng, list(kept.values()), vary)
    near = Duplicate(by="minhash", similarity=0.8)
    return Case(near, Duplicate(by="minhash", similarity=0.999), texts, passages, groups=groups)


def _alike(rng: random.Random, good: Sequence[Pair]) -> Case:
    """The words of a query in another order: nearly the same to the encoder."""
    good = list({" ".join(sorted(words(pair.query))).casefold(): pair for pair in good}.values())

    def vary(text: str) -> str:
        said = text.split()
        return " ".join([*said[1:], said[0]])

    texts, groups, passages = _groups(rng, good, vary)
    encoder = Encoder(model=str(minilm()), max_length=32)
    near = Duplicate(by="embedding", encoder=encoder, similarity=0.8)
    return Case(near, near.model_copy(update={"similarity": 0.9999}), texts, passages, groups=groups)


def _diversity(rng: random.Random, good: Sequence[Pair]) -> Case:
    good = list({" ".join(sorted(words(pair.query))).casefold(): pair for pair in good}.values())

    def turned(text: str) -> str:
        said = text.split()
        rng.shuffle(said)
        return " ".join(said)

    texts, groups, passages = _groups(rng, good, turned)
    n = int(len(good) * 0.7)
    return Case(Diversity(by="k-centre", n=n), Diversity(by="k-centre", n=n // 2), texts, passages, groups=groups)


def _wrong(rng: random.Random, good: Sequence[Pair]) -> tuple[list[str], list[int], list[bool]]:
    """Some of the queries with a passage of another."""
    bad = [rng.random() < SHARE for _ in good]
    passages = [(i + rng.randrange(1, len(good))) % len(good) if flag else i for i, flag in enumerate(bad)]
    return [pair.query for pair in good], passages, bad


def _round_trip(rng: random.Random, good: Sequence[Pair]) -> Case:
    return Case(RoundTrip(max_rank=10), RoundTrip(max_rank=1), *_wrong(rng, good))


def _teacher(rng: random.Random, good: Sequence[Pair]) -> Case:
    """Scores are drawn, lower ones for the wrong passages: what a teacher is worth is not the filter's business."""
    case = Case(Teacher(min_score=0.5), Teacher(min_score=0.6, top_share=0.9), *_wrong(rng, good))
    means = [0.2 if bad else 0.8 for bad in case.bad]
    case.scores = [{own: rng.gauss(mean, 0.1)} for own, mean in zip(case.passages, means, strict=True)]
    return case


def _logprob(rng: random.Random, good: Sequence[Pair]) -> Case:
    """Log-probabilities are drawn, lower ones for what is no query."""
    case = _mixed(rng, good, lambda pair: pair.query[::-1], Logprob(min_logprob=-1.0), Logprob(top=len(good) // 4))
    case.logprobs = [-abs(rng.gauss(2.0 if bad else 0.5, 0.15)) for bad in case.bad]
    return case


CASES: dict[str, tuple[Callable[[random.Random, Sequence[Pair]], Case], ...]] = {
    "format": (lambda rng, good: _mixed(rng, good, _of(rng, MARKED), Format(), Format(allow=("list",))),),
    "length": (_length,),
    "language": (lambda rng, good: _mixed(rng, good, _of(rng, FOREIGN), Language(), Language(min_likeness=0)),),
    "repetition": (_repetition,),
    "refusal": (lambda rng, good: _mixed(rng, good, _of(rng, REFUSALS), Refusal(), Refusal(allow=("chat",))),),
    "template": (
        lambda rng, good: _mixed(rng, good, _of(rng, TEMPLATES), Template(), Template(allow=("placeholder",))),
    ),
    "copied": (
        lambda rng, good: _mixed(rng, good, lambda pair: " ".join(_sentence(rng, pair)), Copied(), Copied(max_share=1)),
        lambda rng, good: _mixed(
            rng, good, lambda pair: _gaps(rng, pair), Copied(measure="lcs"), Copied(measure="lcs", max_share=1)
        ),
    ),
    "duplicate": (_duplicate, _near, _alike),
    "pii": (lambda rng, good: _mixed(rng, good, _of(rng, PERSONAL), Pii(), Pii(mask=True)),),
    "round-trip": (_round_trip,),
    "teacher-score": (_teacher,),
    "logprob": (_logprob,),
    "diversity": (_diversity,),
}


class Planted(Stage):
    """All tables of a case, for ``Score`` to read: query qI for passage dJ, as the case says."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "planted"
    outputs: ClassVar[tuple[str, ...]] = (
        "queries",
        "qrels",
        "lineage",
        "corpus",
        "candidates",
        "scores",
        "generations",
    )
    case: str
    which: int = 0
    rows: Annotated[int, Field(ge=10)] = 200
    seed: int = 0
    data: str | None = None

    def label(self) -> str:
        return self.case

    @property
    def generations(self) -> Stage:
        """What the queries were written in: they stand here too."""
        return self

    def made(self) -> Case:
        """The case itself: the same for the same fields."""
        rng = random.Random(self.seed)
        return CASES[self.case][self.which](rng, pairs(self.data)[: self.rows])

    def open(self, inputs, folder, pool):
        def run(start, stop):
            case, good = self.made(), pairs(self.data)[: self.rows]
            ids = [f"q{i}" for i in range(len(case.texts))]
            docs = [f"d{i}" for i in case.passages]
            gens = [f"g{i}" for i in range(len(case.texts))]
            scored = [(q, d, s) for q, of in zip(ids, case.scores, strict=False) for d, s in of.items()]
            lineage = {"id": ids, "gen_id": gens, "source_id": docs, "strategy": "s", "engine": "e", "model": "m"}
            columns = {
                "queries": {"query_id": ids, "text": case.texts},
                "qrels": {"query_id": ids, "doc_id": docs, "relevance": 1},
                "lineage": lineage,
                "corpus": {
                    "doc_id": [f"d{i}" for i in range(len(good))],
                    "title": "",
                    "text": [pair.passage for pair in good],
                },
                "scores": {
                    "query_id": [q for q, _, _ in scored],
                    "doc_id": [f"d{d}" for _, d, _ in scored],
                    "scorer": "planted",
                    "score": [s for _, _, s in scored],
                },
                "generations": {
                    "gen_id": gens,
                    "source_id": docs,
                    "sample": 0,
                    "seed": 0,
                    "prompt_sha": "",
                    "truncated": False,
                    "logprob": case.logprobs or None,
                },
            }
            first = {name: next(iter(values.values())) for name, values in columns.items()}
            return Output({n: tables.columns(n, len(first[n]), **values) for n, values in columns.items()})

        return run
