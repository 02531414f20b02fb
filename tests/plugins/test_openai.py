"""The engine against real sockets: what is sent, what comes back, and what goes wrong on the way."""

import random
import subprocess
import sys
import time
from email.utils import formatdate

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError, from_json
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.special_tokens import escape_special_tokens
from dagr_ray.engines import Engine, Sampling, openai as module, token_usage
from dagr_ray.engines.openai import OpenAIServer, retry_after_s
from dagr_ray.prompts import Prompt
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.support.endpoint import KEY, PASSING, SHORT, USAGE, ask, good, hang, reply, served, status

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)


# -- what is sent, and what comes back ----------------------------------------------------------------------------------


def test_order_seeds_and_usage_whatever_comes_back_first():
    wait = random.Random(0)
    with served(lambda body, nth: lambda h, b: good(h, b, delay=wait.random() / 20)) as server:
        found = ask(server, [f"p{j}" for j in range(20)], n=3, in_flight=8)
    assert [[c.raw for c in row] for row in found] == [[f"p{j} -> {100 * j + i}" for i in range(3)] for j in range(20)]
    one = found[7][1]
    assert (one.prompt_tokens, one.cached_tokens, one.completion_tokens) == (30, 16, 5)
    assert one.finish_reason == "stop" and one.error is None and not one.truncated
    assert sorted(body["seed"] for body in server.seen) == sorted(100 * j + i for j in range(20) for i in range(3))
    assert 2 <= server.most <= 8


def test_the_request_is_the_prompt_and_the_sampling():
    sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=7, logprob=True)
    with served() as server:
        prompt = Prompt("Say:\n", "a\x00b \ud800 é", "\nQ:", stop=("\n", "Passage:"))
        [[one]] = ask(server, [prompt], sampling=sampling)
        ask(server, ["x"])
    sent = {"model": "m", "prompt": "Say:\na\ufffdb \ufffd é\nQ:", "stop": ["\n", "Passage:"], "seed": 0}
    assert server.seen[0] == sent | {"temperature": 0.3, "top_p": 0.9, "max_tokens": 7, "logprobs": 1}
    assert (
        "stop" not in server.seen[1] and "logprobs" not in server.seen[1] and "Authorization" not in server.headers[0]
    )
    assert one.raw.startswith("Say:\na\ufffdb")


def test_only_the_passage_is_cut():
    with served() as server:
        prompts = [Prompt("before ", "x" * 50, " after"), Prompt("before ", "x" * 10, " after")]
        long, short = ask(server, prompts, passage_characters=10)
    assert {body["prompt"] for body in server.seen} == {"before xxxxxxxxxx after"}
    assert long[0].truncated and not short[0].truncated


def test_answers_without_usage_or_with_a_strange_one_are_answers():
    usages = [None, {}, {"prompt_tokens": "many", "completion_tokens": -1, "prompt_tokens_details": None}]
    with served(lambda body, nth: lambda h, b: good(h, b, usage=usages[body["seed"] // 100])) as server:
        found = ask(server, ["a", "b", "c"])
    assert all(c.error is None and c.prompt_tokens == c.cached_tokens == c.completion_tokens == 0 for [c] in found)


def test_the_mean_log_probability_is_kept_if_sent():
    told = [{"token_logprobs": [-1.0, -2.5, 0]}, {"token_logprobs": [None, -1.0]}, {"token_logprobs": "x"}, None]

    def react(body, nth):
        choice = {"index": 0, "text": "a", "finish_reason": "stop", "logprobs": told[body["seed"] // 100]}
        return lambda handler, body: reply(handler, 200, {"choices": [choice], "usage": USAGE})

    with served(react) as server:
        found = ask(server, ["a", "b", "c", "d"], sampling=Sampling(logprob=True))
    assert [c.logprob for [c] in found] == [pytest.approx(-3.5 / 3), None, None, None]


def test_log_probabilities_stop_when_a_server_refuses_them():
    refuse = status(400, "Unrecognized request argument supplied: logprobs")
    with served(lambda body, nth: refuse if "logprobs" in body else None) as server:
        found = ask(server, ["a", "b", "c"], sampling=Sampling(logprob=True), in_flight=1)
    assert all(c.error is None and c.logprob is None and c.retries == 0 for [c] in found)
    assert ["logprobs" in body for body in server.seen] == [True, False, False, False]


def test_one_request_for_all_samples_pays_for_the_prompt_once():
    def react(body, nth):
        choices = [{"index": i, "text": f"{body['prompt']} {i}", "finish_reason": "stop"} for i in (2, 0, 1)]
        usage = USAGE | {"completion_tokens": 8}
        few = choices[: 2 if body["seed"] == 100 and nth == 0 else 3]
        return lambda handler, body: reply(handler, 200, {"choices": few, "usage": usage})

    with served(react) as server:
        found = ask(server, ["a", "b"], n=3, one_request=True)
    assert [[c.raw for c in answer] for answer in found] == [["a 0", "a 1", "a 2"], ["b 0", "b 1", "b 2"]]
    assert [(body["n"], body["seed"]) for body in server.seen if body["prompt"] == "a"] == [(3, 0)]
    assert all([c.completion_tokens for c in answer] == [2, 3, 3] for answer in found)
    # an answer with two of three is none, and was paid for
    assert [c.retries for c in found[1]] == [1, 0, 0] and found[0][0].retries == 0
    assert (found[1][0].failed_prompt_tokens, found[1][0].failed_completion_tokens) == (30, 3 * SHORT.max_tokens)
    assert token_usage(found) == {
        "prompt_tokens": 60, "cached_tokens": 32, "completion_tokens": 16, "retries": 1,
        "failed_prompt_tokens": 30, "failed_completion_tokens": 36,
    }  # fmt: skip
    with served() as server:
        assert token_usage(ask(server, ["a", "b"], n=3))["prompt_tokens"] == 6 * 30


# -- what goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again_and_only_for_its_row(name):
    with served(lambda body, nth: PASSING[name] if body["seed"] == 100 and nth < 2 else None) as server:
        found = ask(server, ["a", "b", "c"], timeout_s=0.4 if name in ("hang", "trickle") else 20)
    assert [row[0].raw for row in found] == ["a -> 0", "b -> 100", "c -> 200"]
    assert sorted(body["seed"] for body in server.seen) == [0, 100, 100, 100, 200]


@pytest.mark.parametrize(
    ("name", "words"),
    [("500", "HTTP 500"), ("drop", "connection broke"), ("hang", "timeout_s = 0.4"), ("html", "not a completion")],
)
def test_a_row_without_attempts_left_fails_alone(name, words):
    with served(lambda body, nth: PASSING[name] if body["seed"] == 100 else None) as server:
        found = ask(server, ["a", "b", "c"], max_attempts=3, timeout_s=0.4 if name == "hang" else 20)
    [bad] = found.pop(1)
    assert words in bad.error and "(attempt 3)" in bad.error and bad.raw is None and "\n" not in bad.error
    assert [row[0].raw for row in found] == ["a -> 0", "c -> 200"]
    assert sum(body["seed"] == 100 for body in server.seen) == 3


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_refused_prompt_is_an_error_at_once(code):
    wrong = status(code, "the prompt has 9000 tokens\n and the model reads 1024")
    with served(lambda body, nth: wrong if body["seed"] == 0 else None) as server:
        bad, fine = ask(server, ["a", "b"])
    assert f"HTTP {code}" in bad[0].error and "9000 tokens" in bad[0].error and fine[0].error is None
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (status(401, "bad key"), ["HTTP 401", "bad key", "LLM_KEY"]),
        (status(403, "not yours"), ["HTTP 403", "LLM_KEY", "'m'"]),
        (status(404, "no such model"), ["HTTP 404", "no such model", "'m'", "base_url"]),
        (status(308, Location="/elsewhere"), ["HTTP 308", "base_url"]),
        (lambda h, b: reply(h, 429, {"error": {"code": "insufficient_quota"}}), ["429", "add credit"]),
    ],
)
def test_a_wrong_key_model_or_address_ends_the_run_in_one_line(monkeypatch, answer, words):
    monkeypatch.setenv("LLM_KEY", KEY)
    began = time.monotonic()
    with served(lambda body, nth: answer if body["seed"] == 100 else hang) as server:
        with pytest.raises(ConfigError) as caught:
            ask(server, ["a", "b", "c"] * 20, api_key_env="LLM_KEY", in_flight=4, max_attempts=1, timeout_s=15)
        assert len(server.seen) <= 5
    assert time.monotonic() - began < 10, "requests under way are not waited for"
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in [*words, server.url])


def test_a_server_that_is_not_there_is_no_rows_fault():
    with served() as server:
        pass
    with pytest.raises(ConnectionError, match=r"answers no request: no connection.*attempt 2"):
        ask(server, ["a", "b"], max_attempts=2)


@pytest.mark.parametrize("name", ["500", "503", "drop", "hang", "429"])
def test_a_server_that_serves_nobody_is_no_rows_fault(name):
    react = {"503": status(503), "429": status(429), **PASSING}[name]
    with (
        served(lambda body, nth: react) as server,
        pytest.raises(ConnectionError, match=r"answers no request: .*attempt 2"),
    ):
        ask(server, ["a", "b"], max_attempts=2, timeout_s=0.4)


@pytest.mark.parametrize("name", ["500", "drop", "hang"])
def test_a_request_that_a_well_server_cannot_answer_is_at_fault(name):
    with served(lambda body, nth: PASSING[name]) as server:
        server.lists = True
        [[one]] = ask(server, ["a"], max_attempts=2, timeout_s=0.4)
    assert one.raw is None and "(attempt 2)" in one.error


def test_the_wait_doubles_up_to_its_limit_and_is_half_chance(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.1)
    monkeypatch.setattr(module, "BACKOFF_MAX_S", 0.3)
    with served(lambda body, nth: status(500) if nth < 4 else None) as server:
        [[one]] = ask(server, ["a"])
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert one.error is None and all(
        gap >= least - 0.02 for gap, least in zip(gaps, [0.05, 0.1, 0.15, 0.15], strict=True)
    )


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_all_requests(form):
    wait = {"seconds": lambda: "1", "date": lambda: formatdate(time.time() + 2, usegmt=True)}[form]

    def react(body, nth):
        if body["seed"] == 0 and nth == 0:
            return status(429, Retry_After=wait())
        return (lambda h, b: good(h, b, delay=0.5)) if body["seed"] == 100 else None

    with served(react) as server:
        found = ask(server, ["a", "b", "c", "d"], in_flight=2)
    assert all(row[0].error is None for row in found)
    # the first two start together; nothing else before the second is over that the server asked for
    assert [body["seed"] for body in server.seen[:2]] in ([0, 100], [100, 0])
    assert len(server.times) == 5 and server.times[2] - min(server.times[:2]) >= 0.95


def test_a_wait_of_a_day_is_not_waited_for():
    with (
        served(
            lambda body, nth: status(429, "daily limit", Retry_After="86400") if body["seed"] == 0 else None
        ) as server,
        pytest.raises(ConnectionError, match="answers no request: HTTP 429.*daily limit"),
    ):
        ask(server, ["a", "b"])
    assert len(server.seen) <= 2


def test_retry_after_is_read_in_all_its_forms():
    assert [retry_after_s(text, 0) for text in ("3", " 0.5 ", "-1", "", None, "soon", "nan", "inf", "1e9")] == [
        3.0, 0.5, 0, 0, 0, 0, 0, 0, 0,
    ]  # fmt: skip
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 100) == 0
    assert retry_after_s("Thu Jan  1 00:01:00 1970", 0) == 60
    assert retry_after_s("9" * 400, 0) > module.RETRY_AFTER_MAX_S


# -- the config ---------------------------------------------------------------------------------------------------------


def test_only_what_changes_the_text_is_identity():
    one = OpenAIServer(model="m", base_url="https://host/v1/")
    changed = {"model": "n", "revision": "r", "passage_characters": 9, "one_request": True}
    same = {
        "base_url": "http://127.0.0.1:8000/v1", "api_key_env": "A", "allow_plain_http": True, "in_flight": 2,
        "requests_per_minute": 5, "tokens_per_minute": 5, "timeout_s": 5, "max_attempts": 2, "budget_usd": 5,
        "usd_per_million_prompt_tokens": 5, "usd_per_million_completion_tokens": 5, "usd_per_million_cached_tokens": 1,
    }  # fmt: skip
    # a tokenizer counts by its special tokens: tests/core/test_markers.py
    assert set(changed) | set(same) | {"tokenizer"} == set(OpenAIServer.model_fields), (
        "say of a new field which of the two it is"
    )
    assert OpenAIServer(**{"model": "m"} | same).fingerprint() == one.fingerprint()
    for name, value in changed.items():
        fields = {"model": "m", "base_url": "https://host/v1"} | {name: value}
        assert OpenAIServer(**fields).fingerprint() != one.fingerprint(), name
    assert from_json(one.to_json(), Engine) == one and one.base_url == "https://host/v1"
    assert (one.model_name(), OpenAIServer(model="m", revision="r", base_url="https://h").model_name()) == ("m", "m@r")


@pytest.mark.parametrize(
    "url",
    ["http://host/v1", "http://localhost.evil.org/v1", "http://127.0.0.1.evil.org", "http://127.0.0.1@evil.org/v1",
     "ftp://host", "https://", "host/v1", "https://ho st/v1", "https://host:99999/v1", "https://[::1/v1", "", "https://h\n/v1"],
)  # fmt: skip
def test_addresses_that_are_refused(url):
    with pytest.raises(ConfigError, match="base_url"):
        from_json({"type": "openai", "model": "m", "base_url": url}, Engine)


@pytest.mark.parametrize(
    "url", ["https://host/v1", "http://localhost:8000/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1"]
)
def test_addresses_that_are_taken(url):
    assert OpenAIServer(model="m", base_url=url).base_url == url
    assert OpenAIServer(model="m", base_url="http://host/v1", allow_plain_http=True).base_url == "http://host/v1"


def test_mistakes_are_named_before_anything_starts(monkeypatch):
    monkeypatch.delenv("LLM_KEY", raising=False)
    config = OpenAIServer(model="m", base_url="https://host/v1", api_key_env="LLM_KEY")
    for value in (None, "", " \n"):
        monkeypatch.setenv("LLM_KEY", value) if value is not None else None
        with pytest.raises(ConfigError, match="LLM_KEY.*not set"):
            config.check()
    monkeypatch.setenv("LLM_KEY", "Sword fish")
    with pytest.raises(ConfigError, match="LLM_KEY") as caught:
        config.open(Pool())
    assert "fish" not in str(caught.value)
    monkeypatch.setenv("LLM_KEY", KEY)
    config.check()
    with pytest.raises(ValueError, match="usd_per_million_prompt_tokens"):
        OpenAIServer(model="m", base_url="https://host/v1", budget_usd=1)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install aiohttp"):
        config.check()


def test_another_address_finds_the_folder_that_was_made(tmp_path):
    data = Beir(path=str(tiny_beir(tmp_path / "beir", docs=20)))
    here = Placement(generate=Pool(workers=0, shard_rows=8))

    def stage(server, **fields):
        engine = OpenAIServer(model="m", base_url=server.url, **fields)
        return Generate(corpus=data, strategy=Crop(), engine=engine, samples=2)

    with served() as server:
        rows = materialize(stage(server), str(tmp_path / "runs"), here).read("generations").to_pylist()
    assert sorted(row["seed"] for row in rows) == sorted(body["seed"] for body in server.seen)
    assert all(row["raw"].endswith(f"-> {row['seed']}") and row["prompt_tokens"] == 30 for row in rows)
    with served() as other:
        again = materialize(stage(other, in_flight=3), str(tmp_path / "runs"), here)
    assert not other.seen and again.read("generations").to_pylist() == rows


def test_imports_are_lazy_and_close_leaves_nothing_behind():
    code = (
        "import atexit, sys; from dagr_ray.core.ray_pool import Pool; from dagr_ray.engines.openai import OpenAIServer;"
        "assert not {'aiohttp', 'openai', 'ray'} & set(sys.modules);"
        "session = OpenAIServer(model='m', base_url='http://127.0.0.1:1/v1').open(Pool());"
        "atexit.register(session.close); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", ""), "an open session must not hold the process"
    with served() as server:
        session = OpenAIServer(model="m", base_url=server.url).open(Pool())
        session.generate([Prompt("", "a", "")], [1], SHORT, 1)
        assert session.thread.is_alive()
        session.close()
        session.close()
    assert not session.thread.is_alive() and session.http.closed


@pytest.mark.parametrize(
    "marker",
    "<|im_start|> <|eot_id|> <|start_header_id|> <|begin_of_text|> <｜begin▁of▁sentence｜> <｜User｜> <|turn> <turn|> [|user|]"
    " <start_of_turn> <end_of_turn> <fim_prefix> <extra_id_0> <tool_call> <unused12> <s> </s> <bos> <eos> <pad> <unk> <sop>"
    " [INST] [/INST] [SYSTEM_PROMPT] [TOOL_CALLS] [CLS] [SEP] [gMASK] <<SYS>> <</SYS>> <think> </think>".split(),
)
def test_special_tokens_in_texts_are_broken_but_readable(marker):
    for text in (marker, f"a{marker}b", f"{marker}{marker}", f"<{marker}>", f"<|a{marker}|>"):
        broken = escape_special_tokens(text)
        assert marker not in broken and "".join(broken.split()) == "".join(text.split())
        assert escape_special_tokens(broken) == broken


def test_other_brackets_are_left_alone():
    text = "if a < b > c: x[0], List<int>, <b>bold</b> <a href='x'>, [1], [RFC 2119], a |> f <| g, <- ->, [A], std::map<K, V>"
    assert escape_special_tokens(text) == text
    assert len(escape_special_tokens("<|" * 200_000)) == 400_000  # in linear time
