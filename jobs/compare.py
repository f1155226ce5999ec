"""Train recurrent cells and a Transformer for the same time on the prepared dataset, and compare their held-out loss.

A table and curves are in the result's MLflow run. Each recurrent model is stored as a bundle, in the directory that the
result names `records`."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gru.config import PipelineConfig
from gru.errors import UserError
from gru.machine import available_cpus
from jobs import entry, stages, warm_start

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=900, help="training time of each trial (default 900)")
    parser.add_argument("--seeds", type=int, default=3, help="number of trials of each contender (default 3)")
    parser.add_argument(
        "--contender",
        metavar="NAME[:KEY=VALUE,...]",
        action="append",
        help="a model to compare, instead of gru, lstm, rnn, mingru and transformer: one of these names, or CONFIG "
        "with overrides under any other name, as in careful:train.learning_rate=0.002; lstm-wide:... overrides lstm; "
        "repeat it for more models",
    )
    parser.add_argument(
        "--page",
        metavar="FILE",
        type=Path,
        help="write a page of HTML for a blind comparison: held-out passages among those of each recurrent contender",
    )


def run(config: PipelineConfig, context: entry.JobContext) -> dict[str, Any]:
    seconds, seeds = context.arguments.seconds, context.arguments.seeds
    if not (seconds > 0 and seeds > 0):
        raise UserError(f"--seconds {seconds} --seeds {seeds}: expected positive numbers")
    page: Path | None = context.arguments.page
    if page and not page.resolve().parent.is_dir():
        raise UserError(f"--page {page}: its directory does not exist")
    entry.require_tracking()
    config = warm_start.pinned(config)
    prepared = stages.prepare_stage(config, context.dataset).require()
    from gru.comparison import report
    from gru.comparison.comparison import Comparison
    from gru.comparison.contenders import DEFAULTS, parse_contenders
    from gru.comparison.page import write_page
    from gru.comparison.trial import Conditions
    from gru.corpus.dataset import open_dataset
    from gru.registry.bundle import load_bundle

    started = time.monotonic()
    dataset = open_dataset(prepared["dataset"])
    specs = context.arguments.contender or DEFAULTS
    contenders = parse_contenders(specs, config, dataset.manifest.vocab_size)
    if page and all(contender.transformer for contender in contenders):
        raise UserError(f"--page {page}: needs a recurrent contender: only those are stored and can generate")
    for contender in contenders:
        contender.lane_order(dataset, config.train.seed)  # reports a corpus that is too small before the first trial
    device, machine = _device(config)
    conditions = Conditions(
        dataset=dataset,
        heldout=dataset.first_tokens("heldout", config.train.heldout_tokens),
        seconds=seconds,
        lanes=config.evaluate.batch_size,
        heldout_bytes=config.evaluate.heldout_bytes,
        device=device,
    )
    seed = config.train.seed
    comparison = Comparison(config, conditions, contenders, range(seed, seed + seeds), machine, context.progress)
    result = comparison.run(context.parent)
    for line in report.table(result["contenders"]).splitlines():
        context.progress(line)
    if wins := result.get("gru_beats_transformer"):
        context.progress(f"gru is better than the transformer at {sum(wins)} of {len(wins)} measurements")
    if page and (bundles := comparison.bundles()):
        context.progress("generating passages for the page")
        write_page(page, config, dataset, {name: load_bundle(bundle) for name, bundle in bundles.items()})
        context.progress(f"blind comparison: open {page.resolve()} in a browser")
        result["page"] = str(page.resolve())
    elif page:
        context.progress(f"{page} is not written: all recurrent contenders diverged")
    return {**result, "took": round(time.monotonic() - started, 1)}


def _device(config: PipelineConfig) -> "tuple[torch.device, str]":
    """Set the number of threads. Return the device to train on, and a name of the hardware."""
    import torch

    device = entry.device("train", config.resources.train)
    threads = config.train.threads or available_cpus()
    torch.set_num_threads(threads)
    return device, torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} threads"


if __name__ == "__main__":
    entry.main("compare", __doc__ or "", run, add_arguments)
