"""The commands that execute workflows: run, schedule and sweep."""

import argparse
import json
import math
import sys
import time
from datetime import datetime
from pathlib import Path

from gru.config import PipelineConfig
from gru.errors import UserError, find_user_error
from jobs import entry
from jobs.results import RunResult
from jobs.stages import STAGES
from pipelines import summary
from pipelines.runtime import Runtime, opened

CHECK_SECONDS = 2.0  # between two looks at the embedded services, while a command waits


def run(arguments: argparse.Namespace) -> None:
    config = entry.load_config(_config_file(arguments), arguments.set)
    with opened(arguments, config, serves=True) as runtime:
        result = _execute(config, runtime)
        runtime.console.print(summary.of_run(config, result), highlight=False, soft_wrap=True, markup=False)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        if not arguments.exit:
            runtime.console.print("\nServing. Ctrl-C stops everything.", highlight=False)
            _stay_up(runtime, until=math.inf)


def _config_file(arguments: argparse.Namespace) -> str:
    """Return CONFIG, or the path of the config for the text at the paths that were given instead."""
    given = arguments.config
    tomls = [path for path in given if path.endswith(".toml") and "://" not in path and not Path(path).is_dir()]
    configs = tomls + [path for path in given if path.lstrip().startswith("{")]
    if not configs:
        from jobs.init import find_or_write

        def show(line: str) -> None:
            print(line, file=sys.stderr)

        return find_or_write(given, arguments.minutes, arguments.name, show)
    if len(given) > 1:
        raise UserError(f"{configs[0]} is a config: give it alone, or give paths of text only")
    if arguments.minutes or arguments.name:
        raise UserError(f"--minutes and --name are for text: set train.steps and name in {configs[0]}")
    return str(given[0])


def schedule(arguments: argparse.Namespace) -> None:
    from croniter import croniter

    config = entry.load_config(arguments.config, arguments.set)
    if not croniter.is_valid(arguments.cron):
        raise UserError(f'--cron "{arguments.cron}": expected minute, hour, day, month and weekday, as in "0 3 * * *"')
    with opened(arguments, config, serves=True) as runtime:
        while True:
            due = croniter(arguments.cron, datetime.now().astimezone()).get_next(datetime)
            runtime.console.print(f"next run: {due:%Y-%m-%d %H:%M:%S}", highlight=False)
            _stay_up(runtime, until=due.timestamp())
            try:
                print(json.dumps(_execute(config, runtime), ensure_ascii=False), flush=True)
            except Exception as failure:  # the next run may succeed
                if find_user_error(failure) is None and not isinstance(failure, RuntimeError):
                    raise
                runtime.console.print(f"error: {find_user_error(failure) or failure}", highlight=False, markup=False)


def sweep(arguments: argparse.Namespace) -> None:
    from gru.registry import tracking
    from pipelines import records
    from pipelines import sweep as sweeps
    from pipelines.context import WorkflowContext
    from pipelines.display import Display

    config = entry.load_config(arguments.config, arguments.set)
    trials = sweeps.variants(config, arguments.over, arguments.trial)
    with opened(arguments, config, serves=False) as runtime:
        rows = tuple(f"{sweeps.label(changes)} {stage}" for changes in trials for stage in records.TRIAL_STAGES)
        with Display(runtime.console, rows) as display:
            context = WorkflowContext(runtime.jobs, runtime.logs, display.watch)
            result = sweeps.execute(config, trials, arguments.at_once, context, runtime.database)
        result["tracking"] = tracking.find_run(result["tracking"]).url
        [best] = [changes for changes in trials if sweeps.label(changes) == result["best"]]
        ranking = summary.of_sweep(arguments.config, result, best)
        runtime.console.print(ranking, highlight=False, soft_wrap=True, markup=False)
        print(json.dumps(result, ensure_ascii=False), flush=True)


def _stay_up(runtime: Runtime, until: float) -> None:
    """Wait until a time, in seconds since the epoch. An embedded MLflow server that ends is started again.

    Raises ServiceFailed if the embedded Ray ends.
    """
    while (left := until - time.time()) > 0:
        time.sleep(min(left, CHECK_SECONDS))
        if line := runtime.services.check():
            runtime.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _execute(config: PipelineConfig, runtime: Runtime) -> RunResult:
    """Execute the workflow of the config and show its progress. Return its result, with the MLflow run's URL."""
    from gru.registry import tracking
    from pipelines import workflow
    from pipelines.context import WorkflowContext
    from pipelines.display import Display

    with Display(runtime.console, STAGES) as display:
        context = WorkflowContext(runtime.jobs, runtime.logs, display.watch)
        result = workflow.execute(config, context, runtime.database)
    result["tracking"] = tracking.find_run(result["tracking"]).url
    return result
