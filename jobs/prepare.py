"""Tokenize the corpus and write it as Parquet shards (Ray Data)."""

import os
import time
from typing import Any

from gru import tracking
from gru.config import PipelineConfig
from jobs import entry, stages


def run(config: PipelineConfig, call: entry.Call) -> dict[str, Any]:
    stage = stages.prepare(config, call.dataset)
    if result := stage.result():
        return result
    from gru.corpus import shards

    entry.start_ray()
    started = time.monotonic()
    manifest = shards.prepare(config.corpus, config.tokenizer, stage.directory, call.progress).manifest
    counts = {
        "documents": manifest.documents,
        "bytes": manifest.bytes,
        "tokens": manifest.tokens,
        "vocabulary": manifest.vocab_size,
        "shards": len(manifest.shards),
    }
    result = {
        "stage": stage.name,
        "key": stage.key,
        "dataset": stage.directory,
        "digest": manifest.digest,
        "heldout_digest": manifest.heldout_digest,
        **counts,
        "seconds": round(time.monotonic() - started, 1),
    }
    if os.environ.get("MLFLOW_TRACKING_URI"):
        with tracking.stage_run(config.experiment, stage.key, stage.name, call.parent) as run:
            run.log_params({"corpus": config.corpus.model_dump(), "tokenizer": config.tokenizer.model_dump()})
            run.log_metrics({**counts, "seconds": result["seconds"]})
            run.log_dataset(config.name, manifest.digest, stage.directory, counts)
    return stage.commit(result)


if __name__ == "__main__":
    entry.main("prepare", __doc__ or "", run)
