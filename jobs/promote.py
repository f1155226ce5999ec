"""Register the model; it becomes @champion if it beats the present one on the same held-out text (MLflow)."""

import tempfile
from pathlib import Path
from typing import Any

from gru import tracking
from gru.config import PipelineConfig
from jobs import entry, stages


def run(config: PipelineConfig, call: entry.Call) -> dict[str, Any]:
    entry.require_tracking()
    prepared = stages.prepare(config, call.dataset).require()
    trained = stages.train(config, prepared).require()
    evaluated = stages.evaluate(config, prepared, trained).require()
    stage = stages.promote(config, trained, evaluated)
    if result := stage.result():
        return result
    from gru import evaluation, registry
    from gru.corpus.dataset import open_dataset

    def score_champion(champion: registry.Version) -> float:
        call.progress(f"scoring the present champion, version {champion.version}, on the same text")
        with tempfile.TemporaryDirectory(prefix="gru-champion-") as directory:
            bundle = registry.fetch_bundle(champion, Path(directory))
        texts = open_dataset(prepared["dataset"]).texts("heldout")
        settings = config.evaluate
        heldout = evaluation.read(bundle.tokenizer, texts, settings.heldout_bytes)
        return evaluation.score(bundle.model, heldout, settings.lanes).bits_per_byte

    with tracking.stage_run(config.experiment, stage.key, stage.name, call.parent) as run:
        call.progress("registering")
        candidate = registry.register(
            run, config.model_name, trained["bundle"], evaluated["bits_per_byte"], evaluated["text"]
        )
        promoted, reason = registry.promote(candidate, score_champion)
        run.set_tags({"version": candidate.version, "promoted": str(promoted).lower(), "reason": reason})
    result = {
        "stage": stage.name,
        "key": stage.key,
        "model": config.model_name,
        "version": candidate.version,
        "bundle": candidate.bundle,
        "promoted": promoted,
        "reason": reason,
        "run": run.id,
    }
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("promote", __doc__ or "", run)
