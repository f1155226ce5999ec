"""Tests of training under faults that need a run of their own: the run ends with the weights and the logged steps of an
undisturbed run. The faults of `test_disturbed_run.py` share one run."""

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from gru.digests import DIGESTS
from tests.gru.training.runs import (
    TRAIN,
    Site,
    Training,
    assert_as_undisturbed,
    assert_newest_as_undisturbed,
    cluster_of,
    kill_all,
    logged_steps,
    undisturbed_weights,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Cluster]:
    """A cluster of three nodes, of which two workers need two; its processes have the bucket's credentials."""
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
    """The SHA-256 of the final weights of an undisturbed run of two workers."""
    return undisturbed_weights(site.run(cluster, "undisturbed"))


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


def test_killed_while_a_checkpoint_is_uploaded(bucket: str, start: Callable[..., Training], expected: str) -> None:
    """All storage is in a bucket; the workers are killed between two files of a checkpoint."""
    files = fsspec.filesystem("s3", use_listings_cache=False)
    run = start(bucket=f"{bucket}/store")

    def half_uploaded() -> bool:
        paths = files.glob("corpora/store/runs/*/step-*/*")
        steps = {path.rsplit("/", 1)[0] for path in paths}
        complete = {path.rsplit("/", 1)[0] for path in paths if path.endswith(f"/{DIGESTS}")}
        return bool(complete) and bool(steps - complete)

    wait_until("a partial checkpoint", half_uploaded, every=0)
    kill_all(run.workers())
    run.finish()
    assert "failure 1 of at most 3" in run.stderr
    [weights] = files.glob("corpora/store/runs/*/bundle/weights.safetensors")
    assert hashlib.sha256(files.cat_file(weights)).hexdigest() == expected
    assert run.logged() == logged_steps(TRAIN["steps"])


def test_workers_that_fail_too_often_end_the_run(start: Callable[..., Training]) -> None:
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


def test_a_node_is_killed(cluster: Cluster, start: Callable[..., Training], expected: str) -> None:
    run = start()
    run.wait_for_step(60)
    node = run.node_with_a_worker()
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    kill_all([raylet, *raylet.children(recursive=True)])  # like a machine that loses its power
    try:
        run.finish()
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert "failure 1 of at most 3" in run.stderr
    result = json.loads((run.storage / "out.txt").read_text().splitlines()[-1])
    assert result["stage"] == "train", "the result is not the last line of stdout"
    assert_as_undisturbed(run, expected)


def test_a_node_that_is_about_to_be_preempted(cluster: Cluster, start: Callable[..., Training]) -> None:
    """The workers leave it before its deadline, with a checkpoint of that step, and it does not count as a failure.

    They notice it after some seconds, so the run has steps to spare on any machine.
    """
    run = start(steps=100_000, max_failures=0, checkpoint_seconds=1000, checkpoint_steps=None, bitwise_elastic=2)
    run.wait_for_line("step ")
    node = run.node_with_a_worker()
    deadline_ms = int(time.time() * 1000) + 60_000
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        assert GcsClient(cluster.address).drain_node(node.node_id, preemption, "spot", deadline_ms)[0]
        run.wait_for_line("a node is about to be preempted: saved at step")
        told = len(run.stderr)
        wait_until("a step of the resumed run", lambda: "step " in run.stderr[told:].partition("\n")[2])
        run.signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM, run.stderr
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert_newest_as_undisturbed(run)


@pytest.mark.parametrize(("cpus", "grown"), [((1,), 2), pytest.param((1, 1), 4, marks=pytest.mark.chaos)])
def test_an_elastic_run_uses_as_many_workers_as_fit(
    site: Site, request: pytest.FixtureRequest, cpus: tuple[int, ...], grown: int
) -> None:
    """With 1 -> 2 -> 1 and 2 -> 4 -> 1 workers, weights, optimizer and the carried states of all lanes have the same
    bits as in one undisturbed process."""
    with cluster_of(*cpus) as cluster:
        name = f"elastic-{len(cpus)}-{grown}"
        run = site.run(cluster, name, steps=100_000, min_workers=1, workers=grown, bitwise_elastic=4).start()
        try:
            run.wait_for_workers(len(cpus))
            run.wait_for_step(40)
            added = cluster.add_node(num_cpus=grown - len(cpus))
            run.wait_for_workers(grown)
            run.wait_for_step(run.newest_step() + 40)
            run.close()  # the next driver takes over the resources that this one has reserved
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
    assert_newest_as_undisturbed(run)


@pytest.mark.parametrize(
    ("seed", "kills", "steps"),
    [(1, 3, 2000), pytest.param(2, 10, 5000, marks=pytest.mark.chaos)],
    ids=["short", "long"],
)
def test_random_kills(
    site: Site, cluster: Cluster, start: Callable[..., Training], seed: int, kills: int, steps: int
) -> None:
    """A worker, all of them, the controller or the driver is killed, at random times after the previous recovery.

    A fast machine does 200 steps and more between the wanted step and the kill, so there are steps to spare.
    """
    chance = random.Random(seed)
    expected = undisturbed_weights(site.run(cluster, f"undisturbed-{steps}", steps=steps))
    max_wait = steps // (8 * kills) - 20  # the run has recovered after one checkpoint; a few more steps pass
    plan = [(chance.randrange(max_wait), chance.random(), chance.random()) for _ in range(kills)]
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
