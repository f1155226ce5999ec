"""The whole of it, as its user runs it: killed with -9 in every stage, finished by the same command, used."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import openai
import psutil
import pytest
import torch

from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import open_dataset
from gru.digests import DIGESTS
from gru.evaluation import scores
from gru.model.inference import inference_model
from gru.registry.bundle import load_bundle
from gru.training.learner import Learner
from jobs import entry
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
GRU = [str(Path(sys.executable).with_name("gru"))]

STEPS = 1200  # some half a minute: long enough to be killed in

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
    """`gru run` on a storage and ports of the test's own."""

    directory: Path
    corpus: Path
    serve_port: int
    ray_port: int
    mlflow_port: int
    process: subprocess.Popen[str] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    shown: int = 0
    """Length of stderr when the process was started."""

    @property
    def storage(self) -> Path:
        return self.directory / "store"

    @property
    def config(self) -> str:
        path = self.directory / "fables.toml"
        path.write_text(CONFIG.format(storage=self.storage, corpus=self.corpus, port=self.serve_port, steps=STEPS))
        return str(path)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.serve_port}"

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def command(self) -> list[str]:
        return [*GRU, "run", self.config, f"--ray-port={self.ray_port}", f"--mlflow-port={self.mlflow_port}"]

    @property
    def stderr(self) -> str:
        """Of the process that was started last."""
        return (self.directory / "err.txt").read_text()[self.shown :]

    def start(self) -> None:
        if (self.directory / "err.txt").exists():
            self.shown = len((self.directory / "err.txt").read_text())
        with (self.directory / "out.txt").open("w") as out, (self.directory / "err.txt").open("a") as err:
            self.process = subprocess.Popen(
                self.command, cwd=self.directory, stdout=out, stderr=err, text=True, start_new_session=True
            )

    def newest_step(self) -> int:
        """Of the checkpoints that are whole; 0 without any."""
        found = [p.parent.name for p in self.storage.glob(f"runs/*/step-*/{DIGESTS}")]
        return max((int(name.split("-")[1]) for name in found), default=0)

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
        """As if the machine had lost power."""
        everything = self.stack_processes()
        self.kill()
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything, timeout=10)

    def stack_processes(self) -> list[psutil.Process]:
        processes = []
        for note in self.storage.glob("embedded/*.json"):
            root = psutil.Process(json.loads(note.read_text())["process"][0])
            processes += [root, *root.children(recursive=True)]
        return processes

    def job_processes(self, stage: str) -> list[psutil.Process]:
        """The drivers of a stage's jobs."""
        command = ["-m", f"jobs.{stage}"]
        return [p for p in self.stack_processes() if command[1] in (line := _command_of(p)) and command[0] in line]

    def status(self) -> list[dict[str, Any]]:
        command = [*GRU, "status", str(self.storage), "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def wait_for_result(self) -> None:
        def result() -> dict[str, Any] | None:
            assert self.process is not None
            lines = (self.directory / "out.txt").read_text().splitlines()
            if lines:
                return json.loads(lines[-1])
            assert self.process.poll() is None, self.stderr
            return None

        self.result = wait_until("the result", result, 300)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, fables: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"), fables, *free_ports(3))
    try:
        pipeline.start()
        pipeline.wait_for_stage("prepare")
        pipeline.kill()  # the workflow alone: Ray goes on with its job
        pipeline.start()
        pipeline.wait_for_step(1)
        pipeline.kill_everything()
        assert pipeline.newest_step() < STEPS, "it was to be killed while it trained"
        pipeline.start()
        pipeline.wait_for_stage("evaluate")
        pipeline.kill_everything()
        pipeline.start()
        pipeline.wait_for_stage("promote")
        pipeline.kill()
        pipeline.start()
        pipeline.wait_for_stage("serve")
        pipeline.kill_everything()
        pipeline.start()
        pipeline.wait_for_result()
        yield pipeline
    finally:
        subprocess.run([*GRU, "down", str(pipeline.storage)], capture_output=True)
        if pipeline.process and pipeline.process.poll() is None:
            pipeline.kill()


def test_the_result_says_where_everything_is(pipeline: Pipeline) -> None:
    result = pipeline.result
    assert (result["model"], result["version"], result["endpoint"]) == ("fables", "1", pipeline.endpoint)
    assert result["bits_per_byte"] < 1.5
    assert result["sample"].startswith("The ")
    with urllib.request.urlopen(result["tracking"]) as response:
        assert response.status == 200


def test_killed_and_resumed_training_ends_with_the_weights_of_an_undisturbed_one(pipeline: Pipeline) -> None:
    config = entry.load_config(pipeline.config, [])
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    dataset = open_dataset(str(manifest.parent))
    dataset.verify()
    segments = dataset.segments("train")
    end_of_text, vocab_size = dataset.manifest.end_of_text, dataset.manifest.vocab_size
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads)
    undisturbed = Learner(config.model, config.train, vocab_size, end_of_text)
    order = LaneOrder(
        [s.tokens for s in segments], config.train.seed, config.train.batch_size, config.train.sequence_length
    )
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), end_of_text, undisturbed.lanes) as reader:
        for step in range(config.train.steps):
            undisturbed.train_step(*reader.batch(step))
    torch.set_num_threads(threads)
    [bundle] = pipeline.storage.glob("runs/*/bundle")
    served = load_bundle(bundle).model.state_dict()

    def digest(state: dict[str, torch.Tensor]) -> str:
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

    assert digest(served) == digest(undisturbed.average.state_dict())


def test_rounding_its_weights_to_serve_it_costs_the_model_nothing_that_counts(pipeline: Pipeline) -> None:
    [bundle] = (load_bundle(path) for path in pipeline.storage.glob("runs/*/bundle"))
    decoder = inference_model(bundle.model)
    assert decoder is not bundle.model
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    dataset = open_dataset(str(manifest.parent))
    tokens = np.concatenate([dataset.read_segment(segment) for segment in dataset.segments("heldout")])
    heldout = scores.HeldoutText(tokens, dataset.manifest.end_of_text, len(tokens), len(tokens), "")
    scored, served = (scores.token_losses(model, heldout, 8).mean() for model in (bundle.model, decoder))
    assert served == pytest.approx(scored, rel=0.002)


def test_mlflow_has_each_step_once_and_the_true_status_of_every_run(pipeline: Pipeline) -> None:
    client = mlflow.MlflowClient(pipeline.tracking)
    experiment = client.get_experiment_by_name("fables")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"fables", "prepare", "train", "evaluate", "promote"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["fables"].info.run_id
    assert all(
        run.data.tags["mlflow.parentRunId"] == parent for name, run in runs.items() if name != "fables"
    )  # fmt: skip
    train = runs["train"]
    steps = [metric.step for metric in client.get_metric_history(train.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(10, STEPS + 1, 10))
    heldout = client.get_metric_history(train.info.run_id, "heldout/loss")
    assert [metric.step for metric in heldout] == list(range(100, STEPS + 1, 100))
    assert heldout[-1].value < heldout[0].value
    assert train.inputs.dataset_inputs[0].dataset.name == "fables"
    assert "system/cpu_utilization_percentage" in train.data.metrics
    assert "loss.png" in [file.path for file in client.list_artifacts(train.info.run_id)]
    evaluated = runs["evaluate"]
    assert len(client.list_artifacts(evaluated.info.run_id, "samples")) == 3
    assert {"context.png", "context.json"} <= {file.path for file in client.list_artifacts(evaluated.info.run_id)}
    assert {"ngram_bits_per_byte", "heldout/copied_share", "temperature-1/repetition"} <= set(evaluated.data.metrics)
    version = client.get_model_version_by_alias("fables", "champion")
    assert float(version.tags["bits_per_byte"]) == pipeline.result["bits_per_byte"]


def test_the_openai_client_gets_text_whole_and_streamed(pipeline: Pipeline) -> None:
    client = openai.OpenAI(base_url=f"{pipeline.endpoint}/v1", api_key="none")
    [model] = client.models.list().data
    assert model.id == "fables"
    request = {"model": "fables", "prompt": "The fox and the ", "max_tokens": 60, "temperature": 0.7, "seed": 5}
    whole = client.completions.create(**request)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 60
    streamed = list(client.completions.create(**request, stream=True))
    assert len(streamed) > 1
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    stopped = client.completions.create(**request, stop=["."], n=3)
    assert [choice.finish_reason for choice in stopped.choices] == ["stop"] * 3
    assert all("." not in choice.text for choice in stopped.choices)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**request, "model": "other"})


def test_gru_generate_writes_what_the_endpoint_does(pipeline: Pipeline) -> None:
    command = [*GRU, "generate", pipeline.config, "The crow", "--max-tokens=20", "--seed=1"]
    texts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("The crow")


def test_only_the_loopback_address_is_bound(pipeline: Pipeline) -> None:
    listening = [
        connection.laddr.ip
        for process in pipeline.stack_processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_submitted_job_ends_with_its_result_as_the_last_line(pipeline: Pipeline) -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(pipeline.storage / "embedded" / "ray-token"),
    }
    ray = str(Path(sys.executable).with_name("ray"))
    job = ["-m", "jobs.prepare", pipeline.config]
    command = [
        ray,
        "job",
        "submit",
        f"--address=http://127.0.0.1:{pipeline.ray_port}",
        "--working-dir=.",
        "--",
        "python",
    ]
    done = subprocess.run([*command, *job], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    [result] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert result["stage"] == "prepare"
    refused = subprocess.run(
        [*command, *job], cwd=ROOT, env={**environment, "RAY_AUTH_TOKEN_PATH": "/dev/null"}, capture_output=True
    )
    assert refused.returncode != 0


def test_a_better_version_takes_over_and_is_rolled_back(pipeline: Pipeline) -> None:
    """The endpoint follows @champion when it moves, without a restart. A job that is lost is tried again."""
    longer = [*pipeline.command, "--set", f"train.steps={STEPS + 100}", "--exit"]
    running = subprocess.Popen(
        longer, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until("the job", lambda: pipeline.job_processes("train"))[0].kill()
    out, err = running.communicate()
    assert running.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert "prepare   cached" in err
    assert result["version"] == "2"
    [*_, workflow] = pipeline.status()
    assert [(stage["name"], stage["attempts"]) for stage in workflow["stages"]][1] == ("train", 2)

    def served() -> str:
        with urllib.request.urlopen(f"{pipeline.endpoint}/v1/models") as response:
            return json.load(response)["data"][0]["version"]

    assert served() == ("2" if result["promoted"] else "1")
    client = mlflow.MlflowClient(pipeline.tracking)
    client.set_registered_model_alias("fables", "champion", "2")
    client.set_model_version_tag("fables", "2", "previous_champion", "1")
    wait_until("version 2", lambda: served() == "2", 30)
    rollback = subprocess.run([*GRU, "rollback", pipeline.config], capture_output=True, text=True)
    assert rollback.returncode == 0, rollback.stderr
    wait_until("version 1", lambda: served() == "1", 30)


def test_status_tells_what_each_workflow_has_done(pipeline: Pipeline) -> None:
    workflow, *_ = pipeline.status()
    assert workflow["state"] == "done"
    assert [stage["name"] for stage in workflow["stages"]] == ["prepare", "train", "evaluate", "promote", "serve"]
    assert {stage["state"] for stage in workflow["stages"]} == {"done"}
    assert sum(stage["seconds"] for stage in workflow["stages"]) <= workflow["seconds"]
    assert all(Path(stage["log"]).exists() for stage in workflow["stages"][:4])
    shown = subprocess.run([*GRU, "status", str(pipeline.storage)], capture_output=True, text=True, check=True).stdout
    assert workflow["id"] in shown and str(pipeline.storage / "logs") in shown
    lost = subprocess.run([*GRU, "status", str(pipeline.directory)], capture_output=True, text=True)
    assert lost.returncode == 2
    assert lost.stderr == f"error: {pipeline.directory}: no workflow has run with this storage\n"


def test_of_two_at_once_one_works_and_what_is_cancelled_stops_everywhere(pipeline: Pipeline) -> None:
    changes = ["--set", "train.steps=100000"]
    command = [*pipeline.command, *changes, "--exit"]
    killed = subprocess.Popen(command, cwd=pipeline.directory, stderr=subprocess.DEVNULL)
    wait_until("the job", lambda: pipeline.job_processes("train"))
    told = pipeline.directory / "told.txt"
    with told.open("w") as err:
        running = subprocess.Popen(command, cwd=pipeline.directory, stderr=err)
    wait_until("it to look on", lambda: "train     running" in told.read_text())
    assert "in another process" in told.read_text()
    killed.kill()
    killed.wait()
    wait_until("it to go on", lambda: " step " in told.read_text())
    [*_, workflow] = pipeline.status()
    assert workflow["state"] == "running"
    cancel = [*GRU, "cancel", pipeline.config, *changes]
    done = subprocess.run(cancel, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == f"cancelled {workflow['id']}\n", done.stderr
    assert running.wait(timeout=60) == 1
    assert told.read_text().splitlines()[-1].startswith("error: cancelled")
    assert not pipeline.job_processes("train")
    assert pipeline.status()[-1]["state"] == "cancelled"
    runs = mlflow.MlflowClient(pipeline.tracking).search_runs(
        [mlflow.MlflowClient(pipeline.tracking).get_experiment_by_name("fables").experiment_id]  # type: ignore[union-attr]
    )
    assert not [run for run in runs if run.info.status == "RUNNING"]
    again = subprocess.run(cancel, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (2, "error: no unfinished workflow of this config\n")


def test_a_sweep_that_is_killed_goes_on_and_finds_the_best(pipeline: Pipeline) -> None:
    stack = [f"--ray-port={pipeline.ray_port}", f"--mlflow-port={pipeline.mlflow_port}"]
    variants = ["--over", "train.steps=[20]", "--trial", "train.steps=200"]
    command = [*GRU, "sweep", pipeline.config, *variants, "--at-once=2", *stack]
    killed = subprocess.Popen(command, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_until("both jobs", lambda: len(pipeline.job_processes("train")) == 2)
    killed.kill()
    killed.wait()
    done = subprocess.run(command, cwd=pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"] == "train.steps=200"
    assert set(result["trials"]) == {"train.steps=20", "train.steps=200"}
    assert result["bits_per_byte"] == result["trials"]["train.steps=200"]["bits_per_byte"]
    assert "run best   gru run" in done.stderr and "--set train.steps=200" in done.stderr
    attempts = {stage["attempts"] for trial in pipeline.status()[-2:] for stage in trial["stages"][1:]}
    assert attempts == {1}, "each job once"
    client = mlflow.MlflowClient(pipeline.tracking)
    parent = client.get_run(result["tracking"].rsplit("/", 1)[1])
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    trials = client.search_runs([parent.info.experiment_id], below)
    assert {run.info.run_name for run in trials} == set(result["trials"])
    assert {run.info.status for run in [parent, *trials]} == {"FINISHED"}


def test_a_schedule_runs_what_run_does(pipeline: Pipeline) -> None:
    stack = [f"--ray-port={pipeline.ray_port}", f"--mlflow-port={pipeline.mlflow_port}"]
    command = [*GRU, "schedule", pipeline.config, "--cron", "* * * * * */5", *stack]
    with subprocess.Popen(
        command, cwd=pipeline.directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        results = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [result["bits_per_byte"] for result in results] == [pipeline.result["bits_per_byte"]] * 2
    with urllib.request.urlopen(f"{pipeline.endpoint}/ready") as response:
        assert response.status == 200, "what others use stays up"
    wrong = subprocess.run([*command[:4], "soon"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith('error: --cron "soon": expected minute, hour')


def test_lineage_leads_from_the_model_to_its_sources(pipeline: Pipeline) -> None:
    command = [*GRU, "lineage", "fables:1", "--verify", f"--storage={pipeline.storage}"]

    def states() -> tuple[int, dict[str, str]]:
        done = subprocess.run([*command, "--json"], capture_output=True, text=True)
        return done.returncode, {link["name"]: link["state"] for link in json.loads(done.stdout)}

    read = ("bundle", "checkpoint", "dataset", "tokenizer", "sources")
    whole = {"version": "found", "run": "found", **dict.fromkeys(read, "verified")}
    assert states() == (0, whole)
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(pipeline.corpus) in shown and "fables:1: version 1" in shown
    [dataset] = pipeline.storage.glob("datasets/*")
    shard = next(dataset.glob("train-*.parquet"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    assert states() == (1, whole | {"dataset": "different"})
    shard.write_bytes(data)
    away = dataset.rename(pipeline.directory / "away")
    assert states() == (0, whole | {"dataset": "absent", "sources": "absent"})
    away.rename(dataset)
    missing = subprocess.run([*GRU, "lineage", "fables@best", command[-1]], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, "error: fables@best: no version of a model 'fables' is @best\n")


def test_a_mistake_that_only_a_stage_can_find_is_one_line_too(pipeline: Pipeline) -> None:
    command = [*pipeline.command, "--set", "train.sequence_length=1000000", "--exit"]
    done = subprocess.run(command, cwd=pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the corpus has ")
    assert "train.sequence_length = 1000000" in done.stderr
    train = pipeline.status()[-1]["stages"][1]
    assert (train["state"], train["problem"]) == ("failed", done.stderr.splitlines()[-1].removeprefix("error: "))
    assert Path(train["log"]).exists()


@contextlib.contextmanager
def open_answers(pipeline: Pipeline) -> Iterator[list[list[str]]]:
    """Four answers of eight texts each, of which some seconds' work is left; at the end, how each text has ended."""
    client = openai.OpenAI(base_url=f"{pipeline.endpoint}/v1", api_key="none")
    [manifest] = pipeline.storage.glob("datasets/*/manifest.json")
    never_ending = {str(open_dataset(str(manifest.parent)).manifest.end_of_text): -100}
    request = {"model": "fables", "prompt": "A ", "max_tokens": 1000, "n": 8, "logit_bias": never_ending}
    streams = [client.completions.create(**request, stream=True) for _ in range(4)]
    finished: list[list[str]] = []

    def read(stream: openai.Stream[Any]) -> None:
        ends = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        finished.append([end for end in ends if end])

    readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams]
    for reader in readers:
        reader.start()
    yield finished
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


def test_told_to_stop_it_finishes_answers_leaves_no_process_and_goes_on_where_it_was(pipeline: Pipeline) -> None:
    assert pipeline.process is not None
    back = subprocess.run([*pipeline.command, "--exit"], cwd=pipeline.directory, capture_output=True, text=True)
    assert back.returncode == 0, back.stderr  # a cluster has one endpoint, and the last test had it elsewhere
    processes = pipeline.stack_processes()
    assert len(processes) > 5
    with open_answers(pipeline) as finished:
        pipeline.process.send_signal(signal.SIGTERM)  # as Ctrl-C
        assert pipeline.process.wait(60) == 130
    assert "stopping when" in pipeline.stderr
    assert finished == [["length"] * 8] * 4
    left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left
    done = subprocess.run([*pipeline.command, "--exit"], cwd=pipeline.directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("prepare", "train", "evaluate", "promote"):
        assert f"{stage:9} cached" in done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert {k: again[k] for k in ("version", "bits_per_byte", "sample")} == {
        k: pipeline.result[k] for k in ("version", "bits_per_byte", "sample")
    }
    assert not list(pipeline.storage.glob("embedded/*.json")), "--exit leaves nothing running either"
