"""Different models on the same text for equal time: who trains, for how long, and what is measured on the way.

A contender is trained by one process, with no Ray: `Learner` on the lanes of a dataset. Its clock runs while it trains
and stands still while it is measured; learning rates follow the share of the time that is over.
T time, B lanes, E embedding.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gru.comparison.contenders import Contender
from gru.comparison.gradient_reach import gradient_reach
from gru.corpus.batches import LaneReader, sliding_batches, stream_batches
from gru.corpus.dataset import Dataset, decode
from gru.evaluation.scores import read_heldout
from gru.model.interface import LanguageModel
from gru.model.loss import stream_loss
from gru.model.transformer import Transformer
from gru.registry.tracking import LOSS, Point
from gru.training.learner import Diverged, Learner

MEASUREMENTS = 16
"""Of the held-out loss, spread evenly over the time."""
POINTS = 128
"""Logged of the training loss, at most."""
REACH = 512
"""Tokens into the past to which gradients are followed."""
REACH_LANES = 32
STREAMS = (1_000, 10_000)
"""Lengths in tokens at which the memory of a stream is told."""


class TrialRecord(TypedDict):
    """What came of one contender and seed; plain JSON."""

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
    heldout: list[float]  # nats per token at the end of each `MEASUREMENTS`-th of the time; fewer if it diverged
    characters_per_token: float  # of the text that those are measured on
    bytes_per_token: float
    nats_per_character: float | None  # at the end, on all held-out text; None if it diverged
    bits_per_byte: float | None
    reach: list[float]  # see gradient_reach
    state_bytes: dict[str, int]  # by length of the stream
    diverged: str | None


def train_contender(
    contender: Contender,
    seed: int,
    dataset: Dataset,
    heldout: np.ndarray,
    seconds: float,
    lanes: int,
    most_bytes: int,
    device: torch.device,
    show: Callable[[str], None],
) -> tuple[TrialRecord, LanguageModel]:
    """Train one contender for so many seconds, measured on the tokens `heldout` on the way and at its end on all
    held-out text, `most_bytes` at most, read in `lanes` stretches. Raises UserError if the corpus is too small."""
    manifest, config = dataset.manifest, contender.train.model_copy(update={"seed": seed})
    learner = Learner(
        contender.model, config, manifest.vocab_size, manifest.end_of_text, device=device, build=contender.build
    )
    # What carries no state is scored on windows that overlap.
    cut, window = (sliding_batches, config.sequence_length) if contender.transformer else (stream_batches, 256)

    def measure() -> float:
        batches = cut(heldout, lanes, window, manifest.end_of_text)
        loss = stream_loss(learner.average, batches, lanes) / len(heldout)
        show(f"step {learner.step:,}, held-out loss {loss:.4f}")
        return loss

    diverged: str | None = None
    points: list[Point] = []
    losses: list[float] = []
    segments = dataset.segments("train")

    def read(index: int) -> np.ndarray:
        return dataset.read_segment(segments[index])

    order = contender.lane_order(dataset, seed)
    with LaneReader(order, read, manifest.end_of_text, learner.lanes) as reader:
        try:
            train_for(learner, reader.batch, seconds, measure, points, losses)
        except Diverged as divergence:
            diverged = str(divergence)
    if diverged is None and not math.isfinite(losses[-1]):
        diverged = f"the held-out loss is {losses.pop()} at step {learner.step}"
    tokenizer = dataset.tokenizer()
    model = contender.build(contender.model, manifest.vocab_size, torch.float32).to(device)  # as it would be served
    model.load_state_dict(learner.average.state_dict())
    text = decode(tokenizer, heldout[heldout != manifest.end_of_text])
    scores = None
    if diverged is None:
        whole = read_heldout(tokenizer, dataset.texts("heldout"), most_bytes)
        scores = whole.scores(stream_loss(model, cut(whole.tokens, lanes, window, manifest.end_of_text), lanes), lanes)
    distance = min(REACH, config.sequence_length) if contender.transformer else REACH
    record: TrialRecord = {
        "name": contender.name,
        "seed": seed,
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
        "heldout": losses,
        "characters_per_token": len(text.decode(errors="replace")) / len(heldout),
        "bytes_per_token": len(text) / len(heldout),
        "nats_per_character": scores.nats_per_character if scores else None,
        "bits_per_byte": scores.bits_per_byte if scores else None,
        "reach": [] if diverged else gradient_reach(model, heldout, distance, REACH_LANES, manifest.end_of_text),
        "state_bytes": {str(tokens): stream_bytes(model, tokens) for tokens in STREAMS},
        "diverged": diverged,
    }
    return record, model


def stream_bytes(model: LanguageModel, tokens: int) -> int:
    """Memory of one stream that has read so many tokens, in fp32 as it is served: its state, or all keys and values."""
    return model.cache_bytes(tokens) if isinstance(model, Transformer) else model.initial_state(1).nbytes


def train_for(
    learner: Learner,
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]],
    seconds: float,
    measure: Callable[[], float],
    points: list[Point],
    losses: list[float],
) -> None:
    """Train until so many seconds of training are over.

    `measure` is called at the end of each `MEASUREMENTS`-th of them, off the clock, and its values go to `losses`;
    what happened goes to `points`. A measurement that a long step reached past belongs to every mark before it; one
    that is not finite is the last. Raises Diverged.
    """
    spent = since_spent = 0.0
    since: list[Tensor] = []
    tokens = 0
    marks = [seconds * (mark + 1) / MEASUREMENTS for mark in range(MEASUREMENTS)]
    while spent < seconds and all(map(math.isfinite, losses)):
        started = time.perf_counter()
        inputs_TB, targets_TB = batch(learner.step)
        loss, norm = learner.train_step(inputs_TB, targets_TB, elapsed=spent / seconds)
        spent += time.perf_counter() - started
        since.append(loss)
        tokens += inputs_TB.size
        due = sum(mark <= spent for mark in marks) - len(losses)
        if not due and spent - since_spent < seconds / POINTS:
            continue
        metrics = {
            LOSS: float(torch.stack(since).mean()),
            "train/gradient_norm": norm,
            "train/learning_rate": learner.optimizer.param_groups[0]["lr"],
            "train/tokens_per_second": tokens / (spent - since_spent),
            "train/seconds": spent,
        }
        if due:
            metrics["heldout/loss"] = measured = measure()
            losses += [measured] * (due if math.isfinite(measured) else 1)
        points.append({"step": learner.step, "time": spent, "metrics": metrics})
        since, tokens, since_spent = [], 0, spent
