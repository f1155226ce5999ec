"""Values are compared with a float64 computation of the published equations."""

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.model.language_model import GRULanguageModel
from gru.model.recurrence import GRU


def equations(gru: GRU, x_TBE: np.ndarray, h_BH: np.ndarray) -> np.ndarray:
    """The GRU's equations in numpy, float64: the states [T, B, H]."""
    (w_ih, w_hh, b_ih, b_hh), *_ = [[p.detach().double().numpy() for p in layer] for layer in gru.gru.all_weights]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    states = []
    for x_BE in x_TBE:
        input_r, input_z, input_n = np.split(x_BE @ w_ih.T + b_ih, 3, axis=1)
        hidden_r, hidden_z, hidden_n = np.split(h_BH @ w_hh.T + b_hh, 3, axis=1)
        r, z = sigmoid(input_r + hidden_r), sigmoid(input_z + hidden_z)
        n = np.tanh(input_n + r * hidden_n)
        h_BH = (1 - z) * n + z * h_BH
        states.append(h_BH)
    return np.stack(states)


@pytest.mark.parametrize("seed", range(5))
def test_recurrence_follows_the_equations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    time, lanes, width, hidden = generator.integers(1, 20, 4)
    torch.manual_seed(seed)
    gru = GRU(int(width), int(hidden))
    x, h = generator.normal(size=(time, lanes, width)), generator.normal(size=(lanes, hidden))
    out, last = gru(torch.from_numpy(x).float(), torch.from_numpy(h).float())
    expected = equations(gru, x, h)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(last.detach().numpy(), expected[-1], atol=2e-5)


@pytest.mark.parametrize(
    "config", [ModelConfig(embedding=16, hidden=16), ModelConfig(embedding=8, hidden=24, layers=3)]
)
def test_carried_state_makes_windows_one_sequence(config: ModelConfig) -> None:
    model = GRULanguageModel(config, 50)
    tokens = torch.randint(0, 50, (30, 4))
    whole, end = model(tokens, model.initial_state(4))
    state, parts = model.initial_state(4), []
    for window in tokens.split([7, 1, 22]):
        logits, state = model(window, state)
        parts.append(logits)
    assert whole.shape == (30, 4, 50)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state, end)


def test_a_token_depends_on_the_past_alone() -> None:
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=16, layers=2), 50)
    tokens = torch.randint(0, 50, (20, 2))
    changed = tokens.clone()
    changed[10] = (changed[10] + 1) % 50
    first, _ = model(tokens, model.initial_state(2))
    second, _ = model(changed, model.initial_state(2))
    assert torch.equal(first[:10], second[:10])
    assert not torch.allclose(first[10:], second[10:])


def test_at_the_beginning_no_token_is_favoured() -> None:
    """A large embedding in the residual stream would predict each token to follow itself."""
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(), 500)
    tokens = torch.randint(0, 500, (50, 8))
    logits, _ = model(tokens[:-1], model.initial_state(8))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
    assert loss.item() == pytest.approx(np.log(500), rel=0.1)


def test_dropout_masks_hold_for_a_window_and_keep_the_mean() -> None:
    model = GRULanguageModel(ModelConfig(embedding=64, hidden=64, layers=2, dropout=0.25), 50)
    masks = model.dropout_masks(200, torch.Generator().manual_seed(0))
    assert masks is not None
    assert masks.shape == (3, 200, 64)
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    assert masks.mean().item() == pytest.approx(1, abs=0.02)
    assert GRULanguageModel(ModelConfig(), 50).dropout_masks(4, torch.Generator()) is None
