"""The embedded services: a Ray head and an MLflow server on 127.0.0.1, started when none is configured.

Each service has a record, <storage>/embedded/NAME.json: its process id and start time, its URL, and the processes that
use it. So any later command finds it, the last user stops it, and a process that this program did not start is never
touched. A file lock lets only one process at a time read the records and act on them.
"""

import os
import secrets
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock

from gru import storage
from gru.errors import UserError
from gru.machine import available_cpus, available_memory
from gru.network import OWNER_VARIABLE, free_port, require_bindable
from jobs.entry import HOME_VARIABLE, RAY_VARIABLE, ray_directory, require_startable_ray
from pipelines import ray_sessions
from pipelines.interrupts import interrupts_deferred
from pipelines.service import EmbeddedService, ServiceFailed, end, stop

DIRECTORY = "embedded"  # in the storage
# Until services that were asked to stop are killed, which loses no data. Ray without a job waits for its Serve alone.
STOP_SECONDS, JOB_STOP_SECONDS = 1, 5
RESTART_SECONDS = 60  # after an attempt to start MLflow again that failed
# MLflow's job execution, which nothing here uses, would start seven processes of 190 MB each.
MLFLOW_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
# On a full machine, Ray would end its newest worker, and have Linux end workers first, however small they are.
RAY_ENVIRONMENT = {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_oom_score_adjustment": "0"}


@dataclass
class Services:
    """The addresses of Ray and MLflow, and the environment variables that clients of both need."""

    ray: str
    mlflow: str
    environment: dict[str, str]
    embedded: list[EmbeddedService] = field(default_factory=list)
    restart_after: float = 0.0
    """Value of time.monotonic() before which MLflow is not started again."""

    @property
    def embedded_ray(self) -> bool:
        return "RAY_AUTH_TOKEN_PATH" in self.environment

    def check(self) -> str | None:
        """Start the embedded MLflow server again if it has ended. Return what happened, for people, if anything did.

        Raises ServiceFailed if the embedded Ray has ended, and the endpoint with it, or if `gru down` stopped MLflow.
        """
        for service in self.embedded:
            if service.process() or (service.name == "mlflow" and time.monotonic() < self.restart_after):
                continue
            with _file_lock(service.directory):  # which `gru down` holds until all services have ended
                if not service.record.exists():
                    raise ServiceFailed(f"`gru down` stopped {service.name}")
                if service.name == "ray":
                    raise ServiceFailed(f"ray ended, and the endpoint with it; see its log: {service.log}")
                return self._restart_mlflow(service)
        return None

    def _restart_mlflow(self, service: EmbeddedService) -> str:
        """Start MLflow again. Return what happened. Without MLflow the endpoint continues to serve."""
        try:
            if service.process() is None:  # another user may have been faster
                end([service], STOP_SECONDS)  # a process of it that still runs has the port
                _start_mlflow(service, urllib.parse.urlsplit(self.mlflow).port or 0)
                service.wait(_mlflow_probe(self.mlflow))
        except ServiceFailed as failure:
            self.restart_after = time.monotonic() + RESTART_SECONDS
            return f"MLflow ended, and the endpoint serves without it; next attempt in {RESTART_SECONDS} s: {failure}"
        finally:
            service.join()
        return "MLflow had ended; it is up again"

    def leave(self) -> None:
        """Stop the embedded services that no other process uses."""
        if self.embedded:
            with _file_lock(self.embedded[0].directory):
                _stop([service for service in self.embedded if service.leave()])


def _stop(services: list[EmbeddedService]) -> list[str]:
    """Stop the services, and return the names of those that ran. A job in progress has time to save its work."""
    titles = [_title(process) for service in services for process in service.processes()]
    return stop(services, JOB_STOP_SECONDS if any("ray::JobSupervisor" in title for title in titles) else STOP_SECONDS)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def starts_deferred(store: str) -> AbstractContextManager[object]:
    """Let no other process start or stop embedded services of this storage inside the block."""
    return _file_lock(Path(store) / DIRECTORY) if storage.is_local(store) else nullcontext()


def _file_lock(directory: Path) -> FileLock:
    directory.mkdir(parents=True, exist_ok=True)
    return FileLock(directory / "lock")


def services(directory: Path) -> list[EmbeddedService]:
    """The embedded services with records in `directory`: Ray, then MLflow."""
    return [EmbeddedService("ray", directory), EmbeddedService("mlflow", directory)]


def up(store: str, ray_port: int, mlflow_port: int, progress: Callable[[str], None]) -> Services:
    """Find the configured services and start embedded ones for the others. Raises UserError for a port in use."""
    ray_address, mlflow_uri = os.environ.get("RAY_ADDRESS"), os.environ.get("MLFLOW_TRACKING_URI")
    if not (ray_address and mlflow_uri) and not storage.is_local(store):
        raise UserError(f"storage = {store!r} is not a path on this machine: set RAY_ADDRESS and MLFLOW_TRACKING_URI")
    if ray_address and not mlflow_uri and urllib.parse.urlsplit(ray_address).hostname not in ("127.0.0.1", "localhost"):
        raise UserError(
            f"RAY_ADDRESS = {ray_address} is on another machine: set MLFLOW_TRACKING_URI to a server it reaches"
        )
    if ray_address and mlflow_uri:
        return Services(ray_address, mlflow_uri, {"MLFLOW_TRACKING_URI": mlflow_uri})
    progress("another gru process is starting or stopping services; waiting")
    with _file_lock(Path(store) / DIRECTORY):
        return _start(store, ray_address, mlflow_uri, ray_port, mlflow_port, progress)


def _start(
    store: str,
    ray_address: str | None,
    mlflow_uri: str | None,
    ray_port: int,
    mlflow_port: int,
    progress: Callable[[str], None],
) -> Services:
    """Start an embedded service for each address that is None."""
    directory = Path(store) / DIRECTORY
    ray, mlflow = services(directory)
    environment: dict[str, str] = {}
    probes: dict[str, urllib.request.Request] = {}
    started: list[EmbeddedService] = []
    if not mlflow_uri:
        mlflow_uri = mlflow.url() or _reserve(mlflow, mlflow_port, "--mlflow-port")
        probes["mlflow"] = _mlflow_probe(mlflow_uri)
    if not ray_address:
        require_startable_ray()
        environment = _ray_environment(directory)
        ray_address = ray.url() or _reserve(ray, ray_port, "--ray-port")
        probes["ray"] = _ray_probe(ray_address, environment)
    try:
        if "mlflow" in probes and not mlflow.process():
            started.append(mlflow)
            _start_mlflow(mlflow, mlflow_port)
        if "ray" in probes and not ray.process():
            port = free_port()
            inherited = {"MLFLOW_TRACKING_URI": mlflow_uri, HOME_VARIABLE: str(Path.cwd()), "PATH": _path()}
            inherited[RAY_VARIABLE] = f"127.0.0.1:{port}"
            started.append(ray)
            variables = RAY_ENVIRONMENT | _environment(ray) | environment | inherited
            ray.start(_ray_command(ray_port, port), variables, ray_address)
        for service in (ray, mlflow):
            if service.name in probes:
                progress(f"waiting for {service.name} to start")
                service.wait(probes[service.name])
                service.join()
        if ray in started:
            ray_sessions.mark(ray)
    except BaseException:
        with interrupts_deferred():  # a second Ctrl-C must not leave some of the processes running
            end(started, STOP_SECONDS)
            for service in started:
                if service.leave():  # else another process still uses one that had ended, and starts it again
                    service.record.unlink(missing_ok=True)
        raise
    environment["MLFLOW_TRACKING_URI"] = mlflow_uri
    return Services(
        ray_address, mlflow_uri, environment, [service for service in (ray, mlflow) if service.name in probes]
    )


def _reserve(service: EmbeddedService, port: int, option: str) -> str:
    """Return the URL of a service that is not running yet. Raises UserError for a port in use."""
    end([service], STOP_SECONDS)  # remaining processes of one that was killed; its users may still be there
    require_bindable("127.0.0.1", port, option)
    return f"http://127.0.0.1:{port}"


def down(store: str) -> list[str]:
    """Stop the embedded services of this storage. Return the names of those that were running."""
    directory = Path(store) / DIRECTORY
    if not directory.exists():
        return []
    with _file_lock(directory), interrupts_deferred():  # one that stopped halfway would leave some processes
        return _stop(services(directory))


def find_ray(store: str) -> tuple[str, dict[str, str]] | None:
    """The address of the configured or running embedded Ray, and the environment variables that its clients need.

    None if there is neither.
    """
    if configured := os.environ.get("RAY_ADDRESS"):
        return configured, {}
    embedded = address(store, "ray") if storage.is_local(store) else None
    return (embedded, _ray_environment(Path(store) / DIRECTORY)) if embedded else None


def address(store: str, name: str) -> str | None:
    """The URL of an embedded service ("ray" or "mlflow"); None if it is not running."""
    return EmbeddedService(name, Path(store) / DIRECTORY).url()


def _ray_environment(directory: Path) -> dict[str, str]:
    """The variables for token authentication, and Ray's own switch for binding to the loopback address alone."""
    token = directory / "ray-token"
    if not token.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = token.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_hex(32))
        temporary.rename(token)
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _ray_command(dashboard_port: int, port: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}",
        f"--port={port}",
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
        *([f"--temp-dir={directory}"] if (directory := ray_directory()) else []),
        "--min-worker-port=0",
        "--max-worker-port=0",
        # Ray's CPUs are logical: a stage, its controller, Serve and its replica share few cores.
        f"--num-cpus={max(8, 2 * available_cpus())}",
        f"--object-store-memory={min(2 << 30, available_memory() // 5)}",
    ]


def _path() -> str:
    """PATH with this interpreter first: submitted jobs run the same `python`."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _ray_probe(address: str, environment: Mapping[str, str]) -> urllib.request.Request:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    return urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})


def _mlflow_probe(uri: str) -> urllib.request.Request:
    return urllib.request.Request(f"{uri}/health")


def _start_mlflow(service: EmbeddedService, port: int) -> None:
    command = _mlflow_command(service.directory.parent / "mlflow", port)
    service.start(command, _environment(service) | MLFLOW_ENVIRONMENT, f"http://127.0.0.1:{port}")


def _environment(service: EmbeddedService) -> dict[str, str]:
    return {**os.environ, OWNER_VARIABLE: str(service.directory.parent)}


def _mlflow_command(directory: Path, port: int) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    return [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        "--host=127.0.0.1",
        f"--port={port}",
        "--workers=1",  # one process owns the SQLite file
        f"--backend-store-uri=sqlite:///{directory / 'mlflow.db'}",
        f"--artifacts-destination={directory / 'artifacts'}",
    ]
