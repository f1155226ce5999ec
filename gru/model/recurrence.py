"""The gated recurrent unit over a sequence.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the recurrent product, as cuDNN and
torch.nn.GRU have it. T time, B lanes, N = T * B, E input width, H hidden width; nH: n blocks of H side by side.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gru.model.workspace import workspace

UPDATE_GATE_BIAS = 1.0  # z starts near sigmoid(1): states are kept by default, so gradients reach back
BLOCK = 8  # time steps whose derivatives are computed at once: few enough to stay in cache


class GRU(nn.Module):
    """One GRU layer: torch.nn.GRU with an initialisation that suits long sequences.

    Input projections are Xavier-uniform, recurrent matrices orthogonal for each gate, and the update gate's bias
    is positive (Jozefowicz et al. 2015 do the same for the LSTM's forget gate).

    On a CPU, `Recurrence` computes what is to be differentiated, and all that has bf16 products; the rest is left to
    torch.nn.GRU.
    """

    def __init__(self, input_size: int, hidden_size: int, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.products = products
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
        if x_TBE.device.type == "cpu" and (torch.is_grad_enabled() or self.products != x_TBE.dtype):
            out_TBH = Recurrence.apply(x_TBE, h_BH, *self.gru.all_weights[0], self.products)
            return out_TBH, out_TBH[-1]
        with torch.autocast(x_TBE.device.type, self.products, enabled=self.products != x_TBE.dtype):
            out_TBH, last_1BH = self.gru(x_TBE, h_BH.unsqueeze(0))
        return out_TBH.to(x_TBE.dtype), last_1BH[0].to(x_TBE.dtype)


class Recurrence(torch.autograd.Function):
    """The GRU over a whole sequence as one node of the graph, for CPUs.

    One product before the time steps and three after them take all of their rows at once. A step is one product with
    the recurrent matrix and a few pointwise operations that write where they read. `products` is the type that the
    factors of matrix products are rounded to; states, gates and sums stay in the type of x.

    For each step [n | r | z | W_hn h + b_hn] are kept, in this order, so that the products of x (n, r, z) and those of
    h (r, z, the last) are each a contiguous stretch. Backward replaces them by the gradients of what goes into them,
    so it can be run only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TBE: Tensor,
        h_BH: Tensor,
        weight_ih_3HE: Tensor,
        weight_hh_3HH: Tensor,
        bias_ih_3H: Tensor,
        bias_hh_3H: Tensor,
        products: torch.dtype,
    ) -> Tensor:
        (T, B, E), H = x_TBE.shape, h_BH.shape[1]
        rounded = products != x_TBE.dtype
        gates_TB4H = workspace.take((T, B, 4 * H), x_TBE)
        n_TBH, r_TBH, z_TBH, s_TBH = gates_TB4H.unflatten(2, (4, H)).unbind(2)
        states_TBH = x_TBE.new_empty(T + 1, B, H)
        states_TBH[0] = h_BH
        x_NE = x_TBE.reshape(T * B, E).to(products)
        weight_hh_H3H = weight_hh_3HH.to(products).t().contiguous()  # products of contiguous factors are fastest

        bias_4H = torch.cat([n_first(bias_ih_3H), bias_hh_3H[2 * H :]])
        bias_4H[H : 3 * H] += bias_hh_3H[: 2 * H]
        into_N3H = gates_TB4H.view(T * B, 4 * H)[:, : 3 * H]
        weight_ih_E3H = n_first(weight_ih_3HE.to(products)).t().contiguous()
        if rounded:
            rounded_N3H = workspace.take((T * B, 3 * H), x_NE)
            into_N3H.copy_(torch.mm(x_NE, weight_ih_E3H, out=rounded_N3H))
            into_N3H += bias_4H[: 3 * H]
            workspace.give(rounded_N3H)
        else:
            torch.addmm(bias_4H[: 3 * H], x_NE, weight_ih_E3H, out=into_N3H)
        s_TBH.copy_(bias_4H[3 * H :])

        factors_TBH = workspace.take((T + 1, B, H), x_NE) if rounded else states_TBH
        product_B3H = x_NE.new_empty(B, 3 * H)
        summand_B3H = product_B3H.to(x_TBE.dtype)
        steps = zip(
            *(part.unbind() for part in (n_TBH, r_TBH, z_TBH, s_TBH)),
            gates_TB4H[:, :, H:].unbind(),
            gates_TB4H[:, :, H : 3 * H].unbind(),
            factors_TBH.unbind()[:-1],
            pairwise(states_TBH.unbind()),
            strict=True,
        )
        for n_BH, r_BH, z_BH, s_BH, recurrent_B3H, rz_B2H, factor_BH, (before_BH, after_BH) in steps:
            if rounded:  # an addition of two types is slower than a conversion and an addition
                torch.mm(factor_BH.copy_(before_BH), weight_hh_H3H, out=product_B3H)
                recurrent_B3H += summand_B3H.copy_(product_B3H)
            else:
                recurrent_B3H.addmm_(before_BH, weight_hh_H3H)
            rz_B2H.sigmoid_()
            tanh_(n_BH.addcmul_(r_BH, s_BH))
            torch.lerp(n_BH, before_BH, z_BH, out=after_BH)

        ctx.products = products
        ctx.save_for_backward(x_NE, weight_ih_3HE, weight_hh_3HH, gates_TB4H, states_TBH, factors_TBH)
        return states_TBH[1:]

    @staticmethod
    def backward(ctx: Any, d_out_TBH: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, weight_ih_3HE, weight_hh_3HH, gates_TB4H, states_TBH, factors_TBH = ctx.saved_tensors
        products, rounded = ctx.products, ctx.products != gates_TB4H.dtype
        (T, B, _), H = gates_TB4H.shape, states_TBH.shape[2]
        gates_TB4xH = gates_TB4H.unflatten(2, (4, H))
        # d_gates: gradients of the sums that n, r, z are functions of, and of s = W_hn h + b_hn, in the products' type.
        d_gates_TB4H = workspace.take((T, B, 4 * H), x_NE) if rounded else gates_TB4H
        exact_B4xH = gates_TB4H.new_empty(B, 4, H)  # before rounding; of one step, so that it stays in cache
        weight_hh_3HH = weight_hh_3HH.to(products)
        product_BH = weight_hh_3HH.new_empty(B, H)
        summand_BH = product_BH.to(gates_TB4H.dtype)
        slopes_TB4xH = gates_TB4H.new_empty(min(T, BLOCK), B, 4, H)
        scratch_TBH = gates_TB4H.new_empty(min(T, BLOCK), B, H)
        dh_BH, next_BH = d_out_TBH[-1].clone(), torch.empty_like(summand_BH)
        d_before = [torch.zeros_like(dh_BH), *d_out_TBH.unbind()[:-1]]  # from the output, for the state before each
        z, slopes = gates_TB4xH[:, :, 2].unbind(), slopes_TB4xH.unbind()
        d_gates, from_h = d_gates_TB4H.unflatten(2, (4, H)).unbind(), d_gates_TB4H[:, :, H:].unbind()
        for start in reversed(range(0, T, BLOCK)):
            block = slice(start, min(start + BLOCK, T))
            slopes_of_h(gates_TB4xH[block], states_TBH[block], slopes_TB4xH, scratch_TBH)
            for t in reversed(range(start, block.stop)):
                torch.addcmul(d_before[t], dh_BH, z[t], out=next_BH)
                if rounded:
                    d_gates[t].copy_(torch.mul(dh_BH.unsqueeze(1), slopes[t - start], out=exact_B4xH))
                    torch.mm(from_h[t], weight_hh_3HH, out=product_BH)
                    next_BH += summand_BH.copy_(product_BH)
                else:
                    torch.mul(dh_BH.unsqueeze(1), slopes[t - start], out=d_gates[t])
                    next_BH.addmm_(from_h[t], weight_hh_3HH)
                dh_BH, next_BH = next_BH, dh_BH

        d_gates_N4H = d_gates_TB4H.view(T * B, 4 * H)
        from_x_N3H, from_h_N3H = d_gates_N4H[:, : 3 * H], d_gates_N4H[:, H:]
        d_x_NE = torch.mm(from_x_N3H, n_first(weight_ih_3HE.to(products))).to(dh_BH.dtype)
        # The narrower factor is the one that is read transposed.
        d_weight_ih_3HE = n_last(torch.mm(x_NE.t(), from_x_N3H).t().to(dh_BH.dtype))
        d_weight_hh_3HH = torch.mm(factors_TBH[:-1].view(T * B, H).t(), from_h_N3H).t().to(dh_BH.dtype)
        d_bias_4H = torch.mm(d_gates_N4H.new_ones(1, T * B), d_gates_N4H)[0].to(dh_BH.dtype)
        workspace.give(gates_TB4H)
        if rounded:
            workspace.give(d_gates_TB4H, factors_TBH)
        d_x_TBE = d_x_NE.view(T, B, -1)
        return d_x_TBE, dh_BH, d_weight_ih_3HE, d_weight_hh_3HH, n_last(d_bias_4H[: 3 * H]), d_bias_4H[H:], None


def slopes_of_h(gates_TB4xH: Tensor, before_TBH: Tensor, slopes_TB4xH: Tensor, scratch_TBH: Tensor) -> None:
    """Derivatives of h_t by the sums that n, r and z are functions of, and by s = W_hn h + b_hn:

    (1 - z)(1 - n^2);  (1 - z)(1 - n^2) s r (1 - r);  (h_{t-1} - n) z (1 - z);  (1 - z)(1 - n^2) r
    """
    n_TBH, r_TBH, z_TBH, s_TBH = gates_TB4xH.unbind(2)
    by_n_TBH, by_r_TBH, by_z_TBH, by_s_TBH = slopes_TB4xH[: len(n_TBH)].unbind(2)
    scratch_TBH = scratch_TBH[: len(n_TBH)]
    tanh_backward, sigmoid_backward = torch.ops.aten.tanh_backward, torch.ops.aten.sigmoid_backward
    tanh_backward.grad_input(torch.sub(1, z_TBH, out=scratch_TBH), n_TBH, grad_input=by_n_TBH)
    sigmoid_backward.grad_input(torch.mul(by_n_TBH, s_TBH, out=scratch_TBH), r_TBH, grad_input=by_r_TBH)
    sigmoid_backward.grad_input(torch.sub(before_TBH, n_TBH, out=scratch_TBH), z_TBH, grad_input=by_z_TBH)
    torch.mul(by_n_TBH, r_TBH, out=by_s_TBH)


def tanh_(x: Tensor) -> Tensor:
    """tanh x = 2 sigmoid(2 x) - 1, in place: on CPUs torch's sigmoid is several times as fast as its tanh."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def n_first(rows_3H: Tensor) -> Tensor:
    """torch.nn.GRU's order r, z, n of blocks of rows, as n, r, z."""
    return rows_3H.roll(len(rows_3H) // 3, 0)


def n_last(rows_3H: Tensor) -> Tensor:
    """n, r, z as r, z, n."""
    return rows_3H.roll(-(len(rows_3H) // 3), 0)


def dropout_mask(share: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Zeros with probability `share`, else 1 / (1 - share)."""
    assert 0 <= share < 1 and math.prod(shape) > 0
    return (torch.rand(shape, generator=generator) >= share).float() / (1 - share)
