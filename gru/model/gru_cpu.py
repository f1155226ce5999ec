"""gru_cpu.c as functions of tensors.

It knows the shapes of what gru_cpu.c reads and writes, and nothing of autograd. "Factors" are what matrix products
multiply, in bf16 or fp32; all else is fp32. T time, B lanes, H hidden width; nH: n blocks of H side by side.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gru import native

SOURCE = Path(__file__).with_name("gru_cpu.c")

log = logging.getLogger(__name__)


def _structure(name: str, pointers: str) -> type[ctypes.Structure]:
    sizes = [(size, ctypes.c_int64) for size in ("T", "B", "H")]
    fields = [*sizes, *((pointer, ctypes.c_void_p) for pointer in pointers.split())]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Forward = _structure("_Forward", "into bias weights nrs z states rounded")
_Backward = _structure("_Backward", "d_out nrs z states weights d_gates d_h")


class NativeSteps(NamedTuple):
    """gru_cpu.c for one type of factors. The hidden width must be a multiple of `units`."""

    library: ctypes.CDLL
    width: int
    units: int


def steps_for(hidden: int, factors: torch.dtype, like: Tensor) -> NativeSteps | None:
    """What computes the steps of states of that width, of the type and on the device of `like`, if anything does."""
    if like.dtype is not torch.float32 or like.device.type != "cpu" or factors not in (torch.bfloat16, torch.float32):
        return None
    found = kernel(factors)
    return found if found and hidden % found.units == 0 else None


@cache
def kernel(factors: torch.dtype) -> NativeSteps | None:
    """None, with the reason logged, where there is no compiler or the processor does not suit."""
    try:
        flags = []
        if factors is torch.bfloat16:
            instructions = native.instructions().split()
            if "avx512_bf16" not in instructions or "amx_bf16" in instructions:
                raise OSError("bf16 is multiplied by AVX512-BF16 where there is no AMX")  # which torch uses
            flags.append("-DBF16")
        library = native.library(SOURCE, *flags)
    except OSError as reason:
        log.info("torch computes the recurrence in %s, which is slower than gru_cpu.c: %s", factors, reason)
        return None
    return NativeSteps(library, *(native.constant(library, name) for name in ("width", "units")))


def forward(
    kernel: NativeSteps,
    into_TB3H: Tensor,
    bias_4H: Tensor,
    weight_hh_3HH: Tensor,
    states_TBH: Tensor,
    factors_TBH: Tensor,
    nrs_TB3H: Tensor | None = None,
    z_TBH: Tensor | None = None,
) -> None:
    """From the first of the T + 1 states, write those after it, all of them as factors, and, where wanted, the gates.

    into: products of the inputs, for n, r, z. bias: of n, r, z, s. weight_hh: factors, as torch.nn.GRU has them. The
    states may be their own factors.
    """
    (T, B, H), W, D = states_TBH[1:].shape, kernel.width, _depth(weight_hh_3HH)
    weights = weight_hh_3HH.view(3, H // W, W, H // D, D).permute(1, 3, 0, 2, 4).contiguous()
    arguments = into_TB3H, bias_4H, weights, nrs_TB3H, z_TBH, states_TBH, factors_TBH
    _call(kernel.library.forward, _Forward(T, B, H, *map(_pointer, arguments)))


def backward(
    kernel: NativeSteps,
    d_out_TBH: Tensor,
    nrs_TB3H: Tensor,
    z_TBH: Tensor,
    states_TBH: Tensor,
    weight_hh_3HH: Tensor,
    d_gates_TB4H: Tensor,
) -> Tensor:
    """Write the gradients of the sums that n, r and z are functions of, and of s, as factors; returns that of the first
    state [B, H]."""
    (T, B, H), W, D = d_out_TBH.shape, kernel.width, _depth(weight_hh_3HH)
    weights = weight_hh_3HH.view(3 * H // D, D, H // (2 * W), 2, W).permute(2, 0, 3, 4, 1).contiguous()
    d_h_BH = torch.empty_like(states_TBH[0])
    arguments = d_out_TBH, nrs_TB3H, z_TBH, states_TBH, weights, d_gates_TB4H, d_h_BH
    _call(kernel.library.backward, _Backward(T, B, H, *map(_pointer, arguments)))
    return d_h_BH


def _depth(factors: Tensor) -> int:
    """How many neighbouring factors are multiplied at once."""
    return 2 if factors.dtype is torch.bfloat16 else 1


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _call(function: Any, arguments: ctypes.Structure) -> None:
    function(ctypes.byref(arguments), ctypes.c_int(torch.get_num_threads()))
