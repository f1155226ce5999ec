"""The embedded services: a Ray head and an MLflow server on 127.0.0.1, started when none is configured.

Each service has a record, <storage>/embedded/NAME.json: its process id and start time, its URL, and the processes that
use it. So any later command finds it, the last user stops it, and a process that this program did not start is never
touched. A file lock lets only one process at a time read the records and act on them.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from gru import storage
from gru.errors import UserError
from gru.network import free_port, require_bindable
from jobs.entry import HOME_VARIABLE

DIRECTORY = "embedded"  # in the storage
START_SECONDS = 120
STOP_SECONDS = 5  # then they are killed, which loses no data
# MLflow's job execution, which nothing here uses, would start seven processes of 190 MB each.
MLFLOW_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


class ServiceFailed(RuntimeError):
    """An embedded service did not start."""


@dataclass
class EmbeddedService:
    """One service, run as a session of processes."""

    name: str
    directory: Path

    @property
    def record(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def url(self) -> str | None:
        """The URL of the service; None if it is not running."""
        return self._read()["url"] if self.process() else None

    def process(self) -> psutil.Process | None:
        return _find(self._read().get("process"))

    def join(self) -> None:
        """Add this process to the users of the service."""
        record = self._read()
        storage.write_json(str(self.record), {**record, "users": [*self._others(record), _identify(psutil.Process())]})

    def leave(self) -> bool:
        """Remove this process from the users of the service. Return whether it was the last one."""
        record = self._read()
        others = self._others(record)
        if others:
            storage.write_json(str(self.record), {**record, "users": others})
        return not others

    @staticmethod
    def _others(record: dict[str, Any]) -> list[list[int]]:
        return [user for user in record.get("users", []) if user[0] != os.getpid() and _find(user)]

    def start(self, command: list[str], environment: Mapping[str, str], url: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            child = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        storage.write_json(str(self.record), {"process": _identify(psutil.Process(child.pid)), "url": url})

    def wait(self, probe: urllib.request.Request) -> None:
        """Wait until the service answers. Raises ServiceFailed if it ends or does not answer in START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(probe):
            if self.process() is None or time.monotonic() > deadline:
                raise ServiceFailed(f"{self.name} did not start; see its log: {self.log}")
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """The processes of the service's session, also if its leader is dead, and their descendants."""
        if "process" not in self._read():
            return []
        session, started = self._read()["process"]
        members = [process for process in psutil.process_iter() if _session(process) == session]
        if any(process.pid == session and _identify(process)[1] != started for process in members):
            return []  # that session ended; its number belongs to another one now
        children: list[psutil.Process] = []
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += member.children(recursive=True)
        return list({process.pid: process for process in members + children}.values())

    def _read(self) -> dict[str, Any]:
        return json.loads(self.record.read_text()) if self.record.exists() else {}


def _identify(process: psutil.Process) -> list[int]:
    """The process id, which may be reused, and the start time in clock ticks since boot, which tells reuses apart."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise psutil.NoSuchProcess(process.pid) from None
    return [process.pid, int(fields[19])]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _find(identity: list[int] | None) -> psutil.Process | None:
    """Return the process with this identity; None if it is not running."""
    if identity is None:
        return None
    try:
        process = psutil.Process(identity[0])
        alive = _identify(process) == identity and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def stop(services: list[EmbeddedService]) -> list[str]:
    """Stop the services with all their processes. Return the names of those that were running."""
    running = {service.name: service.processes() for service in services}
    processes = [process for members in running.values() for process in members]
    for service in services:
        with contextlib.suppress(psutil.NoSuchProcess):
            if leader := service.process():
                leader.terminate()  # Ray and MLflow then stop their own children
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    for service in services:
        service.record.unlink(missing_ok=True)
    return [name for name, members in running.items() if members]


@dataclass
class Services:
    """The addresses of Ray and MLflow, and the environment variables that clients of both need."""

    ray: str
    mlflow: str
    environment: dict[str, str]
    embedded: list[EmbeddedService] = field(default_factory=list)

    @property
    def embedded_ray(self) -> bool:
        return "RAY_AUTH_TOKEN_PATH" in self.environment

    def leave(self) -> None:
        """Stop the embedded services that no other process uses."""
        if self.embedded:
            with _file_lock(self.embedded[0].directory):
                stop([service for service in self.embedded if service.leave()])


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
        probes["mlflow"] = urllib.request.Request(f"{mlflow_uri}/health")
        if not mlflow.process():
            started.append(mlflow)
            command = _mlflow_command(Path(store) / "mlflow", mlflow_port)
            mlflow.start(command, {**os.environ, **MLFLOW_ENVIRONMENT}, mlflow_uri)
    try:
        if not ray_address:
            environment = _ray_environment(directory)
            ray_address = ray.url() or _reserve(ray, ray_port, "--ray-port")
            probes["ray"] = _ray_probe(ray_address, environment)
            if not ray.process():
                inherited = {"MLFLOW_TRACKING_URI": mlflow_uri, HOME_VARIABLE: str(Path.cwd()), "PATH": _path()}
                started.append(ray)
                ray.start(_ray_command(ray_port), {**os.environ, **environment, **inherited}, ray_address)
        for service in (ray, mlflow):
            if service.name in probes:
                progress(f"waiting for {service.name} to start")
                service.wait(probes[service.name])
                service.join()
    except BaseException:
        stop(started)
        raise
    environment["MLFLOW_TRACKING_URI"] = mlflow_uri
    return Services(
        ray_address, mlflow_uri, environment, [service for service in (ray, mlflow) if service.name in probes]
    )


def _reserve(service: EmbeddedService, port: int, option: str) -> str:
    """Return the URL of a service that is not running yet. Raises UserError for a port in use."""
    stop([service])  # remaining processes of one that was killed
    require_bindable("127.0.0.1", port, option)
    return f"http://127.0.0.1:{port}"


def down(store: str) -> list[str]:
    """Stop the embedded services of this storage. Return the names of those that were running."""
    directory = Path(store) / DIRECTORY
    if not directory.exists():
        return []
    with _file_lock(directory):
        return stop(services(directory))


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


def _ray_command(port: int) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        "--port=0",
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        # Ray's CPUs are logical: a stage, its controller, Serve and its replica share few cores.
        f"--num-cpus={max(8, 2 * (os.cpu_count() or 1))}",
        f"--object-store-memory={min(2 << 30, psutil.virtual_memory().total // 5)}",
    ]


def _path() -> str:
    """PATH with this interpreter first: submitted jobs run the same `python`."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _ray_probe(address: str, environment: Mapping[str, str]) -> urllib.request.Request:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    return urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})


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


def _answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
