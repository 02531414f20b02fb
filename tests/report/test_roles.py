"""The part that a stage plays is declared by its class: no report and no estimate reads it off the name of a field."""

import ast
from pathlib import Path
from typing import ClassVar

import pytest

from dagr_ray.core import tables
from dagr_ray.core.build import materialize
from dagr_ray.core.config import plugins
from dagr_ray.core.placement import Placement
from dagr_ray.core.stage import Output, Stage, main_inputs_of, role_of, walk
from dagr_ray.report.lineage import ArmFolders as Arm, Folders, funnel
from dagr_ray.study.estimate import estimate

ROOT = Path(__file__).parents[2]
READERS = sorted((ROOT / "dagr_ray" / "report").glob("*.py")) + [
    ROOT / "dagr_ray" / "study" / name for name in ("estimate.py", "mlflow_mirror.py")
]


class Made(Stage):
    """A stage of a plugin: writes the rows that it is told, and rejects some."""

    rows: ClassVar[dict[str, list[dict]]] = {}
    refused: ClassVar[int] = 0

    def open(self, inputs, folder, pool):
        refused = [{"id": f"{self.type}{i}", "by": self.type, "reason": "bad"} for i in range(self.refused)]
        made = {name: tables.table(name, self.rows.get(name, [])) for name in self.outputs if name != "rejected"}
        counts = {"in": 8, "out": 8 - self.refused, "rejected": {f"{self.type}/bad": self.refused}}
        return lambda start, stop: Output(made | {"rejected": tables.table("rejected", refused)}, counts=counts)


class Texts(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "source"
    outputs: ClassVar[tuple[str, ...]] = ("corpus", "rejected")
    rows: ClassVar = {"corpus": [{"doc_id": f"d{i}", "title": "", "text": "t"} for i in range(8)]}


class Writer(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "generate"
    outputs: ClassVar[tuple[str, ...]] = ("generations", "rejected")
    about: Texts
    tone: str = "plain"


class Reader(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "parse"
    rows_from: ClassVar[str] = "written"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    refused: ClassVar[int] = 1
    beside: Texts  # the first field is not the main input
    written: Writer


class Chooser(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "select"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage", "rejected")
    refused: ClassVar[int] = 2
    read: Reader


class Pooled(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "mix"
    rows_from: ClassVar[str] = "many"
    outputs: ClassVar[tuple[str, ...]] = ("queries", "qrels", "lineage")
    many: tuple[Chooser, ...]


class Digger(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "mine"
    outputs: ClassVar[tuple[str, ...]] = ("examples", "rejected")
    refused: ClassVar[int] = 3
    rows: ClassVar = {"examples": [{"query_id": f"q{i}", "positive_id": "d0", "negative_ids": []} for i in range(5)]}
    chosen: Pooled


class Drawn(Digger):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "take"
    rows: ClassVar = {"examples": Digger.rows["examples"][:4]}
    refused: ClassVar[int] = 0
    rows_from: ClassVar[str] = "dug"
    dug: Digger


class Learner(Made):
    abstract: ClassVar[bool] = False
    role: ClassVar[str] = "train"
    rows_from: ClassVar[str] = "lessons"
    outputs: ClassVar[tuple[str, ...]] = ("metrics",)
    others: Chooser
    lessons: Drawn


def chain() -> Learner:
    texts = Texts()
    kept = tuple(Chooser(read=Reader(beside=texts, written=Writer(about=texts, tone=t))) for t in ("plain", "odd"))
    pool = Pooled(many=kept)
    return Learner(others=kept[0], lessons=Drawn(chosen=pool, dug=Digger(chosen=pool)))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("roles"))
    return runs, chain(), materialize(chain(), runs).name


def test_an_arm_of_stages_with_other_fields_is_told_like_any_other(built):
    runs, learner, name = built
    arm, pool = Arm(Folders(runs), name), learner.lessons.chosen
    assert arm.train == name
    assert (arm.examples, arm.used) == (learner.lessons.folder(runs).name, 4)
    assert (arm.mined, arm.accepted) == (learner.lessons.dug.folder(runs).name, 5)
    told = funnel(arm, "plugin")
    assert {(each["step"], each["reason"]): each["rows"] for each in told["rejected"]} == {
        ("parse", "reader/bad"): 2,
        ("select", "chooser/bad"): 4,
        ("mine", "digger/bad"): 3,
    }
    assert [part["folder"] for part in told["parts"]] == [each.folder(runs).name for each in pool.many]
    assert not arm.has_human_pairs


def test_what_a_folder_is_needs_no_class_and_no_names(built):
    runs, learner, _ = built
    for stage in walk(learner):
        for made in (stage.folder(runs).manifest, stage.folder(runs).plan):
            unknown = {**made, "stage": {"type": "of-nobody"}}
            assert role_of(unknown) == stage.role
            assert main_inputs_of(unknown) == [stage.inputs()[each].folder(runs).name for each in stage.main_inputs()]
    # a folder from before this was recorded is known by its class
    older = {k: v for k, v in learner.folder(runs).manifest.items() if k not in ("role", "rows_from")}
    assert role_of(older) == "train" and main_inputs_of(older) == [learner.lessons.folder(runs).name]
    assert (role_of({}), main_inputs_of({"stage": {"type": "of-nobody"}})) == ("", [])


def test_an_estimate_follows_the_rows_and_not_the_fields(built):
    runs, learner, _ = built
    found = estimate(walk(learner), runs, Placement())
    assert found[learner.fingerprint()]["rows"] == 4
    assert found[learner.lessons.fingerprint()]["rows"] == 5
    reader = learner.others.read
    assert found[reader.fingerprint()]["rows"] == 0  # completions, where the texts that it reads are 8


def test_pairs_of_people_are_a_fact_of_the_arm(tmp_path):
    runs = str(tmp_path)

    class OfPeople(Texts):
        abstract: ClassVar[bool] = False
        role: ClassVar[str] = "human"

    texts = OfPeople()
    kept = Chooser(read=Reader(beside=texts, written=Writer(about=Texts())))
    pool = Pooled(many=(kept,))
    learner = Learner(others=kept, lessons=Drawn(chosen=pool, dug=Digger(chosen=pool)))
    assert Arm(Folders(runs), materialize(learner, runs).name).has_human_pairs
    behind = Chooser(read=Reader(beside=Texts(), written=Writer(about=texts)))
    pool = Pooled(many=(behind,))
    learner = Learner(others=behind, lessons=Drawn(chosen=pool, dug=Digger(chosen=pool)))
    assert not Arm(Folders(runs), materialize(learner, runs).name).has_human_pairs


@pytest.mark.parametrize("file", READERS, ids=lambda file: file.name)
def test_no_input_is_looked_up_by_the_name_of_a_field(file):
    """``x["inputs"]["parsed"]``, ``x["inputs"].get("scan")`` and ``"selected" in x["inputs"]``, also by way of a variable."""
    names = {field for kind in plugins(Stage).values() for field in kind.model_fields} - {"name", "split", "n", "type"}
    tree = ast.parse(file.read_text())
    inputs = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_inputs(node.value, set())
    }
    found = []
    for node in ast.walk(tree):
        key, of = None, None
        if isinstance(node, ast.Subscript):
            key, of = node.slice, node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            key, of = node.args[0], node.func.value
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            key, of = node.left, node.comparators[0]
        if isinstance(key, ast.Constant) and key.value in names and of is not None and _is_inputs(of, inputs):
            found.append(f"{file.name}:{node.lineno}: {key.value}")
    assert not found


def _is_inputs(node: ast.AST, variables: set[str]) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "inputs"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "inputs" or (
            node.func.attr == "get" and bool(node.args) and getattr(node.args[0], "value", None) == "inputs"
        )
    return isinstance(node, ast.Name) and node.id in variables
