"""An S3 server on localhost (moto's) behind a door that counts what is asked of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.fs as pafs

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

        class Door(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                requests.append("LIST" if "list-type" in self.path else self.command)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_ONE_HOP}
                with one:  # moto's objects do not stand two threads
                    moto = HTTPConnection("127.0.0.1", port, timeout=60)
                    moto.request(self.command, self.path, body, headers)
                    answer = moto.getresponse()
                    content = answer.read()
                    moto.close()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in OF_ONE_HOP:
                        self.send_header(name, value)
                head = self.command == "HEAD"
                self.send_header(
                    "Content-Length", answer.getheader("Content-Length", "0") if head else str(len(content))
                )
                self.end_headers()
                self.wfile.write(b"" if head else content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
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
