"""The training run as a whole: Ray Train's TorchTrainer with scaling, failures and storage set on purpose."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig

from gru import storage
from gru.config import ModelConfig, TrainConfig
from gru.corpus.dataset import Dataset
from gru.corpus.lanes import LaneOrder
from gru.errors import UserError, find_user_error
from gru.training import checkpoint as checkpoints
from gru.training import loop

COLLECTIVE_TIMEOUT_S = 120
CONTROLLER_FAILURES = 3

log = logging.getLogger(__name__)


def train(
    model: ModelConfig,
    config: TrainConfig,
    dataset: Dataset,
    run: str,
    tracking_uri: str,
    tracking_run: str,
    progress: Callable[[str], None],
) -> checkpoints.Checkpoint:
    """Train to the last step in the directory `run`, going on from its newest checkpoint, and return the last one.

    Ray must be initialised. Raises UserError for a corpus too small for the lanes and for a run directory that
    belongs to another dataset or model.
    """
    manifest = dataset.manifest
    identity = {
        "dataset": manifest.digest,
        "tokenizer": manifest.tokenizer_digest,
        "model": model.model_dump(),
        "lanes": config.lanes,
        "seed": config.seed,
    }
    LaneOrder([s.tokens for s in dataset.segments("train")], config.seed, config.lanes, config.window)
    if (found := _last(run, identity)) and found.step >= config.steps:
        return found
    _check_resources(config, progress)
    # Ray Train's own note of its checkpoints is written in place, and dies with a bare ActorDiedError if a kill has
    # truncated it. Ours are found by their digests, so that note is not needed.
    storage.remove(storage.join(run, "checkpoint_manager_snapshot.json"))
    parent, name = run.rsplit("/", 1)
    with _progress_actor(progress) as actor:
        assignment = loop.Assignment(model, config, dataset.directory, run, identity, tracking_uri, tracking_run, actor)
        trainer = TorchTrainer(
            loop.work,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(backend="nccl" if config.gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpu,
                resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpu else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=parent,
                failure_config=FailureConfig(
                    max_failures=config.max_failures, controller_failure_limit=CONTROLLER_FAILURES
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=None),  # the loop keeps the newest itself
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                raise UserError(f"{_shortage(config)}: they did not come in time") from None
            raise find_user_error(error) or error from None
        if reason := ray.get(actor.reason.remote()):
            raise UserError(reason)
    last = _last(run, identity)
    assert last is not None and last.step == config.steps, "the run ended without its last checkpoint"
    return last


def _last(run: str, identity: dict[str, Any]) -> checkpoints.Checkpoint | None:
    path = checkpoints.newest(run, identity)
    return checkpoints.load(path) if path else None


def _check_resources(config: TrainConfig, progress: Callable[[str], None]) -> None:
    """Say what is missing: a cluster that grows may still bring it."""
    present = ray.cluster_resources()
    wanted = {"CPU": config.workers * config.cpus_per_worker, "GPU": config.workers * int(config.gpu)}
    if any(present.get(name, 0) < amount for name, amount in wanted.items()):
        progress(f"waiting: {_shortage(config)}")


def _shortage(config: TrainConfig) -> str:
    present = ray.cluster_resources()
    gpu = ", train.gpu = true" if config.gpu else ""
    return (
        f"train.workers = {config.workers}, train.cpus_per_worker = {config.cpus_per_worker}{gpu} need more than "
        f"this cluster's {present.get('CPU', 0):.0f} CPUs and {present.get('GPU', 0):.0f} GPUs"
    )


class _Progress:
    """Carries the newest line from rank 0 to the driver, since worker output goes to log files; and why it gave up."""

    def __init__(self) -> None:
        self.line: str | None = None
        self.given_up: str | None = None

    def give_up(self, reason: str) -> None:
        self.given_up = reason

    def reason(self) -> str | None:
        return self.given_up

    def report(self, line: str) -> None:
        self.line = line

    def take(self) -> str | None:
        line, self.line = self.line, None
        return line


@contextmanager
def _progress_actor(progress: Callable[[str], None]) -> Iterator[Any]:
    actor: Any = ray.remote(num_cpus=0)(_Progress).remote()
    ended = threading.Event()

    def follow() -> None:
        over = False
        while not over:
            over = ended.wait(1.0)
            if line := ray.get(actor.take.remote()):
                progress(line)

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(actor)
