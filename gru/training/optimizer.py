"""AdamW on flat buffers, whose learning rate and whose decision to do nothing are tensors on the device.

P all parameters, flattened.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gru.config import TrainConfig
from gru.training.flat_parameters import ParameterLayout


class Optimizer:
    """torch.optim.AdamW with weight decay on matrices only, not on biases and norms.

    learning_rate: an fp32 tensor of no dimension, read at each step. skip: another one; with 1, a step changes nothing.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        weights_P: Tensor,
        gradient_P: Tensor,
        config: TrainConfig,
        learning_rate: Tensor,
        skip: Tensor,
    ) -> None:
        self._layout = layout
        self._moments_P = {"exp_avg": torch.zeros_like(weights_P), "exp_avg_sq": torch.zeros_like(weights_P)}
        parts = [torch.nn.Parameter(part) for part in layout.parts(weights_P)]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [part], "weight_decay": decay}
                for part, decay in zip(parts, (config.weight_decay, 0.0), strict=True)
            ],
            lr=learning_rate,
            betas=(0.9, config.beta2),
            fused=True,
            capturable=weights_P.device.type == "cuda",
        )
        self._adamw.found_inf = skip  # type: ignore[attr-defined]  # torch's loss scaling sets it too
        self._step = weights_P.new_zeros(2)
        for index, part in enumerate(parts):
            part.grad = layout.parts(gradient_P)[index]
            moments = {field: layout.parts(moment_P)[index] for field, moment_P in self._moments_P.items()}
            self._adamw.state[part] = {"step": self._step[index], **moments}

    def step(self) -> None:
        """Update the weights from the gradient."""
        self._adamw.step()

    def tensors(self, copied: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return a copy of the state by field of AdamW and name of the parameter, made by `copied`."""
        step = copied(self._step[0])
        tensors = {f"step/{name}": step.clone() for name in self._layout.names}
        for field, moment_P in self._moments_P.items():
            views = self._layout.views(copied(moment_P))
            tensors |= {f"{field}/{name}": view for name, view in views.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set the state to that of `tensors`; it is empty in checkpoints that were made before the first step."""
        for name in self._layout.names if tensors else ():
            self._step.copy_(tensors[f"step/{name}"])
        for field, moment_P in self._moments_P.items() if tensors else ():
            for name, view in self._layout.views(moment_P).items():
                view.copy_(tensors[f"{field}/{name}"])
