"""The chart renders what KubeRay takes: its fields, its rules across fields, a restricted namespace; wrong values are refused."""

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagr_ray.cli.main import parser
from dagr_ray.core.placement import Placement, load_placement

CHART = Path(__file__).parents[2] / "cluster" / "chart"
HELM = Path(sys.executable).parent / "helm"
FIELDS = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
MINE = {
    "image": {"repository": "registry.example/dagr-ray", "digest": f"sha256:{'0' * 64}"},
    "study": {"arguments": ["data=s3://bucket/beir/scifact", "volume=0,1000", "generator=smollm2,crop"]},
    "runs": "s3://bucket/runs",
    "mlflow": {"trackingUri": "https://mlflow.example"},
    "environment": {"AWS_REGION": "eu-central-1"},
    "environmentSecrets": ["mlflow-login"],
    "modelCache": {"claim": "models"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/dagr"}},
}
OVERLAYS = ["", "small", "spot", "kueue"]


def helm(values: dict[str, Any], overlay: str = "", name: str = "scifact") -> subprocess.CompletedProcess[str]:
    files = ["-f", str(CHART / f"values-{overlay}.yaml")] if overlay else []
    command = [str(HELM), "template", name, str(CHART), "--namespace", "research", *files, "-f", "-"]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)


@cache
def rendered(overlay: str) -> dict[str, dict[str, Any]]:
    """What an overlay makes, by kind."""
    done = helm(MINE, overlay)
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout) if document}


def unknown(value: Any, field: Any, place: str) -> list[str]:
    """What of a manifest the CRDs do not know: the API server would drop it in silence."""
    if isinstance(field, str) and field.startswith("#"):
        field = FIELDS[field]
    if isinstance(field, list):
        return [line for i, item in enumerate(value) for line in unknown(item, field[0], f"{place}[{i}]")]
    if isinstance(field, dict):
        if not isinstance(value, dict):
            return [f"{place}: {value!r} is no object"]
        names = {name: field.get(name, field.get("*")) for name in value}
        lines = [f"{place}.{name} is unknown" for name, inner in names.items() if inner is None]
        return lines + [
            x for name, inner in names.items() if inner for x in unknown(value[name], inner, f"{place}.{name}")
        ]
    if "|" in field:
        return [] if value in field.split("|") else [f"{place}: {value!r} is none of {field}"]
    kinds = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "int-or-string": (int, str)}
    return [] if field == "any" or isinstance(value, kinds[field]) else [f"{place}: {value!r} is no {field}"]


def broken_rules(job: dict[str, Any]) -> list[str]:
    """What the operator itself refuses, across fields (its ``utils/validation.go``)."""
    spec, lines = job["spec"], []
    cluster, shutdown = spec["rayClusterSpec"], spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    scales = cluster.get("enableInTreeAutoscaling", False)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    if len(job["metadata"].get("name", "")) > 47 or "generateName" in job["metadata"]:
        lines.append("a name of at most 47 characters, and no generateName, which kustomize cannot patch")
    if rules and shutdown:
        lines.append("deletionRules and shutdownAfterJobFinishes")
    if spec.get("suspend") and not shutdown:
        lines.append("suspend without shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished", 0) and not shutdown:
        lines.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if scales and any(rule["policy"] == "DeleteWorkers" for rule in rules):
        lines.append("DeleteWorkers with autoscaling")
    if spec.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & spec.keys():
        lines.append("SidecarMode with a submitter of its own")
    if scales and any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups):
        lines.append("autoscaler v2 with restartPolicy")
    if cluster["authOptions"]["mode"] == "token" and tuple(map(int, cluster["rayVersion"].split("."))) < (2, 52, 0):
        lines.append("a token before Ray 2.52")
    return lines


def pods(kinds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    spec = kinds["RayJob"]["spec"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"], *(group["template"] for group in groups), kinds["Job"]["spec"]["template"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_takes_what_is_rendered(overlay):
    job = rendered(overlay)["RayJob"]
    assert unknown(job["spec"], FIELDS["RayJob.spec"], "spec") == []
    assert broken_rules(job) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_restricted_namespace_admits_every_pod(overlay):
    for pod in pods(rendered(overlay)):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False and held["capabilities"] == {"drop": ["ALL"]}
            assert "@sha256:" in container["image"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_wait_for_the_first_stage_that_needs_one(overlay):
    cluster = rendered(overlay)["RayJob"]["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["cpu"]["minReplicas"] == groups["cpu"]["replicas"] == groups["cpu"]["maxReplicas"] > 0
    if overlay == "small":
        assert list(groups) == ["cpu"] and not cluster["enableInTreeAutoscaling"]
    elif overlay == "kueue":  # it counts pods before it starts them
        assert groups["gpu"]["minReplicas"] == groups["gpu"]["maxReplicas"] == 4
        assert not cluster["enableInTreeAutoscaling"]
    else:
        assert (groups["gpu"]["minReplicas"], groups["gpu"]["replicas"], groups["gpu"]["maxReplicas"]) == (0, 0, 4)
        assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 300


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_placement_fits_the_cluster(tmp_path, overlay):
    kinds = rendered(overlay)
    file = tmp_path / "placement.toml"
    file.write_text(kinds["ConfigMap"]["data"]["placement.toml"])
    placement: Placement = load_placement(str(file))
    groups = {g["groupName"]: g for g in kinds["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    have = {name: group["maxReplicas"] for name, group in groups.items()}
    limits = {name: g["template"]["spec"]["containers"][0]["resources"]["limits"] for name, g in groups.items()}
    for pool in (placement.generate, placement.retrieve, placement.light, placement.train):
        group = "gpu" if pool.gpus else "cpu"
        assert pool.workers * pool.gpus <= have.get("gpu", 0)
        assert pool.cpus <= float(limits[group]["cpu"])
        assert pool.workers * pool.cpus <= have[group] * float(limits[group]["cpu"])
    assert tomllib.loads(file.read_text())["prices"] == {"cpu_hour": 0.05, "gpu_hour": 2.5}


def test_a_mistake_is_found_before_the_cluster_is_made():
    kinds = rendered("")
    check, study = kinds["Job"], kinds["RayJob"]["spec"]["entrypoint"].split()
    assert check["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    container = check["spec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    rules = check["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onExitCodes": {"containerName": "check", "operator": "In", "values": [2]}}
    assert container["args"][2:] == study[2:] and not re.search(r"[\"'`$&|;<> ]", "".join(study))
    words = parser().parse_args(study[1:])
    assert (words.verb, words.runs, words.placement) == ("study", "s3://bucket/runs", "/etc/dagr/placement.toml")
    secrets = [c["envFrom"] for pod in pods(kinds)[1:] for c in pod["spec"]["containers"]]
    assert secrets == [[{"secretRef": {"name": "mlflow-login"}}]] * 4


def admitted(policy: dict[str, Any], pod: dict[str, str], namespace: str) -> bool:
    """Whether a pod with these labels may connect to the study's pods, by the meaning of a NetworkPolicy."""
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            spaces = peer.get("namespaceSelector")
            here = namespace == "research" if spaces is None else True
            wanted = (spaces or {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", namespace)
            labels = peer.get("podSelector", {}).get("matchLabels", {})
            if here and wanted == namespace and labels.items() <= pod.items():
                return True
    return False


HELMS = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
KUSTOMIZES = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}
RAYS = {
    "app.kubernetes.io/name": "kuberay",
    "app.kubernetes.io/created-by": "kuberay-operator",
    "ray.io/is-ray-node": "yes",
}


@pytest.mark.parametrize(
    "labels, namespace, enters",
    [
        (HELMS, "kuberay-operator", True),
        (KUSTOMIZES, "kuberay-operator", True),
        (HELMS, "research", False),
        (RAYS, "research", False),
        (RAYS, "other-team", False),
        (RAYS | {"dagr-ray/study": "another"}, "research", False),
        (RAYS | {"dagr-ray/study": "scifact"}, "other-team", False),
        (RAYS | {"dagr-ray/study": "scifact"}, "research", True),
        ({"app.kubernetes.io/name": "prometheus"}, "monitoring", True),
        ({}, "default", False),
    ],
)
def test_the_policy_admits_the_operator_and_the_study_alone(labels, namespace, enters):
    policy = rendered("")["NetworkPolicy"]
    assert admitted(policy, labels, namespace) is enters
    for pod in pods(rendered("")):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"image": {"repository": "x", "digest": "latest"}}, "digest"),
        ({"image": {"repository": "x"}}, "digest"),
        ({"image": {"repository": "", "digest": f"sha256:{'0' * 64}"}}, "repository"),
        ({"runs": ""}, "runs"),
        ({"runs": "runs"}, "runs"),
        ({"study": {"arguments": []}}, "arguments"),
        ({"study": {"arguments": ["data=my set"]}}, "arguments"),
        ({"study": {"arguments": ["data=x; rm -rf /"]}}, "arguments"),
        ({"study": {"job": "beir", "arguments": ["volume=0"]}}, "job"),
        ({"gpu": {"workers": -1}}, "workers"),
        ({"gpu": {"worker": 4}}, "worker"),
        ({"gpu": {"memory": "64GB"}}, "memory"),
        ({"retries": "two"}, "retries"),
        ({"deadlines": {"startSeconds": 5}}, "startSeconds"),
        ({"mlflow": {"trackingUri": "postgresql://x"}}, "trackingUri"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_values_are_refused_by_name(change, says):
    done = helm(MINE | change)
    assert done.returncode != 0 and says in done.stderr


@pytest.mark.parametrize("name", ["a" * 48, "9lives"])
def test_names_that_kuberay_refuses_are_refused(name):
    done = helm(MINE, name=name)
    assert done.returncode != 0 and "the release's name" in done.stderr
