"""An endpoint that counts its tokens, and bills that must add up to what it counted."""

import json
import math
import threading
import time
from pathlib import Path

import pytest

from dagr_ray.core import cost
from dagr_ray.core.artifact import Artifact
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.report import bills
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies.crop import Crop


def usage_of(body) -> dict:
    """What the test's server counts for a request: a token a byte, a third of them cached, five written a sample."""
    prompt = len(body["prompt"].encode())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": 5 * body.get("n", 1),
        "prompt_tokens_details": {"cached_tokens": prompt // 3},
    }


class Killed(BaseException):
    """As a worker that is killed: nothing catches it below the one who asked."""


class Hold:
    """Keeps a server's requests waiting after the first ``most``, so that a driver is caught in the middle of a shard."""

    def __init__(self):
        self.most, self.over = math.inf, threading.Event()

    def after(self, most):
        self.over.clear()
        self.most = most

    def end(self):
        self.most = math.inf
        self.over.set()


def answers(delay=0.0, hold=None):
    def answer(handler, body):
        if hold and len(handler.server.seen) > hold.most:
            hold.over.wait(60)
        text = body["prompt"].split(".")[0]
        choices = [{"index": i, "text": text, "finish_reason": "stop"} for i in range(body.get("n", 1))]
        time.sleep(delay)
        raw = json.dumps({"choices": choices, "usage": usage_of(body)}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return lambda body, nth: answer


def used(server) -> int:
    """Tokens of every request that the server has seen, whatever became of its answer."""
    return sum(usage_of(body)["prompt_tokens"] + usage_of(body)["completion_tokens"] for body in server.seen)


def both(tokens) -> int:
    return tokens["prompt"] + tokens["completion"]


def asked(path: Path, server, samples=1, **fields) -> Generate:
    engine = OpenAIServer(**{"model": "m", "base_url": server.url, "max_attempts": 3} | fields)
    return Generate(corpus=Beir(path=str(path)), strategy=Crop(), engine=engine, samples=samples)


def adds_up(runs: str, name: str) -> dict:
    """A stage's bill, after checking that its parts are the whole in every unit."""
    found = bills.stage(runs, name)
    shards, seconds, usd, waste = found["shards"], found["seconds"], found["usd"], found["waste"]
    for kind in cost.KINDS:
        assert sum(shard["tokens"][kind] for shard in shards) == found["tokens"][kind]
    for kind in ("in", "out", "errors"):
        assert sum(shard["rows"][kind] for shard in shards) == found["rows"][kind]
    for kind in (*cost.SECONDS, "cpu"):
        mine = sum(shard["seconds"][kind] for shard in shards)
        assert mine <= seconds[kind] + 1e-6 if kind == "cpu" else mine == pytest.approx(seconds[kind])
    assert sum(seconds[kind] for kind in cost.SECONDS) + waste["seconds"] + seconds["rest"] == pytest.approx(
        seconds["held"]
    )
    assert seconds["rest"] >= -0.05
    assert sum(shard["usd"]["work"] for shard in shards) == pytest.approx(usd["work"])
    assert usd["work"] + usd["waste"] == pytest.approx(usd["total"])
    assert usd["total"] + usd["setup"] + usd["waiting"] == pytest.approx(usd["held"])
    assert min(usd.values()) >= -0.05 * 3600
    assert sum(shard["waste"]["tokens"] for shard in shards) <= waste["tokens"]
    back = Artifact(runs, name).revoked()
    assert waste["shards"] == len(back)
    assert waste["seconds"] == pytest.approx(sum(r["cost"].get(f"{k}_s", 0) for r in back for k in cost.SECONDS))
    manifest = Artifact(runs, name).manifest
    assert manifest is None or manifest["price"] == usd["total"] or len(back)
    return found
