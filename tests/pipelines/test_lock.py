"""One process works, and the next one goes on where it ends or is killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.lock import workflow_lock
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pipelines.lock import turn
with turn(sys.argv[1], "one", lambda: print("waiting", flush=True)):
    print("working", flush=True)
    sys.stdin.readline()
"""


class Postgres:
    """On a socket of its own; as root, of the user that the Debian package makes."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.programs, self.directory = programs, directory
        self.drop = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        if self.drop:
            shutil.chown(directory, "postgres", "postgres")
        initdb = [*self.drop, programs / "initdb", "--no-sync", "--username=gru", "-D", directory / "data"]
        subprocess.run(initdb, check=True, capture_output=True)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://gru@/postgres?host={self.directory}"

    def start(self) -> None:
        options = ["-c", "listen_addresses=", "-k", self.directory, "-c", "fsync=off"]
        server = [*self.drop, self.programs / "postgres", "-D", self.directory / "data", *options]
        self.process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        probe = [self.programs / "pg_isready", "-q", "-h", self.directory]
        wait_for("Postgres", lambda: subprocess.run(probe).returncode == 0)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # its sessions are ended
        self.process.wait()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs Debian's package postgresql")
    with tempfile.TemporaryDirectory(prefix="gru-") as directory:  # others can look into it, unlike pytest's
        server = Postgres(programs[-1], Path(directory))
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'workflows.sqlite'}"
    return str(request.getfixturevalue("postgres").url)


def hold(database: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, database]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def waits_to_work(process: "subprocess.Popen[str]") -> bool:
    while (line := said(process)) == "waiting":
        pass
    return line == "working"


def never() -> None:
    raise AssertionError("it is nobody's turn")


def test_the_next_one_goes_on_when_one_is_killed_or_ends(database: str) -> None:
    first = hold(database)
    assert said(first) == "working"
    second = hold(database)
    assert [said(second), said(second)] == ["waiting", "waiting"]
    with workflow_lock(database, "another", never):
        pass
    first.kill()
    first.communicate()
    assert waits_to_work(second)
    looks = 0

    def let_it_end() -> None:
        nonlocal looks
        if looks == 0:
            second.communicate("end")
        looks += 1

    with workflow_lock(database, "one", let_it_end):
        assert looks == 1
    with workflow_lock(database, "one", never):
        pass


def test_who_works_goes_on_when_postgres_is_restarted_and_the_next_one_after_that(postgres: Postgres) -> None:
    first = hold(postgres.url)
    assert said(first) == "working"
    second = hold(postgres.url)
    assert said(second) == "waiting"
    postgres.stop()
    assert said(second) == "waiting"
    postgres.start()
    assert [said(second) for _ in range(10)] == ["waiting"] * 10
    first.kill()
    first.communicate()
    assert waits_to_work(second)
    second.communicate("end")
