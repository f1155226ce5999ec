"""Failures of workers, for people: what happened to which worker, in one line."""

from typing import Any

import ray.exceptions
from ray.actor import ActorHandle
from ray.train import UserCallback

from gru import ray_internals
from gru.errors import first_line


class FailureReporter(UserCallback):
    """A callback in Ray Train's controller that shows each failure of workers; Ray Train itself only logs it."""

    def __init__(self, channel: ActorHandle, max_failures: int) -> None:
        self._channel, self._max_failures, self._failures = channel, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = map(ray_internals.worker_failure, worker_exceptions.values())
        if any(getattr(cause, "preempted", False) for cause in causes):
            return  # Ray Train does not count a preemption either
        self._failures += 1
        action = "restarting from the last checkpoint" if self._failures <= self._max_failures else "giving up"
        description = describe_failures(worker_exceptions)
        self._channel.show.remote(f"failure {self._failures} of at most {self._max_failures}: {description}; {action}")


def describe_failures(failures: dict[int, Exception]) -> str:
    """Return a line on the failures that explain the others: a worker that died, before one that lost its connection.

    failures: by rank.
    """
    reasons = {rank: _describe_failure(error) for rank, error in sorted(failures.items())}
    dead = {rank: reason for rank, (is_dead, reason) in reasons.items() if is_dead}
    shown = dead or {rank: reason for rank, (_, reason) in reasons.items()}
    return ", ".join(f"worker {rank} {reason}" for rank, reason in shown.items())


def _describe_failure(error: Exception) -> tuple[bool, str]:
    """Return whether the process is dead, and what happened to it."""
    cause = ray_internals.worker_failure(error)
    if isinstance(cause, ray.exceptions.RayActorError):
        return True, "died"
    if ray_internals.is_unresponsive(error):
        return True, "does not respond"
    return False, f"failed: {type(cause).__name__}: {first_line(cause)}"
