"""Train other recurrent cells and a Transformer too, each for equal time on the prepared dataset, and compare them.

Each recurrent model is kept as a bundle, in the directory that the result names `records`."""

import argparse
import os
import time
from typing import Any

from gru import storage
from gru.config import PipelineConfig, content_key
from gru.errors import UserError
from gru.registry import tracking
from gru.registry.bundle import write_bundle
from jobs import entry, stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=900, help="training time of each (default 900)")
    parser.add_argument("--seeds", type=int, default=3, help="how often each is trained (default 3)")
    parser.add_argument(
        "--contender",
        metavar="NAME[:KEY=VALUE,...]",
        action="append",
        help="who is compared instead of gru, lstm, rnn, mingru and transformer: one of these or, as in "
        "careful:train.learning_rate=0.002, CONFIG with overrides; lstm-wide:... begins with lstm",
    )


def run(config: PipelineConfig, context: entry.JobContext) -> dict[str, Any]:
    seconds, seeds = context.arguments.seconds, context.arguments.seeds
    if not (seconds > 0 and seeds > 0):
        raise UserError(f"--seconds {seconds} --seeds {seeds}: expected positive numbers")
    entry.require_tracking()
    prepared = stages.prepare_stage(config, context.dataset).require()
    import torch

    from gru.comparison import contenders, report, trial
    from gru.corpus.dataset import open_dataset

    started = time.monotonic()
    dataset = open_dataset(prepared["dataset"])
    told = context.arguments.contender or contenders.DEFAULTS
    chosen = [contenders.parse_contender(each, config, dataset.manifest.vocab_size) for each in told]
    if twice := {each.name for each in chosen if sum(other.name == each.name for other in chosen) > 1}:
        raise UserError(f"--contender {twice.pop()}: given twice: expected another name for each")
    for each in chosen:
        each.lane_order(dataset, config.train.seed)  # a corpus too small for the last is told before the first
    gpu = config.resources.train.gpus > 0
    if gpu and not torch.cuda.is_available():
        raise UserError("resources.train.gpus = 1: this machine has no GPU")
    device = torch.device("cuda" if gpu else "cpu")
    threads = config.train.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    machine = torch.cuda.get_device_name(device) if gpu else f"{threads} threads"
    heldout = dataset.first_tokens("heldout", config.train.heldout_tokens)
    settings = config.evaluate
    measured = [settings.batch_size, settings.heldout_bytes, config.train.heldout_tokens]
    directory = storage.join(
        config.storage, "comparisons", content_key("compare", prepared["digest"], measured, seconds, machine)
    )
    drawn = range(config.train.seed, config.train.seed + seeds)
    key = content_key(directory.rsplit("/", 1)[1], [(each.name, each.key) for each in chosen], list(drawn))

    def record_of(contender: contenders.Contender, seed: int, parent: tracking.Run) -> trial.TrialRecord:
        path = storage.join(directory, f"{contender.name}-{contender.key}-{seed}.json")
        name = f"{contender.name}, seed {seed}"
        child_key = content_key(key, contender.name, seed)
        if storage.exists(path) and tracking.is_finished(config.experiment, child_key):
            context.progress(f"{name}: done already")
            return storage.read_json(path)
        with tracking.stage_run(config.experiment, child_key, name, parent.id) as child:
            begun = time.time()
            if storage.exists(path):
                context.progress(f"{name}: done already")
                record: trial.TrialRecord = storage.read_json(path)
            else:
                context.progress(f"{name}: training for {seconds:g} s")

                def show(line: str) -> None:
                    context.progress(f"{name}: {line}")

                record, model = trial.train_contender(
                    contender,
                    seed,
                    dataset,
                    heldout,
                    seconds,
                    settings.batch_size,
                    settings.heldout_bytes,
                    device,
                    show,
                )
                if not (contender.transformer or record["diverged"]):
                    lineage = {
                        "run": child.id,
                        "checkpoint_step": record["steps"],
                        "dataset": prepared["dataset"],
                        "dataset_digest": prepared["digest"],
                        "tokenizer_digest": dataset.manifest.tokenizer_digest,
                        "sources": config.corpus.sources,
                        "versions": {"torch": str(torch.__version__)},
                    }
                    bundle = path.removesuffix(".json")
                    write_bundle(bundle, contender.model, model.state_dict(), dataset.tokenizer(), lineage)
                storage.write_json(path, record)
                context.progress(f"{name}: {_outcome(record)}")
            child.log_params({"contender": contender.name, "seed": seed, **record["settings"]})
            child.log_points([{**point, "time": begun + point["time"]} for point in record["points"]])
            finals = {"nats_per_character": record["nats_per_character"], "bits_per_byte": record["bits_per_byte"]}
            child.log_metrics(
                {
                    "parameters": record["parameters"],
                    "tokens_per_second": record["tokens_per_second"],
                    **{name: value for name, value in finals.items() if value is not None},
                }
            )
        return record

    runs: report.Runs = {each.name: [] for each in chosen}
    with tracking.stage_run(config.experiment, key, "compare", context.parent) as run:
        run.log_params({"seconds": seconds, "seeds": seeds, "contenders": ", ".join(runs), "machine": machine})
        counts = {"train": dataset.manifest.train.model_dump(), "heldout": dataset.manifest.heldout.model_dump()}
        run.log_dataset(config.name, prepared["digest"], prepared["dataset"], counts)
        for seed in drawn:
            for contender in chosen:
                runs[contender.name].append(record_of(contender, seed, run))
        rows = report.summarise(runs)
        result: dict[str, Any] = {
            "stage": "compare",
            "key": key,
            "run": run.id,
            "records": directory,
            "seconds": seconds,
            "contenders": rows,
        }
        if {"gru", contenders.TRANSFORMER} <= runs.keys():
            result["gru_beats_transformer"] = report.better(runs, "gru", contenders.TRANSFORMER)
        run.client.log_text(run.id, report.table(rows), "table.md")
        run.client.log_dict(run.id, {**result, "records": runs}, "comparison.json")
        for name in ("comparison.png", "comparison.svg"):
            run.client.log_figure(run.id, report.picture(runs, seconds), name)
    for line in report.table(rows).splitlines():
        context.progress(line)
    if won := result.get("gru_beats_transformer"):
        context.progress(f"gru is better than the transformer at {sum(won)} of {len(won)} equal times")
    return {**result, "took": round(time.monotonic() - started, 1)}


def _outcome(record: Any) -> str:
    if record["diverged"]:
        return f"diverged: {record['diverged']}"
    return f"{record['bits_per_byte']:.4f} bits per byte, {record['tokens_per_second']:,.0f} tokens/s"


if __name__ == "__main__":
    entry.main("compare", __doc__ or "", run, add_arguments)
