"""Parsing, filters and selection on Ray's workers, as the cluster's placements have it."""

import os
from pathlib import Path

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool, load_placement
from dagr_ray.core.ray_start import connect
from dagr_ray.core.stage import walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.filters.duplicate import Duplicate
from dagr_ray.filters.length import Length
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


def test_light_stages_write_the_same_on_workers_and_driver(tmp_path) -> None:
    corpus = Beir(path=str(tiny_beir(tmp_path / "set")))
    generate = Generate(corpus=corpus, strategy=Crop(), engine=CropEngine(), samples=2)
    parsed = Parse(generations=generate, corpus=corpus)
    filters = (Length(max_words=8), Duplicate())
    chain = Select(parsed=parsed, scores=tuple(Score(parsed=parsed, corpus=corpus, filter=each) for each in filters))
    light = load_placement(str(ROOT / "cluster" / "one_gpu.toml")).light
    assert light.workers > 0
    few = light.model_copy(update={"workers": 2, "cpus": 0.5, "shard_rows": 50})
    generating = Pool(workers=0, shard_rows=20)
    here = Placement(generate=generating, light=few.model_copy(update={"workers": 0}))
    there = Placement(generate=generating, light=few)
    connect()
    runs = {name: str(tmp_path / name) for name in ("here", "there")}
    assert materialize(chain, runs["here"], here).count("rejected") > 0
    materialize(chain, runs["there"], there)
    for stage in walk(chain):
        one, two = stage.folder(runs["here"]), stage.folder(runs["there"])
        assert one.table_names() == two.table_names()
        for name in one.table_names():
            assert one.read(name).equals(two.read(name)), f"{stage.type} {name}"
        pids = {receipt["pid"] for receipt in two.receipts().values()}
        assert (os.getpid() in pids) == (stage.pool != "light"), stage.type
    assert len(parsed.folder(runs["there"]).receipts()) > 1
