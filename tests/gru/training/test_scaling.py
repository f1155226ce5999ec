"""Tests of the scaling policy: workers may use free resources, and those of the run's own workers."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.train.v2.api.config import ScalingConfig
from ray.util import placement_group, remove_placement_group

from gru.network import free_port
from gru.training import scaling
from gru.training.scaling import FreeResourcesPolicy

pytestmark = pytest.mark.usefixtures("ray_local")  # one node of four CPUs


@pytest.fixture(autouse=True)
def disable_count_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "COUNT_SECONDS", 0.0)


def counter(max_workers: int = 8, **settings: Any) -> Callable[[], int]:
    options: dict[str, Any] = {"resources_per_worker": {"CPU": 1}, **settings}
    policy = FreeResourcesPolicy(ScalingConfig(num_workers=(1, max_workers), **options))
    return lambda: policy._count_possible_workers({})


def wait_for_count(expected: int, count: Callable[[], int]) -> None:
    """Nodes report their free resources only now and then."""
    deadline = time.monotonic() + 20
    while (last := count()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last == expected


def test_resources_in_use_by_others_are_not_counted() -> None:
    wait_for_count(4, counter())
    holder = ray.remote(num_cpus=3)(Holder).remote()
    wait_for_count(1, counter())
    wait_for_count(2, counter(resources_per_worker={"CPU": 0.5}))
    ray.kill(holder)
    wait_for_count(4, counter())
    wait_for_count(3, counter(max_workers=3))


class Holder:
    pass


def test_resources_of_the_runs_own_workers_are_counted() -> None:
    group = placement_group([{"CPU": 1}] * 3)
    ray.get(group.ready())
    wait_for_count(4, counter())
    remove_placement_group(group)
    wait_for_count(4, counter())


def test_shares_of_cpus_are_not_lost_in_rounding() -> None:
    wait_for_count(10, counter(max_workers=20, resources_per_worker={"CPU": 0.4}))


def test_nodes_without_the_label_and_unreachable_nodes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counter(label_selector={"pool": "gpu"})() == 0
    assert counter(label_selector={"pool": "!gpu"})() == 4
    [node] = ray.nodes()
    monkeypatch.setattr(scaling.cluster, "nodes", lambda labels: [{**node, "NodeManagerPort": free_port()}])
    assert counter()() == 0
