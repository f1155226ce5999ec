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
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gru import storage
from gru.config import PipelineConfig, ServeConfig
from gru.errors import UserError, find_user_error
from gru.network import is_local_address, require_bindable
from jobs import entry

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.embedded import Services
    from pipelines.ray_jobs import RayJobs


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
        entry.exit_now(130)  # threads that still follow a job must not hold the process
    except Exception as error:
        from pipelines.embedded import ServiceFailed
        from pipelines.ray_jobs import JobFailed

        mistake = find_user_error(error)
        if mistake is None and not isinstance(error, JobFailed | ServiceFailed):
            raise
        print(f"error: {mistake or error}", file=sys.stderr)
        entry.exit_now(2 if mistake else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gru", description="Text to a served, registered GRU text generator.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="prepare, train, evaluate, promote and serve; goes on where it was")
    entry.add_config_arguments(run)
    run.add_argument("--exit", action="store_true", help="end after the summary, instead of staying up until Ctrl-C")
    run.set_defaults(command=_run)

    schedule = commands.add_parser(
        "schedule", help="stay up, and at the times of --cron do what `run` does with what the sources are then"
    )
    entry.add_config_arguments(schedule)
    schedule.add_argument("--cron", required=True, help='minute, hour, day, month, weekday of local time: "0 3 * * *"')
    schedule.set_defaults(command=_schedule)

    sweep = commands.add_parser("sweep", help="train and evaluate variants of a config: which is best?")
    entry.add_config_arguments(sweep)
    sweep.add_argument(
        "--over",
        metavar="KEY=[...]",
        action="append",
        default=[],
        help="values of a key; of several, all choices",
    )
    sweep.add_argument(
        "--trial",
        metavar="KEY=VALUE",
        nargs="+",
        action="append",
        default=[],
        help="one variant by what it changes, beside those of --over",
    )
    sweep.add_argument("--at-once", type=_count, default=1, metavar="N", help="trials that run side by side (1)")
    sweep.set_defaults(command=_sweep)

    for working in (run, schedule, sweep):
        working.add_argument(
            "--ray-port", type=_port, default=8265, metavar="PORT", help="port of the embedded Ray head (8265)"
        )
        working.add_argument(
            "--mlflow-port", type=_port, default=5000, metavar="PORT", help="port of the embedded MLflow (5000)"
        )

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

    status = commands.add_parser("status", help="what the workflows of a storage have done, and what they are at")
    status.add_argument("storage", nargs="?", default="./store", help="the storage that they work on (./store)")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    status.set_defaults(command=_status)

    cancel = commands.add_parser("cancel", help="end the workflow of a config, its job and its MLflow run")
    entry.add_config_arguments(cancel)
    cancel.set_defaults(command=_cancel)

    lineage = commands.add_parser("lineage", help="where a registered model comes from")
    lineage.add_argument("model", metavar="MODEL", help="NAME, which is its champion, NAME@ALIAS or NAME:VERSION")
    lineage.add_argument("--verify", action="store_true", help="read all that can be reached, and compare")
    lineage.add_argument("--json", action="store_true", help="print JSON instead of a report")
    lineage.add_argument(
        "--storage",
        default="./store",
        metavar="PATH",
        help="whose embedded MLflow is asked, where none is set (./store)",
    )
    lineage.set_defaults(command=_lineage)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: expected 1 to 65535")
    return int(text)


@dataclass(frozen=True)
class Work:
    """What workflows of this process need."""

    console: "Console"
    jobs: "RayJobs"
    logs: Path
    database: str


@contextlib.contextmanager
def _at_work(arguments: argparse.Namespace, config: PipelineConfig, serves: bool) -> Iterator[Work]:
    """With a Ray and an MLflow, those that are set or embedded ones, which end with the last one who uses them."""
    from rich.console import Console

    from pipelines import embedded

    storage.check_writable(config.storage)
    if serves and not embedded.address(config.storage, "ray"):
        _check_address(config.serve)
    console = Console(stderr=True)
    with console.status("") as status:
        running = embedded.up(config.storage, arguments.ray_port, arguments.mlflow_port, status.update)
    with _stopped_afterwards(running, config.serve if serves else None, console):
        os.environ.update(running.environment)
        from pipelines import database
        from pipelines.ray_jobs import RayJobs

        working_dir = None if running.embedded_ray else _checkout()
        jobs = RayJobs(running.ray, config.storage, working_dir, {"MLFLOW_TRACKING_URI": running.mlflow})
        logs = _logs(config.storage)
        console.print(f"logs: {logs}   Ray: {running.ray}   MLflow: {running.mlflow}", highlight=False, soft_wrap=True)
        yield Work(console, jobs, logs, database.address(config.storage))


def _check_address(serve: ServeConfig) -> None:
    """Raises UserError where nothing could be served, or not be seen from here."""
    if "RAY_ADDRESS" not in os.environ:
        require_bindable(serve.host, serve.port, "--set serve.port=PORT")
        return
    ray_host = urllib.parse.urlsplit(os.environ["RAY_ADDRESS"]).hostname
    if ray_host and not is_local_address(ray_host) and serve.host in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
        raise UserError(
            f"serve.host = {serve.host!r} is not where {ray_host} (RAY_ADDRESS) is reached from here: set it to an "
            "address of the head, such as its name, and serve.keys to a file of keys on the machines that serve"
        )


def _execute(config: PipelineConfig, work: Work) -> dict[str, Any]:
    """The workflow of the config, shown; its result."""
    from pipelines import workflow
    from pipelines.display import Display

    with Display(work.console, workflow.STAGES) as display:
        context = workflow.WorkflowContext(work.jobs, work.logs, display.watch)
        result = workflow.execute(config, context, work.database)
    from gru.registry import tracking

    result["tracking"] = tracking.find_run(result["tracking"]).url
    return result


def _run(arguments: argparse.Namespace) -> None:
    config = entry.load_config(arguments.config, arguments.set)
    with _at_work(arguments, config, serves=True) as work:
        result = _execute(config, work)
        work.console.print(_summary(config, result), highlight=False, soft_wrap=True, markup=False)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        if not arguments.exit:
            work.console.print("\nCtrl-C stops all of it.", highlight=False)
            signal.pause()


def _schedule(arguments: argparse.Namespace) -> None:
    from croniter import croniter

    config = entry.load_config(arguments.config, arguments.set)
    if not croniter.is_valid(arguments.cron):
        raise UserError(f'--cron "{arguments.cron}": expected minute, hour, day, month and weekday, as in "0 3 * * *"')
    with _at_work(arguments, config, serves=True) as work:
        while True:
            due = croniter(arguments.cron, datetime.now().astimezone()).get_next(datetime)
            work.console.print(f"next: {due:%Y-%m-%d %H:%M:%S}", highlight=False)
            time.sleep(max(0, due.timestamp() - time.time()))
            try:
                print(json.dumps(_execute(config, work), ensure_ascii=False), flush=True)
            except Exception as failure:  # the next time may go well
                if find_user_error(failure) is None and not isinstance(failure, RuntimeError):
                    raise
                work.console.print(f"error: {find_user_error(failure) or failure}", highlight=False, markup=False)


def _sweep(arguments: argparse.Namespace) -> None:
    from gru.registry import tracking
    from pipelines import sweep, workflow
    from pipelines.display import Display

    config = entry.load_config(arguments.config, arguments.set)
    trials = sweep.variants(config, arguments.over, arguments.trial)
    with _at_work(arguments, config, serves=False) as work:
        rows = tuple(f"{sweep.label(changes)} {stage}" for changes in trials for stage in sweep.STAGES)
        with Display(work.console, rows) as display:
            context = workflow.WorkflowContext(work.jobs, work.logs, display.watch)
            result = sweep.execute(config, trials, arguments.at_once, context, work.database)
        result["tracking"] = tracking.find_run(result["tracking"]).url
        [best] = [changes for changes in trials if sweep.label(changes) == result["best"]]
        work.console.print(_ranking(arguments.config, result, best), highlight=False, soft_wrap=True, markup=False)
        print(json.dumps(result, ensure_ascii=False), flush=True)


def _ranking(path: str, result: dict[str, Any], best: Sequence[str]) -> str:
    """The trials of a sweep, the best first, and how to take it into service."""
    trials = result["trials"].items()
    ranked = sorted((trial["bits_per_byte"], label) for label, trial in trials if "error" not in trial)
    failed = [f"  failed  {label}: {trial['error']}" for label, trial in trials if "error" in trial]
    changes = " ".join(f"--set {shlex.quote(change)}" for change in best)
    rows = "\n".join([*(f"  {score:.4f}  {label}" for score, label in ranked), *failed])
    return f"""
bits per byte on held-out text:
{rows}

tracking   {result["tracking"]}
take it    gru run {path} {changes}"""


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
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if config.serve.keys else ""
    return f"""
{result["bits_per_byte"]:.3f} bits per byte, {result["nats_per_character"]:.3f} nats per character on held-out text

{sample}

tracking   {result["tracking"]}
endpoint   {result["endpoint"]} serves {served}
try        curl {result["endpoint"]}/v1/completions -H 'Content-Type: application/json'{key} -d {body}"""


@contextlib.contextmanager
def _stopped_afterwards(running: "Services", serve: ServeConfig | None, console: "Console") -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            if running.embedded_ray and serve:
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
    from pipelines import embedded

    stopped = embedded.down(storage.normalize(arguments.storage, Path.cwd()))
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
    from gru.serving.auth import new_key

    key, line = new_key(arguments.owner)
    print("the key, which is shown this once, and its line for the file that serve.keys names:", file=sys.stderr)
    print(f"{key}\n{line}")


def _find_tracking(store: str) -> None:
    """Have MLflow's client use the server that is set, or the one that was started for this storage. Raises UserError
    if it does not answer."""
    from gru.registry import tracking
    from pipelines import embedded

    url = os.environ.get("MLFLOW_TRACKING_URI") or embedded.address(store, "mlflow")
    if url is None:
        raise UserError("no MLflow server is up: set MLFLOW_TRACKING_URI, or start the embedded one with `gru run`")
    tracking.connect_impatiently(url)
    if problem := tracking.unreachable():
        raise UserError(f"MLFLOW_TRACKING_URI = {url} does not answer: {problem}")


def _status(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipelines import database, status

    store = storage.normalize(arguments.storage, Path.cwd())
    found = status.workflows(store, database.address(store), _jobs_of(store), _logs(store))
    if arguments.json:
        print(json.dumps(status.as_json(found), ensure_ascii=False))
    else:
        Console().print(f"logs: {_logs(store)}", status.table(found), highlight=False, soft_wrap=True, sep="\n")


def _cancel(arguments: argparse.Namespace) -> None:
    from pipelines import database, workflow

    config = entry.load_config(arguments.config, arguments.set)
    _find_tracking(config.storage)
    cancelled = workflow.cancel(config, _jobs_of(config.storage), database.address(config.storage))
    if not cancelled:
        raise UserError("no workflow of this config is under way")
    print(f"cancelled {', '.join(cancelled)}", file=sys.stderr)


def _jobs_of(store: str) -> "RayJobs | None":
    """The Ray that is set, or the one that was started for this storage; None if neither is up."""
    from pipelines import embedded
    from pipelines.ray_jobs import RayJobs

    if (found := embedded.find_ray(store)) is None:
        return None
    address, environment = found
    os.environ.update(environment)
    try:
        return RayJobs(address, store, None, {})
    except UserError:
        if "RAY_ADDRESS" in os.environ:
            raise
        return None  # the embedded one is about to begin or to end


def _logs(store: str) -> Path:
    return Path(store if storage.is_local(store) else ".") / "logs"


def _lineage(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    _find_tracking(storage.normalize(arguments.storage, Path.cwd()))
    from gru.registry import lineage, versions

    version = versions.find(arguments.model)
    with Console(stderr=True).status("") as status:
        links = lineage.trace(version, arguments.verify, status.update)
    if arguments.json:
        print(json.dumps([vars(link) for link in links], ensure_ascii=False))
    else:
        print(lineage.report(arguments.model, links))
    if any(link.state == "different" for link in links):
        entry.exit_now(1)


def _rollback(arguments: argparse.Namespace) -> None:
    config = entry.load_config(arguments.config, arguments.set)
    _find_tracking(config.storage)
    from gru.registry import versions

    version = versions.rollback(config.model_name)
    print(f"{version.name}@{versions.CHAMPION} is version {version.version} again", file=sys.stderr)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
