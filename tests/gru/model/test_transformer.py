"""Tests of the Transformer against the published equations."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gru.corpus.batches import sliding_batches
from gru.model.loss import stream_loss
from gru.model.transformer import Transformer, TransformerConfig, angles, nearest, rotate

SMALL = TransformerConfig(width=32, layers=2, heads=2, feed_forward=64)


def make(config: TransformerConfig = SMALL, matmul_dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config, 50, matmul_dtype)


def test_a_token_depends_on_the_past_alone() -> None:
    model = make()
    tokens = torch.randint(0, 50, (20, 3))
    changed = tokens.clone()
    changed[10] = (changed[10] + 1) % 50
    first, second = (model(each, model.initial_state(3))[0] for each in (tokens, changed))
    torch.testing.assert_close(first[:10], second[:10])
    assert not torch.allclose(first[19], second[19], atol=1e-7)


def test_attention_follows_the_published_equations() -> None:
    """Softmax of q k^T / sqrt(D) over the past, with queries and keys rotated."""
    layer = make().layers[0].double()
    x_BTE = torch.randn(2, 9, 32, dtype=torch.float64)
    rotations = angles(9, 16, x_BTE)
    q, k, v = layer.queries_keys_values(layer.attention_norm(x_BTE)).view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    scores = rotate(q, rotations) @ rotate(k, rotations).transpose(-1, -2) / math.sqrt(16)
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    middle = x_BTE + layer.attended((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 32))
    gate, values = layer.gate_and_values(layer.feed_forward_norm(middle)).chunk(2, dim=-1)
    expected = middle + layer.fed(gate * gate.sigmoid() * values)
    torch.testing.assert_close(layer(x_BTE, rotations, 0.0), expected)


def test_dot_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 1, 40, 16)
    rotations = angles(40, 16, q)
    dot_products = rotate(q, rotations)[0, 0] @ rotate(k, rotations)[0, 0].T
    for distance in (0, 1, 7):
        diagonal = dot_products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16])
def test_its_loss_is_that_of_its_logits(matmul_dtype: torch.dtype) -> None:
    model = make(matmul_dtype=matmul_dtype)
    inputs, targets = torch.randint(0, 50, (2, 30, 4))
    weights = torch.rand(30, 4)
    exact = make()
    logits, _ = exact(inputs, exact.initial_state(4))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss, _ = model.loss(inputs, targets, model.initial_state(4), weights_TB=weights)
    torch.testing.assert_close(
        loss, losses.dot(weights.flatten()), rtol=1e-5 if matmul_dtype == torch.float32 else 1e-2, atol=0
    )
    assert losses.mean().item() == pytest.approx(math.log(50), rel=0.05)


def test_dropout_applies_in_training_alone() -> None:
    model = make(TransformerConfig(width=32, layers=2, heads=2, feed_forward=64, dropout=0.5))
    inputs, targets = torch.randint(0, 50, (2, 30, 4))
    state, masks = model.initial_state(4), model.dropout_masks(range(4), 4, torch.tensor(0))
    assert make().dropout_masks(range(4), 4, torch.tensor(0)) is None
    assert model.loss(inputs, targets, state)[0] == model.loss(inputs, targets, state)[0]
    assert model.loss(inputs, targets, state, masks)[0] != model.loss(inputs, targets, state, masks)[0]


@pytest.mark.parametrize(
    ("parameters", "vocabulary"), [(14_000, 257), (912_000, 66), (1_700_000, 2049), (35_000_000, 16384)]
)
def test_the_nearest_has_about_as_many_parameters(parameters: int, vocabulary: int) -> None:
    config = nearest(parameters, vocabulary)
    assert config.parameters(vocabulary) == pytest.approx(parameters, rel=0.03)
    model = Transformer(config, vocabulary)
    assert sum(p.numel() for p in model.parameters()) == config.parameters(vocabulary)


@pytest.mark.parametrize("count", [5, 16, 17, 100])
@pytest.mark.parametrize("lanes", [1, 3])
def test_sliding_windows_score_each_token_once_after_half_a_context(count: int, lanes: int) -> None:
    model, tokens, context = make(), np.random.default_rng(0).integers(1, 50, count), 16
    total = 0.0
    with torch.no_grad():
        for index, token in enumerate(tokens):  # each window begins at a multiple of 8
            begin = max(0, (index - 8) // 8 * 8)
            before = torch.tensor([0, *tokens])[begin : index + 1]
            logits, _ = model(before[:, None], model.initial_state(1))
            assert index < 8 or index - begin >= 8
            total -= float(logits[-1, 0].log_softmax(0)[token])
    assert stream_loss(model, sliding_batches(tokens, lanes, context, 0), lanes) == pytest.approx(total, rel=1e-5)
