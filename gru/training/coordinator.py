"""What rank 0 does for all workers: decides when to save and when to leave, and gives account of the run."""

import threading
import time

import ray
import ray.exceptions
from ray.actor import ActorHandle

from gru.config import TrainConfig
from gru.registry import tracking
from gru.training.checkpoint_writer import CheckpointWriter

SAVE, STOP, CHECK_PREEMPTION = 1, 2, 4
"""What it decides, as bits: save a checkpoint; save one and leave; look whether a node is about to be taken away."""

LOOK_SECONDS = 5.0
RETRY_SECONDS = 5.0


class Coordinator:
    """Decisions by the clock, by the state of the commits, and by whether the driver has been told to stop."""

    def __init__(self, config: TrainConfig, writer: CheckpointWriter, progress: ActorHandle, step: int) -> None:
        """step: where this process begins."""
        self.writer = writer
        self._config, self._progress = config, progress
        self._first_step = step
        self._started = self._saved = self._looked = time.monotonic()
        self._saved_step = step
        self._stopping = threading.Event()
        self._heldout_loss: float | None = None
        threading.Thread(target=self._listen, name="listen-for-stop", daemon=True).start()

    def _listen(self) -> None:
        try:
            ray.get(self._progress.wait_for_stop.remote())
        except ray.exceptions.RayError:
            return  # the driver is gone, and this process with it
        self._stopping.set()

    def decide(self, step: int, heldout_loss: float | None) -> int:
        """What all are to do after a step; heldout_loss: of the weights after it, where it was measured."""
        now = time.monotonic()
        if self._stopping.is_set():
            return STOP
        decision = 0
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            decision |= CHECK_PREEMPTION
        best = heldout_loss is not None and heldout_loss < self.writer.best
        if best or (self._due(step, now) and self.writer.idle):
            decision |= SAVE
        return decision

    def _due(self, step: int, now: float) -> bool:
        if self.writer.failed:
            return now - self._saved > min(RETRY_SECONDS, self._config.checkpoint_seconds)
        if self._config.checkpoint_steps:
            return step - self._saved_step >= self._config.checkpoint_steps
        return now - self._saved > self._config.checkpoint_seconds

    def saved(self, step: int) -> None:
        self._saved, self._saved_step = time.monotonic(), step

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """A point, and the line that people see."""
        if self.writer.seconds is not None:
            metrics["train/checkpoint_seconds"], self.writer.seconds = self.writer.seconds, None
        self.writer.add({"step": step, "time": time.time(), "metrics": metrics})
        self._heldout_loss = metrics.get("heldout/loss", self._heldout_loss)
        steps = self._config.steps
        left = (time.monotonic() - self._started) / (step - self._first_step) * (steps - step)
        line = f"step {step:,}/{steps:,}, loss {metrics[tracking.LOSS]:.3f}"
        if self._heldout_loss is not None:
            line += f", held-out {self._heldout_loss:.3f}"
        line += f", {metrics['train/tokens_per_second']:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
        self._progress.report.remote(line)
