import pytest
import torch

from gru.model.normalisation import RMSNorm


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (5, 4, 64)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1]).double()
    torch.nn.init.normal_(norm.weight)
    x, d_y = torch.randn(shape).double().requires_grad_(), torch.randn(shape).double()
    expected = torch.nn.functional.rms_norm(x, shape[-1:], norm.weight)
    found = norm(x)
    torch.testing.assert_close(found, expected)
    inputs = (x, norm.weight)
    for one, other in zip(
        torch.autograd.grad(found, inputs, d_y), torch.autograd.grad(expected, inputs, d_y), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_its_gradients_pass_gradcheck() -> None:
    norm = RMSNorm(6).double()
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, 6).double().requires_grad_())
