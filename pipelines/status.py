"""The state of a storage's workflows: which stages are done, and the current one."""

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

from gru.terminal import duration
from pipelines import records
from pipelines.context import log_file
from pipelines.database import open_client
from pipelines.display import COLOURS
from pipelines.ray_jobs import Attempt, RayJobs
from pipelines.records import StageRecord, WorkflowRecord

SHOWN = 10  # workflows
READ = 200  # workflows: a database may hold those of several storages


@dataclass(frozen=True)
class StageStatus:
    name: str
    state: str
    """done, running, failed or waiting"""
    seconds: float | None
    attempts: int | None
    """Number of jobs so far; None if Ray is not running or has forgotten them."""
    log: str | None
    problem: str | None = None
    """First line of the error if the stage failed."""


@dataclass(frozen=True)
class WorkflowStatus:
    id: str
    label: str
    """Overrides of a sweep's trial; "" for a run."""
    state: str
    """done, running, failed, cancelled; or unfinished: no process executes it, and the same `gru run` resumes it"""
    began: float
    """Seconds since the epoch."""
    seconds: float
    stages: list[StageStatus]


def workflows(store: str, database: str, jobs: RayJobs | None, logs: Path) -> list[WorkflowStatus]:
    """The newest workflows of this storage, the newest last. jobs: None if no Ray is running."""
    client = open_client(database)
    attempts = jobs.attempts() if jobs else []
    newest = records.workflows(client, READ)
    mine = [record for record in newest if json.loads(record.config_json)["storage"] == store]
    return [_workflow(client, record, attempts, logs) for record in reversed(mine[:SHOWN])]


def _workflow(client: DBOSClient, record: WorkflowRecord, attempts: list[Attempt], logs: Path) -> WorkflowStatus:
    steps = records.steps(client, record.id)
    mine = [each for each in attempts if each.parent == steps.parent]
    is_running = any(each.is_running for each in mine)
    state = record.state or ("running" if is_running else "unfinished")
    ended = time.time() if state == "running" else record.ended
    stages = list(_stages(steps.stages, mine, attempts, logs))
    stages += [StageStatus(name, "waiting", None, None, None) for name in record.stages[len(stages) :]]
    return WorkflowStatus(record.id, record.label, state, record.created, ended - record.created, stages)


def _stages(
    ended: Sequence[StageRecord], mine: list[Attempt], attempts: list[Attempt], logs: Path
) -> Iterator[StageStatus]:
    """Yield the stages that have ended, then the one that is running.

    mine: the attempts that this workflow submitted; `attempts` also has those of other workflows with the same stage.
    """
    for stage in ended:
        keys = [each.key for each in mine if each.stage == stage.name]
        key = (stage.result or {}).get("key", keys[-1] if keys else None)
        log = log_file(logs, stage.name, key) if key else None
        count = max((each.number for each in attempts if (each.stage, each.key) == (stage.name, key)), default=None)
        state = "failed" if stage.problem else "done"
        yield StageStatus(
            stage.name, state, stage.seconds, count, str(log) if log and log.exists() else None, stage.problem
        )
    for each in [each for each in mine if each.is_running][-1:]:
        seconds = time.time() - (each.details.start_time or 0) / 1000
        yield StageStatus(each.stage, "running", seconds, each.number, str(log_file(logs, each.stage, each.key)))


def table(workflows: list[WorkflowStatus]) -> Group:
    """Return a table for people."""
    parts: list[Any] = []
    for workflow in workflows:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(workflow.began))
        head = Text(f"{workflow.id}  ")
        head.append(workflow.state, style=COLOURS[workflow.state])
        head.append(f"  began {began}, {duration(workflow.seconds)}  {workflow.label}")
        rows = Table(box=None, pad_edge=True, show_header=False)
        for stage in workflow.stages:
            rows.add_row(
                f"  {stage.name}",
                Text(stage.state, style=COLOURS[stage.state]),
                "" if stage.seconds is None else duration(stage.seconds),
                f"attempt {stage.attempts}" if (stage.attempts or 0) > 1 else "",
                Path(stage.log).name if stage.log else "",
            )
        problems = [Text(f"  {stage.problem}", style=COLOURS["failed"]) for stage in workflow.stages if stage.problem]
        parts += [head, rows, *problems]
    return Group(*parts)


def as_json(workflows: list[WorkflowStatus]) -> list[dict[str, Any]]:
    """Return JSON objects for programs."""
    return [asdict(each) for each in workflows]
