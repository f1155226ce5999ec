"""What the driver of a training run and its workers tell each other: lines for people, and that it is to stop.

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
        self._news: list[str] = []
        self._line: str | None = None
        self._outcome: dict[str, Any] = {}
        self._stop = asyncio.Event()
        self._place: PlacementGroup | None = None

    async def report(self, line: str) -> None:
        """How far it is; only the newest matters."""
        self._line = line

    async def say(self, line: str) -> None:
        """Something that happened; nothing of it is lost."""
        self._news.append(line)

    async def drain(self) -> list[str]:
        lines = [*self._news, *([self._line] if self._line else [])]
        self._news, self._line = [], None
        return lines

    async def end(self, outcome: dict[str, Any]) -> None:
        """Why the workers leave before the last step: diverged, unsaved, stopped or preempted; the first counts."""
        self._outcome = self._outcome or outcome

    async def take_outcome(self) -> dict[str, Any]:
        outcome, self._outcome = self._outcome, {}
        return outcome

    async def set_placement_group(self, group: PlacementGroup | None) -> None:
        """What the present group of workers has reserved."""
        self._place = group

    async def placement_group(self) -> PlacementGroup | None:
        return self._place

    async def stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        await self._stop.wait()


@contextmanager
def open_channel(show: Callable[[str], None]) -> Iterator[Any]:
    """The actor, whose lines are shown while the block runs."""
    # With the driver: it must outlive the nodes that the workers are on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(DriverChannel)
    actor = remote.options(num_cpus=0, scheduling_strategy=here).remote()
    ended = threading.Event()

    def follow() -> None:
        over = False
        while not over:
            over = ended.wait(1.0)
            for line in ray.get(actor.drain.remote()):
                show(line)

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(actor)
