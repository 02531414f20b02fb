"""Runs a training function on a pool's workers with Ray Train, and keeps the model that the first of them saves."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import ConfigError
from dagr_ray.core.folder import reads_only
from dagr_ray.core.placement import Pool
from dagr_ray.core.ray_start import is_alone

# How often a training goes on from its last checkpoint after a worker has died, besides any number of pre-emptions.
RESTARTS = 3


class TrainWorker(NamedTuple):
    """One worker of a training. ``attempt`` is a word that no other attempt has; ``device`` None leaves the choice open."""

    rank: int
    workers: int
    device: str | None
    attempt: str
    inputs: dict[str, Artifact]
    folder: Artifact


Work = Callable[[dict[str, Any], TrainWorker], dict[str, Any] | None]


def fit(
    work: Work, config: dict[str, Any], inputs: dict[str, Artifact], folder: Artifact, pool: Pool
) -> dict[str, Any]:
    """What ``work`` returns on the first of the pool's workers (0: here, by Ray Train's local mode).

    ``work`` reads no other folders than ``inputs`` and the stage's own ``folder``.

    Raises ConfigError if ``work`` does: a mistake of the user's is not tried again.
    """
    import ray.train

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    storage = f"{folder.path}/ray"
    trainer = _trainer_class()(
        _run,
        train_loop_config={
            "work": work,
            "config": config,
            "inputs": inputs,
            "folder": folder,
            "attempt": uuid.uuid4().hex[:8],
            "workers": pool.workers,
            "threads": max(round(pool.cpus), 1),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=pool.workers,
            use_gpu=pool.gpus > 0,
            resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})},
        ),
        # every worker must reach the storage, as it does the folder; nothing is kept there
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=storage,
            storage_filesystem=folder.fs,
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
        ),
    )
    try:
        with _sigint_kept():
            result = trainer.fit().return_value
    finally:
        with contextlib.suppress(FileNotFoundError):
            folder.fs.delete_dir(storage)
    if "refusal" in result:
        raise ConfigError(result["refusal"])
    return result


def _trainer_class() -> Any:
    """TorchTrainer without helper processes that have no work here; each of them costs seconds of a core.

    One hands out Ray data sets, of which there are none. Another frees the places of a controller that died, and asks the
    dashboard for it: on a Ray without one that ends with its driver, it held every training up for 12 s at its end.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    idle = (DatasetsCallback, PlacementGroupCleanerCallback) if is_alone() else (DatasetsCallback,)

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    return LeanTrainer


@contextlib.contextmanager
def _sigint_kept() -> Iterator[None]:
    """Ray Train puts its own handler of Ctrl-C in place and leaves it there."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _run(loop: dict[str, Any]) -> dict[str, Any] | None:
    """On a worker. A mistake of the user's is returned: Ray Train would try again what is raised."""
    import ray.train.torch
    import torch

    rank, workers, device = 0, 1, None
    if loop["workers"]:  # the local mode has no context inside a Tune trial
        context = ray.train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
        device = str(ray.train.torch.get_device())
        torch.set_num_threads(loop["threads"])  # Ray rounds down: 1.8 CPUs were one thread
    inputs, folder = loop["inputs"], loop["folder"]
    try:
        with reads_only(folder.name, (folder, *inputs.values())):
            return loop["work"](loop["config"], TrainWorker(rank, workers, device, loop["attempt"], inputs, folder))
    except ConfigError as error:
        return {"refusal": str(error)}


@contextlib.contextmanager
def model_folder(folder: Artifact) -> Iterator[Path]:
    """An empty local folder; what is in it at the end stands below ``model/`` of the stage's folder, wherever that lies."""
    with tempfile.TemporaryDirectory(prefix="dagr-model-") as scratch:
        target = Path(folder.path if folder.local else scratch) / "model"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier try has written
        target.mkdir(parents=True)
        yield target
        if not folder.local:
            pafs.copy_files(str(target), f"{folder.path}/model", destination_filesystem=folder.fs)


def model_files(target: Path) -> list[str]:
    """The names of the files in a model's folder, below it, in order."""
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
