"""The native steps of the GRU for CPUs: gru_cpu.c as functions of tensors.

It knows the shapes that gru_cpu.c reads and writes, and nothing of autograd. "Factors" are the inputs of matrix
products, in bf16 or fp32; all else is fp32. T time steps, B lanes, H hidden width; nH: n blocks of H side by side.
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
    """gru_cpu.c, compiled for one type of factors."""

    library: ctypes.CDLL
    width: int
    """Number of floats in a register."""
    units: int
    """The hidden width must be a multiple of this."""


def steps_for(hidden: int, matmul_dtype: torch.dtype, like: Tensor) -> NativeSteps | None:
    """Return the native steps for states of this width, of the type and on the device of `like`; None if unsuitable."""
    if like.dtype is not torch.float32 or like.device.type != "cpu":
        return None
    if matmul_dtype not in (torch.bfloat16, torch.float32):
        return None
    steps = native_steps(matmul_dtype)
    return steps if steps and hidden % steps.units == 0 else None


@cache
def native_steps(matmul_dtype: torch.dtype) -> NativeSteps | None:
    """Return gru_cpu.c, compiled for this type of factors; None, with the reason logged, where torch computes instead.

    That is without a compiler; and in bf16 on processors with AMX, which only torch uses, and without AVX512-BF16.
    """
    flags = []
    try:
        if matmul_dtype is torch.bfloat16:
            instructions = native.instructions().split()
            if "amx_bf16" in instructions:
                log.info("torch computes the GRU steps in bf16: it uses AMX, which is faster than gru_cpu.c")
                return None
            if "avx512_bf16" not in instructions:
                log.info("torch computes the GRU steps in bf16: gru_cpu.c needs AVX512-BF16, absent on this processor")
                return None
            flags.append("-DBF16")
        library = native.library(SOURCE, *flags)
    except OSError as reason:
        name = str(matmul_dtype).removeprefix("torch.")
        log.info("torch computes the GRU steps in %s, slower than gru_cpu.c, which did not compile: %s", name, reason)
        return None
    return NativeSteps(library, *(native.constant(library, name) for name in ("width", "units")))


def forward(
    steps: NativeSteps,
    into_TB3H: Tensor,
    bias_4H: Tensor,
    weight_hh_3HH: Tensor,
    states_TBH: Tensor,
    factors_TBH: Tensor,
    nrs_TB3H: Tensor | None = None,
    z_TBH: Tensor | None = None,
) -> None:
    """Write the states after the first of T + 1, all T + 1 as factors, and the gates if tensors for them are given.

    into: matrix products of the inputs, for n, r, z. bias: the biases of n, r, z, s. weight_hh: factors, in
    torch.nn.GRU's order. `factors` may be the states themselves.
    """
    (T, B, H), W, D = states_TBH[1:].shape, steps.width, _depth(weight_hh_3HH)
    weights = weight_hh_3HH.view(3, H // W, W, H // D, D).permute(1, 3, 0, 2, 4).contiguous()
    arguments = into_TB3H, bias_4H, weights, nrs_TB3H, z_TBH, states_TBH, factors_TBH
    _call(steps.library.forward, _Forward(T, B, H, *map(_pointer, arguments)))


def backward(
    steps: NativeSteps,
    d_out_TBH: Tensor,
    nrs_TB3H: Tensor,
    z_TBH: Tensor,
    states_TBH: Tensor,
    weight_hh_3HH: Tensor,
    d_gates_TB4H: Tensor,
) -> Tensor:
    """Write, as factors, the gradients of the sums that n, r and z are functions of, and of s.

    Returns the gradient of the first state [B, H].
    """
    (T, B, H), W, D = d_out_TBH.shape, steps.width, _depth(weight_hh_3HH)
    weights = weight_hh_3HH.view(3 * H // D, D, H // (2 * W), 2, W).permute(2, 0, 3, 4, 1).contiguous()
    d_h_BH = torch.empty_like(states_TBH[0])
    arguments = d_out_TBH, nrs_TB3H, z_TBH, states_TBH, weights, d_gates_TB4H, d_h_BH
    _call(steps.library.backward, _Backward(T, B, H, *map(_pointer, arguments)))
    return d_h_BH


def _depth(factors: Tensor) -> int:
    """Return how many neighbouring factors are multiplied at once."""
    return 2 if factors.dtype is torch.bfloat16 else 1


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def _call(function: Any, arguments: ctypes.Structure) -> None:
    function(ctypes.byref(arguments), ctypes.c_int(torch.get_num_threads()))
