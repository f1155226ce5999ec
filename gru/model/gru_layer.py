"""The GRU layer: a gated recurrent unit over a sequence.

    r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
    z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
    n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_{t-1} + b_hn))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

Cho et al. 2014 (arXiv:1406.1078), with the reset gate applied after the recurrent product, as cuDNN and
torch.nn.GRU have it. T time steps, B lanes, N = T * B, E input width, H hidden width; nH: n blocks of H side by side.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gru.model import gru_cpu, gru_cuda
from gru.model.workspace import workspace

UPDATE_GATE_BIAS = 1.0
"""Initial bias: z starts near sigmoid(1), so most of the state is kept and gradients reach far back."""

BLOCK = 8
"""Time steps whose derivatives are computed at once: few enough to stay in the cache."""


class GRU(nn.Module):
    """One GRU layer: torch.nn.GRU with an initialisation that suits long sequences.

    Input projections are Xavier-uniform, recurrent matrices orthogonal for each gate, and the update gate's bias
    is positive (Jozefowicz et al. 2015 do the same for the LSTM's forget gate).

    On a CPU, `GRUFunction` computes the layer if gradients are needed or the matrix products are in bf16. On a GPU,
    `GRUCuda` does if they are in bf16 and the shape suits it. torch.nn.GRU computes the rest.
    """

    def __init__(self, input_size: int, hidden_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype
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
        """Return the hidden state after each time step [T, B, H], in the type of x or of the matrix products' factors,
        and after the last one [B, H]."""
        if x_TBE.device.type == "cuda" and self.matmul_dtype is torch.bfloat16:
            steps = gru_cuda.steps_for(self.gru.hidden_size, x_TBE.shape[1], x_TBE.device)
            if steps:
                return gru_cuda.GRUCuda.apply(x_TBE, h_BH, *self.gru.all_weights[0], steps)
        if x_TBE.device.type == "cpu" and (torch.is_grad_enabled() or self.matmul_dtype != x_TBE.dtype):
            out_TBH = GRUFunction.apply(
                x_TBE, h_BH, *self.gru.all_weights[0], self.matmul_dtype, torch.is_grad_enabled()
            )
            return out_TBH, out_TBH[-1]
        with torch.autocast(x_TBE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_TBE.dtype):
            out_TBH, last_1BH = self.gru(x_TBE, h_BH.unsqueeze(0))
        return out_TBH.to(x_TBE.dtype), last_1BH[0].to(x_TBE.dtype)


class GRUFunction(torch.autograd.Function):
    """The GRU over a sequence as one node of the autograd graph, for CPUs.

    One matrix product before the time steps and three after them cover all rows at once. The steps themselves are
    gru_cpu.py's where it is usable, else torch's. `matmul_dtype` is the type to which the factors of matrix products
    are rounded; states, gates and sums are in the type of x. Its backward can run only once, since it returns the
    saved buffers to the workspace.
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
        matmul_dtype: torch.dtype,
        differentiate: bool,
    ) -> Tensor:
        (T, B, E), H = x_TBE.shape, h_BH.shape[1]
        steps = gru_cpu.steps_for(H, matmul_dtype, x_TBE)
        x_NE = x_TBE.reshape(T * B, E).to(matmul_dtype)
        weight_ih_E3H = n_first(weight_ih_3HE.to(matmul_dtype)).t().contiguous()  # the fastest layout
        into_N3H = torch.mm(x_NE, weight_ih_E3H, out=workspace.take((T * B, 3 * H), x_NE))
        into_TB3H = into_N3H.view(T, B, 3 * H)
        bias_4H = torch.cat([n_first(bias_ih_3H), bias_hh_3H[2 * H :]])
        bias_4H[H : 3 * H] += bias_hh_3H[: 2 * H]
        states_TBH = x_TBE.new_empty(T + 1, B, H)
        states_TBH[0] = h_BH
        factors_TBH = states_TBH if matmul_dtype is x_TBE.dtype else workspace.take((T + 1, B, H), x_NE)
        saved: list[Tensor] = []
        if steps:
            if differentiate:
                saved = [workspace.take((T, B, 3 * H), x_NE), workspace.take((T, B, H), x_TBE)]
            weights = weight_hh_3HH.to(matmul_dtype)
            gru_cpu.forward(steps, into_TB3H, bias_4H, weights, states_TBH, factors_TBH, *saved)
        else:
            saved = [workspace.take((T, B, 4 * H), x_TBE)]
            forward_steps(into_TB3H, bias_4H, weight_hh_3HH.to(matmul_dtype), states_TBH, factors_TBH, saved[0])
        workspace.give(into_N3H)
        ctx.matmul_dtype, ctx.steps = matmul_dtype, steps
        ctx.save_for_backward(x_NE, weight_ih_3HE, weight_hh_3HH, states_TBH, factors_TBH, *saved)
        return states_TBH[1:]

    @staticmethod
    def backward(ctx: Any, d_out_TBH: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, weight_ih_3HE, weight_hh_3HH, states_TBH, factors_TBH, *saved = ctx.saved_tensors
        (T, B, H), matmul_dtype, dtype = d_out_TBH.shape, ctx.matmul_dtype, states_TBH.dtype
        weight_ih_3HE, weight_hh_3HH = weight_ih_3HE.to(matmul_dtype), weight_hh_3HH.to(matmul_dtype)
        # Gradients of the sums that n, r and z are functions of, and of s = W_hn h + b_hn.
        d_gates_TB4H = workspace.take((T, B, 4 * H), x_NE)
        if ctx.steps:
            nrs_TB3H, z_TBH = saved
            d_h_BH = gru_cpu.backward(
                ctx.steps, d_out_TBH.contiguous(), nrs_TB3H, z_TBH, states_TBH, weight_hh_3HH, d_gates_TB4H
            )
        else:
            d_h_BH = backward_steps(d_out_TBH, saved[0], states_TBH, weight_hh_3HH, d_gates_TB4H)
        d_gates_N4H = d_gates_TB4H.view(T * B, 4 * H)
        from_x_N3H, from_h_N3H = d_gates_N4H[:, : 3 * H], d_gates_N4H[:, H:]
        d_x_TBE = torch.mm(from_x_N3H, n_first(weight_ih_3HE)).to(dtype).view(T, B, -1)
        # The narrower factor is read transposed, which is the cheaper one to transpose.
        d_weight_ih_3HE = n_last(torch.mm(x_NE.t(), from_x_N3H).t().to(dtype))
        d_weight_hh_3HH = torch.mm(factors_TBH[:-1].view(T * B, H).t(), from_h_N3H).t().to(dtype)
        d_bias_4H = torch.mm(d_gates_N4H.new_ones(1, T * B), d_gates_N4H)[0].to(dtype)
        torch.autograd.graph.increment_version(saved[0])  # so that autograd refuses a second backward
        workspace.give(d_gates_TB4H, *saved, *([factors_TBH] if factors_TBH is not states_TBH else []))
        d_bias_ih_3H, d_bias_hh_3H = n_last(d_bias_4H[: 3 * H]), d_bias_4H[H:]
        return d_x_TBE, d_h_BH, d_weight_ih_3HE, d_weight_hh_3HH, d_bias_ih_3H, d_bias_hh_3H, None, None


def forward_steps(
    into_TB3H: Tensor,
    bias_4H: Tensor,
    weight_hh_3HH: Tensor,
    states_TBH: Tensor,
    factors_TBH: Tensor,
    gates_TB4H: Tensor,
) -> None:
    """Do in torch what gru_cpu.forward does in C.

    Writes [n | r | z | s] of each step to `gates`. In this order, the matrix products of x (n, r, z) and those of h
    (r, z, s) are each one contiguous stretch. `factors` may be the states themselves.
    """
    (T, B, H), rounded = states_TBH[1:].shape, factors_TBH is not states_TBH
    weight_hh_H3H = weight_hh_3HH.t().contiguous()
    gates_TB4H[:, :, : 3 * H] = into_TB3H
    gates_TB4H[:, :, : 3 * H] += bias_4H[: 3 * H]
    n_TBH, r_TBH, z_TBH, s_TBH = gates_TB4H.unflatten(2, (4, H)).unbind(2)
    s_TBH.copy_(bias_4H[3 * H :])
    product_B3H = weight_hh_3HH.new_empty(B, 3 * H)
    summand_B3H = product_B3H.to(gates_TB4H.dtype)
    factors_TBH[0] = states_TBH[0]
    for t in range(T):
        recurrent_B3H = gates_TB4H[t, :, H:]
        if rounded:  # an addition of two types is slower than a conversion and an addition
            torch.mm(factors_TBH[t], weight_hh_H3H, out=product_B3H)
            recurrent_B3H += summand_B3H.copy_(product_B3H)
        else:
            recurrent_B3H.addmm_(factors_TBH[t], weight_hh_H3H)
        gates_TB4H[t, :, H : 3 * H].sigmoid_()
        n_BH = tanh_(n_TBH[t].addcmul_(r_TBH[t], s_TBH[t]))
        torch.lerp(n_BH, states_TBH[t], z_TBH[t], out=states_TBH[t + 1])
        if rounded:
            factors_TBH[t + 1] = states_TBH[t + 1]


def backward_steps(
    d_out_TBH: Tensor, gates_TB4H: Tensor, states_TBH: Tensor, weight_hh_3HH: Tensor, d_gates_TB4H: Tensor
) -> Tensor:
    """Do in torch what gru_cpu.backward does in C, from the gates that `forward_steps` wrote."""
    (T, B, H), rounded = d_out_TBH.shape, d_gates_TB4H.dtype != gates_TB4H.dtype
    gates_TB4xH = gates_TB4H.unflatten(2, (4, H))
    exact_B4xH = gates_TB4H.new_empty(B, 4, H)  # not rounded yet; of one step, so that it stays in the cache
    product_BH = weight_hh_3HH.new_empty(B, H)
    summand_BH = product_BH.to(gates_TB4H.dtype)
    slopes_TB4xH = gates_TB4H.new_empty(min(T, BLOCK), B, 4, H)
    scratch_TBH = gates_TB4H.new_empty(min(T, BLOCK), B, H)
    dh_BH, next_BH = d_out_TBH[-1].clone(), torch.empty_like(summand_BH)
    d_before = [torch.zeros_like(dh_BH), *d_out_TBH.unbind()[:-1]]  # from the output, for the state before each step
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
    return dh_BH


def slopes_of_h(gates_TB4xH: Tensor, before_TBH: Tensor, slopes_TB4xH: Tensor, scratch_TBH: Tensor) -> None:
    """Write the derivatives of h_t by the sums that n, r and z are functions of, and by s = W_hn h + b_hn:

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
    """Compute tanh x = 2 sigmoid(2 x) - 1 in place: on CPUs torch's sigmoid is several times as fast as its tanh."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def n_first(rows_3H: Tensor) -> Tensor:
    """Return blocks of rows in torch.nn.GRU's order r, z, n as n, r, z."""
    return rows_3H.roll(len(rows_3H) // 3, 0)


def n_last(rows_3H: Tensor) -> Tensor:
    """Return blocks of rows in the order n, r, z as r, z, n, torch.nn.GRU's order."""
    return rows_3H.roll(-(len(rows_3H) // 3), 0)
