"""A decoder-only Transformer, with which the recurrent models are compared. It is not served.

Vaswani et al. 2017 (arXiv:1706.03762) in its current form: norms before the layers, no biases, rotary positions
(arXiv:2104.09864), a gated feed-forward layer (SwiGLU, arXiv:2002.05202). Initialisation and dropout are nanoGPT's,
except that attention weights are not dropped, which would rule out the fast kernels. It implements `LanguageModel`, so
the same training loop drives it; its state is empty, and it knows of the past only the current window.

Plain PyTorch. T time steps, B lanes, E width, A heads, D width of a head, F width of the feed-forward layer,
V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.model.loss import cross_entropy

INITIAL_STD = 0.02
ROTARY_BASE = 10_000.0
HEAD_WIDTH = 64
WIDTH_PER_LAYER = 48
"""The usual width per layer, between nanoGPT's configurations for a CPU (128 / 4) and for a GPU (384 / 6)."""


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a Transformer."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    dropout: float = 0.0

    def parameters(self, vocab_size: int) -> int:
        """Return the number of its parameters."""
        layer = 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width
        return self.layers * layer + self.width + vocab_size * (self.width + 1)


def nearest(parameters: int, vocab_size: int, dropout: float = 0.0, head_width: int = HEAD_WIDTH) -> TransformerConfig:
    """Return the Transformer with this number of parameters, within 3 %, and the most usual proportions.

    Its feed-forward layer is 2 to 4 times as wide as the model. Usual are `WIDTH_PER_LAYER` and a feed-forward layer
    8/3 as wide as the model.
    """
    best, least_deviation = None, math.inf
    for layers in range(1, 49):
        for width in range(8, 8 * head_width * layers, 8):
            heads = max(1, round(width / head_width))
            if width % (2 * heads):  # rotary positions rotate pairs of features
                continue
            rest = parameters - TransformerConfig(width, layers, heads, 0).parameters(vocab_size)
            feed_forward = round(rest / (3 * width * layers) / 8) * 8
            if not 2 * width <= feed_forward <= 4 * width:
                continue
            config = TransformerConfig(width, layers, heads, feed_forward, dropout)
            if abs(config.parameters(vocab_size) / parameters - 1) > 0.03:
                continue
            deviation = abs(math.log(width / layers / WIDTH_PER_LAYER)) + abs(math.log(feed_forward / width * 3 / 8))
            if deviation < least_deviation:
                best, least_deviation = config, deviation
    assert best is not None, f"no Transformer of {parameters:,} parameters with a vocabulary of {vocab_size:,}"
    return best


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(config.width, bias=False)
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attended = nn.Linear(config.width, config.width, bias=False)
        self.gate_and_values = nn.Linear(config.width, 2 * config.feed_forward, bias=False)
        self.fed = nn.Linear(config.feed_forward, config.width, bias=False)
        for linear in (self.queries_keys_values, self.gate_and_values):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
        for linear in (self.attended, self.fed):  # the residual stream sums two outputs a layer
            nn.init.normal_(linear.weight, std=INITIAL_STD / math.sqrt(2 * config.layers))

    def forward(self, x_BTE: Tensor, rotations: tuple[Tensor, Tensor], dropout: float) -> Tensor:
        B, T, E = x_BTE.shape
        projected = self.queries_keys_values(self.attention_norm(x_BTE)).view(B, T, 3, self.heads, E // self.heads)
        q_BATD, k_BATD, v_BATD = projected.permute(2, 0, 3, 1, 4)
        q_BATD, k_BATD = rotate(q_BATD, rotations), rotate(k_BATD, rotations)
        attended_BATD = F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)
        x_BTE = x_BTE + F.dropout(self.attended(attended_BATD.transpose(1, 2).reshape(B, T, E)), dropout)
        gate_BTF, values_BTF = self.gate_and_values(self.feed_forward_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + F.dropout(self.fed(F.silu(gate_BTF) * values_BTF), dropout)


def angles(time: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, D / 2] of the rotary angles, position / base^(2 i / D)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angles_TD = torch.outer(torch.arange(time, device=like.device, dtype=torch.float32), frequencies)
    return angles_TD.cos().to(like.dtype), angles_TD.sin().to(like.dtype)


def rotate(x_BATD: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Return x with each pair of features (i, i + D / 2) rotated by its angle at its time step."""
    (cosines, sines), (left, right) = rotations, x_BATD.chunk(2, dim=-1)
    rotated = torch.cat([left * cosines - right * sines, left * sines + right * cosines], dim=-1)
    return rotated.to(x_BATD.dtype)


class Transformer(nn.Module):
    """Embedding, layers, norm, and an output layer tied to the embedding, with a bias as in the recurrent models."""

    def __init__(self, config: TransformerConfig, vocab_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.matmul_dtype = matmul_dtype
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)

    def initial_state(self, lanes: int) -> Tensor:
        """Return an empty state [0, B, 0], on the model's device."""
        return self.output_bias.new_zeros(0, lanes, 0)

    def dropout_masks(self, lanes: range, all_lanes: int, key: Tensor) -> Tensor | None:
        """Return an empty tensor [0, B], which turns dropout on; None without dropout.

        The dropped features are drawn while they are computed, from torch's own generator.
        """
        return self.output_bias.new_zeros(0, len(lanes)) if self.config.dropout else None

    def forward(self, tokens_TB: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, V] of the token after each input token, and the empty state."""
        return F.linear(self.features(tokens_TB, 0.0), self.embedding.weight, self.output_bias), state

    def loss(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state: Tensor,
        masks: Tensor | None = None,
        weights_TB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats, weighted by `weights` if given, and the empty state."""
        x_TBE = self.features(tokens_TB, 0.0 if masks is None else self.config.dropout)
        weights_N = None if weights_TB is None else weights_TB.flatten()
        total = cross_entropy(
            x_TBE.flatten(0, 1),
            self.embedding.weight,
            self.output_bias,
            targets_TB.flatten(),
            weights_N,
            self.matmul_dtype,
        )
        return total, state

    def features(self, tokens_TB: Tensor, dropout: float) -> Tensor:
        """Return the input of the output layer [T, B, E]."""
        x_BTE = F.dropout(self.embedding(tokens_TB), dropout).transpose(0, 1)
        rotations = angles(len(tokens_TB), self.config.width // self.config.heads, x_BTE)
        with torch.autocast(x_BTE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_BTE.dtype):
            for layer in self.layers:
                x_BTE = layer(x_BTE, rotations, dropout).to(rotations[0].dtype)
        return self.norm(x_BTE.transpose(0, 1).contiguous())

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of the keys and values that a server stores for this many tokens of one stream."""
        return 2 * self.config.layers * self.config.width * tokens * self.output_bias.element_size()
