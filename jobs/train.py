"""Train the model on the prepared dataset (Ray Train), and write its bundle."""

import time
from typing import TYPE_CHECKING

from gru import storage
from gru.config import PipelineConfig
from gru.registry import tracking
from gru.registry.bundle import write_bundle
from gru.registry.lineage import Lineage
from jobs import entry, stages, warm_start
from jobs.results import TrainResult

if TYPE_CHECKING:
    from gru.corpus.dataset import Dataset
    from gru.training.checkpoint import Checkpoint
    from gru.training.initial_model import InitialModel


def run(config: PipelineConfig, context: entry.JobContext) -> TrainResult:
    tracking_uri = entry.require_tracking()
    config = warm_start.pinned(config)
    prepared = stages.prepare_stage(config, context.dataset).require()
    stage = stages.train_stage(config, prepared)
    if done := stage.result():
        if note := warm_start.describe_cached(config, stage.key):
            context.progress(note)
        return done
    from gru.corpus.dataset import open_dataset
    from gru.training.trainer import train

    initial = warm_start.initial_model(config)
    for line in warm_start.describe(config, initial, prepared):
        context.progress(line)
    entry.start_ray()
    started = time.monotonic()
    dataset = open_dataset(prepared["dataset"])
    bundle = storage.join(stage.directory, "bundle")
    with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
        resources = config.resources.train
        settings = {"model": config.model, "train": config.train, "resources.train": resources}
        run.log_params({name: section.model_dump() for name, section in settings.items()})
        counts = {"train": dataset.manifest.train.model_dump(), "heldout": dataset.manifest.heldout.model_dump()}
        run.log_dataset(config.name, prepared["digest"], prepared["dataset"], counts)
        last = train(
            config.model,
            config.train,
            resources,
            dataset,
            stage.directory,
            tracking_uri,
            run.id,
            context.progress,
            initial=initial,
            tracking_parent=context.parent,
            prompt=config.evaluate.prompt,
        )
        run.log_points(last.state["points"])
        run.log_loss_curve()
        lineage = _lineage(config, dataset, run.id, last, initial)
        write_bundle(bundle, config.model, last.average, dataset.tokenizer(), lineage)
        result: TrainResult = {
            "stage": stage.name,
            "key": stage.key,
            "bundle": bundle,
            "run": run.id,
            "steps": last.step,
            "heldout_loss": run.history(tracking.HELDOUT_LOSS)[-1][1],
            "seconds": round(time.monotonic() - started, 1),
        }
        if config.train.init_from:
            result["initial"] = initial.name if initial else "random weights"
    return stage.commit(result)


def _lineage(
    config: PipelineConfig, dataset: "Dataset", run: str, last: "Checkpoint", initial: "InitialModel | None"
) -> Lineage:
    manifest = dataset.manifest
    return Lineage(
        run=run,
        checkpoint_step=last.step,
        checkpoint=last.path,
        initial=initial and initial.name,
        initial_digest=initial and initial.digest,
        dataset=dataset.directory,
        dataset_digest=manifest.digest,
        tokenizer_digest=manifest.tokenizer_digest,
        heldout_by=manifest.heldout_by,
        heldout_share=manifest.corpus.heldout_share,
        sources=config.corpus.paths,
        versions=last.state["versions"],
    )


if __name__ == "__main__":
    entry.main("train", __doc__ or "", run)
