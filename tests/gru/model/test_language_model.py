"""Tests of the model as a whole; its GRU layer and its loss have tests of their own."""

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.corpus.batches import splitmix64
from gru.model.dropout import dropout_mask
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
    masks = model.dropout_masks(range(200), 200, torch.tensor(-(2**63)))
    assert masks is not None
    assert masks.shape == (3, 200, 64)
    assert masks.unique().tolist() == pytest.approx([0, 4 / 3])
    assert masks.mean().item() == pytest.approx(1, abs=0.02)
    assert GRULanguageModel(ModelConfig(), 50).dropout_masks(range(4), 4, torch.tensor(0)) is None


def test_the_dropout_mask_of_a_lane_depends_on_neither_its_worker_nor_another_key() -> None:
    model = GRULanguageModel(ModelConfig(embedding=64, hidden=64, dropout=0.25), 50)
    all_lanes = model.dropout_masks(range(10), 10, torch.tensor(5))
    own = model.dropout_masks(range(3, 7), 10, torch.tensor(5))
    other = model.dropout_masks(range(10), 10, torch.tensor(6))
    assert all_lanes is not None and own is not None and other is not None
    assert torch.equal(own, all_lanes[:, 3:7])
    assert (other == all_lanes).float().mean() == pytest.approx(0.75**2 + 0.25**2, abs=0.05)


def test_dropout_masks_are_drawn_from_splitmix64() -> None:
    """gru.corpus.batches has it too, in numpy."""
    key, share = 2**62 + 12345, 0.3
    positions = np.arange(2 * 5 * 8, dtype=np.uint64)
    bits = splitmix64(np.uint64(key) + (positions - np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    kept = bits.view(np.int64) >= share * 2**64 - 2**63
    mask = dropout_mask(share, layers=2, lanes=range(5), all_lanes=5, features=8, key=torch.tensor(key))
    assert mask.gt(0).flatten().tolist() == kept.tolist()


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
