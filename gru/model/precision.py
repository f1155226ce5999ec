"""The precision of training: the factors of matrix products are rounded to bf16 where that is faster, else fp32.

Weights, states, gates, sums and losses are fp32 in both cases. Scores are computed with `without_tf32`.
"""

import logging
import time
from contextlib import AbstractContextManager
from functools import cache
from typing import Literal

import torch

from gru.config import ModelConfig

Precision = Literal["bf16", "fp32"]
MATMUL_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
ADVANTAGE = 1.3
"""The speed of bf16 relative to fp32 above which it is chosen: processors reach a half, 1, 2 or more."""

log = logging.getLogger(__name__)


def resolve(config: ModelConfig, device: torch.device) -> Precision:
    """Return the precision that a model's config means on a device."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if bf16_advantage() > ADVANTAGE else "fp32"


@cache
def bf16_advantage() -> float:
    """Return how many times as fast as in fp32 this processor multiplies matrices in bf16.

    It is measured, in a few hundredths of a second, because the processor's instruction sets do not tell: Intel's
    Sapphire Rapids has AVX512-BF16 at half the rate of fp32, and the matrix unit that makes it fast (AMX) may be hidden
    from a virtual machine. What counts is the time that one thread computes, so that other work on the machine does not
    decide with which precision a model is trained.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best: dict[torch.dtype, float] = {}
    factors = {
        dtype: (torch.ones(256, 512, dtype=dtype), torch.ones(512, 1536, dtype=dtype))
        for dtype in MATMUL_DTYPES.values()
    }
    for _ in range(5):
        for dtype, (left, right) in factors.items():
            started = time.thread_time()
            torch.mm(left, right)
            best[dtype] = min(best.get(dtype, float("inf")), time.thread_time() - started)
    torch.set_num_threads(threads)
    advantage = best[torch.float32] / best[torch.bfloat16]
    log.info("bf16 matrix products run %.1f times as fast as fp32 on this processor", advantage)
    return advantage


def without_tf32() -> AbstractContextManager[None]:
    """Return a context in which a GPU computes fp32 RNNs in fp32.

    By default cuDNN rounds the factors of their matrix products to tf32, which has 10 bits of mantissa instead of 23.
    Other matrix products are fp32 by default.
    https://pytorch.org/docs/main/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
