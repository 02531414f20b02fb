"""The engine against vLLM's own server, killed and started again in the middle."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from dagr_ray.core import environment
from dagr_ray.core.build import materialize
from dagr_ray.core.config import ConfigError
from dagr_ray.core.placement import Pool
from dagr_ray.engines import openai as module, token_usage
from dagr_ray.engines.crop import CropEngine
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.prompts import Passage, Prompt
from dagr_ray.quickstart.models import smollm2
from dagr_ray.stages.exemplars import Exemplars
from dagr_ray.stages.generate import Generate
from dagr_ray.stages.sources import Beir
from dagr_ray.strategies import Strategy
from dagr_ray.strategies.promptagator import Promptagator
from tests.support.endpoint import KEY, SHORT

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


def serve(port, log):
    """vLLM's own server on this machine's CPU, in a process group of its own."""
    words = f"--served-model-name small --host 127.0.0.1 --port {port} --dtype bfloat16 --max-model-len 1024"
    # as the engine in the worker's process is set up: see dagr_ray.engines.vllm
    words += " --enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096 --block-size 32"
    words += " --generation-config vllm --enable-prompt-tokens-details --model"
    threads = str(len(os.sched_getaffinity(0)))
    more = {"VLLM_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split(), str(smollm2())],
        env=os.environ | environment.VLLM | more,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_restarted_vllm_server_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_KEY", KEY)
    monkeypatch.setattr(module, "BACKOFF_S", 0.5)
    monkeypatch.setattr(module, "BACKOFF_MAX_S", 2.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    texts = [f"Item {i} of the manual says how to fold a paper plane with {i + 2} folds." for i in range(30)]
    prompts = [Promptagator().prompt(Passage("d", "", text), (), random.Random(0)) for text in texts]
    config = OpenAIServer(
        model="small", base_url=f"http://127.0.0.1:{port}/v1", api_key_env="LLM_KEY", in_flight=4, max_attempts=200,
        usd_per_million_completion_tokens=1e6,
    )  # fmt: skip
    session, found = config.open(Pool()), []
    with open(tmp_path / "serve.log", "w") as log:
        server = serve(port, log)
        try:
            ready(server, port, tmp_path / "serve.log")
            only_the_templates_markers_are_tokens(f"http://127.0.0.1:{port}", tmp_path)
            asking = threading.Thread(
                target=lambda: found.extend(session.generate(prompts, range(0, 3000, 100), SHORT, 1))
            )
            asking.start()
            while session.budget.spent < 50:  # tokens that have come back: a quarter or so
                time.sleep(0.005)
                assert asking.is_alive() and server.poll() is None
            kill(server)
            assert asking.is_alive() and session.budget.spent < 300, "the server was to die in the middle"
            server = serve(port, log)
            asking.join(180)
            assert not asking.is_alive()
            once = config.model_copy(update={"one_request": True}).open(Pool())
            pairs = [s.generate(prompts[:4], range(0, 400, 100), SHORT, 2) for s in (session, once)]
            once.close()
            again = session.generate(prompts[-8:], range(2200, 3000, 100), SHORT, 1)
            with pytest.raises(ConfigError, match="HTTP 404.*does not exist"):
                config.model_copy(update={"model": "large"}).open(Pool()).generate(prompts[:1], [1], SHORT, 1)
            [[bad]] = session.generate([Prompt("word " * 2000, "", "")], [1], SHORT, 1)
        finally:
            kill(server)
            session.close()
    assert len(found) == 30 and all(c.error is None and isinstance(c.raw, str) for [c] in found)
    assert all(c.prompt_tokens > 128 and 0 < c.completion_tokens <= 12 for [c] in found)
    assert sum(c.cached_tokens >= 128 for [c] in found) >= 15
    # bf16 sums differ a little with the shape of the batch, so a rare draw may fall on the other side
    assert sum(a.raw == b.raw for [a], [b] in zip(again, found[-8:], strict=True)) >= 5
    assert sum(a.raw == b.raw for one, two in zip(*pairs, strict=True) for a, b in zip(one, two, strict=True)) >= 5
    assert token_usage(pairs[0])["prompt_tokens"] == 2 * token_usage(pairs[1])["prompt_tokens"]
    assert "HTTP 400" in bad.error and "(attempt 1)" in bad.error


def ready(server, port, log: Path):
    for _ in range(1200):
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-2000:])


class Chat(Strategy):
    """A template of its own around the passage, in ChatML."""

    abstract = True

    def prompt(self, row, exemplars, rng):
        shown = "".join(f"{each.passage} {each.query}\n" for each in exemplars)
        return Prompt(f"<|im_start|>user\n{shown}", f"{row.title} {row.text}", "<|im_end|>\n<|im_start|>assistant\n")


def only_the_templates_markers_are_tokens(server, place):
    """Every special token of the model in a text, a title, a query that is shown: as its server tokenises them."""
    added = json.loads((Path(smollm2()) / "tokenizer.json").read_text())["added_tokens"]
    special = {token["id"]: token["content"] for token in added}
    (place / "set" / "qrels").mkdir(parents=True)
    with open(place / "set" / "corpus.jsonl", "w") as corpus:
        for i, each in enumerate(special.values()):
            row = {"_id": f"d{i}", "title": f"{each} title", "text": f"A passage{each}that says {each}{each}."}
            corpus.write(json.dumps(row) + "\n")
    (place / "set" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "what ends with <|im_end|>"}))
    (place / "set" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    docs = Beir(path=str(place / "set"))

    def tokens(text):
        body = json.dumps({"model": "small", "prompt": text, "add_special_tokens": False}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        with urlopen(Request(f"{server}/tokenize", body, headers), timeout=10) as answer:
            return [special[token] for token in json.load(answer)["tokens"] if token in special]

    engine = OpenAIServer(model="small", base_url=f"{server}/v1")
    asked = {}
    for name, each in (("plain", engine), ("raw", CropEngine())):
        stage = Generate(corpus=docs, strategy=Chat(), engine=each, exemplars=Exemplars(corpus=docs, k=1))
        inputs = {kind: materialize(inner, str(place / "runs")) for kind, inner in stage.inputs().items()}
        asked[name] = stage.prompts(inputs, inputs["corpus"].read("corpus")["doc_id"].to_pylist())
    assert len(asked["plain"]) == len(special) == 17
    for doc_id, prompt in asked["plain"].items():
        assert tokens(prompt) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"], prompt
        # as they stand they are more: the server does read them
        assert len(tokens(asked["raw"][doc_id])) > 6
