"""The Ray Serve deployment: replicas that serve the registry's models over HTTP, and how to deploy them.

Replicas import PyTorch and what needs it when they start. The job that deploys them does not, and starts faster.
"""

import asyncio
import json
import logging
import math
import sys
import time
import urllib.error
import urllib.request
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from gru import native, ray_internals
from gru.config import ServeConfig, content_key
from gru.config_stages import ServeResources
from gru.errors import UserError
from gru.network import require_bindable, url_of
from gru.registry import tracking, versions
from gru.serving import http_limits
from gru.serving.auth import Keys
from gru.serving.middleware import JsonLines

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client.core import Metric

APP = "gru"
IN_FLIGHT = "tokens_in_flight"
THREADS = 1  # of torch, whose rounding depends on it; those of inference.c are `serve.threads`

ACCESS_LOG_BYTES, ACCESS_LOGS = 16 << 20, 5  # size of a file of the access log; number of files of a replica
METRICS_SECONDS = 2.0  # within which all replicas must report their metrics: Prometheus waits 5 s
SWITCH_SECONDS = 5e-4  # interval at which threads hand over the GIL; 5e-3 makes the engine wait for the event loop

log = logging.getLogger(__name__)


class Replica:
    """A replica of the endpoint: a model manager and the HTTP interface of its models."""

    def __init__(self, config: ServeConfig, model_name: str, tracking_uri: str, storage: str, settings: str) -> None:
        import torch

        from gru.serving.model_manager import ModelManager

        _stay_on_loopback()
        replica_id = serve.get_replica_context().replica_id.unique_id
        _configure_access_log(replica_id)
        torch.set_num_threads(THREADS)
        sys.setswitchinterval(SWITCH_SECONDS)
        tracking.connect_impatiently(tracking_uri)
        self._config, self._settings = config, settings
        # The registries of two projects may have the same address, one after the other.
        registry = content_key(tracking_uri, storage)
        directory = native.cache_directory() / "served" / registry
        self._manager = ModelManager(config, model_name, directory, replica_id)
        self._manager.metrics.all_replicas = self._all_metrics
        self._replicas: DeploymentHandle[Any] | None = None
        self._manager.start()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from gru.serving.api import create_app

        return create_app(lambda: self._manager.models, self._config, self._manager.metrics, self._settings, False)

    async def metrics(self) -> "list[Metric]":
        """Return the metrics of this replica, for the one that Prometheus asked."""
        return self._manager.metrics.collect()

    async def _all_metrics(self) -> "list[list[Metric]]":
        """Return the metrics of each replica. Prometheus reaches one of them at random, and must see them all."""
        if self._replicas is None:
            name = serve.get_replica_context().deployment
            self._replicas = await asyncio.to_thread(serve.get_deployment_handle, name, APP)
        return await self._replicas.broadcast("metrics").results_async(timeout_s=METRICS_SECONDS)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {IN_FLIGHT: float(sum(model.engine.tokens_in_flight for model in self._manager.models))}

    def check_health(self) -> None:
        if not all(model.healthy for model in self._manager.models[:1]):
            raise RuntimeError("the engine has stalled or ended")


def _configure_access_log(replica: str) -> None:
    """Write the access log to a file in Serve's log directory, access_REPLICA.log, and what it replaced beside it."""
    file = Path(ray_internals.serve_log_directory()) / f"access_{replica}.log"
    handler = RotatingFileHandler(file, maxBytes=ACCESS_LOG_BYTES, backupCount=ACCESS_LOGS - 1)
    handler.setFormatter(JsonLines())
    access = logging.getLogger("gru.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    access.handlers = [handler]


def _stay_on_loopback() -> None:
    """Bind the replica's gRPC port to the loopback address, too, if Ray is bound to it.

    Serve 2.60 opens that port, for calls between deployments, on all interfaces, and has no option to change that. It
    opens the port after it has called the deployment's constructor.
    """
    address = ray.util.get_node_ip_address()
    if address.startswith("127."):
        ray_internals.bind_replica_to(address)


def deploy(config: ServeConfig, resources: ServeResources, model_name: str, tracking_uri: str, storage: str) -> None:
    """Start Serve on the connected Ray cluster and deploy the endpoint, or replace it. It outlives this process.

    storage: the pipeline's storage, which with the tracking URI identifies the registry. Returns when a replica is
    ready. Raises UserError if the model has no @champion, if the address cannot be bound, if the key file is unreadable
    or malformed, if it would open an endpoint that requires keys, or if this cluster serves other applications at
    another address.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    if versions.resolve(model_name, versions.CHAMPION) is None:
        raise UserError(f"{model_name}: no version is @{versions.CHAMPION}; train and promote one first")
    if config.keys and (malformed := Keys(config.keys).malformed):
        raise UserError(malformed[0])  # here, not in each replica
    if not config.keys:
        _refuse_to_open()
    _ensure_address(config.host, config.port)
    limits = {ray_internals.PROXY_CALLBACK: http_limits.INSTALL}  # the proxies inherit the controller's environment
    serve.start(
        http_options={"host": config.host, "port": config.port},
        controller_options={"runtime_env": {"env_vars": limits}},
    )
    serve.run(application(config, resources, model_name, tracking_uri, storage), name=APP, route_prefix="/")
    warn_without_limits(url_of(config.host, config.port))


def warn_without_limits(url: str) -> None:
    """Log a warning if the HTTP proxy at `url` has no limits, because something else started this cluster's Serve."""
    if http_limits.are_missing(url):
        log.warning(
            "%s has no limits on headers, slow requests and connections, because Serve was started without them: stop "
            "it (`serve shutdown`) and deploy again, or start it with %s=%s on each node",
            url,
            ray_internals.PROXY_CALLBACK,
            http_limits.INSTALL,
        )


def _refuse_to_open() -> None:
    """Raise UserError if this cluster has an endpoint that requires API keys, at this or another address."""
    client = ray_internals.running_serve_client()
    if client is not None and _requires_keys(url_of(client.http_config.host, client.http_config.port)):
        raise UserError(
            f"serve.keys is not set, but the endpoint at {client.http_config.host}:{client.http_config.port} requires "
            "API keys: set it to the file of the keys, or stop that endpoint first to serve without keys (`gru down`; "
            "on a cluster `serve shutdown`)"
        )


def _requires_keys(url: str) -> bool:
    """Whether an endpoint requires API keys, be it ready or not."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def application(
    config: ServeConfig, resources: ServeResources, model_name: str, tracking_uri: str, storage: str
) -> serve.Application:
    """Return the endpoint as an application of Ray Serve."""
    options: dict[str, Any] = {"num_cpus": resources.cpus}
    if resources.memory:
        options["memory"] = resources.memory
    if resources.labels:
        options["label_selector"] = resources.labels
    deployment = serve.deployment(
        name="Generator",
        **_scaling_options(config),
        # The engine decides what it admits. Serve lets through more than that, so that clients get a 429 from it.
        max_ongoing_requests=2 * (config.slots + config.max_queue) + 64,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.request_seconds,  # shutdown takes no time if no request is open
        ray_actor_options=options,
    )(serve.ingress()(Replica))
    return deployment.bind(config, model_name, tracking_uri, storage, content_key(config, resources, storage))


def _scaling_options(config: ServeConfig) -> dict[str, Any]:
    """Return the options for the number of replicas and for routing: requests of one x-session-id go to one replica.

    A single replica gets this router, too, since the proxies keep the router that they started with.
    """
    router: Any = ray_internals.CONSISTENT_HASH_ROUTER
    routing = {"request_router_config": RequestRouterConfig(request_router_class=router)}
    if config.max_replicas is None:
        return {"num_replicas": config.replicas, **routing}
    arguments = {"tokens_per_replica": config.tokens_per_replica}
    policy = AutoscalingPolicy(policy_function=TokensInFlight, policy_kwargs=arguments)
    bounds = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
    delays = {"upscale_delay_s": 10, "downscale_delay_s": 300}  # a replica that ends loses its cached states
    return {"autoscaling_config": AutoscalingConfig(policy=policy, **bounds, **delays), **routing}


class TokensInFlight:
    """An autoscaling policy: a number of tokens in flight per replica. Serve applies the bounds and delays."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        in_flight = (context.aggregated_metrics or {}).get(IN_FLIGHT, {})
        return math.ceil(sum(in_flight.values()) / self._tokens_per_replica), {}


def _ensure_address(host: str, port: int) -> None:
    """Make sure that Serve can start at this address. Raises UserError if it cannot.

    Serve has one address for all applications of a cluster, so it is shut down if it has another address and runs
    nothing but the endpoint.
    """
    client = ray_internals.running_serve_client()
    if client is not None:
        running = client.http_config
        if (running.host, running.port) == (host, port):
            return
        if set(serve.status().applications) - {APP}:
            raise UserError(
                f"serve.port = {port}: this cluster already serves other applications at "
                f"{running.host}:{running.port}; use that address"
            )
        serve.shutdown()
    require_bindable(host, port, "--set serve.port=PORT")


def wait_ready(url: str, version: str, timeout: float) -> None:
    """Wait until the endpoint at `url` (http://HOST:PORT) serves this version. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    state: Any = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
                state = json.load(response)["version"]
            if state == version:
                return
        except (OSError, ValueError, LookupError) as error:
            state = error
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not serve version {version} after {timeout:.0f} s; last answer: {state}")
