"""Commits of a training run, made while it goes on: a checkpoint on storage, then the points that it covers in MLflow.

A thread of rank 0's. It does not know when a checkpoint is due.
"""

import logging
import threading
import time
from collections.abc import Callable

from gru import storage
from gru.registry import tracking
from gru.training import checkpoint as checkpoints
from gru.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time; of those that wait, the newest, and each with a held-out loss to be kept for.

    A checkpoint that cannot be written costs no more than itself: the next one has all that it had, its points too.
    Points that cannot be logged stay with the checkpoints until one is, or whoever resumes the run logs them.

    log_points: logs points in MLflow, each once. committed: points that a resumed checkpoint covers. best: the lowest
    held-out loss that has a checkpoint. say: takes a line for people.
    """

    def __init__(
        self,
        run: str,
        keep: int,
        log_points: Callable[[list[tracking.Point]], None],
        committed: list[tracking.Point],
        best: float,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._keep, self._log_points, self._say = run, keep, log_points, say
        self._points = list(committed)
        self._committed = committed[-1]["step"] if committed else 0
        self._changed = threading.Condition()
        self._waiting: list[Checkpoint] = []
        self._closing = self._busy = False
        self.best = best
        """The lowest held-out loss of those that have been written."""
        self.failed: str | None = None
        """Why the last one is not, if it is not."""
        self.seconds: float | None = None
        """That the last one took to write."""
        self._thread = threading.Thread(target=self._work, name="commits", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._busy and not self._waiting

    def add(self, point: tracking.Point) -> None:
        with self._changed:
            self._points.append(point)

    def points(self) -> list[tracking.Point]:
        """Those that no commit has logged yet, in order."""
        with self._changed:
            return list(self._points)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written. Returns at once; its tensors must not change afterwards."""
        with self._changed:
            self._waiting = [other for other in self._waiting if other.heldout_loss is not None] + [checkpoint]
            self._changed.notify_all()

    def finish(self, checkpoint: Checkpoint, patience: float, heartbeat: Callable[[], None]) -> bool:
        """Have the last checkpoint of this process written, and wait for it and its points. False if that failed again
        and again for `patience` seconds; as long as something is being written, it is waited for."""
        deadline: float | None = None
        while True:
            self.begin(checkpoint)
            while not self.idle:
                heartbeat()
                with self._changed:
                    self._changed.wait(0.5)
            if self.failed is None:
                return True
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() > deadline:
                return False
            time.sleep(1)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        self._log(self._committed)  # what a process that was killed has committed, but not logged
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                checkpoint = self._waiting.pop(0)
                self._busy = True
            try:
                self._commit(checkpoint)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _commit(self, checkpoint: Checkpoint) -> None:
        started = time.monotonic()
        try:
            checkpoints.save(checkpoint, storage.join(self._run, checkpoints.new_name(checkpoint.step)))
        except Exception as error:  # of whatever storage it is
            self.failed = _first_line(error)
            self._say(f"step {checkpoint.step:,} could not be saved, and will be tried again: {self.failed}")
            return
        self.failed, self.seconds = None, time.monotonic() - started
        if checkpoint.heldout_loss is not None:
            self.best = min(self.best, checkpoint.heldout_loss)
        self._log(checkpoint.step)
        try:
            checkpoints.prune(self._run, self._keep)
        except Exception as error:
            log.warning("older checkpoints could not be removed: %s", error)

    def _log(self, step: int) -> None:
        """Log the points up to a step."""
        due = [point for point in self.points() if point["step"] <= step]
        try:
            self._log_points(due)
        except Exception as error:
            reason = _first_line(getattr(error, "cause", None) or error)
            self._say(f"MLflow does not take the metrics: {reason}; they are kept with the checkpoints")
            return
        with self._changed:
            del self._points[: len(due)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
