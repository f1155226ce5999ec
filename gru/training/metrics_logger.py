"""The metrics logger: an actor that writes a run's metrics to MLflow, in its own process on rank 0's machine.

A training step is thousands of small operations, each of which waits for the interpreter's lock while another thread of
the process runs Python; importing MLflow alone would cost seconds of that.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gru.registry import tracking


class MetricsLogger:
    """The actor. It opens the MLflow run at the first points, and logs this machine's metrics from then on."""

    def __init__(self, uri: str, run_id: str, parent_id: str | None) -> None:
        """parent_id: the run over all stages, which gets the key metrics too."""
        self._uri, self._run_id, self._parent_id = uri, run_id, parent_id
        self._run: tracking.Run | None = None
        self._parent: tracking.Run | None = None
        self._stop_watching: Callable[[], None] | None = None

    def log(self, points: list[tracking.Point]) -> None:
        """Log points in MLflow, each once. Raises what MLflow raises, but not for the run over all stages."""
        from mlflow.exceptions import MlflowException

        if self._run is None:
            run = tracking.open_metrics(self._uri, self._run_id)
            self._run, self._stop_watching = run, run.watch_system()
        self._run.log_points(points)
        # Someone may have deleted the run over all stages. The workflow logs there what is missing after the stage.
        with suppress(MlflowException):
            if self._parent_id and self._parent is None:
                self._parent = tracking.find_run(self._parent_id)
            if self._parent:
                self._parent.log_points(tracking.key_points(points))

    def close(self) -> None:
        """Stop logging this machine's metrics."""
        if self._stop_watching:
            self._stop_watching()


def start(uri: str, run_id: str, parent_id: str | None) -> ActorHandle:
    """Start the actor on this node. It ends with the calling process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(MetricsLogger)
    return remote.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(uri, run_id, parent_id)
