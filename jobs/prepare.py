"""Tokenize the corpus and write it as Parquet shards, with Ray Data."""

import os
import time
from typing import cast

from gru.config import PipelineConfig
from gru.registry import tracking
from jobs import entry, stages
from jobs.results import Counts, PrepareResult

_EXAMPLES = 5  # examples of problems that are printed


def run(config: PipelineConfig, context: entry.JobContext) -> PrepareResult:
    stage = stages.prepare_stage(config, context.dataset)
    if result := stage.result():
        return result
    from gru.corpus.prepare import prepare

    entry.start_ray()
    started = time.monotonic()
    resources = config.resources.prepare
    manifest = prepare(config.corpus, config.tokenizer, stage.directory, context.progress, resources).manifest
    counts = {
        "documents": manifest.counts.documents,
        "bytes": manifest.counts.bytes,
        "tokens": manifest.counts.tokens,
        "dropped": sum(manifest.dropped.values()),
        "vocabulary": manifest.vocab_size,
        "shards": len(manifest.shards),
    }
    for example in manifest.examples[:_EXAMPLES]:
        context.progress(example)
    if manifest.dropped or manifest.replaced:
        reasons = [f"{count:,} {reason}" for reason, count in manifest.dropped.items()]
        reasons += [f"{manifest.replaced:,} with U+FFFD in place of invalid bytes"] if manifest.replaced else []
        context.progress(f"left out: {', '.join(reasons)}" if manifest.dropped else ", ".join(reasons))
    result = {
        "stage": stage.name,
        "key": stage.key,
        "dataset": stage.directory,
        "digest": manifest.digest,
        "heldout_digest": manifest.heldout_digest,
        **cast(Counts, counts),
        "seconds": round(time.monotonic() - started, 1),
    }
    if os.environ.get("MLFLOW_TRACKING_URI"):
        with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
            run.log_params({"corpus": config.corpus.model_dump(), "tokenizer": config.tokenizer.model_dump()})
            run.log_metrics({**counts, "seconds": result["seconds"]})
            run.log_dataset(config.name, manifest.digest, stage.directory, counts)
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("prepare", __doc__ or "", run)
