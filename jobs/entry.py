"""The entry point of every job: read the config, call one function, print its result as the last line.

The exit status is 0 only if there is a result; 2, with one line, for a user's mistake; 1 if machines failed too often;
128 + signal if the job was stopped and saved its work.
"""

import argparse
import fcntl
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gru import config as configuration
from gru import storage
from gru.config import PipelineConfig
from gru.config_corpus import BUILT_IN_SOURCES
from gru.config_stages import GpuResources
from gru.errors import GaveUp, Stopped, UserError, find_user_error
from gru.machine import available_cpus

if TYPE_CHECKING:
    import torch

HOME_VARIABLE = "GRU_HOME"
RAY_VARIABLE = "GRU_RAY_ADDRESS"  # of the embedded Ray; Ray's RAY_ADDRESS names the one that was started last here
KEY_VARIABLE = "GRU_API_KEY"  # API key of the endpoint

Progress = Callable[[str], None]


@dataclass(frozen=True)
class JobContext:
    """The inputs of a job besides its configuration."""

    parent: str | None
    """Id of the MLflow run that the job's own run belongs to."""
    dataset: str | None
    """Directory of the dataset; None: the dataset of the sources' current content."""
    progress: Progress
    """Called with a line for people."""
    arguments: argparse.Namespace
    """Values of the job's own options."""


def add_config_arguments(parser: argparse.ArgumentParser, **positional: Any) -> None:
    """Add CONFIG and --set. positional: arguments for CONFIG that differ from those of other commands."""
    about = {"metavar": "CONFIG", "help": "TOML file, such as pipelines/configs/quickstart.toml"}
    parser.add_argument("config", **(about | positional))
    add_override_argument(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"keys of CONFIG (relative paths start at the current directory):\n{configuration.describe()}"


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set KEY of CONFIG to a TOML value; a bare word is a string (repeatable)",
    )


def load_config(path: str, overrides: list[str]) -> PipelineConfig:
    """Return the configuration with absolute paths: relative ones start at $GRU_HOME, or else the current directory.

    Raises UserError for a mistake in the file or the overrides.
    """
    home = os.environ.get(HOME_VARIABLE) or str(Path.cwd())
    config = configuration.load(path, overrides)
    corpus = config.corpus

    def absolute(source: str) -> str:
        return source if source in BUILT_IN_SOURCES else storage.absolute(source, home)

    tables = [
        table.model_copy(
            update={"path": absolute(table.path) if isinstance(table.path, str) else [*map(absolute, table.path)]}
        )
        for table in corpus.source
    ]
    tokenizer, keys, dropped = (
        path and storage.absolute(path, home) for path in (config.tokenizer.path, config.serve.keys, corpus.dropped)
    )
    initial = config.train.init_from
    if initial and not configuration.is_model_reference(initial):
        initial = storage.normalize(initial, home)
    return config.model_copy(
        update={
            "storage": storage.normalize(config.storage, home),
            "corpus": corpus.model_copy(
                update={"sources": [*map(absolute, corpus.sources)], "source": tables, "dropped": dropped}
            ),
            "tokenizer": config.tokenizer.model_copy(update={"path": tokenizer}),
            "train": config.train.model_copy(update={"init_from": initial}),
            "serve": config.serve.model_copy(
                update={"keys": keys, "chat_template": config.serve.chat_template or corpus.chat_template}
            ),
        }
    )


def main(
    stage: str,
    description: str,
    run: Callable[[PipelineConfig, JobContext], Mapping[str, object]],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run a job and print the result of `run(config, context)`. `add_arguments` adds the job's own options."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=description)
    add_config_arguments(parser)
    parser.add_argument("--parent", metavar="RUN_ID", help="MLflow run that this job's run belongs to")
    parser.add_argument("--dataset", metavar="DIR", help="dataset (default: that of the sources as they are now)")
    add_arguments(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    prepare_libraries()

    def progress(line: str) -> None:
        print(f"{stage}: {line}", file=sys.stderr, flush=True)

    try:
        config = load_config(arguments.config, arguments.set)
        storage.check_writable(config.storage)
        is_recorded = arguments.parent or vars(arguments).get("dry_run")  # by a workflow; or there is nothing to record
        with nullcontext() if is_recorded else _noted_by_hand(config.storage):
            result = run(config, JobContext(arguments.parent, arguments.dataset, progress, arguments))
    except KeyboardInterrupt:
        _leave_ray()
        exit_now(130)
    except Stopped as stop:
        progress(str(stop))
        _leave_ray()
        exit_now(128 + stop.signal)
    except GaveUp as error:
        print(f"error: {error}", file=sys.stderr)
        _leave_ray()
        exit_now(1)
    except Exception as error:
        mistake = find_user_error(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        _leave_ray()
        exit_now(2)
    _leave_ray()  # first, because Ray may print that a node died, and the result must be the last line
    sys.stderr.flush()
    print(json.dumps(result, ensure_ascii=False), flush=True)
    exit_now(0)


@contextmanager
def _noted_by_hand(store: str) -> Iterator[None]:
    """Let `is_used_by_hand` know that a job that no workflow records is in progress in this storage.

    Where that cannot be done, as on a file system without locks, the age of its files protects the job alone.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            if storage.is_local(store):
                path = _lock_of_jobs(store)
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)  # another user may have made it
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_SH)  # the operating system releases it with the process
        yield


def is_used_by_hand(store: str) -> bool:
    """Whether a job that was started by hand is in progress in this storage, which is local."""
    try:
        with _lock_of_jobs(store).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there was none yet, or it cannot be known
        return False
    return False


def _lock_of_jobs(store: str) -> Path:
    return Path(store) / "locks" / "jobs"


def _leave_ray() -> None:
    """Disconnect from Ray, or stop the local one, if this process uses it."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()


def exit_now(status: int) -> NoReturn:
    """Flush stdout and stderr and end the process without finalizing the interpreter.

    A native thread (Arrow, fsspec, Ray) that calls into Python while the interpreter finalizes aborts the process:
    SIGABRT instead of the exit status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare_libraries() -> None:
    """Switch off the telemetry and progress bars of libraries, and let them be imported faster.

    Call it before they are imported; workers inherit the former.
    """
    # Torch and MLflow create a million objects that stay: with the default of 700 new objects between two collections,
    # a third of the time of their import is spent on looking through them.
    gc.set_threshold(50_000)
    for variable, value in {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(variable, value)
    for variable in ("NO_PROXY", "no_proxy"):  # the embedded services are on this machine
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1", "localhost"]))
    if os.environ.get("RAY_ADDRESS", "127.0.0.1").startswith("127.0.0.1"):
        # Makes a local Ray bind to the loopback address only. Clients of such a Ray need it too: without it they look
        # for the head at the machine's outer address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start_ray() -> None:
    """Join the cluster that this job was submitted to, or else start a local Ray.

    A local Ray counts at least four CPUs, since two are too few for Ray's own bookkeeping. Raises UserError if
    RAY_ADDRESS is the address of a job server.
    """
    import ray

    if own := os.environ.get(RAY_VARIABLE):
        os.environ["RAY_ADDRESS"] = own
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {}
    if address == "local":
        require_startable_ray()
        options = {"num_cpus": max(4, available_cpus()), "_temp_dir": ray_directory()}
    if address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS = {address} is a job server: use `ray job submit --working-dir . -- python -m jobs...`"
        )
    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)


def require_startable_ray() -> None:
    """Raise UserError if Ray cannot be started with this interpreter."""
    if " " in sys.executable:
        raise UserError(f"{sys.executable}: Ray does not start from a path with spaces: use a checkout in one without")


def ray_directory() -> str | None:
    """Return the directory for the files of a Ray that is started here; None for Ray's default.

    The first user of a machine owns the default directory.
    """
    default = default_ray_directory()
    if not default.exists() or os.access(default, os.W_OK | os.X_OK, effective_ids=True):
        return None
    return f"{default}-{os.geteuid()}"


def default_ray_directory() -> Path:
    """Return Ray's default directory for the files of a Ray that is started here."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def device(stage: str, resources: GpuResources) -> "torch.device":
    """Return the GPU if the stage's resources have one, else the CPU. Raises UserError if this machine has no GPU."""
    import torch

    if resources.gpus and not torch.cuda.is_available():
        raise UserError(f"resources.{stage}.gpus = {resources.gpus}: this machine has no GPU")
    return torch.device("cuda" if resources.gpus else "cpu")


def require_tracking() -> str:
    """Return MLFLOW_TRACKING_URI. Raises UserError if it is not set."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "MLFLOW_TRACKING_URI is not set: set it to the URL of an MLflow server, such as "
            "http://127.0.0.1:5000, which `gru run` starts"
        )
    return uri
