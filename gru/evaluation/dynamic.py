"""Dynamic evaluation: scores of a model that learns from the text while it is scored on it.

Krause et al. 2018 (arXiv:1709.07432), with epsilon as a ratio. The text is read in segments. A segment's loss is that
of the weights before it; then a step on this loss, and back towards the trained weights, adapts them to what follows:

    w += decay * rms / mean(rms) * (trained - w) - learning_rate * gradient / (rms + epsilon * mean(rms))

rms: for each weight the root mean square of its gradients over segments of training text. No segment is predicted with
its own text, but these scores are not those of the model that is served: always give the static ones beside them.
N tokens, P all parameters, flattened.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gru.corpus.batches import stream_batches
from gru.evaluation.scores import Tokens
from gru.model.interface import LanguageModel
from gru.training.flat_parameters import ParameterLayout


@dataclass(frozen=True)
class DynamicSettings:
    """The settings of dynamic evaluation, to be chosen on validation text."""

    learning_rate: float
    """Change of a weight in each step, where its gradient is as large as its rms."""
    decay: float
    """Share of the way back to the trained weights in each step, for a weight of average rms; at most all of it."""
    segment: int = 20
    """Tokens in a segment."""
    epsilon: float = 0.1
    """Added to each rms, as a ratio to the mean rms."""


def gradient_rms(model: LanguageModel, tokens: Tokens, segment: int, end_of_text: int) -> Tensor:
    """Return the root mean square [P] of each weight's gradient over the segments of a training text [N].

    A segment's gradient is that of its mean loss, in nats per token.
    """
    model, layout, _ = _trainable(model)
    squares_P = torch.zeros(layout.size, device=model.output_bias.device)
    segments = 0
    for _, gradient_P in _gradients(model, layout, tokens, segment, end_of_text):
        squares_P.addcmul_(gradient_P, gradient_P)
        segments += 1
    return (squares_P / segments).sqrt_()


def dynamic_loss(
    model: LanguageModel, tokens: Tokens, end_of_text: int, rms_P: Tensor, settings: DynamicSettings
) -> float:
    """Return the summed loss of a text [N], in nats, of a copy of the model that adapts to it.

    The text is read from its start to its end in one lane. rms_P: from `gradient_rms`. The result is not finite if the
    learning rate is far too large.
    """
    model, layout, weights_P = _trainable(model)
    trained_P = weights_P.clone()
    mean = rms_P.sum() / sum(parameter.numel() for parameter in model.parameters())
    rates_P = settings.learning_rate / (rms_P + settings.epsilon * mean)
    decays_P = (settings.decay * rms_P / mean).clamp_(max=1)
    total = 0.0
    for loss, gradient_P in _gradients(model, layout, tokens, settings.segment, end_of_text):
        total += loss
        weights_P.lerp_(trained_P, decays_P)
        weights_P.addcmul_(rates_P, gradient_P, value=-1)
    return total


def _trainable(model: LanguageModel) -> tuple[LanguageModel, ParameterLayout, Tensor]:
    """Return a copy of the model that has gradients, and its parameters in one flat buffer [P]."""
    model = copy.deepcopy(model).requires_grad_(True)
    layout = ParameterLayout(model)
    return model, layout, layout.flatten(model)


def _gradients(
    model: LanguageModel, layout: ParameterLayout, tokens: Tokens, segment: int, end_of_text: int
) -> Iterator[tuple[float, Tensor]]:
    """Yield for each segment its summed loss, and the gradient [P] of its mean loss. The state is carried on.

    The weights may be changed between two segments. The gradient is valid until the next one.
    """
    device, parameters = model.output_bias.device, layout.parameters(model)
    gradient_P = torch.zeros(layout.size, device=device)
    state_LBH = model.initial_state(1)
    for inputs_T1, targets_T1, _ in stream_batches(tokens, 1, segment, end_of_text):
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (inputs_T1, targets_T1))
        loss, state_LBH = model.loss(inputs, targets, state_LBH)
        layout.pack(torch.autograd.grad(loss / len(inputs), parameters), gradient_P)
        state_LBH = state_LBH.detach()
        yield loss.item(), gradient_P
