"""Score the trained model on held-out text, and generate samples."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from gru.config import PipelineConfig
from gru.registry import tracking
from gru.registry.bundle import load_bundle
from gru.terminal import printable
from jobs import entry, stages, warm_start
from jobs.results import EvaluateResult, Measures

if TYPE_CHECKING:
    from gru.evaluation.context import ContextLoss
    from gru.evaluation.samples import CopyShares
    from gru.evaluation.scores import Scores

NEGLIGIBLE = 0.0005  # nats per token


def run(config: PipelineConfig, context: entry.JobContext) -> EvaluateResult:
    entry.require_tracking()
    config = warm_start.pinned(config)
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
    device = entry.device("evaluate", config.resources.evaluate)
    settings = config.evaluate
    bundle = load_bundle(trained["bundle"])
    with tracking.stage_run(config.experiment, stage.key, stage.name, context.parent) as run:
        run.log_params({"evaluate": settings.model_dump()})
        context.progress("scoring held-out text")
        dataset = open_dataset(prepared["dataset"])
        heldout = read_heldout(bundle.tokenizer, dataset.texts("heldout"), settings.heldout_bytes)
        losses = token_losses(bundle.model.to(device), heldout, settings.batch_size)
        scores = heldout.scores(float(losses.sum(dtype="float64")), settings.batch_size)
        context.progress(f"{scores.bits_per_byte:.3f} bits per byte; scoring the n-gram model")
        ngram = score_ngrams(dataset, heldout)
        context.progress("measuring loss by context length")
        by_context = context_losses(bundle.model, heldout, losses)
        context.progress("generating samples, and searching the training text for copies")
        # The engine generates on the CPU.
        sampling = sample_and_search(bundle.model.cpu(), bundle.tokenizer, settings, dataset, heldout)
        measures = scores.measures() | {f"ngram_{name}": value for name, value in ngram.measures().items()}
        shares = {f"temperature-{t:g}": share for t, share in sampling.shares.items()}
        shares["heldout"] = sampling.heldout_shares
        copied = {f"{name}/{measure}": v for name, share in shares.items() for measure, v in share.measures().items()}
        samples = [settings.prompt + bundle.tokenizer.decode(sampling.samples[t][0]) for t in settings.temperatures]
        by_temperature = dict(zip(settings.temperatures, samples, strict=True))
        sizes = {"heldout_tokens": scores.tokens, "searched_bytes": sampling.searched_bytes}
        run.log_metrics(measures | copied | sizes)
        contexts = [asdict(loss) for loss in by_context]
        if contexts:
            baselines = {"state carried": scores.nats_per_token, "n-gram model": ngram.nats_per_token}
            run.log_context_losses(contexts, baselines)
        for temperature, text in by_temperature.items():
            run.client.log_text(run.id, text, f"samples/temperature-{temperature:g}.txt")
    for line in report(scores, ngram, by_context, shares, sampling.searched_bytes, by_temperature):
        context.progress(line)
    result = {
        "stage": stage.name,
        "key": stage.key,
        **cast(Measures, measures),
        "context": contexts,
        "copied": copied,
        "searched_bytes": sampling.searched_bytes,
        "text": scores.text_digest,
        "samples": samples,
        "run": run.id,
        "seconds": round(time.monotonic() - started, 1),
    }
    return stage.commit(result)


def report(
    scores: "Scores",
    ngram: "Scores",
    by_context: "list[ContextLoss]",
    shares: "dict[str, CopyShares]",
    searched_bytes: int,
    samples: dict[float, str],
) -> Iterator[str]:
    """Yield the lines of a report for people: the model's scores beside those of the n-gram model, the loss by context
    length, the copy shares, and a sample at each temperature."""
    yield f"{'held-out text':30} {'model':>12} {'n-gram model':>12}"
    for (name, value), other in zip(scores.measures().items(), ngram.measures().values(), strict=True):
        yield f"{name.replace('_', ' '):30} {value:12,.3f} {other:12,.3f}"
    yield f"{'context length in tokens':30} {'nats/token':>12} {'excess':>12}"
    for loss in by_context:
        lengths = f"{loss.first:,} to {loss.last:,}" if loss.last > loss.first else f"{loss.first}"
        yield f"{lengths:30} {loss.nats:12.3f} {loss.excess:12.3f}"
        if loss.excess < NEGLIGIBLE:
            break  # longer contexts give the same loss
    yield f"{'text':30} {'copied':>12} {'repeated':>12}"
    for name, share in shares.items():
        values = (share.copied_share, share.repetition)
        copied, repeated = ("" if value is None else f"{value:.1%}" for value in values)
        yield f"{name:30} {copied:>12} {repeated:>12}"
    yield (
        f"copied: share of 32-character spans that occur in {searched_bytes / 1e6:,.1f} MB of training text; "
        "repeated: share of token 4-grams that occur earlier in the same text"
    )
    for temperature, text in samples.items():
        yield f"sample at temperature {temperature:g}:"
        for line in printable(text).strip("\n").split("\n"):
            yield f"    {line}"


if __name__ == "__main__":
    entry.main("evaluate", __doc__ or "", run)
