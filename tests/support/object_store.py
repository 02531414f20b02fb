"""An S3 server on localhost (moto's, over HTTP) that keeps a log of its requests and can be made to fail or wait.

moto runs in a process of its own: vLLM looks at every object of every module of its process, and Flask's refuse that.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any
from urllib.parse import parse_qs

import pyarrow.fs as pafs
from werkzeug.serving import make_server
from werkzeug.wrappers import Request as Asked

BUCKET = "bucket"
REGION = "us-east-1"


@dataclass
class Request:
    """One request: ``PUT``, the key inside the bucket, and the query (``uploadId``, ``list-type``)."""

    method: str
    key: str
    query: dict[str, list[str]]
    start: int = 0  # of the bytes that a GET asks for


# Called before a request is answered: returns an HTTP status to refuse it with, or None. It may wait.
Hook = Callable[[Request], int | None]


@dataclass
class ObjectStore:
    """The running server. ``hook`` may be set at any time; ``requests`` is what was asked so far."""

    requests: list[Request] = field(default_factory=list)
    hook: Hook | None = None

    def __enter__(self) -> ObjectStore:
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self._moto = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._moto.stderr is not None
        started = next(line for line in self._moto.stderr if "Running on http" in line)
        self._port = int(re.findall(r":(\d+)", started)[-1])
        threading.Thread(target=self._moto.stderr.read, daemon=True).start()
        self._one = threading.Lock()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        try:
            # credentials come from the environment; a bucket is made by whoever owns the store
            os.environ.update(self.environment())
            owner = pafs.S3FileSystem(
                endpoint_override=self.host, scheme="http", region=REGION, allow_bucket_creation=True
            )
            owner.create_dir(BUCKET)
        except BaseException:
            self.__exit__()
            raise
        self.requests.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._moto.kill()
        self._moto.wait()
        for name in self.environment():
            os.environ.pop(name, None)

    def environment(self) -> dict[str, str]:
        """What a program needs to reach the server by a plain ``s3://bucket/path``."""
        return {
            "AWS_ACCESS_KEY_ID": "test-key-id",
            "AWS_SECRET_ACCESS_KEY": "test-secret-word",
            "AWS_ENDPOINT_URL": f"http://{self.host}",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, path: str) -> str:
        """The address of a path, with the server in the URI itself."""
        return f"s3://{BUCKET}/{path}?endpoint_override={self.host}&scheme=http&region={REGION}"

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        asked = Asked(environ)
        body = asked.get_data()
        query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
        first = asked.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        request = Request(asked.method, asked.path.lstrip("/").partition("/")[2], query, int(first))
        self.requests.append(request)
        refused = self.hook(request) if self.hook else None
        if refused:
            start(f"{refused} refused", [("Content-Length", "0")])
            return [b""]
        for_one_hop = ("expect", "connection", "content-length", "transfer-encoding", "date", "server")
        headers = {name: value for name, value in asked.headers.items() if name.lower() not in for_one_hop}
        with self._one:  # moto's objects do not stand two threads; a hook may wait outside
            moto = HTTPConnection("127.0.0.1", self._port, timeout=60)
            moto.request(asked.method, environ["REQUEST_URI"], body, headers)
            answer = moto.getresponse()
            answered = answer.read()
            moto.close()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in for_one_hop]
        length = answer.getheader("Content-Length", "0") if asked.method == "HEAD" else str(len(answered))
        start(f"{answer.status} {answer.reason}", [*kept, ("Content-Length", length)])
        return [answered]
