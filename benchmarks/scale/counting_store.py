"""An S3 server on localhost (moto's) behind a door that counts what is asked of it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.client import HTTPConnection
from typing import Any

import pyarrow.fs as pafs
from werkzeug.serving import make_server
from werkzeug.wrappers import Request

BUCKET, REGION = "bucket", "us-east-1"
# they belong to one connection, not to the request
OF_ONE_HOP = ("expect", "connection", "content-length", "transfer-encoding", "date", "server")


class CountingStore:
    """The running server. ``requests`` holds the method of each request so far; a listing counts as ``LIST``."""

    def __enter__(self) -> CountingStore:
        self.requests: list[str] = []
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self._moto = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._moto.stderr is not None
        started = next(line for line in self._moto.stderr if "Running on http" in line)
        port, requests, one = int(re.findall(r":(\d+)", started)[-1]), self.requests, threading.Lock()
        threading.Thread(target=self._moto.stderr.read, daemon=True).start()

        def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            asked = Request(environ)
            requests.append("LIST" if "list-type" in environ["QUERY_STRING"] else asked.method)
            body = asked.get_data()
            headers = {name: value for name, value in asked.headers.items() if name.lower() not in OF_ONE_HOP}
            with one:  # moto's objects do not stand two threads
                moto = HTTPConnection("127.0.0.1", port, timeout=60)
                moto.request(asked.method, environ["REQUEST_URI"], body, headers)
                found = moto.getresponse()
                content = found.read()
                moto.close()
            kept = [(name, value) for name, value in found.getheaders() if name.lower() not in OF_ONE_HOP]
            length = found.getheader("Content-Length", "0") if asked.method == "HEAD" else str(len(content))
            start(f"{found.status} {found.reason}", [*kept, ("Content-Length", length or "0")])
            return [content]

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{self._server.server_port}"
        self._environment = {
            "AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret-word",
            "AWS_ENDPOINT_URL": f"http://{host}", "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        os.environ.update(self._environment)
        owner = pafs.S3FileSystem(endpoint_override=host, scheme="http", region=REGION, allow_bucket_creation=True)
        owner.create_dir(BUCKET)
        self.requests.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._moto.kill()
        self._moto.wait()
        for name in self._environment:
            os.environ.pop(name, None)
