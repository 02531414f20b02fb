"""A small endpoint on localhost that answers, or misbehaves on demand."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dagr_ray.core.placement import Pool
from dagr_ray.engines import Sampling
from dagr_ray.engines.openai import OpenAIServer
from dagr_ray.prompts import Prompt

KEY = "sk-/Swordfish+4711="
SHORT = Sampling(max_tokens=12)
USAGE = {"prompt_tokens": 30, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 16}}


def reply(handler, status, body, headers=()):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in [("Content-Length", str(len(raw))), *headers]:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(raw)


def good(handler, body, usage=USAGE, delay=0.0):
    time.sleep(delay)
    text = f"{body['prompt']} -> {body['seed']}"
    reply(handler, 200, {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage})


def status(code, message="no", **headers):
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda handler, body: reply(handler, code, {"error": {"message": message}}, pairs)


def drop(handler, body):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    drop(handler, body)


def hang(handler, body):
    handler.server.ended.wait(30)


def trickle(handler, body):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b" ")


class Server(ThreadingHTTPServer):
    """Answers as ``react(body, nth)`` says, ``nth`` being 0 for the first request with this seed; keeps what it was sent."""

    daemon_threads = True
    request_queue_size = 64
    lists = False  # whether it tells its models, as a server does that is well

    def __init__(self, react):
        self.react, self.ended, self.lock = react, threading.Event(), threading.Lock()
        self.seen, self.times, self.headers, self.now, self.most = [], [], [], 0, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has left


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        with server.lock:
            nth = sum(body["seed"] == other["seed"] for other in server.seen)
            server.seen.append(body)
            server.times.append(time.monotonic())
            server.headers.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            (server.react(body, nth) or good)(self, body)
        finally:
            with server.lock:
                server.now -= 1

    def do_GET(self):
        assert self.path == "/v1/models"
        reply(self, 200 if self.server.lists else 503, {"data": []})

    def log_message(self, format, *args):
        pass


@contextmanager
def served(react=lambda body, nth: None):
    with Server(react) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def ask(server, prompts, n=1, sampling=SHORT, workers=1, **fields):
    """Completions of prompts (texts), the j-th with seed 100 * j."""
    session = OpenAIServer(model="m", base_url=server.url, **fields).open(Pool(workers=workers))
    try:
        asked = [Prompt("", text, "") if isinstance(text, str) else text for text in prompts]
        return session.generate(asked, [100 * j for j in range(len(asked))], sampling, n)
    finally:
        session.close()


# What a client should try again.
PASSING = {
    "408": status(408),
    "409": status(409),
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "drop": drop,
    "half": half,
    "hang": hang,
    "trickle": trickle,
    "html": lambda h, b: reply(h, 200, b"<html>busy</html>"),
    "not utf-8": lambda h, b: reply(h, 200, b"\xff\xfe\xfd"),
    "deep": lambda h, b: reply(h, 200, b"[" * 100_000),
    "no choices": lambda h, b: reply(h, 200, {"choices": []}),
    "no text": lambda h, b: reply(h, 200, {"choices": [{"text": None}]}),
    "a list": lambda h, b: reply(h, 200, [1]),
    "an error": lambda h, b: reply(h, 200, {"error": {"message": "overloaded"}}),
}
