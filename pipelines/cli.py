"""The `gru` command: its arguments and exit status. Its commands are in commands.py and workflow_commands.py."""

import argparse
import math
import signal
import sys
from types import FrameType
from typing import Any

from gru.errors import GaveUp, find_user_error
from jobs import entry
from pipelines import commands, workflow_commands
from pipelines.interrupts import STOP_SIGNALS

Subparsers = Any
"""The result of argparse's add_subparsers, which has no public type."""


def main() -> None:
    arguments = build_parser().parse_args()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so must this process
            signal.signal(number, _interrupt)
    entry.prepare_libraries()
    try:
        status = arguments.command(arguments)
    except KeyboardInterrupt:
        entry.exit_now(130)  # threads that still follow a job must not hold the process
    except Exception as error:
        from pipelines.ray_jobs import JobFailed
        from pipelines.service import ServiceFailed

        mistake = find_user_error(error)
        if mistake is None and not isinstance(error, GaveUp | JobFailed | ServiceFailed):
            raise
        print(f"error: {mistake or error}", file=sys.stderr)
        entry.exit_now(2 if mistake else 1)
    entry.exit_now(status or 0)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gru",
        description="Turn text into a GRU text generator: trained, registered and served.",
        epilog="Embedded services are the Ray head and the MLflow server that run, schedule and sweep start on this "
        "machine where RAY_ADDRESS and MLFLOW_TRACKING_URI name no others.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_workflow_commands(subparsers)
    _add_stop_commands(subparsers)
    _add_inspection_commands(subparsers)
    _add_serving_commands(subparsers)
    return parser


def _add_workflow_commands(subparsers: Subparsers) -> None:
    """Add run, schedule and sweep."""
    run = subparsers.add_parser(
        "run",
        help="prepare, train, evaluate, promote and serve; the same command resumes after a crash",
        description="Prepare, train, evaluate, promote and serve. Before it waits for Ctrl-C, print the result as JSON "
        "on stdout.\nAfter a crash the same command resumes. If CONFIG or the sources have changed, it starts another "
        "run,\nwhich reuses the stages whose inputs are the same.",
    )
    entry.add_config_arguments(run)
    run.add_argument("--exit", action="store_true", help="exit after the summary instead of serving until Ctrl-C")
    run.set_defaults(command=workflow_commands.run)

    schedule = subparsers.add_parser(
        "schedule",
        help="stay up; at the times of --cron, read the sources again and do all stages",
        description="Stay up, and do what `run` does at the times of --cron with the sources as they are then.\nStages "
        "whose inputs are the same are reused. After the first time, the endpoint stays up.",
    )
    entry.add_config_arguments(schedule)
    schedule.add_argument(
        "--cron",
        required=True,
        metavar="EXPRESSION",
        help='minute, hour, day of month, month and weekday, in local time, such as "0 3 * * *"',
    )
    schedule.set_defaults(command=workflow_commands.schedule)

    sweep = subparsers.add_parser(
        "sweep",
        help="train and evaluate variants of a config, rank them, promote none",
        description="Train and evaluate variants of CONFIG, rank them by bits per byte, and print the command for the "
        "best.\nNone is promoted. CONFIG unchanged is a variant only if an option gives its values.",
    )
    entry.add_config_arguments(sweep)
    sweep.add_argument(
        "--over",
        metavar="KEY=[VALUE, ...]",
        action="append",
        default=[],
        help="try each of these values; given for several keys, try every combination",
    )
    sweep.add_argument(
        "--trial",
        metavar="KEY=VALUE",
        nargs="+",
        action="append",
        default=[],
        help="also try one variant with these overrides (repeatable)",
    )
    sweep.add_argument(
        "--at-once", type=_positive, default=1, metavar="N", help="number of trials that run at the same time (1)"
    )
    sweep.set_defaults(command=workflow_commands.sweep)

    for parser in (run, schedule, sweep):
        _add_port_arguments(parser)


def _add_port_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-port", type=_port, default=8265, metavar="PORT", help="port of the embedded Ray head (8265)"
    )
    parser.add_argument(
        "--mlflow-port", type=_port, default=5000, metavar="PORT", help="port of the embedded MLflow server (5000)"
    )


def _add_stop_commands(subparsers: Subparsers) -> None:
    """Add cancel and down."""
    cancel = subparsers.add_parser(
        "cancel",
        help="stop the run or sweep of a config; the same command resumes it",
        description="Stop the unfinished run or sweep of CONFIG, for which the same --set options are needed.\nThe "
        "command that started it resumes it with the results that exist.",
    )
    entry.add_config_arguments(cancel)
    cancel.set_defaults(command=commands.cancel)

    down = subparsers.add_parser(
        "down",
        help="stop the embedded services of a storage, also those that a `gru run` uses",
        description="Stop the Ray head and the MLflow server that `gru run` started on this machine for this storage, "
        "with the jobs and the endpoint on them, also if that `gru run` is still up.",
    )
    _add_storage_argument(down)
    down.set_defaults(command=commands.down)


def _add_inspection_commands(subparsers: Subparsers) -> None:
    """Add init, look, status, lineage, schema."""
    init = subparsers.add_parser(
        "init",
        help="look at text, measure this machine, and print a config for it",
        description="Read a sample of the text, measure for seconds how fast this machine trains, and print a\n"
        "config on stdout, each line with its reason, and a report on stderr: `gru init PATH > my.toml`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("paths", metavar="PATH", nargs="+", help="file, directory, glob or URL with the text")
    init.add_argument(
        "--minutes", type=_positive_number, default=30.0, metavar="N", help="time for training, at most (30)"
    )
    init.add_argument("--name", metavar="NAME", help="name of the pipeline and its model (default: from the path)")
    init.set_defaults(command=commands.init)

    look = subparsers.add_parser(
        "look",
        help="show in seconds what a config makes of its text: files, fields, documents, what is left out, time",
        description="Read a sample of the corpus, and show the files, the fields of records, some documents as they "
        "will be,\nwhat would be left out and why, and the expected documents, tokens and time. Nothing is written.",
    )
    entry.add_config_arguments(look)
    look.set_defaults(command=commands.look)

    status = subparsers.add_parser("status", help="list the workflows of a storage and their current stage")
    _add_storage_argument(status)
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    status.set_defaults(command=commands.status)

    lineage = subparsers.add_parser(
        "lineage",
        help="show which run, checkpoint, dataset and sources a registered model was made from",
        description="Show which run, checkpoint, dataset and sources a registered model was made from. The "
        "MLflow server must be up. The exit status is 1 if one of them differs, not if a checkpoint or dataset was "
        "deleted, which is shown as absent.",
    )
    lineage.add_argument("model", metavar="MODEL", help="NAME (its champion), NAME@ALIAS or NAME:VERSION")
    lineage.add_argument(
        "--verify",
        action="store_true",
        help="read all files that still exist, and compare them with what the model was made from",
    )
    lineage.add_argument("--json", action="store_true", help="print JSON instead of a report")
    lineage.add_argument(
        "--storage",
        default="./store",
        metavar="PATH",
        help="storage whose embedded MLflow server is used if MLFLOW_TRACKING_URI is not set (./store)",
    )
    lineage.set_defaults(command=commands.lineage)

    schema = subparsers.add_parser("schema", help="print the JSON Schema of the configuration, for editors")
    schema.set_defaults(command=commands.schema)


def _add_serving_commands(subparsers: Subparsers) -> None:
    """Add generate, rollback, key."""
    generate = subparsers.add_parser(
        "generate",
        help="print a text that the endpoint generates, while it is up",
    )
    entry.add_config_arguments(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="beginning of the text")
    generate.add_argument("--max-tokens", type=int, default=200, metavar="N", help="length limit, in tokens (200)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="sampling temperature; 0: most likely tokens (0.8)"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="seed of the sampling (default: random)")
    environment = f"environment:\n  {commands.KEY_VARIABLE}  API key, if the endpoint requires one"
    generate.epilog = f"{environment}\n\n{generate.epilog}"
    generate.set_defaults(command=commands.generate)

    rollback = subparsers.add_parser(
        "rollback",
        help="move @champion back to the version that had it before",
        description="Move @champion back to the version that had it before; a second rollback moves it one further "
        "back.\nThe MLflow server must be up.",
    )
    entry.add_config_arguments(rollback)
    rollback.add_argument("--to", metavar="VERSION", help="move @champion to this version instead, such as a newer one")
    rollback.set_defaults(command=commands.rollback)

    key = subparsers.add_parser(
        "key",
        help="print a new API key, and a line to add to the file `serve.keys`",
        description="Print a new API key, and a line to add to the file that serve.keys names. No file is written.",
    )
    key.add_argument("owner", metavar="OWNER", help="name of the key's user, which appears in the request log")
    key.set_defaults(command=commands.key)


def _add_storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "storage",
        nargs="?",
        default="./store",
        metavar="STORAGE",
        help="storage path, as in the config (./store)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 1")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number > 0")
    return number


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port number, 1 to 65535")
    return int(text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
