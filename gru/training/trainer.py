"""The training run as a whole: Ray Train's TorchTrainer with explicit scaling, failure handling and timeouts."""

import math
import os
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.util import remove_placement_group

from gru import cluster, ray_internals, storage
from gru.config import ModelConfig, TrainConfig
from gru.config_stages import TrainResources
from gru.corpus.batches import LaneOrder
from gru.corpus.dataset import Dataset
from gru.errors import GaveUp, Stopped, UserError, find_user_error, first_line
from gru.training import checkpoint as checkpoints
from gru.training import driver_channel, worker_loop
from gru.training.failures import FailureReporter, describe_failures
from gru.training.initial_model import TOKENIZER, InitialModel
from gru.training.scaling import FreeResourcesPolicy
from gru.training.stop_signal import StopSignal, catch_signals, run_in_thread

CONTROLLER_FAILURES = 3
RESIZE_SECONDS = 10
"""Time between two checks whether the cluster has resources for more workers."""


def train(
    model: ModelConfig,
    config: TrainConfig,
    resources: TrainResources,
    dataset: Dataset,
    run: str,
    tracking_uri: str,
    tracking_run: str,
    show: Callable[[str], None],
    *,
    initial: InitialModel | None = None,
    tracking_parent: str | None = None,
    prompt: str = "\n",
) -> checkpoints.Checkpoint:
    """Train to the last step in the directory `run`, resuming from its newest checkpoint, and return the last one.

    initial: what a run without a checkpoint starts from; None: random weights. tracking_parent: the MLflow run over all
    stages, which gets the key metrics too. prompt: of the samples that are shown and logged with each held-out loss.
    Ray must be initialised. In the main thread, SIGTERM and SIGINT make it save a checkpoint and stop. Raises UserError
    for a corpus too small for the batch size, a run directory of another dataset or model, and training that diverges;
    GaveUp if workers failed more often than `max_failures`; Stopped after a signal.
    """
    identity = _identity(model, config, dataset, initial)
    # Raises UserError if the corpus is too small.
    LaneOrder(
        [segment.tokens for segment in dataset.segments("train")],
        config.seed,
        config.batch_size,
        config.sequence_length,
        dataset.segment_weights("train"),
    )
    if (last := _last(run, identity)) and last.step >= config.steps:
        return last
    if cluster.is_too_small(resources, config.min_workers or config.workers):  # an autoscaling cluster may still grow
        show(f"waiting: {_describe_shortage(config, resources)}")
    dataset.tokenizer().encode(prompt)  # raises UserError before any worker starts
    with storage.full_disk_is_user_error(run):  # another run may start from a checkpoint of this one
        storage.write_bytes(storage.join(run, TOKENIZER), dataset.tokenizer().json)
    directory = initial.directory if initial else None
    with driver_channel.open_channel(show) as channel, catch_signals() as stop_signal:
        assignment = worker_loop.Assignment(
            model,
            config,
            dataset.directory,
            run,
            identity,
            directory,
            tracking_uri,
            tracking_run,
            tracking_parent,
            prompt,
            channel,
        )
        _fit_until_done(assignment, resources, stop_signal, show)
    last = _last(run, identity)
    assert last is not None and last.step == config.steps, "the run ended without its last checkpoint"
    return last


def _identity(
    model: ModelConfig, config: TrainConfig, dataset: Dataset, initial: InitialModel | None
) -> dict[str, Any]:
    """Return what a checkpoint must have been trained on to be resumed."""
    manifest = dataset.manifest
    return {
        "dataset": manifest.digest,
        "tokenizer": manifest.tokenizer_digest,
        "model": model.model_dump(),
        "lanes": config.batch_size,
        "seed": config.seed,
        "initial": initial.digest if initial else None,
    }


def _last(run: str, identity: dict[str, Any]) -> checkpoints.Checkpoint | None:
    path = checkpoints.newest(run, identity)
    return checkpoints.load(path) if path else None


def _fit_until_done(
    assignment: worker_loop.Assignment,
    resources: TrainResources,
    stop_signal: StopSignal,
    show: Callable[[str], None],
) -> None:
    """Run Ray Train, and again after its controller died or a node was preempted. Raises as `train` does."""
    controller_failures = 0
    while True:
        try:
            finished = _fit(assignment, resources, stop_signal)
        except ray.exceptions.RayActorError as error:  # the controller died; a worker's death is a TrainingFailedError
            controller_failures += 1
            if controller_failures > CONTROLLER_FAILURES:
                reason = f"Ray Train's controller died {controller_failures} times: {first_line(error)}"
                raise GaveUp(reason) from None
            show("Ray Train's controller died: starting another, which resumes from the last checkpoint")
            group: Any = ray.get(assignment.channel.placement_group.remote())
            if group is not None:
                remove_placement_group(group)  # Ray Train removes it only where there is a dashboard
            continue
        outcome: Any = ray.get(assignment.channel.take_outcome.remote())
        _raise_if_failed(outcome, finished, stop_signal)
        if "preempted" not in outcome:
            return
        show(f"a node is about to be preempted: saved at step {outcome['preempted']:,}, resuming without it")


def _raise_if_failed(outcome: dict[str, Any], finished: bool, stop_signal: StopSignal) -> None:
    if "diverged" in outcome:
        raise UserError(outcome["diverged"])
    if "unsaved" in outcome:
        raise GaveUp(f"{outcome['unsaved']}; earlier checkpoints are intact")
    if "stopped" in outcome:
        message = f"stopped at step {outcome['stopped']:,} and saved it; run the same command to resume"
        raise Stopped(message, stop_signal.number)
    if not finished:
        message = "stopped, but the workers did not respond; run the same command to resume from the last checkpoint"
        raise Stopped(message, stop_signal.number)


def _fit(assignment: worker_loop.Assignment, resources: TrainResources, stop_signal: StopSignal) -> bool:
    """Run one controller of Ray Train to its end; False if the workers ignored a stop signal.

    Raises RayActorError if the controller died, UserError and GaveUp as `train` does.
    """
    # Earlier versions of this program left Ray Train's list of checkpoints here. If a kill truncated it, the controller
    # would end with a bare ActorDiedError.
    storage.remove(storage.join(assignment.run, "checkpoint_manager_snapshot.json"))
    trainer = _build_trainer(assignment, resources)
    _set_timeouts(assignment.train)
    try:
        return stop_signal.wait(run_in_thread(trainer.fit), assignment.channel)
    except ray.train.TrainingFailedError as error:
        explanation = _explain(error, assignment.train, resources)
        if explanation is None:
            raise
        raise explanation from error


def _build_trainer(assignment: worker_loop.Assignment, resources: TrainResources) -> TorchTrainer:
    config = assignment.train
    parent, name = assignment.run.rsplit("/", 1)
    callbacks: list[Any] = [FailureReporter(assignment.channel, config.max_failures)]
    scaling_config = ScalingConfig(
        num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        use_gpu=resources.gpus > 0,
        resources_per_worker={name: amount for name, amount in resources.amounts().items() if amount},
        label_selector=resources.labels or None,
    )
    trainer: Any = TorchTrainer(
        worker_loop.run_worker,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo", timeout_s=math.ceil(config.stall_seconds)
        ),
        scaling_config=scaling_config,
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
            callbacks=callbacks,
        ),
    )
    if trainer.scaling_config.elasticity_enabled:
        ray_internals.use_scaling_policy(trainer, FreeResourcesPolicy(trainer.scaling_config))
    ray_internals.set_run_id(trainer, name)
    return trainer


def _set_timeouts(config: TrainConfig) -> None:
    """Set the timeouts that Ray Train and torch read from environment variables."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.stall_seconds)
    os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "5"  # some workers may be unreachable
    ray_internals.propagate_to_controller("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S")
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(config.stall_seconds)  # of broadcasts from rank 0


def _explain(
    error: ray.train.TrainingFailedError, config: TrainConfig, resources: TrainResources
) -> GaveUp | UserError | None:
    """Return an error that says why a run of Ray Train failed; None if the cause is unknown, which is a defect."""
    failure = getattr(error, "controller_failure", None)
    if failure is not None and ray_internals.is_startup_timeout(failure):
        return GaveUp(f"the workers did not start in time: {_describe_shortage(config, resources)}")
    if failure is not None and ray_internals.is_startup_failure(failure):
        return GaveUp(f"the workers could not be started: {first_line(failure)}")
    if mistake := find_user_error(error):
        return mistake
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return None
    return GaveUp(
        f"training failed more often than train.max_failures = {config.max_failures}: {describe_failures(failures)}; "
        "run the same command to resume from the last checkpoint"
    )


def _describe_shortage(config: TrainConfig, resources: TrainResources) -> str:
    number = f"train.min_workers = {config.min_workers}" if config.min_workers else f"train.workers = {config.workers}"
    return f"{number}, {cluster.describe_shortage('train', resources)}"
