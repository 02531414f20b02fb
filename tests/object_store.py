"""An S3 server on localhost (moto's, over HTTP) that keeps a log of its requests and can be made to fail or wait."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import pyarrow.fs as pafs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
REGION = "us-east-1"


@dataclass
class Request:
    """One request: ``PUT``, the key inside the bucket, and the query's names (``uploadId``, ``list-type``)."""

    method: str
    key: str
    query: dict[str, list[str]]


# Called before a request is answered: returns an HTTP status to refuse it with, or None. It may wait.
Hook = Callable[[Request], int | None]


@dataclass
class ObjectStore:
    """The running server. ``hook`` may be set at any time; ``requests`` is what was asked so far."""

    requests: list[Request] = field(default_factory=list)
    hook: Hook | None = None

    def __enter__(self) -> ObjectStore:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._one = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        # credentials come from the environment; a bucket is made by whoever owns the store
        os.environ.update(self.environment())
        owner = pafs.S3FileSystem(endpoint_override=self.host, scheme="http", region=REGION, allow_bucket_creation=True)
        owner.create_dir(BUCKET)
        self.requests.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
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
        key = environ["PATH_INFO"].lstrip("/").partition("/")[2]
        request = Request(environ["REQUEST_METHOD"], key, parse_qs(environ["QUERY_STRING"], keep_blank_values=True))
        self.requests.append(request)
        refused = self.hook(request) if self.hook else None
        if refused:
            start(f"{refused} refused", [("Content-Length", "0")])
            return [b""]
        with self._one:  # moto's objects do not stand two threads; a hook may wait outside
            return list(self._app(environ, start))
