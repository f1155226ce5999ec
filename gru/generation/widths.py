"""The batch widths at which a row is computed with the same bits.

T time, L layers, S rows, V vocabulary, H state.
"""

import logging

import torch

from gru.model.inference import NativeModel
from gru.model.language_model import GRULanguageModel

log = logging.getLogger(__name__)


def reproducible_widths(model: NativeModel | GRULanguageModel, full_width: int) -> list[int]:
    """Return the powers of two at which every row, wherever it is, has the same bits as at `full_width`.

    Libraries choose kernels by shape, so the widths differ between machines and are measured. `full_width` is
    always among them. The trials also warm the model up.
    """
    generator = torch.Generator().manual_seed(0)
    state_LSH = model.initial_state(full_width)
    state_LSH += torch.rand(state_LSH.shape, generator=generator).to(state_LSH) * 2 - 1
    tokens_TS = torch.randint(model.vocab_size, (1, full_width), generator=generator).to(state_LSH.device)
    logits_TSV, after_LSH = model(tokens_TS, state_LSH)

    def is_reproducible(width: int) -> bool:
        order = torch.randperm(full_width, generator=generator).to(state_LSH.device)
        logits, after = model(tokens_TS[:, order][:, :width], state_LSH[:, order][:, :width])
        rows = order[:width]
        return torch.equal(logits, logits_TSV[:, rows]) and torch.equal(after, after_LSH[:, rows])

    powers = [1 << n for n in range(full_width.bit_length())]
    widths = [width for width in powers if all(is_reproducible(width) for _ in range(3))]
    if full_width not in widths:
        log.warning(
            "on this machine the bits of a row depend on its place in a batch of %d: seeds may not reproduce",
            full_width,
        )
        widths.append(full_width)
    return widths
