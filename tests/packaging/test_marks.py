"""A test without a mark starts neither vLLM nor a node of Ray nor a browser."""

import subprocess
import sys

import pytest

from tests.support.guard.sitecustomize import VARIABLE


@pytest.fixture
def guarded(monkeypatch):
    """As for a test without a mark in `make check`."""
    monkeypatch.setenv(VARIABLE, "engine,cluster,browser")


@pytest.mark.parametrize("words", [["/opt/ray/core/gcs_server"], ["bash", "-c", "exec", "/usr/bin/chromium"]])
def test_a_program_is_refused_before_it_starts(guarded, words):
    with pytest.raises(RuntimeError, match="is marked (cluster|browser): pytestmark"):
        subprocess.Popen(words)


def test_vllm_is_refused_here_and_in_a_child(guarded, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # an earlier test may have imported it
    with pytest.raises(RuntimeError, match="starts vllm is marked engine"):
        __import__("vllm")
    done = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "NotMarked: a test that starts vllm" in done.stderr


@pytest.mark.cluster
def test_a_marked_test_may_start_what_it_says():
    with pytest.raises(FileNotFoundError):
        subprocess.Popen(["/nowhere/gcs_server"])
