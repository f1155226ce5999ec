"""One trial of a comparison: a contender trained for a given time, and measured during and after training.

A trial runs in this process, without Ray: a `Learner` on the lanes of a dataset. Its clock runs during training and
stops during measurements; the learning rate follows the share of the time that has passed.
T time, B lanes, N tokens.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gru.comparison.contenders import Contender
from gru.comparison.gradient_reach import gradient_reach
from gru.corpus.batches import LaneReader, sliding_batches, stream_batches
from gru.corpus.dataset import Dataset, decode
from gru.evaluation.scores import Scores, read_heldout
from gru.model.interface import LanguageModel
from gru.model.loss import stream_loss
from gru.model.transformer import Transformer
from gru.registry.tracking import LOSS, Point
from gru.training.learner import Diverged, Learner

MEASUREMENTS = 16
"""Number of measurements of the held-out loss, spread evenly over the time."""
MAX_POINTS = 128
"""Largest number of logged points of the training loss between measurements."""
SEQUENCE_LENGTH = 256
"""Tokens of held-out text that a recurrent model reads per batch and lane."""
REACH = 512
"""Number of tokens back to which gradients are followed."""
REACH_LANES = 32
STREAM_LENGTHS = (1_000, 10_000)
"""Lengths in tokens for which the memory of a stream is reported."""


class TrialRecord(TypedDict):
    """The result of a trial, as plain JSON."""

    name: str
    seed: int
    settings: dict[str, Any]
    parameters: int
    precision: str
    device: str
    seconds: float
    steps: int
    tokens_per_second: float
    points: list[Point]  # `time` in training seconds
    heldout: list[float]  # nats per token at each of the `MEASUREMENTS`; fewer if the trial diverged
    characters_per_token: float  # of the held-out text that is measured during training
    bytes_per_token: float
    nats_per_character: float | None  # after training, on all held-out text; None if the trial diverged
    bits_per_byte: float | None
    reach: list[float]  # see gradient_reach
    state_bytes: dict[str, int]  # memory of a stream, by its length in tokens
    diverged: str | None


@dataclass(frozen=True)
class Conditions:
    """The conditions that all trials of a comparison share."""

    dataset: Dataset
    heldout: np.ndarray
    """Held-out tokens [N] that are measured during training."""
    seconds: float
    """Training time of each trial."""
    lanes: int
    """Number of lanes in which held-out text is read."""
    heldout_bytes: int
    """Number of bytes of held-out text that are scored after training, at most."""
    device: torch.device


@dataclass(frozen=True)
class TrainingCurve:
    """What was measured during a trial's training, in the order of steps."""

    points: list[Point] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)
    """Held-out loss in nats per token at each measurement."""


def train_contender(
    contender: Contender, seed: int, conditions: Conditions, show: Callable[[str], None]
) -> tuple[TrialRecord, LanguageModel]:
    """Train a contender and return its record and its averaged model. Raises UserError if the corpus is too small."""
    manifest, device = conditions.dataset.manifest, conditions.device
    config = contender.train.model_copy(update={"seed": seed})
    learner = Learner(
        contender.model, config, manifest.vocab_size, manifest.end_of_text, device=device, build=contender.build
    )
    curve = TrainingCurve()
    diverged = _train(learner, contender, conditions, curve, show)
    # fp32, as the model would be served
    model = contender.build(contender.model, manifest.vocab_size, torch.float32).to(device)
    model.load_state_dict(learner.average.state_dict())
    scores = None if diverged else _scores(model, contender, conditions)
    return _record(contender, conditions, learner, model, curve, scores, diverged), model


def _train(
    learner: Learner, contender: Contender, conditions: Conditions, curve: TrainingCurve, show: Callable[[str], None]
) -> str | None:
    """Train for the trial's time. Return why the training diverged; None if it did not."""
    dataset = conditions.dataset
    end_of_text, segments = dataset.manifest.end_of_text, dataset.segments("train")

    def measure() -> float:
        batches = _heldout_batches(conditions.heldout, contender, conditions)
        loss = stream_loss(learner.average, batches, conditions.lanes) / len(conditions.heldout)
        show(f"step {learner.step:,}, held-out loss {loss:.4f}")
        return loss

    def read(index: int) -> np.ndarray:
        return dataset.read_segment(segments[index])

    order = contender.lane_order(dataset, learner.config.seed)
    with LaneReader(order, read, end_of_text, learner.lanes) as reader:
        try:
            train_for(learner, reader.batch, conditions.seconds, measure, curve)
        except Diverged as divergence:
            return str(divergence)
    if not math.isfinite(curve.heldout[-1]):
        return f"the held-out loss is {curve.heldout.pop()} at step {learner.step}"
    return None


def _heldout_batches(
    tokens: np.ndarray, contender: Contender, conditions: Conditions
) -> Iterable[tuple[np.ndarray, ...]]:
    """Return batches of held-out tokens: overlapping windows for the Transformer, which carries no state."""
    end_of_text, lanes = conditions.dataset.manifest.end_of_text, conditions.lanes
    if contender.transformer:
        return sliding_batches(tokens, lanes, contender.train.sequence_length, end_of_text)
    return stream_batches(tokens, lanes, SEQUENCE_LENGTH, end_of_text)


def _scores(model: LanguageModel, contender: Contender, conditions: Conditions) -> Scores:
    dataset, lanes = conditions.dataset, conditions.lanes
    text = read_heldout(dataset.tokenizer(), dataset.texts("heldout"), conditions.heldout_bytes)
    return text.scores(stream_loss(model, _heldout_batches(text.tokens, contender, conditions), lanes), lanes)


def _record(
    contender: Contender,
    conditions: Conditions,
    learner: Learner,
    model: LanguageModel,
    curve: TrainingCurve,
    scores: Scores | None,
    diverged: str | None,
) -> TrialRecord:
    config, device, points = learner.config, conditions.device, curve.points
    heldout, end_of_text = conditions.heldout, conditions.dataset.manifest.end_of_text
    text = decode(conditions.dataset.tokenizer(), heldout[heldout != end_of_text])
    distance = min(REACH, config.sequence_length) if contender.transformer else REACH
    return {
        "name": contender.name,
        "seed": config.seed,
        "settings": {
            "model": contender.model.model_dump(),
            "train": config.model_dump(),
            "transformer": contender.transformer and asdict(contender.transformer),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": learner.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": points[-1]["time"] if points else 0.0,
        "steps": learner.step,
        "tokens_per_second": float(np.median([point["metrics"]["train/tokens_per_second"] for point in points] or [0])),
        "points": points,
        "heldout": curve.heldout,
        "characters_per_token": len(text.decode(errors="replace")) / len(heldout),
        "bytes_per_token": len(text) / len(heldout),
        "nats_per_character": scores.nats_per_character if scores else None,
        "bits_per_byte": scores.bits_per_byte if scores else None,
        "reach": [] if diverged else gradient_reach(model, heldout, distance, REACH_LANES, end_of_text),
        "state_bytes": {str(tokens): stream_bytes(model, tokens) for tokens in STREAM_LENGTHS},
        "diverged": diverged,
    }


def stream_bytes(model: LanguageModel, tokens: int) -> int:
    """Return the memory in bytes, in fp32, of a served stream that has read `tokens` tokens: a recurrent model's state,
    or the keys and values of the Transformer."""
    return model.cache_bytes(tokens) if isinstance(model, Transformer) else model.initial_state(1).nbytes


def train_for(
    learner: Learner,
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]],
    seconds: float,
    measure: Callable[[], float],
    curve: TrainingCurve,
) -> None:
    """Train until `seconds` of training have passed, and append points and held-out losses to `curve`.

    `measure` returns the held-out loss. It is called at `MEASUREMENTS` marks, evenly spaced over the time, while the
    clock is stopped. If one step passes several marks, its measurement counts for each of them. Training ends with a
    measurement that is not finite. Raises Diverged.
    """
    elapsed = last_point = 0.0
    step_losses: list[Tensor] = []
    tokens = 0
    marks = [seconds * (mark + 1) / MEASUREMENTS for mark in range(MEASUREMENTS)]
    while elapsed < seconds and all(map(math.isfinite, curve.heldout)):
        started = time.perf_counter()
        inputs_TB, targets_TB = batch(learner.step)
        loss = learner.train_step(inputs_TB, targets_TB, elapsed=elapsed / seconds)
        if learner.step % learner.config.log_steps == 0:
            learner.confirm()  # the clock includes the work of a GPU
        elapsed += time.perf_counter() - started
        step_losses.append(loss)
        tokens += inputs_TB.size
        due = sum(mark <= elapsed for mark in marks) - len(curve.heldout)
        if not due and elapsed - last_point < seconds / MAX_POINTS:
            continue
        norm = learner.confirm()
        metrics = {
            LOSS: float(torch.stack(step_losses).mean()),
            "train/gradient_norm": norm,
            "train/learning_rate": learner.learning_rate,
            "train/tokens_per_second": tokens / (elapsed - last_point),
            "train/seconds": elapsed,
        }
        if due:
            metrics["heldout/loss"] = heldout_loss = measure()
            curve.heldout.extend([heldout_loss] * (due if math.isfinite(heldout_loss) else 1))
        curve.points.append({"step": learner.step, "time": elapsed, "metrics": metrics})
        step_losses, tokens, last_point = [], 0, elapsed
