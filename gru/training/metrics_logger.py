"""Keeps a run's record in MLflow, in a process of its own on rank 0's machine.

A training step is thousands of small operations, each of which waits for the interpreter's lock where another thread of
the process runs Python; importing MLflow alone would be seconds of that.
"""

from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gru.registry import tracking


class MetricsLogger:
    """The actor. Opens the run with the first points, and watches this machine from then on."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._run: tracking.Run | None = None
        self._stop_watching: Callable[[], None] | None = None

    def log(self, points: list[tracking.Point]) -> None:
        if self._run is None:
            self._run = tracking.open_metrics(self._uri, self._run_id)
            self._stop_watching = self._run.watch_system()
        self._run.log_points(points)

    def close(self) -> None:
        if self._stop_watching:
            self._stop_watching()


def start_metrics_logger(uri: str, run_id: str) -> ActorHandle:
    """The actor, which ends with the process that calls this."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(MetricsLogger)
    return remote.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(uri, run_id)
