"""All use of Ray's private modules, so that an upgrade of Ray is checked in one place.

tests/gru/test_ray_internals.py fails when Ray changes a name, a signature or an attribute that is used here. Ray is
imported only where it is used, because some processes need the names in here but not Ray Train.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.scaling_policy import (  # noqa: F401
        ElasticScalingPolicy,
        NoopDecision,
        ScalingDecision,
    )

SCALING_MODULE = "ray.train.v2._internal.execution.scaling_policy"
SCALING_CLASSES = ("ElasticScalingPolicy", "NoopDecision", "ScalingDecision")
"""Base classes of a scaling policy, imported when first used. Ray Train has no public interface for one."""

SUBMISSION_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env",
)
"""Loggers that describe the uploaded package at each job submission. Ray has no option to turn them off."""

CONSISTENT_HASH_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Import path of the router that sends requests of one session to one replica. It is experimental in Serve."""

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable with the import path of a function that each HTTP proxy of Serve calls before it starts its server."""


def __getattr__(name: str) -> Any:
    if name not in SCALING_CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(SCALING_MODULE), name)


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to leave the cluster. Ray's public state API does not list them."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each node by its id. The public `ray.available_resources` gives only their sum."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def resources_per_worker(scaling_config: Any) -> dict[str, float]:
    """Return a ScalingConfig's resources per worker with Ray Train's defaults. The public field may be None."""
    return scaling_config._resources_per_worker_not_none


def use_scaling_policy(trainer: Any, policy: Any) -> None:
    """Make a TorchTrainer use this scaling policy. Its constructor does not take one."""
    run_controller = trainer._initialize_and_run_controller

    def run_with_policy(**arguments: Any) -> Any:
        return run_controller(**{**arguments, "scaling_policy": policy})

    trainer._initialize_and_run_controller = run_with_policy


def set_run_id(trainer: Any, run_id: str) -> None:
    """Set the id under which a TorchTrainer claims resources, a random one by default.

    The claim of a controller that died lasts 3 minutes, in which the next elastic controller would wait for resources.
    Under the same id it takes the claim over.
    """
    object.__setattr__(trainer.train_run_context, "run_id", run_id)  # of a frozen dataclass


def propagate_to_controller(variable: str) -> None:
    """Have Ray Train pass an environment variable on to its controller. It passes on only those that it knows."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add(variable)


def is_startup_timeout(error: BaseException) -> bool:
    """Whether the workers of a run did not start in time. Ray Train's public exceptions do not tell the cause."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, WorkerGroupStartupTimeoutError)


def is_startup_failure(error: BaseException) -> bool:
    """Whether the workers of a run failed to start. Ray Train's public exceptions do not tell the cause."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    return isinstance(error, WorkerGroupStartupFailedError)


def is_unresponsive(error: BaseException) -> bool:
    """Whether a worker does not answer health checks. Ray Train's public exceptions do not tell the cause."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    return isinstance(error, WorkerHealthCheckTimeoutError)


def worker_failure(error: Exception) -> Exception:
    """Return a worker's own failure, without Ray Train's wrapper for one that a health check found."""
    return getattr(error, "health_check_failure", None) or error


def bind_replica_to(address: str) -> None:
    """Have Serve open this process's gRPC port at one address.

    Serve opens it, for calls between deployments, on all interfaces and has no option for it.
    """
    from ray.serve._private import replica

    open_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, wanted: open_port(server, wanted.replace("[::]", address))


def running_serve_client() -> Any:
    """Return the client of the cluster's running Serve, None without one. Serve's public API would start one."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def serve_log_directory() -> str:
    """Return the directory of Serve's logs on this node. Serve has no public function for it."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return get_serve_logs_dir()


def use_http_protocol(protocol: type) -> None:
    """Make HTTP servers that start in this process use this protocol class of uvicorn's.

    Serve's proxy builds uvicorn's configuration itself, and has no option for it.
    """
    from uvicorn import config

    config.HTTP_PROTOCOLS["auto"] = f"{protocol.__module__}:{protocol.__qualname__}"
