"""Use of context: how the loss falls with the number of tokens read since the state was reset.

N tokens of the text; T time, B starting points side by side, L layers, H hidden.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gru.evaluation.scores import HeldoutText, Losses, window_losses
from gru.model.language_model import GRULanguageModel

LONGEST_CONTEXT = 2048  # tokens after a reset up to which the loss is measured
MAX_STARTS = 2048
TOKENS_PER_DISTANCE = 8192  # most losses that are averaged at each distance


@dataclass(frozen=True)
class ContextLoss:
    """Loss of tokens before which, since a reset, `first` to `last` tokens were read."""

    first: int
    last: int
    starts: int
    """Points of the text at which the model was reset."""
    nats: float
    """Mean for each token of the text."""
    excess: float
    """What of it goes back to the reset."""
    error: float | None
    """Standard error of both; None where there is one start."""


@torch.inference_mode()
def context_losses(model: GRULanguageModel, heldout: HeldoutText, carried: Losses) -> list[ContextLoss]:
    """How the loss falls with what was read since the model was reset to the zero state, at points all over the text.

    The distances double: 1, 2, 3-4, 5-8 ... LONGEST_CONTEXT, or less where the text is shorter; the longer, the fewer
    starts. carried: from `token_losses`. Each loss is compared with that of the same token there: how difficult the
    tokens are, which differs more from start to start than contexts do, cancels out.
    """
    longest = min(LONGEST_CONTEXT, 1 << (len(heldout.tokens) - 1).bit_length() >> 1)
    room = len(heldout.tokens) - longest
    places_B = np.linspace(0, room, min(MAX_STARTS, room), endpoint=False).astype(np.int64)
    state_LBH = model.initial_state(len(places_B))
    reaches: list[ContextLoss] = []
    while (before := reaches[-1].last if reaches else 0) < longest:
        last = max(1, 2 * before)
        stride = -(-len(places_B) * (last - before) // min(TOKENS_PER_DISTANCE, room))  # starts do not overlap
        places_B, state_LBH = places_B[::stride], state_LBH[:, ::stride].contiguous()
        places_TB = places_B + np.arange(before, last)[:, None]
        inputs_TB, targets_TB = (heldout.tokens[places].astype(np.int64) for places in (places_TB, places_TB + 1))
        losses_TB, state_LBH = window_losses(model, inputs_TB, targets_TB, state_LBH)
        excess_B = (losses_TB - carried[places_TB + 1]).mean(axis=0, dtype=np.float64)
        excess, starts = float(excess_B.mean()), len(excess_B)
        error = float(excess_B.std(ddof=1)) / math.sqrt(starts) if starts > 1 else None
        reaches.append(ContextLoss(before + 1, last, starts, float(carried.mean()) + excess, excess, error))
    return reaches
