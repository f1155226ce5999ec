"""A language model on GRUs or other recurrent cells: token ids and a state in, logits and the next state out.

Plain PyTorch. It knows nothing of corpora, Ray, MLflow or the environment.
T time steps, B lanes, L layers, E embedding width, H state width (of the GRU: its hidden width), V vocabulary.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.config import ModelConfig
from gru.config_stages import Cell
from gru.model.cells import CELLS
from gru.model.dropout import dropout_mask
from gru.model.loss import cross_entropy


def with_current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under this version's parameter names: older bundles call the cell of a block `gru`."""
    return {re.sub(r"^(blocks\.\d+)\.gru\.", r"\1.cell.", name): tensor for name, tensor in weights.items()}


class Block(nn.Module):
    """A pre-norm residual block: x + project(cell(norm(x)))."""

    def __init__(self, cell: Cell, width: int, hidden: int, matmul_dtype: torch.dtype) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype
        self.norm = nn.LayerNorm(width, bias=False)
        self.cell = CELLS[cell].build(width, hidden, matmul_dtype)
        self.project = nn.Linear(hidden, width, bias=False) if hidden != width else nn.Identity()

    def forward(self, x_TBE: Tensor, h_BH: Tensor, mask_BE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output [T, B, E] and the cell's next state. mask: multiplies the cell's input at each step."""
        inner = self.norm(x_TBE)
        if mask_BE is not None:
            inner = inner * mask_BE
        out_TBH, h_BH = self.cell(inner, h_BH)
        with torch.autocast(x_TBE.device.type, self.matmul_dtype, enabled=self.matmul_dtype != x_TBE.dtype):
            projected_TBE = self.project(out_TBH)
        return x_TBE + projected_TBE, h_BH


class GRULanguageModel(nn.Module):
    """Embedding, residual recurrent blocks, norm, and an output layer tied to the embedding (arXiv:1608.05859).

    matmul_dtype: the type to which the factors of the cells' and the loss's matrix products are rounded. Serving and
    evaluation leave it at fp32: then a row has the same bits whatever the width of its batch, and a score is the same
    on any machine.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.matmul_dtype = matmul_dtype
        self.state_width = CELLS[config.cell].state_vectors * config.hidden
        self.embedding = nn.Embedding(vocab_size, config.embedding)
        self.blocks = nn.ModuleList(
            Block(config.cell, config.embedding, config.hidden, matmul_dtype) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.embedding, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        # With a tied output, a large embedding in the residual stream would predict that each token follows itself.
        nn.init.normal_(self.embedding.weight, std=0.02)

    def initial_state(self, lanes: int) -> Tensor:
        """Return zeros [L, B, H], on the model's device."""
        return self.output_bias.new_zeros(self.config.layers, lanes, self.state_width)

    def dropout_masks(self, lanes: range, all_lanes: int, key: Tensor) -> Tensor | None:
        """Return the dropout masks [L + 1, B, E] of one window for some of all lanes; None without dropout.

        Each lane drops the same features at every time step (Gal & Ghahramani 2016, arXiv:1512.05287). The masks are a
        function of the key, an int64 on the model's device, and of the lane.
        """
        if not self.config.dropout:
            return None
        config = self.config
        return dropout_mask(config.dropout, config.layers + 1, lanes, all_lanes, config.embedding, key)

    def forward(self, tokens_TB: Tensor, state_LBH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [T, B, V] of the token after each input token, and the state [L, B, H] after the last.

        tokens_TB: integer ids below V.
        """
        x_TBE, state_LBH = self.features(tokens_TB, state_LBH)
        return self.logits(x_TBE), state_LBH

    def logits(self, x_TBE: Tensor) -> Tensor:
        """Return the logits of the next token [..., V], from the result of `features`."""
        return F.linear(x_TBE, self.embedding.weight, self.output_bias)

    def loss(
        self,
        tokens_TB: Tensor,
        targets_TB: Tensor,
        state_LBH: Tensor,
        masks: Tensor | None = None,
        weights_TB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats, weighted by `weights` if given, and the next state.

        masks: from `dropout_masks`, for training only. The logits are never in memory all at once.
        """
        x_TBE, state_LBH = self.features(tokens_TB, state_LBH, masks)
        weights_N = None if weights_TB is None else weights_TB.flatten()
        total = cross_entropy(
            x_TBE.flatten(0, 1),
            self.embedding.weight,
            self.output_bias,
            targets_TB.flatten(),
            weights_N,
            self.matmul_dtype,
        )
        return total, state_LBH

    def features(self, tokens_TB: Tensor, state_LBH: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the input of the output layer [T, B, E], and the next state."""
        x_TBE = self.embedding(tokens_TB)
        states = []
        for layer, block in enumerate(self.blocks):
            x_TBE, h_BH = block(x_TBE, state_LBH[layer], None if masks is None else masks[layer])
            states.append(h_BH)
        x_TBE = self.norm(x_TBE)
        return x_TBE if masks is None else x_TBE * masks[-1], torch.stack(states)
