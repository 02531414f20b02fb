"""Bills beside what was really used: a server that counts its tokens, a clock around killed drivers, and sums."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from dagr_ray import report
from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.cost import AttemptCost, Rates, resources_held, shard_bill, stage_bill, with_remaining_budget
from dagr_ray.core.placement import Placement, Pool, Prices, TokenPrices
from dagr_ray.core.stage import StageFailed, walk
from dagr_ray.core.worker import TRIES_PER_SHARD, Opener
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart.models import smollm2
from dagr_ray.recipes.augmentation import augment, generator_named
from dagr_ray.report import bills
from dagr_ray.report.lineage import Folders
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.take import Take
from dagr_ray.strategies.crop import Crop
from dagr_ray.study.estimate import estimate
from tests.conftest import tiny_beir
from tests.support.billed import Hold, Killed, adds_up, answers, asked, both, usage_of, used
from tests.support.endpoint import drop, served, status
from tests.support.studies import made_study

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

ROOT = Path(__file__).parents[2]
HERE = Placement(generate=Pool(workers=0, shard_rows=8), prices=Prices(cpu_hour=3600.0))  # a dollar a second
PRICES = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_completion_tokens": 8.0}

DRIVER = """
import sys
from dagr_ray.core.placement import Placement
from dagr_ray.core.ray_start import connect
from dagr_ray.core.config import from_json
from dagr_ray.core.stage import Stage
from dagr_ray.core.build import materialize
import json
stage, runs, placement = json.loads(sys.argv[1]), sys.argv[2], from_json(json.loads(sys.argv[3]), Placement)
if placement.generate.workers:
    connect()
materialize(from_json(stage, Stage), runs, placement)
"""


@pytest.mark.parametrize(("workers", "kills"), [(0, 4), (1, 2)])
def test_the_bill_matches_the_server_after_kills_and_damage(tmp_path, workers, kills):
    chance, lived, runs, hold = random.Random(4), 0.0, str(tmp_path / "runs"), Hold()
    tiny_beir(tmp_path / "set", docs=150)
    pool = Pool(workers=workers, cpus=0.5, shard_rows=10, in_flight=1)
    placement = Placement(generate=pool, prices=Prices(cpu_hour=3600))
    with served(answers(delay=0.03, hold=hold)) as server:
        stage = asked(tmp_path / "set", server, in_flight=2)
        words = [sys.executable, "-c", DRIVER, json.dumps(stage.to_json()), runs, json.dumps(placement.to_json())]
        for _ in range(kills):
            before, began = len(server.seen), time.time()
            hold.after(before + 10 * chance.randint(1, 2) + chance.randint(2, 7))
            driver = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
            while len(server.seen) <= hold.most:
                time.sleep(0.01)
                assert driver.poll() is None, "the driver was to be killed in the middle"
            # with all that it has started: a worker that outlived it would end its shard
            processes = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
            for process in processes:
                process.send_signal(signal.SIGKILL)
            driver.wait()
            lived += time.time() - began
            hold.end()
        folder = stage.folder(runs)
        partial = adds_up(runs, folder.name)
        assert partial["state"] != "complete" and partial["under_way"]["rows"] > 0
        assert (
            both(partial["tokens"]) + partial["waste"]["tokens"] + partial["under_way"]["tokens"] >= used(server) * 0.8
        )

        began = time.time()
        subprocess.run(words, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        lived += time.time() - began
        whole = adds_up(runs, folder.name)
        assert (whole["rows"]["in"], whole["rows"]["out"], whole["attempts"]) == (150, 150, kills + 1)
        assert both(whole["tokens"]) < used(server), "the kills cost nothing: they came at the wrong time"
        # rows of a shard differ by a few bytes, and what is lost counts as the same rows again
        assert used(server) <= both(whole["tokens"]) + whole["waste"]["tokens"] + 10
        assert whole["waste"]["tries"] >= 2
        assert whole["waste"]["tokens"] <= 0.5 * both(whole["tokens"])
        assert 150 * 0.03 / 2 < whole["seconds"]["wall"] <= lived
        assert whole["usd"]["held"] == pytest.approx(whole["seconds"]["held"], rel=1e-9)
        assert whole["usd"]["work"] == pytest.approx(whole["seconds"]["busy"], rel=1e-9)
        assert folder.manifest["cost"]["wall_s"] == whole["seconds"]["wall"]

        part = next((Path(folder.path) / "generations").glob("part-00003-*"))
        part.unlink()
        if workers:
            placement = placement.model_copy(update={"generate": pool.model_copy(update={"workers": 0})})
        materialize(stage, runs, placement)
        again = adds_up(runs, folder.name)
        assert again["tokens"] == whole["tokens"] and again["rows"] == whole["rows"]
        lost = again["waste"]["tokens"] - whole["waste"]["tokens"]
        assert again["waste"]["shards"] == whole["waste"]["shards"] + 1 and lost == pytest.approx(
            both(again["tokens"]) / 15, rel=0.1
        )
        assert again["usd"]["waste"] > whole["usd"]["waste"] and again["usd"]["total"] > whole["usd"]["total"]
        assert used(server) <= both(again["tokens"]) + again["waste"]["tokens"] + 10
        assert folder.manifest["bill"]["usd"] == again["usd"]


@pytest.mark.parametrize("committed", [False, True])
def test_uncommitted_work_is_billed_and_committed_work_once(tmp_path, monkeypatch, committed):
    def commit(folder, shard, *rest, really=Artifact.commit):
        receipt = really(folder, shard, *rest) if shard < 2 or committed else None
        if shard == 2:
            raise Killed
        return receipt

    runs = str(tmp_path / "runs")
    tiny_beir(tmp_path / "set", docs=40)
    placement = Placement(generate=Pool(workers=0, shard_rows=10))
    with served(answers()) as server:
        stage = asked(tmp_path / "set", server)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Artifact, "commit", commit)
            materialize(stage, runs, placement)
        partial = adds_up(runs, stage.folder(runs).name)
        assert partial["state"] == f"{3 if committed else 2}/4 shards"
        assert partial["under_way"]["rows"] == (0 if committed else 10)
        folder = materialize(stage, runs, placement)
        whole = adds_up(runs, folder.name)
        assert len(server.seen) == (40 if committed else 50)
        assert both(whole["tokens"]) + whole["waste"]["tokens"] == pytest.approx(used(server), abs=10)
        folder.revoke([2])
        materialize(stage, runs, placement)
        again = adds_up(runs, folder.name)
        assert both(again["tokens"]) + again["waste"]["tokens"] == pytest.approx(used(server), abs=20)
        assert folder.listing("tries") == {}


def test_a_stage_fails_if_workers_die_while_writing_a_shard(tmp_path, monkeypatch):
    def commit(*_):
        raise Killed

    tiny_beir(tmp_path / "set", docs=40)
    with served(answers()) as server:
        stage = asked(tmp_path / "set", server)
        inputs = {"corpus": materialize(stage.corpus, str(tmp_path / "runs"), HERE)}
        opened = Opener(stage, inputs, stage.folder(str(tmp_path / "runs")), Pool(workers=1, shard_rows=10), "1-a")
        with monkeypatch.context() as patched:
            patched.setattr(Artifact, "commit", commit)
            for _ in range(TRIES_PER_SHARD):
                with pytest.raises(Killed):
                    opened()({"shard": 0, "start": 0, "stop": 10})
        with pytest.raises(StageFailed, match="shard 0 was finished 3 times and its worker died while it wrote"):
            opened()({"shard": 0, "start": 0, "stop": 10})
        opened.attempt = "2-b"  # who runs it again has perhaps freed some memory
        cost = opened()({"shard": 0, "start": 0, "stop": 10})["cost"]
        assert len(server.seen) == 40 and cost["lost_tries"] == 3
        assert cost["lost_tokens"] == 3 * (cost["prompt_tokens"] + cost["completion_tokens"])


def test_token_prices_replace_machine_prices(tmp_path):
    tiny_beir(tmp_path / "set", docs=20)
    found = {}
    for name, fields in {"each": {}, "at once": {"one_request": True}}.items():
        with served(answers()) as server:
            stage = asked(tmp_path / "set", server, samples=3, usd_per_million_cached_tokens=0.5, **PRICES, **fields)
            folder = materialize(stage, str(tmp_path / name), HERE)
        made = found[name] = adds_up(str(tmp_path / name), folder.name)
        usage = [usage_of(body) for body in server.seen]
        prompt, written = (sum(u[key] for u in usage) for key in ("prompt_tokens", "completion_tokens"))
        cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
        assert made["tokens"] == {"prompt": prompt, "cached": cached, "completion": written}
        assert folder.manifest["price"] == pytest.approx(((prompt - cached) * 2 + cached * 0.5 + written * 8) / 1e6)
        assert (made["usd"]["waste"], made["usd"]["setup"], made["usd"]["waiting"]) == (0, 0, 0)
        assert len(server.seen) == (60 if name == "each" else 20)
        assert folder.count("generations") == 60
    assert found["each"]["tokens"]["prompt"] == 3 * found["at once"]["tokens"]["prompt"]
    assert found["each"]["tokens"]["completion"] == found["at once"]["tokens"]["completion"]


def test_model_prices_come_from_the_placement_by_default(tmp_path):
    table = {"tokens": {"m@1": {"prompt": 3.0}, "default": {"completion": 5.0}}, "cpu_hour": 1.0}
    prices = from_json(table, Prices)
    assert from_json(prices.to_json(), Prices) == prices

    def engine(**fields):
        return OpenAIServer(base_url="https://host/v1", **{"model": "m"} | fields)

    assert engine(revision="1").token_prices(prices) == TokenPrices(prompt=3)
    assert engine().token_prices(prices) == TokenPrices(completion=5)
    assert engine(**PRICES).token_prices(prices) == TokenPrices(prompt=2, completion=8)
    assert engine().token_prices(Prices()) is None
    assert Rates.from_prices(prices, generator_named("crop")[1]).tokens is None


def test_failed_attempts_are_waste(tmp_path):
    tiny_beir(tmp_path / "set", docs=16)

    def react(body, nth):
        lost = lambda handler, body: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")  # noqa: E731
        refused = status(500)
        return answers()(body, nth) if nth or body["seed"] % 2 else (lost if body["seed"] % 4 else refused)

    with served(react) as server:
        stage = asked(tmp_path / "set", server, **PRICES)
        folder = materialize(stage, str(tmp_path / "runs"), HERE)
    made = adds_up(str(tmp_path / "runs"), folder.name)
    billed = [body for body in server.seen if body["seed"] % 2 == 0 and body["seed"] % 4]
    retries = len(server.seen) - 16
    assert made["waste"]["retries"] == retries > len(billed) / 2 > 0
    # an answer that is none was paid for, a refusal was not; each of the former was asked twice
    lost = [body for i, body in enumerate(billed) if body["seed"] in {b["seed"] for b in billed[:i]}]
    assert made["waste"]["tokens"] == sum(len(body["prompt"].encode()) + stage.sampling.max_tokens for body in lost)
    assert 0 < made["usd"]["waste"] < made["usd"]["work"] * 4


def test_a_resumed_stage_is_billed_for_all_its_attempts(tmp_path):
    tiny_beir(tmp_path / "set", docs=32)
    with served(answers(delay=0.05)) as server:
        stage = asked(tmp_path / "set", server, in_flight=1)
        stop = {"after": 3}

        def observe(progress):
            if progress.stage == stage and progress.state == "running" and progress.shards == stop["after"]:
                raise KeyboardInterrupt

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                materialize(stage, str(tmp_path / "runs"), HERE, observe)
            stop["after"] = -1 if stop["after"] == 3 else 0
            if stop["after"] == -1:
                break
        first = adds_up(str(tmp_path / "runs"), stage.folder_name())
        assert first["usd"]["total"] >= 24 * 0.05
        folder = materialize(stage, str(tmp_path / "runs"), HERE)
    whole = adds_up(str(tmp_path / "runs"), folder.name)
    assert whole["attempts"] == 2 and folder.manifest["price"] == whole["usd"]["total"]
    assert 32 * 0.05 <= whole["usd"]["work"] <= whole["usd"]["total"] < 32 * 0.05 + 20
    assert whole["usd"]["total"] > first["usd"]["total"] + 8 * 0.05


def test_a_budget_holds_across_runs(tmp_path):
    tiny_beir(tmp_path / "set", docs=40)
    runs, money = str(tmp_path / "runs"), {"usd_per_million_prompt_tokens": 1e6}  # a dollar a token
    with served(answers()) as server:
        whole = sum(len(row["text"].encode()) for row in _rows(tmp_path / "set"))
        here = HERE.model_copy(update={"generate": Pool(workers=0, shard_rows=2)})
        for i, budget in enumerate([0.4 * whole, 0.4 * whole, 0.7 * whole]):
            stage = asked(tmp_path / "set", server, in_flight=1, budget_usd=budget, **money)
            with pytest.raises(ConfigError, match="budget_usd"):
                materialize(stage, runs, here)
            asked_for = sum(usage_of(body)["prompt_tokens"] for body in server.seen)
            assert asked_for <= budget, f"run {i} went over"
        assert asked_for > 0.6 * whole, "a raised budget was to be used"
        made = materialize(asked(tmp_path / "set", server, budget_usd=3 * whole, **money), runs, here)
    assert made.manifest["counts"]["out"] == 40
    assert bills.stage(runs, made.name)["usd"]["work"] == whole
    spent = asked(tmp_path / "set", server, budget_usd=0.9 * whole, **money).engine
    for at_work in (True, False):
        with pytest.raises(ConfigError, match=r"is spent on generate-.*raise budget_usd and run again") as caught:
            with_remaining_budget(spent, made, 1, at_work)
        assert "\n" not in str(caught.value)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "corpus.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("outage", ["refuses", "gone"])
def test_after_an_outage_only_failed_shards_are_repeated(tmp_path, outage):
    tiny_beir(tmp_path / "set", docs=64)
    runs = str(tmp_path / "runs")

    def react(body, nth):
        if len(server.seen) == 40 and outage == "gone":
            server.socket.close()  # no new connection; and the one that is open ends with this answer
            return lambda handler, body: (answers()(body, nth)(handler, body), drop(handler, body))
        return status(503) if len(server.seen) > 40 else answers()(body, nth)

    with served(react) as server:
        stage = asked(tmp_path / "set", server, in_flight=1, max_attempts=1)
        with pytest.raises(StageFailed, match="answers no request.*no row was skipped"):
            materialize(stage, runs, HERE)
        assert 40 <= len(server.seen) <= 43, "soon: a request may have been begun beside the one that failed"
    first = adds_up(runs, stage.folder_name())
    assert (first["rows"]["errors"], first["rows"]["out"]) == (0, 40)
    with served(answers()) as server:
        folder = materialize(asked(tmp_path / "set", server), runs, HERE)
        assert len(server.seen) == 24, "exactly the three shards that were not there"
    made = adds_up(runs, folder.name)
    assert (made["rows"]["errors"], made["rows"]["out"], made["waste"]["shards"]) == (0, 64, 0)
    assert folder.count("generations") == 64


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """(runs, study folder): two volumes of one generator in which a shard was built twice."""
    root = tmp_path_factory.mktemp("arms")
    runs, data = str(root / "runs"), Beir(path=str(tiny_beir(root / "set")))
    _, mined = augment(data, data, *generator_named("crop"), exemplars=None, samples=2, max_rank=100)
    generate = next(stage for stage in walk(mined) if isinstance(stage, Generate))
    folder = materialize(generate, runs, HERE)
    next((Path(folder.path) / "generations").glob("part-00002-*")).unlink()
    trials = []
    for volume in (8, 24, 40):
        take = Take(mined=mined, n=volume)
        if volume < 40:
            materialize(take, runs, HERE)
        stages = {stage.folder_name(): stage.fingerprint() for stage in walk(take)}
        state = "done" if volume < 40 else "pending"
        trial = {"trial": f"t{volume}", "kind": "augmented", "state": state, "error": None, "seconds": 1.0}
        trials.append(trial | {"params": {"volume": volume}, "folder": take.folder_name(), "stages": stages})
    Artifact(runs, "study-arms-1").write_json("study.json", {"name": "arms", "trials": trials})
    return runs, "study-arms-1"


def test_stages_and_trials_of_a_study_add_up_to_one_total(arms):
    found = bills.study(*arms)
    total = found["total"]
    assert total["usd"]["total"] > 0 and total["waste"]["shards"] == 1
    assert sum(trial["usd"] for trial in found["trials"]) == pytest.approx(total["usd"]["total"])
    assert sum(line["usd"]["total"] for line in found["stages"]) == pytest.approx(total["usd"]["total"])
    for line in found["stages"]:
        made = adds_up(arms[0], line["folder"])
        assert made["usd"]["total"] == pytest.approx(line["usd"]["total"])
    shared = [line for line in found["stages"] if line["type"] == "generate"]
    assert len(shared) == 1 and shared[0]["trials"] == 3
    assert shared[0]["usd"]["total"] == Folders(arms[0]).manifest_or_empty(shared[0]["folder"])["price"]
    small, _, pending = found["trials"]
    assert small["alone_usd"] > small["usd"] > pending["usd"] > 0


def test_bills_for_people_say_the_totals(arms):
    runs, study = arms
    found = bills.study(runs, study)
    words = [sys.executable, "-m", "dagr_ray.cli.main", "bill", "--runs", runs]

    def said(*more):
        return subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    shown = said("study-arms")
    assert all(line["folder"] in shown for line in found["stages"])
    assert "1 shards revoked" in shown
    one = said("generate-crop")
    assert "rows     60 in, 120 out" in one and " = " in one
    assert json.loads(said("--json"))["total"] == json.loads(json.dumps(bills.everything(runs)["total"]))
    assert len(json.loads(said("generate-crop", "--json"))["shards"]) == 8


def test_a_stage_that_holds_all_workers_is_billed_for_them(tmp_path):
    held = resources_held(Pool(workers=3, cpus=2, gpus=1), together=True)
    attempt = AttemptCost("001", 100.0, 110.0, held)
    rates = Rates(cpu_hour=36.0, gpu_hour=360.0)
    assert attempt.held_s == 30 and attempt.usd(attempt.held_s, rates) == pytest.approx(30 * (2 * 0.01 + 0.1))
    receipt = {"counts": {"in": 1, "out": 1}, "cost": {"start_s": 1.0, "busy_s": 8.0, "idle_s": 0.5, "setup_s": 3.0}}
    line = shard_bill(receipt, attempt, rates)
    assert (
        line["seconds"]["busy"] == 15 and line["seconds"]["start"] == 12
    )  # a training starts its workers while it is busy
    spent = {"setup": 12 * 0.12, "work": 15 * 0.12, "waiting": 1.5 * 0.12, "waste": 0.0}
    assert line["usd"] == pytest.approx(spent)


class Wide(CropEngine):
    """An engine that takes more cores than its pool asks Ray for."""

    abstract: ClassVar[bool] = True
    type: ClassVar[str] = "wide"

    def cores(self, pool):
        return 3.0


def test_an_engine_s_cores_are_billed_also_in_older_folders(tmp_path):
    corpus = Beir(path=str(tiny_beir(tmp_path / "set")))
    stage = Generate(corpus=corpus, strategy=Crop(), engine=Wide())
    runs = str(tmp_path / "runs")
    [guess] = list(estimate([stage], runs, HERE).values())
    folder = materialize(stage, runs, HERE)
    whole = adds_up(runs, folder.name)
    assert whole["seconds"]["held_cpu"] == pytest.approx(3 * whole["seconds"]["held"])
    assert whole["usd"]["held"] == pytest.approx(3 * whole["seconds"]["held"])  # at a dollar a second
    assert whole["usd"]["work"] == pytest.approx(3 * whole["seconds"]["busy"])
    assert guess["price"] == pytest.approx(3 * guess["busy_seconds"]) and guess["busy_seconds"] < guess["seconds"]
    # what was written before receipts told it
    for path in Path(folder.path, "receipts").iterdir():
        value = json.loads(path.read_text())
        assert value.pop("cpus") == 3.0 and value.pop("seal")
        path.write_text(json.dumps(value))
    [log] = Path(folder.path, "attempts").iterdir()
    events = [json.loads(line.replace('"cpus": 3.0', '"cpus": 1')) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in each.items() if k != "seal"}) + "\n" for each in events))
    older = stage_bill(folder, folder.receipts().values(), Rates(cpu_hour=3600.0))
    assert older["seconds"]["held_cpu"] == pytest.approx(whole["seconds"]["held"])


def test_vllm_on_a_cpu_takes_its_share_of_the_machine():
    engine, cores = VLLM(model=str(smollm2())), len(os.sched_getaffinity(0))
    assert engine.cores(Pool(workers=1, cpus=1)) == engine.cores(Pool(workers=0)) == cores
    assert engine.cores(Pool(workers=cores)) == 1 and engine.cores(Pool(workers=1, cpus=cores + 2)) == cores + 2


def test_page_and_terminal_show_cached_and_computed_tokens(tmp_path):
    scores = {"in": [0.1 + 0.01 * i for i in range(60)]}
    with served(answers()) as server:
        engine = OpenAIServer(model="m", base_url=server.url, **PRICES)
        runs, name = made_study(tmp_path, scores, {8: scores, 16: scores}, engine)
    summary = report.summarise(runs, name)
    [generator] = summary["generators"]
    prompts = [len(body["prompt"].encode()) for body in server.seen]
    computed, cached = sum(n - n // 3 for n in prompts), sum(n // 3 for n in prompts)
    assert (generator["prompt_tokens"], generator["cached_tokens"]) == (sum(prompts), cached)
    with open(report.write_page(summary, runs, name)) as page:
        assert f"{computed:,} computed, {cached:,} (33 %) from the engine&#39;s cache" in page.read().replace(
            "'", "&#39;"
        )
    assert f"Of its {sum(prompts):,} prompt tokens, 33% came from the engine's cache" in report.terminal_table(summary)
    tokens = (2 * sum(prompts) + 8 * 5 * len(prompts)) / 1e6
    others = [line for line in summary["stages"] if not line["folder"].startswith("generate-")]
    assert generator["price_per_accepted"] * generator["accepted"] == pytest.approx(
        tokens
        + sum(line["price"] for line in others if line["folder"].split("-")[0] not in ("train", "take", "scorecard"))
    )


def test_a_spent_budget_stops_a_run_before_it_starts(tmp_path):
    tiny_beir(tmp_path / "set", docs=16)
    job = """
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.strategies.crop import Crop


def asked(data: str, url: str, budget: float) -> Stage:
    engine = OpenAIServer(model="m", base_url=url, budget_usd=budget, usd_per_million_prompt_tokens=1e6)
    return Generate(corpus=Beir(path=data), strategy=Crop(), engine=engine)
"""
    (tmp_path / "asked.py").write_text(job)
    with served(answers()) as server:
        stage = asked(tmp_path / "set", server, usd_per_million_prompt_tokens=1e6)
        materialize(stage, str(tmp_path / "runs"), HERE).revoke([1])
        words = [f"data={tmp_path / 'set'}", f"url={server.url}", "budget=500", "--runs", str(tmp_path / "runs")]
        for verb in (["run"], ["check", "--one"]):
            done = subprocess.run(
                [sys.executable, "-m", "dagr_ray.cli.main", *verb, str(tmp_path / "asked.py"), *words],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 2 and "is spent on generate-crop-openai" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        assert len(server.seen) == 16
