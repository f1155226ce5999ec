"""The `gru` command."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gru import storage
from gru.config import PipelineConfig, ServeConfig
from gru.errors import UserError, find_user_error
from gru.network import require_free
from jobs import entry

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.stack import Stack


KEY_VARIABLE = "GRU_API_KEY"
FINISH_SECONDS = 10  # that answers in the making have when all of it is stopped
ENDS = (signal.SIGTERM, signal.SIGHUP)  # as Ctrl-C


def main() -> None:
    arguments = _parser().parse_args()
    for number in ENDS:
        signal.signal(number, _interrupt)
    entry.quiet_libraries()
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        from pipelines.ray_jobs import JobFailed
        from pipelines.stack import ServiceFailed

        mistake = find_user_error(error)
        if mistake is None and not isinstance(error, JobFailed | ServiceFailed):
            raise
        print(f"error: {mistake or error}", file=sys.stderr)
        _leave(2 if mistake else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gru", description="Text to a served, registered GRU text generator.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="prepare, train, evaluate, promote and serve; goes on where it was")
    entry.add_config_arguments(run)
    run.add_argument("--exit", action="store_true", help="end after the summary, instead of staying up until Ctrl-C")
    run.add_argument(
        "--ray-port", type=_port, default=8265, metavar="PORT", help="port of the embedded Ray head (8265)"
    )
    run.add_argument(
        "--mlflow-port", type=_port, default=5000, metavar="PORT", help="port of the embedded MLflow (5000)"
    )
    run.set_defaults(command=_run)

    down = commands.add_parser("down", help="stop the embedded Ray head and MLflow server")
    down.add_argument("storage", nargs="?", default="./store", help="the storage that it was started for (./store)")
    down.set_defaults(command=_down)

    generate = commands.add_parser("generate", help=f"let the endpoint write; its key, if it wants one: {KEY_VARIABLE}")
    entry.add_config_arguments(generate)
    generate.add_argument("prompt", help="what the text begins with")
    generate.add_argument("--max-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--seed", type=int)
    generate.set_defaults(command=_generate)

    key = commands.add_parser("key", help="make an API key for the endpoint")
    key.add_argument("owner", help="who it is for; requests are logged under this name")
    key.set_defaults(command=_key)

    rollback = commands.add_parser("rollback", help="give @champion back to the version that had it before")
    entry.add_config_arguments(rollback)
    rollback.set_defaults(command=_rollback)
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 1 to 65535")
    return int(text)


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipelines import stack
    from pipelines.display import Display

    config = entry.load_config(arguments.config, arguments.set)
    storage.check_writable(config.storage)
    if "RAY_ADDRESS" not in os.environ and not stack.address(config.storage, "ray"):
        require_free(config.serve.host, config.serve.port, "--set serve.port=PORT")
    console = Console(stderr=True)
    with console.status("") as status:
        running = stack.up(config.storage, arguments.ray_port, arguments.mlflow_port, status.update)
    with _stopped_afterwards(running, config.serve, console):
        os.environ.update(running.environment)
        from pipelines import train_generator
        from pipelines.ray_jobs import RayJobs

        database = train_generator.database_url(config.storage)
        working_dir = None if running.embedded_ray else _checkout()
        jobs = RayJobs(running.ray, working_dir, {"MLFLOW_TRACKING_URI": running.mlflow})
        logs = Path(config.storage if storage.is_local(config.storage) else ".") / "logs"
        console.print(f"logs: {logs}   Ray: {running.ray}   MLflow: {running.mlflow}", highlight=False, soft_wrap=True)
        with Display(console, train_generator.STAGES) as display:
            result = train_generator.execute(
                config,
                train_generator.Surroundings(jobs, logs, display.watch),
                database,
            )
        from gru import tracking

        result["tracking"] = tracking.find_run(result["tracking"]).url
        console.print(_summary(config, result), highlight=False, soft_wrap=True, markup=False)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        if not arguments.exit:
            console.print("\nCtrl-C stops all of it.", highlight=False)
            signal.pause()


def _checkout() -> str | None:
    """The directory whose code goes to a cluster with each job. None where this is an installed package: then the
    cluster runs the same image, and what is beside the package is all that was ever installed."""
    root = Path(__file__).parents[1]
    return str(root) if (root / "pyproject.toml").exists() else None


def _summary(config: PipelineConfig, result: dict[str, Any]) -> str:
    request = {"model": result["model"], "prompt": config.evaluate.prompt, "max_tokens": 100}
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    # A model that has learned little may write control characters, which are not for a terminal.
    printable = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in result["sample"].strip("\n"))
    sample = "\n".join(f"    {line}" for line in printable.splitlines())
    served = f"version {result['serving']} of {result['model']}"
    return f"""
{result["bits_per_byte"]:.3f} bits per byte, {result["nats_per_character"]:.3f} nats per character on held-out text

{sample}

tracking   {result["tracking"]}
endpoint   {result["endpoint"]} serves {served}
try        curl {result["endpoint"]}/v1/completions -H 'Content-Type: application/json' -d {body}"""


@contextlib.contextmanager
def _stopped_afterwards(running: "Stack", serve: ServeConfig, console: "Console") -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            if running.embedded_ray:
                _let_answers_finish(f"http://{serve.host}:{serve.port}/ready", console)
        for number in (signal.SIGINT, *ENDS):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it running
        running.leave()


def _let_answers_finish(ready: str, console: "Console") -> None:
    deadline = time.monotonic() + FINISH_SECONDS
    told = False
    while (writing := _answers_in_the_making(ready)) and time.monotonic() < deadline:
        if not told:
            say = f"stopping when {writing} answers are written, in {FINISH_SECONDS} s at most; Ctrl-C: now"
            console.print(say, highlight=False)
            told = True
        time.sleep(0.1)


def _answers_in_the_making(ready: str) -> int:
    try:
        with urllib.request.urlopen(ready, timeout=2) as response:
            return int(json.load(response)["requests"])
    except (OSError, ValueError, LookupError):
        return 0


def _down(arguments: argparse.Namespace) -> None:
    from pipelines import stack

    stopped = stack.down(storage.absolute(arguments.storage, Path.cwd()))
    print(f"stopped {' and '.join(stopped)}" if stopped else "nothing was running", file=sys.stderr)


def _generate(arguments: argparse.Namespace) -> None:
    config = entry.load_config(arguments.config, arguments.set)
    address = f"http://{config.serve.host}:{config.serve.port}"
    body = {
        "model": config.model_name,
        "prompt": arguments.prompt,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
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
        hint = f" (its key is taken from {KEY_VARIABLE})" if error.code == 401 else ""
        said = error.read().decode(errors="replace")[:500]
        raise UserError(f"{address}: status {error.code}: {said}{hint}") from None
    except OSError as error:
        raise UserError(f"{address} does not answer ({error}): `gru run` starts it") from None


def _key(arguments: argparse.Namespace) -> None:
    from gru.serving.access import new_key

    key, line = new_key(arguments.owner)
    print("the key, which is shown this once, and its line for the file that serve.keys names:", file=sys.stderr)
    print(f"{key}\n{line}")


def _rollback(arguments: argparse.Namespace) -> None:
    from pipelines import stack

    config = entry.load_config(arguments.config, arguments.set)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        url = stack.address(config.storage, "mlflow")
        if url is None:
            raise UserError("no MLflow server is up: set MLFLOW_TRACKING_URI, or start the embedded one with `gru run`")
        os.environ["MLFLOW_TRACKING_URI"] = url
    from gru import registry

    version = registry.rollback(config.model_name)
    print(f"{version.name}@{registry.CHAMPION} is version {version.version} again", file=sys.stderr)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave(status: int) -> None:
    """End now: threads that still follow a job that is gone must not hold the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
