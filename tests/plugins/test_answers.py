"""A server in somebody else's hands: whatever it answers, memory, tables and bills stay within what was asked for."""

import gzip
import json
import re
import time
import zlib
from pathlib import Path

import pytest

from dagr_ray.core.build import materialize
from dagr_ray.core.placement import Placement, Pool
from dagr_ray.core.stage import StageFailed
from dagr_ray.engines import openai as module, token_usage
from dagr_ray.engines._answers import OVERHEAD_BYTES, TEMPLATE_TOKENS, mean
from dagr_ray.engines.openai import OpenAIServer, retry_after_s
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop
from tests.conftest import tiny_beir
from tests.support.endpoint import SHORT, ask, reply, served

MB = 2**20
DEEP = "[" * 3000
MOST_PROMPT = len("a") + 16 + TEMPLATE_TOKENS  # of the prompt that is asked below
LONG = 12 * 256  # characters that 12 tokens may have


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_S", 0.001)


def raw(text, status=200, headers=()):
    body = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return lambda handler, asked: reply(handler, status, body, headers)


def told(*choices, usage=None, **more):
    return raw(json.dumps({"choices": list(choices), "usage": usage or {}, **more}))


def counted(usage):
    return raw(f'{{"choices": [{{"text": "a"}}], "usage": {usage}}}')


def endless(block, head="", status=200):
    """A body without an end, or headers without one."""

    def react(handler, asked):
        start = f"HTTP/1.1 {status} x\r\n{head}"
        handler.close_connection = True
        try:
            handler.wfile.write(start.encode())
            while not handler.server.ended.is_set():
                handler.wfile.write(block)
        except OSError:
            pass

    return react


A = {"text": "a"}
NO = "not a completion"
# name -> (what the server does, a part of the error or None, tokens of prompt and completion that are believed)
ANSWERS = {
    # sizes
    "text of 10 MB": (told({"text": "word " * 2_000_000}), "bytes", (0, 0)),
    "text a little too long": (told({"text": "w" * (LONG + 1)}), "characters", (0, 0)),
    "text as long as it may be": (told({"text": "w" * LONG}), None, (0, 0)),
    "many spaces around": (raw(" " * 100_000 + '{"choices": [{"text": "a"}]}'), None, (0, 0)),
    "a field of 1 MB beside": (told(A, more="x" * MB), "bytes", (0, 0)),
    "gzip, small": (raw(gzip.compress(b'{"choices": [{"text": "a"}]}'), headers=[("Content-Encoding", "gzip")]), None, (0, 0)),
    "zlib, small": (raw(zlib.compress(b'{"choices": [{"text": "a"}]}'), headers=[("Content-Encoding", "deflate")]), None, (0, 0)),
    "gzip bomb": (raw(gzip.compress(b"[" + b" " * (50 * MB)), headers=[("Content-Encoding", "gzip")]), "decompression", (0, 0)),
    "deflate bomb": (raw(zlib.compress(b" " * (50 * MB)), headers=[("Content-Encoding", "deflate")]), "decompression", (0, 0)),
    "gzip of no gzip": (raw("nothing", headers=[("Content-Encoding", "gzip")]), "gzip", (0, 0)),
    "br": (raw(b"\x0b\x02\x80{}\x03", headers=[("Content-Encoding", "br")]), "'br'", (0, 0)),
    "zstd": (raw(b"\x28\xb5\x2f\xfd", headers=[("Content-Encoding", "zstd")]), "'zstd'", (0, 0)),
    "gzip twice": (raw(gzip.compress(gzip.compress(b"{}")), headers=[("Content-Encoding", "gzip, gzip")]), "'gzip, gzip'", (0, 0)),
    "2,000 headers": (raw("{}", headers=[(f"X-{i}", "y") for i in range(2000)]), "broke", (0, 0)),
    "a header of 100,000 bytes": (raw("{}", headers=[("X", "y" * 100_000)]), "broke", (0, 0)),
    "an error of 1 MB": (raw("x" * MB, status=400), "HTTP 400: xxx", (0, 0)),
    "a finish reason of 100,000": (told(A | {"finish_reason": "x" * 100_000}), None, (0, 0)),
    # shapes
    "empty": (raw(""), NO, (0, 0)),
    "null": (raw("null"), NO, (0, 0)),
    "a string": (raw('"choices"'), NO, (0, 0)),
    "true": (raw("true"), NO, (0, 0)),
    "a number of 9,000 digits": (raw("9" * 9000), NO, (0, 0)),
    "deep": (raw(DEEP), NO, (0, 0)),
    "deep inside": (raw('{"choices": [{"text": "a"}], "x": ' + DEEP), NO, (0, 0)),
    "deep and whole": (raw('{"choices": [{"text": "a"}], "x": ' + "[" * 500 + "]" * 500 + "}"), None, (0, 0)),
    "two values": (raw('{"choices": []} {"choices": []}'), NO, (0, 0)),
    "UTF-16": (raw('{"choices": [{"text": "a"}]}'.encode("utf-16")), None, (0, 0)),
    "half a letter": (raw(b'{"choices": [{"text": "\xe4"}]}'), NO, (0, 0)),
    "choices an object": (raw('{"choices": {"0": {"text": "a"}}}'), NO, (0, 0)),
    "choices a text": (raw('{"choices": "ab"}'), NO, (0, 0)),
    "choices null": (raw('{"choices": null}'), NO, (0, 0)),
    "a choice is null": (raw('{"choices": [null]}'), NO, (0, 0)),
    "a choice is a text": (raw('{"choices": ["a"]}'), NO, (0, 0)),
    "no choice": (told(), NO, (0, 0)),
    "no text": (told({}), NO, (0, 0)),
    "text a number": (told({"text": 1}), NO, (0, 0)),
    "text a list": (told({"text": ["a"]}), NO, (0, 0)),
    "a chat's message": (told({"message": {"role": "system", "content": "a"}}), NO, (0, 0)),
    "a chat's message beside": (told(A | {"message": {"role": ["x"], "content": 7}}), None, (0, 0)),
    "two keys of one name": (raw('{"choices": [], "choices": [{"text": "b", "text": "a"}]}'), None, (0, 0)),
    "50 choices for one": (told(*[{"text": "a", "index": i} for i in range(50)]), None, (0, 0)),
    "50 without indices": (told(*[A] * 50), None, (0, 0)),
    "one index twice": (told(A | {"index": 0}, A | {"index": 0}), "indices", (0, 0)),
    "an index of a text": (told(A | {"index": "0"}), "indices", (0, 0)),
    "an index of true": (told(A | {"index": True}), "indices", (0, 0)),
    "an index of 10^400": (told(A | {"index": 10**400}), "1 of 1", (0, 0)),
    "a negative index": (told(A | {"index": -1}), "1 of 1", (0, 0)),
    "an index of a list": (told(A | {"index": [0]}), "indices", (0, 0)),
    "a finish reason of a list": (told(A | {"finish_reason": ["stop"]}), None, (0, 0)),
    "a finish reason of a number": (told(A | {"finish_reason": 3}), None, (0, 0)),
    # log-probabilities
    "log-probabilities that are none": (told(A | {"logprobs": {"token_logprobs": [True, 5, "x", None]}}), None, (0, 0)),
    "NaN and infinity": (raw('{"choices": [{"text": "a", "logprobs": {"token_logprobs": [NaN, -Infinity]}}]}'), None, (0, 0)),
    "10^400": (told(A | {"logprobs": {"token_logprobs": [-(10**400)]}}), None, (0, 0)),
    # usage
    "usage null": (counted("null"), None, (0, 0)),
    "usage a list": (counted("[1]"), None, (0, 0)),
    "usage a text": (counted('"30"'), None, (0, 0)),
    "counts of true": (counted('{"prompt_tokens": true, "completion_tokens": true}'), None, (0, 0)),
    "counts of texts": (counted('{"prompt_tokens": "5", "completion_tokens": "3"}'), None, (0, 0)),
    "counts of halves": (counted('{"prompt_tokens": 5.5, "completion_tokens": 3.0}'), None, (0, 0)),
    "counts of lists": (counted('{"prompt_tokens": [5], "completion_tokens": {}}'), None, (0, 0)),
    "negative counts": (counted('{"prompt_tokens": -5, "completion_tokens": -9}'), None, (0, 0)),
    "NaN and 1e400": (counted('{"prompt_tokens": NaN, "completion_tokens": 1e400}'), None, (0, 0)),
    "2^31": (counted(f'{{"prompt_tokens": {2**31}, "completion_tokens": {2**31}}}'), None, (MOST_PROMPT, 12)),
    "2^31 - 1": (counted(f'{{"prompt_tokens": {2**31 - 1}, "completion_tokens": {2**31 - 1}}}'), None, (MOST_PROMPT, 12)),
    "10^30": (counted('{"prompt_tokens": 1' + "0" * 30 + ', "completion_tokens": 13}'), None, (MOST_PROMPT, 12)),
    "more cached than there are": (
        counted('{"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 99}, "completion_tokens": 3}'), None, (9, 3)
    ),
    "details a list": (counted('{"prompt_tokens": 9, "prompt_tokens_details": [9], "completion_tokens": 3}'), None, (9, 3)),
    # texts
    "NUL, halves of surrogates, escapes": (
        raw('{"choices": [{"text": "\\u0000 \\ud800 \\u001b[2J", "finish_reason": "\\u0000\\ud800"}]}'), None, (0, 0)
    ),
    # what is no answer
    "204": (raw("", status=204), NO, (0, 0)),
    "206": (raw('{"choices": [{"text": "a"}]}', status=206), None, (0, 0)),
    "status 999999": (endless(b"", head="HTTP/1.1 999999 x\r\n\r\n"), "broke", (0, 0)),
}  # fmt: skip


class Peak:
    """How much memory this process took at most, over what it had at the beginning, in bytes."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        self.before = self.read("VmRSS")

    def read(self, name):
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def grown(self):
        return self.read("VmHWM") - self.before


@pytest.fixture(scope="module")
def server():
    """One server that does what its dictionary says of the answer that is asked for."""
    doing = {}
    with served(lambda body, nth: doing["now"]) as running:
        yield running, doing


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_of_a_server_has_a_reason_and_a_cost(server, name):
    running, doing = server
    doing["now"], words, tokens = ANSWERS[name]
    asked, peak = len(running.seen), Peak()
    [[one]] = ask(running, ["a"], max_attempts=8, timeout_s=5, usd_per_million_prompt_tokens=1.0)
    if words is None:
        assert one.error is None and isinstance(one.raw, str), one.error
        one.raw.encode()
    else:
        assert one.raw is None and words in one.error and len(one.error) < 400 and "\n" not in one.error
    assert (one.prompt_tokens, one.completion_tokens) == tokens
    assert all(type(value) is int for value in token_usage([[one]]).values())
    assert one.cached_tokens <= one.prompt_tokens and len(one.finish_reason or "") <= 64
    assert one.logprob is None
    tries = len(running.seen) - asked
    assert tries <= (8 if words == "broke" else 3), "each may have to be paid for"
    if words in ("bytes", "decompression", "characters"):
        assert tries == 1, "the same would come again"
    if one.error and "HTTP" not in one.error:
        assert one.failed_completion_tokens == 12 * tries and one.failed_prompt_tokens == 17 * tries
    assert peak.grown() < 40 * MB


ENDLESS = {
    "a body": endless(b"x" * MB, "Content-Type: application/json\r\n\r\n"),
    "a body in chunks": endless(b"100000\r\n" + b"x" * MB + b"\r\n", "Transfer-Encoding: chunked\r\n\r\n"),
    "an error's body": endless(b"x" * MB, "\r\n", status=400),
    "headers": endless(b"X-A: " + b"y" * 1000 + b"\r\n"),
    "one header": endless(b"y" * 65536, "X-A: "),
    "early hints": endless(b"HTTP/1.1 103 Early\r\n\r\n" * 1000, "\r\n", status=103),
    "a packed body": endless(gzip.compress(b" " * MB) * 20, "Content-Encoding: gzip\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_cut_without_filling_the_memory(server, name):
    running, doing = server
    doing["now"], running.lists = ENDLESS[name], True
    peak, began = Peak(), time.monotonic()
    [[one]] = ask(running, ["a"], max_attempts=1, timeout_s=1.5)
    assert one.error and one.raw is None and time.monotonic() - began < 5
    assert peak.grown() < 40 * MB


def test_the_size_follows_from_what_was_asked(server):
    running, doing = server
    doing["now"] = told({"text": "w" * (OVERHEAD_BYTES + 20_000)})
    [[short]] = ask(running, ["a"])
    [[long]] = ask(running, ["a"], sampling=SHORT.model_copy(update={"max_tokens": 1000}))
    assert "bytes" in short.error and len(long.raw) == OVERHEAD_BYTES + 20_000


def test_what_a_server_sets_is_not_sent_back(server):
    running, doing = server
    doing["now"] = raw('{"choices": [{"text": "a"}]}', headers=[("Set-Cookie", "a=b; Path=/")])
    ask(running, ["a", "b"], in_flight=1)
    assert not any("Cookie" in headers for headers in running.headers)


def test_impossible_log_probabilities_are_none():
    for odd in ([-1.0] * 10, [0.5], [-1e5], [True], ["-1"], [], [None], [float("nan")], [10**400], "x", {"0": -1}):
        assert mean({"token_logprobs": odd}, 8) is None, odd
    assert mean({"token_logprobs": [-1, -2.0, 0]}, 8) == -1.0


@pytest.mark.parametrize(
    "value",
    ["9" * 8000, "-1", "1e999", "nan", "Thu, 01 Jan 99999999999999999999 00:00:30 GMT", "Thu, 99 Jan 1970 99:99:99 GMT",
     "Thu, 01 Jan 1970 00:00:30 +99999999999999", "\x00", "Thu, 01 Jan 0000 00:00:00 GMT", "," * 5000, "1 1 1", "2.5.1"],
)  # fmt: skip
def test_a_wait_that_is_no_number_is_none_or_too_long(value):
    found = retry_after_s(value, time.time())
    assert found == 0 or found > module.RETRY_AFTER_MAX_S


def test_a_hostile_server_fails_in_one_line(tmp_path):
    """All rows of a stage are answered badly: no shard is tried again, each row says why, and the cost is kept."""
    corpus = Beir(path=str(tiny_beir(tmp_path / "set", docs=12)))
    kinds = [
        counted('{"prompt_tokens": true, "completion_tokens": "5"}'),
        told({"text": "w" * 100_000}),
        told({"text": 3}),
    ]
    with served(lambda body, nth: kinds[body["seed"] % 3]) as running:
        engine = OpenAIServer(model="m", base_url=running.url, max_attempts=2)
        stage = Generate(corpus=corpus, strategy=Crop(), engine=engine, sampling=SHORT)
        with pytest.raises(StageFailed, match="rows failed"):
            materialize(stage, str(tmp_path / "runs"), Placement(generate=Pool(workers=0, shard_rows=4)))
        receipts = stage.folder(str(tmp_path / "runs")).receipts()
        assert len(receipts) == 3 and not stage.folder(str(tmp_path / "runs")).revoked()
        spent = [receipt["cost"] for receipt in receipts.values()]
        assert sum(each.get("failed_completion_tokens", 0) for each in spent) > 0
        assert not stage.folder(str(tmp_path / "runs")).listing("tries")
