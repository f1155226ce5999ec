import pytest
import ray

from gru import cluster
from gru.config_stages import Resources, TrainResources

pytestmark = pytest.mark.usefixtures("ray_local")  # one node of four CPUs


@pytest.mark.parametrize(
    ("required", "processes", "too_small"),
    [
        (Resources(cpus=2), 2, False),
        (Resources(cpus=2), 3, True),
        (TrainResources(cpus=1, gpus=1), 1, True),
        (Resources(cpus=1, memory=1 << 60), 1, True),
        (Resources(cpus=1, labels={"pool": "gpu"}), 1, True),
        (Resources(cpus=1, labels={"pool": "!gpu"}), 1, False),
    ],
)
def test_a_cluster_without_room_is_too_small(required: Resources, processes: int, too_small: bool) -> None:
    assert cluster.is_too_small(required, processes) == too_small


def test_a_process_must_fit_on_one_node() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert cluster.count_fitting(nodes, {"CPU": 3, "memory": 0}) == 2
    assert cluster.count_fitting(nodes, {"CPU": 8}) == 0
    assert cluster.count_fitting(nodes, {"CPU": 1, "GPU": 1}) == 1
    assert cluster.count_fitting([{"CPU": 2.0}], {"CPU": 0.4}) == 5
    assert cluster.count_fitting(nodes, {"CPU": 0}) == float("inf")


def test_only_nodes_with_the_labels_count() -> None:
    name, node = "ray.io/node-id", ray.nodes()[0]["NodeID"]
    assert cluster.total_resources({})["CPU"] == 4
    for selector in (node, f"in(a, {node})", "!in(a, b)"):
        assert cluster.total_resources({name: selector}) == cluster.total_resources({})
    assert cluster.total_resources({name: f"!in(a, {node})"}) == {"CPU": 0, "GPU": 0, "memory": 0}


def test_a_shortage_is_described_by_its_keys() -> None:
    assert cluster.describe_shortage("prepare", Resources(cpus=8)).startswith(
        "resources.prepare.cpus = 8.0: does not fit on this cluster's nodes, which have 4 CPUs, 0 GPUs and "
    )
    message = cluster.describe_shortage("train", TrainResources(gpus=1, labels={"pool": "gpu"}))
    assert message == (
        "resources.train.cpus = 1, resources.train.labels = {'pool': 'gpu'}, resources.train.gpus = 1: does not fit on "
        "the nodes with these labels, which have 0 CPUs, 0 GPUs and 0.0 GB of memory in all, free or not"
    )
