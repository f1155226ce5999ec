"""The compose file, the image and the `ray up` file: they match their schemas, each other, and the code."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from gru import config as configuration
from gru.config import ServeConfig
from pipelines import cli, runtime
from tests.infra.files import (
    COMPOSE,
    IMAGE,
    INFRA,
    PROJECT,
    RAY_UP,
    README,
    ROOT,
    manifests,
    values,
)


def test_compose_matches_its_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(INFRA / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_the_configured_ports_on_loopback_only() -> None:
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


def test_compose_services_wait_for_each_other() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[other]["healthcheck"]["test"]
            else:
                assert "restart" not in services[other], "it must end by itself"
    assert all("healthcheck" in service for key, service in services.items() if key != "bucket")


def test_the_readme_sets_all_variables_of_compose() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)[:}]", (INFRA / "compose.yaml").read_text())) - {"HEAD_CPUS", "WORKER_CPUS"}
    used |= {secret["environment"] for secret in COMPOSE["secrets"].values()}
    [loop] = re.findall(r"for name in (.+); do", README)
    assert used == {*loop.split(), *re.findall(r"s/\^/([A-Z_]+)=/", README)}


def test_the_endpoint_of_compose_requires_a_key() -> None:
    arguments = cli.build_parser().parse_args(COMPOSE["services"]["pipeline"]["command"][1:])
    config = configuration.load(ROOT / "pipelines" / arguments.config[0], arguments.set)
    assert config.serve.host == "0.0.0.0" and config.serve.keys == "/run/secrets/keys"
    for key in ("head", "worker"):
        assert Path(config.serve.keys).name in COMPOSE["services"][key]["secrets"]


def test_containers_with_ray_require_the_token() -> None:
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
    included = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert included == {package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]} | files
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for path in copied.split():
            assert (ROOT / path).exists() and (path == "." or path.split("/")[0] in included)
    assert "pip install --no-cache-dir --constraint constraints.txt '.[html,languages]'" in dockerfile
    assert re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE) == ["1000"]
    assert {each["runAsUser"] for each in values(manifests(), "securityContext") if "runAsUser" in each} == {1000}


def test_an_installed_package_sends_no_code_to_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise everything that is installed would be sent with each job."""
    assert runtime.checkout() == str(ROOT)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "site-packages" / "pipelines" / "runtime.py"))
    assert runtime.checkout() is None
