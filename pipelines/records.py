"""The records that DBOS keeps of workflows and steps: their names, and their content as typed records.

Only this module knows in which order a workflow's arguments are stored, and how a step's output is to be read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbos import DBOSClient

from gru.errors import first_line
from jobs.stages import STAGES

RUN, SWEEP, TRIAL = "run_pipeline", "sweep", "trial"  # workflows
# steps
OPEN_RUN, PIN_INITIAL, FIND_DATASET = "open_run", "pin_initial", "find_dataset"
RUN_STAGE, CLOSE_RUN = "run_stage", "close_run"
TRIAL_STAGES = STAGES[:3]
UNFINISHED = ["PENDING", "ENQUEUED"]
_STAGES_OF = {RUN: STAGES, TRIAL: TRIAL_STAGES}
_STATES = {"SUCCESS": "done", "ERROR": "failed", "CANCELLED": "cancelled"}


@dataclass(frozen=True)
class WorkflowRecord:
    """A workflow over stages: a run, or a trial of a sweep."""

    id: str
    label: str
    """Overrides of a trial; "" for a run."""
    config_json: str
    stages: tuple[str, ...]
    """Names of its stages."""
    state: str | None
    """done, failed or cancelled; None if it has not ended."""
    created: float
    """Seconds since the epoch."""
    ended: float
    """Seconds since the epoch; of the last change if it has not ended."""


@dataclass(frozen=True)
class StageRecord:
    """A stage of a workflow that has ended."""

    name: str
    seconds: float
    result: Mapping[str, Any] | None
    """None if it failed."""
    problem: str | None
    """First line of the error if it failed."""


@dataclass(frozen=True)
class StepsRecord:
    """The steps of a workflow that have ended."""

    parent: str | None
    """The MLflow run over all stages; None if it is not open yet."""
    config_json: str | None
    """The config with its initial model looked up; None if that has not been done yet."""
    dataset: str | None
    """The directory of the dataset; None if it is not known yet."""
    stages: list[StageRecord]


def newest(prefix: str, statuses: Sequence[Any]) -> tuple[int, bool]:
    """Return the number of the newest workflow of a prefix, 0 if there is none, and whether it is unfinished."""
    known: dict[int, str] = {}
    for status in statuses:
        if match := re.fullmatch(re.escape(prefix) + r"-(\d+)", status.workflow_id):
            known[int(match[1])] = status.status
    number = max(known, default=0)
    return number, known.get(number) in UNFINISHED


def find_newest(client: DBOSClient, prefix: str) -> tuple[int, bool]:
    """As `newest`, of all workflows in the database."""
    return newest(prefix, client.list_workflows(workflow_id_prefix=f"{prefix}-", load_input=False, load_output=False))


def workflows(client: DBOSClient, limit: int) -> list[WorkflowRecord]:
    """The newest runs and trials, the newest first; at most `limit`."""
    statuses = client.list_workflows(sort_desc=True, limit=limit, name=list(_STAGES_OF))
    return [_workflow(status) for status in statuses if status.input]


def current(client: DBOSClient, store: str | None) -> list[WorkflowRecord]:
    """The runs and trials of a storage (None: of any) that can be resumed, or are of the newest run or sweep of their
    pipeline."""
    statuses = [
        status
        for status in client.list_workflows(name=[RUN, SWEEP, TRIAL], load_output=False)
        if status.input and store in (None, json.loads(_config_json(status))["storage"])
    ]
    started = [status for status in sorted(statuses, key=lambda each: each.created_at or 0) if status.name != TRIAL]
    newest = {json.loads(_config_json(status))["name"]: status.workflow_id for status in started}
    resumable = {status.workflow_id for status in statuses if status.status != "SUCCESS"}
    current = {*newest.values(), *resumable}
    return [
        _workflow(status)
        for status in statuses
        if status.name != SWEEP and not current.isdisjoint((status.workflow_id, status.parent_workflow_id))
    ]


def trial_labels(client: DBOSClient, sweep_id: str) -> dict[str, str]:
    """The label of each trial of a sweep by its workflow's id; empty if the workflow is not a sweep."""
    statuses = client.list_workflows(parent_workflow_id=sweep_id, load_output=False)
    return {status.workflow_id: _label(status) for status in statuses if status.input}


def unfinished(client: DBOSClient, name: str, config_json: str) -> list[str]:
    """The ids of the runs and sweeps of this configuration, called `name`, that have not ended."""
    statuses = client.list_workflows(status=UNFINISHED, workflow_id_prefix=f"{name}-", name=[RUN, SWEEP])
    return [status.workflow_id for status in statuses if status.input and _config_json(status) == config_json]


def unfinished_trials(client: DBOSClient, sweep_id: str) -> list[str]:
    """The ids of the trials of a sweep that have not ended."""
    return [each.workflow_id for each in client.list_workflows(parent_workflow_id=sweep_id, status=UNFINISHED)]


def steps(client: DBOSClient, workflow_id: str) -> StepsRecord:
    """The steps of a run or trial that have ended."""
    steps = client.list_workflow_steps(workflow_id)
    parent, configs, dataset = (
        next((step["output"] for step in steps if step["function_name"] == name), None)
        for name in (OPEN_RUN, PIN_INITIAL, FIND_DATASET)
    )
    ended = [step for step in steps if step["function_name"] == RUN_STAGE]
    records = [_stage(name, step) for name, step in zip(STAGES, ended, strict=False)]
    return StepsRecord(parent, configs and configs[0], dataset, records)


def _workflow(status: Any) -> WorkflowRecord:
    return WorkflowRecord(
        status.workflow_id,
        _label(status),
        _config_json(status),
        _STAGES_OF[status.name],
        _STATES.get(status.status),
        status.created_at / 1000,
        (status.completed_at or status.updated_at) / 1000,
    )


def _label(status: Any) -> str:
    return status.input["args"][0] if status.name == TRIAL else ""


def _config_json(status: Any) -> str:
    return status.input["args"][1 if status.name == TRIAL else 0]


def _stage(name: str, step: Any) -> StageRecord:
    seconds = (step["completed_at_epoch_ms"] - step["started_at_epoch_ms"]) / 1000
    error = step["error"]
    problem = first_line(error, limit=None) if error else None
    return StageRecord(name, seconds, step["output"], problem)
