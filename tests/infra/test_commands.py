"""The commands in infra/ and its README: each exists and takes the options that it is given."""

import importlib.util
import re
import shlex

import pytest

from pipelines import cli
from tests.infra.files import (
    COMPOSE,
    CONFIG_PATH,
    IMAGE,
    INFRA,
    RAY_UP,
    README,
    ROOT,
    manifests,
    pods,
)


def commands() -> list[list[str]]:
    """All commands in the manifests, the compose file, the `ray up` file and the README, as words."""
    commands = [each["command"] for template in pods() for each in template["spec"]["containers"] if "command" in each]
    commands += [service["command"] for service in COMPOSE["services"].values() if service["image"] == IMAGE]
    commands += [
        service["healthcheck"]["test"][1:]
        for service in COMPOSE["services"].values()
        if service["image"] == IMAGE and service.get("healthcheck", {}).get("test")
    ]
    lines = [each["spec"]["entrypoint"] for each in manifests("RayJob")]
    lines += RAY_UP["head_start_ray_commands"] + RAY_UP["worker_start_ray_commands"]
    lines += re.findall(r"^    ((?:gru|ray) .+?)(?: &)?$", README, re.MULTILINE)
    lines += re.findall(r"gru-pipeline:\S+ (gru .+?) \|", README)
    return commands + [shlex.split(part) for line in lines for part in line.split("&&")]


def test_the_search_finds_commands_of_every_kind() -> None:
    """A search that finds nothing would pass the test below."""
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
                [config] = [parsed.config] if isinstance(parsed.config, str) else parsed.config  # `run` takes several
                directory = ROOT / "pipelines" if config.startswith("configs/") else ROOT  # as in the image
                assert config == CONFIG_PATH or (directory / config).exists()
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
            options = server.make_context("server", list(arguments)).params
            assert options["port"] == 5000 and options["backend_store_uri"] == "postgresql+psycopg://host/mlflow"
            assert options["allowed_hosts"] == "mlflow:5000"
        case _:
            pytest.fail(f"unknown command: {command}")


def test_files_named_by_the_readme_exist() -> None:
    for path in re.findall(r"\]\(([^:)]+)\)", README):
        assert (INFRA / path).exists(), path
    for path in re.findall(r"\binfra/[\w./-]+", README):
        assert (ROOT / path).exists() or path in ("infra/.env", "infra/kubernetes/"), path
