"""What the workflows of a storage have done, and what they are at."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbos import DBOSClient
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines import sweep, workflow
from pipelines.database import open_client
from pipelines.display import COLOURS, elapsed
from pipelines.ray_jobs import Attempt, RayJobs

STATES = {"SUCCESS": "done", "ERROR": "failed", "CANCELLED": "cancelled"}
NEWEST = 10
LOOKED_AT = 200  # those of several storages may share a database
STAGES = {workflow.run_pipeline.__qualname__: workflow.STAGES, sweep.trial.__qualname__: sweep.STAGES}


@dataclass(frozen=True)
class StageStatus:
    name: str
    state: str
    """done, running, failed or waiting"""
    seconds: float | None
    attempts: int | None
    """None where no Ray is asked, or it does not know."""
    log: str | None
    problem: str | None = None
    """Why it failed, in a line."""


@dataclass(frozen=True)
class WorkflowStatus:
    id: str
    label: str
    """What is changed in it, where it is one of a sweep."""
    state: str
    """done, running, failed, cancelled; unfinished: nothing works on it, and the same `gru run` goes on"""
    began: float
    """Seconds since the epoch."""
    seconds: float
    stages: list[StageStatus]


def workflows(store: str, database: str, jobs: RayJobs | None, logs: Path) -> list[WorkflowStatus]:
    """The newest ones of this storage, last. jobs: None where no Ray is up."""
    client = open_client(database)
    attempts = jobs.attempts() if jobs else []
    found = client.list_workflows(sort_desc=True, limit=LOOKED_AT, name=list(STAGES))
    mine = [each for each in found if each.input and _arguments(each)[1]["storage"] == store]
    return [_workflow(client, each, attempts, logs) for each in reversed(mine[:NEWEST])]


def _arguments(status: Any) -> tuple[str, dict[str, Any]]:
    """What is changed in a workflow, if it is one of a sweep, and its configuration."""
    first, second, *_ = status.input["args"]
    return (first, json.loads(second)) if status.name == sweep.trial.__qualname__ else ("", json.loads(first))


def _workflow(client: DBOSClient, status: Any, attempts: list[Attempt], logs: Path) -> WorkflowStatus:
    parent = workflow.parent_of(client, status.workflow_id)
    mine = [each for each in attempts if each.parent == parent]
    is_running = any(each.is_running for each in mine)
    state = STATES.get(status.status, "running" if is_running else "unfinished")
    began = status.created_at / 1000
    ended = (status.completed_at or status.updated_at) / 1000 if state != "running" else time.time()
    names = STAGES[status.name]
    stages = list(_stages(names, client.list_workflow_steps(status.workflow_id), mine, attempts, logs))
    stages += [StageStatus(name, "waiting", None, None, None) for name in names[len(stages) :]]
    label, _ = _arguments(status)
    return WorkflowStatus(status.workflow_id, label, state, began, ended - began, stages)


def _stages(
    names: Sequence[str], steps: list[Any], mine: list[Attempt], attempts: list[Attempt], logs: Path
) -> Iterator[StageStatus]:
    """Those that have ended, and the one that is running. mine: the attempts that were made for this workflow."""
    done = [step for step in steps if step["function_name"] == workflow.run_stage.__qualname__]
    for name, step in zip(names, done, strict=False):
        seconds = (step["completed_at_epoch_ms"] - step["started_at_epoch_ms"]) / 1000
        made = [each.key for each in mine if each.stage == name]
        key = (step["output"] or {}).get("key", made[-1] if made else None)
        log = workflow.log_file(logs, name, key) if key else None
        tries = max((each.number for each in attempts if (each.stage, each.key) == (name, key)), default=None)
        shown = str(log) if log and log.exists() else None
        problem = (str(step["error"]).splitlines() or [repr(step["error"])])[0] if step["error"] else None
        yield StageStatus(name, "failed" if step["error"] else "done", seconds, tries, shown, problem)
    for each in [each for each in mine if each.is_running][-1:]:
        seconds = time.time() - (each.details.start_time or 0) / 1000
        log = workflow.log_file(logs, each.stage, each.key)
        yield StageStatus(each.stage, "running", seconds, each.number, str(log))


def table(found: list[WorkflowStatus]) -> Group:
    """For people."""
    parts: list[Any] = []
    for each in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.began))
        head = Text(f"{each.id}  ")
        head.append(each.state, style=COLOURS[each.state])
        head.append(f"  began {began}, {elapsed(each.seconds)}  {each.label}")
        rows = Table(box=None, pad_edge=True, show_header=False)
        for stage in each.stages:
            rows.add_row(
                f"  {stage.name}",
                Text(stage.state, style=COLOURS[stage.state]),
                "" if stage.seconds is None else elapsed(stage.seconds),
                f"attempt {stage.attempts}" if (stage.attempts or 0) > 1 else "",
                Path(stage.log).name if stage.log else "",
            )
        problems = [Text(f"  {stage.problem}", style=COLOURS["failed"]) for stage in each.stages if stage.problem]
        parts += [head, rows, *problems]
    return Group(*parts)


def as_json(found: list[WorkflowStatus]) -> list[dict[str, Any]]:
    return [asdict(each) for each in found]
