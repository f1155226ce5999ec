"""The Ray Serve deployment: in each replica the models that the registry names, and their HTTP interface."""

import json
import logging
import math
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig

from gru import ray_internals
from gru.config import ServeConfig, ServeResources, content_key
from gru.errors import UserError
from gru.network import require_bindable
from gru.registry import tracking, versions
from gru.serving.api import create_app
from gru.serving.auth import Keys
from gru.serving.model_manager import ModelManager

APP = "gru"
IN_FLIGHT = "tokens_in_flight"
THREADS = 1  # a step is too small to share; the other cores are for HTTP, and for other replicas

SWITCH_SECONDS = (
    5e-4  # after which a thread asks another for Python's lock; 5e-3 lets the engine wait for the event loop
)

log = logging.getLogger(__name__)


class Replica:
    """A replica: the models that the registry names, and their HTTP interface."""

    def __init__(self, config: ServeConfig, model_name: str, tracking_uri: str, settings: str) -> None:
        _stay_on_loopback()
        _log_requests()
        torch.set_num_threads(THREADS)
        sys.setswitchinterval(SWITCH_SECONDS)
        tracking.connect_impatiently(tracking_uri)
        self._config, self._settings = config, settings
        kept = Path.home() / ".cache" / "gru-pipeline" / "served"
        self._lineup = ModelManager(config, model_name, kept, serve.get_replica_context().replica_id.unique_id)
        self._lineup.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(lambda: self._lineup.models, self._config, self._lineup.metrics, self._settings)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {IN_FLIGHT: float(sum(served.engine.tokens_in_flight for served in self._lineup.models))}

    def check_health(self) -> None:
        if not all(served.healthy for served in self._lineup.models[:1]):
            raise RuntimeError("the engine does not respond")


def _log_requests() -> None:
    """Have the access log written where the replica's other output goes."""
    access = logging.getLogger("gru.access")
    access.setLevel(logging.INFO)
    access.propagate = False
    access.handlers = [logging.StreamHandler()]


def _stay_on_loopback() -> None:
    """On a Ray that is bound to the loopback address, keep the replica's gRPC port there too.

    Serve 2.60 opens that port, for calls between deployments, on all interfaces and has no option for it. It does so
    after the deployment's own constructor.
    """
    address = ray.util.get_node_ip_address()
    if address.startswith("127."):
        ray_internals.bind_replica_to(address)


def deploy(config: ServeConfig, resources: ServeResources, model_name: str, tracking_uri: str) -> None:
    """Start Serve on the connected Ray cluster and put the endpoint up, or replace it; it outlives this process.

    Returns when a replica is ready. Raises UserError if the model has no @champion, if the port is in use, if the keys
    cannot be read, or if other applications are served at another address of this cluster.
    """
    mlflow.set_tracking_uri(tracking_uri)
    if versions.resolve(model_name, versions.CHAMPION) is None:
        raise UserError(f"{model_name}: no version is @{versions.CHAMPION}; train and promote one first")
    if config.keys:
        Keys(config.keys)  # what is wrong with them is told here, not in each replica
    _move_to(config.host, config.port)
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(application(config, resources, model_name, tracking_uri), name=APP, route_prefix="/")


def application(
    config: ServeConfig, resources: ServeResources, model_name: str, tracking_uri: str
) -> serve.Application:
    """The endpoint as what Ray Serve runs."""
    options: dict[str, Any] = {"num_cpus": resources.cpus}
    if resources.memory:
        options["memory"] = resources.memory
    if resources.labels:
        options["label_selector"] = resources.labels
    deployment = serve.deployment(
        name="Generator",
        **_scale(config),
        # Admission is the engine's business: Serve lets through what it takes, and some to be told 429.
        max_ongoing_requests=2 * (config.slots + config.max_queue) + 64,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=config.request_seconds,  # it is over at once where nothing is open
        ray_actor_options=options,
    )(serve.ingress()(Replica))
    return deployment.bind(config, model_name, tracking_uri, content_key(config, resources))


def _scale(config: ServeConfig) -> dict[str, Any]:
    """How many replicas, and which of them a request goes to: those of one x-session-id to the same.

    The router is this one where there is one replica, too: the proxies keep the one that they began with."""
    router: Any = ray_internals.CONSISTENT_HASH_ROUTER
    routed = {"request_router_config": RequestRouterConfig(request_router_class=router)}
    if config.max_replicas is None:
        return {"num_replicas": config.replicas, **routed}
    by = {"tokens_per_replica": config.tokens_per_replica}
    policy = AutoscalingPolicy(policy_function=TokensInFlight, policy_kwargs=by)
    bounds = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
    delays = {"upscale_delay_s": 10, "downscale_delay_s": 300}  # a state is lost with its replica
    return {"autoscaling_config": AutoscalingConfig(policy=policy, **bounds, **delays), **routed}


class TokensInFlight:
    """How many replicas are wanted, by the tokens that they have in flight; Serve keeps to the bounds and delays."""

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        in_flight = (context.aggregated_metrics or {}).get(IN_FLIGHT, {})
        return math.ceil(sum(in_flight.values()) / self._tokens_per_replica), {}


def _move_to(host: str, port: int) -> None:
    """Make sure that Serve can be started at this address: it has one for all its applications."""
    client = ray_internals.running_serve_client()
    if client is not None:
        running = client.http_config
        if (running.host, running.port) == (host, port):
            return
        if set(serve.status().applications) - {APP}:
            raise UserError(
                f"serve.port = {port}: this cluster already serves others at {running.host}:{running.port}: use that"
            )
        serve.shutdown()
    require_bindable(host, port, "--set serve.port=PORT")


def wait_ready(url: str, version: str, timeout: float) -> None:
    """Wait until the endpoint at `url` (http://host:port) serves this version. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    last: Any = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
                last = json.load(response)["version"]
            if last == version:
                return
        except (OSError, ValueError, LookupError) as error:
            last = error
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not serve version {version} after {timeout:.0f} s: {last}")
