"""The surroundings of a command that executes workflows: Ray and MLflow, a console and a database.

Services that are not configured are embedded; they stop with the last command that uses them.
"""

import argparse
import contextlib
import json
import os
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gru import preflight, storage
from gru.config import PipelineConfig, ServeConfig
from gru.errors import UserError
from gru.network import is_local_address, require_bindable, url_of
from gru.terminal import counted
from jobs.entry import default_ray_directory, ray_directory
from pipelines.interrupts import STOP_SIGNALS

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.embedded import Services
    from pipelines.ray_jobs import RayJobs

DRAIN_SECONDS = 10  # for requests in progress, when the embedded endpoint stops


@dataclass(frozen=True)
class Runtime:
    """What workflows of this process need."""

    console: "Console"
    jobs: "RayJobs"
    services: "Services"
    logs: Path
    database: str
    """URL."""


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, config: PipelineConfig, serves: bool) -> Iterator[Runtime]:
    """Provide Ray and MLflow, configured or embedded, while the block runs.

    serves: whether the workflow serves, so that the endpoint's address must be free. Raises UserError if the storage is
    not writable, or an address or port cannot be used.
    """
    from rich.console import Console

    from pipelines import embedded

    storage.check_writable(config.storage)
    if serves and not embedded.address(config.storage, "ray"):
        _check_endpoint_address(config.serve)
    console = Console(stderr=True)
    _check_machine(config.storage, console)
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(""))
        services = embedded.up(config.storage, arguments.ray_port, arguments.mlflow_port, status.update)
        stack.enter_context(_released_afterwards(services, config.serve if serves else None, console))
        status.stop()  # inside: an interrupt of it must not leave the services running
        os.environ.update(services.environment)
        from pipelines import database
        from pipelines.ray_jobs import RayJobs

        working_dir = None if services.embedded_ray else checkout()
        jobs = RayJobs(services.ray, config.storage, working_dir, {"MLFLOW_TRACKING_URI": services.mlflow})
        logs = logs_of(config.storage)
        with console.status("connecting to MLflow"):
            from gru.registry import tracking

            runs = tracking.experiment_url(config.experiment)
        lines = f"logs   {logs}\nRay    {services.ray}\nMLflow {runs}"
        console.print(lines, highlight=False, soft_wrap=True, markup=False)
        yield Runtime(console, jobs, services, logs, database.address(config.storage))


def _check_machine(store: str, console: "Console") -> None:
    """Print what will slow a run on this machine. Raises UserError for what prevents one."""
    from pipelines import embedded

    starts_ray = "RAY_ADDRESS" not in os.environ and not embedded.address(store, "ray")
    ray = ray_directory() or str(default_ray_directory())
    findings = preflight.judge(
        preflight.run_facts(store if storage.is_local(store) else None, ray if starts_ray else None)
    )
    for sentence in findings.warnings:
        console.print(f"note: {sentence}", highlight=False, soft_wrap=True, markup=False)
    if findings.refusals:
        raise UserError("; ".join(findings.refusals))


def logs_of(store: str) -> Path:
    """The directory of the logs of a storage's jobs, which is local."""
    return Path(store if storage.is_local(store) else ".") / "logs"


def checkout() -> str | None:
    """The directory whose code is sent to a cluster with each job; None if this is an installed package.

    An installed package sends no code: the cluster runs the same image, and the package's parent directory holds
    everything that was ever installed.
    """
    root = Path(__file__).parents[1]
    return str(root) if (root / "pyproject.toml").exists() else None


def _check_endpoint_address(serve: ServeConfig) -> None:
    """Raise UserError if the endpoint's port is not free here, or its address not reachable on a remote cluster."""
    if "RAY_ADDRESS" not in os.environ:
        require_bindable(serve.host, serve.port, "--set serve.port=PORT")
        return
    ray_host = urllib.parse.urlsplit(os.environ["RAY_ADDRESS"]).hostname
    if ray_host and not is_local_address(ray_host) and serve.host in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
        raise UserError(
            f"serve.host = {serve.host!r} does not reach {ray_host} (RAY_ADDRESS) from here: set it to an address of "
            "the head, such as its name, and serve.keys to a file of keys on the machines that serve"
        )


@contextlib.contextmanager
def _released_afterwards(services: "Services", serve: ServeConfig | None, console: "Console") -> Iterator[None]:
    """Release the services after the block, once the requests in progress of an embedded endpoint are finished."""
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            if services.embedded_ray and serve:
                _drain(f"{url_of(serve.host, serve.port)}/ready", console)
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave some of the processes running
        services.leave()


def _drain(ready: str, console: "Console") -> None:
    """Wait until the endpoint has no requests in progress, DRAIN_SECONDS at most. ready: URL of its /ready."""
    deadline = time.monotonic() + DRAIN_SECONDS
    is_shown = False
    while (count := _requests_in_progress(ready)) and time.monotonic() < deadline:
        if not is_shown:
            line = f"waiting for {counted(count, 'request')} to finish, at most {DRAIN_SECONDS} s; Ctrl-C stops now"
            console.print(line, highlight=False)
            is_shown = True
        time.sleep(0.1)


def _requests_in_progress(ready: str) -> int:
    try:
        with urllib.request.urlopen(ready, timeout=2) as response:
            return int(json.load(response)["requests"])
    except (OSError, ValueError, LookupError):
        return 0
