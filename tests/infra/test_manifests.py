"""What infra/ says, held against published schemas, against the programs that read it, and against the code."""

import copy
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from gru import config as configuration
from gru.config import ServeConfig, content_key
from gru.serving.metrics import Metrics
from pipelines import cli, runtime

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
README = (INFRA / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGE = f"gru-pipeline:{PROJECT['project']['version']}"
KUBERNETES = "1.34"
CONFIG_PATH = "/etc/gru/pipeline/pipeline.toml"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Manifest = dict[str, Any]


@functools.cache
def all_manifests() -> list[Manifest]:
    files = sorted(set((INFRA / "kubernetes").glob("*.yaml")) - {INFRA / "kubernetes" / "kustomization.yaml"})
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def manifests(*kinds: str) -> list[Manifest]:
    return [manifest for manifest in all_manifests() if not kinds or manifest["kind"] in kinds]


def name(manifest: Manifest) -> str:
    metadata = manifest["metadata"]
    return f"{manifest['kind']}/{metadata.get('name') or metadata['generateName']}"


def nodes(value: Any) -> Iterator[Any]:
    """All mappings in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from nodes(each)


def values(document: Any, key: str) -> list[Any]:
    return [node[key] for node in nodes(document) if key in node]


COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((INFRA / "prometheus.yaml").read_text())
RAY_UP: dict[str, Any] = yaml.safe_load((INFRA / "ray-up.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana-dashboard.json").read_text())

# Kubernetes, and KubeRay on it

# The fields of KubeRay's API, ray.io/v1, that there may be a use for, as its release 1.6 has them: its CRDs are in no
# package. None: what is below is checked otherwise, or is the user's own.
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
    match fields:
        case None:
            return []
        case dict():
            below = value.items() if isinstance(value, dict) else [("", value)]
            return [
                problem
                for key, inner in below
                for problem in (
                    unknown(inner, fields[key], f"{path}.{key}") if key in fields else [f"{path}.{key} is no field"]
                )
            ]
        case list():
            return [problem for each in value for problem in unknown(each, fields[0], f"{path}[]")]
    return [] if type(value) is fields else [f"{path} is {value!r}, not a {fields.__name__}"]


def clusters() -> list[Any]:
    """Each Ray cluster that a manifest describes, as a RayCluster of its own."""
    found = []
    for manifest in manifests(*RAY_KINDS):
        spec = manifest["spec"]
        spec = spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if spec:
            metadata = {"name": "cluster", "namespace": manifest["metadata"]["namespace"]}
            cluster = {"kind": "RayCluster", "metadata": metadata, "spec": copy.deepcopy(spec)}
            found.append(pytest.param(cluster, id=name(manifest)))
    return found


def pods() -> list[dict[str, Any]]:
    return values(manifests(), "template")


@pytest.mark.parametrize("manifest", manifests(), ids=name)
def test_each_manifest_matches_the_schema_of_its_kind(manifest: Manifest) -> None:
    if manifest["apiVersion"] == "ray.io/v1":
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert unknown(manifest["spec"], FIELDS[manifest["kind"]], manifest["kind"]) == []
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("template", pods())
def test_each_pod_matches_the_schema_and_is_restricted(template: dict[str, Any]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, which the namespace enforces"""
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
        "spec.headGroupSpec.raystartparams is no field",
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
def test_each_cluster_wants_the_token_and_is_probed(cluster: Manifest) -> None:
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert spec["rayVersion"] == pinned("ray")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked == {"path": "/api/healthz", "port": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
        assert container["readinessProbe"]


def test_jobs_keep_to_kuberays_rules() -> None:
    """As its ValidateRayJobSpec has them."""
    there = {manifest["metadata"]["name"] for manifest in manifests("RayCluster")}
    for job in manifests("RayJob"):
        spec = job["spec"]
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec), name(job)
        if "clusterSelector" in spec:
            assert spec["clusterSelector"]["ray.io/cluster"] in there
            assert not spec.get("backoffLimit") and not spec.get("shutdownAfterJobFinishes")
        assert spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished")
        assert spec["submissionMode"] == "HTTPMode"


def test_what_is_referred_to_is_there() -> None:
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


def test_kustomize_takes_all_that_stays_up_and_no_secret() -> None:
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
def pipeline(tmp_path: Path) -> Path:
    """The configuration that the manifests mount."""
    [toml] = [each["data"]["pipeline.toml"] for each in manifests("ConfigMap") if "pipeline.toml" in each["data"]]
    path = tmp_path / "pipeline.toml"
    path.write_text(toml)
    return path


def test_the_configuration_is_valid_and_open_only_to_keys(pipeline: Path) -> None:
    config = configuration.load(pipeline)
    assert config.serve.host == "0.0.0.0" and config.serve.keys == "/etc/gru/keys/keys"
    assert config.resources.train.gpus == 1
    assert config.storage in values(manifests("RayCluster"), "mountPath")
    assert config.corpus.sources[0].startswith(config.storage)
    for manifest in manifests("RayCluster", "RayJob"):  # those that train
        assert "gpu" in values(manifest, "groupName") or "clusterSelector" in manifest["spec"]


def test_the_service_is_what_serve_deploys(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import ServeDeploySchema

    from gru.serving import deployment

    [service] = manifests("RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = schema.applications
    config = configuration.load(pipeline)
    assert (schema.http_options.host, schema.http_options.port) == (config.serve.host, config.serve.port)
    assert application.name == deployment.APP and application.args == {"config": CONFIG_PATH}
    module, _, builder = application.import_path.partition(":")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    built = getattr(importlib.import_module(module), builder)({"config": str(pipeline)})
    [generator] = build_app(built, name=application.name).deployments
    assert generator.name == "Generator"
    settings = content_key(config.serve, config.resources.serve)
    assert generator.init_args == (config.serve, config.model_name, "http://mlflow:5000", settings)


# Compose, the image and `ray up`


def test_compose_matches_its_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(INFRA / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_on_loopback_only_and_the_ports_that_are_configured() -> None:
    published = {}
    for service in COMPOSE["services"].values():
        for port in service.get("ports", []):
            address, outer, inner = port.split(":")
            assert address == "127.0.0.1" and outer == inner
            published[int(inner)] = service
    run = cli.build_parser().parse_args(["run", "CONFIG"])
    services = COMPOSE["services"]
    assert published[run.ray_port] is services["head"]
    assert published[run.mlflow_port] is services["mlflow"]
    assert published[ServeConfig().port] is services["head"]


def test_composes_parts_wait_for_each_other() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[other]["healthcheck"]["test"]
            else:
                assert "restart" not in services[other], "it ends"
    assert all("healthcheck" in service for key, service in services.items() if key != "bucket")


def test_composes_variables_are_made_by_the_readme() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)[:}]", (INFRA / "compose.yaml").read_text())) - {"HEAD_CPUS", "WORKER_CPUS"}
    used |= {secret["environment"] for secret in COMPOSE["secrets"].values()}
    [loop] = re.findall(r"for name in (.+); do", README)
    assert used == {*loop.split(), *re.findall(r"s/\^/([A-Z_]+)=/", README)}


def test_composes_endpoint_wants_a_key() -> None:
    arguments = cli.build_parser().parse_args(COMPOSE["services"]["pipeline"]["command"][1:])
    config = configuration.load(ROOT / "pipelines" / arguments.config, arguments.set)
    assert config.serve.host == "0.0.0.0" and config.serve.keys == "/run/secrets/keys"
    for key in ("head", "worker"):
        assert Path(config.serve.keys).name in COMPOSE["services"][key]["secrets"]


def test_rays_containers_want_the_token() -> None:
    for key in ("head", "worker", "pipeline"):
        environment = COMPOSE["services"][key]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN")
    [job] = manifests("CronJob")
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in values(job, "env")[0]
    options = RAY_UP["docker"]["run_options"]
    [path] = [option.split("=")[1] for option in options if "RAY_AUTH_TOKEN_PATH" in option]
    assert "--env RAY_AUTH_MODE=token" in options and path in RAY_UP["file_mounts"]


def test_ray_up_passes_rays_own_validation() -> None:
    config = prepare_config(copy.deepcopy(RAY_UP))
    validate_config(config)
    assert config["setup_commands"] == [] and "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def pinned(package: str) -> str:
    [version] = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_images_are_ours_or_have_a_version() -> None:
    images = [*values(manifests(), "image"), *values(COMPOSE["services"], "image"), *values(RAY_UP, "image")]
    assert {image for image in images if image.startswith("gru-pipeline")} == {IMAGE}
    dockerfile = (INFRA / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    for image in {*images, *bases} - {IMAGE}:
        assert re.search(r":v?\d+\.\d+", image), image
    assert IMAGE in dockerfile and IMAGE in README
    assert len(set(bases)) == 1


def test_the_image_has_what_it_needs() -> None:
    dockerfile = (INFRA / "Dockerfile").read_text()
    kept = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert kept == {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]} | files
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for path in copied.split():
            assert (ROOT / path).exists() and (path == "." or path.split("/")[0] in kept)
    assert "pip install --no-cache-dir --constraint constraints.txt ." in dockerfile
    assert re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE) == ["1000"]
    assert {each["runAsUser"] for each in values(manifests(), "securityContext") if "runAsUser" in each} == {1000}


def test_an_installed_package_sends_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all that is installed would travel with each job."""
    assert runtime.checkout() == str(ROOT)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "site-packages" / "pipelines" / "runtime.py"))
    assert runtime.checkout() is None


# Commands


def commands() -> list[list[str]]:
    found = [each["command"] for template in pods() for each in template["spec"]["containers"] if "command" in each]
    found += [service["command"] for service in COMPOSE["services"].values() if service["image"] == IMAGE]
    found += [
        service["healthcheck"]["test"][1:]
        for service in COMPOSE["services"].values()
        if service["image"] == IMAGE and service.get("healthcheck", {}).get("test")
    ]
    lines = [each["spec"]["entrypoint"] for each in manifests("RayJob")]
    lines += RAY_UP["head_start_ray_commands"] + RAY_UP["worker_start_ray_commands"]
    lines += re.findall(r"^    ((?:gru|ray) .+?)(?: &)?$", README, re.MULTILINE)
    lines += re.findall(r"gru-pipeline:\S+ (gru .+?) \|", README)
    return found + [shlex.split(part) for line in lines for part in line.split("&&")]


def test_commands_are_found() -> None:
    """So that nothing is left out by how it is looked for."""
    words = [" ".join(command) for command in commands()]
    for expected in ("gru run", "gru key", "ray start --head", "ray job submit", "mlflow server", "-m jobs.promote"):
        assert any(expected in command for command in words), expected


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_each_command_exists_with_its_options(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0] == "env" or "=" in command[0]:
        rest = [word for word in command if word != "env"]
        while "=" in rest[0]:
            assert rest.pop(0) == f"RAY_ADDRESS=http://127.0.0.1:{cli.build_parser().parse_args(['run', 'C']).ray_port}"
        command = rest
    match command:
        case ["gru", *arguments]:
            parsed = cli.build_parser().parse_args(arguments)
            if "config" in parsed:
                beside = ROOT / "pipelines" if parsed.config.startswith("configs/") else ROOT  # as the image has them
                assert parsed.config == CONFIG_PATH or (beside / parsed.config).exists()
        case ["python", "-m", module, path]:
            assert importlib.util.find_spec(module) and path == CONFIG_PATH
        case ["python", "-c", source]:
            compile(source, "command", "exec")
        case ["ray", "job", "submit", *arguments]:
            from ray.dashboard.modules.job.cli import submit

            submitted = submit.make_context("submit", list(arguments)).params
            assert submitted["address"] == "http://gru-head-svc:8265"
            test_each_command_exists_with_its_options(list(submitted["entrypoint"]), monkeypatch)
        case ["ray", *arguments]:
            from ray.scripts.scripts import cli as ray

            monkeypatch.delenv("RAY_ADDRESS", raising=False)
            subcommand, program, rest = ray.resolve_command(ray.make_context("ray", ["start"]), arguments)
            assert program is not None
            program.make_context(subcommand, [re.sub(r"\$\{[A-Z_]+:-(\d+)\}", r"\1", word) for word in rest])
        case ["mlflow", "server", *arguments]:
            from mlflow.cli import server

            monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg://host/mlflow")
            monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow:5000")
            taken = server.make_context("server", list(arguments)).params
            assert taken["port"] == 5000 and taken["backend_store_uri"] == "postgresql+psycopg://host/mlflow"
            assert taken["allowed_hosts"] == "mlflow:5000"
        case _:
            pytest.fail(f"unknown command: {command}")


# Metrics


def test_prometheus_asks_where_something_answers() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(PROMETHEUS) == {"global", "scrape_configs"} and set(jobs) == {"ray", "gru"}
    [directory, file] = jobs["ray"]["file_sd_configs"][0]["files"][0].rsplit("/", 1)
    assert file == ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert f"ray:{directory}" in COMPOSE["services"]["head"]["volumes"]
    assert f"ray:{directory}:ro" in COMPOSE["services"]["prometheus"]["volumes"]
    assert jobs["gru"]["metrics_path"] == "/metrics"
    assert jobs["gru"]["static_configs"] == [{"targets": [f"head:{ServeConfig().port}"]}]
    key = Path(jobs["gru"]["authorization"]["credentials_file"])
    assert key.parent == Path("/run/secrets") and key.name in COMPOSE["services"]["prometheus"]["secrets"]


def published() -> dict[str, set[str]]:
    """Names of the endpoint's metrics as Prometheus knows them, and their labels."""
    metrics = Metrics(lambda: [], "replica")
    metrics.answered("/v1/completions", 200, 0.1)
    metrics._first.labels("1").observe(0.1)
    metrics._tokens.labels("1", "generated").inc()
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            found.setdefault(sample.name, set()).update(sample.labels, {"replica"})
        if not family.samples:  # a gauge of an engine, of which there is none
            labels = {"model", "alias", "digest"} if family.name == "gru_model_info" else set()
            found[family.name] = {"replica", "version"} | labels
    return found


def rays_own() -> set[str]:
    """Those that Ray's own dashboards ask for."""
    from ray.dashboard.modules.metrics import dashboards

    files = Path(dashboards.__file__).parent.glob("*panels.py")
    return set(re.findall(r"\bray_\w+", "".join(file.read_text() for file in files)))


def queries() -> list[str]:
    return values(DASHBOARD["panels"], "expr")


def test_the_dashboard_shows_what_is_published() -> None:
    known, rays = published(), rays_own()
    for query in queries():
        names = re.findall(r"\b(?:gru|ray)_\w+", query)
        assert names, query
        for metric in names:
            assert metric in known or metric in rays, metric
        labels = set(re.findall(r'(\w+)=~?"', query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            labels |= {label.strip() for label in group.split(",")}
        if names[0] in known:
            assert labels <= known[names[0]], query


def test_the_dashboard_leaves_no_metric_of_the_endpoint_out() -> None:
    shown = set(re.findall(r"\bgru_\w+", " ".join(queries())))
    families = {re.sub("_(bucket|sum|count)$", "", metric) for metric in published()}
    assert {re.sub("_(bucket|sum|count)$", "", metric) for metric in shown} == families


def test_the_dashboards_panels_have_a_place_each() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    [source] = DASHBOARD["templating"]["list"]
    assert {uid["uid"] for uid in values(panels, "datasource")} == {f"${{{source['name']}}}"}


def test_training_logs_what_the_dashboard_says_of_it() -> None:
    [text] = [panel["options"]["content"] for panel in DASHBOARD["panels"] if panel["type"] == "text"]
    for metric in re.findall(r"`(\S+)`", text):
        assert f'"{metric}"' in (ROOT / "gru" / "training" / "worker_loop.py").read_text()


def test_the_readme_names_files_that_are_there() -> None:
    for path in re.findall(r"\]\(([^:)]+)\)", README):
        assert (INFRA / path).exists(), path
    for path in re.findall(r"\binfra/[\w./-]+", README):
        assert (ROOT / path).exists() or path in ("infra/.env", "infra/kubernetes/"), path
