"""The embedded stack: a Ray head and an MLflow server on 127.0.0.1, started when none is configured.

What was started is noted in <storage>/stack/, by process id and creation time, so that any later command finds
it, uses it or stops it, and never touches a process that is not ours.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gru import storage
from gru.errors import UserError
from jobs.entry import HOME_VARIABLE

START_SECONDS = 120
STOP_SECONDS = 5  # all that is kept survives a kill


@dataclass
class Service:
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

    def adopt(self) -> bool:
        """Make this process the one that stops it, unless another that lives is. Whether it is now."""
        note = self._read()
        if _find(note["owner"]):
            return False
        storage.write_json(str(self.note), {**note, "owner": _identify(psutil.Process())})
        return True

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
        process, owner = _identify(psutil.Process(child.pid)), _identify(psutil.Process())
        storage.write_json(str(self.note), {"process": process, "owner": owner, "url": url})

    def wait(self, probe: urllib.request.Request) -> None:
        """Return once it answers. Raises RuntimeError if it ends, or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(probe):
            if self.process() is None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start; its log: {self.log}")
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """The session that we started, also where its leader is dead, and what its members started."""
        if "process" not in self._read():
            return []
        session, created = self._read()["process"]
        members = [process for process in psutil.process_iter() if _session(process) == session]
        if any(process.pid == session and process.create_time() != created for process in members):
            return []  # long over: the number is another's now
        return members + [child for member in members for child in member.children(recursive=True)]

    def _read(self) -> dict[str, Any]:
        return json.loads(self.note.read_text()) if self.note.exists() else {}


def _identify(process: psutil.Process) -> list[float]:
    """A process id alone may be given again."""
    return [process.pid, process.create_time()]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _find(identity: list[float] | None) -> psutil.Process | None:
    """The process, if it is still running."""
    if identity is None:
        return None
    try:
        process = psutil.Process(int(identity[0]))
        alive = process.create_time() == identity[1] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if alive else None


def stop(services: list[Service]) -> list[str]:
    """End the services, and all that they started; the names of those that there were."""
    families = {service.name: service.family() for service in services}
    processes = [process for family in families.values() for process in family]
    for service in services:
        if leader := service.process():
            leader.terminate()  # lets Ray and MLflow end their own
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)
    for service in services:
        service.note.unlink(missing_ok=True)
    return [name for name, family in families.items() if family]


@dataclass
class Stack:
    """Where jobs go and where runs are tracked, and the environment that clients of both need."""

    ray: str
    mlflow: str
    environment: dict[str, str]
    embedded: list[Service] = field(default_factory=list)
    """Services that this process stops: it started them, or whoever did is gone."""

    @property
    def embedded_ray(self) -> bool:
        return "RAY_AUTH_TOKEN_PATH" in self.environment

    def stop(self) -> None:
        stop(self.embedded)


def services(directory: Path) -> list[Service]:
    return [Service("ray", directory), Service("mlflow", directory)]


def up(store: str, ray_port: int, mlflow_port: int, say: Callable[[str], None]) -> Stack:
    """Find the configured services, and start those that are not configured. Raises UserError for a port in use."""
    ray_address, mlflow_uri = os.environ.get("RAY_ADDRESS"), os.environ.get("MLFLOW_TRACKING_URI")
    if not (ray_address and mlflow_uri) and not storage.is_local(store):
        raise UserError(f"storage = {store!r} is not on this machine: set RAY_ADDRESS and MLFLOW_TRACKING_URI")
    directory = Path(store) / "stack"
    ray, mlflow = services(directory)
    environment: dict[str, str] = {}
    probes: dict[str, urllib.request.Request] = {}
    owned: list[Service] = []
    try:
        if not mlflow_uri and not (mlflow_uri := _running(mlflow, owned)):
            require_free("127.0.0.1", mlflow_port, "--mlflow-port")
            mlflow_uri = f"http://127.0.0.1:{mlflow_port}"
            owned.append(mlflow)
            mlflow.start(_mlflow_command(Path(store) / "mlflow", mlflow_port), os.environ, mlflow_uri)
            probes["mlflow"] = urllib.request.Request(f"{mlflow_uri}/health")
        if not ray_address:
            environment = _ray_environment(directory)
            if not (ray_address := _running(ray, owned)):
                require_free("127.0.0.1", ray_port, "--ray-port")
                ray_address = f"http://127.0.0.1:{ray_port}"
                owned.append(ray)
                inherited = {"MLFLOW_TRACKING_URI": mlflow_uri, HOME_VARIABLE: str(Path.cwd()), "PATH": _path()}
                ray.start(_ray_command(ray_port), {**os.environ, **environment, **inherited}, ray_address)
                probes["ray"] = _ray_probe(ray_address, environment)
        for service in (ray, mlflow):
            if service.name in probes:
                say(f"starting {service.name}")
                service.wait(probes[service.name])
    except BaseException:
        stop(owned)
        raise
    environment["MLFLOW_TRACKING_URI"] = mlflow_uri
    return Stack(ray_address, mlflow_uri, environment, owned)


def _running(service: Service, owned: list[Service]) -> str | None:
    """The address of a service that is up already; it joins `owned` if nobody else stops it."""
    url = service.url()
    if url is None:
        stop([service])  # what is left of one that was killed
    elif service.adopt():
        owned.append(service)
    return url


def down(store: str) -> list[str]:
    """Stop what was started for this storage; the names of what was running."""
    return stop(services(Path(store) / "stack"))


def address(store: str, name: str) -> str | None:
    """Where an embedded service ("ray" or "mlflow") answers, if it is up."""
    return Service(name, Path(store) / "stack").url()


def _ray_environment(directory: Path) -> dict[str, str]:
    """Token authentication, and Ray's own switch for binding to the loopback address alone."""
    token = directory / "ray-token"
    if not token.exists():
        directory.mkdir(parents=True, exist_ok=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
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
        f"--ray-client-server-port={_free_port()}",
        f"--dashboard-agent-listen-port={_free_port()}",
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


def require_free(host: str, port: int, option: str) -> None:
    """Raise UserError if another program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} is in use ({error.strerror}): choose another with {option}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
