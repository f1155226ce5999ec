"""The `gru` command: its arguments and exit status. Its commands are in commands.py and workflow_commands.py."""

import argparse
import math
import signal
import sys
from datetime import date
from types import FrameType
from typing import Any

from gru.errors import GaveUp, find_user_error
from jobs import entry
from pipelines import commands, workflow_commands
from pipelines.interrupts import STOP_SIGNALS

Subparsers = Any
"""The result of argparse's add_subparsers, which has no public type."""


class CommandParser(argparse.ArgumentParser):
    """A parser of one command that takes options before, between and after all arguments, also an optional one."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:  # argparse's own calls
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


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
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    _add_run_command(subparsers)
    _add_workflow_commands(subparsers)
    _add_stop_commands(subparsers)
    _add_inspection_commands(subparsers)
    _add_serving_commands(subparsers)
    return parser


def _add_run_command(subparsers: Subparsers) -> None:
    run = subparsers.add_parser(
        "run",
        help="prepare, train, evaluate, promote and serve; the same command resumes after a crash",
        description="Prepare, train, evaluate, promote and serve. Before it waits for Ctrl-C, print the result as JSON "
        "on stdout.\nAfter a crash the same command resumes. If CONFIG or the sources have changed, it starts another "
        "run,\nwhich reuses the stages whose inputs are the same. For text, it first writes NAME.toml as `gru init` "
        "does,\nunless that exists.",
    )
    entry.add_config_arguments(
        run, metavar="CONFIG|PATH", nargs="+", help="TOML file, or the text: files, directories, globs or URLs"
    )
    _add_proposal_arguments(run)
    run.add_argument("--exit", action="store_true", help="exit after the summary instead of serving until Ctrl-C")
    run.set_defaults(command=workflow_commands.run)
    _add_port_arguments(run)


def _add_workflow_commands(subparsers: Subparsers) -> None:
    """Add schedule and sweep."""
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

    for parser in (schedule, sweep):
        _add_port_arguments(parser)


def _add_port_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-port", type=_port, default=8265, metavar="PORT", help="port of the embedded Ray head (8265)"
    )
    parser.add_argument(
        "--mlflow-port", type=_port, default=5000, metavar="PORT", help="port of the embedded MLflow server (5000)"
    )


def _add_proposal_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=_positive_number, metavar="N", help="time for training on the text, at most (30)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the pipeline and its model (default: from the path)")


def _add_stop_commands(subparsers: Subparsers) -> None:
    """Add cancel, down and clean."""
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

    clean = subparsers.add_parser(
        "clean",
        help="list what nothing in a storage, the cache and /tmp/ray needs any more, and remove it once confirmed",
        description="List what no unfinished workflow, no newest run of a pipeline and no registered version needs, "
        "with its size and age,\nand remove it once confirmed. Registered models, and the datasets and checkpoints "
        "of their lineage, stay.\nAlso what this user's embedded Rays left in /tmp/ray.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_storage_argument(clean)
    clean.add_argument("--dry-run", action="store_true", help="only list it")
    clean.add_argument("--yes", action="store_true", help="remove it without asking")
    clean.add_argument(
        "--older-than",
        type=_days,
        default=1.0,
        metavar="DAYS",
        help="only what did not change for so long (1), which protects jobs.* started by hand on other machines",
    )
    clean.add_argument(
        "--lineage",
        action="store_true",
        help="also datasets and checkpoints of versions without an alias: `gru lineage` then reports them as absent",
    )
    clean.set_defaults(command=commands.clean)


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
    _add_proposal_arguments(init)
    init.set_defaults(command=commands.init)

    look = subparsers.add_parser(
        "look",
        help="show in seconds what a config makes of its text: files, fields, documents, what is left out, time",
        description="Read a sample of the corpus, and show the files, the fields of records, some documents as they "
        "will be,\nwhat would be left out and why, and the expected documents, tokens and time. Nothing is written.",
    )
    entry.add_config_arguments(look)
    look.set_defaults(command=commands.look)

    status = subparsers.add_parser(
        "status",
        help="list the workflows of a storage and their current stage, and what its endpoint serves",
        epilog=f"environment:\n  {entry.KEY_VARIABLE}  API key, if the endpoint requires one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    _add_version_storage_argument(lineage)
    lineage.set_defaults(command=commands.lineage)

    schema = subparsers.add_parser("schema", help="print the JSON Schema of the configuration, for editors")
    schema.set_defaults(command=commands.schema)


def _add_serving_commands(subparsers: Subparsers) -> None:
    """Add generate, rollback, key."""
    generate = subparsers.add_parser(
        "generate",
        help="print a text, from the endpoint or from a bundle; without a prompt, at a terminal, one after another",
        description="Print the prompt and the text with which a model continues it: from the endpoint of CONFIG if it "
        "is up,\nelse from the champion's bundle. Endpoint and bundle give the same text for the same seed. At a "
        "terminal\nand without a PROMPT, continue what you type; otherwise a PROMPT that is not given is read from "
        "stdin.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"environment:\n  {entry.KEY_VARIABLE}  API key, if the endpoint requires one",
    )
    generate.add_argument(
        "model",
        metavar="MODEL",
        help="TOML file (CONFIG), directory or URL of a bundle or a run, or NAME@ALIAS or NAME:VERSION in MLflow",
    )
    generate.add_argument("prompt", metavar="PROMPT", nargs="?", help="beginning of the text")
    _add_sampling_arguments(generate)
    entry.add_override_argument(generate)
    _add_version_storage_argument(generate)
    generate.set_defaults(command=commands.generate)

    rollback = subparsers.add_parser(
        "rollback",
        help="move @champion back to the version that had it before, or to any version",
        description="Move @champion back to the version that had it before; a second rollback moves it one further "
        "back.\nWith --to it moves forward again, too: then the next rollback undoes that. The MLflow server must be "
        "up.",
    )
    entry.add_config_arguments(rollback)
    rollback.add_argument(
        "--to", metavar="VERSION", help="move @champion to this version instead, an older or newer one"
    )
    rollback.set_defaults(command=commands.rollback)

    key = subparsers.add_parser(
        "key",
        help="print a new API key, and a line to add to the file `serve.keys`",
        description="Print a new API key, and a line to add to the file that serve.keys names. No file is written.",
    )
    key.add_argument("owner", metavar="OWNER", help="name of the key's user, which appears in the request log")
    key.add_argument(
        "--until", type=_date, metavar="DATE", help="last day on which it is valid, in UTC, such as 2030-12-31"
    )
    key.set_defaults(command=commands.key)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", "--max-tokens", type=_positive, default=200, metavar="N", help="length limit, in tokens (200)"
    )
    for option, kind, default, meaning in (
        ("--temperature", float, 0.8, "sampling temperature; 0: most likely tokens"),
        ("--top-p", float, 1.0, "sample from the likeliest tokens that have this probability together; 1: all"),
        ("--top-k", int, 0, "sample from this many likeliest tokens; 0: all"),
        ("--min-p", float, 0.0, "sample from tokens at least this many times as likely as the likeliest; 0: all"),
        ("--repetition-penalty", float, 1.0, "above 1: make tokens less likely that the text has already"),
    ):
        metavar = "N" if kind is int else "X"
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{meaning} ({default})")
    parser.add_argument(
        "--stop", type=_text, action="append", default=[], metavar="TEXT", help="end the text before this (repeatable)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling (default: random)")


def _add_version_storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        default="./store",
        metavar="PATH",
        help="storage whose registered models are meant if MLFLOW_TRACKING_URI is not set (./store)",
    )


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


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a date, such as 2030-12-31") from None


def _days(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number >= 0")
    return number


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port number, 1 to 65535")
    return int(text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
