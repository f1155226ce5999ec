"""Scores on a CUDA device equal those on the CPU. Needs neither Ray nor MLflow nor a tokenizer."""

import copy

import numpy as np
import pytest
import torch

from gru.config import ModelConfig
from gru.evaluation.context import context_losses
from gru.evaluation.scores import HeldoutText, token_losses
from gru.model.language_model import GRULanguageModel

VOCAB, END, TOKENS, LANES = 97, 0, 5000, 4
TOLERANCE = 1e-3  # nats per token


@pytest.fixture(scope="module")
def heldout() -> HeldoutText:
    tokens = np.random.default_rng(0).integers(VOCAB, size=TOKENS, dtype=np.uint32)
    return HeldoutText(tokens, END, bytes=TOKENS, characters=TOKENS, digest="")


@pytest.fixture(scope="module")
def model() -> GRULanguageModel:
    """A model whose embeddings are so large that its losses differ by several nats and depend on the state."""
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=64, hidden=96, layers=2), VOCAB).eval().requires_grad_(False)
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def model_on_gpu(model: GRULanguageModel) -> GRULanguageModel:
    return copy.deepcopy(model).to(torch.device("cuda"))


def test_token_losses_equal_those_of_the_cpu(
    model: GRULanguageModel, model_on_gpu: GRULanguageModel, heldout: HeldoutText
) -> None:
    expected, actual = (token_losses(each, heldout, LANES) for each in (model, model_on_gpu))
    assert expected.std() > 1
    assert actual == pytest.approx(expected, abs=TOLERANCE)
    np.testing.assert_array_equal(token_losses(model_on_gpu, heldout, LANES), actual)


def test_context_losses_equal_those_of_the_cpu(
    model: GRULanguageModel, model_on_gpu: GRULanguageModel, heldout: HeldoutText
) -> None:
    carried = token_losses(model, heldout, LANES)
    expected, actual = (context_losses(each, heldout, carried) for each in (model, model_on_gpu))
    assert max(context.excess for context in expected) > 0.1
    assert [(c.first, c.last, c.starts) for c in actual] == [(c.first, c.last, c.starts) for c in expected]
    assert [c.nats for c in actual] == pytest.approx([c.nats for c in expected], abs=TOLERANCE)
    assert [c.excess for c in actual] == pytest.approx([c.excess for c in expected], abs=TOLERANCE)
    assert context_losses(model_on_gpu, heldout, carried) == actual
