"""Root mean square normalisation: y = w * x / sqrt(mean(x^2) + eps) (arXiv:1910.07467). H width, last."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, which on CPUs is a dozen passes over memory, with fewer of them where it is differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return Normalisation.apply(x, self.weight, eps)


class Normalisation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = x * scale
        ctx.save_for_backward(normal, weight_H, scale)
        return normal * weight_H

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (w dy - n mean(n w dy)) / sqrt(mean(x^2) + eps), with n = x / sqrt(mean(x^2) + eps)."""
        normal, weight_H, scale = ctx.saved_tensors
        products = d_y * normal
        d_weight_H = products.flatten(0, -2).sum(0)
        mean = (products @ weight_H).div_(len(weight_H)).unsqueeze(-1)
        d_x = torch.mul(d_y, weight_H, out=products).addcmul_(normal, mean, value=-1).mul_(scale)
        return d_x, d_weight_H, None
