"""The checkpoint writer: saves checkpoints while training continues, then logs the points that they cover in MLflow.

It is a thread of rank 0. It does not know when a checkpoint is due.
"""

import logging
import threading
import time
from collections.abc import Callable

from gru import storage
from gru.errors import first_line
from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)


class CheckpointWriter:
    """A queue of checkpoints and the thread that writes them, one at a time.

    Of the checkpoints in the queue it keeps the newest, and each with a held-out loss, which may be the best one. A
    checkpoint that cannot be written is skipped: the next one contains all that it did, the points to log included.
    Points that cannot be logged stay in the checkpoints until one logs them, or until a resumed run does.

    log_points: logs points in MLflow, each once. resumed_points: the points in the checkpoint from which this process
    resumes. best_heldout_loss: the lowest held-out loss that has a checkpoint. show: takes a line for people.
    """

    def __init__(
        self,
        run: str,
        keep: int,
        log_points: Callable[[list[tracking.Point]], None],
        resumed_points: list[tracking.Point],
        best_heldout_loss: float,
        show: Callable[[str], None],
    ) -> None:
        self._run, self._keep, self._log_points, self._show = run, keep, log_points, show
        self._points = list(resumed_points)
        self._resumed_step = resumed_points[-1]["step"] if resumed_points else 0
        self._changed = threading.Condition()
        self._queue: list[Checkpoint] = []
        self._closing = self._busy = False
        self.best_heldout_loss = best_heldout_loss
        """The lowest held-out loss that has a checkpoint on storage."""
        self.failure: str | None = None
        """Why the last checkpoint could not be written; None if it was."""
        self.seconds: float | None = None
        """How long writing the last checkpoint took; the reader sets it to None."""
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is queued or being written."""
        with self._changed:
            return not self._busy and not self._queue

    def add(self, point: tracking.Point) -> None:
        """Add a point, to be logged with the next checkpoint."""
        with self._changed:
            self._points.append(point)

    def points(self) -> list[tracking.Point]:
        """Return the points that are not logged yet, in order."""
        with self._changed:
            return list(self._points)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Queue a checkpoint and return at once. Its tensors must not change afterwards."""
        with self._changed:
            self._queue = [other for other in self._queue if other.heldout_loss is not None] + [checkpoint]
            self._changed.notify_all()

    def finish(self, checkpoint: Checkpoint, patience: float, heartbeat: Callable[[], None]) -> bool:
        """Write the last checkpoint of this process, and wait for it and its points.

        Returns False if every attempt failed for `patience` seconds. An attempt that is still writing is waited for.
        """
        deadline: float | None = None
        while True:
            self.begin(checkpoint)
            while not self.idle:
                heartbeat()
                with self._changed:
                    self._changed.wait(0.5)
            if self.failure is None:
                return True
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() > deadline:
                return False
            time.sleep(1)

    def close(self) -> None:
        """End the thread after the queued checkpoints; wait 5 seconds for it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        self._log(self._resumed_step)  # points that an earlier process saved, but was killed before it logged them
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                checkpoint = self._queue.pop(0)
                self._busy = True
            try:
                self._write(checkpoint)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _write(self, checkpoint: Checkpoint) -> None:
        started = time.monotonic()
        try:
            checkpoints.save(checkpoint, storage.join(self._run, checkpoints.new_name(checkpoint.step)))
        except Exception as error:  # each kind of storage raises its own
            self.failure = first_line(error)
            self._show(f"step {checkpoint.step:,}: could not save the checkpoint, will retry: {self.failure}")
            return
        self.failure, self.seconds = None, time.monotonic() - started
        if checkpoint.heldout_loss is not None:
            self.best_heldout_loss = min(self.best_heldout_loss, checkpoint.heldout_loss)
        self._log(checkpoint.step)
        try:
            checkpoints.prune(self._run, self._keep)
        except Exception as error:
            log.warning("could not remove older checkpoints: %s", error)

    def _log(self, step: int) -> None:
        """Log the points up to a step."""
        due = [point for point in self.points() if point["step"] <= step]
        try:
            self._log_points(due)
        except Exception as error:
            reason = first_line(getattr(error, "cause", None) or error)
            self._show(f"could not log metrics in MLflow, keeping them in the checkpoints: {reason}")
            return
        with self._changed:
            del self._points[: len(due)]
