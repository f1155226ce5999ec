"""Tests of the GRU layer against the published equations in float64, values and gradients, in both precisions."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gru import native
from gru.model import gru_cpu
from gru.model.gru_layer import GRU

Outcome = dict[str, Tensor]

# (T, B, E, H): one step, one lane, odd sizes, E != H, one block of steps and blocks with a remainder; hidden widths
# that suit gru_cpu.py, with whole tiles of lanes and with each remainder.
SHAPES = [(1, 1, 1, 1), (1, 4, 8, 8), (7, 1, 5, 3), (8, 2, 16, 16), (19, 3, 7, 11), (33, 5, 64, 48)]
SHAPES += [(1, 1, 5, 32), (6, 16, 32, 64), *((3, lanes, 16, 96) for lanes in range(9, 16)), (40, 33, 24, 32)]

# Relative to the largest value of each tensor. A factor rounded to bf16 is off by at most 2^-9 = 0.2 %; errors add up
# over a sum and over time, and partly cancel.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def published(x_TBE: Tensor, h_BH: Tensor, weights: list[Tensor]) -> Tensor:
    """Return the states by the equations at the top of gru/model/gru_layer.py, one operation at a time."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    (w_ir, w_iz, w_in), (w_hr, w_hz, w_hn) = weight_ih.chunk(3), weight_hh.chunk(3)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = bias_ih.chunk(3), bias_hh.chunk(3)
    out = []
    for x_BE in x_TBE:
        r = torch.sigmoid(x_BE @ w_ir.T + b_ir + h_BH @ w_hr.T + b_hr)
        z = torch.sigmoid(x_BE @ w_iz.T + b_iz + h_BH @ w_hz.T + b_hz)
        n = torch.tanh(x_BE @ w_in.T + b_in + r * (h_BH @ w_hn.T + b_hn))
        h_BH = (1 - z) * n + z * h_BH
        out.append(h_BH)
    return torch.stack(out)


def outcome(run: Callable[[Tensor, Tensor], Tensor], x_TBE: Tensor, h_BH: Tensor, weights: list[Tensor]) -> Outcome:
    """Return the states, and the gradients of a sum in which each state has another weight."""
    x_TBE, h_BH = x_TBE.clone().requires_grad_(), h_BH.clone().requires_grad_()
    out_TBH = run(x_TBE, h_BH)
    weighting = torch.arange(1, out_TBH.numel() + 1, dtype=out_TBH.dtype, device=out_TBH.device).sin().view_as(out_TBH)
    gradients = torch.autograd.grad((out_TBH * weighting).sum(), [x_TBE, h_BH, *weights])
    names = ("x", "h", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {"states": out_TBH.detach(), **dict(zip(names, gradients, strict=True))}


def layer(width: int, hidden: int, matmul_dtype: torch.dtype, seed: int) -> tuple[GRU, list[Tensor]]:
    """Return a layer, and its weights in float64."""
    torch.manual_seed(seed)
    gru = GRU(width, hidden, matmul_dtype)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return gru, [p.detach().double().requires_grad_() for p in gru.gru.all_weights[0]]


def draw(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    T, B, E, H = shape
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.normal(size=(T, B, E))), torch.from_numpy(generator.normal(size=(B, H)))


@pytest.fixture(params=["native", "torch"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the steps of gru_cpu.py where they are usable, and with those of torch."""
    if request.param == "torch":
        monkeypatch.setattr(gru_cpu, "native_steps", lambda matmul_dtype: None)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_published_equations(
    shape: tuple[int, int, int, int], matmul_dtype: torch.dtype
) -> None:
    gru, weights = layer(shape[2], shape[3], matmul_dtype, seed=shape[0])
    x_TBE, h_BH = draw(shape, seed=shape[1])
    expected = outcome(lambda x, h: published(x, h, weights), x_TBE, h_BH, weights)
    for _ in range(2):  # the second time with used buffers
        actual = outcome(lambda x, h: gru(x, h)[0], x_TBE.float(), h_BH.float(), gru.gru.all_weights[0])
        for name, tensor in expected.items():
            assert actual[name].dtype == torch.float32
            error = (actual[name] - tensor).abs().max() / tensor.abs().max()
            assert error < TOLERANCES[matmul_dtype], f"{name}: off by {error:.1e}"


def test_float64_is_exact() -> None:
    gru, weights = layer(7, 11, torch.float64, seed=0)
    x_TBE, h_BH = draw((19, 3, 7, 11), seed=0)
    gru.double()
    expected = outcome(lambda x, h: published(x, h, weights), x_TBE, h_BH, weights)
    actual = outcome(lambda x, h: gru(x, h)[0], x_TBE, h_BH, gru.gru.all_weights[0])
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-13, rtol=1e-13)


def test_fp32_without_gradients_is_torchs_own_gru() -> None:
    """Serving relies on rows with the same bits at any batch width, as torch's have."""
    gru, _ = layer(12, 20, torch.float32, seed=0)
    x_TBE, h_BH = (tensor.float() for tensor in draw((5, 4, 12, 20), seed=0))
    with torch.no_grad():
        out_TBH, last_BH = gru(x_TBE, h_BH)
        expected_TBH, _ = gru.gru(x_TBE, h_BH.unsqueeze(0))
    assert torch.equal(out_TBH, expected_TBH)
    assert torch.equal(last_BH, expected_TBH[-1])
    with_gradient_TBH, _ = gru(x_TBE, h_BH)
    torch.testing.assert_close(with_gradient_TBH, expected_TBH, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_windows_with_carried_state_equal_one_sequence(matmul_dtype: torch.dtype) -> None:
    gru, _ = layer(16, 64, matmul_dtype, seed=0)
    x_TBE, h_BH = (tensor.float() for tensor in draw((40, 4, 16, 64), seed=0))
    whole_TBH, end_BH = gru(x_TBE, h_BH)
    parts = []
    for window in x_TBE.split([1, 8, 31]):
        out_TBH, h_BH = gru(window, h_BH)
        parts.append(out_TBH)
    torch.testing.assert_close(torch.cat(parts), whole_TBH, atol=1e-5, rtol=1e-4)
    assert torch.equal(h_BH, parts[-1][-1])
    torch.testing.assert_close(h_BH, end_BH, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_the_same_inputs_give_the_same_bits(matmul_dtype: torch.dtype) -> None:
    gru, _ = layer(33, 47, matmul_dtype, seed=0)
    x_TBE, h_BH = (tensor.float() for tensor in draw((20, 6, 33, 47), seed=0))
    first, second = (outcome(lambda x, h: gru(x, h)[0], x_TBE, h_BH, gru.gru.all_weights[0]) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def require_native_steps(matmul_dtype: torch.dtype) -> gru_cpu.NativeSteps:
    native_steps = gru_cpu.native_steps(matmul_dtype)
    if native_steps is None:
        assert matmul_dtype is torch.bfloat16
        pytest.skip("this processor has AMX, or no AVX512-BF16")
    return native_steps


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_native_steps_of_a_lane_depend_on_neither_threads_nor_other_lanes(matmul_dtype: torch.dtype) -> None:
    T, B, H = 9, 21, 64
    torch.manual_seed(0)
    into_TB3H, weight_3HH = torch.randn(T, B, 3 * H).to(matmul_dtype), (torch.randn(3 * H, H) / 8).to(matmul_dtype)
    bias_4H, h_BH, d_out_TBH = torch.randn(4 * H), torch.randn(B, H), torch.randn(T, B, H)
    native_steps = require_native_steps(matmul_dtype)

    def compute(lanes: slice, threads: int) -> list[Tensor]:
        states_TBH = torch.empty(T + 1, B, H)[:, lanes].contiguous()
        states_TBH[0] = h_BH[lanes]
        factors_TBH, z_TBH = states_TBH.to(matmul_dtype), torch.empty_like(states_TBH[1:])
        nrs_TB3H, d_gates_TB4H = (z_TBH.to(matmul_dtype).repeat(1, 1, times) for times in (3, 4))
        into, d_out = into_TB3H[:, lanes].contiguous(), d_out_TBH[:, lanes].contiguous()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            gru_cpu.forward(native_steps, into, bias_4H, weight_3HH, states_TBH, factors_TBH, nrs_TB3H, z_TBH)
            d_h_BH = gru_cpu.backward(native_steps, d_out, nrs_TB3H, z_TBH, states_TBH, weight_3HH, d_gates_TB4H)
        finally:
            torch.set_num_threads(before)
        return [states_TBH[1:], d_gates_TB4H, d_h_BH.unsqueeze(0)]

    expected = compute(slice(B), 1)
    for lanes, threads in ((slice(B), 2), (slice(B), 3), (slice(3, 4), 1), (slice(5, 18), 2)):
        for whole, part in zip(expected, compute(lanes, threads), strict=True):
            assert torch.equal(whole[:, lanes], part)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_the_gradient(value: float, matmul_dtype: torch.dtype) -> None:
    """Training detects divergence by it, since the gates hide an infinite input from the states."""
    gru, _ = layer(8, 32, matmul_dtype, seed=0)
    x_TBE, h_BH = (tensor.float() for tensor in draw((5, 3, 8, 32), seed=0))
    x_TBE[2, 1, 3] = value
    gradients = torch.autograd.grad(gru(x_TBE, h_BH)[0].sum(), list(gru.parameters()))
    assert not all(gradient.isfinite().all() for gradient in gradients)


def test_large_sums_saturate_the_gates() -> None:
    x_TBE, h_BH = torch.tensor([-1e30, -200.0, 200.0, 1e30]).view(1, 4, 1), torch.full((4, 32), 0.5)
    gru, _ = layer(1, 32, torch.float32, seed=0)
    with torch.no_grad():
        gru.gru.weight_ih_l0.fill_(1)
    states_BH = gru(x_TBE, h_BH)[1]
    torch.testing.assert_close(states_BH, torch.tensor([[-1.0], [-1.0], [0.5], [0.5]]).expand(4, 32))


@pytest.mark.parametrize(
    ("command", "reason"),
    [(["no-such-compiler"], "No such file or directory: 'no-such-compiler'"), (["cc", "--wrong"], "--wrong")],
)
def test_without_a_compiler_torch_computes_the_steps_and_the_log_says_why(
    command: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native, "COMPILE", command)
    with caplog.at_level("INFO"):
        assert gru_cpu.native_steps.__wrapped__(torch.float32) is None
    assert "torch computes the GRU steps in float32, slower than gru_cpu.c, which did not compile" in caplog.text
    assert reason in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        ("avx512_bf16 amx_bf16", "torch computes the GRU steps in bf16: it uses AMX, which is faster than gru_cpu.c"),
        ("avx2", "torch computes the GRU steps in bf16: gru_cpu.c needs AVX512-BF16, absent on this processor"),
    ],
)
def test_where_torch_computes_the_steps_in_bf16_the_log_says_why(
    instructions: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "instructions", lambda: instructions)
    with caplog.at_level("INFO"):
        assert gru_cpu.native_steps.__wrapped__(torch.bfloat16) is None
    assert [record.message for record in caplog.records] == [reason]


@pytest.mark.slow
def test_gru_cpu_c_is_compiled_once_and_also_where_the_home_is_read_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gru_cpu.native_steps.__wrapped__(torch.float32) is not None
    [library] = tmp_path.rglob("*.so")
    with monkeypatch.context() as patch:
        patch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert gru_cpu.native_steps.__wrapped__(torch.float32) is not None
    assert list(library.parent.iterdir()) == [library]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert gru_cpu.native_steps.__wrapped__(torch.float32) is not None


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_two_windows_before_either_backward_do_not_share_buffers(matmul_dtype: torch.dtype) -> None:
    gru, _ = layer(6, 9, matmul_dtype, seed=0)
    inputs = [draw((12, 2, 6, 9), seed)[0].float() for seed in range(2)]
    h_BH = torch.zeros(2, 9)

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        return [torch.autograd.grad(loss, gru.gru.weight_hh_l0)[0] for loss in losses]

    apart = [gradients([gru(x, h_BH)[0].square().sum()])[0] for x in inputs]
    together = gradients([gru(x, h_BH)[0].square().sum() for x in inputs])
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_a_second_backward_is_refused() -> None:
    """The first backward has overwritten the saved buffers."""
    gru, _ = layer(4, 4, torch.float32, seed=0)
    loss = gru(torch.ones(3, 2, 4), torch.zeros(2, 4))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_an_evaluation_in_between_does_not_change_training(matmul_dtype: torch.dtype) -> None:
    """Buffers allocated without gradients can be used with gradients later."""
    gru, _ = layer(8, 8, matmul_dtype, seed=0)
    twin = copy.deepcopy(gru)
    x_TBE, h_BH = torch.ones(9, 2, 8), torch.zeros(2, 8)
    with torch.inference_mode():
        twin(x_TBE, h_BH)
    for each in (gru, twin):
        each(x_TBE, h_BH)[0].sum().backward()
    for one, other in zip(gru.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
