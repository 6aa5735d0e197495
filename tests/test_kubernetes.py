"""deploy/kubernetes against the schemas of Kubernetes, and against what entry and runners ask of each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import validate

import core.metrics as named
from core.model_settings import Runner
from core.settings import ROOT, Secrets, Settings

FOLDER = ROOT / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [found for name in KUSTOMIZATION["resources"] for found in yaml.safe_load_all((FOLDER / name).read_text())]
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# Of resources that Kubernetes itself does not know, as their CRDs have them (KEDA 2.17, Prometheus operator 0.85), as far as they are used.
CUSTOM = {
    "ScaledObject": {
        "type": "object", "required": ["scaleTargetRef", "triggers"], "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {"type": "object", "required": ["name"], "additionalProperties": False, "properties": {n: {"type": "string"} for n in ("apiVersion", "kind", "name", "envSourceContainerName")}},
            **{n: {"type": "integer", "minimum": 0} for n in ("minReplicaCount", "maxReplicaCount", "idleReplicaCount", "pollingInterval", "cooldownPeriod", "initialCooldownPeriod")},
            "advanced": {
                "type": "object", "additionalProperties": False,
                "properties": {"restoreToOriginalReplicaCount": {"type": "boolean"}, "horizontalPodAutoscalerConfig": {"type": "object", "additionalProperties": False, "properties": {"name": {"type": "string"}, "behavior": {"type": "object"}}}},
            },
            "triggers": {
                "type": "array", "minItems": 1,
                "items": {"type": "object", "required": ["type", "metadata"], "additionalProperties": False, "properties": {**{n: {"type": "string"} for n in ("type", "name", "metricType")}, "metadata": STRINGS, "useCachedMetrics": {"type": "boolean"}}},
            },
        },
    },
    "PodMonitor": {
        "type": "object", "required": ["selector", "podMetricsEndpoints"], "additionalProperties": False,
        "properties": {
            "selector": {"type": "object", "additionalProperties": False, "properties": {"matchLabels": STRINGS}},
            "podMetricsEndpoints": {"type": "array", "items": {"type": "object", "additionalProperties": False, "properties": {n: {"type": "string"} for n in ("port", "path", "interval", "scheme")}}},
        },
    },
}  # fmt: skip


def called(found: dict[str, Any]) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def workload(name: str) -> dict[str, Any]:
    return next(o for o in OBJECTS if o["kind"] in ("Deployment", "StatefulSet") and o["metadata"]["name"] == name)


def pod(name: str) -> dict[str, Any]:
    return workload(name)["spec"]["template"]["spec"]


def environment(name: str) -> dict[str, str]:
    settings = next(o for o in OBJECTS if called(o) == "ConfigMap easel-settings")["data"]
    return settings | {e["name"]: e["value"] for e in pod(name)["containers"][0]["env"]}


WORKLOADS = ["easel-entry", "easel-stable-diffusion", "easel-unidiffuser"]


@pytest.mark.parametrize("found", OBJECTS, ids=called)
def test_each_object_is_what_kubernetes_takes(found: dict[str, Any]) -> None:
    if schema := CUSTOM.get(found["kind"]):
        validate(found["spec"], schema)
        behaviour = found["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
        target = {"scaleTargetRef": {"kind": "StatefulSet", "name": "x"}, "maxReplicas": 1, "behavior": behaviour}
        kubernetes_validate.validate({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}, "spec": target}, "1.37", strict=True)
    else:
        kubernetes_validate.validate(found, "1.37", strict=True)


COMPONENT = FOLDER / "shared"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What kubectl makes of the base with the component, for several entries."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    overlay = tmp_path_factory.mktemp("overlay")
    shutil.copytree(FOLDER, overlay / "easel", ignore=shutil.ignore_patterns("secrets"))
    for folder, generator in ((overlay / "easel", KUSTOMIZATION), (overlay / "easel/shared", yaml.safe_load((COMPONENT / "kustomization.yaml").read_text()))):
        (folder / "secrets").mkdir()
        for file in generator["secretGenerator"][0]["files"]:
            (folder / file.rpartition("=")[2]).write_text("postgresql+psycopg://easel@db/easel")
    (overlay / "kustomization.yaml").write_text("namespace: easel\nresources: [easel]\ncomponents: [easel/shared]\nreplicas: [{name: easel-entry, count: 3}]\n")
    return list(yaml.safe_load_all(subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True, timeout=60).stdout))


def test_several_entries_share_a_database_whose_address_is_secret(shared: list[dict[str, Any]]) -> None:
    for found in shared:
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, "1.37", strict=True)
    entry = next(o for o in shared if called(o) == "Deployment easel-entry")["spec"]
    assert (entry["replicas"], entry["strategy"]["type"]) == (3, "RollingUpdate")
    (container,) = entry["template"]["spec"]["containers"]
    secret = next(o["metadata"]["name"] for o in shared if o["kind"] == "Secret" and o["metadata"]["name"].startswith("easel-database-"))
    given = {e["name"]: e for e in container["env"]}
    for setting in ("EASEL_JOBS__STORE", "EASEL_USAGE__STORE"):
        assert given[setting] == {"name": setting, "valueFrom": {"secretKeyRef": {"name": secret, "key": "url"}}}
    # What one pod alone may mount is no longer there.
    claims = {v["persistentVolumeClaim"]["claimName"] for v in entry["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v}
    single = {o["metadata"]["name"] for o in shared if o["kind"] == "PersistentVolumeClaim" and o["spec"]["accessModes"] == ["ReadWriteOnce"]}
    assert (claims, single) == ({"easel-data"}, {"easel-entry"})
    assert next(o for o in shared if called(o) == "Service easel")["spec"]["sessionAffinity"] == "ClientIP"
    (rule,) = next(o for o in shared if called(o) == "NetworkPolicy easel-entry-database")["spec"]["egress"]
    assert rule == {"ports": [{"port": 5432}]}


def test_every_file_of_the_component_is_in_it_and_no_secret_is() -> None:
    component = yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())
    assert {p.name for p in COMPONENT.glob("*.yaml")} == {"kustomization.yaml", *component["resources"], *(patch["path"] for patch in component["patches"])}
    for name in component["resources"]:
        for found in yaml.safe_load_all((COMPONENT / name).read_text()):
            kubernetes_validate.validate(found, "1.37", strict=True)
    assert (ROOT / ".gitignore").read_text().splitlines().count("deploy/kubernetes/shared/secrets/") == 1


def test_the_schemas_find_mistakes() -> None:
    wrong = json.loads(json.dumps(workload("easel-entry")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_every_file_is_in_the_kustomization_and_no_secret_is() -> None:
    assert {p.name for p in FOLDER.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}
    assert not [o for o in OBJECTS if o["kind"] == "Secret"]
    (keys,) = KUSTOMIZATION["secretGenerator"]
    files = {f"/run/secrets/easel/{file.removeprefix('secrets/')}" for file in keys["files"]}
    given = environment("easel-entry")
    assert {given[f"{name.upper()}_FILE"] for name in Secrets.model_fields if f"{name.upper()}_FILE" in given} == files
    assert (ROOT / ".gitignore").read_text().splitlines().count("deploy/kubernetes/secrets/") == 1


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_locked_down_probed_and_given_time_to_stop(name: str) -> None:
    spec, (container,) = pod(name), pod(name)["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert spec["terminationGracePeriodSeconds"] > Settings.model_fields["server"].default.grace_s
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert "limits" in container["resources"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/data", "/tmp", "/run/secrets/easel"} <= mounted
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name != "easel-entry")
    assert workload(name)["spec"]["selector"]["matchLabels"].items() <= workload(name)["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_environment_is_what_easel_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {k: v for k, v in environment(name).items() if k.startswith("EASEL_")}
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = Settings().model_dump(mode="json")
    for variable, value in given.items():
        section, _, setting = variable.removeprefix("EASEL_").lower().partition("__")
        assert str(settings[section][setting]) in (value, str(yaml.safe_load(value)), f"{value}.0"), variable


def test_the_entry_knows_each_replica_that_there_may_be() -> None:
    scaled = {o["spec"]["scaleTargetRef"]["name"]: o["spec"] for o in OBJECTS if o["kind"] == "ScaledObject"}
    for name, variable in (("easel-stable-diffusion", "EASEL_STABLE_DIFFUSION__URLS"), ("easel-unidiffuser", "EASEL_UNIDIFFUSER__URLS")):
        service = workload(name)["spec"]["serviceName"]
        urls = Runner(urls=json.loads(environment("easel-entry")[variable])).urls
        assert urls == [f"http://{name}-{i}.{service}:3000" for i in range(scaled[name]["maxReplicaCount"])]
        headless = next(o for o in OBJECTS if called(o) == f"Service {service}")["spec"]
        assert headless["clusterIP"] == "None"
        assert headless["ports"][0]["port"] == pod(name)["containers"][0]["ports"][0]["containerPort"] == 3000
        (trigger,) = scaled[name]["triggers"]
        asked = set(re.findall(r"easel_[a-z_]+", trigger["metadata"]["query"]))
        assert asked == {named.QUEUE_DEPTH._name, named.RUNNING._name}
        assert f'pod=~"{name}-.+"' in trigger["metadata"]["query"]


def test_runners_take_calls_from_the_entry_and_from_prometheus_alone() -> None:
    policy = next(o for o in OBJECTS if called(o) == "NetworkPolicy easel-runners")["spec"]
    (rule,) = policy["ingress"]
    entry = workload("easel-entry")["spec"]["template"]["metadata"]["labels"]
    assert rule["from"][0] == {"podSelector": {"matchLabels": entry}}
    assert rule["from"][1] == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert len(rule["from"]) == 2
    for name in WORKLOADS[1:]:
        assert policy["podSelector"]["matchLabels"].items() <= workload(name)["spec"]["template"]["metadata"]["labels"].items()
        assert [o for o in OBJECTS if called(o) == f"PodDisruptionBudget {name}"]
