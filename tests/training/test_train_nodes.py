"""A node that holds a share of a training's weights is taken away: the training goes on elsewhere and ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement
from tests.core.test_nodes import by_itself, joined, three_nodes, wait_for
from tests.support.toys import tiny
from tests.training.test_train_resume import OFTEN, curve, long

pytestmark = pytest.mark.cluster

# A driver that joins the cluster of RAY_ADDRESS: `python -c DRIVER model runs`.
DRIVER = """
import sys
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.core.build import materialize
from tests.training.test_train_resume import long
from tests.support.toys import tiny

connect()
pool = Pool(workers=2, cpus=0.9, fsdp=True, checkpoint_every=20)
materialize(long(base=tiny(model=sys.argv[1]), epochs=20), sys.argv[2], Placement(train=pool))
"""


def working(node: Any) -> list[psutil.Process]:
    """The workers of the training on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [p for p in raylet.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_a_training_in_shares_goes_on_without_the_node_of_one(tmp_path: Path) -> None:
    by_itself(goes_on_without, tmp_path, tiny().model)


def goes_on_without(tmp_path: Path, model: str) -> None:
    import torch

    torch.set_num_threads(1)
    stage = long(base=tiny(model=model), epochs=20)
    one = materialize(stage, str(tmp_path / "one"), Placement(train=OFTEN))
    folder = stage.folder(str(tmp_path / "two"))
    with three_nodes() as cluster:
        errors = tmp_path / "errors"
        with joined(cluster, DRIVER, (model, folder.runs), errors) as driver:
            wait_for(lambda: list(Path(folder.path, "checkpoints").glob("*/rank-0.json")), driver, "a checkpoint came")
            gone = next(node for node in cluster.worker_nodes if working(node))
            assert folder.manifest is None, "it ended before it was struck"
            cluster.remove_node(gone, allow_graceful=False)
            assert driver.wait(timeout=120) == 0, errors.read_text()[-2000:]
    assert [name for name, _ in curve(folder)] == [name for name, _ in curve(one)]
    np.testing.assert_allclose([v for _, v in curve(folder)], [v for _, v in curve(one)], atol=1e-4)
    assert folder.manifest is not None and folder.manifest["counts"]["steps"] == 100
    assert not Path(folder.path, "checkpoints").exists()
