"""The training run as a whole: Ray Train's TorchTrainer with scaling, failures and timeouts set on purpose."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.actor import ActorHandle
from ray.train import RunConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.util import remove_placement_group

from gru import cluster, storage
from gru.config import ModelConfig, TrainConfig, TrainResources
from gru.corpus.batches import LaneOrder
from gru.corpus.dataset import Dataset
from gru.errors import GaveUp, Stopped, UserError, find_user_error
from gru.training import checkpoint as checkpoints
from gru.training import driver_channel, worker_loop
from gru.training.scaling import RoomForWorkers

CONTROLLER_FAILURES = 3
RESIZE_SECONDS = 10
"""Between two looks whether the cluster has room for more workers."""
STOP_PATIENCE_SECONDS = 30
"""That workers have for their last checkpoint when this process is told to stop."""

log = logging.getLogger(__name__)


def train(
    model: ModelConfig,
    config: TrainConfig,
    resources: TrainResources,
    dataset: Dataset,
    run: str,
    tracking_uri: str,
    tracking_run: str,
    show: Callable[[str], None],
) -> checkpoints.Checkpoint:
    """Train to the last step in the directory `run`, going on from its newest checkpoint, and return the last one.

    Ray must be initialised. Called in the main thread, it stops in order on SIGTERM and SIGINT. Raises UserError for a
    corpus too small for the lanes, a run directory that belongs to another dataset or model, and training that
    diverges; GaveUp if workers failed more often than `max_failures`; Stopped.
    """
    manifest = dataset.manifest
    identity = {
        "dataset": manifest.digest,
        "tokenizer": manifest.tokenizer_digest,
        "model": model.model_dump(),
        "lanes": config.batch_size,
        "seed": config.seed,
    }
    LaneOrder([s.tokens for s in dataset.segments("train")], config.seed, config.batch_size, config.sequence_length)
    if (found := _last(run, identity)) and found.step >= config.steps:
        return found
    if cluster.is_too_small(resources, config.min_workers or config.workers):  # one that grows may still bring it
        show(f"waiting: {_shortage(config, resources)}")
    with driver_channel.open_channel(show) as actor, _signals() as told:
        assignment = worker_loop.Assignment(
            model, config, dataset.directory, run, identity, tracking_uri, tracking_run, actor
        )
        _fit_until_done(assignment, resources, told, show)
    last = _last(run, identity)
    assert last is not None and last.step == config.steps, "the run ended without its last checkpoint"
    return last


def _last(run: str, identity: dict[str, Any]) -> checkpoints.Checkpoint | None:
    path = checkpoints.newest(run, identity)
    return checkpoints.load(path) if path else None


def _fit_until_done(
    assignment: worker_loop.Assignment, resources: TrainResources, told: "StopSignal", show: Callable[[str], None]
) -> None:
    """Ray Train's fit, again where it ends for a reason that is not the training's own."""
    controllers_lost = 0
    while True:
        try:
            ended = _fit(assignment, resources, told)
        except ray.exceptions.RayActorError as error:  # the controller itself, not a worker
            controllers_lost += 1
            if controllers_lost > CONTROLLER_FAILURES:
                raise GaveUp(f"Ray Train's controller died {controllers_lost} times: {_first_line(error)}") from None
            show("Ray Train's controller died: starting another, from the last checkpoint")
            place: Any = ray.get(assignment.progress.placement_group.remote())
            if place is not None:
                remove_placement_group(place)  # Ray Train sees to it only where there is a dashboard
            continue
        outcome: Any = ray.get(assignment.progress.take_outcome.remote())
        if "diverged" in outcome:
            raise UserError(outcome["diverged"])
        if "unsaved" in outcome:
            raise GaveUp(f"{outcome['unsaved']}; the checkpoints before it stay")
        if "stopped" in outcome:
            step = f"{outcome['stopped']:,}"
            raise Stopped(f"stopped at step {step}, saved: the same command goes on from there", told.signal)
        if not ended:
            raise Stopped("stopped without an answer from workers: the same command goes on", told.signal)
        if "preempted" not in outcome:
            return
        show(f"a node is about to be taken away: saved at step {outcome['preempted']:,}, going on with the others")


def _fit(assignment: worker_loop.Assignment, resources: TrainResources, told: "StopSignal") -> bool:
    """One controller's life; False if it was left behind. Raises RayActorError if it died."""
    config = assignment.train
    # Ray Train's own note of its checkpoints, of an earlier version of this program: truncated by a kill, it would end
    # the controller with a bare ActorDiedError.
    storage.remove(storage.join(assignment.run, "checkpoint_manager_snapshot.json"))
    parent, name = assignment.run.rsplit("/", 1)
    callbacks: list[Any] = [_FailureReporter(assignment.progress, config.max_failures)]
    trainer: Any = _Trainer(
        worker_loop.run_worker,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo", timeout_s=math.ceil(config.stall_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=resources.gpus > 0,
            resources_per_worker={name: amount for name, amount in resources.amounts().items() if amount},
            label_selector=resources.labels or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            callbacks=callbacks,
        ),
    )
    # A controller that died leaves its claim on the cluster for 3 minutes, in which an elastic one would wait for room.
    # Under the same name, the next one takes it over.
    object.__setattr__(trainer.train_run_context, "run_id", name)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.stall_seconds)
    os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "5"  # of workers some of which may be out of reach
    ENV_VARS_TO_PROPAGATE.add("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S")  # to the controller; not one of Ray's own
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(config.stall_seconds)  # of what workers ask rank 0 for
    try:
        return told.wait(_in_thread(trainer.fit), assignment.progress)
    except ray.train.TrainingFailedError as error:
        failure = getattr(error, "controller_failure", None)
        if isinstance(failure, WorkerGroupStartupTimeoutError):
            raise GaveUp(f"the workers did not come in time: {_shortage(config, resources)}") from None
        if isinstance(failure, WorkerGroupStartupFailedError):
            raise GaveUp(f"the workers could not be started: {_first_line(failure)}") from error
        if mistake := find_user_error(error):
            raise mistake from None
        failures = getattr(error, "worker_failures", None)
        if not failures:
            raise
        raise GaveUp(
            f"training failed more often than train.max_failures = {config.max_failures}: {_why(failures)}; its "
            "checkpoints stay, and the same command goes on from the last"
        ) from error


def _shortage(config: TrainConfig, resources: TrainResources) -> str:
    least = f"train.min_workers = {config.min_workers}" if config.min_workers else f"train.workers = {config.workers}"
    return f"{least}, {cluster.describe_shortage('train', resources)}"


class _Trainer(TorchTrainer):
    scaling_config: Any  # TorchTrainer is declared to be what it was before V2

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = RoomForWorkers(self.scaling_config)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]


class StopSignal:
    """What this process has been told to do by a signal."""

    def __init__(self) -> None:
        self.signal = 0

    def wait(self, fit: "Future[Any]", actor: ActorHandle) -> bool:
        """Wait for the end of a run; once there is a signal, have its workers save and leave. False if they do not."""
        while not fit.done() and not self.signal:
            with suppress(TimeoutError):
                fit.exception(timeout=0.5)
        if not fit.done():
            actor.stop.remote()
            with suppress(TimeoutError):
                fit.exception(timeout=STOP_PATIENCE_SECONDS)
        if fit.done():
            fit.result()
        return fit.done()


@contextmanager
def _signals() -> Iterator[StopSignal]:
    """In the main thread, the first SIGTERM or SIGINT is noted, and others of its kind work as they did before."""
    told = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        told.signal = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_thread(run_worker: Callable[[], Any]) -> "Future[Any]":
    """Run in a thread that does not keep this process: the main thread is for signals."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(run_worker())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future


class _FailureReporter(UserCallback):
    """In the controller: says what happened to the workers, since Ray Train tells only its log."""

    def __init__(self, actor: ActorHandle, most: int) -> None:
        self._actor, self._most, self._failures = actor, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values()):
            return  # Ray Train does not count it either
        self._failures += 1
        then = "starting again from the last checkpoint" if self._failures <= self._most else "giving up"
        line = f"failure {self._failures} of at most {self._most}: {_why(worker_exceptions)}; {then}"
        self._actor.say.remote(line)


def _why(failures: dict[int, Exception]) -> str:
    """The failure that explains the others: a process that died, before one that lost its connection to it."""
    reasons = {rank: _reason(error) for rank, error in sorted(failures.items())}
    died = {rank: reason for rank, (dead, reason) in reasons.items() if dead}
    shown = died or {rank: reason for rank, (_, reason) in reasons.items()}
    return ", ".join(f"worker {rank} {reason}" for rank, reason in shown.items())


def _reason(error: Exception) -> tuple[bool, str]:
    """Whether the process is dead, and a few words."""
    cause = _cause(error)
    if isinstance(cause, ray.exceptions.RayActorError):
        return True, "died"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return True, "does not answer"
    return False, f"failed: {type(cause).__name__}: {_first_line(cause)}"


def _cause(error: Exception) -> Exception:
    return getattr(error, "health_check_failure", None) or error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
