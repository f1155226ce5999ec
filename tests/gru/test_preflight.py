"""What prevents an installation or a run, by made facts and by those of this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gru.machine import available_memory
from gru.preflight import GB, LONGEST_RAY_DIRECTORY, Disk, Facts, installation_facts, judge, run_facts

ROOT = Path(__file__).parents[2]
GOOD = Facts(True, 8 * GB, Disk("/v", 99 * GB), Disk("/s", 99 * GB), Disk("/tmp/ray", 99 * GB))


def test_a_good_machine_has_no_remarks() -> None:
    findings = judge(GOOD)
    assert (findings.refusals, findings.warnings) == ([], [])
    assert judge(Facts()) == findings, "what a command does not use"


@pytest.mark.parametrize(
    ("facts", "refusals", "warnings"),
    [
        (GOOD._replace(has_compiler=False), [], ["no C compiler (cc) is installed: training"]),
        (GOOD._replace(memory=2 * GB), [], ["this process may use 2.0 GB of memory: Ray, MLflow"]),
        (GOOD._replace(memory=GB), ["this process may use 1.0 GB of memory"], []),
        (GOOD._replace(environment=Disk("/v", GB // 2)), ["/v: 0.5 GB of disk space are free: an installation"], []),
        (GOOD._replace(environment=Disk("/v", 2 * GB)), [], ["/v: 2.0 GB of disk space are free: an installation"]),
        (GOOD._replace(storage=Disk("/s", GB // 10)), ["/s: 0.1 GB of disk space are free: the smallest run"], []),
        (GOOD._replace(storage=Disk("/s", GB)), [], ["/s: 1.0 GB"]),
        (GOOD._replace(ray=Disk("/tmp/ray", GB // 20)), ["/tmp/ray: 0.1 GB of disk space are free: Ray writes"], []),
        (
            GOOD._replace(ray=Disk("/" + "x" * LONGEST_RAY_DIRECTORY, 9 * GB)),
            [
                "/"
                + "x" * LONGEST_RAY_DIRECTORY
                + ": too long for Ray's sockets: set RAY_TMPDIR to a path of at most 39"
            ],
            [],
        ),
    ],
)
def test_what_is_missing_is_said_with_its_place_and_remedy(
    facts: Facts, refusals: list[str], warnings: list[str]
) -> None:
    findings = judge(facts)
    for found, expected in ((findings.refusals, refusals), (findings.warnings, warnings)):
        assert len(found) == len(expected)
        assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True))
        assert "\n" not in "".join(found)


def test_facts_of_this_machine(tmp_path: Path) -> None:
    facts = run_facts(str(tmp_path / "not" / "yet"), str(tmp_path))
    assert facts.storage is not None and facts.storage.path == str(tmp_path / "not" / "yet")
    assert 0 < facts.storage.free <= shutil.disk_usage(tmp_path).total
    assert facts.memory == available_memory() and facts.has_compiler == bool(shutil.which("cc"))
    assert run_facts(None, None) == Facts()


def test_make_says_which_python_it_needs_and_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "gru").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "gru/preflight.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\ncase $1 in -c) exit 1;; --version) echo Python 3.9.2;; esac\n")
    old.chmod(0o755)
    for python, found in ((str(old), f"{old} is Python 3.9.2"), ("python0", "there is no python0")):
        done = subprocess.run(["make", "run", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert line.startswith(f"error: Python 3.11 or newer is needed, and {found}: make PYTHON=python3.")
        assert line.endswith(" run") and done.returncode == 2
    assert not (tmp_path / ".venv").exists()


def test_it_runs_with_a_python_that_has_no_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "gru" / "preflight.py"), ".venv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    findings = judge(installation_facts(str(tmp_path / ".venv")))
    assert done.returncode == (2 if findings.refusals else 0)
    assert len(done.stderr.splitlines()) == len(findings.refusals + findings.warnings)
