"""The commands that execute no workflow: they ask services that are running, or need none."""

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from gru import storage
from gru.config import PipelineConfig
from gru.errors import UserError
from gru.network import url_of
from jobs import entry
from pipelines.runtime import logs_of

if TYPE_CHECKING:
    from pipelines.ray_jobs import RayJobs

KEY_VARIABLE = "GRU_API_KEY"


def down(arguments: argparse.Namespace) -> None:
    from pipelines import embedded

    stopped = embedded.down(storage.normalize(arguments.storage, Path.cwd()))
    print(f"stopped {' and '.join(stopped)}" if stopped else "no embedded service was running", file=sys.stderr)


def generate(arguments: argparse.Namespace) -> None:
    config = entry.load_config(arguments.config, arguments.set)
    address = url_of(config.serve.host, config.serve.port)
    body = {
        "model": config.model_name,
        "prompt": arguments.prompt,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    if api_key := os.environ.get(KEY_VARIABLE, "").strip():
        if not re.fullmatch(r"[!-~]+", api_key):
            raise UserError(f"{KEY_VARIABLE}: must be one word of ASCII characters, as `gru key` prints it")
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            print(arguments.prompt, end="", flush=True)
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise UserError(f"{address}: {event['error']['message']}")
                    print(event["choices"][0]["text"], end="", flush=True)
            print()
    except urllib.error.HTTPError as error:
        hint = f" (set {KEY_VARIABLE} to an API key of the endpoint)" if error.code == 401 else ""
        message = error.read().decode(errors="replace")[:500]
        raise UserError(f"{address}: status {error.code}: {message}{hint}") from None
    except OSError as error:
        raise UserError(f"{address} does not answer ({error}): start it with `gru run`") from None


def key(arguments: argparse.Namespace) -> None:
    from gru.serving.auth import new_key

    api_key, line = new_key(arguments.owner)
    print("the key, which is shown only once, and its line for the file that serve.keys names:", file=sys.stderr)
    print(f"{api_key}\n{line}")


def look(arguments: argparse.Namespace) -> None:
    from jobs.look import look, report

    config = entry.load_config(arguments.config, arguments.set)
    preview = look(config)
    print(report(preview))
    preview.require_documents()


def init(arguments: argparse.Namespace) -> None:
    from jobs.init import init, report

    proposal = init(arguments.paths, arguments.minutes, arguments.name)
    print(report(proposal), file=sys.stderr)
    print(proposal.toml, end="")


def schema(arguments: argparse.Namespace) -> None:
    print(json.dumps(PipelineConfig.model_json_schema(), indent=2, ensure_ascii=False))


def status(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipelines import database, status

    store = storage.normalize(arguments.storage, Path.cwd())
    logs = logs_of(store)
    workflows = status.workflows(store, database.address(store), _running_jobs(store), logs)
    if arguments.json:
        print(json.dumps(status.as_json(workflows), ensure_ascii=False))
    else:
        Console().print(f"logs: {logs}", status.table(workflows), highlight=False, soft_wrap=True, sep="\n")


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

    version = versions.find(arguments.model)
    with Console(stderr=True).status("") as spinner:
        links = lineage_trace.trace(
            version, arguments.verify, spinner.update, lambda path: checkpoint.load(path).average
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
