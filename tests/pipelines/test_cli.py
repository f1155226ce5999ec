"""The `gru` command: its help, its arguments, and the commands that need no service."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gru.config import PipelineConfig
from pipelines import cli

GRU = [sys.executable, "-c", "from pipelines.cli import main; main()"]
ROOT = Path(__file__).parents[2]
COMMANDS = [
    "run",
    "schedule",
    "sweep",
    "cancel",
    "down",
    "clean",
    "init",
    "look",
    "status",
    "lineage",
    "schema",
    "generate",
    "rollback",
    "key",
]


def gru(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*GRU, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[:2] for line in lines if line.startswith("    ") and line[4] != " "]
    assert [words[0] for words in starts] == COMMANDS
    assert all(len(words) == 2 for words in starts)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_argument_of_a_command_has_help(command: str) -> None:
    [subparsers] = [each for each in cli.build_parser()._actions if each.choices]
    assert subparsers.choices is not None
    actions = dict(subparsers.choices)[command]._actions  # type: ignore[call-overload]
    assert [action.dest for action in actions if not action.help] == []


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    script = """
import os, signal, sys
from pipelines import cli, commands
def show(arguments):
    print([signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGHUP, signal.SIGTERM)])
commands.schema = show
sys.argv = ["gru", "schema"]
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[True, False]\n", done.stderr


@pytest.mark.parametrize("key", ["gru-a b", "gru-\u00e4", "gru-a\nb"])
def test_a_malformed_api_key_is_an_error_that_does_not_show_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "c.toml").write_text('[corpus]\nsources = ["a.txt"]\n')
    command = [*GRU, "generate", str(tmp_path / "c.toml"), "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "GRU_API_KEY": key})
    assert done.returncode == 2 and done.stderr.startswith("error: GRU_API_KEY: must be one word"), done.stderr
    assert key not in done.stderr


def test_schema_prints_the_json_schema_of_the_configuration() -> None:
    done = gru("schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == PipelineConfig.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "C", "--at-once=0"], "argument --at-once: '0' must be an integer >= 1"),
        (["generate", "C", "--tokens=0"], "argument --tokens/--max-tokens: '0' must be an integer >= 1"),
        (["generate", "C", "--stop="], "argument --stop: must not be empty"),
        (["clean", "S", "--older-than=-1"], "argument --older-than: '-1' must be a number >= 0"),
        (["init", "P", "--minutes=0"], "argument --minutes: '0' must be a number > 0"),
        (["run", "C", "--ray-port=65536"], "argument --ray-port: '65536' must be a port number, 1 to 65535"),
        (["run", "C", "--mlflow-port=http"], "argument --mlflow-port: 'http' must be a port number, 1 to 65535"),
    ],
)
def test_a_wrong_argument_is_reported(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.build_parser().parse_args(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
