"""The engine against real sockets: its rates and its budget, and the key, which is sent and is nowhere else."""

import logging
import pickle
import time
import traceback

import pyarrow.parquet as pq
import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import StageFailed
from dagr_ray.engines import Engine, Sampling, openai as module
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.support.endpoint import KEY, PASSING, ask, good, reply, served, status

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)


# -- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "least"), [(1, 0.9), (2, 1.9)])
def test_requests_come_at_their_rate_attempts_included(workers, least):
    with served(lambda body, nth: status(500) if body["seed"] == 300 and nth == 0 else None) as server:
        ask(server, ["x"] * 10, requests_per_minute=600, in_flight=10, workers=workers)
    # eleven requests, ten gaps of 0.1 s for one worker, of 0.2 s for each of two; arrivals may be late, never early
    assert len(server.times) == 11 and least - 0.2 < max(server.times) - min(server.times) < least + 10


@pytest.mark.parametrize(("used", "least"), [(50, 1.0), (100, 1.8)])
def test_tokens_come_at_their_rate_as_counted_by_the_server(used, least):
    usage = {"prompt_tokens": used - 10, "completion_tokens": 10}
    with served(lambda body, nth: lambda h, b: good(h, b, usage=usage)) as server:
        # 60 bytes and 30 tokens to write are guessed as 50; 200 flow in each second, and 200 are there to begin with
        ask(server, ["x" * 60] * 8, sampling=Sampling(max_tokens=30), tokens_per_minute=12_000, in_flight=1)
    assert least - 0.2 < max(server.times) - min(server.times) < least + 10


def test_without_limits_nothing_is_held_back():
    began = time.monotonic()
    with served(lambda body, nth: lambda h, b: good(h, b, delay=0.3)) as server:
        ask(server, ["x"] * 32, in_flight=32)
    assert server.most >= 16 and time.monotonic() - began < 5


@pytest.mark.parametrize("in_flight", [1, 8])
def test_the_budget_is_used_up_but_never_exceeded(in_flight):
    # a dollar a token: "x" may cost 1 + 16 + 12 = 29, and costs 30 with the server's count of 10 + 5 twice
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    money = {"usd_per_million_prompt_tokens": 1e6, "usd_per_million_completion_tokens": 1e6}
    with served(lambda body, nth: lambda h, b: good(h, b, usage=usage)) as server:
        with pytest.raises(ConfigError, match="budget_usd.*raise budget_usd and run again") as caught:
            ask(server, ["x"] * 50, budget_usd=100, in_flight=in_flight, **money)
        assert "\n" not in str(caught.value)
        # after five requests 75 are spent: 75 + 29 is over 100
        assert len(server.seen) == 5
        assert len(ask(server, ["x"] * 5, budget_usd=100, in_flight=in_flight, **money)) == 5
        with pytest.raises(ConfigError, match="budget_usd"):
            ask(server, ["x"] * 5, budget_usd=100, workers=2, in_flight=in_flight, **money)


def test_only_attempts_that_may_be_billed_are_counted():
    money = {"usd_per_million_prompt_tokens": 1e6, "budget_usd": 60, "in_flight": 1}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    for name, left in (("drop", False), ("html", False), ("500", True), ("429", True)):
        react = lambda body, nth, name=name: PASSING[name] if nth < 2 else lambda h, b: good(h, b, usage=usage)  # noqa: E731
        with served(react) as server:
            if left:
                assert ask(server, ["x" * 10], **money)[0][0].error is None
            else:  # two lost answers, 26 each; a third request could cost as much again
                with pytest.raises(ConfigError, match=r"\$52\.0+ of this worker's \$60"):
                    ask(server, ["x" * 10], **money)


# -- the key ------------------------------------------------------------------------------------------------------------


def everything_in(error):
    shown, links = [], [error]
    while links:
        link = links.pop()
        shown += [str(link), repr(link), repr(link.args), "".join(traceback.format_exception(link))]
        links += [other for other in (link.__cause__, link.__context__) if other is not None]
    return "\n".join(shown)


def test_the_key_is_sent_and_is_nowhere_else(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("LLM_KEY", KEY + "\n")
    data = Beir(path=str(tiny_beir(tmp_path / "beir", docs=30)))

    def stage(server):
        engine = OpenAIServer(model="m", base_url=server.url, api_key_env="LLM_KEY", max_attempts=2)
        return Generate(corpus=data, strategy=Crop(), engine=engine)

    def quotes(handler, body):
        reply(handler, 400, {"error": {"message": f"wrong: {handler.headers['Authorization']} " + KEY * 40}})

    def garbles(handler, body):
        handler.wfile.write(b"HTTP/1.1 200 \x00\r\nno header\r\n\r\n")

    here, errors = Placement(generate=Pool(workers=0, shard_rows=8)), {}
    refuses = status(401, f"{KEY}?")
    for name, react in {"refused": refuses, "quoted": quotes, "garbled": garbles, "good": good}.items():
        with served(lambda body, nth, react=react: react) as server:
            try:
                materialize(stage(server), str(tmp_path / name), here)
            except (ConfigError, StageFailed) as error:
                errors[name] = error
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert set(errors) == {"refused", "quoted", "garbled"} and "(hidden)?" in str(errors["refused"])
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rows = [row for path in kept if path.parent.name == "generations" for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 90 and sum(row["error"] is not None for row in rows) == 60
    config = stage(server).engine
    shown = [repr(config), str(config.to_json()), str(config.identity()), str(rows), caplog.text]
    shown += [everything_in(error) for error in errors.values()]
    assert not any("Swordfish" in text for text in shown)
    assert not any(b"Swordfish" in raw for raw in [pickle.dumps(config), *kept.values()])
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_quoted_key_is_hidden_in_the_error_of_a_row(monkeypatch):
    monkeypatch.setenv("LLM_KEY", KEY)
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    slashed = KEY.replace("/", "\\/")
    raws = ["x" * 240 + KEY * 3, f'{{"error": "{escaped}"}}', f'{{"error": "{slashed}"}}', f"<p>{KEY}"]
    with served(lambda body, nth: lambda h, b: reply(h, 400, raws[b["seed"] // 100].encode())) as server:
        found = ask(server, ["a"] * 4, api_key_env="LLM_KEY")
    for [one] in found:
        assert "(hidden)" in one.error and "Sword" not in one.error and "0053" not in one.error and len(one.error) < 400


WRONG = {
    "key as a field": {"api_key": KEY},
    "key as the name": {"api_key_env": KEY},
    "small letters": {"api_key_env": "hf_Swordfish"},
    "bytes": {"api_key_env": KEY.encode()},
    "user": {"base_url": f"https://user:{KEY}@host/v1"},
    "query": {"base_url": f"https://host/v1?key={KEY}"},
    "fragment": {"base_url": f"https://host/v1#{KEY}"},
    "two mistakes": {"model": "", "api_key_env": KEY},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_key_in_a_wrong_place_is_refused_without_being_shown(name):
    fields = {"type": "openai", "model": "m", "base_url": "https://host/v1"} | WRONG[name]
    with pytest.raises(ConfigError) as caught:
        from_json(fields, Engine)
    assert "Swordfish" not in everything_in(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        OpenAIServer(**{k: v for k, v in fields.items() if k != "type"})
    assert "Swordfish" not in everything_in(caught.value)
