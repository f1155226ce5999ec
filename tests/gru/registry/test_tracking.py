import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import mlflow.artifacts
import mlflow.exceptions
import pytest

from gru.registry import tracking


def points(*steps: int) -> list[tracking.Point]:
    return [{"step": step, "time": 1e9 + step, "metrics": {"train/loss": 1 / step}} for step in steps]


def test_a_run_is_found_again_by_its_key(mlflow_store: str) -> None:
    parent = tracking.open_run("test", "a", "pipeline")
    with tracking.stage_run("test", "b", "train", parent.id) as stage:
        stage.log_points(points(1, 2))
    again = tracking.open_run("test", "b", "train", parent.id)
    assert again.id == stage.id != parent.id
    again.log_points(points(3))
    assert again.history("train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    stored = again.client.get_run(again.id)
    assert stored.data.tags["mlflow.parentRunId"] == parent.id
    assert stored.info.status == "RUNNING"


def test_the_status_of_a_run_says_how_its_stage_ended(mlflow_store: str) -> None:
    with pytest.raises(ZeroDivisionError), tracking.stage_run("test", "x", "train") as run:
        _ = 1 / 0
    assert run.client.get_run(run.id).info.status == "FAILED"
    with tracking.stage_run("test", "x", "train") as again:
        pass
    assert again.id == run.id
    assert run.client.get_run(run.id).info.status == "FINISHED"


def test_logging_again_changes_nothing(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "pipeline")
    for value in (1, 2):
        run.log_params({"train": {"steps": value, "text": "x" * 300}, "empty": ""})
        run.log_metrics({"bits": value})
    data = run.client.get_run(run.id).data
    assert data.params["train.steps"] == "1"
    assert len(run.client.get_metric_history(run.id, "bits")) == 1


def test_more_points_than_one_call_takes_are_logged_once(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "train")
    run.log_points(points(*range(1, 2001)))
    run.log_points(points(1999, 2000, 2001))
    tracking.open_run("test", "a", "train").log_points(points(5, 2001, 2002))
    assert [step for step, _ in run.history("train/loss")] == list(range(1, 2003))
    run.log_loss_curve()
    assert [file.path for file in run.client.list_artifacts(run.id)] == ["loss.png"]


def test_a_sample_is_one_artifact_however_often_it_is_logged(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "train")
    [point] = points(500)
    sampled: tracking.Point = {**point, "sample": "The fox\n狐"}
    for again in (run, tracking.open_run("test", "a", "train")):
        again.log_points([sampled])
    assert [file.path for file in run.client.list_artifacts(run.id, "samples")] == ["samples/step-000500.txt"]
    assert mlflow.artifacts.load_text(f"runs:/{run.id}/samples/step-000500.txt") == "The fox\n狐"
    assert run.history("train/loss") == [(500, 1 / 500)]


def test_the_run_over_all_stages_gets_the_key_metrics_of_training_once(mlflow_store: str) -> None:
    stage, parent = tracking.open_run("test", "a", "train"), tracking.open_run("test", "b", "pipeline")
    logged = points(1, 2, 3)
    for point in logged:
        point["metrics"] |= {"train/tokens": 10.0 * point["step"], "train/gradient_norm": 1.0}
    logged[1]["metrics"]["heldout/loss"] = 4.0
    stage.log_points(logged)
    parent.log_points(tracking.key_points(logged[:1]))
    for _ in range(2):
        parent.log_key_points_of(stage.id)
    assert parent.history("train/loss") == stage.history("train/loss")
    assert parent.history("train/tokens") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert parent.history("heldout/loss") == [(2, 4.0)]
    assert parent.history("train/gradient_norm") == []
    parent.log_key_points_of("0" * 32)  # a stage may have been done with another server


def test_a_description_is_replaced_until_a_person_writes_one(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "pipeline")

    def shown() -> str:
        note: str = run.client.get_run(run.id).data.tags["mlflow.note.content"]
        return note

    for text in ("first", "second", "second"):
        tracking.open_run("test", "a", "pipeline").describe(text)
        assert shown() == text
    run.client.set_tag(run.id, "mlflow.note.content", "the best so far")
    run.describe("third")
    assert shown() == "the best so far"
    run.client.set_tag(run.id, "mlflow.note.content", "")
    run.describe("fourth")
    assert shown() == "fourth"


def test_links_lead_to_the_runs_instead_of_traces_of_agents(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "pipeline")
    runs = f"{mlflow_store}/#/experiments/{run.experiment_id}/runs"
    assert tracking.experiment_url("test") == f"{runs}?workflowType=machine_learning"
    assert run.url == f"{runs}/{run.id}?workflowType=machine_learning"


def test_context_losses_are_a_plot_and_a_table(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "evaluate")
    losses = [{"last": 1, "nats": 3.0, "error": 0.1}, {"last": 2, "nats": 2.0, "error": None}]
    run.log_context_losses(losses, {"n-gram model": 2.5})
    assert {file.path for file in run.client.list_artifacts(run.id)} == {"context.png", "context.json"}
    logged = mlflow.artifacts.load_dict(f"runs:/{run.id}/context.json")
    assert logged == {"losses": losses, "n-gram model": 2.5}


def test_points_that_could_not_be_logged_are_logged_later(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "train")
    run.log_points(points(1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # acts like a full disk of the server
    try:
        with pytest.raises(mlflow.exceptions.MlflowException):
            run.log_points(points(2, 3, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.log_points(points(3, 4, 5))
    assert [step for step, _ in run.history("train/loss")] == [1, 2, 3, 4, 5]


def test_even_a_short_run_has_system_metrics(mlflow_store: str) -> None:
    run = tracking.open_run("test", "a", "train")
    stop = run.watch_system()
    stop()
    assert "system/cpu_utilization_percentage" in run.client.get_run(run.id).data.metrics


def test_processes_that_open_a_run_at_once_get_the_same_run(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SETTLE_SECONDS", 3.0)  # on a busy machine, to create a run takes a second
    barrier = threading.Barrier(4)

    def open_run(_: int) -> str:
        barrier.wait()
        return tracking.open_run("test", "one key", "run").id

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_run, range(4)))
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert opened == [run.info.run_id] * 4
