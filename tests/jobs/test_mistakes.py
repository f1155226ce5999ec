"""A user's mistake is reported in one line with status 2, before a result is written."""

import gzip
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
storage = "store"
[corpus]
sources = ["corpus.txt"]
heldout = "tail"
heldout_share = 0.1
[tokenizer]
kind = "byte"
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "corpus.txt").write_text("A crow met a fox.\n" * 100)
    return tmp_path


def fail(directory: Path, *command: str) -> str:
    """Return the error line of a command that must fail because of a user's mistake."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not list(directory.glob("store/**/manifest.json"))
    assert not list(directory.glob("store/**/result.json"))
    return line


def prepare(directory: Path, *overrides: str) -> str:
    sets = [part for override in overrides for part in ("--set", override)]
    return fail(directory, sys.executable, "-m", "jobs.prepare", "config.toml", *sets)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=1", "config.toml: train.stpes: unknown key"),
        ("train.steps=soon", "config.toml: train.steps: "),
        ("corpus.sources=['none.txt']", "no such file: .*none.txt"),
        ("train.init_from=./none", 'train.init_from = "/.*/none": no bundle and no checkpoint'),
        ("storage=/proc/store", "storage = '/proc/store': cannot write there"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(directory: Path, override: str, message: str) -> None:
    assert re.search(message, prepare(directory, override))


def test_a_missing_configuration_is_named(directory: Path) -> None:
    line = fail(directory, sys.executable, "-m", "jobs.prepare", "nothing.toml")
    assert line == "error: nothing.toml: cannot read the configuration: No such file or directory"


def test_an_empty_corpus_is_named(directory: Path) -> None:
    (directory / "corpus.txt").write_text("")
    assert re.search(r"no document to train on in .*corpus.txt", prepare(directory, "corpus.heldout=hash"))


def test_text_that_is_not_utf8_is_named_with_its_place(directory: Path) -> None:
    (directory / "corpus.txt").write_bytes(b"A crow\n" * 10 + b"\xff\n" + b"A fox\n" * 10)
    assert "corpus.txt: not valid UTF-8 at byte 70" in prepare(directory, "corpus.on_bad=fail")


def test_a_truncated_file_is_named(directory: Path) -> None:
    lines = "".join(f'{{"text": "{os.urandom(20).hex()}"}}\n' for _ in range(500))
    data = gzip.compress(lines.encode())
    (directory / "corpus.jsonl.gz").write_bytes(data[: len(data) // 2])
    sources = ("corpus.sources=['corpus.jsonl.gz']", "corpus.heldout=hash")
    assert "corpus.jsonl.gz: cannot be read to its end" in prepare(directory, *sources, "corpus.on_bad=fail")


def test_an_endpoint_out_of_reach_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head.invalid:8265")
    line = fail(directory, str(Path(sys.executable).with_name("gru")), "run", "config.toml", "--exit")
    assert "serve.host = '127.0.0.1' does not reach head.invalid (RAY_ADDRESS) from here" in line


def test_a_stage_without_mlflow_is_refused(directory: Path) -> None:
    assert "MLFLOW_TRACKING_URI is not set" in fail(directory, sys.executable, "-m", "jobs.train", "config.toml")


@pytest.mark.parametrize(
    ("option", "named"), [("--mlflow-port={}", "--mlflow-port"), ("--set=serve.port={}", "serve.port")]
)
def test_a_port_in_use_is_named_with_its_option(directory: Path, option: str, named: str) -> None:
    gru = str(Path(sys.executable).with_name("gru"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fail(directory, gru, "run", "config.toml", option.format(port), "--exit")
    assert f"port {port} is in use" in line
    assert named in line
