"""What this process may use of the machine: CPUs and memory, as limited by affinity and by a container's cgroup."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil


def available_cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use, at least 1; a share of one counts as one.

    root: where /proc and /sys are.
    """
    limits = [float(len(os.sched_getaffinity(0)))]
    for directory in _cgroups(root, "cpu"):
        older = _words(directory / "cpu.cfs_quota_us", 1) + _words(directory / "cpu.cfs_period_us", 1)
        quota = _words(directory / "cpu.max", 2) or older
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            limits.append(int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(min(limits)))


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use, in use or not."""
    limits = [psutil.virtual_memory().total]
    for directory in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(directory / name, 1) if word != "max"]
    return min(limits)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroups for a controller and of all above them (versions 1 and 2)."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        directory = top / path.lstrip("/")
        yield from (each for each in (directory, *directory.parents) if each.is_relative_to(top))


def _words(file: Path, count: int) -> tuple[str, ...]:
    """Return the words of a file if it exists and has this many, else none."""
    try:
        words = tuple(file.read_text().split())
    except OSError:
        return ()
    return words if len(words) == count else ()
