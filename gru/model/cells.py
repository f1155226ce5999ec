"""The LSTM, RNN and minGRU with the interface of `GRU`, and the table from a config's cell name to its class.

    LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000):
        i, f, o = sigmoid(W x_t + b + U h_{t-1} + d)    g = tanh(W_g x_t + b_g + U_g h_{t-1} + d_g)
        c_t = f * c_{t-1} + i * g                       h_t = o * tanh(c_t)
    RNN (Elman 1990):
        h_t = tanh(W x_t + b + U h_{t-1} + d)
    minGRU (Feng et al. 2024, arXiv:2410.01201):
        z_t = sigmoid(W_z x_t + b_z)                    h~_t = g(W_h x_t + b_h)
        h_t = (1 - z_t) * h_{t-1} + z_t * h~_t          g(a) = a + 0.5 if a >= 0 else sigmoid(a)

T time steps, B lanes, E input width, H hidden width, S state width; nH: n blocks of H side by side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.config_stages import Cell
from gru.model.gru_layer import GRU

FORGET_GATE_BIAS = 1.0
"""Initial bias that keeps most of the state (Jozefowicz et al. 2015), as UPDATE_GATE_BIAS does in the GRU."""

SCAN_STEPS = 64
"""Time steps in one scan of minGRU: A grows with each step, and what is added to it loses digits."""


class LSTM(nn.Module):
    """torch.nn.LSTM with Xavier-uniform input projections, orthogonal recurrent matrices and an open forget gate.

    Its state is h and c side by side. With a bf16 `matmul_dtype` it runs under autocast, on CPUs too, where oneDNN's
    bf16 LSTM is the faster one. On CPUs without AVX-512, for which oneDNN has no bf16 LSTM, matrix products are fp32.
    """

    def __init__(self, input_size: int, hidden_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype
        self.lstm = nn.LSTM(input_size, hidden_size)
        initialise(self.lstm, gates=4)
        with torch.no_grad():
            self.lstm.all_weights[0][2].chunk(4)[1].fill_(FORGET_GATE_BIAS)  # torch.nn.LSTM's order: i, f, g, o

    def forward(self, x_TBE: Tensor, state_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state after each time step [T, B, H], and h and c after the last one [B, 2 H]."""
        h_BH, c_BH = state_BS.chunk(2, dim=1)
        state = (h_BH.contiguous().unsqueeze(0), c_BH.contiguous().unsqueeze(0))
        autocast = self.matmul_dtype != x_TBE.dtype and has_bf16_lstm(x_TBE.device)
        with torch.autocast(x_TBE.device.type, self.matmul_dtype, enabled=autocast):
            out_TBH, (h_1BH, c_1BH) = self.lstm(x_TBE, state)
        return out_TBH.to(x_TBE.dtype), torch.cat([h_1BH[0], c_1BH[0]], dim=1).to(x_TBE.dtype)


class RNN(nn.Module):
    """torch.nn.RNN (tanh), Xavier-uniform input projection, orthogonal recurrent matrix; bf16 as in LSTM."""

    def __init__(self, input_size: int, hidden_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype
        self.rnn = nn.RNN(input_size, hidden_size)
        initialise(self.rnn, gates=1)

    def forward(self, x_TBE: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state after each time step [T, B, H], and after the last one [B, H]."""
        with torch.autocast(x_TBE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_TBE.dtype):
            out_TBH, h_1BH = self.rnn(x_TBE, h_BH.unsqueeze(0))
        return out_TBH.to(x_TBE.dtype), h_1BH[0].to(x_TBE.dtype)


class MinGRU(nn.Module):
    """A GRU whose gate and candidate read the input alone, so that all time steps can be computed at once.

    A GPU computes them so, by a parallel scan. A CPU gains nothing from the scan and runs the recurrence step by step,
    at a tenth of the cost. Both stay in the type of x. With b_z at -1, most of the state is kept at first.
    """

    def __init__(self, input_size: int, hidden_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype
        self.project = nn.Linear(input_size, 2 * hidden_size)
        with torch.no_grad():
            for gate in self.project.weight.chunk(2):
                nn.init.xavier_uniform_(gate)
            self.project.bias.zero_()
            self.project.bias.chunk(2)[0].fill_(-FORGET_GATE_BIAS)

    def forward(self, x_TBE: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state after each time step [T, B, H], and after the last one [B, H]."""
        with torch.autocast(x_TBE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_TBE.dtype):
            projected_TB2H = self.project(x_TBE)
        gate_TBH, candidate_TBH = projected_TB2H.to(x_TBE.dtype).chunk(2, dim=2)
        sequential = len(x_TBE) == 1 or x_TBE.device.type == "cpu"
        out_TBH = (recur if sequential else scan)(gate_TBH, candidate_TBH, h_BH)
        return out_TBH, out_TBH[-1]


def recur(gate_TBH: Tensor, candidate_TBH: Tensor, h_BH: Tensor) -> Tensor:
    """Return minGRU's states [T, B, H], computed step by step. sigmoid applies to the gate, g to the candidate."""
    z_TBH = gate_TBH.sigmoid()
    positive_TBH = torch.where(candidate_TBH >= 0, candidate_TBH + 0.5, candidate_TBH.sigmoid())
    out = []
    for positive_BH, z_BH in zip(positive_TBH.unbind(), z_TBH.unbind(), strict=True):
        h_BH = torch.lerp(h_BH, positive_BH, z_BH)
        out.append(h_BH)
    return torch.stack(out)


def scan(gate_TBH: Tensor, candidate_TBH: Tensor, h_BH: Tensor) -> Tensor:
    """Return what `recur` does, from a parallel scan over blocks of `SCAN_STEPS` steps.

    It is computed in logarithms (appendix B of the paper, after Heinsen 2023, arXiv:2311.06281). With A_t
    the sum of log(1 - z) up to t:  h_t = exp(A_t) h_0 + exp(A_t + logcumsumexp_t(log z + log h~ - A)). The state before
    the block is not put into a logarithm, so it may be 0.
    """
    out = []
    for gate, candidate in zip(gate_TBH.split(SCAN_STEPS), candidate_TBH.split(SCAN_STEPS), strict=True):
        out.append(scan_block(gate, candidate, h_BH))
        h_BH = out[-1][-1]
    return torch.cat(out)


def scan_block(gate_TBH: Tensor, candidate_TBH: Tensor, h_BH: Tensor) -> Tensor:
    """Return the states [T, B, H] of one block, from the state before it [B, H]."""
    log_kept_TBH = -F.softplus(gate_TBH).cumsum(0)
    # Each branch gets a valid input only: the infinite gradient of the other branch would give 0 * inf = NaN.
    log_positive_TBH = (candidate_TBH.clamp(min=0) + 0.5).log()
    logs_TBH = torch.where(candidate_TBH >= 0, log_positive_TBH, F.logsigmoid(candidate_TBH))
    sums_TBH = torch.logcumsumexp(F.logsigmoid(gate_TBH) + logs_TBH - log_kept_TBH, dim=0)
    return log_kept_TBH.exp() * h_BH + (log_kept_TBH + sums_TBH).exp()


def has_bf16_lstm(device: torch.device) -> bool:
    """Whether an LSTM can run in bf16 on this device."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def initialise(layer: nn.RNNBase, gates: int) -> None:
    """Initialise each gate: Xavier-uniform input projection, orthogonal recurrent matrix, zero biases."""
    (weight_ih, weight_hh, bias_ih, bias_hh), *_ = layer.all_weights
    with torch.no_grad():
        for gate in weight_ih.chunk(gates):
            nn.init.xavier_uniform_(gate)
        for gate in weight_hh.chunk(gates):
            nn.init.orthogonal_(gate)
        bias_ih.zero_()
        bias_hh.zero_()


class CellType(NamedTuple):
    """A cell's class and the size of its state."""

    build: Any
    """The class, called with (input_size, hidden_size, matmul_dtype)."""
    state_vectors: int = 1
    """Number of vectors of the hidden width in its state."""


CELLS: dict[Cell, CellType] = {
    "gru": CellType(GRU),
    "lstm": CellType(LSTM, 2),
    "rnn": CellType(RNN),
    "mingru": CellType(MinGRU),
}
