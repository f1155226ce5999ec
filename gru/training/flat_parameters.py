"""All parameters of a model in one flat buffer, so that the optimizer, the norm and the sum over workers are one
operation each. P all parameters, flattened.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from gru.model.interface import LanguageModel

ALIGNMENT = 64
"""Parameters begin at multiples of this many elements, as separate tensors would."""


class ParameterLayout:
    """Where each parameter lies in a flat buffer: matrices first, on which AdamW decays the weights, then vectors."""

    def __init__(self, model: LanguageModel) -> None:
        parameters = sorted(model.named_parameters(), key=lambda pair: pair[1].dim() == 1)
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self.size = 0
        self.matrices = 0
        """Elements before the first vector."""
        for name, parameter in parameters:
            self._places[name] = self.size, parameter.shape
            self.size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() > 1:
                self.matrices = self.size

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in their order in the buffer."""
        return list(self._places)

    def parameters(self, model: LanguageModel) -> list[Tensor]:
        """Return the parameters of a model, in their order in the buffer."""
        by_name = dict(model.named_parameters())
        return [by_name[name] for name in self._places]

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Return the part of each parameter in a flat buffer, by name and in the parameter's shape."""
        return {
            name: flat_P[start : start + shape.numel()].view(shape) for name, (start, shape) in self._places.items()
        }

    def parts(self, flat_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of all matrices and that of all vectors."""
        return flat_P[: self.matrices], flat_P[self.matrices :]

    def flatten(self, model: LanguageModel) -> Tensor:
        """Move the parameters of a model to a new flat buffer [P], and return it."""
        flat_P = torch.zeros(self.size, device=model.output_bias.device)
        views = self.views(flat_P)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                views[name].copy_(parameter)
                parameter.data = views[name]
        return flat_P

    def pack(self, tensors: Iterable[Tensor], flat_P: Tensor) -> Tensor:
        """Write one tensor for each parameter, in the order of `views`, to a flat buffer, and return it."""
        torch._foreach_copy_(list(self.views(flat_P).values()), list(tensors))
        return flat_P
