"""The embedded stack: a Ray head and an MLflow server on 127.0.0.1, started when none is configured.

What was started is noted in <storage>/stack/, by process id and start, with the processes that use it: any later
command finds it, the last one to leave stops it, and a process that is not ours is never touched. One process at a time
looks at these notes and acts on them.
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

START_SECONDS = 120
STOP_SECONDS = 5  # all that is kept survives a kill


class ServiceFailed(RuntimeError):
    """An embedded service did not come up."""


@dataclass
class EmbeddedService:
    """One process group that we started."""

    name: str
    directory: Path

    @property
    def note(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def url(self) -> str | None:
        """Where it answers, if it is still running."""
        return self._read()["url"] if self.process() else None

    def process(self) -> psutil.Process | None:
        return _find(self._read().get("process"))

    def join(self) -> None:
        """Count this process among those that use it."""
        note = self._read()
        storage.write_json(str(self.note), {**note, "users": [*self._others(note), _identify(psutil.Process())]})

    def leave(self) -> bool:
        """Count this process no more. Whether it was the last one."""
        note = self._read()
        others = self._others(note)
        if others:
            storage.write_json(str(self.note), {**note, "users": others})
        return not others

    @staticmethod
    def _others(note: dict[str, Any]) -> list[list[int]]:
        return [user for user in note.get("users", []) if user[0] != os.getpid() and _find(user)]

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
        storage.write_json(str(self.note), {"process": _identify(psutil.Process(child.pid)), "url": url})

    def wait(self, probe: urllib.request.Request) -> None:
        """Return once it answers. Raises ServiceFailed if it ends, or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(probe):
            if self.process() is None or time.monotonic() > deadline:
                raise ServiceFailed(f"{self.name} did not start; its log: {self.log}")
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """The session that we started, also where its leader is dead, and what its members started."""
        if "process" not in self._read():
            return []
        session, started = self._read()["process"]
        members = [process for process in psutil.process_iter() if _session(process) == session]
        if any(process.pid == session and _identify(process)[1] != started for process in members):
            return []  # long over: the number is another's now
        children: list[psutil.Process] = []
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += member.children(recursive=True)
        return list({process.pid: process for process in members + children}.values())

    def _read(self) -> dict[str, Any]:
        return json.loads(self.note.read_text()) if self.note.exists() else {}


def _identify(process: psutil.Process) -> list[int]:
    """Process id, which may be given again, and its start in clock ticks since boot, which no change of time moves."""
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
    """The process, if it is still running."""
    if identity is None:
        return None
    try:
        process = psutil.Process(identity[0])
        alive = _identify(process) == identity and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def stop(services: list[EmbeddedService]) -> list[str]:
    """End the services, and all that they started; the names of those that there were."""
    families = {service.name: service.family() for service in services}
    processes = [process for family in families.values() for process in family]
    for service in services:
        with contextlib.suppress(psutil.NoSuchProcess):
            if leader := service.process():
                leader.terminate()  # lets Ray and MLflow end their own
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    for service in services:
        service.note.unlink(missing_ok=True)
    return [name for name, family in families.items() if family]


@dataclass
class Services:
    """Where jobs go and where runs are tracked, and the environment that clients of both need."""

    ray: str
    mlflow: str
    environment: dict[str, str]
    embedded: list[EmbeddedService] = field(default_factory=list)

    @property
    def embedded_ray(self) -> bool:
        return "RAY_AUTH_TOKEN_PATH" in self.environment

    def leave(self) -> None:
        """Stop the embedded services that nobody else uses."""
        if self.embedded:
            with _alone(self.embedded[0].directory):
                stop([service for service in self.embedded if service.leave()])


def _alone(directory: Path) -> FileLock:
    directory.mkdir(parents=True, exist_ok=True)
    return FileLock(directory / "lock")


def services(directory: Path) -> list[EmbeddedService]:
    return [EmbeddedService("ray", directory), EmbeddedService("mlflow", directory)]


def up(store: str, ray_port: int, mlflow_port: int, say: Callable[[str], None]) -> Services:
    """Find the configured services, and start those that are not configured. Raises UserError for a port in use."""
    ray_address, mlflow_uri = os.environ.get("RAY_ADDRESS"), os.environ.get("MLFLOW_TRACKING_URI")
    if not (ray_address and mlflow_uri) and not storage.is_local(store):
        raise UserError(f"storage = {store!r} is not on this machine: set RAY_ADDRESS and MLFLOW_TRACKING_URI")
    if ray_address and not mlflow_uri and urllib.parse.urlsplit(ray_address).hostname not in ("127.0.0.1", "localhost"):
        raise UserError(f"RAY_ADDRESS = {ray_address} is another machine: set MLFLOW_TRACKING_URI to what it can reach")
    if ray_address and mlflow_uri:
        return Services(ray_address, mlflow_uri, {"MLFLOW_TRACKING_URI": mlflow_uri})
    say("waiting for whoever starts or stops these services")
    with _alone(Path(store) / "stack"):
        return _start(store, ray_address, mlflow_uri, ray_port, mlflow_port, say)


def _start(
    store: str,
    ray_address: str | None,
    mlflow_uri: str | None,
    ray_port: int,
    mlflow_port: int,
    say: Callable[[str], None],
) -> Services:
    """Those that have no address are embedded."""
    directory = Path(store) / "stack"
    ray, mlflow = services(directory)
    environment: dict[str, str] = {}
    probes: dict[str, urllib.request.Request] = {}
    begun: list[EmbeddedService] = []
    if not mlflow_uri:
        mlflow_uri = mlflow.url() or _clear(mlflow, mlflow_port, "--mlflow-port")
        probes["mlflow"] = urllib.request.Request(f"{mlflow_uri}/health")
        if not mlflow.process():
            begun.append(mlflow)
            mlflow.start(_mlflow_command(Path(store) / "mlflow", mlflow_port), os.environ, mlflow_uri)
    try:
        if not ray_address:
            environment = _ray_environment(directory)
            ray_address = ray.url() or _clear(ray, ray_port, "--ray-port")
            probes["ray"] = _ray_probe(ray_address, environment)
            if not ray.process():
                inherited = {"MLFLOW_TRACKING_URI": mlflow_uri, HOME_VARIABLE: str(Path.cwd()), "PATH": _path()}
                begun.append(ray)
                ray.start(_ray_command(ray_port), {**os.environ, **environment, **inherited}, ray_address)
        for service in (ray, mlflow):
            if service.name in probes:
                say(f"waiting for {service.name}")
                service.wait(probes[service.name])
                service.join()
    except BaseException:
        stop(begun)
        raise
    environment["MLFLOW_TRACKING_URI"] = mlflow_uri
    return Services(
        ray_address, mlflow_uri, environment, [service for service in (ray, mlflow) if service.name in probes]
    )


def _clear(service: EmbeddedService, port: int, option: str) -> str:
    """Make room for a service that is not running; where it will answer. Raises UserError for a port in use."""
    stop([service])  # what is left of one that was killed
    require_bindable("127.0.0.1", port, option)
    return f"http://127.0.0.1:{port}"


def down(store: str) -> list[str]:
    """Stop what was started for this storage; the names of what was running."""
    directory = Path(store) / "stack"
    if not directory.exists():
        return []
    with _alone(directory):
        return stop(services(directory))


def find_ray(store: str) -> tuple[str, dict[str, str]] | None:
    """Where the configured Ray takes jobs, or the embedded one if it is up, and what its clients need to be set."""
    if configured := os.environ.get("RAY_ADDRESS"):
        return configured, {}
    embedded = address(store, "ray") if storage.is_local(store) else None
    return (embedded, _ray_environment(Path(store) / "stack")) if embedded else None


def address(store: str, name: str) -> str | None:
    """Where an embedded service ("ray" or "mlflow") answers, if it is up."""
    return EmbeddedService(name, Path(store) / "stack").url()


def _ray_environment(directory: Path) -> dict[str, str]:
    """Token authentication, and Ray's own switch for binding to the loopback address alone."""
    token = directory / "ray-token"
    if not token.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = token.with_suffix(".tmp")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(secrets.token_hex(32))
        unfinished.rename(token)
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
        # CPUs are logical here: a stage, its controller, Serve and its replica share few cores.
        f"--num-cpus={max(8, 2 * (os.cpu_count() or 1))}",
        f"--object-store-memory={min(2 << 30, psutil.virtual_memory().total // 5)}",
    ]


def _path() -> str:
    """A submitted job's `python` is the one that runs this."""
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
