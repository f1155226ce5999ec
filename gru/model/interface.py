"""The interface of a language model: what training, evaluation and comparison use of one.

T time steps, B lanes, L layers, E embedding width, H state width.
"""

from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class LanguageModel(Protocol):
    """A torch module that carries a state through the text: `GRULanguageModel` or `Transformer`.

    A Transformer's state [0, B, 0] and dropout masks [0, B] are empty: it knows of the past only the current window.
    """

    vocab_size: int
    embedding: nn.Embedding
    output_bias: nn.Parameter

    def initial_state(self, lanes: int) -> Tensor:
        """Return the state [L, B, H] before any text, on the model's device."""

    def dropout_masks(self, lanes: range, all_lanes: int, key: Tensor) -> Tensor | None:
        """Return the dropout masks [L + 1, B, E] of one window for some of all lanes; None without dropout.

        key: an int64 on the model's device, from which the masks are drawn."""

    def loss(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state_LBH: Tensor,
        masks: Tensor | None = None,
        weights_TB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats, weighted by `weights` if given, and the next state.

        masks: from `dropout_masks`, for training only.
        """

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def to(self, device: torch.device) -> Self: ...
