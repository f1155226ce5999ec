"""The loop of a training worker, from its start to the last step.

It runs inside Ray Train, which places the workers and restarts them. Checkpoints are our own: rank 0 writes them while
training continues, and a resumed run finds them by their digests, whatever was killed. `ray.train.report` is not used:
it makes all workers wait for each other, and it rewrites its list of checkpoints in place, so that a kill can truncate
the list.
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
from gru.model.language_model import GRULanguageModel
from gru.model.precision import Precision, resolve
from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training import initial_model, metrics_logger
from gru.training.checkpoint import Checkpoint
from gru.training.checkpoint_writer import CheckpointWriter
from gru.training.coordinator import CHECK_PREEMPTION, SAVE, STOP, Coordinator
from gru.training.learner import Diverged, Learner, diverged, threads
from gru.training.meter import Meter, memory_gigabytes
from gru.training.sampler import sample_ids
from gru.training.watchdog import Watchdog

READ_PATIENCE_SECONDS = 30.0
PROMPT_TOKENS = 200  # of a sample
SAVE_PATIENCE_SECONDS = 120.0
LOG_PATIENCE_SECONDS = 60.0
DIVERGENCE = "divergence.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """What the driver sends to every worker."""

    model: ModelConfig
    train: TrainConfig
    dataset: str
    """Directory of the dataset."""
    run: str
    """Directory of the run."""
    identity: dict[str, Any]
    """What a checkpoint must have been trained on to be resumed, such as the dataset's digest."""
    initial: str | None
    """Directory of the initial model; None: the run starts from random weights."""
    tracking_uri: str
    tracking_run: str
    tracking_parent: str | None
    """The run over all stages, which gets the key metrics too."""
    prompt: str
    """Prompt of the samples."""
    channel: ActorHandle
    """The `DriverChannel`."""


def run_worker(config: dict[str, Assignment]) -> None:
    """Train to the last step, from the newest checkpoint, or else from the initial model or random weights.

    Ray Train calls this function in each worker.
    """
    assignment = config["assignment"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        ray.get(assignment.channel.set_placement_group.remote(ray.util.get_current_placement_group()))
    torch.set_num_threads(threads(assignment.train, context.get_local_world_size()))
    with Watchdog(assignment.train.stall_seconds, partial(_exit_stalled, assignment, rank)) as watchdog:
        dataset = open_dataset(assignment.dataset)
        device = ray.train.torch.get_device()
        path = _choose_checkpoint(assignment, rank, watchdog)
        watchdog.heartbeat()
        resumed = checkpoints.load(path) if path else None
        model = assignment.model.model_copy(update={"precision": _choose_precision(assignment, resumed, device, rank)})
        manifest = dataset.manifest
        learner = Learner(model, assignment.train, manifest.vocab_size, manifest.end_of_text, rank, world, device)
        if resumed:
            learner.restore(resumed)
        elif assignment.initial:
            learner.start_from(initial_model.load_weights(assignment.initial))
        watchdog.heartbeat()
        WorkerLoop(assignment, dataset, learner, watchdog).run(resumed)


def _choose_checkpoint(assignment: Assignment, rank: int, watchdog: Watchdog) -> str | None:
    """Return the checkpoint to resume from, if any. Rank 0 chooses it for all workers."""
    path = None
    if rank == 0:
        _wait_for_storage(assignment, watchdog)
        path = checkpoints.newest(assignment.run, assignment.identity)
        checkpoints.discard_newer(assignment.run, path)
    return broadcast_from_rank_zero(path)


def _wait_for_storage(assignment: Assignment, watchdog: Watchdog) -> None:
    """Wait until the run's directory exists. Raises OSError if it does not for `READ_PATIENCE_SECONDS`.

    Ray Train has created the directory. If it is missing, so are its checkpoints, and the run must not start from
    step 0.
    """
    deadline = time.monotonic() + READ_PATIENCE_SECONDS
    while storage.is_local(assignment.run) and not Path(assignment.run).is_dir():
        if time.monotonic() > deadline:
            raise OSError(f"{assignment.run}: the run's directory has disappeared")
        watchdog.heartbeat()
        time.sleep(1)


def _exit_stalled(assignment: Assignment, rank: int, location: str, stack: str) -> None:
    line = f"worker {rank} has finished no step for train.stall_seconds = {assignment.train.stall_seconds}"
    log.error("%s\n%s", line, stack)
    with suppress(Exception):
        ray.get(assignment.channel.show.remote(f"{line}: it is {location}"), timeout=5)
    os._exit(1)  # Ray Train notices it and restarts the workers


def _choose_precision(assignment: Assignment, resumed: Checkpoint | None, device: torch.device, rank: int) -> Precision:
    """Return the precision with which the run began, or the best one for rank 0's machine, the same for all workers."""
    precision = None
    if rank == 0:
        precision = resumed.state["precision"] if resumed else resolve(assignment.model, device)
    return broadcast_from_rank_zero(precision)


class WorkerLoop:
    """The steps of one worker, from its learner's step to the last one, or until the coordinator stops all workers."""

    def __init__(self, assignment: Assignment, dataset: Dataset, learner: Learner, watchdog: Watchdog) -> None:
        self.assignment, self.dataset, self.learner, self.watchdog = assignment, dataset, learner, watchdog
        self.config = config = assignment.train
        self.segments = dataset.segments("train")
        self.order = LaneOrder(
            [segment.tokens for segment in self.segments],
            config.seed,
            config.batch_size,
            config.sequence_length,
            dataset.segment_weights("train"),
        )
        self.heldout = dataset.first_tokens("heldout", config.heldout_tokens)
        self.tokenizer = dataset.tokenizer()
        heldout_bytes = len(self.tokenizer.decode_bytes(self.heldout))
        self.bits_per_byte_per_nat = len(self.heldout) / heldout_bytes / math.log(2)
        self.meter = Meter()
        self.coordinator: Coordinator | None = None
        """Rank 0's; None in other workers."""

    def run(self, resumed: Checkpoint | None) -> None:
        """Train until the last step, a stop, a preemption or a divergence."""
        learner = self.learner
        with ExitStack() as stack:
            if learner.rank == 0:
                self._start_coordinator(stack, resumed)
            reader = LaneReader(self.order, self._read, self.dataset.manifest.end_of_text, learner.lanes)
            stack.enter_context(reader)
            self.meter = Meter.resumed(resumed.state["since_point"], learner) if resumed else Meter()
            while learner.step < self.config.steps:
                self._train_step(reader)
                ahead = learner.step
                try:
                    if not self._finish_step():
                        return
                except Diverged as divergence:
                    self.meter.discard(ahead - learner.step)
                    self._report_divergence(divergence, *reader.batch(learner.step))
                    return

    def _train_step(self, reader: LaneReader) -> None:
        waiting_since = time.monotonic()
        batch = reader.batch(self.learner.step)
        self.meter.data_wait += time.monotonic() - waiting_since
        loss = self.learner.train_step(*batch)
        self.watchdog.heartbeat()
        self.meter.add(loss, batch[0].shape[0] * self.config.batch_size)

    def _finish_step(self) -> bool:
        """Measure, log and save what is due after a step; False if the worker stops. May raise Diverged."""
        learner, config = self.learner, self.config
        last = learner.step == config.steps
        heldout_loss = sample = None
        if learner.step % config.heldout_steps == 0 or last:
            learner.confirm()
            heldout_loss = learner.heldout_loss(self.heldout, self.watchdog.heartbeat)
            if not math.isfinite(heldout_loss):  # a finite gradient was too large for the weights all the same
                reason = f"the held-out loss is {heldout_loss} at step {learner.step}"
                self._report_outcome({"diverged": str(diverged(reason))})
                return False
            sample = self._sample()
        if learner.step % config.log_steps == 0 or last or heldout_loss is not None:
            self._log(learner.confirm(), heldout_loss, sample)
            self.meter = Meter()
        return self._follow_decision(heldout_loss, last)

    def _start_coordinator(self, stack: ExitStack, resumed: Checkpoint | None) -> None:
        """Start what only rank 0 has: the metrics logger, the checkpoint writer and the coordinator."""
        assignment = self.assignment
        logger = metrics_logger.start(assignment.tracking_uri, assignment.tracking_run, assignment.tracking_parent)

        def log_points(points: list[tracking.Point]) -> None:
            ray.get(logger.log.remote(points), timeout=LOG_PATIENCE_SECONDS)

        def close() -> None:
            with suppress(ray.exceptions.RayError):
                ray.get(logger.close.remote(), timeout=5)

        stack.callback(close)
        points = resumed.state["points"] if resumed else []
        best = checkpoints.best_heldout_loss(assignment.run)
        show: Any = assignment.channel.show.remote
        writer = CheckpointWriter(assignment.run, self.config.keep, log_points, points, best, show)
        stack.callback(writer.close)
        losses = resumed.state.get("heldout_losses", []) if resumed else []
        self.coordinator = Coordinator(self.config, writer, assignment.channel, self.learner.step, losses)

    def _read(self, index: int) -> Tokens:
        """Return the tokens of a segment. Retries for `READ_PATIENCE_SECONDS` if the storage is unavailable."""
        deadline = time.monotonic() + READ_PATIENCE_SECONDS
        while True:
            try:
                return self.dataset.read_segment(self.segments[index])
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.assignment.channel.show.remote(f"could not read the dataset, retrying: {error}")
                time.sleep(2)

    def _sample(self) -> str | None:
        """Return what the averaged weights generate, on rank 0; the other workers wait for it."""
        if self.coordinator is None:
            return None
        model = self.learner.average
        assert isinstance(model, GRULanguageModel)
        lanes = 1 if self.learner.device.type == "cpu" else len(self.learner.heldout_lanes)
        prompt = self.assignment.prompt
        tokens = self.tokenizer.encode(prompt)[-PROMPT_TOKENS:].tolist()  # the other workers wait no longer than that
        ids = sample_ids(model, tokens, self.tokenizer.end_of_text, lanes)
        self.watchdog.heartbeat()
        return prompt + self.tokenizer.decode(ids)

    def _log(self, norm: float, heldout_loss: float | None, sample: str | None) -> None:
        [mean_loss] = self.learner.sum_over_workers([self.meter.mean_loss()])
        if self.coordinator is None:
            return
        metrics = {tracking.LOSS: mean_loss, "train/gradient_norm": norm, **self.meter.rates()}
        metrics["train/learning_rate"] = self.learner.learning_rate
        metrics["train/tokens"] = self.order.tokens_before(self.learner.step)
        metrics["train/memory_gigabytes"] = memory_gigabytes(self.learner.device)
        if heldout_loss is not None:
            metrics[tracking.HELDOUT_LOSS] = heldout_loss
            metrics["heldout/bits_per_byte"] = heldout_loss * self.bits_per_byte_per_nat
        self.coordinator.log(self.learner.step, metrics, sample)

    def _follow_decision(self, heldout_loss: float | None, last: bool) -> bool:
        """Do what the coordinator decides after a step; False if the worker stops, with its last checkpoint written."""
        learner = self.learner
        decision = STOP if last else 0
        if self.coordinator and not last:
            decision = self.coordinator.decide(learner.step, heldout_loss)
        decision = learner.agree(decision)
        outcome = None
        if decision & STOP:
            outcome = {} if last else {"stopped": learner.step}
        elif decision & CHECK_PREEMPTION and ray.train.get_preemption_info() is not None:
            outcome = {"preempted": learner.step}
        if outcome is not None or decision & SAVE:
            learner.confirm()
        if outcome is not None:
            failure = self._save_last(heldout_loss)
            self._report_outcome({"unsaved": failure} if failure else outcome)
            return False
        if decision & SAVE:
            started = time.monotonic()
            checkpoint = self._checkpoint(heldout_loss)
            if self.coordinator:
                self.coordinator.writer.begin(checkpoint)
                self.coordinator.mark_saved(learner.step)
            self.meter.checkpoint_wait += time.monotonic() - started
        return True

    def _checkpoint(self, heldout_loss: float | None) -> Checkpoint:
        [loss] = self.learner.sum_over_workers([float(self.meter.loss)])
        state = {
            "identity": self.assignment.identity,
            "seed": self.config.seed,
            "precision": self.learner.precision,
            "heldout_loss": heldout_loss,
            "versions": {"torch": str(torch.__version__), "ray": ray.__version__},
            "since_point": {"loss": loss, "steps": self.meter.steps},
            "points": self.coordinator.writer.points() if self.coordinator else [],
            "heldout_losses": [*self.coordinator.heldout_losses] if self.coordinator else [],
        }
        return self.learner.checkpoint(state)

    def _save_last(self, heldout_loss: float | None) -> str | None:
        """Write the last checkpoint; return why it could not be written. Only rank 0 knows; others return None."""
        checkpoint = self._checkpoint(heldout_loss)
        if self.coordinator and not self.coordinator.writer.finish(
            checkpoint, SAVE_PATIENCE_SECONDS, self.watchdog.heartbeat
        ):
            return f"step {self.learner.step:,}: could not save the checkpoint: {self.coordinator.writer.failure}"
        return None

    def _report_divergence(self, divergence: Diverged, inputs_TB: np.ndarray, targets_TB: np.ndarray) -> None:
        """Save the weights from before the step, and report the lanes whose gradients diverge and their documents."""
        learner = self.learner
        suspects = set(learner.suspects(inputs_TB, targets_TB, self.watchdog.heartbeat))
        marks = learner.sum_over_workers([float(lane in suspects) for lane in range(self.config.batch_size)])
        saved = self._save_last(None) or f"saved at step {learner.step}"
        if self.coordinator is None:
            return
        lanes = [{"lane": lane, "documents": self._documents(lane)} for lane, mark in enumerate(marks) if mark]
        path = storage.join(self.assignment.run, DIVERGENCE)
        with suppress(OSError):  # the message is more important than the file
            storage.write_json(path, {"step": learner.step + 1, "reason": str(divergence), "lanes": lanes})
        where = f" in {len(lanes)} of {len(marks)} lanes" if lanes else ", but in no lane alone"
        reason = f"{divergence}{where} (their documents: {path}); {saved}"
        self._report_outcome({"diverged": str(diverged(reason))})

    def _documents(self, lane: int) -> list[str]:
        """Return the hashes of the documents that a lane reads at the learner's step."""
        epoch, start, stop = self.order.window_of(self.learner.step)
        return [
            f"0x{document:016x}"
            for segment, first, after in self.order.slices(epoch, lane, start, stop)
            for document in self.dataset.documents(self.segments[segment], first, after)
        ]

    def _report_outcome(self, outcome: dict[str, Any]) -> None:
        """Tell the driver why all workers stop early. After an exception, Ray Train would only restart them."""
        if self.coordinator and outcome:
            ray.get(self.assignment.channel.set_outcome.remote(outcome))
