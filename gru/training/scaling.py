"""The number of workers of an elastic run: as many as the cluster has free resources for."""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util import placement_group_table

from gru import cluster, ray_internals
from gru.ray_internals import ElasticScalingPolicy, NoopDecision, ScalingDecision

CONNECT_SECONDS = 3
NOOP_SECONDS = 0.5
COUNT_SECONDS = 2.0
"""How long a count of possible workers is reused."""


class FreeResourcesPolicy(ElasticScalingPolicy):
    """A scaling policy that counts free resources on nodes that answer, and those of this run's own workers.

    Ray Train's own policy divides up whole nodes. It waits in vain for workers where others use a node, where a label
    is missing, or where a node is unreachable but not declared dead yet.
    """

    _min_count = 0
    _last_count = (0.0, 0)  # when it was counted, and the count

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._min_count = worker_group_state.num_workers  # a lost worker is a failure, which Ray Train handles
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._min_count = 0
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(NOOP_SECONDS)  # Ray Train asks again at once
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        counted_at, count = self._last_count
        if time.monotonic() - counted_at > COUNT_SECONDS:
            per_worker = ray_internals.resources_per_worker(self.scaling_config)
            count = int(cluster.count_fitting(self._usable_resources(), per_worker))
            self._last_count = time.monotonic(), count
        return min(max(count, self._min_count), self.scaling_config.max_workers)

    def _usable_resources(self) -> list[Mapping[str, float]]:
        """Return what each node has for workers, by Ray's names of resources."""
        labels: Any = self.scaling_config.label_selector or {}
        draining = ray_internals.draining_nodes()
        nodes = [node for node in cluster.nodes(labels) if node["NodeID"] not in draining]
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:
            answers = list(pool.map(_answers, nodes))
        answering = [node["NodeID"] for node, answer in zip(nodes, answers, strict=True) if answer]
        free, reserved = ray_internals.free_resources(), _reserved_resources()
        return [_sum([free.get(node, {}), *reserved.get(node, [])]) for node in answering]


def _reserved_resources() -> dict[str, list[dict[str, float]]]:
    """Return what this job's workers have reserved, or had until now, by node."""
    job = ray.get_runtime_context().get_job_id()
    reserved: dict[str, list[dict[str, float]]] = {}
    for group in placement_group_table().values():
        if group["placement_group_id"].endswith(job) and group["state"] != "REMOVED":
            for number, node in group["bundles_to_node_id"].items():
                reserved.setdefault(node, []).append(group["bundles"][number])
    return reserved


def _sum(amounts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each.get(name, 0) for each in amounts) for name in {name for each in amounts for name in each}}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
