"""The commands that execute no workflow: they ask services that are running, or need none."""

import argparse
import json
import os
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gru import storage
from gru.config import PipelineConfig
from gru.errors import UserError
from jobs import entry
from pipelines.runtime import logs_of

if TYPE_CHECKING:
    from pipelines.ray_jobs import RayJobs


def down(arguments: argparse.Namespace) -> None:
    from pipelines import embedded

    stopped = embedded.down(storage.normalize(arguments.storage, Path.cwd()))
    print(f"stopped {' and '.join(stopped)}" if stopped else "no embedded service was running", file=sys.stderr)


def clean(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from gru.native import cache_directory
    from pipelines import clean, embedded, needs

    store = storage.normalize(arguments.storage, Path.cwd())
    if not storage.exists(store):
        raise UserError(f"{store}: no such storage")
    console, days = Console(), arguments.older_than

    def look() -> tuple[list[clean.Row], str, list[str]]:
        needed = needs.of_storage(store, arguments.lineage)
        found = [
            clean.find(store, needed, days, arguments.lineage),
            clean.find_cached(cache_directory(), days),
            clean.find_ray_sessions(days),
        ]
        return [row for each in found for row in each.rows], clean.kept(found), needed.unknown

    rows, kept, unknown = look()
    lines = [f"datasets and runs stay: {sentence}" for sentence in unknown]
    shown = [clean.table(rows)] if rows else ["nothing can be removed"]
    console.print(*lines, *shown, f"stays: {kept}", highlight=False, soft_wrap=True, markup=False, sep="\n")
    if not rows or arguments.dry_run or not (arguments.yes or _confirmed(len(rows))):
        return
    with embedded.starts_deferred(store):  # what a run that starts meanwhile finds, it may use
        still = {row.paths for row in look()[0]}
        failed = [row for row in rows if row.paths in still and not clean.remove(row)]
    removed = sum(row.size for row in rows if row.paths in still and row not in failed)
    console.print(f"removed {clean.size(removed)}", highlight=False)
    if failed:
        raise UserError(
            f"could not remove all of {', '.join(row.name for row in failed)}: do they belong to another user?"
        )


def _confirmed(rows: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: add --yes to remove these where no one can be asked")
    try:
        answer = input(f"Remove {'this' if rows == 1 else f'these {rows}'}? [y/N] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def generate(arguments: argparse.Namespace) -> int:
    """Print a text, or talk with a person at a terminal who gave no prompt. Return the exit status."""
    from gru.generation.sampling import SamplingParams
    from pipelines import prompt_loop, text_sources

    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    params = SamplingParams(seed, **{name: getattr(arguments, name) for name in names})
    options = text_sources.TextOptions(params, arguments.tokens, arguments.stop)
    interactive = arguments.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    prompt = "" if interactive else prompt_loop.read_prompt(arguments.prompt)
    source = text_sources.open_source(arguments.model, arguments.set, arguments.storage)
    print(f"{source.description}, seed {seed}", file=sys.stderr, flush=True)
    if interactive:
        return prompt_loop.PromptLoop(source, options).run()
    return prompt_loop.print_text(source, prompt, options)


def key(arguments: argparse.Namespace) -> None:
    from gru.serving.auth import new_key

    api_key, line = new_key(arguments.owner, arguments.until)
    print("the key, which is shown only once, and its line for the file that serve.keys names:", file=sys.stderr)
    print(f"{api_key}\n{line}")


def look(arguments: argparse.Namespace) -> None:
    from jobs.look import look, report

    config = entry.load_config(arguments.config, arguments.set)
    preview = look(config)
    print(report(preview))
    preview.require_documents()


def init(arguments: argparse.Namespace) -> None:
    from jobs.init import MINUTES, init, report

    proposal = init(arguments.paths, arguments.minutes or MINUTES, arguments.name)
    print(report(proposal), file=sys.stderr)
    print(proposal.toml, end="")


def schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(PipelineConfig.model_json_schema(), indent=2, ensure_ascii=False))


def status(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipelines import database, endpoints, status
    from pipelines.text_sources import authorization

    store = storage.normalize(arguments.storage, Path.cwd())
    logs, records = logs_of(store), database.address(store)
    workflows = status.workflows(store, records, _running_jobs(store), logs)
    served = endpoints.of_storage(store, records, authorization())
    if arguments.json:
        found = {"endpoints": [asdict(each) for each in served], "workflows": status.as_json(workflows)}
        print(json.dumps(found, ensure_ascii=False))
    else:
        lines = [f"logs: {logs}", status.table(workflows), *endpoints.lines(served)]
        Console().print(*lines, highlight=False, soft_wrap=True, markup=False, sep="\n")


def cancel(arguments: argparse.Namespace) -> None:
    from pipelines import database, workflow

    config = entry.load_config(arguments.config, arguments.set)
    _connect_tracking(config.storage)
    cancelled = workflow.cancel(config, _running_jobs(config.storage), database.address(config.storage))
    if not cancelled:
        raise UserError("no unfinished workflow of this config")
    print(f"cancelled {', '.join(cancelled)}", file=sys.stderr)


def lineage(arguments: argparse.Namespace) -> int:
    """Return exit status 1 if something differs from what the model was made from."""
    from rich.console import Console

    _connect_tracking(storage.normalize(arguments.storage, Path.cwd()))
    from gru.registry import lineage_trace, versions
    from gru.training import checkpoint
    from gru.training.initial_model import digest_at

    version = versions.find(arguments.model)
    with Console(stderr=True).status("") as spinner:
        links = lineage_trace.trace(
            version, arguments.verify, spinner.update, lambda path: checkpoint.load(path).average, digest_at
        )
    if arguments.json:
        print(json.dumps([vars(link) for link in links], ensure_ascii=False))
    else:
        print(lineage_trace.report(arguments.model, links))
    return int(any(link.state == "different" for link in links))


def rollback(arguments: argparse.Namespace) -> None:
    config = entry.load_config(arguments.config, arguments.set)
    _connect_tracking(config.storage)
    from gru.registry import versions

    version = versions.rollback(config.model_name, arguments.to)
    print(f"{version.name}@{versions.CHAMPION} is version {version.version} now", file=sys.stderr)


def _connect_tracking(store: str) -> None:
    """Make MLflow's client use the configured server, or else the embedded one of this storage.

    Raises UserError if there is none, or it does not answer.
    """
    from gru.registry import tracking
    from pipelines import embedded

    url = os.environ.get("MLFLOW_TRACKING_URI") or embedded.address(store, "mlflow")
    if url is None:
        raise UserError("no MLflow server is running: set MLFLOW_TRACKING_URI, or start an embedded one with `gru run`")
    tracking.connect_impatiently(url)
    if problem := tracking.unreachable():
        raise UserError(f"MLFLOW_TRACKING_URI = {url} does not answer: {problem}")


def _running_jobs(store: str) -> "RayJobs | None":
    """The jobs on the configured Ray, or else on the embedded one of this storage; None if neither is running."""
    from pipelines import embedded
    from pipelines.ray_jobs import RayJobs

    if (ray := embedded.find_ray(store)) is None:
        return None
    address, environment = ray
    os.environ.update(environment)
    try:
        return RayJobs(address, store, None, {})
    except UserError:
        if "RAY_ADDRESS" in os.environ:
            raise
        return None  # the embedded one is starting or stopping
