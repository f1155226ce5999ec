"""The coordinator: rank 0 decides for all workers when to save and when to stop, and reports the run's progress."""

import threading
import time
from collections.abc import Sequence

import ray
import ray.exceptions
from ray.actor import ActorHandle

from gru.config import TrainConfig
from gru.registry import tracking
from gru.training.checkpoint_writer import CheckpointWriter
from gru.training.progress import progress_line, sample_line

SAVE, STOP, CHECK_PREEMPTION = 1, 2, 4
"""Decisions, as bits: save a checkpoint; save one and stop; check whether a node is about to be preempted."""

PREEMPTION_CHECK_SECONDS = 5.0
RETRY_SECONDS = 5.0


class Coordinator:
    """Decisions by the clock, by the state of the checkpoint writer, and by whether the driver requests a stop."""

    def __init__(
        self,
        config: TrainConfig,
        writer: CheckpointWriter,
        channel: ActorHandle,
        first_step: int,
        heldout_losses: Sequence[float],
    ) -> None:
        """first_step: the step from which this process trains. heldout_losses: those measured before it."""
        self.writer = writer
        self.heldout_losses = list(heldout_losses)
        """All held-out losses of the run so far."""
        self._config, self._channel = config, channel
        self._first_step = first_step
        self._started = self._saved_at = self._checked_at = time.monotonic()
        self._saved_step = first_step
        self._stopping = threading.Event()
        threading.Thread(target=self._listen, name="listen-for-stop", daemon=True).start()

    def _listen(self) -> None:
        try:
            ray.get(self._channel.wait_for_stop.remote())
        except ray.exceptions.RayError:
            return  # the driver has ended, and Ray ends this process too
        self._stopping.set()

    def decide(self, step: int, heldout_loss: float | None) -> int:
        """Return what all workers do after a step. heldout_loss: of the weights after it, if it was measured."""
        now = time.monotonic()
        if self._stopping.is_set():
            return STOP
        decision = 0
        if now - self._checked_at > PREEMPTION_CHECK_SECONDS:
            self._checked_at = now
            decision |= CHECK_PREEMPTION
        best = heldout_loss is not None and heldout_loss < self.writer.best_heldout_loss
        if best or (self._is_due(step, now) and self.writer.idle):
            decision |= SAVE
        return decision

    def _is_due(self, step: int, now: float) -> bool:
        if self.writer.failure:
            return now - self._saved_at > min(RETRY_SECONDS, self._config.checkpoint_seconds)
        if self._config.checkpoint_steps:
            return step - self._saved_step >= self._config.checkpoint_steps
        return now - self._saved_at > self._config.checkpoint_seconds

    def mark_saved(self, step: int) -> None:
        """Record that a checkpoint of this step was queued now."""
        self._saved_at, self._saved_step = time.monotonic(), step

    def log(self, step: int, metrics: dict[str, float], sample: str | None) -> None:
        """Add a point to the metrics, and show it: its progress line, and the sample if there is one."""
        if self.writer.seconds is not None:
            metrics["train/checkpoint_seconds"], self.writer.seconds = self.writer.seconds, None
        point: tracking.Point = {"step": step, "time": time.time(), "metrics": metrics}
        if sample is not None:
            point["sample"] = sample
            self._channel.show.remote(sample_line(step, sample))
        self.writer.add(point)
        if tracking.HELDOUT_LOSS in metrics:
            self.heldout_losses.append(metrics[tracking.HELDOUT_LOSS])
        steps = self._config.steps
        remaining = (time.monotonic() - self._started) / (step - self._first_step) * (steps - step)
        self._channel.set_progress.remote(progress_line(step, steps, metrics, self.heldout_losses, remaining))
