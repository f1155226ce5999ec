"""A decoder-only Transformer to compare the recurrent models with. It is not served.

Vaswani et al. 2017 (arXiv:1706.03762) as it is built now: norms before the layers, no biases, rotary positions
(arXiv:2104.09864), a gated feed-forward layer (SwiGLU, arXiv:2002.05202). Initialisation and dropout are
nanoGPT's, but that weights of attention are not dropped, which rules out the fast kernels. It has the recurrent models'
call shapes, so that the same training loop drives it; its state is empty, and what it knows of the past is the window
that it is given.

Plain PyTorch. T time, B lanes, E width, A heads, D width of a head, F width of the feed-forward layer, V vocabulary.
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
"""Of nanoGPT's small configurations: 4 layers of 128 on a CPU, 6 of 384 on a GPU."""


@dataclass(frozen=True)
class TransformerConfig:
    width: int
    layers: int
    heads: int
    feed_forward: int
    dropout: float = 0.0

    def parameters(self, vocab_size: int) -> int:
        layer = 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width
        return self.layers * layer + self.width + vocab_size * (self.width + 1)


def nearest(parameters: int, vocab_size: int, dropout: float = 0.0, head_width: int = HEAD_WIDTH) -> TransformerConfig:
    """The Transformer of about so many parameters, within 3 %: of those whose feed-forward layer is 2 to 4 times as
    wide as the model, the one whose proportions are nearest to `WIDTH_PER_LAYER` and the customary 8/3."""
    best, least = None, math.inf
    for layers in range(1, 49):
        for width in range(8, 8 * head_width * layers, 8):
            heads = max(1, round(width / head_width))
            if width % (2 * heads):  # rotary positions turn pairs
                continue
            rest = parameters - TransformerConfig(width, layers, heads, 0).parameters(vocab_size)
            feed_forward = round(rest / (3 * width * layers) / 8) * 8
            if not 2 * width <= feed_forward <= 4 * width:
                continue
            config = TransformerConfig(width, layers, heads, feed_forward, dropout)
            if abs(config.parameters(vocab_size) / parameters - 1) > 0.03:
                continue
            odd = abs(math.log(width / layers / WIDTH_PER_LAYER)) + abs(math.log(feed_forward / width * 3 / 8))
            if odd < least:
                best, least = config, odd
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
        for linear in (self.attended, self.fed):  # the residual stream is a sum over twice as many as there are layers
            nn.init.normal_(linear.weight, std=INITIAL_STD / math.sqrt(2 * config.layers))

    def forward(self, x_BTE: Tensor, turns: tuple[Tensor, Tensor], dropout: float) -> Tensor:
        B, T, E = x_BTE.shape
        projected = self.queries_keys_values(self.attention_norm(x_BTE)).view(B, T, 3, self.heads, E // self.heads)
        q_BATD, k_BATD, v_BATD = projected.permute(2, 0, 3, 1, 4)
        q_BATD, k_BATD = rotate(q_BATD, turns), rotate(k_BATD, turns)
        seen_BATD = F.scaled_dot_product_attention(q_BATD, k_BATD, v_BATD, is_causal=True)
        x_BTE = x_BTE + F.dropout(self.attended(seen_BATD.transpose(1, 2).reshape(B, T, E)), dropout)
        gate_BTF, values_BTF = self.gate_and_values(self.feed_forward_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + F.dropout(self.fed(F.silu(gate_BTF) * values_BTF), dropout)


def angles(time: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, D / 2] of the rotary positions: position / base^(2 i / D)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    turns = torch.outer(torch.arange(time, device=like.device, dtype=torch.float32), frequencies)
    return turns.cos().to(like.dtype), turns.sin().to(like.dtype)


def rotate(x_BATD: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair (i, i + D / 2) of features turned by its angle at its time."""
    (cosines, sines), (left, right) = turns, x_BATD.chunk(2, dim=-1)
    turned = torch.cat([left * cosines - right * sines, left * sines + right * cosines], dim=-1)
    return turned.to(x_BATD.dtype)


class Transformer(nn.Module):
    """Embedding, layers, norm, and an output layer tied to the embedding, with a bias as the recurrent models' has."""

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
        """Nothing [0, B, 0], on the model's device."""
        return self.output_bias.new_zeros(0, lanes, 0)

    def dropout_masks(self, lanes: int, generator: torch.Generator) -> Tensor | None:
        """Nothing [0, B], which says that this is training: what is dropped is drawn as it is computed, from torch's
        own generator. None without dropout."""
        return self.output_bias.new_zeros(0, lanes) if self.config.dropout else None

    def forward(self, tokens_TB: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, B, V] of the token after each one given, from those given alone; and the state as it is."""
        return F.linear(self.features(tokens_TB, 0.0), self.embedding.weight, self.output_bias), state

    def loss(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state: Tensor,
        masks: Tensor | None = None,
        weights_TB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As GRULanguageModel's: summed cross-entropy in nats, times the weights where given, and the state."""
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
        """What the output layer reads [T, B, E]."""
        x_BTE = F.dropout(self.embedding(tokens_TB), dropout).transpose(0, 1)
        turns = angles(len(tokens_TB), self.config.width // self.config.heads, x_BTE)
        with torch.autocast(x_BTE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_BTE.dtype):
            for layer in self.layers:
                x_BTE = layer(x_BTE, turns, dropout).to(turns[0].dtype)
        return self.norm(x_BTE.transpose(0, 1).contiguous())

    def cache_bytes(self, tokens: int) -> int:
        """Memory in which a server keeps the keys and values of so many tokens of one stream."""
        return 2 * self.config.layers * self.config.width * tokens * self.output_bias.element_size()
