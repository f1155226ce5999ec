"""The time of a trial. Whole comparisons are tested with their job."""

import itertools
import math
import time

import numpy as np
import pytest

from gru.comparison.trial import MEASUREMENTS, TrainingCurve, train_for
from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.training.learner import Learner, learning_rate

VOCAB, END = 60, 0
CORPUS = np.tile(np.arange(1, 11, dtype=np.uint16), 2000)


def test_learning_rates_follow_the_share_of_the_run() -> None:
    train = TrainConfig(steps=100, warmup_steps=0, learning_rate=1.0, final_learning_rate=0.1)
    assert [learning_rate(train, step) for step in range(100)] == [
        learning_rate(train, step, step / 100) for step in range(100)
    ]
    assert learning_rate(train, 7, 0.5) == pytest.approx(0.55)
    assert learning_rate(train, 999, 1.0) == pytest.approx(0.1)


def train(seconds: float, pause: float) -> tuple[TrainingCurve, float]:
    """Train a small model. Return what was measured, and the wall time in seconds."""
    settings = TrainConfig(batch_size=4, sequence_length=16, warmup_steps=2)
    learner = Learner(ModelConfig(embedding=32, hidden=32), settings, VOCAB, END)
    curve = TrainingCurve()

    def measure() -> float:
        time.sleep(pause)
        return learner.heldout_loss(CORPUS[:400])

    order = LaneOrder([len(CORPUS)], 0, settings.batch_size, settings.sequence_length)
    started = time.monotonic()
    with LaneReader(order, lambda index: CORPUS, END, learner.lanes) as reader:
        train_for(learner, reader.batch, seconds, measure, curve)
    return curve, time.monotonic() - started


@pytest.mark.slow
def test_the_clock_is_stopped_while_the_heldout_loss_is_measured() -> None:
    curve, took = train(1.5, pause=0.2)
    points, losses = curve.points, curve.heldout
    measured = [point for point in points if "heldout/loss" in point["metrics"]]
    assert 1.5 <= points[-1]["time"] <= took - 0.2 * len(measured)
    for mark, point in enumerate(measured):
        assert point["time"] >= 1.5 * (mark + 1) / MEASUREMENTS
    assert len(losses) == MEASUREMENTS
    assert losses[-1] == points[-1]["metrics"]["heldout/loss"] < losses[0]
    rates = [point["metrics"]["train/learning_rate"] for point in points]
    assert rates[-1] < max(rates)
    steps = [point["step"] for point in points]
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_a_measurement_after_a_long_step_counts_for_all_marks_it_passed() -> None:
    curve, _ = train(1e-6, pause=0.0)
    assert (len(curve.points), len(curve.heldout)) == (1, MEASUREMENTS)


def test_training_ends_with_a_loss_that_is_not_finite() -> None:
    settings = TrainConfig(batch_size=4, sequence_length=16)
    learner = Learner(ModelConfig(embedding=8, hidden=8), settings, VOCAB, END)
    window = (np.ones((16, 4), dtype=np.int64), np.ones((16, 4), dtype=np.int64))
    curve = TrainingCurve()
    train_for(learner, lambda step: window, 1.0, lambda: math.nan, curve)
    assert len(curve.heldout) == 1
