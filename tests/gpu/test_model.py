"""Tests of the model's parts on a GPU against float64 on the CPU, values and gradients, and of their repeatability."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gru.model import gru_cuda, loss_cuda
from gru.model.dropout import dropout_mask
from gru.model.gru_layer import GRU
from gru.model.loss import cross_entropy
from tests.gru.model.test_gru_layer import SHAPES, draw, layer, outcome, published
from tests.gru.model.test_gru_layer import TOLERANCES as CPU_TOLERANCES
from tests.gru.model.test_loss import TOLERANCES as LOSS_TOLERANCES
from tests.gru.model.test_loss import draw as draw_loss

# cuDNN's sums in fp32 are a little less exact than torch's on a CPU.
TOLERANCES = {**CPU_TOLERANCES, torch.float32: 3e-5}
# (T, B, E, H) for gru_cuda.cu: one step and one lane, lanes that need padding, several tiles, several launches.
KERNEL_SHAPES = [(1, 1, 5, 256), (7, 3, 64, 256), (5, 16, 32, 512), (33, 40, 128, 512), (9, 64, 96, 768)]
KERNEL_SHAPES += [(12, 64, 1024, 1024), (6, 80, 64, 1024), (5, 256, 64, 1024), (3, 600, 64, 1024), (4, 72, 64, 2048)]
KERNEL_SHAPES += [(7, 192, 64, 1024), (6, 64, 48, 1536), (5, 60, 32, 1280), (4, 512, 32, 512), (3, 320, 16, 256)]


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_computes_the_published_equations(
    shape: tuple[int, int, int, int], matmul_dtype: torch.dtype, device: torch.device
) -> None:
    check_layer(shape, matmul_dtype, device, wide=False)


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_the_kernel_computes_the_published_equations(shape: tuple[int, int, int, int], device: torch.device) -> None:
    assert gru_cuda.steps_for(shape[3], shape[1], device), "no kernel for this shape"
    check_layer(shape, torch.bfloat16, device, wide=True)


def check_layer(shape: tuple[int, int, int, int], matmul_dtype: torch.dtype, device: torch.device, wide: bool) -> None:
    if wide:  # weights that are drawn for their width: sums stay of order 1
        torch.manual_seed(shape[0])
        gru = GRU(shape[2], shape[3], matmul_dtype)
        with torch.no_grad():
            for bias in gru.gru.all_weights[0][2:]:
                bias += torch.randn_like(bias) * 0.1
        weights = [p.detach().double().to(device).requires_grad_() for p in gru.gru.all_weights[0]]
    else:
        gru, weights = layer(shape[2], shape[3], matmul_dtype, seed=shape[0])
        weights = [weight.detach().to(device).requires_grad_() for weight in weights]
    x_TBE, h_BH = (tensor.to(device) for tensor in draw(shape, seed=shape[1]))
    expected = outcome(lambda x, h: published(x, h, weights), x_TBE, h_BH, weights)
    gru.to(device)
    runs = []
    for _ in range(2):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            runs.append(outcome(lambda x, h: gru(x, h)[0].float(), x_TBE.float(), h_BH.float(), gru.gru.all_weights[0]))
    for name, tensor in expected.items():
        error = (runs[0][name] - tensor).abs().max() / tensor.abs().max()
        assert error < TOLERANCES[matmul_dtype], f"{name}: off by {error:.1e}"
        if wide:
            assert torch.equal(runs[0][name], runs[1][name]), f"{name}: not repeatable"


def test_the_last_state_is_exact_and_has_a_gradient(device: torch.device) -> None:
    gru = GRU(64, 512, torch.bfloat16).to(device)
    x_TBE, h_BH = (tensor.float().to(device) for tensor in draw((9, 24, 64, 512), seed=0))
    out_TBH, last_BH = gru(x_TBE, h_BH.requires_grad_())
    assert out_TBH.dtype is torch.bfloat16 and last_BH.dtype is torch.float32
    assert torch.equal(last_BH.bfloat16(), out_TBH[-1])
    [from_last] = torch.autograd.grad(last_BH.sum(), [h_BH], retain_graph=True)
    [from_out] = torch.autograd.grad(out_TBH[-1].float().sum(), [h_BH])
    assert torch.equal(from_last, from_out)


def test_windows_with_carried_state_equal_one_sequence(device: torch.device) -> None:
    gru = GRU(64, 512, torch.bfloat16).to(device)
    x_TBE, h_BH = (tensor.float().to(device) for tensor in draw((40, 4, 64, 512), seed=0))
    whole_TBH, end_BH = gru(x_TBE, h_BH)
    parts = []
    for window in x_TBE.split([1, 8, 31]):
        out_TBH, h_BH = gru(window, h_BH)
        parts.append(out_TBH)
    assert torch.equal(torch.cat(parts), whole_TBH) and torch.equal(h_BH, end_BH)


@pytest.mark.parametrize("matmul_dtype", LOSS_TOLERANCES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("N", "E", "V"), [(1, 3, 2), (5, 8, 13), (100, 32, 65), (33, 16, 700), (300, 64, 16384), (64, 32, 50001)]
)
def test_the_loss_is_that_of_softmax_cross_entropy(
    N: int,
    E: int,
    V: int,
    weighted: bool,
    matmul_dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_cuda, "CHUNK_LOGITS", 40 * V)  # several chunks, the last one shorter
    inputs, targets_N = draw_loss(N, E, V)
    inputs, targets_N = [tensor.to(device) for tensor in inputs], targets_N.to(device)
    weights_N = torch.rand(N, device=device).double() if weighted else None
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    losses_N = F.cross_entropy(F.linear(*exact), targets_N, reduction="none")
    expected = losses_N.sum() if weights_N is None else losses_N.dot(weights_N)
    (expected * 0.3).backward()
    runs: list[list[Tensor]] = []
    for _ in range(2):
        single = [tensor.float().requires_grad_() for tensor in inputs]
        assert loss_cuda.kernel_for(single[0], matmul_dtype), "no kernel for the loss"
        actual = cross_entropy(*single, targets_N, None if weights_N is None else weights_N.float(), matmul_dtype)
        (actual * 0.3).backward()
        runs.append([actual.detach(), *(tensor.grad for tensor in single)])
    tolerance = LOSS_TOLERANCES[matmul_dtype]
    assert runs[0][0].item() == pytest.approx(expected.item(), rel=tolerance)
    for one, again, other in zip(runs[0][1:], runs[1][1:], exact, strict=True):
        assert (one - other.grad).abs().max() / other.grad.abs().max() < tolerance
        assert torch.equal(one, again), "not repeatable"
    with torch.no_grad():
        without = cross_entropy(*single, targets_N, None if weights_N is None else weights_N.float(), matmul_dtype)
    assert torch.equal(without, runs[1][0])


def test_a_logit_that_is_not_finite_shows_in_the_loss_and_the_gradient(device: torch.device) -> None:
    x_NE = torch.ones(4, 8, device=device)
    x_NE[2, 3] = float("nan")
    weight_VE = torch.ones(10, 8, device=device, requires_grad=True)
    targets_N, bias_V = torch.zeros(4, dtype=torch.long, device=device), torch.zeros(10, device=device)
    loss = cross_entropy(x_NE, weight_VE, bias_V, targets_N, None, torch.bfloat16)
    [gradient] = torch.autograd.grad(loss, [weight_VE])
    assert loss.isnan() and gradient.isnan().any()


def test_dropout_masks_are_those_of_the_cpu(device: torch.device) -> None:
    for value in (0, 7, -(2**63), 2**63 - 1):
        key = torch.tensor(value)
        mask = dropout_mask(0.3, 3, range(5, 21), 32, 96, key)
        assert torch.equal(dropout_mask(0.3, 3, range(5, 21), 32, 96, key.to(device)).cpu(), mask)
