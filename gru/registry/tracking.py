"""MLflow runs: opened once, resumed by key, each point logged once.

Every call passes an explicit run id to a client, because MLflow's active run is local to a thread and stages are
processes. The server is the one at MLflow's tracking URI (MLFLOW_TRACKING_URI). This module knows no stage and no
configuration.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from gru.errors import Stopped, first_line
from gru.storage import sha256

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

KEY_TAG = "gru.key"
LOSS = "train/loss"  # in every point, so its history shows which steps have been logged
HELDOUT_LOSS = "heldout/loss"
KEY_METRICS = (LOSS, HELDOUT_LOSS, "heldout/bits_per_byte", "train/tokens", "train/tokens_per_second")
"""Metrics of training that the run over all stages has too."""
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"  # without it a link leads to traces of agents, whatever the experiment's kind
NOTE_TAG = "mlflow.note.content"  # Markdown, which the UI shows as the run's description
WRITTEN_TAG = "gru.description"  # digest of the description that this program wrote
SETTLE_SECONDS = 0.5  # until a run that another process creates at the same moment is visible
METRICS_PER_CALL = 1000  # MLflow's limit


class Point(TypedDict):
    """What is logged of one step."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]
    sample: NotRequired[str]
    """A text that the model generated at this step."""


def key_points(points: list[Point]) -> list[Point]:
    """Return the points with no more than their key metrics."""
    return [
        {
            "step": point["step"],
            "time": point["time"],
            "metrics": {name: value for name, value in point["metrics"].items() if name in KEY_METRICS},
        }
        for point in points
    ]


class Run:
    """An MLflow run, identified by its key."""

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str) -> None:
        self.client = client
        self.id = run_id
        self.experiment_id = experiment_id
        self._logged: set[int] | None = None

    @property
    def url(self) -> str:
        """The run's page."""
        return f"{_page(self.client, self.experiment_id)}/{self.id}{VIEW}"

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters, nested sections under dotted names; a parameter that was logged before keeps its value."""
        from mlflow.entities import Param

        logged = self.client.get_run(self.id).data.params
        new = [Param(key, str(value)) for key, value in flatten(params) if key not in logged]
        for start in range(0, len(new), 100):
            self.client.log_batch(self.id, params=new[start : start + 100])

    def log_points(self, points: list[Point]) -> None:
        """Log each step that was not logged before: a process that was killed may have logged some of them.

        A sample is the artifact samples/step-STEP.txt, which is the same if it is logged again.
        """
        from mlflow.entities import Metric

        if self._logged is None:
            self._logged = {step for step, _ in self.history(LOSS)}
        logged = self._logged
        batch: list[Metric] = []
        for point in points:
            if point["step"] in logged:
                continue
            logged.add(point["step"])
            metrics = [
                Metric(name, value, int(point["time"] * 1000), point["step"])
                for name, value in point["metrics"].items()
                if math.isfinite(value)
            ]
            if len(batch) + len(metrics) > METRICS_PER_CALL:
                self._send(batch)
                batch = []
            batch += metrics  # each call is one transaction, so a step is never split between calls
        if batch:
            self._send(batch)
        for point in points:
            if "sample" in point:
                self.client.log_text(self.id, point["sample"], f"samples/step-{point['step']:06}.txt")

    def log_key_points_of(self, run_id: str) -> None:
        """Log the key metrics of another run, at each step that was not logged before; none if it does not exist.

        A stage that was done earlier may have logged to another server.
        """
        from mlflow.exceptions import MlflowException

        points: dict[int, Point] = {}
        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return
            raise
        for name in KEY_METRICS:
            for each in self.client.get_metric_history(run_id, name):
                empty: Point = {"step": each.step, "time": each.timestamp / 1000, "metrics": {}}
                points.setdefault(each.step, empty)["metrics"][name] = each.value
        self.log_points([points[step] for step in sorted(points)])

    def _send(self, batch: "list[Metric]") -> None:
        logged, self._logged = self._logged, None  # if this call fails, only the server knows what it has stored
        self.client.log_batch(self.id, metrics=batch)
        self._logged = logged

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log single values; a metric that was logged before keeps its value."""
        logged = self.client.get_run(self.id).data.metrics
        for name, value in metrics.items():
            if name not in logged:
                self.client.log_metric(self.id, name, value)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, value) of every logged point of a metric, ordered by step."""
        return sorted((m.step, m.value) for m in self.client.get_metric_history(self.id, metric))

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Log a dataset as the run's input. `profile`: plain JSON that describes it, such as its counts."""
        from mlflow.entities import Dataset, DatasetInput

        dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        self.client.log_inputs(self.id, [DatasetInput(dataset)])

    def log_loss_curve(self) -> None:
        """Log a plot of training and held-out loss as the artifact loss.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for metric, style in ((LOSS, {"alpha": 0.6}), (HELDOUT_LOSS, {"marker": "o"})):
            if points := self.history(metric):
                axes.plot(*zip(*points, strict=True), label=metric, **style)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        self.client.log_figure(self.id, figure, "loss.png")

    def log_context_losses(self, losses: list[dict[str, Any]], baselines: Mapping[str, float]) -> None:
        """Log the loss by context length as the artifacts context.json and context.png, a plot.

        losses: one for each range of context lengths, with its mean loss `nats`, its standard error `error`, and
        `last`, the longest context of the range, in tokens. baselines: losses in nats per token to compare with, by
        name.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        lengths, nats = [loss["last"] for loss in losses], [loss["nats"] for loss in losses]
        axes.errorbar(lengths, nats, [loss["error"] or 0 for loss in losses], marker="o", capsize=3, label="model")
        for number, (name, value) in enumerate(baselines.items(), 1):
            axes.axhline(value, color=f"C{number}", linestyle="--", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="context length in tokens (up to)", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        self.client.log_figure(self.id, figure, "context.png")
        self.client.log_dict(self.id, {"losses": losses, **baselines}, "context.json")

    def watch_system(self) -> Callable[[], None]:
        """Log metrics of this machine until the returned function is called, which logs them once more, so that a short
        run has some too."""
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
        """Set tags of the run."""
        for name, value in tags.items():
            self.client.set_tag(self.id, name, value)

    def describe(self, text: str) -> None:
        """Set the run's description, Markdown, unless a person has written one."""
        from mlflow.entities import RunTag

        tags = self.client.get_run(self.id).data.tags
        shown = tags.get(NOTE_TAG, "")
        if shown and tags.get(WRITTEN_TAG) != sha256(shown.encode()):
            return
        written = [RunTag(NOTE_TAG, text), RunTag(WRITTEN_TAG, sha256(text.encode()))]
        self.client.log_batch(self.id, tags=written)  # one transaction

    def finish(self, status: str = "FINISHED") -> None:
        """Set the run's final status."""
        self.client.set_terminated(self.id, status)


def open_run(experiment: str, key: str, name: str, parent: str | None = None) -> Run:
    """Return the experiment's run with this key, created if there is none; its status is RUNNING afterwards.

    The key is a tag that is written together with the run, so a crash cannot leave a run without its key.
    """
    from mlflow import MlflowClient
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

    client = MlflowClient()
    experiment_id = _experiment_id(client, experiment)
    if run_id := _first_run(client, experiment_id, key):
        client.update_run(run_id, status="RUNNING")
        return Run(client, run_id, experiment_id)
    tags = {KEY_TAG: key, MLFLOW_RUN_NAME: name} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
    created = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
    time.sleep(SETTLE_SECONDS)
    first = _first_run(client, experiment_id, key) or created
    if first != created:  # another process searched at the same moment, found none either, and created one
        client.delete_run(created)
    return Run(client, first, experiment_id)


def _first_run(client: "MlflowClient", experiment_id: str, key: str) -> str | None:
    """Return the id of the oldest run with this key; None if there is none."""
    query, order = f"tags.`{KEY_TAG}` = '{key}'", ["attributes.start_time ASC", "attributes.run_id ASC"]
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=order)
    return runs[0].info.run_id if runs else None


def is_finished(experiment: str, key: str) -> bool:
    """Return whether the experiment has a run with this key whose status is FINISHED."""
    from mlflow import MlflowClient

    client = MlflowClient()
    query = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
    return bool(client.search_runs([_experiment_id(client, experiment)], query, max_results=1))


def open_metrics(uri: str, run_id: str) -> Run:
    """Return a run of the server at `uri`, for metrics that the caller logs again if the server does not answer."""
    connect_impatiently(uri)
    return find_run(run_id)


def connect_impatiently(uri: str) -> None:
    """Make this process use the server at `uri`, with timeouts of seconds instead of MLflow's minutes."""
    import mlflow

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    mlflow.set_tracking_uri(uri)


def unreachable() -> str | None:
    """Return why the server does not answer; None if it answers."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient().search_experiments(max_results=1)
    except MlflowException as error:
        return first_line(error)
    return None


def find_run(run_id: str) -> Run:
    """Return the run with this id. Raises MlflowException if there is none."""
    from mlflow import MlflowClient

    client = MlflowClient()
    return Run(client, run_id, client.get_run(run_id).info.experiment_id)


@contextmanager
def stage_run(experiment: str, key: str, name: str, parent: str | None = None) -> Iterator[Run]:
    """Open a run, as `open_run` does, and end it with the block: FINISHED, KILLED on Stopped, FAILED on any other
    exception."""
    run = open_run(experiment, key, name, parent)
    try:
        yield run
    except Stopped:
        with suppress(Exception):  # the stop is orderly even if MLflow does not answer
            run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def experiment_url(name: str) -> str:
    """Return the page with the runs of an experiment, which is created if there is none of this name."""
    from mlflow import MlflowClient

    client = MlflowClient()
    return f"{_page(client, _experiment_id(client, name))}{VIEW}"


def _page(client: "MlflowClient", experiment_id: str) -> str:
    return f"{client.tracking_uri.rstrip('/')}/#/experiments/{experiment_id}/runs"


def _experiment_id(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name, tags=MODEL_TRAINING)
    except MlflowException:  # another process created it at the same moment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables under dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
