import math

import numpy as np
import pytest
import torch

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import train_tokenizer
from gru.evaluation.context import context_losses
from gru.evaluation.scores import read_heldout, token_losses
from tests.gru.evaluation.models import TEXTS, small


def test_context_losses_equal_those_of_models_that_are_reset() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    model = small(tokenizer)
    heldout = read_heldout(tokenizer, TEXTS * 4, 10**6)
    carried = token_losses(model, heldout, 1)
    by_context = context_losses(model, heldout, carried)
    assert [(c.first, c.last) for c in by_context] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 64),
        (65, 128),
    ]
    tokens = torch.from_numpy(heldout.tokens.astype(np.int64))
    last_start = len(tokens) - 128
    for context in by_context[:3]:
        excess = []
        for start in range(0, last_start, -(-last_start // context.starts)):
            window = tokens[start : start + context.last + 1, None]
            logits, _ = model(window[:-1], model.initial_state(1))
            losses = torch.nn.functional.cross_entropy(logits[:, 0], window[1:, 0], reduction="none").detach().numpy()
            excess += list((losses - carried[start + 1 : start + context.last + 1])[context.first - 1 :])
        assert len(excess) == context.starts * (context.last - context.first + 1)
        assert context.excess == pytest.approx(np.mean(excess), abs=1e-6)
        assert context.nats == pytest.approx(carried.mean() + np.mean(excess))
    # The state of an untrained model forgets within a few tokens.
    assert abs(by_context[0].excess) > 1e-4
    assert abs(by_context[-2].excess) < 1e-6


@pytest.mark.parametrize("tokens", range(1, 10))
def test_a_short_text_has_short_contexts(tokens: int) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
    model = small(tokenizer)
    heldout = read_heldout(tokenizer, ["x" * (tokens - 1)], 10**6)
    by_context = context_losses(model, heldout, token_losses(model, heldout, 1))
    assert sum(c.last - c.first + 1 for c in by_context) == (0, 1, 2, 2, 4, 4, 4, 4, 8)[tokens - 1]
    assert all(math.isfinite(c.nats) for c in by_context)
