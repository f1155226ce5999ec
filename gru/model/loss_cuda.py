"""The output layer with its cross-entropy loss on NVIDIA GPUs: loss_cuda.cu as a node of the autograd graph.

N tokens, C tokens of a chunk, E embedding width, V vocabulary, S the vocabulary rounded up to a multiple of 8.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gru import nvrtc
from gru.model.gru_cuda import card_of

SOURCE = Path(__file__).with_name("loss_cuda.cu")
THREADS = 256
LOWEST = -1e30
LOGIT_TYPES = {torch.bfloat16: "u16", torch.float32: "float"}
CHUNK_LOGITS = 1 << 28
"""Largest number of logits in memory at a time: 512 MiB in bf16."""

log = logging.getLogger(__name__)


def kernel_for(x_NE: Tensor, matmul_dtype: torch.dtype) -> nvrtc.Kernel | None:
    """Return the kernel for logits of this type; None, with the reason logged, where torch computes the softmax."""
    if x_NE.device.type != "cuda" or x_NE.dtype is not torch.float32 or matmul_dtype not in LOGIT_TYPES:
        return None
    return _kernel(matmul_dtype, x_NE.device.index)


@cache
def _kernel(matmul_dtype: torch.dtype, device: int) -> nvrtc.Kernel | None:
    try:
        return nvrtc.Kernel(compiled(matmul_dtype, card_of(device).architecture), "softmax")
    except (OSError, RuntimeError) as reason:
        log.warning("torch computes the softmax, slower than loss_cuda.cu: %s", reason)
        return None


def compiled(matmul_dtype: torch.dtype, architecture: str) -> bytes:
    """Return the machine code for logits of this type. Raises OSError if there is no CUDA compiler."""
    return nvrtc.compiled(SOURCE, architecture, f"-DLOGIT={LOGIT_TYPES[matmul_dtype]}", f"-DTHREADS={THREADS}")


class CrossEntropyCuda(torch.autograd.Function):
    """What gru.model.loss.CrossEntropy computes. The gradient of the logits takes their place, in `matmul_dtype`."""

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
        kernel: nvrtc.Kernel,
    ) -> Tensor:
        (N, E), V = x_NE.shape, len(weight_VE)
        S = -(-V // 8) * 8
        factor_NE, factor_SE = x_NE.to(matmul_dtype), weight_VE.new_zeros(S, E, dtype=matmul_dtype)
        factor_SE[:V] = weight_VE
        bias_S = bias_V.new_full((S,), LOWEST)
        bias_S[:V] = bias_V
        chunk = min(N, max(1, CHUNK_LOGITS // S))
        logits_CS = factor_NE.new_empty(chunk, S)
        losses_N = torch.empty_like(x_NE[:, 0])
        d_x_NE, d_weight_SE, d_bias_S = torch.empty_like(x_NE), None, torch.zeros_like(bias_S)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            factor_CE = factor_NE[rows]
            logits = torch.mm(factor_CE, factor_SE.t(), out=logits_CS[: len(factor_CE)])
            _softmax(kernel, logits, bias_S, targets_N[rows], weights_N, losses_N, start, differentiate)
            if differentiate:
                torch.mm(logits, factor_SE, out_dtype=torch.float32, out=d_x_NE[rows])
                part_SE = torch.mm(logits.t(), factor_CE, out_dtype=torch.float32)
                d_weight_SE = part_SE if d_weight_SE is None else d_weight_SE.add_(part_SE)
                d_bias_S += logits.sum(0, dtype=torch.float32)
        if d_weight_SE is not None:
            ctx.save_for_backward(d_x_NE, d_weight_SE[:V], d_bias_S[:V])
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient.mul_(d_total) for gradient in ctx.saved_tensors), None, None, None, None, None


def _softmax(
    kernel: nvrtc.Kernel,
    logits_CS: Tensor,
    bias_S: Tensor,
    targets_C: Tensor,
    weights_N: Tensor | None,
    losses_N: Tensor,
    start: int,
    differentiate: bool,
) -> None:
    """Write the losses of rows from `start` on, and their gradient over the logits."""
    C, S = logits_CS.shape
    weights = None if weights_N is None else weights_N[start:].data_ptr()
    tensors = [logits_CS.data_ptr(), bias_S.data_ptr(), targets_C.data_ptr(), weights, losses_N[start:].data_ptr()]
    arguments = [*map(nvrtc.pointer, tensors), nvrtc.integer(S), nvrtc.integer(differentiate)]
    kernel.launch((C, 1), THREADS, torch.cuda.current_stream().cuda_stream, arguments)
