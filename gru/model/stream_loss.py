"""What a language model is to the code around it, and its loss over a stream of batches.

T time, B lanes, L layers, H state, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn


class LanguageModel(Protocol):
    """A torch module that carries a state through the text: `GRULanguageModel` or `Transformer`."""

    vocab_size: int
    embedding: nn.Embedding
    output_bias: nn.Parameter

    def initial_state(self, lanes: int) -> Tensor:
        """Return the state [L, B, H] before any text."""

    def dropout_masks(self, lanes: int, generator: torch.Generator) -> Tensor | None:
        """Return the dropout masks [L + 1, B, E] of one window; None without dropout."""

    def loss(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state_LBH: Tensor,
        masks: Tensor | None = None,
        weights_TB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed, weighted cross-entropy in nats, and the next state."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


@torch.inference_mode()
def stream_loss(model: LanguageModel, batches: Iterable[tuple[np.ndarray, ...]], lanes: int) -> float:
    """Summed loss in nats over batches of (inputs, targets, weights) [T, lanes], the state carried between them."""
    device = model.output_bias.device
    state_LBH = model.initial_state(lanes)
    total = 0.0
    for batch in batches:
        inputs_TB, targets_TB, weights_TB = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in batch)
        loss, state_LBH = model.loss(inputs_TB, targets_TB, state_LBH, weights_TB=weights_TB)
        total += float(loss)
    return total
