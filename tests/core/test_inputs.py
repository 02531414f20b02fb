"""What a stage reads is among its inputs: its fields, and the stages that its class declares. A stage that opens more fails."""

from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagr_ray.cli import inspect
from dagr_ray.cli.main import parser
from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.attempt import Builder
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, plugins
from dagr_ray.core.folder import reads_only
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Output, Stage, derived, walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.keyboard import KeyboardEngine
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.length import Length
from dagr_ray.filters.round_trip import RoundTrip
from dagr_ray.filters.teacher import Teacher
from dagr_ray.miners.bm25 import BM25
from dagr_ray.miners.dense import Dense
from dagr_ray.stages.aggregate import Aggregate
from dagr_ray.stages.cloze import Cloze
from dagr_ray.stages.describe import Describe
from dagr_ray.stages.dev_split import DevSplit
from dagr_ray.stages.evaluate import Evaluate, Scorecard
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.fuse import Fuse
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.generate_until import GenerateUntil
from dagr_ray.stages.human_labels import WithHumanLabels
from dagr_ray.stages.label import Label
from dagr_ray.stages.leakage import LeakGate, LeakScan
from dagr_ray.stages.mask_pii import Mask
from dagr_ray.stages.mine import Mine
from dagr_ray.stages.mix import HumanPairs, MixExamples, MixQueries
from dagr_ray.stages.pairs import AsQueries, LinkedPairs, Pairs
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.refine import CritiquedPairs, RemainingPassages, TopExemplars
from dagr_ray.stages.relabel import Relabel
from dagr_ray.stages.retrieve import Index, Search
from dagr_ray.stages.rewrite import ConcatCorpora, Expand, Rewrite, WithNegatives
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir, Parquet, Sample
from dagr_ray.stages.take import Take
from dagr_ray.stages.train import Train
from dagr_ray.strategies.critique import Critique
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.noisy import Noisy
from dagr_ray.teachers.hybrid import Hybrid
from tests.conftest import tiny_beir
from tests.support import toys

pytestmark = pytest.mark.slow

HERE = Placement(
    **dict.fromkeys(("generate", "retrieve", "light"), Pool(workers=0, shard_rows=20)), train=Pool(workers=0)
)


class Weights(Stage):
    """A model folder, as a training leaves one."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ()

    def open(self, inputs, folder, pool):
        def run(start, stop):
            source = Path(toys.tiny().folder)
            names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
            for name in names:
                folder.write_bytes(f"model/{name}", (source / name).read_bytes())
            return Output({}, [f"model/{name}" for name in names])

        return run


class Graded(Stage):
    """Grades of two people for the pairs of ``queries``, as ``People`` reads them from files."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("qrels", "ratings")
    queries: Stage

    def open(self, inputs, folder, pool):
        def run(start, stop):
            pairs = inputs["queries"].slice("qrels", 0, 8).to_pylist()
            qrels = [row | {"relevance": i % 4} for i, row in enumerate(pairs)]
            return Output({"qrels": tables.table("qrels", qrels), "ratings": tables.empty("ratings")})

        return run


def recipe(data: str) -> list[Stage]:
    """Stages of nearly every kind, each of which reads others."""
    docs = Beir(path=data)
    shown = Exemplars(corpus=docs, k=2)
    asked = Sample(corpus=docs, n=40, exclude=shown)
    made = Generate(corpus=asked, strategy=Crop(), engine=CropEngine(), samples=2, exemplars=shown)
    parsed = Parse(generations=made, corpus=asked)
    index = Index(corpus=docs, miner=BM25())
    search = Search(index=index, queries=parsed, depth=20)
    filters = [Score(parsed=parsed, corpus=asked, filter=each) for each in (Length(), Duplicate())]
    trip = Score(parsed=parsed, corpus=docs, filter=RoundTrip(max_rank=10), search=search)
    kept = Select(parsed=parsed, scores=(*filters, trip))
    scan = LeakScan(selected=kept, corpus=asked, held_out=(docs,), exemplars=shown)
    clean = LeakGate(selected=kept, scan=scan)
    mined = Mine(selected=clean, corpus=docs, searches=(search,), negatives=2)
    labels = Label(teacher=Hybrid(), queries=clean, corpus=docs, searches=(search,), examples=mined)
    marked = Relabel(mined=mined, labels=labels)
    judged = Label(teacher=Hybrid(), queries=parsed, corpus=docs, searches=(search,))
    liked = Score(parsed=parsed, corpus=asked, filter=Teacher(min_score=0), labels=judged)
    human = HumanPairs(data=docs, split="dev")
    theirs = Mine(selected=human, corpus=docs, searches=(Search(index=index, queries=human, depth=20),), negatives=1)
    blend = MixExamples(examples=(marked, theirs), queries=(clean, human))
    split = DevSplit(examples=blend, queries=blend, corpus=docs, share=0.3)
    goal = GenerateUntil(selected=Select(parsed=parsed, scores=tuple(filters)), accepted=30, first_step=12)
    pairs = Pairs(queries=docs, corpus=docs, split="dev")
    slips = Rewrite(generations=Generate(corpus=pairs, strategy=Noisy(), engine=KeyboardEngine()))
    wrong = CritiquedPairs(critiques=Generate(corpus=pairs, strategy=Critique(), engine=KeyboardEngine()))
    vectors = Index(corpus=docs, miner=Dense(encoder=toys.tiny()), trained=Weights())
    both = tuple(Search(index=each, queries=docs, split="test", depth=20) for each in (index, vectors))
    fused = Fuse(searches=both, method="weights", dev=docs, dev_split="dev", steps=4)
    near = Search(index=index, queries=AsQueries(corpus=asked), depth=5)
    trained = Train(examples=split, queries=blend, corpus=docs, base=toys.tiny(), dev=split, steps=2, eval_every=2)
    people = Graded(queries=kept)
    return [
        Scorecard(evaluations=(Evaluate(search=fused, data=docs, exclude=shown, leaks=clean),)),
        trained,
        goal,
        slips,
        RemainingPassages(corpus=asked, accepted=(kept,), verdicts=(wrong,)),
        LinkedPairs(passages=asked, corpus=docs, search=near),
        Take(mined=WithNegatives(mined=marked, written=(slips,)), n=5),
        MixQueries(arms=(clean, kept)),
        Describe(queries=kept, corpus=docs, human=docs),
        Cloze(corpus=docs, selected=kept),
        Expand(corpus=ConcatCorpora(corpora=(asked, docs)), queries=kept),
        WithHumanLabels(source=kept, people=people, queries=parsed),
        TopExemplars(selected=kept, corpus=docs, scores=liked),
        Aggregate(labels=(judged, Label(teacher=Hybrid(k=5), queries=parsed, corpus=docs, searches=(search,)))),
        Mask(corpus=docs),
    ]


# Stages that read no other stage; and those that only a large index, or a model to tune or of many heads, brings about.
SOURCES = {"beir", "parquet-check", "people", "py-docs", "topics", "trec-qrels", "trec-run"}
ELSEWHERE = {"approximate", "recall-probe", "retrieval-heads", "sharded-search", "tune-generator"}
KINDS = {name: kind for name, kind in plugins(Stage).items() if kind.__module__.startswith("dagr_ray.")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, dict[str, list[Stage]]]:
    """A runs folder, and the stages in it by kind."""
    home = tmp_path_factory.mktemp("inputs")
    data, parquet = str(tiny_beir(home / "set")), home / "passages.parquet"
    rows = [{"doc_id": f"p{i}", "title": "", "text": f"passage {i} of some"} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    stages = [*recipe(data), Parquet(path=str(parquet))]
    for stage in stages:
        materialize(stage, str(home / "runs"), HERE)
    kinds: dict[str, list[Stage]] = {}
    for stage in walk(*stages, *(each.step(0, 12) for each in stages if isinstance(each, GenerateUntil))):
        kinds.setdefault(stage.type, []).append(stage)
    return str(home / "runs"), kinds


def test_every_kind_is_built_below_or_reads_nothing(built):
    assert set(built[1]) - {"weights", "graded"} == (KINDS.keys() - SOURCES - ELSEWHERE) | {"beir", "parquet-check"}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - SOURCES - ELSEWHERE))
def test_a_stage_is_built_where_only_its_inputs_are(built, kind, tmp_path):
    runs, kinds = built
    for stage in kinds[kind]:
        whole = stage.folder(runs)
        named = whole.manifest["inputs"]
        assert stage.inputs().keys() <= named.keys(), named
        there = tmp_path / stage.fingerprint()
        there.mkdir()
        for name in set(named.values()):
            (there / name).symlink_to(Path(runs) / name)
        inputs = {name: Artifact(str(there), folder) for name, folder in named.items()}
        alone = Artifact(str(there), whole.name)
        Builder(stage, inputs, alone, HERE, lambda progress: None).run()
        assert alone.table_names() == whole.table_names()
        for table in whole.table_names():
            if kind != "train":  # its metrics are of a clock's threads
                assert alone.read(table).equals(whole.read(table)), f"{whole.name} {table}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_inputs_are_declared_and_not_overridden(kind):
    assert KINDS[kind].inputs is Stage.inputs
    assert set(KINDS[kind].templates) <= KINDS[kind].model_fields.keys()


# -- a stage that opens a folder outside its inputs ---------------------------------------------------------------------


class Source(Stage):
    """One passage."""

    abstract: ClassVar[bool] = False
    type: ClassVar[str] = "one-passage"
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    number: int = 0

    def open(self, inputs, folder, pool):
        rows = [{"doc_id": f"d{self.number}", "title": "", "text": "text"}]
        return lambda start, stop: Output({"corpus": tables.table("corpus", rows)})


class Nosy(Stage):
    """Copies its corpus, and opens a folder by its name at some point on the way."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Source
    at: str
    name: str

    def _look(self, at, inputs):
        if at == self.at:
            Artifact(inputs["corpus"].runs, self.name)

    def size(self, inputs):
        self._look("size", inputs)
        return 1

    def ranges(self, inputs, step):
        self._look("ranges", inputs)
        return super().ranges(inputs, step)

    def open(self, inputs, folder, pool):
        self._look("open", inputs)

        def run(start, stop):
            self._look("run", inputs)
            return Output({"corpus": inputs["corpus"].read("corpus")})

        return run


@pytest.mark.parametrize("at", ["size", "ranges", "open", "run"])
def test_a_stage_that_opens_a_folder_outside_its_inputs_fails(tmp_path, at):
    one, other, runs = Source(), Source(number=1), str(tmp_path)
    outside = materialize(other, runs).name
    with pytest.raises(ConfigError, match=rf"^nosy: opens {outside!r}, which is none of its inputs; make it a field"):
        materialize(Nosy(corpus=one, at=at, name=outside), runs)
    inside = materialize(one, runs).name
    assert materialize(Nosy(corpus=one, at=at, name=inside), runs).count("corpus") == 1
    Artifact(runs, outside)  # afterwards all is as before


class Growing(Stage):
    """Builds one stage and asks for the folder of another."""

    abstract: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("corpus",)
    templates: ClassVar[tuple[str, ...]] = ("made", "looked_at")
    corpus: Source
    made: Source
    looked_at: Source

    def dynamic_inputs(self, inputs, build):
        made = build(self.made)
        self.looked_at.folder(made.runs)
        return {"made": made}

    def open(self, inputs, folder, pool):
        return lambda start, stop: Output({"corpus": inputs["made"].read("corpus")})


def test_a_stage_can_read_its_dynamic_inputs(tmp_path):
    sources = [Source(number=i) for i in range(3)]
    growing = Growing(corpus=sources[0], made=sources[1], looked_at=sources[1])
    assert growing.inputs() == {"corpus": sources[0]}
    assert materialize(growing, str(tmp_path)).read("corpus")["doc_id"].to_pylist() == ["d1"]
    with pytest.raises(ConfigError, match=r"^growing: opens 'one-passage-"):
        materialize(growing.model_copy(update={"looked_at": sources[2]}), str(tmp_path))


def test_a_folder_that_was_opened_before_is_not_read_either(tmp_path):
    folder, other = (materialize(Source(number=i), str(tmp_path)) for i in (0, 1))
    with reads_only("a stage", [folder]):
        assert folder.count("corpus") == 1
        for read in (lambda: other.count("corpus"), lambda: other.read_json("plan.json"), lambda: other.plan):
            with pytest.raises(ConfigError, match="a stage: opens"):
                read()


class Doubling(Stage):
    """Declares inputs of both forms."""

    abstract: ClassVar[bool] = False
    corpus: Source
    extra: int = 0

    @derived("next")
    def _next(self):
        return Source(number=self.corpus.number + 1) if self.extra else None

    @derived("more.{}.corpus")
    def _more(self):
        return [Source(number=i) if i % 2 else None for i in range(self.extra)]


class Tripling(Doubling):
    """Changes one of them."""

    abstract: ClassVar[bool] = False

    @derived("next")
    def _next(self):
        return Source(number=30)


def test_declared_inputs_stand_beside_the_fields():
    one = Source()
    assert Doubling(corpus=one).inputs() == {"corpus": one}
    some = {
        "corpus": one,
        "next": Source(number=1),
        "more.1.corpus": Source(number=1),
        "more.3.corpus": Source(number=3),
    }
    assert Doubling(corpus=one, extra=4).inputs() == some
    assert Tripling(corpus=one, extra=4).inputs() == some | {"next": Source(number=30)}


def test_show_draws_all_inputs_and_where_they_come_from(built, capsys):
    runs, kinds = built
    [reach] = kinds["generate-until"]
    mined = next(each for each in kinds["mine"] if each.searches[0].queries != each.selected)
    score = next(each for each in kinds["score"] if each.filter.streams)
    notes = {
        (mined, "selected"): "",
        (mined, "searches.0"): "",
        (mined, "searches.0.queries"): "(declared by its class)",
        (score, "whole"): "(declared by its class)",
        (reach, "corpus"): "(declared by its class)",
        (reach, "steps.0"): "(built by the stage)",
    }
    for (stage, name), note in notes.items():
        folder = stage.folder(runs)
        assert not inspect.show(parser().parse_args(["show", folder.name, "--runs", runs]))
        [line] = [each for each in capsys.readouterr().out.splitlines() if each.split()[1:2] == [name]]
        assert line.split(maxsplit=3)[2:] == [folder.manifest["inputs"][name], *filter(None, [note])]
