"""The Ray Serve deployment: an engine and its HTTP interface per replica, following the registry's @champion."""

import json
import logging
import random
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica
from ray.serve.context import _get_global_client

from gru import registry
from gru.config import ServeConfig, content_key
from gru.errors import UserError
from gru.network import require_free
from gru.serving.api import Served, create_app
from gru.serving.engine import Engine

APP = "gru"
CPUS = 0.5  # logical: what is left on a small machine is for the other stages
THREADS = 1  # a step is too small to share; the other cores are for HTTP, and for other replicas

log = logging.getLogger(__name__)


class Generator:
    """A replica. The model that answers is in `self._served`; a thread replaces it when @champion moves."""

    def __init__(self, config: ServeConfig, model_name: str, tracking_uri: str) -> None:
        _stay_on_loopback()
        torch.set_num_threads(THREADS)
        mlflow.set_tracking_uri(tracking_uri)
        self._config = config
        self._model_name = model_name
        self._served: Served | None = None
        self._follow()
        threading.Thread(target=self._keep_following, name="gru-follow", daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(lambda: self._served, self._config.max_tokens, content_key(self._config))

    def check_health(self) -> None:
        if self._served is not None and not self._served.healthy:
            raise RuntimeError("the engine does not respond")

    def _follow(self) -> None:
        """Take @champion into service unless it already is; the old engine finishes what it has begun."""
        version = registry.resolve(self._model_name, registry.CHAMPION)
        old = self._served
        if version is None or (old is not None and old.version.version == version.version):
            return
        with tempfile.TemporaryDirectory(prefix="gru-bundle-") as directory:
            bundle = registry.fetch_bundle(version, Path(directory))
        engine = Engine(bundle.model, bundle.tokenizer.end_of_text, self._config.slots, self._config.max_queue)
        self._served = Served(engine, bundle, version)
        log.info("serving %s version %s", version.name, version.version)
        if old is not None:
            old.engine.close(drain=True)

    def _keep_following(self) -> None:
        while True:
            time.sleep(self._config.poll_seconds * random.uniform(0.8, 1.2))  # replicas do not ask in step
            try:
                self._follow()
            except Exception:
                log.exception("cannot follow %s@%s; the present model stays", self._model_name, registry.CHAMPION)


def _stay_on_loopback() -> None:
    """On a Ray that is bound to the loopback address, keep the replica's gRPC port there too.

    Serve 2.60 opens that port, for calls between deployments, on all interfaces and has no option for it. It does so
    after the deployment's own constructor.
    """
    address = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        return
    open_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, wanted: open_port(server, wanted.replace("[::]", address))


def deploy(config: ServeConfig, model_name: str, tracking_uri: str) -> None:
    """Start Serve on the connected Ray cluster and put the endpoint up, or replace it; it outlives this process.

    Returns when a replica is ready. Raises UserError if the model has no @champion, if the port is in use, or if
    other applications are served at another address of this cluster.
    """
    mlflow.set_tracking_uri(tracking_uri)
    if registry.resolve(model_name, registry.CHAMPION) is None:
        raise UserError(f"{model_name}: no version is @{registry.CHAMPION}; train and promote one first")
    _move_to(config.host, config.port)
    serve.start(http_options={"host": config.host, "port": config.port})
    deployment = serve.deployment(
        name="Generator",
        num_replicas=config.replicas,
        # Admission is the engine's business: Serve lets through what it takes, and some to be told 429.
        max_ongoing_requests=2 * (config.slots + config.max_queue) + 64,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": CPUS},
    )(serve.ingress()(Generator))
    serve.run(deployment.bind(config, model_name, tracking_uri), name=APP, route_prefix="/")


def _move_to(host: str, port: int) -> None:
    """Make sure that Serve can be started at this address: it has one for all its applications."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        running = client.http_config
        if (running.host, running.port) == (host, port):
            return
        if set(serve.status().applications) - {APP}:
            raise UserError(
                f"serve.port = {port}: this cluster already serves others at {running.host}:{running.port}: use that"
            )
        serve.shutdown()
    require_free(host, port, "--set serve.port=PORT")


def wait_ready(url: str, version: str, timeout: float) -> None:
    """Wait until the endpoint at `url` (http://host:port) serves this version. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    last: Any = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                models = json.load(response)["data"]
            last = [model["version"] for model in models]
            if version in last:
                return
        except (OSError, ValueError) as error:
            last = error
        time.sleep(0.2)
    raise TimeoutError(f"{url} does not serve version {version} after {timeout:.0f} s: {last}")
