"""A GRU against published numbers on the same texts: trained for some minutes, and scored once on the test part.

python -m tests.benchmarks.published TEXT --table NAME [--minutes M] [--seeds N] [--output FILE] [--picture FILE]

TEXT is a file, or for the tables of the Penn Treebank a directory: see published_texts.py. What is chosen is chosen on
the validation part: settings of training with --validation-only, those of dynamic evaluation by the command itself.
Minutes are those of training; measurements are not counted. With --output, each finished seed is a line of JSON there,
and the same command skips it when started again. --picture draws the validation loss over the minutes.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from gru.comparison.trial import MEASUREMENTS, TrainingCurve, train_for
from gru.config import PipelineConfig, TrainConfig, content_key, load
from gru.corpus.batches import LaneOrder, LaneReader, stream_batches
from gru.errors import UserError
from gru.evaluation.dynamic import DynamicSettings, dynamic_loss, gradient_rms
from gru.machine import available_cpus
from gru.model.language_model import GRULanguageModel
from gru.model.loss import stream_loss
from gru.training.learner import Diverged, Learner
from jobs import entry
from tests.benchmarks.published_texts import Ids, Text, read_ptb_characters, read_ptb_words, read_war_and_peace
from tests.benchmarks.recipe import train_steps

PRESET = Path(__file__).parents[2] / "pipelines" / "configs" / "novel.toml"
# Of dynamic evaluation: learning rates, tried with this decay, and then decays, tried with the best of them.
RATES, DECAY, DECAYS = (1e-4, 3e-4, 1e-3), 1e-3, (0.0, 1e-4, 1e-2)
TUNED_TOKENS = 40_000  # of the validation part, on which these are chosen
STATISTICS_TOKENS = 20_000  # of the training part, for the gradients' rms
WINDOW = 256  # tokens that are scored at a time
Show = Callable[[str], None]


class Table(NamedTuple):
    """A published table: its text, its measure, and its numbers."""

    read: Callable[[Path], Text]
    unit: str
    value: Callable[[float], float]
    """Returns the measure of a loss in nats per symbol."""
    digits: int
    rows: dict[str, float]


def bits(nats: float) -> float:
    return nats / math.log(2)


TABLES = {
    "war-and-peace": Table(
        read_war_and_peace,
        "nats per character",
        float,
        4,
        {
            "best of 36 RNNs (Karpathy, Johnson, Fei-Fei 2015, arXiv:1506.02078)": 1.077,
            "20-gram model (the same)": 1.195,
        },
    ),
    "ptb-characters": Table(
        read_ptb_characters,
        "bits per character",
        bits,
        4,
        {
            "AWD-LSTM (Merity, Keskar, Socher 2018, arXiv:1803.08240)": 1.175,
            "QRNN (the same)": 1.187,
        },
    ),
    "ptb-words": Table(
        read_ptb_words,
        "perplexity",
        math.exp,
        2,
        {
            "GRU (Bai, Kolter, Koltun 2018, arXiv:1803.01271)": 92.48,
            "LSTM (the same)": 78.93,
            "AWD-LSTM, 500 epochs on a GPU (Merity, Keskar, Socher 2017, arXiv:1708.02182)": 57.3,
        },
    ),
}


@dataclass(frozen=True)
class Conditions:
    """The conditions that the trainings of all seeds share."""

    table: str
    text: Text
    config: PipelineConfig
    minutes: float | None
    """Minutes of training; None: `train.steps` decide."""
    validation_only: bool
    """Whether the test part is left alone."""

    @property
    def key(self) -> str:
        """A key of all that the results depend on, but for the seed and the machine."""
        unused = set(TrainConfig.PLACEMENT) | {"seed"} | ({"steps"} if self.minutes else set())
        train = self.config.train.model_dump(exclude=unused)
        return content_key(self.table, self.text.digest, self.config.model, train, self.minutes, self.validation_only)


def run_seed(conditions: Conditions, seed: int, show: Show) -> dict[str, Any]:
    """Train and score the model of a seed. Return the record of it, as plain JSON. Raises Diverged."""
    text, config = conditions.text, conditions.config
    train = config.train.model_copy(update={"seed": seed, "workers": 1, "min_workers": None, "bitwise_elastic": 0})
    device = entry.device("train", config.resources.train)
    learner = Learner(config.model, train, text.vocab_size, text.end_of_text, device=device)
    started = time.monotonic()
    seconds, curve = train_model(learner, conditions, show)
    took = time.monotonic() - started
    model = GRULanguageModel(config.model, text.vocab_size).to(device)  # in fp32, as it would be served
    model.load_state_dict(learner.average.state_dict())
    show("scoring the validation part")
    scores = {"validation": static_loss(model, text.validation, text.end_of_text)}
    settings = None
    if not conditions.validation_only:
        show("choosing the settings of dynamic evaluation on the validation part")
        rms_P, settings = choose_settings(model, text, show)
        show("scoring the test part, once")
        scores["test"] = static_loss(model, text.test, text.end_of_text)
        dynamic = dynamic_loss(model, text.test, text.end_of_text, rms_P, settings)
        scores["test, dynamic"] = dynamic / len(text.test)
    return {
        "table": conditions.table,
        "key": conditions.key,
        "seed": seed,
        "nats": scores,
        "curve": curve,
        "dynamic": settings and asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": learner.step,
        "tokens": learner.step * train.batch_size * train.sequence_length,
        "minutes": round((took if seconds is None else seconds) / 60, 2),
        "machine": f"{processor(device)}, {learner.precision}",
        "date": time.strftime("%Y-%m-%d"),
        "settings": {"model": config.model.model_dump(), "train": train.model_dump()},
    }


def train_model(learner: Learner, conditions: Conditions, show: Show) -> tuple[float | None, list[float]]:
    """Train a model. Return the seconds of training and its validation losses, at evenly spaced moments.

    Seconds are those without measurements; None if the number of steps is fixed.
    """
    text, train = conditions.text, learner.config
    size = conditions.config.corpus.segment_tokens
    segments = [text.train[start : start + size] for start in range(0, len(text.train), size)]
    order = LaneOrder(list(map(len, segments)), train.seed, train.batch_size, train.sequence_length)
    started, losses = time.monotonic(), list[float]()

    def measure() -> float:
        loss = learner.heldout_loss(text.validation[: train.heldout_tokens])
        minutes = (time.monotonic() - started) / 60
        epochs = learner.step * train.batch_size * train.sequence_length / len(text.train)
        show(f"{minutes:.1f} min: step {learner.step:,}, {epochs:.1f} epochs, validation loss {loss:.4f}")
        losses.append(loss)
        return loss

    with LaneReader(order, segments.__getitem__, text.end_of_text, learner.lanes) as reader:
        if conditions.minutes is None:
            train_steps(learner, reader.batch, measure, MEASUREMENTS)
            return None, losses
        curve = TrainingCurve()
        train_for(learner, reader.batch, conditions.minutes * 60, measure, curve)
        return curve.points[-1]["time"], curve.heldout


def choose_settings(model: GRULanguageModel, text: Text, show: Show) -> tuple[torch.Tensor, DynamicSettings]:
    """Return the gradients' rms on training text, and the settings with the lowest loss on validation text."""
    segment = DynamicSettings(0.0, 0.0).segment
    rms_P = gradient_rms(model, text.train[-STATISTICS_TOKENS:], segment, text.end_of_text)
    tokens = text.validation[:TUNED_TOKENS]
    losses: dict[DynamicSettings, float] = {}

    def best_of(candidates: list[DynamicSettings]) -> DynamicSettings:
        for settings in (each for each in candidates if each not in losses):
            loss = dynamic_loss(model, tokens, text.end_of_text, rms_P, settings) / len(tokens)
            losses[settings] = loss if math.isfinite(loss) else math.inf
            show(f"learning rate {settings.learning_rate:g}, decay {settings.decay:g}: {loss:.4f} nats")
        return min(losses, key=losses.__getitem__)

    best = best_of([DynamicSettings(rate, DECAY) for rate in RATES])
    return rms_P, best_of([DynamicSettings(best.learning_rate, decay) for decay in DECAYS])


def static_loss(model: GRULanguageModel, tokens: Ids, end_of_text: int) -> float:
    """Return the loss of a part in nats per symbol, with the state carried from its first symbol to its last."""
    return stream_loss(model, stream_batches(tokens, 1, WINDOW, end_of_text), 1) / len(tokens)


def processor(device: torch.device) -> str:
    """Return the name of the GPU, or of this machine's processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def read_records(path: Path | None, key: str) -> dict[int, dict[str, Any]]:
    """Return the records of these conditions in a results file, by seed. A line that was cut off is left out."""
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the process was killed while it wrote
        if record["key"] == key:
            records[record["seed"]] = record
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a line of JSON to a results file, whose last line may be cut off."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    separator = "" if before.endswith("\n") or not before else "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(separator + json.dumps(record, ensure_ascii=False) + "\n")


def format_table(table: Table, records: list[dict[str, Any]]) -> str:
    """Return the published numbers, those of each seed, and their median, as a Markdown table."""
    lines = [
        f"| test part, {table.unit} | static | dynamic | validation, static | parameters | minutes | machine |",
        "|---|---:|---:|---:|---:|---:|---|",
        *(f"| {name} | {value} | | | | | |" for name, value in table.rows.items()),
    ]

    def row(name: str, chosen: list[dict[str, Any]]) -> str:
        first = chosen[0]
        scores = [
            f"{table.value(median(record['nats'][part] for record in chosen)):.{table.digits}f}"
            if part in first["nats"]
            else ""
            for part in ("test", "test, dynamic", "validation")
        ]
        minutes = f"{median(record['minutes'] for record in chosen):.1f}"
        return f"| {' | '.join([name, *scores, format(first['parameters'], ','), minutes, first['machine']])} |"

    lines += [row(f"ours, seed {record['seed']}, {record['steps']:,} steps", [record]) for record in records]
    if len(records) > 1:
        lines.append(row(f"ours, median of {len(records)} seeds", records))
    return "\n".join(lines)


def draw(table: Table, records: list[dict[str, Any]], path: Path) -> None:
    """Write a picture of the validation loss of all seeds over time, and of theirs and others' on the test part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for index, record in enumerate(records):
        label, (curve, minutes, nats) = "_" * (index > 0), (record[key] for key in ("curve", "minutes", "nats"))
        times = [minutes * (mark + 1) / len(curve) for mark in range(len(curve))]
        measured = record["settings"]["train"]["heldout_tokens"]
        start = f"{label}ours, beginning of the validation part ({measured:,} symbols)"
        axes.plot(times, list(map(table.value, curve)), color="C0", label=start)
        for part, marker, colour in (("test", "o", "C1"), ("test, dynamic", "D", "C2")):
            if part in nats:
                name = f"{label}ours, {part.replace('test', 'test part')}"
                axes.plot(minutes, table.value(nats[part]), marker, markersize=5, color=colour, label=name)
    for index, (name, value) in enumerate(table.rows.items()):
        axes.axhline(value, color="black", linestyle=("--", ":", "-.")[index], label=f"test part: {name}")
    worst = max(value for record in records for value in record["curve"][len(record["curve"]) // 8 :])
    axes.set(xlabel="minutes of training", ylabel=table.unit, xlim=(0, None), ylim=(None, table.value(worst)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", metavar="TEXT", type=Path, help="file or directory of the text")
    parser.add_argument("--table", choices=TABLES, required=True, help="table whose numbers to compare with")
    parser.add_argument("--config", metavar="CONFIG", default=PRESET, help=f"TOML file (default {PRESET.name})")
    parser.add_argument("--set", metavar="K=V", action="append", default=[], help="override a key of CONFIG")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20, help="minutes of training (default 20)")
    length.add_argument("--steps", type=int, help="number of steps, instead of minutes")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings (default 3)")
    parser.add_argument(
        "--validation-only", action="store_true", help="leave the test part alone: to choose between settings"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="results, a line of JSON for each finished seed")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="PNG or SVG of the losses")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> None:
    if arguments.minutes <= 0 or arguments.seeds <= 0:
        raise UserError(f"--minutes {arguments.minutes:g} --seeds {arguments.seeds}: expected positive numbers")
    for option in ("output", "picture"):
        path = getattr(arguments, option)
        if path and not path.resolve().parent.is_dir():
            raise UserError(f"--{option} {path}: its directory does not exist")
    table = TABLES[arguments.table]
    text = table.read(arguments.text)
    steps = [] if arguments.steps is None else [f"train.steps={arguments.steps}"]
    config = load(arguments.config, [*arguments.set, *steps])
    conditions = Conditions(
        arguments.table, text, config, None if steps else arguments.minutes, arguments.validation_only
    )
    torch.set_num_threads(config.train.threads or available_cpus())
    sizes = ", ".join(f"{len(part):,}" for part in (text.train, text.validation, text.test))
    show(f"{arguments.table}: {len(text.symbols):,} symbols; parts of {sizes} symbols")
    records = read_records(arguments.output, conditions.key)
    for seed in range(arguments.seeds):
        if seed in records:
            show(f"seed {seed}: done already")
            continue
        records[seed] = run_seed(conditions, seed, partial(show_seed, seed))
        if arguments.output:
            append_record(arguments.output, records[seed])
        for part, nats in records[seed]["nats"].items():
            show_seed(seed, f"{part} part: {table.value(nats):.{table.digits}f} {table.unit}")
    chosen = [records[seed] for seed in range(arguments.seeds)]
    print(format_table(table, chosen), flush=True)
    if arguments.picture:
        draw(table, chosen, arguments.picture)


def show(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def show_seed(seed: int, line: str) -> None:
    show(f"seed {seed}: {line}")


def main() -> None:
    try:
        run(parse_arguments())
    except (UserError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
