"""The embedded Ray head and MLflow server, as real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from gru.network import free_port
from pipelines import embedded

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


@pytest.mark.services
def test_two_users_that_start_at_once_share_services_which_stop_with_the_last_user(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    command = [sys.executable, "-c", USE, str(tmp_path), *map(str, ports)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    users = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    try:
        addresses = f"http://127.0.0.1:{ports[0]} http://127.0.0.1:{ports[1]}\n"
        assert [user.stdout.readline() for user in users if user.stdout] == [addresses] * 2
        services = embedded.services(tmp_path / embedded.DIRECTORY)
        processes = [process for service in services for process in service.processes()]
        assert len(processes) > 5
        [mlflow] = [process for process in (service.process() for service in services[1:]) if process]
        assert mlflow.environ()["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        commands = [" ".join(child.cmdline()) for child in mlflow.children(recursive=True)]
        assert not [command for command in commands if "mlflow.server.jobs" in command], "job runners of 190 MB each"
        for user, runs in zip(users, (True, False), strict=True):
            user.communicate("end")
            assert user.returncode == 0
            assert [bool(service.process()) for service in services] == [runs] * 2
        assert not [process for process in processes if process.is_running()]
    finally:
        embedded.down(str(tmp_path))
