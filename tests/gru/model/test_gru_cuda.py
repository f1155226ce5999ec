"""Tests of the kernels for GPUs on a machine without one: they compile, and every shape has blocks that fit a card."""

from pathlib import Path

import pytest
import torch

from gru import nvrtc
from gru.model import gru_cuda, loss_cuda
from gru.model.gru_cuda import Card, plan_for, shared_bytes

H100 = Card("sm_90", 132, 227 << 10)
A100 = Card("sm_80", 108, 163 << 10)


@pytest.mark.parametrize(
    ("hidden", "lanes", "card", "backward"),
    [
        (256, 16, H100, False),
        (1024, 64, H100, True),
        (1024, 256, H100, True),
        (2048, 64, H100, False),
        (512, 64, A100, True),
    ],
)
def test_the_time_steps_compile(hidden: int, lanes: int, card: Card, backward: bool) -> None:
    code = gru_cuda.compiled(hidden, plan_for(hidden, lanes, card, backward), card.architecture)
    assert b"gru_forward" in code and b"gru_backward" in code


@pytest.mark.parametrize("matmul_dtype", loss_cuda.LOGIT_TYPES)
def test_the_softmax_compiles(matmul_dtype: torch.dtype) -> None:
    assert b"softmax" in loss_cuda.compiled(matmul_dtype, "sm_90")


@pytest.mark.parametrize("card", [H100, A100])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("hidden", range(256, 2049, 256))
def test_blocks_cover_all_lanes_and_fit_the_card(hidden: int, backward: bool, card: Card) -> None:
    for lanes in range(16, 1100, 16):
        try:
            plan = plan_for(hidden, lanes, card, backward)
        except ValueError:
            assert hidden // 16 > card.multiprocessors  # all blocks of one tile of lanes must run at once
            continue
        assert hidden // plan.units * plan.rows <= card.multiprocessors
        assert shared_bytes(hidden, plan, backward) <= card.shared_bytes
        assert (plan.launches - 1) * plan.lanes < lanes <= plan.launches * plan.lanes


@pytest.mark.parametrize(
    ("hidden", "card", "reason"),
    [
        (384, H100, "multiples of 256 up to 2048, not 384"),
        (2304, H100, "multiples of 256 up to 2048, not 2304"),
        (256, Card("sm_75", 40, 64 << 10), "needs bf16 products, which sm_75 lacks"),
        (2048, A100, "no room for a hidden width of 2048 on this card"),
    ],
)
def test_the_reason_for_cudnn_is_given(hidden: int, card: Card, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_for(hidden, 64, card, backward=False)


def test_a_source_that_does_not_compile_is_an_error_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = tmp_path / "wrong.cu"
    source.write_text("__device__ int f() {\n  return unknown;\n}\n")
    with pytest.raises(OSError, match=r'wrong\.cu does not compile: wrong\.cu\(2\): error: identifier "unknown"'):
        nvrtc.compiled(source, "sm_90")
    assert not list(tmp_path.rglob("*.cubin"))
