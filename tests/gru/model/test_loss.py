"""Tests of the loss against torch's own in float64, values and gradients, and of its memory use."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gru.model import loss
from gru.model.loss import cross_entropy

# Relative to the largest value of each tensor: factors of matrix products are rounded to 8 bits, logits too.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def draw(N: int, E: int, V: int) -> tuple[list[Tensor], Tensor]:
    """Return x_NE, weight_VE, bias_V in float64, and targets_N."""
    torch.manual_seed(N)
    return [torch.randn(N, E).double(), torch.randn(V, E).double() / 4, torch.randn(V).double()], torch.randint(V, (N,))


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("N", "E", "V"), [(1, 3, 2), (5, 8, 13), (100, 32, 65), (33, 16, 700)])
def test_values_and_gradients_are_those_of_softmax_cross_entropy(
    N: int, E: int, V: int, weighted: bool, matmul_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2000)  # several chunks, the last one shorter
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 800)  # and several blocks in each
    inputs, targets_N = draw(N, E, V)
    weights_N = torch.rand(N).double() if weighted else None
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    losses_N = F.cross_entropy(F.linear(*exact), targets_N, reduction="none")
    expected = losses_N.sum() if weights_N is None else losses_N.dot(weights_N)
    (expected * 0.3).backward()
    single = [tensor.float().requires_grad_() for tensor in inputs]
    actual = cross_entropy(*single, targets_N, None if weights_N is None else weights_N.float(), matmul_dtype)
    (actual * 0.3).backward()
    assert actual.item() == pytest.approx(expected.item(), rel=TOLERANCES[matmul_dtype])
    for one, other in zip(single, exact, strict=True):
        error = (one.grad - other.grad).abs().max() / other.grad.abs().max()
        assert error < TOLERANCES[matmul_dtype]
    with torch.no_grad():
        assert cross_entropy(
            *single, targets_N, None if weights_N is None else weights_N.float(), matmul_dtype
        ).item() == pytest.approx(actual.item(), rel=1e-6)


@pytest.mark.parametrize("matmul_dtype", TOLERANCES)
def test_the_same_inputs_give_the_same_bits(matmul_dtype: torch.dtype) -> None:
    inputs, targets_N = draw(200, 24, 321)
    results = []
    for _ in range(2):
        single = [tensor.float().requires_grad_() for tensor in inputs]
        loss = cross_entropy(*single, targets_N, None, matmul_dtype)
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in single)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_target_of_probability_0_has_a_finite_loss() -> None:
    """A target with probability 0 in fp32 does not have an infinite loss."""
    bias_V = torch.tensor([0.0, 1000.0], requires_grad=True)
    loss = cross_entropy(torch.ones(1, 1), torch.zeros(2, 1), bias_V, torch.tensor([0]), None, torch.float32)
    loss.backward()
    assert loss.item() == 1000
    assert bias_V.grad.tolist() == [-1, 1]


PEAK = """
import re, sys, torch
from pathlib import Path
from gru.model.loss import cross_entropy

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

matmul_dtype = getattr(torch, sys.argv[1])
x, weight, bias = (torch.ones(size, requires_grad=True) for size in [(2048, 16), (32768, 16), (32768,)])
before = peak()
cross_entropy(x, weight, bias, torch.zeros(2048, dtype=torch.long), None, matmul_dtype).backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
def test_a_large_vocabulary_needs_bounded_memory(matmul_dtype: str) -> None:
    """All logits of this window would be 256 MiB, and their gradient as much again."""
    done = subprocess.run([sys.executable, "-c", PEAK, matmul_dtype], capture_output=True, text=True, check=True)
    assert 30 < int(done.stdout) < 150
