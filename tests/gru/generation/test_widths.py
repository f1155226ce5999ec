"""The batch widths at which a row has the same bits."""

import pytest
import torch

from gru.generation.widths import reproducible_widths
from gru.model.language_model import GRULanguageModel
from tests.gru.generation.helpers import SlowModel, make_model


@pytest.mark.parametrize("shape", [(384, 384, 1), (100, 60, 2), (33, 37, 3)])
def test_states_and_logits_are_the_same_bits_at_every_width(shape: tuple[int, int, int]) -> None:
    """Which widths are reproducible depends on the processor: on some the small widths of odd shapes are not."""
    model = make_model(*shape)
    with torch.inference_mode():
        widths = reproducible_widths(model, 64)
        assert widths[-1] == 64 and set(widths) <= {1, 2, 4, 8, 16, 32, 64}
        tokens = torch.arange(64)[None]
        expected = model(tokens, model.initial_state(64))
        for width in widths:
            logits, state = model(tokens[:, :width], model.initial_state(width))
            assert torch.equal(logits, expected[0][:, :width]) and torch.equal(state, expected[1][:, :width])


def test_widths_that_round_differently_are_not_used(model: GRULanguageModel) -> None:
    class Uneven(SlowModel):
        def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, state = super().forward(tokens, state)
            return logits * (1 + 1e-6 * (tokens.shape[1] == 8)), state

    with torch.inference_mode():
        widths = reproducible_widths(Uneven(model), 32)
    assert [width for width in widths if width >= 4] == [4, 16, 32]  # smaller widths differ between libraries
