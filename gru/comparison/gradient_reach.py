"""How far back in the text a model's gradients reach.

T time, B lanes, E embedding, N tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gru.model.interface import LanguageModel


def gradient_reach(
    model: LanguageModel, tokens: np.ndarray, distance: int, lanes: int, end_of_text: int
) -> list[float]:
    """Return the norm of d loss_T / d x_{T-k} for k = 0, 1, ... below `distance`, divided by the norm for k = 0.

    It says how much the loss of one token depends on the embedded input k tokens before. Norms are averaged over
    `lanes` places in the tokens; the model starts from the zero state at each.
    """
    distance = min(distance, len(tokens))
    inputs_N = np.concatenate([[end_of_text], tokens[:-1].astype(np.int64)])
    starts_B = np.linspace(0, len(tokens) - distance, lanes).astype(np.int64)
    positions_TB = starts_B + np.arange(distance)[:, None]
    device = model.output_bias.device
    inputs_TB, targets_TB = (
        torch.from_numpy(array[positions_TB]).to(device) for array in (inputs_N, tokens.astype(np.int64))
    )
    weights_TB = torch.zeros(distance, lanes, device=device)
    weights_TB[-1] = 1
    embedded: list[Tensor] = []

    def record(module: Any, inputs: Any, x_TBE: Tensor) -> Tensor:
        embedded.append(x_TBE.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(record)
    try:
        total, _ = model.loss(inputs_TB, targets_TB, model.initial_state(lanes), weights_TB=weights_TB)
        [d_x_TBE] = torch.autograd.grad(total, embedded)
    finally:
        hook.remove()
    norms_T = d_x_TBE.double().norm(dim=2).mean(1).flip(0)
    return (norms_T / norms_T[0]).tolist()
