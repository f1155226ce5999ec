"""One process works, and the next one goes on where it ends or is killed."""

import subprocess
import sys
import time
from pathlib import Path

from pipelines.turns import turn

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pipelines.turns import turn
with turn(sys.argv[1], "one", lambda: print("waiting", flush=True)):
    print("working", flush=True)
    sys.stdin.readline()
"""


def hold(database: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, database]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def never() -> None:
    raise AssertionError("it is nobody's turn")


def test_the_next_one_goes_on_when_one_is_killed_or_ends(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'workflows.sqlite'}"
    first = hold(database)
    assert said(first) == "working"
    second = hold(database)
    assert [said(second), said(second)] == ["waiting", "waiting"]
    with turn(database, "another", never):
        pass
    first.kill()
    first.communicate()
    while (line := said(second)) == "waiting":
        pass
    assert line == "working"
    waited: list[float] = []

    def let_it_end() -> None:
        if not waited:
            second.communicate("end")
        waited.append(time.monotonic())

    with turn(database, "one", let_it_end):
        assert len(waited) == 1
    with turn(database, "one", never):
        pass
