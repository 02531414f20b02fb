"""``materialize`` returns a stage's folder and builds what is missing; ``plan`` tells what is missing.

Stages compose by nesting. Caching and resuming are one mechanism: a folder with the stage's fingerprint is built only if
it is incomplete, and then only its shards without a receipt.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from dagr_ray.core import blame
from dagr_ray.core.artifact import Artifact, Damaged
from dagr_ray.core.attempt import Builder, Observer, Progress
from dagr_ray.core.config import ConfigError
from dagr_ray.core.folder import reads_all, reads_only
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Inputs, OutOfReach, Stage, StageFailed, walk
from dagr_ray.core.worker import out_of_memory_message, out_of_reach_message

log = logging.getLogger("dagr")
# A folder with at most this many files and bytes is read fully before it is returned: a third of a second.
FEW, SMALL = 256, 1 << 28


def materialize(
    stage: Stage, runs: str, placement: Placement | None = None, observe: Observer | None = None
) -> Artifact:
    """The complete folder of ``stage`` below ``runs``; builds what is missing, inputs first.

    Damaged parts are revoked and built again, and so are folders whose inputs have changed content. Raises StageFailed
    if a stage cannot finish (finished shards stay), ConfigError for a mistake in the recipe.
    """
    placement, observe = placement or Placement(), observe or (lambda progress: None)
    revoked: Counter[str] = Counter()
    while True:
        folders: dict[str, Artifact] = {}
        inputs: Inputs = {}
        current = stage
        try:
            for current in walk(stage):
                inputs = _inputs(current, folders)
                if current.has_dynamic_inputs and not _is_sound(current.folder(runs)):
                    inputs |= _dynamic_inputs(current, inputs, runs, placement, observe)
                folders[current.fingerprint()] = _build(current, inputs, runs, placement, observe)
            folder = folders[stage.fingerprint()]
            inputs = {stage.type: folder}
            if _small(folder) and folder.damaged(deep=True):  # nobody checks the files before they are read
                raise Damaged(f"{folder.path} is damaged")
            return folder
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, StageFailed) and not isinstance(error, OutOfReach):
                raise
            if not _revoke_damaged(current, inputs, folders, error, revoked):
                _raise_in_one_line(current, current.folder(runs), getattr(placement, current.pool), error)
                raise


def _inputs(stage: Stage, folders: dict[str, Artifact]) -> Inputs:
    inputs = {name: folders.get(inner.fingerprint()) for name, inner in stage.inputs().items()}
    changed = next((name for name, folder in inputs.items() if folder is None), None)
    if changed is not None:
        raise StageFailed(f"{stage.type}: input {changed!r} changed during the run; run again with the new content")
    return cast(Inputs, inputs)


def _dynamic_inputs(stage: Stage, inputs: Inputs, runs: str, placement: Placement, observe: Observer) -> Inputs:
    """The inputs that a stage finds by building them. It can read those, and what they are made from."""
    with reads_only(stage.type, inputs.values()) as readable:

        def build(step: Stage) -> Artifact:
            with reads_all():
                folder = materialize(step, runs, placement, observe)
                readable.update(each.folder(runs).path for each in walk(step))
            return folder

        return stage.dynamic_inputs(inputs, build)


def _small(folder: Artifact) -> bool:
    manifest = folder.manifest or {"tables": {}, "files": {}}
    files = [*manifest["files"].values(), *(part for each in manifest["tables"].values() for part in each["parts"])]
    return len(files) <= FEW and sum(each["bytes"] for each in files) <= SMALL


def _revoke_damaged(
    stage: Stage, inputs: Inputs, folders: dict[str, Artifact], error: Exception, revoked: Counter[str]
) -> bool:
    """Revokes damaged parts of the folders that ``stage`` reads, and returns whether there were any.

    Its inputs come first; if the error is about a damaged file, also the folders from which the inputs were made.
    """
    all_folders = folders if "Damaged" in repr(error) + "".join(traceback.format_exception(error)) else {}
    for folders in (inputs, all_folders):
        damaged: dict[Artifact, dict[int, str]] = {}
        with contextlib.suppress(OSError):  # an unreachable folder is not damaged
            damaged = {folder: problems for folder in folders.values() if (problems := folder.damaged(deep=True))}
        for folder, problems in damaged.items():
            if revoked[folder.name] == 3:
                return False
            revoked[folder.name] += 1
            log.warning("%s: rebuilding what is damaged: %s", folder.name, _first_problem(problems))
            folder.revoke(problems)
        if damaged:
            return True
    return False


def _first_problem(problems: dict[int, str]) -> str:
    first = next(iter(problems.values()))
    return first if len(problems) == 1 else f"{first}, and {len(problems) - 1} more"


def _raise_in_one_line(stage: Stage, folder: Artifact, pool: Pool, error: Exception) -> None:
    """Raises a one-line StageFailed if memory, the machine or a Ray worker caused the end of a stage."""
    if isinstance(error, StageFailed):
        return
    reason = blame.reason(error)
    if reason.startswith(("StageFailed: ", "OutOfReach: ")):  # from a worker, already one line
        raise StageFailed(reason.partition(": ")[2]) from error
    if blame.is_of_memory(error) or blame.is_of_a_death(error):
        raise StageFailed(out_of_memory_message(folder, stage, pool, error)) from error
    if blame.is_of_the_machine(error):
        raise OutOfReach(out_of_reach_message(folder, error)) from error
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
        changed = folder.stale()
        if changed is not None:
            log.warning("%s: rebuilding all: its input %s has other content now", folder.name, changed)
            folder.restart()
        elif problems := folder.damaged():
            log.warning("%s: rebuilding what is damaged: %s", folder.name, _first_problem(problems))
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


def plan(stages: list[Stage], runs: str, deep: bool = False, repair: bool = False) -> Iterator[Status]:
    """The state of every stage that ``stages`` need, each once: finished, partial or to do. Builds nothing.

    ``deep`` checks every checksum. ``repair`` revokes the shards that fail the check, so that the next run rebuilds them.
    """
    for stage in walk(*stages):
        folder = stage.folder(runs)
        saved = folder.read_json("plan.json")
        files = {"plan.json": saved, "manifest.json": folder.manifest}
        problems = [wrong for file, value in files.items() if value is None and (wrong := folder.problem(file))]
        damaged = folder.damaged(deep)
        if saved is None and not damaged and not problems:
            yield Status(stage, "to do")
            continue
        problems += damaged.values()
        done = len(folder.receipts()) - sum(shard >= 0 for shard in damaged)
        of = len(saved["shards"]) if saved else done
        changed = folder.stale()
        if changed is not None:
            problems, done = [*problems, f"its input {changed} has other content now"], 0
        complete = folder.manifest is not None and not problems
        if damaged and repair:
            folder.revoke(damaged)
        yield Status(stage, "cached" if complete else "partial", max(done, 0), of, "; ".join(dict.fromkeys(problems)))
