"""Tests of each cell against its published equations in float64, and of a model of each in training and generation."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gru.config import ModelConfig, TrainConfig
from gru.config_stages import Cell
from gru.corpus.batches import LaneOrder, LaneReader
from gru.generation.engine import Engine
from gru.generation.generate import Collector
from gru.generation.request import Request
from gru.generation.sampling import SamplingParams
from gru.model.cells import CELLS, LSTM, RNN, MinGRU, recur, scan
from gru.model.language_model import GRULanguageModel
from gru.training import checkpoint as checkpoints
from gru.training.learner import Learner

OTHERS: list[Cell] = ["lstm", "rnn", "mingru"]
# Relative to the largest value of each tensor. Under autocast, states are rounded to bf16 as well.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}
CORPUS = np.tile(np.arange(1, 11, dtype=np.uint16), 200)
VOCAB, END = 12, 0


def published(cell: torch.nn.Module, x_TBE: Tensor, state_BS: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the states [T, B, S] by the equations at the top of gru/model/cells.py, step by step."""
    out = []
    for x_BE in x_TBE:
        if isinstance(cell, LSTM):
            w_ih, w_hh, b_ih, b_hh = weights
            h_BH, c_BH = state_BS.chunk(2, dim=1)
            i, f, g, o = (x_BE @ w_ih.T + b_ih + h_BH @ w_hh.T + b_hh).chunk(4, dim=1)
            c_BH = torch.sigmoid(f) * c_BH + torch.sigmoid(i) * torch.tanh(g)
            state_BS = torch.cat([torch.sigmoid(o) * torch.tanh(c_BH), c_BH], dim=1)
        elif isinstance(cell, RNN):
            w_ih, w_hh, b_ih, b_hh = weights
            state_BS = torch.tanh(x_BE @ w_ih.T + b_ih + state_BS @ w_hh.T + b_hh)
        else:
            weight, bias = weights
            z, a = (x_BE @ weight.T + bias).chunk(2, dim=1)
            z = torch.sigmoid(z)
            state_BS = (1 - z) * state_BS + z * torch.where(a >= 0, a + 0.5, torch.sigmoid(a))
        out.append(state_BS)
    return torch.stack(out)


def outcome(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, state: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Return the values of a run, and the gradients of a sum in which each value has another weight."""
    x, state = x.clone().requires_grad_(), state.clone().requires_grad_()
    values = run(x, state)
    total = sum((v * torch.arange(1, v.numel() + 1, dtype=v.dtype).sin().view_as(v)).sum() for v in values)
    return [*(v.detach() for v in values), *torch.autograd.grad(total, [x, state, *weights])]


def draw(name: Cell, T: int, B: int, E: int, H: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(T, B, E, **options), torch.randn(B, CELLS[name].state_vectors * H, **options)


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 8, 8), (7, 1, 5, 3), (33, 5, 64, 48)])
@pytest.mark.parametrize("name", OTHERS)
def test_values_and_gradients_are_those_of_the_published_equations(
    name: Cell, shape: tuple[int, int, int, int], matmul_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    _, _, E, H = shape
    cell = CELLS[name].build(E, H, matmul_dtype)
    x, state = draw(name, *shape)
    exact = [parameter.detach().double().requires_grad_() for parameter in cell.parameters()]

    def reference(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states_TBS = published(cell, x, state, exact)
        return states_TBS[..., :H], states_TBS[-1]

    expected = outcome(reference, x, state, exact)
    actual = outcome(cell, x.float(), state.float(), list(cell.parameters()))
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == torch.float32
        error = (one - other).abs().max() / other.abs().max()
        assert error < TOLERANCES[matmul_dtype], f"{index}: off by {error:.1e}"
    cell.double().matmul_dtype = torch.float64
    for one, other in zip(outcome(cell, x, state, list(cell.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("T", [1, 2, 64, 300])
def test_the_scan_equals_the_recurrence(T: int, sharpness: float) -> None:
    """In fp32, with gates fully open and fully shut, states of any sign, and one state of 0."""
    generator = torch.Generator().manual_seed(T)
    gate, candidate = (torch.randn(T, 3, 5, generator=generator) * sharpness for _ in range(2))
    h_BH = torch.randn(3, 5, generator=generator)
    h_BH[0] = 0
    actual, expected = (outcome(lambda gate, h, f=f: (f(gate, candidate, h),), gate, h_BH, []) for f in (scan, recur))
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-3 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("name", OTHERS)
def test_windows_with_carried_state_equal_one_sequence(name: Cell, matmul_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cell = CELLS[name].build(16, 24, matmul_dtype)
    x, state = (tensor.float() for tensor in draw(name, 40, 4, 16, 24))
    whole, end = cell(x, state)
    parts = []
    for window in x.split([1, 8, 31]):
        out, state = cell(window, state)
        parts.append(out)
    tolerance = TOLERANCES[matmul_dtype]
    torch.testing.assert_close(torch.cat(parts), whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, end, atol=tolerance, rtol=tolerance)


def test_initial_gates_keep_most_of_the_state() -> None:
    for name, features in (("lstm", slice(24, 48)), ("mingru", slice(0, 24))):
        torch.manual_seed(0)
        cell = CELLS[name].build(16, 24)
        state = torch.ones(1, CELLS[name].state_vectors * 24)
        before = state[:, features].clone()
        _, after = cell(torch.zeros(1, 1, 16), state)
        share = 1 / (1 + math.exp(-1))
        assert (after[:, features] / before).mean().item() == pytest.approx(share, abs=0.25)
    assert isinstance(cell, MinGRU)


def train(learner: Learner, steps: int) -> list[float]:
    config = learner.config
    order = LaneOrder([len(CORPUS)], config.seed, config.batch_size, config.sequence_length)
    with LaneReader(order, lambda index: CORPUS, END, learner.lanes) as reader:
        return [float(learner.train_step(*reader.batch(learner.step))) for _ in range(steps - learner.step)]


def learner(name: Cell) -> Learner:
    model = ModelConfig(embedding=32, hidden=40, layers=2, dropout=0.1, cell=name)
    return Learner(model, TrainConfig(steps=100, batch_size=4, sequence_length=16, warmup_steps=5), VOCAB, END)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_each_cell_learns_and_resumes_exactly_from_a_checkpoint(name: Cell, tmp_path: Path) -> None:
    undisturbed = learner(name)
    losses = train(undisturbed, 100)
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert losses[-1] < 0.3
    first = learner(name)
    train(first, 5)
    checkpoints.save(first.checkpoint({"identity": {}}), str(tmp_path))
    second = learner(name)
    second.restore(checkpoints.load(str(tmp_path)))
    assert train(second, 100) == losses[5:]
    assert torch.equal(second.state_LBH, undisturbed.state_LBH)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_each_cell_generates_the_same_text_at_any_batch_width(name: Cell) -> None:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=24, hidden=37, layers=2, cell=name), 301).eval()
    with torch.no_grad():
        model.output_bias[END] = -100
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, 301, length).tolist() for length in generator.integers(0, 150, 9)]
    engine = Engine(model, END, slots=8, max_queue=100)

    def generate(chosen: list[int]) -> dict[int, list[int]]:
        collectors = {index: Collector() for index in chosen}
        for index, collector in collectors.items():
            engine.submit(Request(prompts[index], SamplingParams(temperature=1.0, seed=index), 40, collector))
        return {index: collector.wait(60) for index, collector in collectors.items()}

    try:
        together = generate(list(range(9)))
        assert all(len(text) == 40 for text in together.values())
        for index in range(9):
            assert generate([index]) == {index: together[index]}
    finally:
        engine.close(drain=False)
        assert engine.join(10)
