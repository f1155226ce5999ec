"""A language model on GRUs: token ids and a state in, logits and the next state out.

Plain PyTorch. It knows nothing of corpora, Ray, MLflow or the environment.
T time, B lanes, L layers, E embedding, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.config import ModelConfig
from gru.model.recurrence import GRU, dropout_mask


class Block(nn.Module):
    """A pre-norm residual GRU block: x + project(GRU(norm(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gru = GRU(width, hidden)
        self.project = nn.Linear(hidden, width, bias=False) if hidden != width else nn.Identity()

    def forward(self, x_TBE: Tensor, h_BH: Tensor, mask_BE: Tensor | None) -> tuple[Tensor, Tensor]:
        inner = self.norm(x_TBE)
        if mask_BE is not None:
            inner = inner * mask_BE
        out_TBH, h_BH = self.gru(inner, h_BH)
        return x_TBE + self.project(out_TBH), h_BH


class GRULanguageModel(nn.Module):
    """Embedding, residual GRU blocks, norm, and an output layer tied to the embedding (arXiv:1608.05859)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, config.embedding)
        self.blocks = nn.ModuleList(Block(config.embedding, config.hidden) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.embedding)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        # Small: with a tied output, a large embedding in the residual stream predicts each token to follow itself.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def initial_state(self, lanes: int) -> Tensor:
        """Zeros [L, B, H], on the model's device."""
        return self.output_bias.new_zeros(self.config.layers, lanes, self.config.hidden)

    def dropout_masks(self, lanes: int, generator: torch.Generator) -> Tensor | None:
        """Masks [L + 1, B, E] for one window: each lane drops the same features at every time step
        (Gal & Ghahramani 2016, arXiv:1512.05287). None without dropout."""
        if not self.config.dropout:
            return None
        shape = (self.config.layers + 1, lanes, self.config.embedding)
        return dropout_mask(self.config.dropout, shape, generator).to(self.output_bias.device)

    def forward(self, tokens_TB: Tensor, state_LBH: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [T, B, V] of the token after each one given, and the state [L, B, H] after the last.

        tokens_TB: integer ids below V. masks: from `dropout_masks`, for training only.
        """
        x_TBE = self.embedding(tokens_TB)
        states = []
        for layer, block in enumerate(self.blocks):
            x_TBE, h_BH = block(x_TBE, state_LBH[layer], None if masks is None else masks[layer])
            states.append(h_BH)
        x_TBE = self.norm(x_TBE)
        if masks is not None:
            x_TBE = x_TBE * masks[-1]
        return F.linear(x_TBE, self.embedding.weight, self.output_bias), torch.stack(states)
