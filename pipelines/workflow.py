"""The workflow: prepare, train, evaluate, promote, serve, each a Ray job, as one durable DBOS workflow.

Killed at any moment, the same call goes on: DBOS recovers the workflow, its steps attach to their jobs by id, and
a stage whose result is in storage is not done again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dbos import DBOS, DBOSClient, DBOSConfig, SetWorkflowID
from dbos import error as dbos_error
from sqlalchemy.exc import SQLAlchemyError

from gru.config import PipelineConfig, Resources, content_key
from gru.registry import tracking
from jobs import stages
from jobs.stages import Result
from pipelines.database import answering, open_client
from pipelines.lock import workflow_lock
from pipelines.ray_jobs import JobFailed, RayJobs

STAGES = ("prepare", "train", "evaluate", "promote", "serve")
SCORING = ("evaluate", "promote")  # whose jobs themselves compute
STEPS_VERSION = 2  # raise it when the steps change: a workflow must not be continued by others than those it began with
UNFINISHED = ["PENDING", "ENQUEUED"]

State = Literal["waiting", "running", "done", "done before", "failed"]
Watch = Callable[[str, State, str], None]
"""Called with stage, state and a line of detail whenever one changes."""


@dataclass(frozen=True)
class WorkflowContext:
    """What the steps of this process work with; not part of the durable workflow."""

    jobs: RayJobs
    logs: Path
    watch: Watch


_context: WorkflowContext | None = None


def execute(config: PipelineConfig, context: WorkflowContext, database: str) -> Result:
    """Run the workflow of this config to its end, or join the one that is under way; the summary of its stages."""
    prefix = f"{config.name}-{content_key(STEPS_VERSION, config, stages.prepare_stage(config).key)}"
    config_json = config.model_dump_json()
    with launched(prefix, context, database) as join_or_start:
        result = join_or_start(run_pipeline, config_json, prefix).get_result()
        if (
            stages.serve_stage(config).result() is None
        ):  # it was up when the workflow went on after a kill, and is no more
            run_stage("serve", config_json, result["tracking"], result["dataset"], {})
        return result


@contextmanager
def launched(prefix: str, context: WorkflowContext, database: str) -> Iterator[Callable[..., Any]]:
    """DBOS, with what was begun under this prefix going on, and nothing else. While another process works on that, what
    it does is shown.

    What is yielded takes a workflow and its arguments, and gives the handle of the one that was under way, or else of
    a new one."""
    global _context
    _context = context
    settings: DBOSConfig = {
        "name": "gru",
        "system_database_url": database,
        # A process recovers the workflows of its own executor, and runs those of its own version: with both its own,
        # launching continues this prefix's workflow and no other's.
        "application_version": prefix,
        "executor_id": prefix,
        "console_log_level": "CRITICAL",
    }
    with answering():
        DBOS.migrate(database)
    other = _Follower(prefix, context, database)
    with workflow_lock(database, prefix, other.look):
        joined = other.leave()
        DBOS(config=settings)
        try:
            with answering():
                DBOS.launch()
            yield partial(_join_or_start, joined, prefix)
        except (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError):
            raise JobFailed("cancelled; the same command goes on with what is there") from None
        finally:
            DBOS.destroy()


def _join_or_start(joined: str | None, prefix: str, workflow: Callable[..., Result], *arguments: Any) -> Any:
    if joined:
        return DBOS.retrieve_workflow(joined)
    found = DBOS.list_workflows(workflow_id_prefix=f"{prefix}-", load_input=False, load_output=False)
    number, is_unfinished = _newest(prefix, found)
    if is_unfinished:
        return DBOS.retrieve_workflow(f"{prefix}-{number}")
    with SetWorkflowID(f"{prefix}-{number + 1}"):
        return DBOS.start_workflow(workflow, *arguments)


def _newest(prefix: str, found: Sequence[Any]) -> tuple[int, bool]:
    """The number of the newest workflow, 0 if there is none, and whether it has not ended."""
    known = {}
    for status in found:
        if number := re.fullmatch(re.escape(prefix) + r"-(\d+)", status.workflow_id):
            known[int(number[1])] = status.status
    newest = max(known, default=0)
    return newest, known.get(newest) in UNFINISHED


class _Follower:
    """Shows what another process does of the newest workflow of a prefix."""

    def __init__(self, prefix: str, context: WorkflowContext, database: str) -> None:
        self.prefix, self.context, self.database = prefix, context, database
        self.joined: str | None = None
        self._client: DBOSClient | None = None
        self._ended: set[tuple[str, str]] = set()

    def leave(self) -> str | None:
        """The id of the workflow that another process was seen to work on, if any; how it ended is shown."""
        if self.joined:
            self.look()
        if self._client:
            self._client.destroy()
        return self.joined

    def look(self) -> None:
        with suppress(OSError, RuntimeError, SQLAlchemyError, dbos_error.DBOSException):  # what is away will be back
            self._client = self._client or DBOSClient(system_database_url=self.database, retry_connection_errors=False)
            prefix = f"{self.prefix}-"
            found = self._client.list_workflows(workflow_id_prefix=prefix, load_input=False, load_output=False)
            number, is_unfinished = _newest(self.prefix, found)
            if is_unfinished:
                self.joined = f"{prefix}{number}"
            if self.joined:
                self._show(self._client, self.joined)

    def _show(self, client: DBOSClient, joined: str) -> None:
        running = {(each.parent, each.stage) for each in self.context.jobs.attempts() if each.is_running}
        trials = client.list_workflows(parent_workflow_id=joined, load_output=False)  # where it is a sweep
        labels = {each.workflow_id: each.input["args"][0] for each in trials if each.input}
        for workflow_id, label in (labels or {joined: ""}).items():
            watch = partial(_watch, self.context.watch, label)
            steps = client.list_workflow_steps(workflow_id)
            done = [step for step in steps if step["function_name"] == run_stage.__qualname__]
            for name, step in zip(STAGES, done, strict=False):
                if (label, name) not in self._ended:
                    self._ended.add((label, name))
                    output = step["output"]
                    watch(name, "failed" if step["error"] else "done", summary(name, output) if output else "")
            parent = _parent_among(steps)
            for name in STAGES:
                if (parent, name) in running and (label, name) not in self._ended:
                    watch(name, "running", "by another process")


def cancel(config: PipelineConfig, jobs: RayJobs | None, database: str) -> list[str]:
    """End the workflows of this config that have not ended, with their jobs and their MLflow runs; their ids.

    jobs: None where no Ray is up."""
    client = open_client(database)
    found = client.list_workflows(status=UNFINISHED, workflow_id_prefix=f"{config.name}-")
    mine = [each.workflow_id for each in found if each.input and each.input["args"][0] == config.model_dump_json()]
    for workflow_id in mine:
        below = client.list_workflows(parent_workflow_id=workflow_id, status=UNFINISHED)
        client.cancel_workflow(workflow_id, cancel_children=True)
        ended = [workflow_id, *(each.workflow_id for each in below)]
        parents = [parent for each in ended if (parent := parent_of(client, each))]
        for parent in parents:  # first: with the last job an embedded MLflow may end
            tracking.find_run(parent).finish("KILLED")
        for parent in parents:
            if jobs:
                jobs.stop(parent)
    return mine


def parent_of(client: DBOSClient, workflow_id: str) -> str | None:
    """The MLflow run of a workflow, if it has come so far."""
    return _parent_among(client.list_workflow_steps(workflow_id))


def _parent_among(steps: Sequence[Any]) -> str | None:
    return next((step["output"] for step in steps if step["function_name"] == open_parent.__qualname__), None)


@DBOS.workflow()
def run_pipeline(config_json: str, key: str) -> Result:
    parent = open_parent(config_json, key, None, None)
    dataset, results = run_stages(STAGES, config_json, parent, "")
    measured = measures(results)
    return {
        "model": results["promote"]["model"],
        "version": results["promote"]["version"],
        "promoted": results["promote"]["promoted"],
        "serving": results["serve"]["version"],
        **measured,
        "endpoint": results["serve"]["endpoint"],
        "tracking": parent,
        "dataset": dataset,
        "sample": results["evaluate"]["samples"][0],
    }


def run_stages(names: Sequence[str], config_json: str, parent: str, label: str) -> tuple[str, dict[str, Result]]:
    """The dataset, and the results of these stages one after the other; then the MLflow run over them is closed."""
    results: dict[str, Result] = {}
    dataset = find_dataset(config_json)
    try:
        for name in names:
            results[name] = run_stage(name, config_json, parent, dataset, results, label)
    except Exception:
        close_parent(parent, "FAILED", {})
        raise
    close_parent(parent, "FINISHED", measures(results))
    return dataset, results


def measures(results: dict[str, Result]) -> dict[str, float]:
    names = ("bits_per_byte", "nats_per_character", "perplexity_per_token", "ngram_bits_per_byte")
    return {name: results["evaluate"][name] for name in names}


@DBOS.step()
def open_parent(config_json: str, key: str, name: str | None, above: str | None) -> str:
    """The MLflow run over all stages, called like the config where it has no name, below another one if there is one;
    its id."""
    config = PipelineConfig.model_validate_json(config_json)
    run = tracking.open_run(config.experiment, key, name or config.name, above)
    run.log_params(config.model_dump())
    return run.id


@DBOS.step()
def find_dataset(config_json: str) -> str:
    """Where the dataset of the sources as they are now is, or will be: they may change while the stages run."""
    return stages.prepare_stage(PipelineConfig.model_validate_json(config_json)).directory


@DBOS.step()
def close_parent(run_id: str, status: str, measured: dict[str, float]) -> None:
    run = tracking.find_run(run_id)
    run.log_metrics(measured)
    run.finish(status)


@DBOS.step()
def run_stage(
    name: str, config_json: str, parent: str, dataset: str, results: dict[str, Result], label: str = ""
) -> Result:
    """The result of a stage: the one that is there, or that of its Ray job. It is watched under label and name."""
    assert _context is not None
    watch = partial(_watch, _context.watch, label)
    config = PipelineConfig.model_validate_json(config_json)
    stage = stages.of(name, config, dataset, results)
    result = stage.result()
    if result is not None:
        watch(name, "done before", summary(name, result))
        return result
    watch(name, "running", "")
    try:
        _context.jobs.run(
            name,
            stage.key,
            [config_json, "--parent", parent, "--dataset", dataset],
            parent,
            log_file(_context.logs, name, stage.key),
            lambda line: watch(name, "running", line),
            config.resources.evaluate if name in SCORING else Resources(cpus=0),
        )
    except Exception:
        watch(name, "failed", "")
        raise
    result = stage.result()
    assert result is not None, f"{name} succeeded, but left no result"
    watch(name, "done", summary(name, result))
    return result


def _watch(watch: Watch, label: str, name: str, state: State, detail: str) -> None:
    watch(f"{label} {name}".strip(), state, detail)


def log_file(logs: Path, stage: str, key: str) -> Path:
    return logs / f"{stage}-{key}.log"


def summary(name: str, result: Result) -> str:
    """A stage's result in a few words."""
    match name:
        case "prepare":
            return f"{result['documents']:,} documents, {result['bytes'] / 1e6:,.1f} MB, {result['tokens']:,} tokens"
        case "train":
            return f"{result['steps']:,} steps, held-out {result['heldout_loss']:.3f} nats per token"
        case "evaluate":
            return f"{result['bits_per_byte']:.3f} bits per byte"
        case "promote":
            alias = "champion" if result["promoted"] else "challenger"
            return f"{result['model']} version {result['version']} is @{alias}: {result['reason']}"
        case _:
            return f"version {result['version']} at {result['endpoint']}"
