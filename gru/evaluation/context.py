"""Loss by context length: how it falls with the number of tokens read since the state was reset.

N tokens of the text; T time, B resets side by side, L layers, H hidden.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gru.evaluation.scores import HeldoutText, Losses, window_losses
from gru.model.language_model import GRULanguageModel

LONGEST_CONTEXT = 2048  # tokens
MAX_RESETS = 2048
LOSSES_PER_CONTEXT = 8192  # most losses that are averaged at each context length


@dataclass(frozen=True)
class ContextLoss:
    """The mean loss of tokens that follow a context of `first` to `last` tokens, counted from a reset of the state."""

    first: int
    last: int
    starts: int
    """Number of resets."""
    nats: float
    """Loss in nats per token of the whole text."""
    excess: float
    """The part of `nats` that is due to the reset."""
    error: float | None
    """Standard error of `nats` and `excess`; None with a single reset."""


@torch.inference_mode()
def context_losses(model: GRULanguageModel, heldout: HeldoutText, carried: Losses) -> list[ContextLoss]:
    """Measure the loss at increasing distances from resets of the state to zero, which are spread over the text.

    The ranges of context lengths double: 1, 2, 3-4, 5-8 ... up to LONGEST_CONTEXT, or less where the text is shorter.
    Longer contexts are measured at fewer resets. carried: the loss of each token [N] without resets, from
    `token_losses`. Each loss is compared with the carried loss of the same token. This cancels the difficulty of the
    tokens, which varies more from reset to reset than the loss varies with the context length.
    """
    longest = min(LONGEST_CONTEXT, 1 << (len(heldout.tokens) - 1).bit_length() >> 1)
    last_start = len(heldout.tokens) - longest
    positions_B = np.linspace(0, last_start, min(MAX_RESETS, last_start), endpoint=False).astype(np.int64)
    state_LBH = model.initial_state(len(positions_B))
    losses: list[ContextLoss] = []
    while (previous := losses[-1].last if losses else 0) < longest:
        last = max(1, 2 * previous)
        # The ranges after neighbouring resets do not overlap.
        stride = -(-len(positions_B) * (last - previous) // min(LOSSES_PER_CONTEXT, last_start))
        positions_B, state_LBH = positions_B[::stride], state_LBH[:, ::stride].contiguous()
        positions_TB = positions_B + np.arange(previous, last)[:, None]
        inputs_TB, targets_TB = (heldout.tokens[at].astype(np.int64) for at in (positions_TB, positions_TB + 1))
        losses_TB, state_LBH = window_losses(model, inputs_TB, targets_TB, state_LBH)
        excess_B = (losses_TB.cpu().numpy() - carried[positions_TB + 1]).mean(axis=0, dtype=np.float64)
        excess, starts = float(excess_B.mean()), len(excess_B)
        error = float(excess_B.std(ddof=1)) / math.sqrt(starts) if starts > 1 else None
        losses.append(ContextLoss(previous + 1, last, starts, float(carried.mean()) + excess, excess, error))
    return losses
