"""A training that is killed goes on from its last checkpoint and ends as one that was not: same curve, same weights."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import TrainerCallback

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.ray_start import connect
from dagr_ray.losses.info_nce import InfoNCE
from dagr_ray.retrieval import encoder
from dagr_ray.training import loop, texts
from dagr_ray.training.checkpoints import Checkpoints
from dagr_ray.training.dev import Dev
from dagr_ray.training.settings import Settings
from tests.support.object_store import ObjectStore
from tests.support.toys import Toy, distance, tiny, toy_train, weights

ROOT = Path(__file__).parents[2]
OFTEN = Pool(workers=0, checkpoint_every=20)
DRIVER = """
import sys, torch
torch.set_num_threads(1)
from tests.training.test_train_resume import OFTEN, Placement, long, materialize, tiny
materialize(long(base=tiny(model=sys.argv[2]), dropout=0.1), sys.argv[1], Placement(train=OFTEN))
"""


def long(**fields):
    """300 steps, with a checkpoint every 20 of them."""
    return toy_train(Toy(n=40), **{"base": tiny(), "epochs": 60, "batch_size": 8} | fields)


pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("one_thread")]


class Fault(TrainerCallback):
    """The power goes at a step (None: never); ``done`` are the steps of this attempt."""

    def __init__(self, step):
        self.step, self.done = step, []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **_):
        self.done.append(state.global_step)


@pytest.mark.parametrize("cached", [None, 4])
def test_a_resumed_training_equals_an_undisturbed_one(tmp_path, cached):
    """Optimizer, schedule, dropout's random numbers, order of the data, best weights, counts: all go on."""
    folder = materialize(Toy(n=40, dev=8), str(tmp_path))
    settings = Settings(
        losses=(InfoNCE(cached=cached),), epochs=3, batch_size=8, dropout=0.1, lr=1e-3, eval_every=3, precision="float32",
        checkpoint_every=5,
    )  # fmt: skip

    def run(where, *faults):
        data, attempts = texts.fetch(folder, folder, folder), []
        for fault in [*map(Fault, faults), Fault(None)]:
            model = encoder.load(tiny(), device="cpu")
            to, dev = Checkpoints(Artifact(str(tmp_path), where), f"a{fault.step}"), Dev(folder, "dev", folder)
            try:
                made = loop.fit(model, tiny(), data, settings, dev=dev, checkpoints=to, callbacks=[fault])
            except KeyboardInterrupt:
                assert fault.step is not None
            attempts.append(fault.done)
        return made, {name: p.detach().numpy() for name, p in model.named_parameters()}, attempts

    whole, ends, _ = run("whole")
    again, also, attempts = run("again", 4, 7, 11)
    assert attempts == [[1, 2, 3, 4], [*range(1, 8)], [*range(6, 12)], [11, 12]]
    lost = [done[-1] + 1 - following[0] for done, following in itertools.pairwise(attempts)]
    assert max(lost) < settings.checkpoint_every and sum(map(len, attempts)) == 12 + sum(lost)
    assert (again.losses, again.dev, again.counts, again.samples) == (
        whole.losses,
        whole.dev,
        whole.counts,
        whole.samples,
    )
    assert len(whole.losses) == 3 and len(whole.dev) == 5
    assert distance(ends, also) == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return materialize(long(dropout=0.1), str(tmp_path_factory.mktemp("whole")), Placement(train=OFTEN))


def curve(folder):
    return [(row["measure"], row["value"]) for row in folder.read("metrics").to_pylist()]


def wait_for_checkpoint(folder, alive):
    until = time.monotonic() + 90
    while not list(Path(folder.path, "checkpoints").glob("*/rank-0.json")):
        assert alive() and time.monotonic() < until, "no checkpoint came"
        time.sleep(0.02)


def test_a_killed_driver_goes_on_with_the_same_command(undisturbed, tmp_path):
    folder = Artifact(str(tmp_path), undisturbed.name)
    words = [sys.executable, "-c", DRIVER, str(tmp_path), tiny().model]
    driver = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_for_checkpoint(folder, lambda: driver.poll() is None)
    finally:
        driver.kill()
        driver.wait()
    assert folder.manifest is None, "it was killed too late to be a test"
    saved = sorted(path.name for path in Path(folder.path, "checkpoints").iterdir())
    made = materialize(long(dropout=0.1), str(tmp_path), Placement(train=OFTEN))
    assert saved and curve(made) == curve(undisturbed)
    assert distance(weights(made.path), weights(undisturbed.path)) == 0
    assert not Path(folder.path, "checkpoints").exists()
    events = (folder.read_bytes(f"attempts/{sorted(folder.listing('attempts'))[-1]}") or b"").decode()
    assert '"done"' in events and len(folder.listing("attempts")) == 2


def test_a_killed_worker_is_replaced_and_the_curve_is_the_same(tmp_path):
    connect()
    stage = long(epochs=20)
    one = materialize(stage, str(tmp_path / "one"), Placement(train=OFTEN))
    folder = stage.folder(str(tmp_path / "two"))
    killed, helpers = [], []

    def strike():
        wait_for_checkpoint(folder, lambda: True)
        found = {p: " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)}
        helpers.extend(name for name in found.values() if "DatasetManager" in name or "PlacementGroupCleaner" in name)
        working = [p for p, name in found.items() if "RayTrainWorker" in name]
        os.kill(working[-1].pid, signal.SIGKILL)
        killed.append(working[-1].pid)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    two = materialize(stage, folder.runs, Placement(train=Pool(workers=2, cpus=0.9, checkpoint_every=20)))
    assert killed, "it ended before it was struck"
    assert not helpers, "they have no work here"
    ours, theirs = curve(one), curve(two)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs], atol=1e-4)
    assert two.manifest["counts"]["steps"] == 100
    assert not Path(two.path, "checkpoints").exists()


def test_an_incomplete_checkpoint_is_skipped_on_a_store(tmp_path):
    with ObjectStore() as store:
        to = Checkpoints(Artifact(store.uri("runs"), "train-x"), "a")
        for step in (1, 2, 3):
            (tmp_path / str(step)).mkdir()
            (tmp_path / str(step) / "weights").write_text(f"of {step}")
            to.put(step, tmp_path / str(step))
        assert to.last(tmp_path / "first") == 3 and (tmp_path / "first" / "weights").read_text() == "of 3"
        second = Checkpoints(to.folder, "b", rank=1, workers=2)
        second.put(4, tmp_path / "3")  # the first worker's list is missing
        assert second.last(tmp_path / "second") == 3
        with to.folder.fs.open_output_stream(f"{to.root}/00000003-a/weights") as file:
            file.write(b"of 9")
        assert to.last(tmp_path / "third") == 2, "1 is gone, 3 is spoilt"
        to.clear()
        assert to.last(tmp_path / "fourth") is None
