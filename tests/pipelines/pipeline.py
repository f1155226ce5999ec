"""A pipeline as its user runs it: `gru run`, and the other commands, as processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gru.digests import DIGESTS
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
GRU = [str(Path(sys.executable).with_name("gru"))]

CONFIG = """
name = "fables"
storage = "{storage}"
[corpus]
sources = ["{corpus}"]
template = "{{title}}\\n{{text}}"
heldout_share = 0.05
segment_tokens = 8192
[tokenizer]
vocab_size = 400
[model]
embedding = 128
hidden = 128
layers = 2
dropout = 0.1
[train]
steps = {steps}
batch_size = 16
sequence_length = 32
threads = 1
checkpoint_seconds = 1
heldout_steps = 100
[evaluate]
prompt = "The "
sample_tokens = 40
[serve]
port = {port}
poll_seconds = 0.5
slots = 8
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _command_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@dataclass
class Pipeline:
    """A `gru run` with its own storage and ports."""

    directory: Path
    corpus: Path
    serve_port: int
    ray_port: int
    mlflow_port: int
    steps: int
    process: subprocess.Popen[str] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    old_stderr: int = 0
    """Length of err.txt when the process was started."""

    @property
    def storage(self) -> Path:
        return self.directory / "store"

    @property
    def config(self) -> str:
        path = self.directory / "fables.toml"
        values = {"storage": self.storage, "corpus": self.corpus, "port": self.serve_port, "steps": self.steps}
        path.write_text(CONFIG.format(**values))
        return str(path)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.serve_port}"

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def ports(self) -> list[str]:
        """Options of the commands that execute workflows."""
        return [f"--ray-port={self.ray_port}", f"--mlflow-port={self.mlflow_port}"]

    @property
    def command(self) -> list[str]:
        return [*GRU, "run", self.config, *self.ports]

    @property
    def stderr(self) -> str:
        """Standard error of the process that was started last."""
        return (self.directory / "err.txt").read_text()[self.old_stderr :]

    def start(self) -> None:
        if (self.directory / "err.txt").exists():
            self.old_stderr = len((self.directory / "err.txt").read_text())
        with (self.directory / "out.txt").open("w") as out, (self.directory / "err.txt").open("a") as err:
            self.process = subprocess.Popen(
                self.command, cwd=self.directory, stdout=out, stderr=err, text=True, start_new_session=True
            )

    def newest_step(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        names = [p.parent.name for p in self.storage.glob(f"runs/*/step-*/{DIGESTS}")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def wait_for_stage(self, stage: str) -> None:
        def reached() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.stderr
            return f"{stage:9} running" in self.stderr

        wait_until(f"stage {stage}", reached)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.stderr
            return self.newest_step() >= step

        wait_until(f"a checkpoint at step {step}", reached)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_everything(self) -> None:
        """Kill the process and the embedded services, as a power failure would."""
        processes = self.service_processes()
        self.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def service_processes(self) -> list[psutil.Process]:
        processes = []
        for record in self.storage.glob("embedded/*.json"):
            root = psutil.Process(json.loads(record.read_text())["process"][0])
            processes += [root, *root.children(recursive=True)]
        return processes

    def job_processes(self, stage: str) -> list[psutil.Process]:
        """The driver processes of a stage's jobs."""
        command = ["-m", f"jobs.{stage}"]
        return [p for p in self.service_processes() if command[1] in (line := _command_of(p)) and command[0] in line]

    def status(self, part: str = "workflows") -> list[dict[str, Any]]:
        """What `gru status` says of the workflows, or of the endpoints."""
        command = [*GRU, "status", str(self.storage), "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[part]

    def wait_for_result(self) -> None:
        def result() -> dict[str, Any] | None:
            assert self.process is not None
            lines = (self.directory / "out.txt").read_text().splitlines()
            if lines:
                return json.loads(lines[-1])
            assert self.process.poll() is None, self.stderr
            return None

        self.result = wait_until("the result", result, 300)
