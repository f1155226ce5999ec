"""The output layer with its cross-entropy loss, and the loss of a model over a stream of batches.

The logits of a whole window are never in memory at once.
N tokens, C tokens of a chunk, K tokens of a block, E embedding width, V vocabulary, T time steps, B lanes.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gru.model import loss_cuda
from gru.model.interface import LanguageModel
from gru.model.precision import without_tf32
from gru.model.workspace import workspace

CHUNK_LOGITS = 1 << 24
"""Largest number of logits in memory at a time: 32 MiB in bf16."""

BLOCK_LOGITS = 1 << 19
"""Largest number of logits whose softmax is computed at once: few enough to stay in the cache."""


def cross_entropy(
    x_NE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None,
    matmul_dtype: torch.dtype,
) -> Tensor:
    """Return the summed cross-entropy of softmax(x W^T + b) with the targets, in nats, weighted by `weights` if given.

    `matmul_dtype` is the type to which the factors of matrix products are rounded; all else stays in the type of x.
    """
    arguments = x_NE, weight_VE, bias_V, targets_N, weights_N, matmul_dtype, torch.is_grad_enabled()
    kernel = loss_cuda.kernel_for(x_NE, matmul_dtype)
    return loss_cuda.CrossEntropyCuda.apply(*arguments, kernel) if kernel else CrossEntropy.apply(*arguments)


class CrossEntropy(torch.autograd.Function):
    """The loss and its gradients, computed together chunk by chunk, so that logits are neither stored nor recomputed.

    The loss is a sum, so backward only multiplies the gradients by one number. It can run only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        weights_N: Tensor | None,
        matmul_dtype: torch.dtype,
        differentiate: bool,
    ) -> Tensor:
        N, V = len(x_NE), len(weight_VE)
        chunk, block = (min(N, max(1, most // V)) for most in (CHUNK_LOGITS, BLOCK_LOGITS))
        factor_NE, factor_VE = x_NE.to(matmul_dtype), weight_VE.to(matmul_dtype)
        factor_EV = factor_VE.t().contiguous()  # matrix products of contiguous factors are fastest
        logits_CV = workspace.take((chunk, V), factor_NE)
        exact_KV = workspace.take((block, V), x_NE)
        if differentiate:
            d_x_NE = torch.empty_like(x_NE)
            d_weight_EV, d_bias_V = x_NE.new_zeros(x_NE.shape[1], V), torch.zeros_like(bias_V)
        total = x_NE.new_zeros(())
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            logits = torch.mm(factor_NE[rows], factor_EV, out=logits_CV[: rows.stop - start])
            for first in range(start, rows.stop, block):
                block_rows = slice(first, min(first + block, rows.stop))
                part = logits[first - start : block_rows.stop - start]
                exact = exact_KV[: len(part)].copy_(part).add_(bias_V)
                torch.log_softmax(exact, 1, out=exact)
                targets_K1 = targets_N[block_rows].unsqueeze(1)
                losses_K = -exact.gather(1, targets_K1).squeeze(1)
                total += losses_K.sum() if weights_N is None else losses_K.dot(weights_N[block_rows])
                if not differentiate:
                    continue
                exact.exp_().scatter_add_(1, targets_K1, exact.new_full((), -1).expand_as(targets_K1))
                if weights_N is not None:
                    exact *= weights_N[block_rows].unsqueeze(1)
                d_bias_V += exact.sum(0)
                part.copy_(exact)  # from here on, the gradient of the logits
            if differentiate:
                d_x_NE[rows] = torch.mm(logits, factor_VE)
                d_weight_EV += torch.mm(factor_NE[rows].t(), logits).to(x_NE.dtype)  # the narrower one is transposed
        workspace.give(logits_CV, exact_KV)
        if differentiate:
            ctx.save_for_backward(d_x_NE, d_weight_EV.t().contiguous(), d_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient.mul_(d_total) for gradient in ctx.saved_tensors), None, None, None, None


@torch.inference_mode()
def stream_loss(model: LanguageModel, batches: Iterable[tuple[np.ndarray, ...]], lanes: int) -> float:
    """Return the summed loss, in nats, over batches of (inputs, targets, weights), each [T, lanes].

    The model's state is carried from batch to batch.
    """
    device = model.output_bias.device
    state_LBH = model.initial_state(lanes)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        inputs_TB, targets_TB, weights_TB = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in batch)
        with without_tf32():
            loss, state_LBH = model.loss(inputs_TB, targets_TB, state_LBH, weights_TB=weights_TB)
        total += loss
    return float(total)
