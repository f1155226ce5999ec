"""Training runs on a cluster that the test owns, started as a user does: `python -m jobs.train`.

Tests disturb them in every way and compare each with a run that was not disturbed.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import torch
from ray._private.node import Node as ClusterNode
from ray.cluster_utils import Cluster

from gru.config import PipelineConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.dataset import Dataset, open_dataset
from gru.digests import DIGESTS
from gru.training import checkpoint as checkpoints
from gru.training.learner import Learner
from jobs import entry
from tests.waiting import wait_until

MODEL = {"embedding": 48, "hidden": 96, "layers": 2, "dropout": 0.1, "precision": "fp32"}
TRAIN = {
    "steps": 800,
    "batch_size": 8,
    "sequence_length": 32,
    "workers": 2,
    "threads": 1,
    "log_steps": 5,
    "heldout_steps": 100,
    "heldout_tokens": 4000,
    "checkpoint_steps": 20,
}


@contextmanager
def cluster_of(*cpus: int) -> Iterator[Cluster]:
    """A cluster of a head and other nodes, with these numbers of logical CPUs."""
    head, *others = cpus
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, "include_dashboard": False})
    try:
        for number in others:
            cluster.add_node(num_cpus=number)
        yield cluster
    finally:
        cluster.shutdown()


@dataclass
class Site:
    """A directory with a corpus that was prepared once, for many runs."""

    directory: Path
    corpus: Path
    tracking: str

    def config(self, name: str, **train: Any) -> dict[str, Any]:
        return {
            "name": "fables",
            "storage": str(self.directory / name),
            "corpus": {"sources": [str(self.corpus)], "segment_tokens": 1024},
            "tokenizer": {"kind": "char"},
            "model": MODEL,
            "train": TRAIN | train,
            "registry": {"experiment": name},
        }

    def environment(self, cluster: Cluster) -> dict[str, str]:
        return os.environ | {"RAY_ADDRESS": cluster.address, "MLFLOW_TRACKING_URI": self.tracking}

    def prepare(self, cluster: Cluster) -> None:
        artifacts = str(self.directory / "artifacts")
        mlflow.MlflowClient(self.tracking).create_experiment("prepared", artifact_location=artifacts)
        command = [sys.executable, "-m", "jobs.prepare", json.dumps(self.config("prepared"))]
        subprocess.run(command, env=self.environment(cluster), check=True, capture_output=True)

    def run(self, cluster: Cluster, name: str, **train: Any) -> "Training":
        """Return a run that is not started yet, on a copy of the dataset. Its MLflow experiment has the same name."""
        shutil.copytree(self.directory / "prepared" / "datasets", self.directory / name / "datasets")
        training = Training(self, cluster, name, self.config(name, **train))
        training.move_dataset(str(self.directory / name))
        artifacts = str(self.directory / name / "artifacts")
        mlflow.MlflowClient(self.tracking).create_experiment(name, artifact_location=artifacts)
        return training


@dataclass
class Training:
    """One run: its job's process, its files and its record in MLflow."""

    site: Site
    cluster: Cluster
    name: str
    config: dict[str, Any]
    process: "subprocess.Popen[str] | None" = None

    def move_dataset(self, storage: str) -> None:
        """Change the dataset's directory in the result of its preparation."""
        [path] = self.storage.glob("datasets/*/result.json")
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"dataset": f"{storage}/datasets/{path.parent.name}"}))

    @property
    def storage(self) -> Path:
        return self.site.directory / self.name

    @property
    def stderr(self) -> str:
        return (self.storage / "err.txt").read_text()

    @property
    def directory(self) -> Path:
        """The run's directory, with its checkpoints and its bundle."""
        [path] = self.storage.glob("runs/*")
        return path

    def start(self) -> "Training":
        with (self.storage / "out.txt").open("w") as out, (self.storage / "err.txt").open("a") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", json.dumps(self.config)],
                env=self.site.environment(self.cluster),
                stdout=out,
                stderr=err,
                text=True,
            )
        return self

    def wait_for_step(self, step: int, seconds: float = 120) -> int:
        """Wait for a complete checkpoint of this step or a later one; return its step."""

        def reached() -> int:
            self._assert_running()
            return self.newest_step() if self.newest_step() >= step else 0

        return wait_until(f"step {step}", reached, seconds)

    def wait_for_line(self, part: str, seconds: float = 120) -> None:
        def shown() -> bool:
            self._assert_running()
            return part in self.stderr

        wait_until(f"{part!r} in {self.stderr[-500:]!r}", shown, seconds)

    def _assert_running(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, self.stderr

    def newest_step(self) -> int:
        complete = [path.parent.name for path in self.storage.glob(f"runs/*/step-*/{DIGESTS}")]
        return max((int(name.split("-")[1]) for name in complete), default=0)

    def workers(self) -> list[psutil.Process]:
        return self._processes("ray::RayTrainWorker")

    def controllers(self) -> list[psutil.Process]:
        return self._processes("ray::TrainController.run")

    def _processes(self, title: str) -> list[psutil.Process]:
        processes = []
        for node in self.cluster.list_all_nodes():
            with suppress(psutil.NoSuchProcess):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                processes += [process for process in raylet.children() if process.cmdline()[:1] == [title]]
        return processes

    def wait_for_workers(self, number: int, seconds: float = 120) -> list[psutil.Process]:
        def up() -> list[psutil.Process]:
            self._assert_running()
            return self.workers() if len(self.workers()) == number else []

        return wait_until(f"{number} workers", up, seconds)

    def node_with_a_worker(self) -> ClusterNode:
        """Return a node with a worker, other than that of the driver and its controller."""
        with_workers = {worker.ppid() for worker in self.workers()} - {
            controller.ppid() for controller in self.controllers()
        }
        nodes = self.cluster.worker_nodes
        return next(node for node in nodes if node.all_processes["raylet"][0].process.pid in with_workers)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = 180) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def finish(self) -> None:
        assert self.wait() == 0, self.stderr

    def weights(self) -> str:
        return hashlib.sha256((self.directory / "bundle" / "weights.safetensors").read_bytes()).hexdigest()

    def logged(self) -> list[int]:
        """Return the steps of the points in MLflow, in the order in which they were logged."""
        [run] = self._mlflow_runs()
        return [metric.step for metric in self._client().get_metric_history(run.info.run_id, "train/loss")]

    def samples(self) -> list[str]:
        """Return the paths of the samples in MLflow."""
        [run] = self._mlflow_runs()
        return [file.path for file in self._client().list_artifacts(run.info.run_id, "samples")]

    def status(self) -> str:
        [run] = self._mlflow_runs()
        return run.info.status

    def _client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.site.tracking)

    def _mlflow_runs(self) -> list[Any]:
        experiment = self._client().get_experiment_by_name(self.name)
        return self._client().search_runs([experiment.experiment_id], "attributes.run_name = 'train'")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def undisturbed(config: PipelineConfig, dataset: Dataset, steps: int) -> Learner:
    """Train the same in one process, without Ray."""
    segments, manifest = dataset.segments("train"), dataset.manifest
    order = LaneOrder(
        [s.tokens for s in segments], config.train.seed, config.train.batch_size, config.train.sequence_length
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learner = Learner(config.model, config.train, manifest.vocab_size, manifest.end_of_text)
    try:
        with LaneReader(
            order, lambda i: dataset.read_segment(segments[i]), manifest.end_of_text, learner.lanes
        ) as reader:
            while learner.step < steps:
                learner.train_step(*reader.batch(learner.step))
    finally:
        torch.set_num_threads(threads)
    return learner


def assert_same(actual: checkpoints.Checkpoint, expected: Learner) -> None:
    """Assert equal bits of weights, average, optimizer and the carried states of all lanes."""
    assert actual.step == expected.step
    for stem, tensors in expected.checkpoint({}).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(actual.tensors[stem][name], tensor), (stem, name)


def logged_steps(steps: int) -> list[int]:
    return list(range(TRAIN["log_steps"], steps + 1, TRAIN["log_steps"]))


def undisturbed_weights(run: Training) -> str:
    run.start().finish()
    assert run.logged() == logged_steps(run.config["train"]["steps"])
    assert run.status() == "FINISHED"
    return run.weights()


def assert_as_undisturbed(run: Training, expected: str) -> None:
    assert run.weights() == expected
    assert run.logged() == logged_steps(run.config["train"]["steps"])
    assert run.status() == "FINISHED"


def assert_newest_as_undisturbed(run: Training) -> checkpoints.Checkpoint:
    """Assert that a stopped run is at the same bits as one undisturbed process, and has logged each step once.

    Return its newest checkpoint.
    """
    newest = checkpoints.load(checkpoints.paths(str(run.directory))[0])
    [manifest] = run.storage.glob("datasets/*/manifest.json")
    config = entry.load_config(json.dumps(run.config), [])
    assert_same(newest, undisturbed(config, open_dataset(str(manifest.parent)), newest.step))
    assert run.logged() == logged_steps(newest.step)
    return newest


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
