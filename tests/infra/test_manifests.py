"""The Kubernetes manifests: they match published schemas, KubeRay's rules, and the code."""

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

from gru import config as configuration
from gru import ray_internals
from gru.config import content_key
from jobs import entry
from tests.infra.files import (
    COMPOSE,
    CONFIG_PATH,
    INFRA,
    KUBERNETES,
    RAY_KINDS,
    README,
    Manifest,
    manifests,
    name,
    pinned,
    pods,
    values,
)

# The useful fields of KubeRay's API ray.io/v1, as in its release 1.6, since no package contains its CRDs. None: fields
# below are checked by another test, or are the user's own.
CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "idleTimeoutSeconds": int, "upscalingMode": str, "version": str, "resources": None, "securityContext": None,
    },
    "headGroupSpec": {"rayStartParams": None, "serviceType": str, "template": None},
    "workerGroupSpecs": [
        {
            "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int,
            "rayStartParams": None, "template": None,
        }
    ],
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str, "submissionMode": str, "clusterSelector": None, "rayClusterSpec": CLUSTER, "jobId": str,
        "backoffLimit": int, "activeDeadlineSeconds": int, "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int, "entrypointNumCpus": float, "runtimeEnvYAML": str, "suspend": bool,
    },
    "RayService": {
        "serveConfigV2": str, "rayClusterConfig": CLUSTER, "serveService": None, "upgradeStrategy": {"type": str},
        "excludeHeadPodFromServeSvc": bool,
    },
}  # fmt: skip


def unknown(value: Any, fields: Any, path: str) -> list[str]:
    """The problems of a value: fields that the API does not have, and values of another type."""
    match fields:
        case None:
            return []
        case dict():
            below = value.items() if isinstance(value, dict) else [("", value)]
            return [
                problem
                for key, inner in below
                for problem in (
                    unknown(inner, fields[key], f"{path}.{key}") if key in fields else [f"{path}.{key} is not a field"]
                )
            ]
        case list():
            return [problem for each in value for problem in unknown(each, fields[0], f"{path}[]")]
    return [] if type(value) is fields else [f"{path} is {value!r}, not a {fields.__name__}"]


def clusters() -> list[Any]:
    """Each Ray cluster that a manifest describes, as a RayCluster manifest."""
    clusters = []
    for manifest in manifests(*RAY_KINDS):
        spec = manifest["spec"]
        spec = spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if spec:
            metadata = {"name": "cluster", "namespace": manifest["metadata"]["namespace"]}
            cluster = {"kind": "RayCluster", "metadata": metadata, "spec": copy.deepcopy(spec)}
            clusters.append(pytest.param(cluster, id=name(manifest)))
    return clusters


@pytest.mark.parametrize("manifest", manifests(), ids=name)
def test_each_manifest_matches_the_schema_of_its_kind(manifest: Manifest) -> None:
    if manifest["apiVersion"] == "ray.io/v1":
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert unknown(manifest["spec"], FIELDS[manifest["kind"]], manifest["kind"]) == []
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("template", pods())
def test_each_pod_matches_the_schema_and_is_restricted(template: dict[str, Any]) -> None:
    """The namespace enforces https://kubernetes.io/docs/concepts/security/pod-security-standards/ (restricted)."""
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def test_a_wrong_field_is_found() -> None:
    wrong = copy.deepcopy(manifests("RayCluster")[0]["spec"])
    wrong["headGroupSpec"]["raystartparams"] = {}
    wrong["workerGroupSpecs"][0]["minReplicas"] = "1"
    assert unknown(wrong, CLUSTER, "spec") == [
        "spec.headGroupSpec.raystartparams is not a field",
        "spec.workerGroupSpecs[].minReplicas is '1', not a int",
    ]


@pytest.mark.parametrize("cluster", clusters())
def test_rays_autoscaler_reads_each_cluster(cluster: Manifest) -> None:
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert types[group["groupName"]]["resources"]["CPU"] >= 1
        assert types[group["groupName"]]["max_workers"] == group["maxReplicas"]
        assert types[group["groupName"]]["resources"].get("GPU", 0) == (group["groupName"] == "gpu")
    assert types["headgroup"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("cluster", clusters())
def test_each_cluster_requires_the_token_and_is_probed(cluster: Manifest) -> None:
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["rayVersion"] == pinned("ray")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            probed = container[probe]["httpGet"]
            assert probed == {"path": "/api/healthz", "port": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
        assert container["readinessProbe"]


def test_jobs_follow_kuberays_rules() -> None:
    """The rules of KubeRay's ValidateRayJobSpec."""
    names = {manifest["metadata"]["name"] for manifest in manifests("RayCluster")}
    for job in manifests("RayJob"):
        spec = job["spec"]
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec), name(job)
        if "clusterSelector" in spec:
            assert spec["clusterSelector"]["ray.io/cluster"] in names
            assert not spec.get("backoffLimit") and not spec.get("shutdownAfterJobFinishes")
        assert spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished")
        assert spec["submissionMode"] == "HTTPMode"


def test_all_references_are_defined() -> None:
    defined = {(each["kind"], each["metadata"].get("name")) for each in manifests()}
    keys = {(each["metadata"]["name"], key) for each in manifests("Secret") for key in each["stringData"]}
    everything = [each for each in manifests() if each["kind"] != "Secret"]
    for reference in values(everything, "secretKeyRef"):
        assert (reference["name"], reference["key"]) in keys
    for secret in values(everything, "secretName"):
        assert ("Secret", secret) in defined
    for reference in [*values(everything, "configMapRef"), *values(everything, "configMap")]:
        assert ("ConfigMap", reference["name"]) in defined
    for reference in values(everything, "persistentVolumeClaim"):
        assert ("PersistentVolumeClaim", reference["claimName"]) in defined
    assert ("ray-token", "auth_token") in keys, "the key that KubeRay looks for"
    [labels] = {json.dumps(each["spec"]["selector"]) for each in manifests("Service")}
    assert json.loads(labels) == manifests("Deployment")[0]["spec"]["template"]["metadata"]["labels"]


def test_kustomize_includes_all_lasting_resources_and_no_secret() -> None:
    kustomization = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())
    files = {file.name for file in (INFRA / "kubernetes").glob("*.yaml")}
    apart = {"kustomization.yaml", "secrets.yaml", "run.yaml", "retrain.yaml", "service.yaml"}
    assert set(kustomization["resources"]) == files - apart
    for file in apart - {"kustomization.yaml"}:
        assert f"infra/kubernetes/{file}" in README


def test_no_secret_has_a_value_here() -> None:
    for secret in manifests("Secret"):
        assert all(re.fullmatch(r"\$\{[A-Z_]+\}", value) for value in secret["stringData"].values())
    for service in COMPOSE["services"].values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN", variable):
                assert re.fullmatch(r"\$\{[A-Z_]+(:\?[^}]*)?\}", value), variable


@pytest.fixture
def mounted_config(tmp_path: Path) -> Path:
    """The configuration file that the manifests mount."""
    [toml] = [each["data"]["pipeline.toml"] for each in manifests("ConfigMap") if "pipeline.toml" in each["data"]]
    path = tmp_path / "pipeline.toml"
    path.write_text(toml)
    return path


def test_the_configuration_is_valid_and_requires_api_keys(mounted_config: Path) -> None:
    config = configuration.load(mounted_config)
    assert config.serve.host == "0.0.0.0" and config.serve.keys == "/etc/gru/keys/keys"
    assert config.resources.train.gpus == 1
    assert config.storage in values(manifests("RayCluster"), "mountPath")
    assert config.corpus.sources[0].startswith(config.storage)
    for manifest in manifests("RayCluster", "RayJob"):  # kinds that train
        assert "gpu" in values(manifest, "groupName") or "clusterSelector" in manifest["spec"]


def test_the_service_is_what_serve_deploys(mounted_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import ServeDeploySchema

    from gru.serving import deployment, http_limits

    [service] = manifests("RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = schema.applications
    config = entry.load_config(str(mounted_config), [])
    assert (schema.http_options.host, schema.http_options.port) == (config.serve.host, config.serve.port)
    assert application.name == deployment.APP and application.args == {"config": CONFIG_PATH}
    module, _, builder = application.import_path.partition(":")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    built = getattr(importlib.import_module(module), builder)({"config": str(mounted_config)})
    [generator] = build_app(built, name=application.name).deployments
    assert generator.name == "Generator"
    settings = content_key(config.serve, config.resources.serve, config.storage)
    assert generator.init_args == (config.serve, config.model_name, "http://mlflow:5000", config.storage, settings)
    [environment] = [each["data"] for each in manifests("ConfigMap") if each["metadata"]["name"] == "environment"]
    assert environment[ray_internals.PROXY_CALLBACK] == http_limits.INSTALL
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"configMapRef": {"name": "environment"}} in container["envFrom"]
