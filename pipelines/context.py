"""What the steps of a workflow need from the process that executes it: Ray jobs, logs, and a display."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.ray_jobs import RayJobs

State = Literal["waiting", "running", "done", "cached", "failed"]
"""cached: the stage was done before this workflow reached it."""
Watch = Callable[[str, State, str], None]
"""Called with a stage, its state and a line of detail whenever one of them changes."""


@dataclass(frozen=True)
class WorkflowContext:
    """The resources of this process; not part of the durable workflow."""

    jobs: RayJobs
    logs: Path
    watch: Watch

    def show(self, label: str, stage: str, state: State, detail: str) -> None:
        """Report the state of a stage; `label` is that of its trial, "" outside a sweep."""
        self.watch(f"{label} {stage}".strip(), state, detail)


def log_file(logs: Path, stage: str, key: str) -> Path:
    """The local copy of the log of a stage's job."""
    return logs / f"{stage}-{key}.log"
