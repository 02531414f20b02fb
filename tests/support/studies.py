"""A study's folders without its hours: the real chain from passages to examples, and retrievers that only have scores."""

from pathlib import Path
from typing import Any

from dagr_ray.core import tables
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.engines import Engine
from dagr_ray.recipes.augmentation import augment, generator_named
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.stages.take import Take
from tests.conftest import tiny_beir

EVIL = "<script>alert('x')</script>"
QUERIES = 60


def put(
    runs: str, name: str, inputs: dict[str, str], made: dict[str, Any], stage: dict[str, Any], cost=None, price=0.0,
    counts=None,
):  # fmt: skip
    """A complete folder with these tables. Its name begins with the type of its stage, unless ``stage`` names one."""
    stage = {"type": name.partition("-")[0]} | stage
    folder = Artifact(runs, name)
    receipt = folder.commit(0, made, {"counts": {}, "cost": {}})
    entries = {
        table: {"rows": part["rows"], "bytes": part["bytes"], "parts": [part]}
        for table, part in receipt["tables"].items()
    }
    manifest = {"stage": stage, "fingerprint": name[-12:], "inputs": inputs, "tables": entries, "files": {}}
    manifest |= {
        "counts": counts or {},
        "cost": {"wall_s": 1.0, **(cost or {})},
        "price": price,
        "attempts": 1,
        "finished": 1.8e9,
    }
    folder.write_json("manifest.json", manifest | {"code": "0", "packages": {"torch": "2"}})
    return name


def card(
    runs: str, name: str, scores: dict[str, list[float]], data: str | dict[str, str], trained: str | None = None
) -> str:
    """A scorecard with these values of nDCG@10 for each data set's queries. ``data`` is the judged folder, or one by data set."""
    evaluations, stages = {}, []
    for i, (where, values) in enumerate(scores.items()):
        rows = [
            {"measure": "nDCG@10", "value": v, "query_id": f"q{q}", "data": where, "split": "test"}
            for q, v in enumerate(values)
        ]
        rows.append(
            {"measure": "nDCG@10", "value": sum(values) / len(values), "query_id": None, "data": where, "split": "test"}
        )
        inputs = {"data": data if isinstance(data, str) else data[where]} | ({"trained": trained} if trained else {})
        stage = {"type": "evaluate", "name": where, "split": "test", "data": where, "search": {"index": {"miner": "m"}}}
        evaluations[f"evaluations.{i}"] = put(
            runs, f"{name}-{i}-evaluate", inputs, {"metrics": tables.table("metrics", rows)}, stage
        )
        stages.append(stage)
    found = [Artifact(runs, e).read("metrics").to_pylist() for e in evaluations.values()]
    every = tables.table("metrics", [row for rows in found for row in rows])
    return put(runs, name, evaluations, {"metrics": every}, {"evaluations": stages})


def made_study(
    root: Path,
    frozen: dict[str, list[float]],
    arms: dict[int, dict[str, list[float]]] | dict[tuple[int, int], dict[str, list[float]]],
    engine: Engine | None = None,
    gated: bool = False,
) -> tuple[str, str]:
    """(runs, study folder) of a study with a frozen base, BM25, and an arm for each number of rows trained on.

    A key may be (rows, seed). ``gated``: the queries went through a leak gate that holds out the corpus's own test split.
    """
    runs = str(root / "runs")
    tiny_beir(root / "set")
    corpus = (root / "set" / "corpus.jsonl").read_text().replace("The amber", f"The {EVIL} amber")
    (root / "set" / "corpus.jsonl").write_text(corpus)
    docs = Beir(path=str(root / "set"))
    strategy, cropping = generator_named("crop")
    asked = Sample(corpus=docs, n=60)
    _, mined = augment(
        asked, docs, strategy, engine or cropping, exemplars=None, samples=2, max_rank=50, held_out=(docs,) * gated
    )
    data = docs.folder(runs).name
    trials = []

    def add(kind: str, params: dict[str, Any], folder: str) -> None:
        trial = {"trial": f"t{len(trials):03d}", "params": params, "kind": kind, "state": "done", "error": None}
        sets = [{"name": name, "split": "test", "data": name, "leaks": None} for name in frozen]
        sets[0]["data"] = data.rpartition("-")[2]
        made = {"folder": folder, "stages": {folder: folder[-12:]}, "judged": sets}
        trials.append(trial | made | {"seconds": 2.0})

    here = Placement(generate=Pool(workers=0), retrieve=Pool(workers=0), light=Pool(workers=0))
    materialize(mined, runs, here)
    add("bm25", {}, card(runs, "scorecard-bm25", {k: [0.3] * len(v) for k, v in frozen.items()}, data))
    add("frozen", {"base": "minilm"}, card(runs, "scorecard-frozen", frozen, data))
    for key, scores in arms.items():
        rows, *seed = key if isinstance(key, tuple) else (key,)
        name = "-".join(map(str, (rows, *seed)))
        take = materialize(Take(mined=mined, n=rows), runs, here)
        train = put(runs, f"train-{name}", {"examples": take.name}, {}, {}, {"train_s": 1.0}, price=0.01 * rows)
        made = card(runs, f"scorecard-{name}", scores, data, train)
        params = {"base": "minilm", "generator": "crop", "volume": rows} | ({"seed": seed[0]} if seed else {})
        add("augmented", params, made)
    study = {"name": "made", "job": "jobs/made.py", "axes": {"volume": list(map(str, arms))}, "created": 1.8e9}
    study |= {"machine": {"cores": 2}, "wall_s": 60.0, "trials": trials}
    Artifact(runs, "study-made-1").write_json("study.json", study)
    return runs, "study-made-1"
