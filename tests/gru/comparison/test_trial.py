"""Equal time for all, and how far back a loss reaches. The comparison as a whole is tested with its job."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gru.comparison.contenders import DEFAULTS, Contender, parameters, parse_contender
from gru.comparison.gradient_reach import gradient_reach
from gru.comparison.trial import MEASUREMENTS, REACH_LANES, train_for
from gru.config import CorpusConfig, ModelConfig, PipelineConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.errors import UserError
from gru.model.language_model import GRULanguageModel
from gru.registry.tracking import Point
from gru.training.learner import Learner, learning_rate

VOCAB, END = 60, 0
CORPUS = np.tile(np.arange(1, 11, dtype=np.uint16), 2000)


def config(**model: object) -> PipelineConfig:
    return PipelineConfig(
        corpus=CorpusConfig(sources=["corpus.txt"]),
        model=ModelConfig.model_validate({"embedding": 96, "hidden": 96, **model}),
        train=TrainConfig(workers=2, batch_size=32, sequence_length=64),
    )


def test_learning_rates_follow_the_share_that_is_done() -> None:
    train = TrainConfig(steps=100, warmup_steps=0, learning_rate=1.0, final_learning_rate=0.1)
    assert [learning_rate(train, step) for step in range(100)] == [
        learning_rate(train, step, step / 100) for step in range(100)
    ]
    assert learning_rate(train, 7, 0.5) == pytest.approx(0.55)
    assert learning_rate(train, 999, 1.0) == pytest.approx(0.1)


def train(seconds: float, pause: float) -> tuple[list[Point], list[float], float]:
    """Points, measured losses, and time that it all took."""
    settings = TrainConfig(batch_size=4, sequence_length=16, warmup_steps=2)
    learner = Learner(ModelConfig(embedding=32, hidden=32), settings, VOCAB, END)
    points: list[Point] = []
    losses: list[float] = []

    def measure() -> float:
        time.sleep(pause)
        return learner.heldout_loss(CORPUS[:400])

    order = LaneOrder([len(CORPUS)], 0, settings.batch_size, settings.sequence_length)
    started = time.monotonic()
    with LaneReader(order, lambda index: CORPUS, END, learner.lanes) as reader:
        train_for(learner, reader.batch, seconds, measure, points, losses)
    return points, losses, time.monotonic() - started


def test_the_clock_stands_still_while_the_heldout_loss_is_measured() -> None:
    points, losses, took = train(1.5, pause=0.2)
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


def test_a_step_longer_than_the_time_between_marks_counts_for_all_of_them() -> None:
    points, losses, _ = train(1e-6, pause=0.0)
    assert (len(points), len(losses)) == (1, MEASUREMENTS)


class Decaying(nn.Module):
    """h_t = a h_{t-1} + x_t, and a loss that is linear in h."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a
        self.embedding = nn.Embedding(VOCAB, 5)
        self.output_bias = nn.Parameter(torch.zeros(VOCAB))

    def initial_state(self, lanes: int) -> Tensor:
        return torch.zeros(lanes, 5)

    def loss(
        self, tokens_TB: Tensor, targets_TB: Tensor, h_BE: Tensor, masks: None = None, weights_TB: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert weights_TB is not None
        total = torch.zeros(())
        for x_BE, weights_B in zip(self.embedding(tokens_TB), weights_TB, strict=True):
            h_BE = self.a * h_BE + x_BE
            total = total + h_BE.sum(1).dot(weights_B)
        return total, h_BE


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_the_reach_of_a_cell_whose_gradient_is_known(a: float) -> None:
    model: nn.Module = Decaying(a)
    reach = gradient_reach(model, CORPUS, 20, 3, END)  # type: ignore[arg-type]
    assert reach == pytest.approx([a**k for k in range(20)])


def test_the_reach_is_of_the_loss_at_one_token_alone() -> None:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=16), VOCAB)
    reach = gradient_reach(model.requires_grad_(False), CORPUS, 30, REACH_LANES, END)
    assert (reach[0], len(reach)) == (1.0, 30)
    assert all(0 < after < 1 for after in reach[1:])
    assert reach[29] < reach[1]
    assert gradient_reach(model, CORPUS[:9], 30, 2, END)[0] == 1.0


@pytest.mark.parametrize("layers", [1, 3])
def test_default_contenders_have_about_as_many_parameters(layers: int) -> None:
    base = config(layers=layers)
    made = [parse_contender(name, base, VOCAB) for name in DEFAULTS]
    wanted = parameters(base.model, VOCAB)
    for each in made:
        model = each.build(each.model, VOCAB, torch.float32)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=0.05), each.name
        assert each.model.layers == layers
    assert made[0].model == base.model
    transformer = made[-1].train
    assert transformer.sequence_length >= 256
    assert transformer.sequence_length * transformer.batch_size == 32 * 64


def test_contenders_are_names_and_overrides() -> None:
    base = config()
    careful = parse_contender("careful:train.learning_rate=0.002,model.dropout=0.3", base, VOCAB)
    assert (careful.train.learning_rate, careful.model.dropout, careful.model.cell) == (0.002, 0.3, "gru")
    wide = parse_contender("lstm-wide:model.hidden=200", base, VOCAB)
    assert (wide.model.cell, wide.model.hidden) == ("lstm", 200)
    slow = parse_contender("transformer:train.learning_rate=1e-4,model.dropout=0.2", base, VOCAB)
    assert slow.transformer is not None
    assert (slow.train.learning_rate, slow.transformer.dropout) == (1e-4, 0.2)
    keys = {each.key for each in (careful, wide, slow, parse_contender("gru", base, VOCAB))}
    assert len(keys) == 4
    assert isinstance(careful, Contender)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("gpt", r"--contender gpt: unknown: expected one of gru, lstm"),
        ("a:train.stpes=1", r"--contender a: train\.stpes: unknown key"),
        ("a:model.hidden=soon", r"--contender a: model\.hidden: "),
        ("a:hidden", r"--contender a: hidden: a contender differs in \[model\] and \[train\] alone"),
        ("a:model.hidden", r"--contender a: model\.hidden: expected section\.key=value"),
        ("a:corpus.format=text", r"differs in \[model\] and \[train\] alone"),
        ("a:train.steps=5", r"train\.steps has no effect"),
        ("transformer:model.hidden=5", r"model\.hidden has no effect"),
    ],
)
def test_a_mistake_is_named(told: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_contender(told, config(), VOCAB)


def test_a_loss_that_is_not_finite_is_the_last() -> None:
    settings = TrainConfig(batch_size=4, sequence_length=16)
    learner = Learner(ModelConfig(embedding=8, hidden=8), settings, VOCAB, END)
    window = (np.ones((16, 4), dtype=np.int64), np.ones((16, 4), dtype=np.int64))
    losses: list[float] = []
    train_for(learner, lambda step: window, 1.0, lambda: math.nan, [], losses)
    assert len(losses) == 1
