"""Score the trained model on held-out text, and let it write some."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from gru.config import PipelineConfig
from gru.registry import tracking
from gru.registry.bundle import load_bundle
from jobs import entry, stages
from jobs.results import EvaluateResult, Measures

if TYPE_CHECKING:
    from gru.evaluation.context import ContextLoss
    from gru.evaluation.samples import CopyShares
    from gru.evaluation.scores import Scores

NOTHING = 0.0005  # nats a token


def run(config: PipelineConfig, context: entry.JobContext) -> EvaluateResult:
    entry.require_tracking()
    prepared = stages.prepare_stage(config, context.dataset).require()
    trained = stages.train_stage(config, prepared).require()
    stage = stages.evaluate_stage(config, prepared, trained)
    if result := stage.result():
        return result
    from gru.corpus.dataset import open_dataset
    from gru.evaluation.context import context_losses
    from gru.evaluation.samples import sample_and_search
    from gru.evaluation.scores import read_heldout, score_ngrams, token_losses

    started = time.monotonic()
    settings = config.evaluate
    bundle = load_bundle(trained["bundle"])
    with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
        run.log_params({"evaluate": settings.model_dump()})
        context.progress("scoring held-out text")
        dataset = open_dataset(prepared["dataset"])
        heldout = read_heldout(bundle.tokenizer, dataset.texts("heldout"), settings.heldout_bytes)
        losses = token_losses(bundle.model, heldout, settings.batch_size)
        scores = heldout.scores(float(losses.sum(dtype="float64")), settings.batch_size)
        context.progress(f"{scores.bits_per_byte:.3f} bits per byte; counting n-grams")
        ngram = score_ngrams(dataset, heldout)
        context.progress("starting anew all over the text")
        reaches = context_losses(bundle.model, heldout, losses)
        context.progress("writing samples, and looking for copies in the training text")
        writing = sample_and_search(bundle.model, bundle.tokenizer, settings, dataset, heldout)
        measured = scores.measures() | {f"ngram_{name}": value for name, value in ngram.measures().items()}
        shares = {f"temperature-{t:g}": part for t, part in writing.copied.items()} | {"heldout": writing.heldout}
        copied = {f"{name}/{measure}": v for name, part in shares.items() for measure, v in part.measures().items()}
        samples = [settings.prompt + bundle.tokenizer.decode(writing.samples[t][0]) for t in settings.temperatures]
        sizes = {"heldout_tokens": scores.tokens, "searched_bytes": writing.searched_bytes}
        run.log_metrics(measured | copied | sizes)
        distances = [asdict(reach) for reach in reaches]
        if distances:
            scale = {"state carried": scores.nats_per_token, "n-gram model": ngram.nats_per_token}
            run.log_context_losses(distances, scale)
        for temperature, text in zip(settings.temperatures, samples, strict=True):
            run.client.log_text(run.id, text, f"samples/temperature-{temperature:g}.txt")
    for line in report(scores, ngram, reaches, shares):
        context.progress(line)
    context.progress(
        f"copied: spans of 32 characters that stand in {writing.searched_bytes / 1e6:,.1f} MB of training text; "
        "repeated: 4-grams of tokens that stand in their text before"
    )
    result = {
        "stage": stage.name,
        "key": stage.key,
        **cast(Measures, measured),
        "context": distances,
        "copied": copied,
        "searched_bytes": writing.searched_bytes,
        "text": scores.text,
        "samples": samples,
        "run": run.id,
        "seconds": round(time.monotonic() - started, 1),
    }
    return stage.commit(result)


def report(
    scores: "Scores", ngram: "Scores", reaches: "list[ContextLoss]", shares: "dict[str, CopyShares]"
) -> Iterator[str]:
    """What was found, for people, next to what it is to be compared with."""
    yield f"{'held-out text':30} {'model':>12} {'n-gram model':>12}"
    for (name, value), other in zip(scores.measures().items(), ngram.measures().values(), strict=True):
        yield f"{name.replace('_', ' '):30} {value:12,.3f} {other:12,.3f}"
    yield f"{'tokens read since a reset':30} {'nats a token':>12} {'excess':>12}"
    for reach in reaches:
        span = f"{reach.first:,} to {reach.last:,}" if reach.last > reach.first else f"{reach.first}"
        yield f"{span:30} {reach.nats:12.3f} {reach.excess:12.3f}"
        if reach.excess < NOTHING:
            break  # all that are further say the same
    yield f"{'text':30} {'copied':>12} {'repeated':>12}"
    for name, part in shares.items():
        of = ["" if share is None else f"{share:.1%}" for share in (part.copied_share, part.repetition)]
        yield f"{name:30} {of[0]:>12} {of[1]:>12}"


if __name__ == "__main__":
    entry.main("evaluate", __doc__ or "", run)
