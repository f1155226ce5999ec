"""A sweep: trials of several variants of one configuration. The best has the fewest bits per byte on held-out text.

Each trial is a durable workflow, and its MLflow run is below the sweep's. Stages that trials share are executed once,
since a stage's key depends on its inputs only.
"""

import itertools
import tomllib
from collections.abc import Sequence
from typing import Any

from dbos import DBOS

from gru import config as configuration
from gru.config import PipelineConfig, content_key
from gru.errors import UserError
from jobs import results
from jobs.results import ScoreSummary, SweepResult, TrialFailure
from pipelines import records, workflow
from pipelines.context import WorkflowContext
from pipelines.ray_jobs import JobFailed
from pipelines.workflow import STEPS_VERSION

Changes = tuple[str, ...]
"""The overrides of a variant, each section.key=value."""


def grid(config: PipelineConfig, over: Sequence[str]) -> dict[Changes, PipelineConfig]:
    """Return a variant for each combination of values. over: section.key=[...]. Raises UserError for a mistake."""
    choices: list[list[str]] = []
    for option in over:
        key, _, text = option.partition("=")
        try:
            values = tomllib.loads(f"values = {text}")["values"]
        except tomllib.TOMLDecodeError:
            values = None
        if not isinstance(values, list) or not values:
            raise UserError(f"--over {option}: expected a key and its values, as in model.hidden=[256, 512]")
        choices.append([f"{key}={_as_toml(value)}" for value in values])
    return {changes: configuration.changed(config, changes, "--over ") for changes in itertools.product(*choices)}


def variants(
    config: PipelineConfig, over: Sequence[str], trials: Sequence[Sequence[str]]
) -> dict[Changes, PipelineConfig]:
    """Return the variants of the grid `over`, if there is one, and those listed in `trials`.

    Raises UserError for a mistake in them, or if there are none.
    """
    if not over and not trials:
        raise UserError("no variants to compare: expected --over KEY=[...] or --trial KEY=VALUE ..., or both")
    listed = {tuple(each): configuration.changed(config, each, "--trial ") for each in trials}
    return (grid(config, over) if over else {}) | listed


def label(changes: Changes) -> str:
    """The name of a variant: its overrides."""
    return " ".join(changes)


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_as_toml, value))}]"
    return repr(value)  # a Python string in single quotes is one in TOML too


def execute(
    config: PipelineConfig,
    trials: dict[Changes, PipelineConfig],
    at_once: int,
    context: WorkflowContext,
    database: str,
) -> SweepResult:
    """Run the trials to their end, at most `at_once` at a time, or join an unfinished sweep over the same trials.

    Raises JobFailed if every trial failed.
    """
    variants = {label(changes): trial.model_dump_json() for changes, trial in trials.items()}
    prefix = f"{config.name}-sweep-{content_key(STEPS_VERSION, config, variants)}"
    with workflow.launched(prefix, context, database) as join_or_start:
        DBOS.register_queue(prefix, concurrency=at_once, on_conflict="always_update")
        result: SweepResult = join_or_start(sweep, config.model_dump_json(), variants, prefix).get_result()
        return result


@DBOS.workflow(name=records.SWEEP)
def sweep(config_json: str, variants: dict[str, str], key: str) -> SweepResult:
    """Run a trial for each variant, given as label and config, on the queue `key`."""
    parent = workflow.open_run(config_json, key, f"sweep of {len(variants)}", None)
    try:
        configs = dict(zip(variants, workflow.pin_initial([*variants.values()]), strict=True))
    except Exception:
        workflow.close_run(parent, "FAILED", {})
        raise
    handles = {name: DBOS.enqueue_workflow(key, trial, name, each, parent) for name, each in configs.items()}
    scored: dict[str, ScoreSummary] = {}
    failed: dict[str, TrialFailure] = {}
    for name, handle in handles.items():
        try:
            scored[name] = handle.get_result()
        except Exception as failure:  # the other trials continue
            failed[name] = {"error": str(failure)}
    if not scored:
        workflow.close_run(parent, "FAILED", {})
        name, first = next(iter(failed.items()))
        raise JobFailed(f"every trial failed; {name}: {first['error']}")
    best = min(scored, key=lambda name: scored[name]["bits_per_byte"])
    workflow.close_run(parent, "FINISHED", scored[best])
    trials: dict[str, ScoreSummary | TrialFailure] = {name: scored.get(name) or failed[name] for name in variants}
    return {"best": best, "bits_per_byte": scored[best]["bits_per_byte"], "trials": trials, "tracking": parent}


@DBOS.workflow(name=records.TRIAL)
def trial(name: str, config_json: str, parent: str) -> ScoreSummary:
    """Prepare, train and evaluate one variant, in an MLflow run below `parent`."""
    run = workflow.open_run(config_json, content_key(parent, name), name, parent)
    _, done = workflow.run_stages(records.TRIAL_STAGES, config_json, run, name)
    return results.score_summary(done["evaluate"])
