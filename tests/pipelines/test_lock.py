"""One process holds the lock; the next one gets it when the holder ends or is killed."""

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
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pipelines.lock import workflow_lock
with workflow_lock(sys.argv[1], "one", lambda: print("waiting", flush=True)):
    print("locked", flush=True)
    sys.stdin.readline()
"""


class Postgres:
    """A Postgres server on its own Unix socket. Started by root, it runs as user `postgres` of the Debian package."""

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
        wait_until("Postgres", lambda: subprocess.run(probe).returncode == 0)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # fast shutdown: ends all sessions
        self.process.wait()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs Debian's package postgresql")
    with tempfile.TemporaryDirectory(prefix="gru-") as directory:  # user postgres may read it, unlike pytest's
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


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def becomes_holder(process: "subprocess.Popen[str]") -> bool:
    while (line := read_line(process)) == "waiting":
        pass
    return line == "locked"


def fail_if_waiting() -> None:
    raise AssertionError("no other process holds this lock")


@pytest.mark.services
def test_the_next_process_gets_the_lock_when_its_holder_is_killed_or_ends(database: str) -> None:
    first = hold(database)
    assert read_line(first) == "locked"
    second = hold(database)
    assert [read_line(second), read_line(second)] == ["waiting", "waiting"]
    with workflow_lock(database, "another", fail_if_waiting):
        pass
    first.kill()
    first.communicate()
    assert becomes_holder(second)
    calls = 0

    def end_second() -> None:
        nonlocal calls
        if calls == 0:
            second.communicate("end")
        calls += 1

    with workflow_lock(database, "one", end_second):
        assert calls == 1
    with workflow_lock(database, "one", fail_if_waiting):
        pass


def test_the_holder_keeps_the_lock_when_postgres_restarts_and_the_next_gets_it_later(postgres: Postgres) -> None:
    first = hold(postgres.url)
    assert read_line(first) == "locked"
    second = hold(postgres.url)
    assert read_line(second) == "waiting"
    postgres.stop()
    assert read_line(second) == "waiting"
    postgres.start()
    assert [read_line(second) for _ in range(10)] == ["waiting"] * 10
    first.kill()
    first.communicate()
    assert becomes_holder(second)
    second.communicate("end")
