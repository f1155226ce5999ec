"""The channel between the driver of a training run and its workers: progress, outcome, and the request to stop.

Worker output goes to log files, and Ray Train passes on nothing but reports; so both sides talk through an actor.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class DriverChannel:
    """The actor. Its methods run in one event loop."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._progress: str | None = None
        self._outcome: dict[str, Any] = {}
        self._stop = asyncio.Event()
        self._placement_group: PlacementGroup | None = None

    async def set_progress(self, line: str) -> None:
        """Replace the progress line; only the newest is shown."""
        self._progress = line

    async def show(self, line: str) -> None:
        """Add a message; each one is shown."""
        self._messages.append(line)

    async def take_lines(self) -> list[str]:
        """Return the lines that have not been shown yet."""
        lines = [*self._messages, *([self._progress] if self._progress else [])]
        self._messages, self._progress = [], None
        return lines

    async def set_outcome(self, outcome: dict[str, Any]) -> None:
        """Record why the workers stop early: diverged, unsaved, stopped or preempted. The first outcome counts."""
        self._outcome = self._outcome or outcome

    async def take_outcome(self) -> dict[str, Any]:
        """Return the outcome and forget it; empty if the workers trained to the last step."""
        outcome, self._outcome = self._outcome, {}
        return outcome

    async def set_placement_group(self, group: PlacementGroup | None) -> None:
        """Record the resources that the current group of workers has reserved."""
        self._placement_group = group

    async def placement_group(self) -> PlacementGroup | None:
        """Return the placement group of the current group of workers."""
        return self._placement_group

    async def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and stop."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return when a stop is requested."""
        await self._stop.wait()


@contextmanager
def open_channel(show: Callable[[str], None]) -> Iterator[Any]:
    """Start the actor, and show its lines while the block runs."""
    # On the driver's node, because it must outlive the nodes of the workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(DriverChannel)
    actor = remote.options(num_cpus=0, scheduling_strategy=here).remote()
    closing = threading.Event()

    def follow() -> None:
        last = False
        while not last:
            last = closing.wait(1.0)
            for line in ray.get(actor.take_lines.remote()):
                show(line)

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        closing.set()
        thread.join(timeout=10)
        ray.kill(actor)
