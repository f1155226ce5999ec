"""recurrence.c as functions of tensors: compiled by the machine's C compiler when it is first needed, and kept.

It knows the shapes of what recurrence.c reads and writes, and nothing of autograd.
T time, B lanes, H hidden width; nH: n blocks of H side by side.
"""

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("recurrence.c")
COMPILE = ["cc", "-O3", "-shared", "-fPIC", "-fopenmp"]  # OpenMP's threads are then torch's own: one libgomp is loaded
WIDTH, UNITS = 16, 32  # as in recurrence.c

log = logging.getLogger(__name__)


def _structure(name: str, pointers: str) -> type[ctypes.Structure]:
    sizes = [(size, ctypes.c_int64) for size in ("T", "B", "H")]
    fields = [*sizes, *((pointer, ctypes.c_void_p) for pointer in pointers.split())]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_Forward = _structure("_Forward", "into bias weights nrs z states rounded")
_Backward = _structure("_Backward", "d_out nrs z states weights d_gates d_h")


def usable(hidden: int, products: torch.dtype, like: Tensor) -> bool:
    """Whether `forward` and `backward` can be called on tensors like that one."""
    suits = products is torch.bfloat16 and like.dtype is torch.float32 and like.device.type == "cpu"
    return suits and hidden % UNITS == 0 and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """None, with the reason logged, where there is no compiler or the processor does not multiply bf16."""
    try:
        if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
            raise OSError("this processor has no AVX512-BF16")
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as reason:
        log.info("the recurrence is computed by torch, which is slower: %s", reason)
        return None


def _compiled() -> Path:
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMPILE).encode()).hexdigest()[:16]
    directory = Path.home() / ".cache" / "gru-pipeline"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        directory = Path(tempfile.mkdtemp(prefix="gru-pipeline-"))
    path = directory / f"recurrence-{name}.so"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILE, str(SOURCE), "-o", str(draft)], check=True, capture_output=True, text=True)
        draft.rename(path)
    return path


def forward(
    into_TB3H: Tensor,
    bias_4H: Tensor,
    weight_hh_3HH: Tensor,
    states_TBH: Tensor,
    rounded_TBH: Tensor,
    nrs_TB3H: Tensor | None = None,
    z_TBH: Tensor | None = None,
) -> None:
    """From the first of the T + 1 states, write those after it, all of them rounded, and, where wanted, the gates.

    into: products of the inputs, for n, r, z, in bf16. bias: of n, r, z, s. weight_hh: as torch.nn.GRU has it, in bf16.
    """
    T, B, H = into_TB3H.shape[0], *states_TBH.shape[1:]
    weights = weight_hh_3HH.view(3, H // WIDTH, WIDTH, H // 2, 2).permute(1, 3, 0, 2, 4).contiguous()
    _run("forward", _Forward, T, B, H, into_TB3H, bias_4H, weights, nrs_TB3H, z_TBH, states_TBH, rounded_TBH)


def backward(
    d_out_TBH: Tensor, nrs_TB3H: Tensor, z_TBH: Tensor, states_TBH: Tensor, weight_hh_3HH: Tensor, d_gates_TB4H: Tensor
) -> Tensor:
    """Write the gradients of the sums that n, r and z are functions of, and of s, in bf16; returns that of the first
    state [B, H]."""
    T, B, H = d_out_TBH.shape
    weights = weight_hh_3HH.view(3 * H // 2, 2, H // UNITS, 2, WIDTH).permute(2, 0, 3, 4, 1).contiguous()
    d_h_BH = torch.empty_like(states_TBH[0])
    _run("backward", _Backward, T, B, H, d_out_TBH, nrs_TB3H, z_TBH, states_TBH, weights, d_gates_TB4H, d_h_BH)
    return d_h_BH


def _run(function: str, structure: type[ctypes.Structure], T: int, B: int, H: int, *tensors: Tensor | None) -> None:
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    loaded = library()
    assert loaded is not None
    getattr(loaded, function)(ctypes.byref(structure(T, B, H, *pointers)), ctypes.c_int(torch.get_num_threads()))
