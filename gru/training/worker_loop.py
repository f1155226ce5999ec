"""What each worker of a training run does, from its start to the last step.

Runs inside Ray Train, which places the workers and starts them again. Checkpoints are our own: written by rank 0 while
training goes on, and found by their digests, whatever was killed. `ray.train.report` is not used: it makes all workers
wait for each other, and the note that it keeps is written in place, so that a kill can truncate it.
"""

import logging
import math
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from ray.train.collective import broadcast_from_rank_zero

from gru import storage
from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader, Tokens
from gru.corpus.dataset import Dataset, open_dataset
from gru.errors import UserError
from gru.model.precision import Precision, resolve
from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint
from gru.training.checkpoint_writer import CheckpointWriter
from gru.training.coordinator import CHECK_PREEMPTION, SAVE, STOP, Coordinator
from gru.training.learner import Diverged, Learner
from gru.training.metrics_logger import start_metrics_logger
from gru.training.watchdog import Watchdog

READ_PATIENCE_SECONDS = 30.0
SAVE_PATIENCE_SECONDS = 120.0
LOG_PATIENCE_SECONDS = 60.0
DIVERGENCE = "divergence.json"

log = logging.getLogger(__name__)


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


def run_worker(told: dict[str, Assignment]) -> None:
    """Train until the last step, from the newest checkpoint if there is one. Ray Train calls this in each worker."""
    assignment = told["assignment"]
    config = assignment.train
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        ray.get(assignment.progress.set_placement_group.remote(ray.util.get_current_placement_group()))
    torch.set_num_threads(_threads(config, context.get_local_world_size()))
    with Watchdog(config.stall_seconds, partial(_stalled, assignment, rank)) as watchdog:
        dataset = open_dataset(assignment.dataset)
        device = ray.train.torch.get_device()
        path = _choose_checkpoint(assignment, rank, watchdog)
        watchdog.heartbeat()
        resumed = checkpoints.load(path) if path else None
        model = assignment.model.model_copy(update={"precision": _choose_precision(assignment, resumed, device, rank)})
        manifest = dataset.manifest
        learner = Learner(model, config, manifest.vocab_size, manifest.end_of_text, rank, world, device)
        if resumed:
            learner.restore(resumed)
        watchdog.heartbeat()
        WorkerLoop(assignment, dataset, learner, watchdog).run(resumed)


def _threads(config: TrainConfig, workers_here: int) -> int:
    if config.threads or config.bitwise_elastic:
        return config.threads or 1
    return max(1, len(os.sched_getaffinity(0)) // workers_here)


def _choose_checkpoint(assignment: Assignment, rank: int, watchdog: Watchdog) -> str | None:
    """The one to go on from: rank 0 looks, so that all take the same."""
    path = None
    if rank == 0:
        _wait_for_storage(assignment, watchdog)
        path = checkpoints.newest(assignment.run, assignment.identity)
        checkpoints.discard_others(assignment.run, path)
    return broadcast_from_rank_zero(path)


def _wait_for_storage(assignment: Assignment, watchdog: Watchdog) -> None:
    """Ray Train has made the run's directory. Where it is not there, neither are its checkpoints, and to begin anew
    would be wrong."""
    deadline = time.monotonic() + READ_PATIENCE_SECONDS
    while storage.is_local(assignment.run) and not Path(assignment.run).is_dir():
        if time.monotonic() > deadline:
            raise OSError(f"{assignment.run} is gone")
        watchdog.heartbeat()
        time.sleep(1)


def _stalled(assignment: Assignment, rank: int, place: str, stack: str) -> None:
    line = f"worker {rank} has finished no step for train.stall_seconds = {assignment.train.stall_seconds}"
    log.error("%s\n%s", line, stack)
    with suppress(Exception):
        ray.get(assignment.progress.say.remote(f"{line}: it is {place}"), timeout=5)
    os._exit(1)  # which Ray Train notices, and starts the group again


def _choose_precision(assignment: Assignment, resumed: Checkpoint | None, device: torch.device, rank: int) -> Precision:
    """The one that the run began with, else what suits the machine of rank 0, so that all take the same."""
    precision = None
    if rank == 0:
        precision = resumed.state["precision"] if resumed else resolve(assignment.model, device)
    return broadcast_from_rank_zero(precision)


class WorkerLoop:
    """The steps of one worker, from where its learner is to the last one, or to where all are told to leave."""

    def __init__(self, assignment: Assignment, dataset: Dataset, learner: Learner, watchdog: Watchdog) -> None:
        self.assignment, self.dataset, self.learner, self.watchdog = assignment, dataset, learner, watchdog
        self.config = config = assignment.train
        self.segments = dataset.segments("train")
        self.order = LaneOrder(
            [segment.tokens for segment in self.segments], config.seed, config.batch_size, config.sequence_length
        )
        self.coordinator: Coordinator | None = None

    def run(self, resumed: Checkpoint | None) -> None:
        learner, config = self.learner, self.config
        heldout = heldout_tokens(self.dataset, config.heldout_tokens)
        with ExitStack() as stack:
            if learner.rank == 0:
                self._lead(stack, resumed)
            reader = LaneReader(self.order, self._read, self.dataset.manifest.end_of_text, learner.lanes)
            stack.enter_context(reader)
            meter = Meter.resumed(resumed.state["since_point"], learner) if resumed else Meter()
            while learner.step < config.steps:
                waited = time.monotonic()
                batch = reader.batch(learner.step)
                meter.data_wait += time.monotonic() - waited
                try:
                    loss, norm = learner.train_step(*batch)
                except Diverged as divergence:
                    self._diverged(divergence, meter, *batch)
                    return
                self.watchdog.heartbeat()
                meter.add(loss, batch[0].shape[0] * config.batch_size)
                done = learner.step == config.steps
                heldout_loss = None
                if learner.step % config.heldout_steps == 0 or done:
                    heldout_loss = learner.heldout_loss(heldout, self.watchdog.heartbeat)
                    if not math.isfinite(heldout_loss):  # an update that was finite was yet too large for its weights
                        self._end({"diverged": _advice(f"the held-out loss is {heldout_loss} at step {learner.step}")})
                        return
                if learner.step % config.log_steps == 0 or done or heldout_loss is not None:
                    self._log(meter, norm, heldout_loss)
                    meter = Meter()
                if not self._obey(meter, heldout_loss, done):
                    return

    def _lead(self, stack: ExitStack, resumed: Checkpoint | None) -> None:
        """What only rank 0 has: commits, decisions, and the machine's metrics."""
        assignment, step = self.assignment, self.learner.step

        scribe = start_metrics_logger(assignment.tracking_uri, assignment.tracking_run)

        def log_points(points: list[tracking.Point]) -> None:
            ray.get(scribe.log.remote(points), timeout=LOG_PATIENCE_SECONDS)

        def close() -> None:
            with suppress(ray.exceptions.RayError):
                ray.get(scribe.close.remote(), timeout=5)

        stack.callback(close)
        points = resumed.state["points"] if resumed else []
        best = checkpoints.best_heldout_loss(assignment.run)
        say: Any = assignment.progress.say.remote
        writer = CheckpointWriter(assignment.run, self.config.keep, log_points, points, best, say)
        stack.callback(writer.close)
        self.coordinator = Coordinator(self.config, writer, assignment.progress, step)

    def _read(self, index: int) -> Tokens:
        """A segment. Storage may be away for a while."""
        deadline = time.monotonic() + READ_PATIENCE_SECONDS
        while True:
            try:
                return self.dataset.read_segment(self.segments[index])
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.assignment.progress.say.remote(f"waiting: {error}")
                time.sleep(2)

    def _log(self, meter: "Meter", norm: float, heldout_loss: float | None) -> None:
        [mean_loss] = self.learner.sum_over_workers([meter.mean_loss()])
        if self.coordinator is None:
            return
        metrics = {tracking.LOSS: mean_loss, "train/gradient_norm": norm, **meter.rates()}
        metrics["train/learning_rate"] = self.learner.optimizer.param_groups[0]["lr"]
        if heldout_loss is not None:
            metrics["heldout/loss"] = heldout_loss
        self.coordinator.add(self.learner.step, metrics)

    def _obey(self, meter: "Meter", heldout_loss: float | None, done: bool) -> bool:
        """Do what rank 0 decides after a step; False if that is to leave. The last checkpoint is waited for."""
        learner = self.learner
        decision = STOP if done else 0
        if self.coordinator and not done:
            decision = self.coordinator.decide(learner.step, heldout_loss)
        decision = learner.agree(decision)
        outcome = None
        if decision & STOP:
            outcome = {} if done else {"stopped": learner.step}
        elif decision & CHECK_PREEMPTION and ray.train.get_preemption_info() is not None:
            outcome = {"preempted": learner.step}
        if outcome is not None:
            unsaved = self._save_last(meter, heldout_loss)
            self._end({"unsaved": unsaved} if unsaved else outcome)
            return False
        if decision & SAVE:
            started = time.monotonic()
            checkpoint = self._checkpoint(meter, heldout_loss)
            if self.coordinator:
                self.coordinator.writer.begin(checkpoint)
                self.coordinator.saved(learner.step)
            meter.checkpoint_wait += time.monotonic() - started
        return True

    def _checkpoint(self, meter: "Meter", heldout_loss: float | None) -> Checkpoint:
        [loss] = self.learner.sum_over_workers([float(meter.loss)])
        state = {
            "identity": self.assignment.identity,
            "seed": self.config.seed,
            "precision": self.learner.precision,
            "heldout_loss": heldout_loss,
            "versions": {"torch": str(torch.__version__), "ray": ray.__version__},
            "since_point": {"loss": loss, "steps": meter.steps},
            "points": self.coordinator.writer.points() if self.coordinator else [],
        }
        return self.learner.checkpoint(state)

    def _save_last(self, meter: "Meter", heldout_loss: float | None) -> str | None:
        """Why it could not be saved, if so; rank 0 knows."""
        checkpoint = self._checkpoint(meter, heldout_loss)
        if self.coordinator and not self.coordinator.writer.finish(
            checkpoint, SAVE_PATIENCE_SECONDS, self.watchdog.heartbeat
        ):
            return f"step {self.learner.step:,} could not be saved: {self.coordinator.writer.failed}"
        return None

    def _diverged(self, divergence: Diverged, meter: "Meter", inputs_TB: np.ndarray, targets_TB: np.ndarray) -> None:
        """Save what was good, and say what was not: the lanes, and the documents that they read."""
        learner = self.learner
        suspects = set(learner.suspects(inputs_TB, targets_TB, self.watchdog.heartbeat))
        marks = learner.sum_over_workers([float(lane in suspects) for lane in range(self.config.batch_size)])
        saved = self._save_last(meter, None) or f"saved at step {learner.step}"
        if self.coordinator is None:
            return
        epoch, start, stop = self.order.window_of(learner.step)
        lanes = [
            {
                "lane": lane,
                "documents": [
                    f"0x{document:016x}"
                    for segment, first, after in self.order.slices(epoch, lane, start, stop)
                    for document in self.dataset.documents(self.segments[segment], first, after)
                ],
            }
            for lane, mark in enumerate(marks)
            if mark
        ]
        path = storage.join(self.assignment.run, DIVERGENCE)
        with suppress(OSError):  # what is said matters more than what is written
            storage.write_json(path, {"step": learner.step + 1, "reason": str(divergence), "lanes": lanes})
        where = f" in {len(lanes)} of {len(marks)} lanes" if lanes else ", though in no lane alone"
        reason = f"{divergence}{where} (their documents: {path}); {saved}"
        self._end({"diverged": _advice(reason)})

    def _end(self, outcome: dict[str, Any]) -> None:
        """Tell the driver why all leave. An exception would not do: Ray Train would try the same again."""
        if self.coordinator and outcome:
            ray.get(self.assignment.progress.end.remote(outcome))


def _advice(reason: str) -> str:
    return f"training diverged: {reason}: lower train.learning_rate or train.clip"


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

    def __init__(self, loss: float = 0.0, steps: int = 0) -> None:
        self.started = time.monotonic()
        self.data_wait = self.checkpoint_wait = 0.0
        self.loss: torch.Tensor | float = loss
        self.steps = steps
        self.tokens = 0

    @classmethod
    def resumed(cls, since_point: dict[str, Any], learner: Learner) -> "Meter":
        """As it was when a checkpoint was made between two points; rank 0 has what all had."""
        return cls(since_point["loss"] if learner.rank == 0 else 0.0, since_point["steps"])

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        self.loss = self.loss + loss
        self.steps += 1
        self.tokens += tokens

    def mean_loss(self) -> float:
        return float(self.loss) / self.steps

    def rates(self) -> dict[str, float]:
        elapsed = time.monotonic() - self.started
        return {
            "train/tokens_per_second": self.tokens / elapsed,
            "train/data_wait_share": self.data_wait / elapsed,
            "train/checkpoint_wait_share": self.checkpoint_wait / elapsed,
        }
