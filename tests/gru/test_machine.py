import os
from pathlib import Path

import psutil
import pytest

from gru.machine import available_cpus, available_memory

CPUS = len(os.sched_getaffinity(0))


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus", "memory"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n", "sys/fs/cgroup/memory.max": "1000000\n"}, 1, 1_000_000),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "20000 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 1, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, CPUS, None),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000\n", "sys/fs/cgroup/a/b/memory.max": "7000\n"}, 1, 7000),
        (
            "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000000\n",
            },
            1,
            5_000_000,
        ),
        (
            "4:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "9"},
            CPUS,
            None,
        ),
    ],
)
def test_a_containers_limits_count(
    tmp_path: Path, cgroup: str, files: dict[str, str], cpus: int, memory: int | None
) -> None:
    root = tree(tmp_path, cgroup, files)
    assert available_cpus(root) == cpus
    assert available_memory(root) == (memory or psutil.virtual_memory().total)


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == CPUS and available_memory(tmp_path) == psutil.virtual_memory().total
    assert 1 <= available_cpus() <= CPUS
