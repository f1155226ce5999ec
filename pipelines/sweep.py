"""Several variants of one configuration, some at a time: the best is the one with the fewest held-out bits per byte.

Each trial is a durable workflow of its own, and its run in MLflow lies below the sweep's. What trials have in common is
made once, since stages are named by what goes into them.
"""

import itertools
import tomllib
from collections.abc import Sequence
from typing import Any

from dbos import DBOS

from gru import config as configuration
from gru.config import PipelineConfig, content_key
from gru.errors import UserError
from jobs.stages import Result
from pipelines import workflow
from pipelines.ray_jobs import JobFailed
from pipelines.workflow import STEPS_VERSION, WorkflowContext

STAGES = ("prepare", "train", "evaluate")


Changes = tuple[str, ...]
"""Overrides, as --set takes them."""


def grid(config: PipelineConfig, over: Sequence[str]) -> dict[Changes, PipelineConfig]:
    """The variants: one for each choice of a value of each key. over: section.key=[...]. Raises UserError."""
    choices: list[list[str]] = []
    for each in over:
        key, _, text = each.partition("=")
        try:
            values = tomllib.loads(f"values = {text}")["values"]
        except tomllib.TOMLDecodeError:
            values = None
        if not isinstance(values, list) or not values:
            raise UserError(f"--over {each}: expected a key and its values, as in model.hidden=[256, 512]")
        choices.append([f"{key}={_as_toml(value)}" for value in values])
    return {chosen: configuration.changed(config, chosen, "--over ") for chosen in itertools.product(*choices)}


def variants(
    config: PipelineConfig, over: Sequence[str], trials: Sequence[Sequence[str]]
) -> dict[Changes, PipelineConfig]:
    """Those of the grid, if there is one, and those listed: each some section.key=value. Raises UserError."""
    if not over and not trials:
        raise UserError("nothing to compare: expected --over KEY=[...] or --trial KEY=VALUE ..., or both")
    listed = {tuple(each): configuration.changed(config, each, "--trial ") for each in trials}
    return (grid(config, over) if over else {}) | listed


def label(changes: Changes) -> str:
    return " ".join(changes)


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_as_toml, value))}]"
    return repr(value)  # Python's strings in single quotes are TOML's


def execute(
    config: PipelineConfig,
    trials: dict[Changes, PipelineConfig],
    at_once: int,
    context: WorkflowContext,
    database: str,
) -> Result:
    """Run the trials to their end, or join those that are under way; what came of each by its label, and the best."""
    variants = {label(changes): trial.model_dump_json() for changes, trial in trials.items()}
    prefix = f"{config.name}-sweep-{content_key(STEPS_VERSION, config, variants)}"
    with workflow.launched(prefix, context, database) as join_or_start:
        DBOS.register_queue(prefix, concurrency=at_once, on_conflict="always_update")
        return join_or_start(sweep, config.model_dump_json(), variants, prefix).get_result()


@DBOS.workflow()
def sweep(config_json: str, variants: dict[str, str], key: str) -> Result:
    parent = workflow.open_parent(config_json, key, f"sweep of {len(variants)}", None)
    handles = {name: DBOS.enqueue_workflow(key, trial, name, each, parent) for name, each in variants.items()}
    trials: dict[str, Result] = {}
    for name, handle in handles.items():
        try:
            trials[name] = handle.get_result()
        except Exception as failure:  # its like may still do well
            trials[name] = {"error": str(failure)}
    scored = {name: result for name, result in trials.items() if "error" not in result}
    if not scored:
        workflow.close_parent(parent, "FAILED", {})
        name, result = next(iter(trials.items()))
        raise JobFailed(f"no trial came to its end; {name}: {result['error']}")
    best = min(scored, key=lambda name: scored[name]["bits_per_byte"])
    workflow.close_parent(parent, "FINISHED", scored[best])
    return {"best": best, "bits_per_byte": scored[best]["bits_per_byte"], "trials": trials, "tracking": parent}


@DBOS.workflow()
def trial(name: str, config_json: str, parent: str) -> dict[str, float]:
    run = workflow.open_parent(config_json, content_key(parent, name), name, parent)
    _, results = workflow.run_stages(STAGES, config_json, run, name)
    return workflow.measures(results)
