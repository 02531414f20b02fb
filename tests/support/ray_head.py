"""A Ray head of a test's own, as `ray start --head` makes it, with a dashboard that takes jobs; all of it on localhost."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

RAY = str(Path(sys.executable).parent / "ray")


class Head(NamedTuple):
    """The dashboard's address, and the environment in which commands find and may use the head."""

    address: str
    env: dict[str, str]

    def submit(self, work: Path, words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """What `ray job submit` of a command says, in the folder ``work`` that is sent along."""
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", str(work), "--", *words]
        for _ in range(20):  # the dashboard answers before the agent that starts jobs does
            done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
            if "No available agent" not in done.stderr:
                break
            time.sleep(1)
        return done


@contextlib.contextmanager
def local_head(**environment: str) -> Iterator[Head]:
    """A head with two cores, its token and ``environment``."""
    dashboard, gcs, client, agent = free_ports(4)
    # sockets below it have long names, and the system allows 107 bytes
    place = tempfile.mkdtemp(prefix="dagr-ray-", dir="/tmp")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)} | environment
    words = [
        RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={place}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
    ]  # fmt: skip
    head = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(address, head)
        yield Head(address, env)
    finally:
        # at once: a head that is asked to stop drains for 30 s
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        head.wait()
        shutil.rmtree(place, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports above the ports that Ray gives to its workers."""
    ports: list[int] = []
    for port in range(20_500, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == count:
            break
    return ports


def _wait_for(address: str, head: subprocess.Popen) -> None:
    until = time.time() + 60
    while time.time() < until:
        assert head.poll() is None, "the head node did not start"
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=2):
                return
        except urllib.error.HTTPError:  # it is up, and wants the token that `ray job submit` has
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("no dashboard after 60 s")
