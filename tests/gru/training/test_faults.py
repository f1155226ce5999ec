"""Training that cannot be lost: whatever is killed, damaged, full or away, the run ends with the weights and the
logged steps of one that was not disturbed."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from gru.corpus.dataset import open_dataset
from gru.digests import DIGESTS
from gru.training import checkpoint as checkpoints
from jobs import entry
from tests.gru.training.runs import TRAIN, Site, Training, assert_same, cluster_of, undisturbed
from tests.waiting import wait_until

pytestmark = pytest.mark.faults


def logged_steps(steps: int) -> list[int]:
    return list(range(TRAIN["log_steps"], steps + 1, TRAIN["log_steps"]))


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Cluster]:
    """Three nodes, of which two workers need two; they know the bucket."""
    with cluster_of(1, 1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: Cluster, fables: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site")
    site = Site(directory, fables, f"sqlite:///{directory / 'mlflow.db'}")
    site.prepare(cluster)
    return site


@pytest.fixture(scope="module")
def expected(site: Site, cluster: Cluster) -> str:
    """SHA-256 of the weights that an undisturbed run of two workers ends with."""
    return weights_undisturbed(site.run(cluster, "undisturbed"))


def weights_undisturbed(run: Training) -> str:
    run.start().finish()
    assert run.logged() == logged_steps(run.config["train"]["steps"])
    assert run.status() == "FINISHED"
    return run.weights()


@pytest.fixture
def start(site: Site, cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Callable[..., Training]]:
    runs: list[Training] = []

    def start(bucket: str | None = None, **train: Any) -> Training:
        name = "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-")
        run = site.run(cluster, name, **train)
        runs.append(run)
        if bucket:
            run.config["storage"] = bucket
            run.move_dataset(bucket)
            fsspec.filesystem("s3").put(f"{run.storage}/datasets", f"{bucket}/datasets", recursive=True)
            shutil.rmtree(run.storage / "datasets")
        return run.start()

    yield start
    for run in runs:
        run.close()


def assert_as_undisturbed(run: Training, expected: str) -> None:
    assert run.weights() == expected
    assert run.logged() == logged_steps(run.config["train"]["steps"])
    assert run.status() == "FINISHED"


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()


def test_one_worker_is_killed_and_then_both(start: Callable[..., Training], expected: str) -> None:
    run = start()
    for failures, how_many in enumerate([1, 2], 1):
        run.wait_for_step(run.newest_step() + 60)
        kill_all(run.workers()[:how_many])
        run.wait_for_line(f"failure {failures} of at most 3: worker")
    run.finish()
    assert "died; starting again from the last checkpoint" in run.stderr
    assert_as_undisturbed(run, expected)


def test_the_driver_is_killed_and_then_the_controller_whose_note_is_truncated(
    start: Callable[..., Training], expected: str
) -> None:
    run = start()
    run.wait_for_step(60)
    run.close()
    at = run.newest_step()
    run.start().wait_for_step(at + 60)
    (run.directory / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.60.0", "che')
    kill_all(run.controllers())
    run.finish()
    assert "Ray Train's controller died: starting another" in run.stderr
    assert_as_undisturbed(run, expected)


def test_killed_while_a_checkpoint_is_written(start: Callable[..., Training], expected: str) -> None:
    run = start()
    run.wait_for_step(40)

    def half_written() -> list[Path]:
        return [p for p in run.directory.glob("step-*") if p.is_dir() and not (p / DIGESTS).exists()]

    for _ in range(3):  # it may become whole before the kill arrives
        wait_until("half a checkpoint", half_written, every=0)
        kill_all(run.workers())
        if half_written():
            break
        run.wait_for_step(run.newest_step() + 20)
    else:
        raise AssertionError("no checkpoint was caught half-written")
    run.finish()
    assert "failure 1 of at most 3" in run.stderr
    assert_as_undisturbed(run, expected)


def test_killed_while_a_checkpoint_is_uploaded(bucket: str, start: Callable[..., Training], expected: str) -> None:
    """The same with all storage in a bucket."""
    files = fsspec.filesystem("s3", use_listings_cache=False)
    run = start(bucket=f"{bucket}/store")

    def half_uploaded() -> bool:
        found = files.glob("corpora/store/runs/*/step-*/*")
        steps = {path.rsplit("/", 1)[0] for path in found}
        whole = {path.rsplit("/", 1)[0] for path in found if path.endswith(f"/{DIGESTS}")}
        return bool(whole) and bool(steps - whole)

    wait_until("half a checkpoint", half_uploaded, every=0)
    kill_all(run.workers())
    run.finish()
    assert "failure 1 of at most 3" in run.stderr
    [weights] = files.glob("corpora/store/runs/*/bundle/weights.safetensors")
    assert hashlib.sha256(files.cat_file(weights)).hexdigest() == expected
    assert run.logged() == logged_steps(TRAIN["steps"])


def test_the_disk_is_full_and_then_away_for_20_seconds(start: Callable[..., Training], expected: str) -> None:
    run = start()
    run.wait_for_step(60)
    workers = run.workers()
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_FSIZE, (100_000, psutil.RLIM_INFINITY))
    run.wait_for_line("could not be saved, and will be tried again: [Errno 27] File too large")
    kept = [Path(path) for path in checkpoints.paths(str(run.directory))]
    at = max(checkpoints.load(str(path)).step for path in kept if (path / DIGESTS).exists())
    assert at >= 60
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
    run.wait_for_step(at + 20)
    told = len(run.stderr)

    directory, away = run.directory, run.storage / "away"
    directory.rename(away)
    while not directory.is_file():
        shutil.rmtree(directory, ignore_errors=True)  # which a commit at this moment may have made anew
        with suppress(IsADirectoryError):
            directory.write_text("not a directory")
    time.sleep(20)
    directory.unlink()
    away.rename(directory)
    run.finish()
    assert "could not be saved, and will be tried again" in run.stderr[told:]
    assert "failure 1" not in run.stderr
    assert_as_undisturbed(run, expected)


def test_told_to_stop_and_then_a_byte_of_the_newest_checkpoint_flipped(
    start: Callable[..., Training], expected: str
) -> None:
    run = start()
    run.wait_for_step(60)
    run.signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.stderr
    assert f"stopped at step {run.newest_step():,}, saved: the same command goes on from there" in run.stderr
    assert run.status() == "KILLED"
    assert run.logged()[-1] == run.newest_step() // TRAIN["log_steps"] * TRAIN["log_steps"]

    run.start().wait_for_step(run.newest_step() + 40)
    run.close()
    kill_all(run.workers())
    newest = Path(checkpoints.paths(str(run.directory))[0])
    whole = max(p for p in run.directory.glob("step-*") if (p / DIGESTS).exists())
    assert newest == whole or not (newest / DIGESTS).exists()
    weights = whole / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run.start().finish()
    assert f"{whole.name}/model.safetensors: its SHA-256 differs" in run.stderr
    assert_as_undisturbed(run, expected)


def test_a_worker_that_stands_still_and_then_a_read_that_never_returns(
    start: Callable[..., Training], expected: str
) -> None:
    """A shard gives way to a pipe that nobody writes to, as a mount that hangs."""
    run = start(stall_seconds=15, max_failures=20)
    run.wait_for_step(40)
    stopped = run.workers()[1]
    stopped.suspend()
    run.wait_for_line("failure 1 of at most 20", 60)
    run.wait_for_step(run.newest_step() + 20)
    assert not stopped.is_running()
    told = len(run.stderr)

    [shard] = run.storage.glob("datasets/*/train-*.parquet")
    kept = shard.with_suffix(".kept")
    shard.rename(kept)
    os.mkfifo(shard)
    try:
        run.wait_for_line("failure 2 of at most 20", 60)
    finally:
        kept.replace(shard)
    run.finish()
    assert "has finished no step for train.stall_seconds = 15" in run.stderr[told:]
    assert "in batch, lanes.py" in run.stderr[told:]
    assert_as_undisturbed(run, expected)


def test_workers_that_fail_too_often(start: Callable[..., Training]) -> None:
    run = start(max_failures=1)
    run.wait_for_step(40)
    kill_all(run.workers())
    run.wait_for_line("failure 1 of at most 1")
    run.wait_for_step(run.newest_step() + 20)
    kill_all(run.workers())
    assert run.wait() == 1
    assert "error: training failed more often than train.max_failures = 1: worker 0 died" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.status() == "FAILED"


def test_a_node_killed(cluster: Cluster, start: Callable[..., Training], expected: str) -> None:
    run = start()
    run.wait_for_step(60)
    node = run.node_with_a_worker()
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    kill_all([raylet, *raylet.children(recursive=True)])  # as a machine that loses its power
    try:
        run.finish()
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert "failure 1 of at most 3" in run.stderr
    result = json.loads((run.storage / "out.txt").read_text().splitlines()[-1])
    assert result["stage"] == "train", "the result is the last line, whatever Ray says of the node"
    assert_as_undisturbed(run, expected)


def test_a_node_that_is_about_to_be_taken_away(cluster: Cluster, start: Callable[..., Training], expected: str) -> None:
    """It is left before it goes, at a checkpoint of that moment, and not counted as a failure."""
    run = start(max_failures=0, checkpoint_seconds=1000, checkpoint_steps=None)
    run.wait_for_line("step ")
    node = run.node_with_a_worker()
    deadline_ms = int(time.time() * 1000) + 60_000
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        assert GcsClient(cluster.address).drain_node(node.node_id, preemption, "spot", deadline_ms)[0]
        run.wait_for_line("a node is about to be taken away: saved at step")
        run.finish()
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert_as_undisturbed(run, expected)


@pytest.mark.parametrize(("cpus", "grown"), [((1,), 2), pytest.param((1, 1), 4, marks=pytest.mark.chaos)])
def test_as_many_workers_as_there_is_room_for(
    site: Site, request: pytest.FixtureRequest, cpus: tuple[int, ...], grown: int
) -> None:
    """1 -> 2 -> 1 and 2 -> 4 -> 1 workers: weights, optimizer and the carried states of all lanes are, bit for bit,
    those of one process that was never disturbed."""
    with cluster_of(*cpus) as cluster:
        name = f"elastic-{len(cpus)}-{grown}"
        run = site.run(cluster, name, steps=100_000, min_workers=1, workers=grown, bitwise_elastic=4).start()
        try:
            run.wait_for_workers(len(cpus))
            run.wait_for_step(40)
            added = cluster.add_node(num_cpus=grown - len(cpus))
            run.wait_for_workers(grown)
            run.wait_for_step(run.newest_step() + 40)
            run.close()  # the next one is to find the room that this one had claimed
            run.start().wait_for_workers(grown, 60)
            run.wait_for_step(run.newest_step() + 40)
            for node in [added, *cluster.worker_nodes]:
                if node in cluster.worker_nodes:
                    cluster.remove_node(node, allow_graceful=False)
            run.wait_for_workers(1)
            run.wait_for_step(run.newest_step() + 40)
            run.signal(signal.SIGTERM)
            assert run.wait(60) == 128 + signal.SIGTERM, run.stderr
        finally:
            run.close()
    config = entry.load_config(json.dumps(run.config), [])
    newest = checkpoints.load(checkpoints.paths(str(run.directory))[0])
    [manifest] = run.storage.glob("datasets/*/manifest.json")
    assert_same(newest, undisturbed(config, open_dataset(str(manifest.parent)), newest.step))
    steps = run.logged()
    assert steps == list(range(5, newest.step + 1, 5))


@pytest.mark.parametrize(
    ("seed", "kills", "steps"),
    [(1, 3, TRAIN["steps"]), pytest.param(2, 10, 2000, marks=pytest.mark.chaos)],
    ids=["short", "long"],
)
def test_random_kills(
    site: Site, cluster: Cluster, start: Callable[..., Training], expected: str, seed: int, kills: int, steps: int
) -> None:
    """Of a worker, all of them, the controller or the driver, at random times after the last one's recovery."""
    chance = random.Random(seed)
    if steps != TRAIN["steps"]:
        expected = weights_undisturbed(site.run(cluster, f"undisturbed-{steps}", steps=steps))
    room = steps // (2 * kills) - 20  # a checkpoint later it has recovered, and a few more pass before the kill
    plan = [(chance.randrange(room), chance.random(), chance.random()) for _ in range(kills)]
    victims = chance.sample(["worker", "workers", "driver"] * kills + ["controller"] * 2, kills)
    run = start(max_failures=kills, steps=steps)
    for (wait, seconds, which), victim in zip(plan, victims, strict=True):
        run.wait_for_step(run.newest_step() + 20 + wait)
        time.sleep(seconds / 4)
        if victim == "driver":
            run.close()
            run.start()
            continue
        processes = run.controllers() if victim == "controller" else run.workers()
        assert processes, f"no {victim} to kill"
        kill_all([processes[int(which * len(processes))]] if victim == "worker" else processes)
    run.finish()
    assert_as_undisturbed(run, expected)
