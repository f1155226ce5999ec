"""The embedded Ray head and MLflow server, as real processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gru.network import free_port
from jobs.entry import RAY_VARIABLE
from pipelines import embedded, ray_sessions, service
from pipelines.service import EmbeddedService, ServiceFailed, identify
from tests.waiting import wait_until

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
USE = """
import sys
from pipelines import embedded
store, ray_port, mlflow_port = sys.argv[1:]
services = embedded.up(store, int(ray_port), int(mlflow_port), lambda line: None)
print(services.ray, services.mlflow, flush=True)
sys.stdin.readline()
services.leave()
"""


def test_two_users_that_start_at_once_share_services_which_stop_with_the_last_user(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    command = [sys.executable, "-c", USE, str(tmp_path), *map(str, ports)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    users = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    try:
        addresses = f"http://127.0.0.1:{ports[0]} http://127.0.0.1:{ports[1]}\n"
        assert [user.stdout.readline() for user in users if user.stdout] == [addresses] * 2
        services = embedded.services(tmp_path / embedded.DIRECTORY)
        processes = [process for each in services for process in each.processes()]
        assert len(processes) > 5
        [mlflow] = [process for process in (each.process() for each in services[1:]) if process]
        assert mlflow.environ()["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        [ray] = [process for process in (each.process() for each in services[:1]) if process]
        port = ray.environ()[RAY_VARIABLE].removeprefix("127.0.0.1:")
        assert f"--port={port}" in ray.cmdline(), "its jobs must not use a Ray that was started later"
        commands = [" ".join(child.cmdline()) for child in mlflow.children(recursive=True)]
        assert not [command for command in commands if "mlflow.server.jobs" in command], "job runners of 190 MB each"
        for user, runs in zip(users, (True, False), strict=True):
            user.communicate("end")
            assert user.returncode == 0
            assert [bool(each.process()) for each in services] == [runs] * 2
        assert not [process for process in processes if service.is_alive(process)]
        assert [each for each in ray_sessions.unused() if each.store == str(tmp_path)]
    finally:
        embedded.down(str(tmp_path))


def small_services(directory: Path, monkeypatch: pytest.MonkeyPatch) -> embedded.Services:
    """Return services with a small HTTP server, a child of a shell, in place of MLflow; it is not started."""
    (directory / "pages").mkdir(parents=True)
    (directory / "pages" / "health").touch()

    def command(_: Path, port: int) -> list[str]:
        server = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {directory / 'pages'}"
        return ["/bin/sh", "-c", f"{server} & wait"]

    monkeypatch.setattr(embedded, "_mlflow_command", command)
    mlflow = EmbeddedService("mlflow", directory / embedded.DIRECTORY)
    return embedded.Services("", f"http://127.0.0.1:{free_port()}", {}, [mlflow])


def test_an_mlflow_is_started_again_even_if_a_process_of_it_still_has_the_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = small_services(tmp_path, monkeypatch)
    [mlflow] = services.embedded
    try:
        embedded._start_mlflow(mlflow, int(services.mlflow.rpartition(":")[2]))
        mlflow.wait(embedded._mlflow_probe(services.mlflow))
        mlflow.join()
        assert services.check() is None
        [leader, child] = sorted(mlflow.processes(), key=lambda process: process != mlflow.process())
        leader.kill()
        wait_until("its end", lambda: not mlflow.process())
        assert services.check() == "MLflow had ended; it is up again"
        wait_until("its child", lambda: len(mlflow.processes()) == 2)
        assert services.check() is None and not service.is_alive(child)
    finally:
        services.leave()
    assert not mlflow.processes() and not mlflow.record.exists()


def test_an_mlflow_that_does_not_start_again_does_not_stop_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = small_services(tmp_path, monkeypatch)
    [mlflow] = services.embedded
    monkeypatch.setattr(embedded, "_mlflow_command", lambda directory, port: ["/bin/false"])
    mlflow.directory.mkdir()
    mlflow.record.write_text("{}")
    assert "the endpoint serves without it" in (services.check() or "")
    assert services.check() is None  # told once, and tried again later
    services.restart_after = 0
    assert "mlflow.log" in (services.check() or "")
    services.leave()


INTERRUPTED = """
import sys, time
from rich.console import Console
from pipelines import embedded, runtime
store, port, program = sys.argv[1:]
embedded._mlflow_command = lambda directory, port: ["/bin/sh", "-c", program]
services = embedded.up(store, 1, int(port), lambda line: None)
with runtime._released_afterwards(services, None, Console()):
    print("up", flush=True)
    time.sleep(600)
"""


def ignores_interrupts(process: "subprocess.Popen[str]") -> bool:
    [mask] = re.findall(r"^SigIgn:\t(.*)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize("phase", ["starting", "up", "stopping"])
def test_ctrl_c_pressed_twice_leaves_nothing(tmp_path: Path, phase: str) -> None:
    (tmp_path / "health").touch()
    port = free_port()
    server = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {tmp_path} & wait"
    program = "trap '' TERM; " + ("sleep 600" if phase == "starting" else server)  # its processes must be killed
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(port), program]
    environment = {**os.environ, "RAY_ADDRESS": "http://127.0.0.1:1"}
    mlflow = EmbeddedService("mlflow", tmp_path / embedded.DIRECTORY)
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as user:
        wait_until("two processes", lambda: len(mlflow.processes()) == 2)
        if phase != "starting":
            assert user.stdout is not None and user.stdout.readline() == "up\n"
        identities = [identify(process) for process in mlflow.processes()]
        user.send_signal(signal.SIGINT)
        if phase == "stopping":
            wait_until("the stop", lambda: ignores_interrupts(user))
        user.send_signal(signal.SIGINT)
    assert not [identity for identity in identities if service._find(identity)]
    assert not mlflow.record.exists()
    assert user.returncode == -signal.SIGINT


def test_a_down_that_is_interrupted_twice_stops_everything_first(tmp_path: Path) -> None:
    script = "import sys; from pipelines import embedded; embedded.down(sys.argv[1])"
    mlflow = EmbeddedService("mlflow", tmp_path / embedded.DIRECTORY)
    program = f"trap 'touch {tmp_path}/asked' TERM; sleep 600 & while true; do wait; done"
    mlflow.start(["/bin/sh", "-c", program], os.environ, "http://127.0.0.1:1")
    try:
        wait_until("two processes", lambda: len(mlflow.processes()) == 2)
        identities = [identify(process) for process in mlflow.processes()]
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT) as down:
            wait_until("the stop", (tmp_path / "asked").exists)
            down.send_signal(signal.SIGINT)
            down.send_signal(signal.SIGINT)
        assert not [identity for identity in identities if service._find(identity)] and not mlflow.record.exists()
    finally:
        embedded.down(str(tmp_path))


def test_what_gru_down_stopped_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = small_services(tmp_path, monkeypatch)
    with pytest.raises(ServiceFailed, match="`gru down` stopped mlflow"):
        services.check()


def test_a_failed_start_keeps_the_other_users_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [mlflow] = small_services(tmp_path, monkeypatch).embedded
    other = subprocess.Popen(["sleep", "60"])
    try:
        user = identify(psutil.Process(other.pid))
        mlflow.directory.mkdir()
        mlflow.record.write_text(json.dumps({"process": [user[0], 0], "url": "", "users": [user]}))
        monkeypatch.setattr(embedded, "_mlflow_command", lambda directory, port: ["/bin/false"])
        with pytest.raises(ServiceFailed, match="mlflow did not start"):
            embedded._start(str(tmp_path), "http://ray", None, 1, free_port(), lambda line: None)
        assert json.loads(mlflow.record.read_text())["users"] == [user]
    finally:
        other.kill()
        other.wait()
