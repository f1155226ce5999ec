"""What each worker of a training run does, from its start to the last step.

Runs inside Ray Train. Metrics are buffered and logged with the checkpoint that commits them, so a resumed run has
each point once.
"""

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from gru import storage, tracking
from gru.config import ModelConfig, TrainConfig
from gru.corpus.dataset import Dataset, open_dataset
from gru.corpus.lanes import LaneOrder, LaneReader
from gru.model.precision import Precision, resolve
from gru.training import checkpoint as checkpoints
from gru.training.learner import Learner


@dataclass(frozen=True)
class Assignment:
    """What the driver tells every worker."""

    model: ModelConfig
    train: TrainConfig
    dataset: str
    run: str
    identity: dict[str, Any]
    tracking_uri: str
    tracking_run: str
    progress: ActorHandle


def work(told: dict[str, Assignment]) -> None:
    """Train until the last step, from the newest checkpoint if there is one. Ray Train calls this in each worker."""
    assignment = told["assignment"]
    config = assignment.train
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    dataset = open_dataset(assignment.dataset)
    manifest = dataset.manifest
    device = ray.train.torch.get_device()
    path = _choose_checkpoint(assignment, rank)
    resumed = checkpoints.load(path) if path else None
    model = assignment.model.model_copy(update={"precision": _choose_precision(assignment, resumed, device, rank)})
    learner = Learner(model, config, manifest.vocab_size, manifest.end_of_text, rank, world, device)
    if resumed:
        learner.restore(resumed)
    segments = dataset.segments("train")
    order = LaneOrder([segment.tokens for segment in segments], config.seed, config.lanes, config.window)
    heldout = heldout_tokens(dataset, config.heldout_tokens)
    recorder = Recorder(assignment, resumed) if rank == 0 else None
    with LaneReader(
        order, lambda index: dataset.read_segment(segments[index]), manifest.end_of_text, learner.lanes
    ) as reader:
        _train(assignment, learner, reader, heldout, recorder)
    if recorder:
        recorder.close()


def _choose_checkpoint(assignment: Assignment, rank: int) -> str | None:
    """The one to go on from: rank 0 looks, so that all take the same."""
    path = None
    if rank == 0:
        path = checkpoints.newest(assignment.run, assignment.identity)
        checkpoints.discard_others(assignment.run, path)
    return broadcast_from_rank_zero(path)


def _choose_precision(
    assignment: Assignment, resumed: checkpoints.Checkpoint | None, device: torch.device, rank: int
) -> Precision:
    """The one that the run began with, else what suits the machine of rank 0, so that all take the same."""
    precision = None
    if rank == 0:
        precision = resumed.state["precision"] if resumed else resolve(assignment.model, device)
    return broadcast_from_rank_zero(precision)


def _train(
    assignment: Assignment,
    learner: Learner,
    reader: LaneReader,
    heldout: np.ndarray,
    recorder: "Recorder | None",
) -> None:
    config = assignment.train
    meter = Meter()
    last_checkpoint = time.monotonic()
    while learner.step < config.steps:
        waited = time.monotonic()
        inputs_TB, targets_TB = reader.batch(learner.step)
        meter.data_wait += time.monotonic() - waited
        loss, norm = learner.train_step(inputs_TB, targets_TB)
        meter.add(loss, inputs_TB.shape[0] * config.lanes)
        done = learner.step == config.steps
        if learner.step % config.log_steps and not done:
            continue
        # Rank 0's clock decides for all: its share of the second sum is the only one that is not zero.
        due = done or time.monotonic() - last_checkpoint > config.checkpoint_seconds
        mean_loss, due_sum = learner.sum_over_workers([meter.mean_loss(), float(due and learner.rank == 0)])
        # The last step's gradient is already in weights that no loss has been measured with.
        for what, value in (("loss", mean_loss), ("gradient's norm", float(norm))):
            if not math.isfinite(value):
                if learner.rank == 0:
                    ray.get(assignment.progress.give_up.remote(_divergence(learner.step, what, value)))
                return  # not an error of this process: it would be tried again, and end the same
        metrics = {tracking.LOSS: mean_loss, "train/gradient_norm": float(norm), **meter.rates()}
        metrics["train/learning_rate"] = learner.optimizer.param_groups[0]["lr"]
        if learner.step % config.heldout_steps < config.log_steps or done:
            metrics["heldout/loss"] = learner.heldout_loss(heldout)
        if recorder:
            recorder.add(learner.step, metrics)
        if due_sum:
            started = time.monotonic()
            _commit(assignment, learner, recorder)
            last_checkpoint = time.monotonic()
            if recorder:
                recorder.checkpoint_seconds = last_checkpoint - started
        meter = Meter()


def _divergence(step: int, what: str, value: float) -> str:
    return f"training diverged: the {what} is {value} at step {step}: lower train.learning_rate or train.clip"


def _commit(assignment: Assignment, learner: Learner, recorder: "Recorder | None") -> None:
    """Save, report to Ray Train, and then log the points that this checkpoint covers."""
    state = {
        "identity": assignment.identity,
        "seed": assignment.train.seed,
        "precision": learner.precision,
        "versions": {"torch": str(torch.__version__), "ray": ray.__version__},
        "points": recorder.points if recorder else [],
    }
    checkpoint = learner.checkpoint(state)
    if recorder is None:
        ray.train.report({})
        return
    name = checkpoints.new_name(learner.step)
    with tempfile.TemporaryDirectory(prefix="gru-checkpoint-") as directory:
        checkpoints.save(checkpoint, Path(directory))
        ray.train.report(
            {"step": learner.step, "loss": recorder.loss},
            ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=name,
            checkpoint_upload_fn=lambda local, name: _upload(Path(local.path), storage.join(assignment.run, name)),
        )
    recorder.commit()
    checkpoints.prune(assignment.run, assignment.train.keep)


def _upload(directory: Path, path: str) -> ray.train.Checkpoint:
    storage.upload(directory, path, last=checkpoints.DIGESTS)
    return ray.train.Checkpoint(path)


def heldout_tokens(dataset: Dataset, most: int) -> np.ndarray:
    """The first `most` tokens of the held-out stream."""
    parts: list[np.ndarray] = []
    for segment in dataset.segments("heldout"):
        parts.append(dataset.read_segment(segment))
        if sum(map(len, parts)) >= most:
            break
    return np.concatenate(parts)[:most]


class Meter:
    """Loss and rates since the last logged point."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.data_wait = 0.0
        self.loss: torch.Tensor | None = None
        self.steps = 0
        self.tokens = 0

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self.loss = loss if self.loss is None else self.loss + loss
        self.steps += 1
        self.tokens += tokens

    def mean_loss(self) -> float:
        assert self.loss is not None
        return float(self.loss) / self.steps

    def rates(self) -> dict[str, float]:
        elapsed = time.monotonic() - self.started
        return {
            "train/tokens_per_second": self.tokens / elapsed,
            "train/data_wait_share": self.data_wait / elapsed,
        }


class Recorder:
    """Rank 0's account of the run: points waiting for their checkpoint, MLflow, and the line that people see."""

    def __init__(self, assignment: Assignment, resumed: checkpoints.Checkpoint | None) -> None:
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.assignment = assignment
        self.points: list[tracking.Point] = []
        self.loss = self.heldout_loss = float("nan")
        self.checkpoint_seconds: float | None = None
        self.started = time.monotonic()
        self.first_step = resumed.step if resumed else 0
        mlflow.set_tracking_uri(assignment.tracking_uri)
        self.run = tracking.find_run(assignment.tracking_run)
        if resumed:  # its points, if whoever saved it was killed before logging them
            self.run.log_points(resumed.state["points"])
        self.monitor = SystemMetricsMonitor(assignment.tracking_run, resume_logging=True)
        self.monitor.start()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.loss = metrics[tracking.LOSS]
        self.heldout_loss = metrics.get("heldout/loss", self.heldout_loss)
        if self.checkpoint_seconds is not None:
            metrics["train/checkpoint_seconds"] = self.checkpoint_seconds
            self.checkpoint_seconds = None
        self.points.append({"step": step, "time": time.time(), "metrics": metrics})
        steps = self.assignment.train.steps
        left = (time.monotonic() - self.started) / (step - self.first_step) * (steps - step)
        line = f"step {step:,}/{steps:,}, loss {self.loss:.3f}"
        if self.heldout_loss == self.heldout_loss:
            line += f", held-out {self.heldout_loss:.3f}"
        line += f", {metrics['train/tokens_per_second']:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
        self.assignment.progress.report.remote(line)

    def commit(self) -> None:
        self.run.log_points(self.points)
        self.points = []

    def close(self) -> None:
        self.monitor.finish()
