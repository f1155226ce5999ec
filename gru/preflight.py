"""What on this machine prevents an installation or a run, or slows it: seen before anything is installed or waited for.

`make` runs this file with a Python that has no packages yet: at its top it imports the standard library only.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GB = 1_000_000_000
INSTALLATION = 3 * GB  # bytes of .venv, and of what pip unpacks meanwhile; measured with PyTorch's CPU build
LEAST_FOR_INSTALLATION = 1 * GB
LEAST_IN_STORAGE, ENOUGH_IN_STORAGE = 200_000_000, 2 * GB  # bytes; quickstart writes 80 MB
LEAST_FOR_RAY, ENOUGH_FOR_RAY = 100_000_000, 1 * GB  # bytes for its logs, and for objects that leave memory
LEAST_MEMORY, ENOUGH_MEMORY = 1.5 * GB, 4 * GB  # of Ray, MLflow, one job with a worker, and an endpoint
LONGEST_RAY_DIRECTORY = 107 - len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")  # of a socket


@dataclass(frozen=True)
class Disk:
    """A place where files will be written, and its free space."""

    path: str
    free: int
    """Bytes that this user may still write."""

    @staticmethod
    def of(path: str) -> "Disk":
        """The place at a path, which need not exist yet."""
        existing = next(each for each in (Path(path), *Path(path).parents) if each.exists())
        return Disk(path, shutil.disk_usage(existing).free)


class Facts(NamedTuple):
    """What is known about a machine; None for what the command does not use."""

    has_compiler: bool | None = None
    memory: int | None = None
    """Bytes that this process may use, in use or not."""
    environment: Disk | None = None
    """The virtual environment that is to be installed."""
    storage: Disk | None = None
    ray: Disk | None = None
    """The files of a Ray that will be started here."""


@dataclass(frozen=True)
class Findings:
    """Sentences for people."""

    refusals: list[str]
    """What cannot work."""
    warnings: list[str]


def judge(facts: Facts) -> Findings:
    """Return what prevents or slows the command on a machine with these facts."""
    refusals: list[str] = []
    warnings: list[str] = []

    def compare(has: float, least: float, enough: float, sentence: str) -> None:
        if has < least:
            refusals.append(sentence)
        elif has < enough:
            warnings.append(sentence)

    for disk, least, enough, what in (
        (facts.environment, LEAST_FOR_INSTALLATION, INSTALLATION, "an installation takes about 3 GB"),
        (facts.storage, LEAST_IN_STORAGE, ENOUGH_IN_STORAGE, "the smallest run writes 0.1 GB; see `gru clean`"),
        (facts.ray, LEAST_FOR_RAY, ENOUGH_FOR_RAY, "Ray writes logs and objects there; RAY_TMPDIR sets another place"),
    ):
        if disk:
            compare(disk.free, least, enough, f"{disk.path}: {_gb(disk.free)} of disk space are free: {what}")
    if facts.ray and len(facts.ray.path) > LONGEST_RAY_DIRECTORY:
        refusals.append(
            f"{facts.ray.path}: too long for Ray's sockets: set RAY_TMPDIR to a path of at most "
            f"{LONGEST_RAY_DIRECTORY - len('/ray')} characters, such as /tmp"
        )
    if facts.memory is not None:
        sentence = f"this process may use {_gb(facts.memory)} of memory: Ray, MLflow and a training take about 3 GB"
        compare(facts.memory, LEAST_MEMORY, ENOUGH_MEMORY, sentence)
    if facts.has_compiler is False:
        warnings.append("no C compiler (cc) is installed: training will be several times slower")
    return Findings(refusals, warnings)


def installation_facts(environment: str) -> Facts:
    """Gather what matters for an installation into this directory."""
    return Facts(shutil.which("cc") is not None, environment=Disk.of(environment))


def run_facts(storage: str | None, ray: str | None) -> Facts:
    """Gather what matters for a run.

    storage: its path if it is local. ray: the directory of the files of a Ray that is started here, if one is.
    """
    from gru.machine import available_memory

    return Facts(
        shutil.which("cc") is not None if ray else None,
        available_memory() if ray else None,
        storage=Disk.of(storage) if storage else None,
        ray=Disk.of(ray) if ray else None,
    )


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def main() -> None:
    """Print what prevents an installation into the directory that is the argument, and exit with 2 if anything does."""
    findings = judge(installation_facts(str(Path(sys.argv[1]).absolute())))
    lines = [*(f"note: {each}\n" for each in findings.warnings), *(f"error: {each}\n" for each in findings.refusals)]
    sys.stderr.writelines(lines)
    sys.exit(2 if findings.refusals else 0)


if __name__ == "__main__":
    main()
