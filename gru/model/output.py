"""The output layer and its loss, without the logits of a whole window in memory.

N tokens, C tokens of a chunk, E embedding width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from gru.model.workspace import workspace

CHUNK_LOGITS = 1 << 24
"""Most logits in memory at a time: 64 MiB in fp32."""


def cross_entropy(
    x_NE: Tensor, weight_VE: Tensor, bias_V: Tensor, targets_N: Tensor, weights_N: Tensor | None, products: torch.dtype
) -> Tensor:
    """Summed cross-entropy in nats of softmax(x W^T + b) with the targets, times the weight of each where given.

    `products` is the type that the factors of matrix products are rounded to; everything else stays in the type of x.
    """
    return CrossEntropy.apply(x_NE, weight_VE, bias_V, targets_N, weights_N, products, torch.is_grad_enabled())


class CrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the loss, chunk by chunk, so that logits are neither kept nor computed twice:
    with a sum, all that backward can add is one factor. It can be run only once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        weights_N: Tensor | None,
        products: torch.dtype,
        differentiate: bool,
    ) -> Tensor:
        N, V = len(x_NE), len(weight_VE)
        chunk = min(N, max(1, CHUNK_LOGITS // V))
        factor_NE, factor_VE = x_NE.to(products), weight_VE.to(products)
        factor_EV = factor_VE.t().contiguous()  # products of contiguous factors are fastest
        logits_CV = workspace.take((chunk, V), x_NE)
        rounded_CV = workspace.take((chunk, V), factor_NE) if products != x_NE.dtype else None
        if differentiate:
            d_x_NE = torch.empty_like(x_NE)
            d_weight_VE, d_bias_V = torch.zeros_like(weight_VE), torch.zeros_like(bias_V)
        total = x_NE.new_zeros(())
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            logits = logits_CV[: rows.stop - start]
            if rounded_CV is None:
                torch.addmm(bias_V, factor_NE[rows], factor_EV, out=logits)
            else:
                logits.copy_(torch.mm(factor_NE[rows], factor_EV, out=rounded_CV[: len(logits)])).add_(bias_V)
            torch.log_softmax(logits, 1, out=logits)
            targets_C1 = targets_N[rows].unsqueeze(1)
            losses_C = -logits.gather(1, targets_C1).squeeze(1)
            total += losses_C.sum() if weights_N is None else losses_C.dot(weights_N[rows])
            if not differentiate:
                continue
            d_logits = logits.exp_()
            d_logits.scatter_add_(1, targets_C1, d_logits.new_full((), -1).expand_as(targets_C1))
            if weights_N is not None:
                d_logits *= weights_N[rows].unsqueeze(1)
            d_bias_V += d_logits.sum(0)
            if rounded_CV is None:
                torch.mm(d_logits, factor_VE, out=d_x_NE[rows])
                d_weight_VE.addmm_(d_logits.t(), factor_NE[rows])
            else:
                d_factor = rounded_CV[: len(logits)].copy_(d_logits)
                d_x_NE[rows] = torch.mm(d_factor, factor_VE)
                d_weight_VE += torch.mm(d_factor.t(), factor_NE[rows]).to(d_weight_VE.dtype)
        workspace.give(logits_CV, *([] if rounded_CV is None else [rounded_CV]))
        if differentiate:
            ctx.save_for_backward(d_x_NE, d_weight_VE, d_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient.mul_(d_total) for gradient in ctx.saved_tensors), None, None, None, None
