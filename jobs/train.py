"""Train the model on the prepared dataset (Ray Train), and write its bundle."""

import time

from gru import storage
from gru.config import PipelineConfig
from gru.registry import tracking
from gru.registry.bundle import write_bundle
from gru.registry.lineage import Lineage
from jobs import entry, stages
from jobs.results import TrainResult


def run(config: PipelineConfig, context: entry.JobContext) -> TrainResult:
    tracking_uri = entry.require_tracking()
    prepared = stages.prepare_stage(config, context.dataset).require()
    stage = stages.train_stage(config, prepared)
    if result := stage.result():
        return result
    from gru.corpus.dataset import open_dataset
    from gru.training.trainer import train

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
            config.model, config.train, resources, dataset, stage.directory, tracking_uri, run.id, context.progress
        )
        run.log_points(last.state["points"])
        run.log_loss_curve()
        lineage = Lineage(
            run=run.id,
            checkpoint_step=last.step,
            checkpoint=last.path,
            dataset=prepared["dataset"],
            dataset_digest=prepared["digest"],
            tokenizer_digest=dataset.manifest.tokenizer_digest,
            sources=config.corpus.paths,
            versions=last.state["versions"],
        )
        write_bundle(bundle, config.model, last.average, dataset.tokenizer(), lineage)
        result = {
            "stage": stage.name,
            "key": stage.key,
            "bundle": bundle,
            "run": run.id,
            "steps": last.step,
            "heldout_loss": run.history("heldout/loss")[-1][1],
            "seconds": round(time.monotonic() - started, 1),
        }
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("train", __doc__ or "", run)
