"""The gated recurrent unit over a sequence.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the recurrent product, as cuDNN and
torch.nn.GRU have it. T time, B lanes, E input width, H hidden width.
"""

import math

import torch
from torch import Tensor, nn

UPDATE_GATE_BIAS = 1.0  # z starts near sigmoid(1): states are kept by default, so gradients reach back


class GRU(nn.Module):
    """One GRU layer: torch.nn.GRU with an initialisation that suits long sequences.

    Input projections are Xavier-uniform, recurrent matrices orthogonal for each gate, and the update gate's bias
    is positive (Jozefowicz et al. 2015 do the same for the LSTM's forget gate).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(input_size, hidden_size)
        (weight_ih, weight_hh, bias_ih, bias_hh), *_ = self.gru.all_weights
        with torch.no_grad():
            for gate in weight_ih.chunk(3):
                nn.init.xavier_uniform_(gate)
            for gate in weight_hh.chunk(3):
                nn.init.orthogonal_(gate)
            bias_ih.zero_()
            bias_hh.zero_()
            bias_ih.chunk(3)[1].fill_(UPDATE_GATE_BIAS)

    def forward(self, x_TBE: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state after each time step [T, B, H], and after the last one [B, H]."""
        out_TBH, last_1BH = self.gru(x_TBE, h_BH.unsqueeze(0))
        return out_TBH, last_1BH[0]


def dropout_mask(share: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Zeros with probability `share`, else 1 / (1 - share)."""
    assert 0 <= share < 1 and math.prod(shape) > 0
    return (torch.rand(shape, generator=generator) >= share).float() / (1 - share)
