"""Score the trained model on held-out text, and let it write some."""

import time
from typing import Any

from gru import tracking
from gru.config import PipelineConfig
from jobs import entry, stages


def run(config: PipelineConfig, call: entry.Call) -> dict[str, Any]:
    entry.require_tracking()
    prepared = stages.prepare(config, call.dataset).require()
    trained = stages.train(config, prepared).require()
    stage = stages.evaluate(config, prepared, trained)
    if result := stage.result():
        return result
    from gru import evaluation, registry
    from gru.corpus.dataset import open_dataset

    started = time.monotonic()
    settings = config.evaluate
    bundle = registry.load_bundle(trained["bundle"])
    with tracking.stage_run(config.experiment, stage.key, stage.name, call.parent) as run:
        run.log_params({"evaluate": settings.model_dump()})
        call.progress("scoring held-out text")
        texts = open_dataset(prepared["dataset"]).texts("heldout")
        scores = evaluation.score(bundle.model, bundle.tokenizer, texts, settings.lanes, settings.heldout_bytes)
        call.progress(f"{scores.bits_per_byte:.3f} bits per byte; writing samples")
        samples = evaluation.sample_texts(
            bundle.model, bundle.tokenizer, settings.prompt, settings.sample_tokens, settings.temperatures
        )
        measured = {
            "bits_per_byte": scores.bits_per_byte,
            "nats_per_character": scores.nats_per_character,
            "perplexity": scores.perplexity,
        }
        run.log_metrics({**measured, "heldout_tokens": scores.tokens})
        for temperature, text in zip(settings.temperatures, samples, strict=True):
            run.client.log_text(run.id, text, f"samples/temperature-{temperature:g}.txt")
    result = {
        "stage": stage.name,
        "key": stage.key,
        **measured,
        "text": scores.text,
        "samples": samples,
        "run": run.id,
        "seconds": round(time.monotonic() - started, 1),
    }
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("evaluate", __doc__ or "", run)
