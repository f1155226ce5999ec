"""The embedded services, started for real."""

import subprocess
import sys
from pathlib import Path

from gru.network import free_port
from pipelines import embedded

ROOT = Path(__file__).parents[2]
USE = """
import sys
from pipelines import embedded
store, ray_port, mlflow_port = sys.argv[1:]
found = embedded.up(store, int(ray_port), int(mlflow_port), lambda line: None)
print(found.ray, found.mlflow, flush=True)
sys.stdin.readline()
found.leave()
"""


def test_two_that_start_at_once_have_the_same_services_which_end_with_the_last_of_them(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    command = [sys.executable, "-c", USE, str(tmp_path), *map(str, ports)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    users = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    try:
        addresses = f"http://127.0.0.1:{ports[0]} http://127.0.0.1:{ports[1]}\n"
        assert [user.stdout.readline() for user in users if user.stdout] == [addresses] * 2
        services = embedded.services(tmp_path / "stack")
        processes = [process for service in services for process in service.family()]
        assert len(processes) > 5
        for user, runs in zip(users, (True, False), strict=True):
            user.communicate("end")
            assert user.returncode == 0
            assert [bool(service.process()) for service in services] == [runs] * 2
        assert not [process for process in processes if process.is_running()]
    finally:
        embedded.down(str(tmp_path))
