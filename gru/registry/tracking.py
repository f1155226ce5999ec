"""MLflow runs: opened once, resumed by key, each point logged once.

Everything goes through a client with explicit run ids: MLflow's active run is local to a thread, and stages are
processes. The server is MLflow's own tracking URI (MLFLOW_TRACKING_URI). Knows no stage and no configuration.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypedDict

from gru.errors import Stopped

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

KEY_TAG = "gru.key"
LOSS = "train/loss"  # every point has it, so it tells which steps have been logged
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # or the UI opens on traces of agents
SETTLE_SECONDS = 0.5  # in which a run that another process makes at the same moment can be seen
METRICS_A_CALL = 1000  # MLflow's limit


class Point(TypedDict):
    """Metrics of one step, in the order of steps."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]


class Run:
    """One MLflow run, found again by its key."""

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str) -> None:
        self.client = client
        self.id = run_id
        self.experiment_id = experiment_id
        self._logged: set[int] | None = None

    @property
    def url(self) -> str:
        return f"{self.client.tracking_uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.id}"

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested sections become dotted names; what was logged before is left as it is."""
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        fresh = [Param(k, str(v)) for k, v in flatten(params) if k not in known]
        for start in range(0, len(fresh), 100):
            self.client.log_batch(self.id, params=fresh[start : start + 100])

    def log_points(self, points: list[Point]) -> None:
        """Log each step that was not logged before: a process that was killed may have come this far already."""
        from mlflow.entities import Metric

        if self._logged is None:
            self._logged = {step for step, _ in self.history(LOSS)}
        logged = self._logged
        batch: list[Metric] = []
        for point in points:
            if point["step"] in logged:
                continue
            logged.add(point["step"])
            made = [
                Metric(name, value, int(point["time"] * 1000), point["step"])
                for name, value in point["metrics"].items()
                if math.isfinite(value)
            ]
            if len(batch) + len(made) > METRICS_A_CALL:
                self._send(batch)
                batch = []
            batch += made  # a step is never split between calls, each of which is one transaction
        if batch:
            self._send(batch)

    def _send(self, batch: "list[Metric]") -> None:
        logged, self._logged = self._logged, None  # if this fails, only the server knows what it has
        self.client.log_batch(self.id, metrics=batch)
        self._logged = logged

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Single values; a value that was logged before is not logged again."""
        known = self.client.get_run(self.id).data.metrics
        for name, value in metrics.items():
            if name not in known:
                self.client.log_metric(self.id, name, value)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every logged point, by step."""
        return sorted((m.step, m.value) for m in self.client.get_metric_history(self.id, metric))

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        self.client.log_inputs(self.id, [DatasetInput(dataset)])

    def log_loss_curve(self) -> None:
        """A plot of training and held-out loss, as the artifact loss.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for metric, style in ((LOSS, {"alpha": 0.6}), ("heldout/loss", {"marker": "o"})):
            if points := self.history(metric):
                axes.plot(*zip(*points, strict=True), label=metric, **style)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        self.client.log_figure(self.id, figure, "loss.png")

    def log_context_losses(self, losses: list[dict[str, Any]], scale: Mapping[str, float]) -> None:
        """Loss by tokens read since a reset, as context.json and a plot, context.png.

        losses: by distance, with `last` (the last distance of those that `nats` is the mean of) and `error`.
        scale: names of losses that do not depend on it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        read, nats = [loss["last"] for loss in losses], [loss["nats"] for loss in losses]
        axes.errorbar(read, nats, [loss["error"] or 0 for loss in losses], marker="o", capsize=3, label="model")
        for number, (name, value) in enumerate(scale.items(), 1):
            axes.axhline(value, color=f"C{number}", linestyle="--", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens read since a reset (up to)", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        self.client.log_figure(self.id, figure, "context.png")
        self.client.log_dict(self.id, {"losses": losses, **scale}, "context.json")

    def watch_system(self) -> Callable[[], None]:
        """Log this machine's metrics until what is returned is called, and then once more: a short run has some too."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.id, resume_logging=True)
        monitor.start()

        def stop() -> None:
            monitor.finish()
            monitor.collect_metrics()
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()

        return stop

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.id, name, value)

    def finish(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.id, status)


def open_run(experiment: str, key: str, name: str, parent: str | None = None) -> Run:
    """The run with this key in the experiment, made if there is none; it is RUNNING afterwards.

    The key is a tag that is written with the run, so that no crash can leave a run that is not found again.
    """
    from mlflow import MlflowClient
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

    client = MlflowClient()
    experiment_id = _experiment_id(client, experiment)
    if run_id := _first_with(client, experiment_id, key):
        client.update_run(run_id, status="RUNNING")
        return Run(client, run_id, experiment_id)
    tags = {KEY_TAG: key, MLFLOW_RUN_NAME: name} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
    made = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    time.sleep(SETTLE_SECONDS)
    first = _first_with(client, experiment_id, key) or made
    if first != made:  # another process looked at the same moment, and found none either
        client.delete_run(made)
    return Run(client, first, experiment_id)


def _first_with(client: "MlflowClient", experiment_id: str, key: str) -> str | None:
    wanted, order = f"tags.`{KEY_TAG}` = '{key}'", ["attributes.start_time ASC", "attributes.run_id ASC"]
    found = client.search_runs([experiment_id], wanted, max_results=1, order_by=order)
    return found[0].info.run_id if found else None


def is_finished(experiment: str, key: str) -> bool:
    """Whether the experiment has a run with this key that is FINISHED."""
    from mlflow import MlflowClient

    client = MlflowClient()
    wanted = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
    return bool(client.search_runs([_experiment_id(client, experiment)], wanted, max_results=1))


def open_metrics(uri: str, run_id: str) -> Run:
    """A run of the server at `uri`, for metrics that are logged again later if it does not answer."""
    connect_impatiently(uri)
    return find_run(run_id)


def connect_impatiently(uri: str) -> None:
    """Have this process use the server at `uri`, which is given up after seconds, not MLflow's minutes."""
    import mlflow

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    mlflow.set_tracking_uri(uri)


def unreachable() -> str | None:
    """Why the server does not answer; None if it does."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        return str(error).splitlines()[0]
    return None


def find_run(run_id: str) -> Run:
    from mlflow import MlflowClient

    client = MlflowClient()
    return Run(client, run_id, client.get_run(run_id).info.experiment_id)


@contextmanager
def stage_run(experiment: str, key: str, name: str, parent: str | None = None) -> Iterator[Run]:
    """`open_run`, finished with the block: FINISHED, KILLED if it was stopped in order, FAILED if it raised."""
    run = open_run(experiment, key, name, parent)
    try:
        yield run
    except Stopped:
        with suppress(Exception):  # an MLflow that is down does not undo that it stopped in order
            run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def _experiment_id(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name, tags=MODEL_TRAINING)
    except MlflowException:  # another process was faster
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
