"""Room for workers is what is free, and what the run's own workers have."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.train.v2.api.config import ScalingConfig
from ray.util import placement_group, remove_placement_group

from gru.network import free_port
from gru.training import scaling
from gru.training.scaling import RoomForWorkers

pytestmark = pytest.mark.usefixtures("ray_local")  # one node of four CPUs


@pytest.fixture(autouse=True)
def count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "COUNT_SECONDS", 0.0)


def room(most: int = 8, **settings: Any) -> Callable[[], int]:
    policy = RoomForWorkers(ScalingConfig(num_workers=(1, most), **{"resources_per_worker": {"CPU": 1}, **settings}))
    return lambda: policy._count_possible_workers({})


def wait_for(count: int, counted: Callable[[], int]) -> None:
    """Nodes tell what is free on them now and then."""
    deadline = time.monotonic() + 20
    while (last := counted()) != count and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last == count


def test_what_others_hold_is_no_room() -> None:
    wait_for(4, room())
    holder = ray.remote(num_cpus=3)(Holder).remote()
    wait_for(1, room())
    wait_for(2, room(resources_per_worker={"CPU": 0.5}))
    ray.kill(holder)
    wait_for(4, room())
    wait_for(3, room(most=3))


class Holder:
    pass


def test_what_the_runs_own_workers_have_is_room() -> None:
    group = placement_group([{"CPU": 1}] * 3)
    ray.get(group.ready())
    wait_for(4, room())
    remove_placement_group(group)
    wait_for(4, room())


def test_shares_of_cpus_are_not_lost_in_rounding() -> None:
    wait_for(10, room(most=20, resources_per_worker={"CPU": 0.4}))


def test_nodes_without_the_label_and_nodes_that_do_not_answer_are_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(label_selector={"pool": "gpu"})() == 0
    assert room(label_selector={"pool": "!gpu"})() == 4
    [node] = ray.nodes()
    monkeypatch.setattr(scaling.cluster, "nodes", lambda labels: [{**node, "NodeManagerPort": free_port()}])
    assert room()() == 0
