"""What a comparison measures on a CUDA device equals what it measures on the CPU. Needs neither Ray nor MLflow."""

import copy

import numpy as np
import pytest
import torch

from gru.comparison.gradient_reach import gradient_reach
from gru.config import ModelConfig
from gru.model.language_model import GRULanguageModel

VOCAB, END, DISTANCE, LANES = 97, 0, 40, 8


def test_the_gradient_reach_equals_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=64, hidden=96, layers=2), VOCAB)
    on_gpu = copy.deepcopy(model).to(torch.device("cuda"))
    tokens = np.random.default_rng(0).integers(VOCAB, size=2000, dtype=np.uint16)
    expected, actual = (gradient_reach(each, tokens, DISTANCE, LANES, END) for each in (model, on_gpu))
    assert expected[0] == 1 and 0 < expected[-1] < 1
    assert actual == pytest.approx(expected, abs=1e-3)
