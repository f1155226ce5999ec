import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gru.comparison.gradient_reach import gradient_reach
from gru.comparison.trial import REACH_LANES
from gru.config import ModelConfig
from gru.model.language_model import GRULanguageModel

VOCAB, END = 60, 0
CORPUS = np.tile(np.arange(1, 11, dtype=np.uint16), 2000)


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
def test_the_reach_equals_a_known_gradient(a: float) -> None:
    model: nn.Module = Decaying(a)
    reach = gradient_reach(model, CORPUS, 20, 3, END)  # type: ignore[arg-type]
    assert reach == pytest.approx([a**k for k in range(20)])


def test_the_reach_is_that_of_the_loss_of_one_token() -> None:
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=16, hidden=16), VOCAB)
    reach = gradient_reach(model.requires_grad_(False), CORPUS, 30, REACH_LANES, END)
    assert (reach[0], len(reach)) == (1.0, 30)
    assert all(0 < after < 1 for after in reach[1:])
    assert reach[29] < reach[1]
    assert gradient_reach(model, CORPUS[:9], 30, 2, END)[0] == 1.0
