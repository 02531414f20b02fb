"""The one abstraction: a Stage is a frozen config that describes one folder; ``materialize`` returns that folder.

Composition is nesting, and caching and resuming are the same thing: a folder with the stage's fingerprint is built only
where it is not complete, and only those of its shards that have no receipt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from dagr_ray import blame
from dagr_ray.artifact import Artifact, Damaged, Json
from dagr_ray.builder import Builder, Observer, Progress
from dagr_ray.cluster import Placement, Pool
from dagr_ray.config import Config, ConfigError, fingerprints_held, from_json
from dagr_ray.store import one_name
from dagr_ray.worker import (
    Inputs,
    OutOfReach,
    Output,
    Run,
    StageFailed,
    out_of_memory,
    out_of_reach,
)

__all__ = ["Inputs", "Observer", "Output", "Progress", "Run", "Stage", "StageFailed", "materialize", "survey", "walk"]
log = logging.getLogger("dagr")
# A folder of so many files and bytes is read through before it is handed out: a third of a second.
FEW, SMALL = 256, 1 << 28


class Stage(Config):
    """A step of a recipe. Its fields decide the result; fields that are stages are its inputs.

    A kind of stage says ``outputs`` (the tables it writes), ``size`` (how many rows it is sharded over) and ``open``
    (on the worker: load what is heavy, return the function that does rows ``start`` to ``stop``).
    """

    abstract: ClassVar[bool] = True
    pool: ClassVar[str] = "light"
    starts_workers: ClassVar[bool] = False  # opened in the calling process; the stage itself starts the pool's workers
    concurrent: ClassVar[bool] = False  # one worker runs several shards at once, in threads
    grows: ClassVar[bool] = False  # has `grow`: finds some of its inputs by building them
    rescues: ClassVar[bool] = False  # has `refuse`: a row that ends its worker is given up, the others are kept
    outputs: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[dict[str, str]] = {}  # inputs whose judgements it reads, and the field that names their split
    max_error_rate: ClassVar[float] = 0.01

    def inputs(self) -> dict[str, Stage]:
        """The stages this one reads, by name; ``name.0``, ``name.1`` for a field that holds several."""
        found: dict[str, Stage] = {}
        for name in self.__class__.model_fields:
            value = getattr(self, name)
            several = value if isinstance(value, tuple) else (value,)
            stages = [item for item in several if isinstance(item, Stage)]
            found |= {f"{name}.{i}" if isinstance(value, tuple) else name: item for i, item in enumerate(stages)}
        return found

    def check(self) -> None:
        """Raises ConfigError where the fields cannot be done together, as far as is known before anything is built."""

    def size(self, inputs: Inputs) -> int | None:
        """Rows to shard over; None for a stage that is done in one piece."""
        return None

    def ranges(self, inputs: Inputs, step: int) -> list[tuple[int, int]]:
        """The rows of each shard, about ``step`` of them; (0, 0) for a stage that is done in one piece."""
        rows = self.size(inputs)
        return [(0, 0)] if rows is None else [(i, min(i + step, rows)) for i in range(0, rows, step)]

    def open(self, inputs: Inputs, folder: Artifact, pool: Pool) -> Run:
        """Loads what is heavy and returns the function for one shard. Called in the worker's process."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def grow(self, inputs: Inputs, build: Callable[[Stage], Artifact]) -> Inputs:
        """Builds stages with ``build``, one after the other, and returns the folders that are inputs too, by name."""
        raise NotImplementedError(f"{type(self).__name__} knows all its inputs beforehand")

    def refuse(self, inputs: Inputs, row: int, reason: str, detail: str) -> Output:
        """What rows ``row`` to ``row + 1`` make where that row is given up: it ended or hung its worker, or raised."""
        raise NotImplementedError(f"{type(self).__name__} cannot give up a row")

    def spoken(self) -> str | None:
        """The language of the passages that a source holds, told by its first ones; None for what is made of other stages."""
        return None

    def remark(self, counts: Json) -> str | None:
        """A warning about a folder that was just completed, in one line; None where all is well."""
        return None

    def folder_name(self) -> str:
        return "-".join(part for part in (self.type, self.label(), self.fingerprint()) if part)

    def folder(self, runs: str) -> Artifact:
        """The stage's folder, there or not. On a local disk one with its fingerprint and another label is the same.

        A label may hold the name of a data set's or a model's folder, and these are moved and renamed.
        """
        folder = Artifact(runs, one_name(self.folder_name(), of="the stage's folder"))
        if folder.local and not os.path.isdir(folder.path):
            same = _names(folder.runs).get(f"{self.type} {self.fingerprint()}")
            return folder if same is None else Artifact(folder.runs, same)
        return folder


def _names(runs: str) -> dict[str, str]:
    """Type and fingerprint -> name, of the folders of a local runs folder."""
    try:
        changed = os.stat(runs).st_mtime_ns
        if _listed.get(runs, (0, {}))[0] != changed:
            found: dict[str, str] = {}
            for name in sorted(os.listdir(runs)):
                rest, _, fingerprint = name.rpartition("-")
                while rest:  # a type and a label may both have hyphens
                    found.setdefault(f"{rest} {fingerprint}", name)
                    rest = rest.rpartition("-")[0]
            _listed[runs] = changed, found
    except OSError:
        return {}
    return _listed[runs][1]


# of each runs folder: the time of its last change, and what was in it
_listed: dict[str, tuple[int, dict[str, str]]] = {}


def parts(value: Any) -> Iterator[Config]:
    """A field's configs, one inside the other; not those of another stage, which has its own turn."""
    if isinstance(value, Stage):
        return
    if isinstance(value, Config):
        yield value
        value = [getattr(value, name) for name in value.__class__.model_fields]
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from parts(each)


def walk(*stages: Stage) -> list[Stage]:
    """Every stage that the given ones need, each once by fingerprint, inputs before what reads them."""
    seen: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        key = stage.fingerprint()
        if key not in seen:
            for each in stage.inputs().values():
                visit(each)
            seen[key] = stage

    with fingerprints_held():
        for stage in stages:
            visit(stage)
    return list(seen.values())


def materialize(
    stage: Stage, runs: str, placement: Placement | None = None, observe: Observer | None = None
) -> Artifact:
    """The complete folder of ``stage`` below ``runs``; builds what is missing, inputs first.

    What is damaged is taken back and built again, and so is what was made from something else than its inputs hold now.
    Raises StageFailed where a stage cannot end (what is finished stays), ConfigError for a mistake in the recipe.
    """
    placement, observe = placement or Placement(), observe or (lambda progress: None)
    taken_back: Counter[str] = Counter()
    while True:
        made: dict[str, Artifact] = {}
        inputs: Inputs = {}
        each = stage
        try:
            for each in walk(stage):
                inputs = _inputs(each, made)
                if each.grows and not _is_sound(each.folder(runs)):
                    inputs |= each.grow(inputs, lambda step: materialize(step, runs, placement, observe))
                made[each.fingerprint()] = _build(each, inputs, runs, placement, observe)
            folder = made[stage.fingerprint()]
            inputs = {stage.type: folder}
            if _small(folder) and folder.damaged(deep=True):  # nobody else looks before its reader does
                raise Damaged(f"{folder.path} is not as it was written")
            return folder
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, StageFailed) and not isinstance(error, OutOfReach):
                raise
            if not _take_back(each, inputs, made, error, taken_back):
                _tell(each, each.folder(runs), getattr(placement, each.pool), error)
                raise


def _inputs(stage: Stage, made: dict[str, Artifact]) -> Inputs:
    found = {name: made.get(inner.fingerprint()) for name, inner in stage.inputs().items()}
    changed = next((name for name, folder in found.items() if folder is None), None)
    if changed is not None:
        raise StageFailed(
            f"{stage.type}: what {changed!r} reads was changed during the run; run again, with the new content"
        )
    return cast(Inputs, found)


def _small(folder: Artifact) -> bool:
    manifest = folder.manifest or {"tables": {}, "files": {}}
    files = [*manifest["files"].values(), *(part for each in manifest["tables"].values() for part in each["parts"])]
    return len(files) <= FEW and sum(each["bytes"] for each in files) <= SMALL


def _take_back(
    stage: Stage, inputs: Inputs, made: dict[str, Artifact], error: Exception, taken_back: Counter[str]
) -> bool:
    """Takes back what is damaged of the folders that ``stage`` reads, and says whether there was any.

    First its inputs; those that these were made from too, where a damaged file is what the error tells of.
    """
    further = made if "Damaged" in repr(error) + "".join(traceback.format_exception(error)) else {}
    for folders in (inputs, further):
        damaged: dict[Artifact, dict[int, str]] = {}
        with contextlib.suppress(OSError):  # what is away is not damaged
            damaged = {folder: problems for folder in folders.values() if (problems := folder.damaged(deep=True))}
        for folder, problems in damaged.items():
            if taken_back[folder.name] == 3:
                return False
            taken_back[folder.name] += 1
            log.warning("%s: rebuilding what is damaged: %s", folder.name, _told(problems))
            folder.revoke(problems)
        if damaged:
            return True
    return False


def _told(problems: dict[int, str]) -> str:
    first = next(iter(problems.values()))
    return first if len(problems) == 1 else f"{first}, and {len(problems) - 1} more"


def _tell(stage: Stage, folder: Artifact, pool: Pool, error: Exception) -> None:
    """Raises StageFailed, of one line, if memory, the machine or a worker of Ray's is to blame for a stage's end."""
    if isinstance(error, StageFailed):
        return
    reason = blame.reason(error)
    if reason.startswith(("StageFailed: ", "OutOfReach: ")):  # in a worker, which has told its line
        raise StageFailed(reason.partition(": ")[2]) from error
    if blame.is_of_memory(error) or blame.is_of_a_death(error):
        raise StageFailed(out_of_memory(folder, stage, pool, error)) from error
    if blame.is_of_the_machine(error):
        raise OutOfReach(out_of_reach(folder, error)) from error
    if type(error).__module__.startswith("ray.") and "ConfigError: " not in reason:
        raise StageFailed(f"{folder.path}: {reason}; finished shards are kept") from error


def _build(stage: Stage, inputs: Inputs, runs: str, placement: Placement, observe: Observer) -> Artifact:
    folder = stage.folder(runs)
    if _is_sound(folder):
        observe(Progress(stage, "cached"))
        return folder
    with folder.lock():
        if _is_sound(folder):
            observe(Progress(stage, "cached"))
            return folder
        other = folder.stale()
        if other is not None:
            log.warning("%s: rebuilding all: what it reads (%s) has other content now", folder.name, other)
            folder.restart()
        elif problems := folder.damaged():
            log.warning("%s: rebuilding what is damaged: %s", folder.name, _told(problems))
            folder.revoke(problems)
        try:
            Builder(stage, inputs, folder, placement, observe).run()
        except BaseException:
            observe(Progress(stage, "failed"))
            raise
    return folder


def _is_sound(folder: Artifact) -> bool:
    return folder.manifest is not None and not folder.damaged() and folder.stale() is None


@dataclass
class Status:
    """A line of a dry run: cached, partial (shards done of planned) or to do."""

    stage: Stage
    state: str
    done: int = 0
    of: int = 0
    problem: str = ""


def survey(stages: list[Stage], runs: str, deep: bool = False, repair: bool = False) -> Iterator[Status]:
    """The union of the plans of all stages, each once: what exists, what is partial, what is to do. Builds nothing.

    ``deep`` checks every checksum; ``repair`` revokes the shards that fail it, so that the next run rebuilds them.
    """
    for stage in walk(*stages):
        folder = stage.folder(runs)
        plan = folder.read_json("plan.json")
        there = {"plan.json": plan, "manifest.json": folder.manifest}
        problems = [wrong for file, value in there.items() if value is None and (wrong := folder.problem(file))]
        damaged = folder.damaged(deep)
        if plan is None and not damaged and not problems:
            yield Status(stage, "to do")
            continue
        problems += damaged.values()
        done = len(folder.receipts()) - sum(shard >= 0 for shard in damaged)
        of = len(plan["shards"]) if plan else done
        other = folder.stale()
        if other is not None:
            problems, done = [*problems, f"what it reads ({other}) has other content now"], 0
        complete = folder.manifest is not None and not problems
        if damaged and repair:
            folder.revoke(damaged)
        yield Status(stage, "cached" if complete else "partial", max(done, 0), of, "; ".join(dict.fromkeys(problems)))


def load_stage(folder: Artifact) -> Stage:
    """The stage that a folder was made from, out of its own plan. Raises ConfigError where the folder is none of ours."""
    plan = folder.read_json("plan.json")
    if plan is None:
        wrong = folder.problem("plan.json")
        raise ConfigError(
            f"{folder.path!r}: {wrong}; run its job again, which mends it"
            if wrong
            else f"no plan.json in {folder.path!r}; give a folder that `dagr ls` shows"
        )
    return from_json(plan["stage"], Stage)
