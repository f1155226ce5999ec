"""The workflow: prepare, train, evaluate, promote, serve, each a Ray job, as one durable DBOS workflow.

After a kill at any moment, the same call resumes: DBOS recovers the workflow, its steps attach to their jobs by id, and
a stage whose result is on storage is not executed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from dbos import DBOS, DBOSConfig, SetWorkflowID
from dbos import error as dbos_error

from gru.config import PipelineConfig, content_key
from gru.config_stages import NO_MODEL, Resources
from gru.registry import tracking
from jobs import results, stages, warm_start
from jobs.model_card import model_card
from jobs.results import RunResult, ScoreSummary, StageResults
from jobs.stages import STAGES
from pipelines import records
from pipelines.context import WorkflowContext, log_file
from pipelines.database import answering, open_client
from pipelines.follower import Follower
from pipelines.lock import workflow_lock
from pipelines.ray_jobs import JobFailed, RayJobs

SCORING = ("evaluate", "promote")  # stages whose driver itself computes
STEPS_VERSION = 4  # raise it when the steps change: a workflow must not resume with other steps than it began with

_context: WorkflowContext | None = None


def execute(config: PipelineConfig, context: WorkflowContext, database: str) -> RunResult:
    """Run the workflow of this config to its end, or join the unfinished one. Return the summary of its stages."""
    prefix = f"{config.name}-{content_key(STEPS_VERSION, config, stages.prepare_stage(config).key)}"
    config_json = config.model_dump_json()
    with launched(prefix, context, database) as join_or_start:
        result: RunResult = join_or_start(run_pipeline, config_json, prefix).get_result()
        # The endpoint may have ended since the workflow recorded it, such as with an embedded Ray that was killed.
        if stages.serve_stage(config).result() is None:
            run_stage("serve", config_json, result["tracking"], result["dataset"], {})
        return result


@contextmanager
def launched(prefix: str, context: WorkflowContext, database: str) -> Iterator[Callable[..., Any]]:
    """Launch DBOS for the workflows of this prefix, which recovers the unfinished one and no other.

    While another process executes it, its progress is shown. Yields a function that takes a workflow and its arguments,
    and returns the handle of the unfinished workflow, or else of a new one.
    """
    global _context
    _context = context
    settings: DBOSConfig = {
        "name": "gru",
        "system_database_url": database,
        # A process recovers the workflows of its own executor, and runs those of its own version. Both are the prefix,
        # so launching resumes this prefix's workflow and no other's.
        "application_version": prefix,
        "executor_id": prefix,
        "console_log_level": "CRITICAL",
    }
    with answering():
        DBOS.migrate(database)
    follower = Follower(prefix, context, database)
    with workflow_lock(database, prefix, follower.update):
        followed = follower.close()
        DBOS(config=settings)
        try:
            with answering():
                DBOS.launch()
            yield partial(_join_or_start, followed, prefix)
        except (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError):
            raise JobFailed("cancelled; the same command resumes with the results that exist") from None
        finally:
            DBOS.destroy()


def _join_or_start(followed: str | None, prefix: str, workflow: Callable[..., Any], *arguments: Any) -> Any:
    """Return the handle of the workflow that was followed, of the newest one if it is unfinished, or of a new one."""
    if followed:
        return DBOS.retrieve_workflow(followed)
    statuses = DBOS.list_workflows(workflow_id_prefix=f"{prefix}-", load_input=False, load_output=False)
    number, is_unfinished = records.newest(prefix, statuses)
    if is_unfinished:
        return DBOS.retrieve_workflow(f"{prefix}-{number}")
    with SetWorkflowID(f"{prefix}-{number + 1}"):
        return DBOS.start_workflow(workflow, *arguments)


def cancel(config: PipelineConfig, jobs: RayJobs | None, database: str) -> list[str]:
    """Cancel the unfinished workflows of this config, with their jobs and MLflow runs. Return their ids.

    jobs: None if no Ray is running.
    """
    client = open_client(database)
    cancelled = records.unfinished(client, config.name, config.model_dump_json())
    for workflow_id in cancelled:
        ended = [workflow_id, *records.unfinished_trials(client, workflow_id)]
        client.cancel_workflow(workflow_id, cancel_children=True)
        parents = [parent for each in ended if (parent := records.steps(client, each).parent)]
        for parent in parents:  # before the jobs: an embedded MLflow may end with the last of them
            tracking.find_run(parent).finish("KILLED")
        for parent in parents:
            if jobs:
                jobs.stop(parent)
    return cancelled


@DBOS.workflow(name=records.RUN)
def run_pipeline(config_json: str, key: str) -> RunResult:
    """Execute all stages of a config. `key` finds the MLflow run over them."""
    parent = open_run(config_json, key, None, None)
    dataset, done = run_stages(STAGES, config_json, parent, "")
    return {
        "model": done["promote"]["model"],
        "version": done["promote"]["version"],
        "promoted": done["promote"]["promoted"],
        "serving": done["serve"]["version"],
        **results.score_summary(done["evaluate"]),
        "endpoint": done["serve"]["endpoint"],
        "tracking": parent,
        "dataset": dataset,
        "sample": done["evaluate"]["samples"][0],
    }


def run_stages(names: Sequence[str], config_json: str, parent: str, label: str) -> tuple[str, StageResults]:
    """Execute these stages in their order, then close the MLflow run over them, `parent`.

    Returns the directory of the dataset and the results. `label` is that of a sweep's trial, else "".
    """
    done: dict[str, Any] = {}
    try:
        [config_json] = pin_initial([config_json])
        dataset = find_dataset(config_json)
        for name in names:
            done[name] = run_stage(name, config_json, parent, dataset, cast(StageResults, done), label)
    except Exception:
        close_run(parent, "FAILED", {})
        raise
    close_run(parent, "FINISHED", results.score_summary(done["evaluate"]))
    return dataset, cast(StageResults, done)


@DBOS.step(name=records.OPEN_RUN)
def open_run(config_json: str, key: str, name: str | None, parent: str | None) -> str:
    """Open the MLflow run over all stages, below the run `parent` if that is given. Return its id.

    name: None for the name of the config.
    """
    config = PipelineConfig.model_validate_json(config_json)
    if config.train.init_from:  # its alias may name another model than in an earlier run of this config
        key = content_key(key, warm_start.pinned(config).train.init_digest or NO_MODEL)
    run = tracking.open_run(config.experiment, key, name or config.name, parent)
    run.log_params(config.model_dump())
    return run.id


@DBOS.step(name=records.PIN_INITIAL)
def pin_initial(configs: list[str]) -> list[str]:
    """Return the configs with their initial models looked up: an alias may move while the stages run."""
    return [warm_start.pinned(PipelineConfig.model_validate_json(each)).model_dump_json() for each in configs]


@DBOS.step(name=records.FIND_DATASET)
def find_dataset(config_json: str) -> str:
    """Return the directory of the dataset of the sources' current content, which may change while the stages run."""
    return stages.prepare_stage(PipelineConfig.model_validate_json(config_json)).directory


@DBOS.step(name=records.CLOSE_RUN)
def close_run(run_id: str, status: str, measured: ScoreSummary | dict[str, float]) -> None:
    """Log these metrics to an MLflow run, and end it with this status."""
    run = tracking.find_run(run_id)
    run.log_metrics(cast(dict[str, float], measured))
    run.finish(status)


@DBOS.step(name=records.RUN_STAGE)
def run_stage(
    name: str, config_json: str, parent: str, dataset: str, done: StageResults, label: str = ""
) -> dict[str, Any]:
    """Return the result of a stage: the one on storage, or else that of its Ray job.

    done: results of the stages before it. Progress is shown under `label` and the stage's name, and the MLflow run
    `parent` gets what the result adds to it.
    """
    assert _context is not None
    show = partial(_context.show, label, name)
    config = PipelineConfig.model_validate_json(config_json)
    stage = stages.of(name, config, dataset, done)
    result: dict[str, Any] | None = stage.result()
    if result is not None:
        _log_result(parent, config, name, cast(StageResults, {**done, name: result}))
        note = warm_start.describe_cached(config, stage.key) if name == "train" else ""
        show("cached", "; ".join(filter(None, [results.describe(name, result), note])))
        return result
    if name == "prepare":
        tracking.find_run(parent).describe(model_card(config, done))
    show("running", "")
    try:
        _context.jobs.run(
            name,
            stage.key,
            [config_json, "--parent", parent, "--dataset", dataset],
            parent,
            log_file(_context.logs, name, stage.key),
            partial(show, "running"),
            config.resources.evaluate if name in SCORING else Resources(cpus=0),
        )
    except Exception:
        show("failed", "")
        raise
    result = stage.result()
    assert result is not None, f"{name} succeeded, but left no result"
    _log_result(parent, config, name, cast(StageResults, {**done, name: result}))
    show("done", results.describe(name, result))
    return result


def _log_result(parent: str, config: PipelineConfig, name: str, done: StageResults) -> None:
    """Log the key metrics and the model card, as far as the stages are done, to the MLflow run over all stages.

    name: the stage that is done now. If it was done before this workflow, the run has nothing of it yet.
    """
    if name == "serve":  # it adds nothing, and may be repeated alone
        return
    run = tracking.find_run(parent)
    if name == "train":
        run.log_key_points_of(done["train"]["run"])
    if name == "evaluate":
        run.log_metrics(cast(dict[str, float], results.score_summary(done["evaluate"])))
    run.describe(model_card(config, done))
