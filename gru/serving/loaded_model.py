"""A registered model in memory, with the engine that generates from it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gru.generation.engine import Engine

if TYPE_CHECKING:
    from gru.registry.bundle import Bundle
    from gru.registry.versions import Version

STALL_SECONDS = 30  # an engine whose loop has not iterated for so long counts as stalled


@dataclass(frozen=True)
class LoadedModel:
    """A model that serves requests."""

    engine: Engine
    bundle: "Bundle"
    version: "Version"
    alias: str = "champion"
    """Alias that the version had in the registry when it was loaded."""
    since: float = field(default_factory=time.time)
    """Time since which it serves, in seconds since the epoch."""

    @property
    def healthy(self) -> bool:
        """Whether the engine's loop is running."""
        return time.monotonic() - self.engine.heartbeat < STALL_SECONDS


ModelProvider = Callable[[], Sequence[LoadedModel]]
"""Returns the models that serve now, the default model first."""
