"""Tokenize the corpus and write it as Parquet shards, with Ray Data if it is larger than one partition."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

from gru.config import PipelineConfig
from gru.corpus.file_formats import describe_extensions
from gru.registry import tracking
from gru.terminal import counted
from jobs import entry, stages, warm_start
from jobs.results import Counts, PrepareResult

if TYPE_CHECKING:
    from gru.corpus.dataset import Manifest

_EXAMPLES = 2  # examples of each kind of problem that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only read a sample, and show documents, what would be left out, and the expected size and time",
    )


def run(config: PipelineConfig, context: entry.JobContext) -> Mapping[str, object]:
    return dry_run(config) if context.arguments.dry_run else prepare_dataset(config, context)


def dry_run(config: PipelineConfig) -> Mapping[str, object]:
    """Print the preview on stderr and return it. Raises UserError if the sample has no document."""
    from jobs.look import look, report, result

    preview = look(config)
    print(report(preview), file=sys.stderr)
    preview.require_documents()
    return result(preview)


def prepare_dataset(config: PipelineConfig, context: entry.JobContext) -> PrepareResult:
    config = warm_start.pinned(config)
    stage = stages.prepare_stage(config, context.dataset)
    if result := stage.result():
        return result
    from gru.corpus.prepare import prepare

    started = time.monotonic()
    resources = config.resources.prepare
    manifest = prepare(
        config.corpus, config.tokenizer, stage.directory, context.progress, resources, entry.start_ray
    ).manifest
    counts = {
        "documents": manifest.counts.documents,
        "bytes": manifest.counts.bytes,
        "tokens": manifest.counts.tokens,
        "dropped": sum(manifest.dropped.values()),
        "vocabulary": manifest.vocab_size,
        "shards": len(manifest.shards),
    }
    for line in _problems(manifest):
        context.progress(line)
    result = {
        "stage": stage.name,
        "key": stage.key,
        "dataset": stage.directory,
        "digest": manifest.digest,
        "heldout_digest": manifest.heldout_digest,
        "heldout_by": manifest.heldout_by,
        "reasons": manifest.dropped,
        "dropped_bytes": manifest.dropped_bytes,
        "passed_over": manifest.passed_over,
        **cast(Counts, counts),
        "seconds": round(time.monotonic() - started, 1),
    }
    if os.environ.get("MLFLOW_TRACKING_URI"):
        with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
            run.log_params({"corpus": config.corpus.model_dump(), "tokenizer": config.tokenizer.model_dump()})
            run.log_metrics({**counts, "seconds": result["seconds"]})
            run.log_dataset(config.name, manifest.digest, stage.directory, counts)
    return stage.commit(result)


def _problems(manifest: "Manifest") -> Iterator[str]:
    """Yield a line for each reason for which documents were left out, its first examples, and what was not read."""
    for reason in sorted({*manifest.dropped, *manifest.dropped_bytes}):
        count, lost = manifest.dropped.get(reason, 0), manifest.dropped_bytes.get(reason, 0)
        if count:
            yield f"left out: {count:,} {reason}" + (f", {counted(lost, 'byte')}" if lost else "")
        else:  # what is no document, such as bytes behind the end of compressed data
            yield f"left out: {counted(lost, 'byte')}, {reason}"
        for example in manifest.examples.get(reason, [])[:_EXAMPLES]:
            yield f"  {example}"
    if manifest.replaced:
        yield f"{counted(manifest.replaced, 'document')} with U+FFFD in place of invalid bytes"
        for example in manifest.examples.get("replaced", [])[:_EXAMPLES]:
            yield f"  {example}"
    if manifest.passed_over:
        yield f"files passed over: {describe_extensions(manifest.passed_over)}"


if __name__ == "__main__":
    entry.main("prepare", __doc__ or "", run, add_arguments)
