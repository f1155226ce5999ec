"""Tests of the checkpoint writer beside a running loop: what is written and logged, and what faults cost."""

import threading
from pathlib import Path

import pytest
import torch

from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint
from gru.training.checkpoint_writer import CheckpointWriter

INFINITE = float("inf")


def point(step: int) -> tracking.Point:
    return {"step": step, "time": 1.0, "metrics": {tracking.LOSS: float(step)}}


def checkpoint(step: int, writer: CheckpointWriter) -> Checkpoint:
    state = {"step": step, "identity": {}, "points": writer.points()}
    return Checkpoint({"model": {"w": torch.full((300,), float(step))}}, state)


def steps_saved(run: Path) -> list[int]:
    return [checkpoints.load(path).step for path in checkpoints.paths(str(run))]


def open_run() -> tracking.Run:
    return tracking.open_run("test", "key", "train")


def nothing() -> None: ...


def test_points_are_logged_with_the_checkpoint_that_covers_them(tmp_path: Path, mlflow_store: str) -> None:
    record = open_run()
    writer = CheckpointWriter(str(tmp_path / "r"), 2, record.log_points, [], INFINITE, print)
    for step in (1, 2, 3):
        writer.add(point(step))
    assert writer.finish(checkpoint(3, writer), 10, nothing)
    writer.add(point(4))
    assert steps_saved(tmp_path / "r") == [3]
    assert [step for step, _ in record.history(tracking.LOSS)] == [1, 2, 3]
    assert [point["step"] for point in writer.points()] == [4]
    writer.close()


def test_points_saved_but_not_logged_are_logged_once_by_a_resumed_run(tmp_path: Path, mlflow_store: str) -> None:
    record = open_run()
    record.log_points([point(1), point(2)])
    sampled: list[tracking.Point] = [{**point(step), "sample": f"text {step}"} for step in (2, 3)]
    record.log_points(sampled[:1])
    writer = CheckpointWriter(str(tmp_path / "r"), 2, record.log_points, sampled, INFINITE, print)
    writer.add(point(4))
    assert writer.finish(checkpoint(4, writer), 10, nothing)
    writer.close()
    assert record.history(tracking.LOSS) == [(step, float(step)) for step in (1, 2, 3, 4)]
    samples = [file.path for file in record.client.list_artifacts(record.id, "samples")]
    assert samples == ["samples/step-000002.txt", "samples/step-000003.txt"]


def test_unavailable_storage_costs_only_the_checkpoints_of_that_time(tmp_path: Path, mlflow_store: str) -> None:
    run, record, lines = tmp_path / "r", open_run(), list[str]()
    writer = CheckpointWriter(str(run), 2, record.log_points, [], INFINITE, lines.append)
    writer.add(point(1))
    assert writer.finish(checkpoint(1, writer), 10, nothing)
    run.rename(tmp_path / "away")
    run.write_text("not a directory")
    writer.add(point(2))
    assert not writer.finish(checkpoint(2, writer), 2, nothing)
    assert writer.failure
    assert lines[-1].startswith("step 2: could not save the checkpoint")
    assert [step for step, _ in record.history(tracking.LOSS)] == [1]
    run.unlink()
    (tmp_path / "away").rename(run)
    writer.add(point(3))
    assert writer.finish(checkpoint(3, writer), 10, nothing)
    assert steps_saved(run) == [3, 1]
    assert [step for step, _ in record.history(tracking.LOSS)] == [1, 2, 3]
    writer.close()


def test_checkpoints_do_not_wait_for_an_unresponsive_mlflow(tmp_path: Path) -> None:
    lines: list[str] = []

    def refuse(points: list[tracking.Point]) -> None:
        raise ConnectionError("connection refused")

    writer = CheckpointWriter(str(tmp_path / "r"), 2, refuse, [], INFINITE, lines.append)
    writer.add(point(1))
    assert writer.finish(checkpoint(1, writer), 10, nothing)
    assert [point["step"] for point in writer.points()] == [1]
    assert any("connection refused" in line for line in lines)
    [path] = checkpoints.paths(str(tmp_path / "r"))
    assert [point["step"] for point in checkpoints.load(path).state["points"]] == [1]
    writer.close()


def test_training_does_not_wait_for_a_checkpoint(
    tmp_path: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one checkpoint is being written, the newer one of two more replaces the other in the queue."""
    save, writing, released = checkpoints.save, threading.Event(), threading.Event()

    def slow(checkpoint: Checkpoint, path: str) -> None:
        writing.set()
        assert released.wait(30)
        save(checkpoint, path)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer = CheckpointWriter(str(tmp_path / "r"), 5, open_run().log_points, [], INFINITE, print)
    writer.begin(checkpoint(1, writer))
    assert writing.wait(30)
    writer.begin(checkpoint(2, writer))
    assert not writer.idle
    writer.begin(checkpoint(3, writer))
    released.set()
    assert writer.finish(checkpoint(4, writer), 30, nothing)
    writer.close()
    assert steps_saved(tmp_path / "r")[0] == 4
    assert 2 not in steps_saved(tmp_path / "r")
