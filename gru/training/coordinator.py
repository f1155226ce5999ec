"""The coordinator: rank 0 decides for all workers when to save and when to stop, and reports the run's progress."""

import threading
import time

import ray
import ray.exceptions
from ray.actor import ActorHandle

from gru.config import TrainConfig
from gru.registry import tracking
from gru.training.checkpoint_writer import CheckpointWriter

SAVE, STOP, CHECK_PREEMPTION = 1, 2, 4
"""Decisions, as bits: save a checkpoint; save one and stop; check whether a node is about to be preempted."""

PREEMPTION_CHECK_SECONDS = 5.0
RETRY_SECONDS = 5.0


class Coordinator:
    """Decisions by the clock, by the state of the checkpoint writer, and by whether the driver requests a stop."""

    def __init__(self, config: TrainConfig, writer: CheckpointWriter, channel: ActorHandle, first_step: int) -> None:
        """first_step: the step from which this process trains."""
        self.writer = writer
        self._config, self._channel = config, channel
        self._first_step = first_step
        self._started = self._saved_at = self._checked_at = time.monotonic()
        self._saved_step = first_step
        self._stopping = threading.Event()
        self._heldout_loss: float | None = None
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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add a point to the metrics, and show its progress line."""
        if self.writer.seconds is not None:
            metrics["train/checkpoint_seconds"], self.writer.seconds = self.writer.seconds, None
        self.writer.add({"step": step, "time": time.time(), "metrics": metrics})
        self._heldout_loss = metrics.get("heldout/loss", self._heldout_loss)
        steps = self._config.steps
        remaining = (time.monotonic() - self._started) / (step - self._first_step) * (steps - step)
        line = f"step {step:,}/{steps:,}, loss {metrics[tracking.LOSS]:.3f}"
        if self._heldout_loss is not None:
            line += f", held-out {self._heldout_loss:.3f}"
        line += f", {metrics['train/tokens_per_second']:,.0f} tokens/s"
        line += f", {remaining // 60:.0f}:{remaining % 60:02.0f} remaining"
        self._channel.set_progress.remote(line)
