"""A process that outlives the command that starts it: its record, its users, and its end. It knows no Ray or MLflow.

The record, DIRECTORY/NAME.json, has the process id and start time, the URL, and the processes that use the service.
"""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gru import storage
from pipelines.interrupts import interrupts_deferred

START_SECONDS = 120
KILL_SECONDS = 5  # until a killed process has ended


class ServiceFailed(RuntimeError):
    """An embedded service did not start, or has ended."""


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
        storage.write_json(str(self.record), {**record, "users": [*self._others(record), identify(psutil.Process())]})

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
        with self.log.open("wb") as log, interrupts_deferred():  # a process without a record would not be found again
            child = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            record = {"process": identify(psutil.Process(child.pid)), "url": url}
            storage.write_json(str(self.record), {**record, "users": self._others(self._read())})

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
        if any(process.pid == session and identify(process)[1] != started for process in members):
            return []  # that session ended; its number belongs to another one now
        children: list[psutil.Process] = []
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += member.children(recursive=True)
        return [each for each in {each.pid: each for each in members + children}.values() if is_alive(each)]

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.record.read_text())
        except FileNotFoundError:
            return {}


def identify(process: psutil.Process) -> list[int]:
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
        alive = identify(process) == identity and is_alive(process)
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def stop(services: list[EmbeddedService], seconds: float) -> list[str]:
    """Stop the services with all their processes. Return the names of the services that were running.

    seconds: after which the processes that have not ended are killed.
    """
    running = end(services, seconds)
    for service in services:
        service.record.unlink(missing_ok=True)
    return running


def end(services: list[EmbeddedService], seconds: float) -> list[str]:
    """End all processes of the services as `stop` does, and keep their records."""
    running = {service.name: service.processes() for service in services}
    processes = [process for members in running.values() for process in members]
    for service in services:
        leader = service.process()
        for process in [leader] if leader else running[service.name]:  # a leader of Ray or MLflow stops its children
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    for process in _wait_for_end(processes, seconds):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for_end(processes, KILL_SECONDS)
    return [name for name, members in running.items() if members]


def _wait_for_end(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until the processes have ended, and return those that have not in this time.

    Not psutil.wait_procs: in a container whose first process reaps no orphans, these are zombies for ever.
    """
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
