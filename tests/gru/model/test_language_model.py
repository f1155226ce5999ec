"""Tests of the model as a whole; its GRU layer and its loss have tests of their own."""

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.model.language_model import GRULanguageModel


@pytest.mark.parametrize(
    "config", [ModelConfig(embedding=16, hidden=16), ModelConfig(embedding=8, hidden=24, layers=3)]
)
def test_windows_with_carried_state_equal_one_sequence(config: ModelConfig) -> None:
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


def test_an_untrained_model_favours_no_token() -> None:
    """A large embedding in the residual stream would predict that each token follows itself."""
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(), 500)
    tokens = torch.randint(0, 500, (50, 8))
    logits, _ = model(tokens[:-1], model.initial_state(8))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
    assert loss.item() == pytest.approx(np.log(500), rel=0.1)


def test_dropout_masks_cover_a_window_and_preserve_the_mean() -> None:
    model = GRULanguageModel(ModelConfig(embedding=64, hidden=64, layers=2, dropout=0.25), 50)
    masks = model.dropout_masks(200, torch.Generator().manual_seed(0))
    assert masks is not None
    assert masks.shape == (3, 200, 64)
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    assert masks.mean().item() == pytest.approx(1, abs=0.02)
    assert GRULanguageModel(ModelConfig(), 50).dropout_masks(4, torch.Generator()) is None


def test_its_loss_is_that_of_its_logits() -> None:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=24, layers=2), 50)
    inputs, targets = torch.randint(0, 50, (2, 30, 4))
    logits, end = model(inputs, model.initial_state(4))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss, state = model.loss(inputs, targets, model.initial_state(4))
    torch.testing.assert_close(loss, losses.sum())
    assert torch.equal(state, end)
    weights = torch.rand(30, 4)
    loss, _ = model.loss(inputs, targets, model.initial_state(4), weights_TB=weights)
    torch.testing.assert_close(loss, losses.dot(weights.flatten()))
