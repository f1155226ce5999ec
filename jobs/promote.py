"""Register the model in MLflow; it becomes @champion if it scores better than the current one on the same text."""

import tempfile
from pathlib import Path

from gru.config import PipelineConfig
from gru.registry import tracking
from jobs import entry, stages, warm_start
from jobs.model_card import model_card
from jobs.results import PromoteResult, StageResults


def run(config: PipelineConfig, context: entry.JobContext) -> PromoteResult:
    entry.require_tracking()
    config = warm_start.pinned(config)
    prepared = stages.prepare_stage(config, context.dataset).require()
    trained = stages.train_stage(config, prepared).require()
    evaluated = stages.evaluate_stage(config, prepared, trained).require()
    stage = stages.promote_stage(config, trained, evaluated)
    if (earlier := stage.result()) is not None:
        return earlier
    from gru.corpus.dataset import open_dataset
    from gru.evaluation.scores import read_heldout, score
    from gru.registry import versions
    from gru.registry.versions import fetch_bundle

    device = entry.device("evaluate", config.resources.evaluate)

    def score_champion(champion: versions.Version) -> float:
        context.progress(f"scoring the current champion, version {champion.version}, on the same text")
        with tempfile.TemporaryDirectory(prefix="gru-champion-") as directory:
            bundle = fetch_bundle(champion, Path(directory))
        texts = open_dataset(prepared["dataset"]).texts("heldout")
        settings = config.evaluate
        heldout = read_heldout(bundle.tokenizer, texts, settings.heldout_bytes)
        return score(bundle.model.to(device), heldout, settings.batch_size).bits_per_byte

    with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
        context.progress("registering the model")
        candidate = versions.register(
            run, config.model_name, trained["bundle"], evaluated["bits_per_byte"], evaluated["text"]
        )
        promoted, reason = versions.promote(candidate, score_champion)
        run.set_tags({"version": candidate.version, "promoted": str(promoted).lower(), "reason": reason})
    result: PromoteResult = {
        "stage": stage.name,
        "key": stage.key,
        "model": config.model_name,
        "version": candidate.version,
        "bundle": candidate.bundle,
        "promoted": promoted,
        "reason": reason,
        "run": run.id,
    }
    done: StageResults = {"prepare": prepared, "train": trained, "evaluate": evaluated, "promote": result}
    versions.describe(candidate, model_card(config, done))
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("promote", __doc__ or "", run)
