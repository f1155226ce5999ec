"""One training run that every test disturbs in turn: kills, damage, a stalled worker, a full disk, absent storage.

Each test begins when the run has recovered from the one before. The last test stops the run and compares it with one
process that was never disturbed: the same weights, optimizer and states, to the bit, and each step logged once. For
that the gradients are summed in a fixed order (`bitwise_elastic`).
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from gru.digests import DIGESTS
from gru.training import checkpoint as checkpoints
from tests.gru.training.runs import (
    TRAIN,
    Site,
    Training,
    assert_newest_as_undisturbed,
    cluster_of,
    kill_all,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.faults


class DisturbedRun:
    """The run, and the part of its messages that it has printed since the present test began."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.offset = 0

    @property
    def messages(self) -> str:
        return self.training.stderr[self.offset :]

    def wait_for_message(self, part: str, seconds: float = 120) -> None:
        def shown() -> bool:
            assert self.training.process is not None and self.training.process.poll() is None, self.training.stderr
            return part in self.messages

        wait_until(f"{part!r} in {self.messages[-500:]!r}", shown, seconds)

    def advance(self, steps: int) -> int:
        """Wait for a complete checkpoint at least `steps` after the newest one. Return its step."""
        return self.training.wait_for_step(self.training.newest_step() + steps)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes, of which two workers need two."""
    with cluster_of(1, 1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: Cluster, fables: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site")
    site = Site(directory, fables, f"sqlite:///{directory / 'mlflow.db'}")
    site.prepare(cluster)
    return site


@pytest.fixture(scope="module")
def shared(site: Site, cluster: Cluster) -> Iterator[DisturbedRun]:
    train = {"steps": 100_000, "bitwise_elastic": 2, "stall_seconds": 15, "max_failures": 50}
    training = site.run(cluster, "disturbed", **train)
    yield DisturbedRun(training.start())
    training.close()


@pytest.fixture
def run(shared: DisturbedRun) -> DisturbedRun:
    shared.offset = len(shared.training.stderr)
    shared.advance(20)
    return shared


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_are_killed(run: DisturbedRun, workers: int) -> None:
    kill_all(run.training.workers()[:workers])
    run.wait_for_message("died; restarting from the last checkpoint")
    run.advance(20)


def test_the_driver_is_killed(run: DisturbedRun) -> None:
    run.training.close()
    run.training.start()
    run.advance(20)


def test_the_controller_is_killed_and_its_checkpoint_list_is_truncated(run: DisturbedRun) -> None:
    (run.training.directory / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.60.0", "che')
    kill_all(run.training.controllers())
    run.wait_for_message("Ray Train's controller died: starting another")
    run.advance(20)


def test_workers_are_killed_while_a_checkpoint_is_written(run: DisturbedRun) -> None:
    directory = run.training.directory

    def half_written() -> list[Path]:
        return [p for p in directory.glob("step-*") if p.is_dir() and not (p / DIGESTS).exists()]

    for _ in range(5):  # it may become complete before the kill arrives
        workers = run.training.workers()
        wait_until("a partial checkpoint", half_written, every=0)
        kill_all(workers)
        if half_written():
            break
        run.advance(20)
    else:
        raise AssertionError("no checkpoint was caught half-written")
    run.wait_for_message("restarting from the last checkpoint")
    run.advance(20)


def test_a_stop_signal_and_then_a_flipped_byte_in_the_newest_checkpoint(run: DisturbedRun) -> None:
    training = run.training
    training.signal(signal.SIGTERM)
    assert training.wait(60) == 128 + signal.SIGTERM, training.stderr
    assert f"stopped at step {training.newest_step():,} and saved it; run the same command to resume" in run.messages
    assert training.status() == "KILLED"
    assert training.logged()[-1] == training.newest_step() // TRAIN["log_steps"] * TRAIN["log_steps"]

    training.start()
    run.advance(40)
    training.close()
    kill_all(training.workers())
    newest = Path(checkpoints.paths(str(training.directory))[0])
    complete = max(p for p in training.directory.glob("step-*") if (p / DIGESTS).exists())
    assert newest == complete or not (newest / DIGESTS).exists()
    weights = complete / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    training.start()
    run.wait_for_message(f"{complete.name}/model.safetensors: its SHA-256 differs")
    run.advance(20)


def test_a_stalled_worker_and_then_a_read_that_never_returns(run: DisturbedRun) -> None:
    """A pipe that nobody writes to replaces a shard, like a mount that hangs."""
    stopped = run.training.workers()[1]
    stopped.suspend()
    run.wait_for_message("of at most 50", 60)
    run.advance(20)
    assert not stopped.is_running()
    run.offset = len(run.training.stderr)

    [shard] = run.training.storage.glob("datasets/*/train-*.parquet")
    moved = shard.with_suffix(".moved")
    shard.rename(moved)
    os.mkfifo(shard)
    try:
        run.wait_for_message("of at most 50", 60)
    finally:
        moved.replace(shard)
    run.advance(20)
    assert "has finished no step for train.stall_seconds = 15" in run.messages
    assert "in batch, batches.py" in run.messages


def test_the_disk_is_full_and_then_unavailable_for_20_seconds(run: DisturbedRun) -> None:
    training, workers, before = run.training, run.training.workers(), run.training.newest_step()
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))
    run.wait_for_message("could not save the checkpoint, will retry: [Errno 27] File too large")
    saved = [Path(path) for path in checkpoints.paths(str(training.directory))]
    at = max(checkpoints.load(str(path)).step for path in saved if (path / DIGESTS).exists())
    assert at >= before
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    training.wait_for_step(at + 20)
    offset = len(training.stderr)

    directory, away = training.directory, training.storage / "away"
    directory.rename(away)
    while not directory.is_file():
        shutil.rmtree(directory, ignore_errors=True)  # the checkpoint writer may have just created it again
        with suppress(IsADirectoryError):
            directory.write_text("not a directory")
    time.sleep(20)
    directory.unlink()
    away.rename(directory)
    assert "could not save the checkpoint, will retry" in training.stderr[offset:]
    training.wait_for_step(at + 40)
    assert "of at most 50" not in run.messages, "a full disk counted as a failure of a worker"


def test_the_disturbed_run_equals_an_undisturbed_process(run: DisturbedRun) -> None:
    training = run.training
    training.signal(signal.SIGTERM)
    assert training.wait(60) == 128 + signal.SIGTERM, training.stderr
    newest = assert_newest_as_undisturbed(training)
    measured = range(TRAIN["heldout_steps"], newest.step + 1, TRAIN["heldout_steps"])
    assert len(newest.state["heldout_losses"]) == len(measured)
    assert training.samples() == [f"samples/step-{step:06}.txt" for step in measured]
