"""How many workers an elastic run has: those for which the cluster has room now."""

import socket
from typing import Any

from ray._private.state import available_resources_per_node
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingDecision
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from gru import cluster

ANSWER_SECONDS = 3


class RoomForWorkers(ElasticScalingPolicy):
    """Ray Train's own policy divides up whole nodes: it waits in vain for workers where others hold a node, where a
    label is missing, and on a node that is out of reach but not given up yet. This one counts what is free on nodes
    that answer, and what its own workers have there."""

    _group: PlacementGroup | None = None

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._group = worker_group_state.placement_group_handle.placement_group
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        wanted = self.scaling_config._resources_per_worker_not_none
        fitting = (min(room.get(name, 0) // amount for name, amount in wanted.items()) for room in self._room())
        return min(super()._count_possible_workers(reserved_resources), int(sum(fitting)))

    def _room(self) -> list[dict[str, float]]:
        """What each node has for workers, by Ray's names of resources."""
        free, held = available_resources_per_node(), self._held()
        labels: Any = self.scaling_config.label_selector or {}
        nodes = [node for node in cluster.nodes(labels) if _answers(node)]
        return [_sum([free.get(node["NodeID"], {}), *held.get(node["NodeID"], [])]) for node in nodes]

    def _held(self) -> dict[str, list[dict[str, float]]]:
        """What the workers have, or had until now, by node."""
        if self._group is None:
            return {}
        table = placement_group_table(self._group)
        held: dict[str, list[dict[str, float]]] = {}
        if table["state"] != "REMOVED":
            for number, node in table["bundles_to_node_id"].items():
                held.setdefault(node, []).append(table["bundles"][number])
        return held


def _sum(amounts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each.get(name, 0) for each in amounts) for name in {name for each in amounts for name in each}}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
