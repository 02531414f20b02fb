"""Canaries on real parts: their cost, the guards that stop a run, and the accuracy of estimates."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import Stage, walk
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.engines.vllm import VLLM
from dagr_ray.filters.copied import Copied
from dagr_ray.filters.length import Length
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.stages.score import Score
from dagr_ray.stages.select import Select
from dagr_ray.stages.sources import Beir, Sample
from dagr_ray.strategies.crop import Crop
from dagr_ray.strategies.promptagator import Promptagator
from dagr_ray.study.canary import GuardFailed, Guards, canaries, leading_starts, promised_starts, run_canaries
from dagr_ray.study.estimate import estimate
from tests.support.endpoint import reply, served, status

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
HERE = Placement(generate=Pool(workers=0, shard_rows=32))


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """300 passages of 5 to 150 words."""
    path, chance = tmp_path_factory.mktemp("set"), random.Random(1)
    (path / "qrels").mkdir()
    words = [f"{a}{b}" for a in ("am", "bir", "ce", "du", "em", "fjo", "gro") for b in ("ber", "ch", "dar", "ne", "rd")]
    with open(path / "corpus.jsonl", "w") as corpus:
        for i in range(300):
            sentences = [" ".join(chance.choices(words, k=10)) for _ in range(chance.randint(1, 15))]
            text = f"Number {i} is here. {'. '.join(s.capitalize() for s in sentences)}."
            corpus.write(json.dumps({"_id": f"d{i}", "title": "", "text": text}) + "\n")
    (path / "queries.jsonl").write_text("")
    return path


def asked(path: Path, engine, n=None, samples=1, **fields) -> list[Stage]:
    """The stages of completions for (a sample of) a collection, parsed and filtered."""
    corpus = Beir(path=str(path)) if n is None else Sample(corpus=Beir(path=str(path)), n=n)
    generate = Generate(corpus=corpus, engine=engine, samples=samples, **{"strategy": Crop()} | fields)
    parsed = Parse(generations=generate, corpus=corpus)
    scores = tuple(Score(parsed=parsed, corpus=corpus, filter=each) for each in (Length(), Copied()))
    return walk(Select(parsed=parsed, scores=scores))


def answers(text="how is number one", reason="stop"):
    def answer(handler, body):
        size = len(body["prompt"].encode())
        completion = text(body) if callable(text) else text
        usage = {"prompt_tokens": size // 4, "completion_tokens": len(completion.split())}
        reply(handler, 200, {"choices": [{"text": completion, "finish_reason": reason}], "usage": usage})

    return lambda body, nth: answer


def first_words(body) -> str:
    return "where is " + " ".join(body["prompt"].split()[-(body["seed"] % 9 + 2) :])


def endpoint(server, **fields) -> OpenAIServer:
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 4.0}
    return OpenAIServer(**{"model": "m", "base_url": server.url, "max_attempts": 2} | prices | fields)


def test_a_canary_reads_64_passages_and_a_second_one_is_free(collection, tmp_path):
    with served(answers()) as server:
        stages = asked(collection, endpoint(server), n=200, samples=2)
        [(canary, findings)] = run_canaries(stages, str(tmp_path), HERE, Guards())
        assert len(server.seen) == 128 and all(finding.passes for finding in findings)
        run_canaries(stages, str(tmp_path), HERE, Guards())
        assert len(server.seen) == 128
        sample = stages[1].folder(str(tmp_path)).read("corpus")["doc_id"].to_pylist()
        drawn = canary.generate.corpus.folder(str(tmp_path)).read("corpus")["doc_id"].to_pylist()
        assert len(drawn) == 64 and set(drawn) < set(sample)
        generate = next(stage for stage in stages if isinstance(stage, Generate))
        assert canary.generate == generate.model_copy(update={"corpus": canary.generate.corpus})
        assert not Path(generate.folder(str(tmp_path)).path).exists()
    assert [score.filter.type for score in canary.selected.scores] == ["length", "copied"]
    assert len(canaries(asked(collection, CropEngine(), n=10))) == 1


@pytest.mark.parametrize("samples", [1, 3])
def test_estimates_are_within_a_quarter_of_the_real_values(collection, tmp_path, samples):
    runs = str(tmp_path)
    with served(answers(first_words)) as server:
        stages = asked(collection, endpoint(server), samples=samples)
        before = estimate(stages, runs, HERE)
        run_canaries(stages, runs, HERE, Guards())
        guesses = estimate(stages, runs, HERE)
        materialize(stages[-1], runs, HERE)
    assert {guess["basis"] for guess in before.values()} == {"constants"}
    checked = 0
    for stage in stages[1:]:
        guess, manifest = guesses[stage.fingerprint()], stage.folder(runs).manifest
        stored = sum(entry["bytes"] for entry in manifest["tables"].values())
        assert guess["basis"] == "this corpus", stage.type
        assert guess["bytes"] == pytest.approx(stored, rel=0.25), stage.type
        assert guess["rows"] == pytest.approx(manifest["counts"]["in"], rel=0.25), stage.type
        if isinstance(stage, Generate):
            for kind in ("prompt", "completion"):
                assert guess[f"{kind}_tokens"] == pytest.approx(manifest["cost"][f"{kind}_tokens"], rel=0.25)
            assert guess["price"] == pytest.approx(manifest["price"], rel=0.25)
            assert before[stage.fingerprint()]["prompt_tokens"] > 1.3 * guess["prompt_tokens"]
            checked += 1
    assert checked == 1


def test_finished_shards_are_not_estimated_again(collection, tmp_path):
    runs, few = str(tmp_path), {"after": 4}

    def stop(progress):
        if progress.stage.type == "generate" and progress.state == "running" and progress.shards == few["after"]:
            raise KeyboardInterrupt

    stages = asked(collection, CropEngine())
    generate = next(stage for stage in stages if isinstance(stage, Generate))
    run_canaries(stages, runs, HERE, Guards(copied=1))
    whole = estimate([generate], runs, HERE)[generate.fingerprint()]
    with pytest.raises(KeyboardInterrupt):
        materialize(generate, runs, HERE, stop)
    rest = estimate([generate], runs, HERE)[generate.fingerprint()]
    assert rest["bytes"] < 0.8 * whole["bytes"] and rest["seconds"] < whole["seconds"]


def test_rates_of_another_corpus_are_the_second_choice(collection, tmp_path):
    with served(answers()) as server:
        small = asked(collection, endpoint(server), n=40)
        materialize(small[-1], str(tmp_path), HERE)
        other = tmp_path / "other"
        shutil.copytree(collection, other)
        copied = estimate(asked(other, endpoint(server), n=50), str(tmp_path), HERE)
        with open(other / "corpus.jsonl", "a") as corpus:
            corpus.write(json.dumps({"_id": "more", "text": "One more passage."}) + "\n")
        guesses = estimate(asked(other, endpoint(server)), str(tmp_path), HERE)
        larger = estimate(asked(collection, endpoint(server), n=80), str(tmp_path), HERE)
    others = {key: guess for key, guess in guesses.items() if guess["tokens"]}
    assert [(guess["basis"], guess["rows"]) for guess in others.values()] == [("another corpus", 301)]
    assert {g["basis"] for g in copied.values() if g["tokens"]} == {"this corpus"}, "a copy in another folder"
    assert {(g["basis"], g["rows"]) for g in larger.values() if g["tokens"]} == {("this corpus", 80)}


GUARDED = {
    "truncated": (lambda server: endpoint(server, passage_characters=30), answers(), "prompt of"),
    "cut_off": (endpoint, answers("the number of", reason="length"), "'the number of'"),
    "unparsed": (endpoint, answers("?"), "'?' (no-text)"),
    "copied": (lambda server: CropEngine(), answers(), ".'"),  # a whole sentence of the passage
}


@pytest.mark.parametrize("guard", GUARDED)
def test_a_guard_stops_with_three_rows_and_can_be_changed(collection, tmp_path, guard):
    engine, react, shown = GUARDED[guard]
    with served(react) as server:
        stages = asked(collection, engine(server), strategy=Crop())
        with pytest.raises(GuardFailed) as caught:
            run_canaries(stages, str(tmp_path), HERE, Guards())
        assert f"--guard {guard}=" in str(caught.value) and "(the limit is 25%)" in str(caught.value)
        assert "\n" not in str(caught.value) and len(caught.value.rows) == 3
        assert any(shown in row for row in caught.value.rows) and all(row.startswith("d") for row in caught.value.rows)
        before = len(server.seen)
        [(_, findings)] = run_canaries(stages, str(tmp_path), HERE, Guards.of([f"{guard}=1"]))
        assert len(server.seen) == before
    share = {finding.guard: finding.share for finding in findings}
    assert share[guard] > 0.25 and all(value <= 0.25 for name, value in share.items() if name != guard)


def test_a_canary_with_failed_rows_shows_three_of_them(collection, tmp_path):
    no = status(400, "the prompt is no good")
    with served(lambda body, nth: no) as server, pytest.raises(GuardFailed, match="64 of 64 rows failed") as caught:
        run_canaries(asked(collection, endpoint(server)), str(tmp_path), HERE, Guards())
    assert len(caught.value.rows) == 3 and all("the prompt is no good" in row for row in caught.value.rows)


def test_guards_from_the_command_line():
    assert Guards.of(["cut_off=0.9", "copied=1"]) == Guards(cut_off=0.9, copied=1)
    for words in ("cutoff=0.9", "cut_off", "cut_off=2", "cut_off=many"):
        with pytest.raises(ConfigError, match="cut"):
            Guards.of([words])


# -- start tokens, with the small model's own tokenizer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def starting(tmp_path_factory):
    """Folders of SmolLM2 whose tokenizer adds zero, one or two start tokens."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folders = {}
    for times in range(3):
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        start = tokenizer.bos_token
        if times:
            tokenizer._tokenizer.post_processor = TemplateProcessing(
                single=" ".join([start] * times + ["$A"]), special_tokens=[(start, tokenizer.bos_token_id)]
            )
        folder = tmp_path_factory.mktemp(f"start{times}")
        tokenizer.save_pretrained(folder)
        shutil.copy(Path(smollm2()) / "config.json", folder)
        folders[times] = folder
    # converted tokenizers, whose own code added the start token, look like this
    folders["promised"] = tmp_path_factory.mktemp("promised") / "model"
    shutil.copytree(folders[0], folders["promised"])
    settings = json.loads((folders[0] / "tokenizer_config.json").read_text())
    (folders["promised"] / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folders


def test_start_tokens_are_counted_as_an_engine_adds_them(starting):
    from transformers import AutoTokenizer

    for times, folder in list(starting.items())[:3]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert leading_starts(tokenizer, "Each passage") == times
        assert leading_starts(tokenizer, tokenizer.bos_token + "user") == times + 1
        assert leading_starts(tokenizer, "a" + tokenizer.bos_token) == times
        assert promised_starts(tokenizer, {}) == min(times, 1)
        assert promised_starts(tokenizer, {"add_bos_token": True}) == 1


@pytest.mark.parametrize(
    ("times", "task", "passes"),
    [(1, "Ask.", True), (2, "Ask.", False), (1, "<|im_start|>", False), ("promised", "Ask.", False), (0, "Ask.", True)],
)
def test_wrong_start_tokens_stop_a_run_before_the_engine_starts(collection, tmp_path, starting, times, task, passes):
    stages = asked(collection, VLLM(model=str(starting[times])), strategy=Promptagator(task=task))
    with pytest.raises(Exception) as caught:
        run_canaries(stages, str(tmp_path), HERE, Guards())
    [canary] = canaries(stages)
    began = Artifact(str(tmp_path), canary.generate.folder_name()).listing("attempts")
    if passes:  # on to the engine, which finds no weights in the folder
        assert "weights" in str(caught.value) and began
    else:
        assert isinstance(caught.value, GuardFailed) and not began
        message = "without the start token" if times == "promised" else "with more than one start token"
        assert f"64 of 64 prompts begin {message}" in str(caught.value) and "(the limit is 0)" in str(caught.value)
        shown = "0 x '<|im_start|>'" if times == "promised" else "2 x '<|im_start|>'"
        assert len(caught.value.rows) == 3 and shown in caught.value.rows[0]


JOB = """
from dagr_ray.engines import Sampling
from dagr_ray.engines.vllm import VLLM
from dagr_ray.quickstart.models import smollm2
from dagr_ray.core.stage import Stage
from dagr_ray.stages.sources import Beir
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.parse import Parse
from dagr_ray.strategies.promptagator import Promptagator


def small(data: str, max_tokens: int = 2) -> Stage:
    corpus = Beir(path=data)
    engine = VLLM(model=str(smollm2()), max_model_len=512)
    asked = Generate(corpus=corpus, strategy=Promptagator(), engine=engine, sampling=Sampling(max_tokens=max_tokens))
    return Parse(generations=asked, corpus=corpus)
"""


def test_the_real_model_stops_if_its_answers_are_cut_off(collection, tmp_path):
    (tmp_path / "small.py").write_text(JOB)
    (tmp_path / "here.toml").write_text("[generate]\nworkers = 0\n")
    words = ["run", str(tmp_path / "small.py"), f"data={collection}", "--canary", "--quiet"]
    words += [f"--runs={tmp_path / 'runs'}", f"--placement={tmp_path / 'here.toml'}"]
    done = subprocess.run(
        [sys.executable, "-m", "dagr_ray.cli.main", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = done.stderr.strip().splitlines()[-4:]
    assert done.returncode == 1, done.stderr
    assert lines[0].startswith("dagr: failed: canary promptagator-vllm: ") and "--guard cut_off=" in lines[0]
    assert all(line.startswith("  d") for line in lines[1:])
    assert len(list((tmp_path / "runs").glob("generate-*"))) == 1, "only the canary's"
