"""How many workers an elastic run has: those for which the cluster has room now."""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.util import placement_group_table

from gru import cluster

ANSWER_SECONDS = 3
PAUSE_SECONDS = 0.5
COUNT_SECONDS = 2.0  # for which a count holds


class RoomForWorkers(ElasticScalingPolicy):
    """Ray Train's own policy divides up whole nodes: it waits in vain for workers where others hold a node, where a
    label is missing, or where a node is out of reach but not given up yet. This one counts what is free on nodes that
    answer, and what this run's workers have there."""

    _least = 0
    _counted = (0.0, 0)  # when, and how many

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._least = worker_group_state.num_workers  # a worker that is lost is a failure, not for us to tell
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._least = 0
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(PAUSE_SECONDS)  # Ray Train asks again at once
        return decision

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        when, count = self._counted
        if time.monotonic() - when > COUNT_SECONDS:
            count = int(cluster.count_fitting(self._room(), self.scaling_config._resources_per_worker_not_none))
            self._counted = time.monotonic(), count
        return min(max(count, self._least), self.scaling_config.max_workers)

    def _room(self) -> list[Mapping[str, float]]:
        """What each node has for workers, by Ray's names of resources."""
        labels: Any = self.scaling_config.label_selector or {}
        draining = state.get_draining_nodes()
        nodes = [node for node in cluster.nodes(labels) if node["NodeID"] not in draining]
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:
            answers = list(pool.map(_answers, nodes))
        answering = [node["NodeID"] for node, answer in zip(nodes, answers, strict=True) if answer]
        free, held = available_resources_per_node(), _held()
        return [_sum([free.get(node, {}), *held.get(node, [])]) for node in answering]


def _held() -> dict[str, list[dict[str, float]]]:
    """What this job's workers have, or had until now, by node."""
    job = ray.get_runtime_context().get_job_id()
    held: dict[str, list[dict[str, float]]] = {}
    for group in placement_group_table().values():
        if group["placement_group_id"].endswith(job) and group["state"] != "REMOVED":
            for number, node in group["bundles_to_node_id"].items():
                held.setdefault(node, []).append(group["bundles"][number])
    return held


def _sum(amounts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each.get(name, 0) for each in amounts) for name in {name for each in amounts for name in each}}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
