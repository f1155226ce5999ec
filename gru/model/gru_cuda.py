"""The GRU over a sequence on NVIDIA GPUs, in bf16: gru_cuda.cu and gru_cuda_wide.cu as a node of the autograd graph.

They are chosen by the shape and the card; torch.nn.GRU (cuDNN) computes the rest. T time steps, B lanes, N = T * B,
E input width, H hidden width; nH: n blocks of H side by side.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gru import nvrtc

SOURCE = Path(__file__).with_name("gru_cuda.cu")
WIDE_SOURCE = Path(__file__).with_name("gru_cuda_wide.cu")
THREADS = 256
WARPS = THREADS // 32
TILE, WIDE_TILE = 16, 64
"""Lanes that a block multiplies at once."""
WIDE_FROM = 4
"""Tiles of 16 lanes in a block from which gru_cuda_wide.cu is the faster one."""

log = logging.getLogger(__name__)


class Card(NamedTuple):
    """What a kernel's shape depends on."""

    architecture: str
    multiprocessors: int
    shared_bytes: int
    """Shared memory that one block can have."""


class Plan(NamedTuple):
    """How the hidden units and the lanes are shared among the blocks of one or several launches."""

    units: int
    """Hidden units of a block."""
    tiles: int
    """Tiles of lanes of a block, at most."""
    rows: int
    """Blocks of the same units in one launch."""
    launches: int
    wide: bool = False
    """Whether gru_cuda_wide.cu computes it."""

    @property
    def lanes(self) -> int:
        """The lanes of one launch."""
        return self.rows * self.tiles * (WIDE_TILE if self.wide else TILE)


class Steps(NamedTuple):
    """The compiled time steps for one hidden width and number of lanes."""

    forward: tuple[Plan, nvrtc.Kernel]
    backward: tuple[Plan, nvrtc.Kernel]

    @property
    def tile(self) -> int:
        """The number of lanes that the kernels compute is a multiple of this."""
        return WIDE_TILE if self.forward[0].wide or self.backward[0].wide else TILE


def steps_for(hidden: int, lanes: int, device: torch.device) -> Steps | None:
    """Return the compiled steps for states [lanes, hidden]; None, with the reason logged, where cuDNN computes."""
    return _steps(hidden, lanes, device.index if device.index is not None else 0)


@cache
def _steps(hidden: int, lanes: int, device: int) -> Steps | None:
    card = card_of(device)
    kernels = []
    try:
        for name, backward in (("gru_forward", False), ("gru_backward", True)):
            plan = plan_for(hidden, lanes, card, backward)
            cubin = compiled(hidden, plan, card.architecture)
            kernels.append((plan, nvrtc.Kernel(cubin, name, shared_bytes(hidden, plan, backward))))
    except ValueError as reason:
        log.info("cuDNN computes the GRU: %s", reason)
        return None
    except (OSError, RuntimeError) as reason:
        log.warning("cuDNN computes the GRU, which is slower than gru_cuda.cu: %s", reason)
        return None
    log.info("gru_cuda.cu computes the GRU of width %d in %d lanes: %s", hidden, lanes, [plan for plan, _ in kernels])
    return Steps(*kernels)


def card_of(device: int) -> Card:
    """Return the properties of a device."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the last field
    architecture = f"sm_{properties.major}{properties.minor}"
    return Card(architecture, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def compiled(hidden: int, plan: Plan, architecture: str) -> bytes:
    """Return the machine code for a plan. Raises OSError if there is no CUDA compiler."""
    sizes = f"-DHIDDEN={hidden}", f"-DUNITS={plan.units}"
    if plan.wide:
        return nvrtc.compiled(WIDE_SOURCE, f"{architecture}a", *sizes)
    return nvrtc.compiled(SOURCE, architecture, *sizes, f"-DTILES={plan.tiles}")


def shared_bytes(hidden: int, plan: Plan, backward: bool) -> int:
    """Return the dynamic shared memory of a block: its weights or half of them, and buffers for sums."""
    units = plan.units
    if plan.wide:
        received = 256 if backward else 768 * (32 // units - 1)
        return (6 * hidden + (256 if backward else 272) + received) * units + 1152
    inner, columns = (3 * hidden, units) if backward else (hidden, 3 * units)
    steps = inner // WARPS // 16
    weights = (steps - steps // 2) * (columns // 16) * THREADS * 16
    return weights + 2 * WARPS * TILE * (columns + 8) * 4


def plan_for(hidden: int, lanes: int, card: Card, backward: bool) -> Plan:
    """Return the fastest plan for a hidden width and a number of lanes. Raises ValueError with the reason if none is.

    The forward pass of a wide layer gains from a second tile, which is computed while the states of the first travel;
    the backward pass, which reads three times as much, from many units in a block.
    """
    if int(card.architecture.removeprefix("sm_")) < 80:
        raise ValueError(f"gru_cuda.cu needs bf16 products, which {card.architecture} lacks")
    if hidden % 256 or not 256 <= hidden <= 2048:
        raise ValueError(f"gru_cuda.cu computes hidden widths that are multiples of 256 up to 2048, not {hidden}")
    plans = []
    for units in (32, 16):
        capacity = card.multiprocessors // (hidden // units)  # every block has a multiprocessor of its own
        for tiles in (1, 2, 4, 8) if capacity and units * hidden <= 32 * 1024 else ():
            rows = -(-lanes // (TILE * tiles))
            plan = Plan(units, tiles, min(rows, capacity), -(-rows // capacity))
            if shared_bytes(hidden, plan, backward) <= card.shared_bytes:
                plans.append(plan)
    if not plans:
        raise ValueError(f"gru_cuda.cu has no room for a hidden width of {hidden} on this card")

    def rank(plan: Plan) -> tuple[int, ...]:
        if backward:
            return plan.launches, -plan.units, plan.tiles
        return plan.launches, hidden > 512 and plan.tiles < 2, plan.units * plan.tiles, plan.tiles

    best = min(plans, key=rank)
    if card.architecture == "sm_90" and best.launches * best.tiles >= WIDE_FROM:
        units = min(32, 32 * 1024 // hidden // 16 * 16)
        rows, capacity = -(-lanes // WIDE_TILE), card.multiprocessors // (hidden // units)
        return Plan(units, 1, min(rows, capacity), -(-rows // capacity), wide=True)
    return best


class GRUCuda(torch.autograd.Function):
    """The GRU of torch.nn.GRU's weights over a sequence: states and sums in fp32, factors of products in bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TBE: Tensor,
        h_BH: Tensor,
        weight_ih_3HE: Tensor,
        weight_hh_3HH: Tensor,
        bias_ih_3H: Tensor,
        bias_hh_3H: Tensor,
        steps: Steps,
    ) -> tuple[Tensor, Tensor]:
        """Return the states [T, B, H] in bf16, and the last one [B, H] in fp32."""
        (T, B, _), H = x_TBE.shape, h_BH.shape[1]
        padding = -B % steps.tile
        x_NE = _padded(x_TBE.bfloat16(), padding).flatten(0, 1)
        first_BH = _padded(h_BH.float(), padding).contiguous()
        lanes = B + padding
        weight_ih_3HE, weight_hh_3HH = weight_ih_3HE.bfloat16(), weight_hh_3HH.bfloat16()
        into_N3H = torch.mm(x_NE, weight_ih_3HE.t())
        bias_4H = torch.cat([bias_ih_3H, bias_hh_3H[2 * H :]])
        bias_4H[: 2 * H] += bias_hh_3H[: 2 * H]
        states_TBH = _unwritten(T + 1, lanes, H, like=x_NE)
        states_TBH[0] = first_BH
        gates_TB4H = x_NE.new_empty(T, lanes, 4 * H)
        last_BH = torch.empty_like(first_BH)
        _launch(
            steps.forward, [into_N3H, bias_4H, weight_hh_3HH, first_BH, states_TBH, gates_TB4H, last_BH], T, lanes, H
        )
        ctx.steps, ctx.lanes, ctx.dtypes = steps, B, (x_TBE.dtype, h_BH.dtype)
        ctx.save_for_backward(x_NE, weight_ih_3HE, weight_hh_3HH, states_TBH, gates_TB4H)
        return states_TBH[1:, :B], last_BH[:B]

    @staticmethod
    def backward(ctx: Any, d_out_TBH: Tensor, d_last_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_NE, weight_ih_3HE, weight_hh_3HH, states_TBH, gates_TB4H = ctx.saved_tensors
        (T, lanes, _), H = gates_TB4H.shape, states_TBH.shape[2]
        padding = lanes - ctx.lanes
        d_out_TBH = _padded(d_out_TBH, padding).contiguous()
        d_last_BH = _padded(d_last_BH, padding).contiguous()
        d_gates_TB4H = _unwritten(T, lanes, 4 * H, like=x_NE)
        d_first_BH, d_bias_B4H = torch.empty_like(d_last_BH), d_last_BH.new_zeros(lanes, 4 * H)
        tensors = [d_out_TBH, d_last_BH, gates_TB4H, states_TBH, weight_hh_3HH, d_gates_TB4H, d_first_BH, d_bias_B4H]
        _launch(ctx.steps.backward, tensors, T, lanes, H)
        # Of n, r, z and s: those of x (n, r, z) and those of h (r, z, s) are one stretch each.
        d_gates_N4H = d_gates_TB4H.flatten(0, 1)
        from_x_N3H, from_h_N3H = d_gates_N4H[:, : 3 * H], d_gates_N4H[:, H:]
        d_x_NE = torch.mm(from_x_N3H, weight_ih_3HE.roll(H, 0))
        d_weight_ih_3HE = torch.mm(from_x_N3H.t(), x_NE, out_dtype=torch.float32).roll(-H, 0)
        d_weight_hh_3HH = torch.mm(from_h_N3H.t(), states_TBH[:-1].flatten(0, 1), out_dtype=torch.float32)
        d_bias_4H = d_bias_B4H.sum(0)
        d_x_TBE = d_x_NE.view(T, lanes, -1)[:, : ctx.lanes].to(ctx.dtypes[0])
        d_h_BH = d_first_BH[: ctx.lanes].to(ctx.dtypes[1])
        return d_x_TBE, d_h_BH, d_weight_ih_3HE, d_weight_hh_3HH, d_bias_4H[: 3 * H].roll(-H, 0), d_bias_4H[H:], None


def _padded(tensor: Tensor, lanes: int) -> Tensor:
    """Return a tensor [..., B, width] with additional lanes of zeros."""
    return F.pad(tensor, (0, 0, 0, lanes)) if lanes else tensor


def _unwritten(*shape: int, like: Tensor) -> Tensor:
    """Return a tensor whose words are all ones, which means to the kernels that they are not written yet."""
    tensor = like.new_empty(shape)
    tensor.view(torch.int16).fill_(-1)
    return tensor


def _launch(side: tuple[Plan, nvrtc.Kernel], tensors: list[Tensor], T: int, lanes: int, hidden: int) -> None:
    plan, kernel = side
    assert all(tensor.is_contiguous() for tensor in tensors)
    stream = torch.cuda.current_stream().cuda_stream
    pointers = [nvrtc.pointer(tensor.data_ptr()) for tensor in tensors]
    for first_lane in range(0, lanes, plan.lanes):
        rows = min(plan.rows, -(-(lanes - first_lane) * plan.rows // plan.lanes))
        arguments = [*pointers, *map(nvrtc.integer, (T, lanes, first_lane))]
        kernel.launch((hidden // plan.units, rows), THREADS, stream, arguments, cooperative=True)
