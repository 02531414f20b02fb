"""A stage: a frozen config that describes one folder.

Its fields decide the result. Fields that are stages, and stages that its class declares (``derived``), are its inputs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from dagr_ray.core.artifact import Artifact, Json
from dagr_ray.core.config import Config, ConfigError, fingerprint_cache, from_json, lookup
from dagr_ray.core.placement import Pool, PricedEngine
from dagr_ray.core.storage import plain_name

Method = TypeVar("Method", bound=Callable[..., Any])


def derived(name: str) -> Callable[[Method], Method]:
    """Declares an input that is not a field: the decorated method computes it from the stage's fields.

    The method returns a stage, or None for no input. If ``name`` contains ``{}``, the method returns a sequence, and ``{}``
    becomes the index. A derived input does not change a fingerprint, because it follows from fields that do.
    """

    def mark(method: Method) -> Method:
        method.derived_input = name  # type: ignore[attr-defined]
        return method

    return mark


class Stage(Config):
    """A step of a recipe. Its fields decide the result; fields that are stages, and declared stages, are its inputs.

    A kind of stage defines ``outputs`` (the tables it writes), ``size`` (how many rows it is sharded over) and ``open``
    (in the worker: loads models and tables, returns the function for rows ``start`` to ``stop``).
    """

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "light"
    starts_workers: ClassVar[bool] = False  # opened in the calling process; the stage itself starts the pool's workers
    concurrent: ClassVar[bool] = False  # one worker runs several shards at once, in threads
    templates: ClassVar[tuple[str, ...]] = ()  # fields with stages that are patterns for others, not inputs
    role: ClassVar[str] = ""  # the part that it plays in a recipe, by which reports and estimates find it
    rows_from: ClassVar[str] = ""  # the field whose stages hold the rows that it works on; without one, its first input
    outputs: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[dict[str, str]] = {}  # inputs whose judgements it reads -> the field with their split
    max_error_rate: ClassVar[float] = 0.01

    def inputs(self) -> dict[str, Stage]:
        """The stages that this one reads, by name; ``name.0``, ``name.1`` for a field with several.

        Do not override it: declare further inputs with ``derived``.
        """
        stages_by_name: dict[str, Stage] = {}
        for name in (field_name for field_name in self.__class__.model_fields if field_name not in self.templates):
            value = getattr(self, name)
            items = value if isinstance(value, tuple) else (value,)
            stages = [item for item in items if isinstance(item, Stage)]
            stages_by_name |= {
                f"{name}.{i}" if isinstance(value, tuple) else name: item for i, item in enumerate(stages)
            }
        for name, method in derived_inputs(type(self)).items():
            derived_value = getattr(self, method)()
            places: list[tuple[Any, Stage | None]] = (
                list(enumerate(derived_value)) if "{}" in name else [("", derived_value)]
            )
            stages_by_name |= {name.replace("{}", str(i)): stage for i, stage in places if stage is not None}
        return stages_by_name

    def main_inputs(self) -> list[str]:
        """The names of the inputs whose rows the stage works on; none for a stage without inputs."""
        names = list(self.inputs())
        return _of_field(self.rows_from, names) or names[:1]

    def shards_of(self) -> Stage | None:
        """The input that the shards divide by rows; None if that is unknown before the stage is built."""
        return None

    def check(self) -> None:
        """Raises ConfigError if the fields contradict each other, as far as that is known before anything is built."""

    def size(self, inputs: Inputs) -> int | None:
        """Rows to shard over; None for a stage without shards."""
        return None

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """The rows of each shard, about ``step`` of them; (0, 0) for a stage without shards."""
        rows = self.size(inputs)
        return [(0, 0)] if rows is None else [(i, min(i + step, rows)) for i in range(0, rows, step)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        """Loads what is heavy and returns the function for a shard. Called in the worker's process."""
        raise NotImplementedError(f"{type(self).__name__} does not implement open")

    def dynamic_inputs(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """Inputs that the stage finds by building other stages, one after the other, with ``build``; by name."""
        return {}

    def skip_row(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """The output for rows ``row`` to ``row + 1`` if that row crashes or hangs its worker, or raises.

        A stage that overrides this loses only such rows; any other stage fails.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot skip a row")

    @property
    def has_dynamic_inputs(self) -> bool:
        return type(self).dynamic_inputs is not Stage.dynamic_inputs

    @property
    def can_skip_rows(self) -> bool:
        return type(self).skip_row is not Stage.skip_row

    def engine_asked(self) -> PricedEngine | None:
        """The engine that the stage's workers ask, itself or through a teacher; None if they ask none."""
        return None

    def cores_held(self, pool: Pool) -> float:
        """The cores that one worker takes: the cores of its engine, or of the pool."""
        engine = self.engine_asked()
        return max(pool.cpus, 1) if engine is None else engine.cores(pool)

    def spoken(self) -> str | None:
        """The language of a source's passages, detected from the first ones; None for a stage that reads other stages."""
        return None

    def remark(self, counts: Json) -> str | None:
        """A one-line warning about a folder that was just completed; None if all is well."""
        return None

    def folder_name(self) -> str:
        return "-".join(part for part in (self.type, self.label(), self.fingerprint()) if part)

    def folder(self, runs: str) -> Artifact:
        """The stage's folder, existing or not. On a local disk, a folder with its fingerprint and another label is used.

        A label may hold the name of a data set's or a model's folder, which users move and rename.
        """
        folder = Artifact(runs, plain_name(self.folder_name(), owner="the stage's folder"))
        if folder.local and not os.path.isdir(folder.path):
            same = _names(folder.runs).get(f"{self.type} {self.fingerprint()}")
            return folder if same is None else Artifact(folder.runs, same)
        return folder


@lru_cache(maxsize=1024)
def derived_inputs(kind: type[Stage]) -> dict[str, str]:
    """Input name -> method name, for all inputs that a stage class declares."""
    methods = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base))
    names = {method: getattr(getattr(kind, method, None), "derived_input", None) for method in methods}
    return {name: method for method, name in names.items() if name is not None}


def _of_field(field: str, inputs: Iterable[str]) -> list[str]:
    """The names of the inputs that a field holds."""
    numbered = re.compile(rf"{re.escape(field)}(\.\d+)?")
    return [name for name in inputs if numbered.fullmatch(name)]


def role_of(made: Json) -> str:
    """The role of the stage that a plan or manifest is of, as its class declares it; "" if it has none."""
    if "role" in made:
        return made["role"]
    kind = _class_of(made)
    return "" if kind is None else kind.role


def main_inputs_of(made: Json) -> list[str]:
    """The folders of the main inputs of the stage that a plan or manifest is of: see ``Stage.main_inputs``."""
    inputs = made.get("inputs", {})
    names = made.get("rows_from")
    if names is None:
        kind = _class_of(made)
        names = _of_field("" if kind is None else kind.rows_from, inputs) or list(inputs)[:1]
    return [inputs[name] for name in names if name in inputs]


def origin_of(made: Json, name: str) -> str:
    """Where an input of a plan or manifest comes from: ``field``, ``declared`` (``derived``) or ``built`` (dynamic inputs)."""
    if any(_of_field(each, [name]) for each in made.get("stage", {})):
        return "field"
    kind = _class_of(made)
    patterns = () if kind is None else (re.escape(each).replace(r"\{\}", r"\d+") for each in derived_inputs(kind))
    return "declared" if kind is None or any(re.fullmatch(each, name) for each in patterns) else "built"


def _class_of(made: Json) -> type[Stage] | None:
    """The class of a folder that was made before plans recorded a role; None if it is not installed here."""
    try:
        return lookup(made.get("stage", {}).get("type"), Stage)
    except ConfigError:
        return None


def _names(runs: str) -> dict[str, str]:
    """Type and fingerprint -> name, of the folders of a local runs folder."""
    try:
        changed = os.stat(runs).st_mtime_ns
        if _listed.get(runs, (0, {}))[0] != changed:
            name_of: dict[str, str] = {}
            for name in sorted(os.listdir(runs)):
                rest, _, fingerprint = name.rpartition("-")
                while rest:  # a type and a label may both have hyphens
                    name_of.setdefault(f"{rest} {fingerprint}", name)
                    rest = rest.rpartition("-")[0]
            _listed[runs] = changed, name_of
    except OSError:
        return {}
    return _listed[runs][1]


# runs folder -> the time of its last change, and its folders
_listed: dict[str, tuple[int, dict[str, str]]] = {}


def parts(value: Any) -> Iterator[Config]:
    """The configs in a field, nested ones included; other stages are not entered."""
    if isinstance(value, Stage):
        return
    if isinstance(value, Config):
        yield value
        value = [getattr(value, name) for name in value.__class__.model_fields]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from parts(item)


def walk(*stages: Stage) -> list[Stage]:
    """All stages that the given ones need, each once by fingerprint, inputs before the stages that read them."""
    seen: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        key = stage.fingerprint()
        if key not in seen:
            for inner in stage.inputs().values():
                visit(inner)
            seen[key] = stage

    with fingerprint_cache():
        for stage in stages:
            visit(stage)
    return list(seen.values())


def load_stage(folder: Artifact) -> Stage:
    """The stage of a folder, from its plan. Raises ConfigError if the folder is not one of a stage."""
    plan = folder.read_json("plan.json")
    if plan is None:
        wrong = folder.problem("plan.json")
        raise ConfigError(
            f"{folder.path!r}: {wrong}; run its job again to rebuild it"
            if wrong
            else f"no plan.json in {folder.path!r}; give a folder that `dagr ls` shows"
        )
    try:
        return from_json(plan["stage"], Stage)
    except ConfigError as error:
        raise ConfigError(
            f"{folder.path!r} is of another version: {error}; run its job again, into a new folder"
        ) from None


class StageFailed(RuntimeError):
    """A stage ended without a result. Its finished shards are kept; the message says how to continue."""


class EngineDied(RuntimeError):
    """The engine is gone and must be opened again. The message is the cause."""


class OutOfReach(StageFailed):
    """A disk, a server or a permission that the stage needs is unavailable: no row is at fault, none is skipped."""


@dataclass
class Output:
    """The output of a shard: tables, files written into the folder (relative), counts, and cost (numbers to add up)."""

    tables: dict[str, pa.Table] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    counts: Json = field(default_factory=dict)
    cost: Json = field(default_factory=dict)


Inputs = dict[str, Artifact]
Run = Callable[[int, int], Output]
