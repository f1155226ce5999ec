"""Contract tests: Ray's private modules have the names, signatures and attributes that gru.ray_internals uses."""

import asyncio
import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import ray
import ray._private.runtime_env.packaging as packaging
import ray.dashboard.modules.dashboard_sdk as dashboard_sdk
import ray.dashboard.modules.job.sdk as job_sdk
from ray._private import state
from ray.serve import context
from ray.serve._private import constants as constants_of_serve
from ray.serve._private import http_util, logging_utils, proxy, replica
from ray.serve._private.request_router import RequestRouter
from ray.serve.config import HTTPOptions
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants, exceptions
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from starlette.responses import PlainTextResponse
from uvicorn import config as uvicorn_config

from gru import ray_internals
from gru.network import free_port
from gru.serving import http_limits


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(autouse=True)
def forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("a contract test must not start Ray"))


def test_importing_the_module_does_not_import_ray() -> None:
    check = "import sys, gru.ray_internals; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", ray_internals.SCALING_CLASSES)
def test_the_base_classes_of_a_scaling_policy_exist(name: str) -> None:
    assert inspect.isclass(getattr(ray_internals, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ray_internals, "NoSuchName")


def test_an_elastic_policy_counts_and_decides_by_the_overridden_methods() -> None:
    policy = ray_internals.ElasticScalingPolicy
    assert parameters(policy._count_possible_workers) == ["self", "reserved_resources"]
    assert parameters(policy.make_decision_for_non_running_worker_group) == ["self"]
    running = parameters(policy.make_decision_for_running_worker_group)
    assert running == ["self", "worker_group_state", "worker_group_status"]
    assert "_count_possible_workers" in inspect.getsource(policy.make_decision_for_non_running_worker_group)
    assert "self._count_possible_workers" in inspect.getsource(policy.make_decision_for_running_worker_group)
    assert issubclass(ray_internals.NoopDecision, ray_internals.ScalingDecision)


def test_a_scaling_config_tells_its_bounds_and_the_resources_of_a_worker() -> None:
    config = ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 0.5})
    assert ray_internals.resources_per_worker(config) == {"CPU": 0.5}
    assert (config.elasticity_enabled, config.max_workers) == (True, 3)
    assert ray_internals.resources_per_worker(ScalingConfig()) == {"CPU": 1}
    policy = ray_internals.ElasticScalingPolicy(config)
    assert policy.scaling_config is config


def test_nodes_are_described_without_arguments() -> None:
    assert parameters(state.state.get_draining_nodes) == []
    assert parameters(state.available_resources_per_node) == []


def test_a_trainer_runs_its_controller_with_the_given_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    trainer: Any = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    monkeypatch.setattr(trainer, "_initialize_and_run_controller", lambda **arguments: calls.append(arguments))
    policy = object()
    ray_internals.use_scaling_policy(trainer, policy)
    trainer._initialize_and_run_controller(scaling_policy=None, callbacks=[])
    assert calls == [{"scaling_policy": policy, "callbacks": []}]
    assert parameters(DataParallelTrainer._initialize_and_run_controller) == ["self", "controller_init_kwargs"]
    fit = inspect.getsource(DataParallelTrainer.fit)
    assert "self._initialize_and_run_controller(" in fit
    assert "scaling_policy=" in fit and "train_run_context=self.train_run_context" in fit


def test_a_trainer_takes_a_run_id() -> None:
    assert "run_id" in {field.name for field in dataclasses.fields(TrainRunContext)}
    trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    ray_internals.set_run_id(trainer, "run")
    assert trainer.train_run_context.run_id == "run"


@pytest.fixture
def propagated(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    variable = "GRU_TEST_VARIABLE"
    monkeypatch.setenv(variable, "1")
    ray_internals.propagate_to_controller(variable)
    yield variable
    constants.ENV_VARS_TO_PROPAGATE.discard(variable)


def test_a_variable_is_propagated_to_the_controller(propagated: str) -> None:
    assert constants.get_env_vars_to_propagate()[propagated] == "1"


def test_failures_are_told_apart() -> None:
    timeout = exceptions.WorkerGroupStartupTimeoutError(2)
    failure = exceptions.WorkerGroupStartupFailedError("cause")
    unresponsive = exceptions.WorkerHealthCheckTimeoutError("cause")
    assert ray_internals.is_startup_timeout(timeout) and not ray_internals.is_startup_timeout(failure)
    assert ray_internals.is_startup_failure(failure) and not ray_internals.is_startup_failure(timeout)
    assert ray_internals.is_unresponsive(unresponsive) and not ray_internals.is_unresponsive(failure)
    cause = ValueError("cause")
    assert ray_internals.worker_failure(exceptions.WorkerHealthCheckFailedError("message", cause)) is cause
    assert ray_internals.worker_failure(cause) is cause


def test_a_failed_run_names_its_controllers_and_its_workers_failures() -> None:
    cause = ValueError("cause")
    assert ControllerError(cause).controller_failure is cause
    assert WorkerGroupError("message", {1: cause}).worker_failures == {1: cause}
    assert issubclass(ControllerError, TrainingFailedError) and issubclass(WorkerGroupError, TrainingFailedError)


def test_a_replica_opens_its_port_at_the_given_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parameters(replica.add_port_to_grpc_server) == ["server", "address"]
    assert "add_port_to_grpc_server(" in inspect.getsource(replica)
    opened: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: opened.append(address))
    ray_internals.bind_replica_to("127.0.0.1")
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert opened == ["127.0.0.1:0"]


def test_the_client_of_serve_is_none_without_a_controller() -> None:
    assert inspect.signature(context._get_global_client).parameters["raise_if_no_controller_running"].default is True


def test_the_router_can_be_imported() -> None:
    module, _, name = ray_internals.CONSISTENT_HASH_ROUTER.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), name), RequestRouter)


def test_a_proxy_of_serve_calls_our_function_and_uses_our_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_internals.PROXY_CALLBACK in vars(constants_of_serve)
    monkeypatch.setattr(http_util, ray_internals.PROXY_CALLBACK, http_limits.INSTALL)
    monkeypatch.setitem(uvicorn_config.HTTP_PROTOCOLS, "auto", "")
    options = http_util.configure_http_middlewares(HTTPOptions(host="127.0.0.1", port=free_port()))
    assert "configure_http_middlewares(" in inspect.getsource(proxy)

    async def serve() -> Any:
        task, server = await http_util.start_asgi_http_server(
            PlainTextResponse("hello"), options, event_loop=asyncio.get_running_loop()
        )
        async with httpx.AsyncClient() as client:
            url = f"http://{options.host}:{options.port}"
            answers = [await client.get(url, headers={"x": "a" * size}) for size in (1, 70_000)]
        server.should_exit = True
        await task
        return answers

    answer, refused = asyncio.run(serve())
    assert (answer.text, refused.status_code) == ("hello", 431)
    assert refused.json()["error"]["type"] == "invalid_request_error"
    names = (
        constants_of_serve.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants_of_serve.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    )
    assert {name.encode() for name in names} == http_limits.SERVE_HEADERS


def test_serve_has_a_directory_for_logs() -> None:
    assert ray_internals.serve_log_directory().endswith("/serve")
    assert "get_serve_logs_dir()" in inspect.getsource(logging_utils.configure_component_logger)


def test_the_loggers_of_a_job_submission_exist() -> None:
    loggers = [dashboard_sdk.logger, job_sdk.logger, packaging.default_logger]
    for name in ray_internals.SUBMISSION_LOGGERS:
        assert any(logger.name == name or logger.name.startswith(f"{name}.") for logger in loggers), name
