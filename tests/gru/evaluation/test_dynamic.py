"""Dynamic evaluation against a plain implementation, and on a text with a phrase that the model does not know."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gru.config import TokenizerConfig
from gru.corpus.tokenizer import train_tokenizer
from gru.evaluation.dynamic import DynamicSettings, dynamic_loss, gradient_rms
from gru.evaluation.scores import read_heldout, score
from gru.model.language_model import GRULanguageModel
from tests.gru.evaluation.models import TEXTS, small

TOKENIZER = train_tokenizer(TokenizerConfig(kind="byte"), TEXTS)
END = TOKENIZER.end_of_text
TEXT = read_heldout(TOKENIZER, TEXTS, 10**6)
SEGMENT = 7


def test_without_steps_the_loss_is_that_of_static_evaluation() -> None:
    model = small(TOKENIZER)
    rms_P = gradient_rms(model, TEXT.tokens, SEGMENT, END)
    settings = DynamicSettings(learning_rate=0.0, decay=0.5, segment=SEGMENT)
    assert dynamic_loss(model, TEXT.tokens, END, rms_P, settings) == pytest.approx(score(model, TEXT, 1).nats, rel=1e-5)


Gradients = dict[str, torch.Tensor]


def plain_segments(model: GRULanguageModel, step: Callable[[Gradients], None]) -> Iterator[tuple[float, Gradients]]:
    """Yield the summed loss and the gradients of each segment; `step` may change the weights after it."""
    state = model.initial_state(1)
    stream = torch.tensor([END, *TEXT.tokens.astype(np.int64).tolist()])
    for start in range(0, len(TEXT.tokens), SEGMENT):
        window = stream[start : start + SEGMENT + 1, None]
        logits, state = model(window[:-1], state.detach())
        loss = F.cross_entropy(logits[:, 0], window[1:, 0])
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        step(gradients)
        yield loss.item() * (len(window) - 1), gradients


def test_the_steps_are_those_of_the_paper() -> None:
    model, settings = small(TOKENIZER), DynamicSettings(learning_rate=0.02, decay=0.3, segment=SEGMENT)
    rms_P = gradient_rms(model, TEXT.tokens, SEGMENT, END)
    result = dynamic_loss(model, TEXT.tokens, END, rms_P, settings)

    statics = list(plain_segments(model, lambda gradients: None))
    rms = {
        name: torch.stack([gradients[name] for _, gradients in statics]).square().mean(0).sqrt()
        for name, _ in model.named_parameters()
    }
    mean = torch.cat([each.flatten() for each in rms.values()]).mean()
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def step(gradients: Gradients) -> None:
        for name, weight in model.named_parameters():
            back = (settings.decay * rms[name] / mean).clamp(max=1) * (trained[name] - weight)
            weight += back - settings.learning_rate * gradients[name] / (rms[name] + settings.epsilon * mean)

    expected = sum(loss for loss, _ in plain_segments(model, step))
    static = sum(loss for loss, _ in statics)
    assert result == pytest.approx(expected, rel=1e-4)
    assert abs(result - static) > 1e-2 * static  # so that the comparison can fail


def test_a_model_learns_a_phrase_while_it_is_scored_on_it_and_stays_as_it_was() -> None:
    tokens = TOKENIZER.encode("The tortoise won. " * 40)
    model = small(TOKENIZER)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rms_P = gradient_rms(model, tokens, 20, END)

    def loss(learning_rate: float, decay: float) -> float:
        return dynamic_loss(model, tokens, END, rms_P, DynamicSettings(learning_rate, decay)) / len(tokens)

    static, dynamic, decayed = loss(0.0, 0.0), loss(0.02, 0.0), loss(0.02, 1e9)
    assert static == pytest.approx(math.log(TOKENIZER.vocab_size), rel=0.05)
    assert dynamic < static - 1
    assert dynamic < decayed  # each step starts from the trained weights, but for those without a gradient
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
