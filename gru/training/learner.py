"""What learns: a model, its optimizer, its moving average and the states of the lanes it owns.

Plain PyTorch over one process of a group. It knows neither Ray nor where tokens come from.
T time, B own lanes, G all lanes, L layers, H hidden.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gru.config import ModelConfig, TrainConfig
from gru.corpus.lanes import stream_batches
from gru.evaluation import stream_loss
from gru.model.language_model import GRULanguageModel
from gru.model.precision import PRODUCTS, resolve
from gru.training.checkpoint import Checkpoint


def own_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of worker `rank` among `world` workers."""
    return range(rank * lanes // world, (rank + 1) * lanes // world)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from the peak to `final_learning_rate` of it (arXiv:1608.03983)."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


class Objective(nn.Module):
    """A model's loss as the call that DistributedDataParallel wraps."""

    def __init__(self, model: GRULanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_TB: Tensor, targets_TB: Tensor, state_LBH: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.model.loss(inputs_TB, targets_TB, state_LBH, masks)


class Learner:
    """Every random number is drawn from (seed, step) for all G lanes at once and then sliced, so that what a lane
    sees does not depend on how many workers there are."""

    def __init__(
        self,
        model: ModelConfig,
        config: TrainConfig,
        vocab_size: int,
        end_of_text: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.end_of_text = end_of_text
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")
        self.lanes = own_lanes(config.lanes, rank, world)
        self.step = 0
        torch.manual_seed(config.seed)
        self.precision = resolve(model, self.device)
        self.model = GRULanguageModel(model, vocab_size, PRODUCTS[self.precision]).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        objective = Objective(self.model)
        self.objective = DistributedDataParallel(objective) if world > 1 else objective
        self.state_LBH = self.model.initial_state(len(self.lanes))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, config.beta2),
            fused=True,
        )

    def train_step(self, inputs_TB: np.ndarray, targets_TB: np.ndarray) -> tuple[Tensor, Tensor]:
        """One optimizer step on the own lanes' window. Returns this worker's part of the mean loss over all lanes
        (nats per token; the parts of all workers add up) and the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        total, state_LBH = self.objective(
            self._tensor(inputs_TB), self._tensor(targets_TB), self.state_LBH, self._dropout_masks()
        )
        self.state_LBH = state_LBH.detach()
        part = total / (len(inputs_TB) * self.config.lanes)
        self.optimizer.zero_grad()
        (part * self.world).backward()  # DDP divides the sum of gradients by the number of workers
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return part.detach(), norm

    def _dropout_masks(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        masks = self.model.dropout_masks(self.config.lanes, generator)
        return None if masks is None else masks[:, self.lanes.start : self.lanes.stop]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def heldout_loss(self, tokens: np.ndarray) -> float:
        """Mean loss of the averaged weights over a stream of tokens, in nats per token; each worker reads a part."""
        lanes = max(self.world, min(16, self.config.lanes))
        own = own_lanes(lanes, self.rank, self.world)
        batches = (
            tuple(part[:, own.start : own.stop] for part in batch)
            for batch in stream_batches(tokens, lanes, 256, self.end_of_text)
        )
        return self.sum_over_workers([stream_loss(self.average, batches, len(own))])[0] / len(tokens)

    def sum_over_workers(self, values: list[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """All that is needed to go on exactly, the states of all workers' lanes included. Called by all at once."""
        states = [self.state_LBH]
        if self.world > 1:
            widths = [len(own_lanes(self.config.lanes, rank, self.world)) for rank in range(self.world)]
            layers, _, hidden = self.state_LBH.shape
            states = [self.state_LBH.new_empty(layers, max(widths), hidden) for _ in widths]
            padded = F.pad(self.state_LBH, (0, 0, 0, max(widths) - len(self.lanes)))
            dist.all_gather(states, padded.contiguous())
            states = [part[:, :width] for part, width in zip(states, widths, strict=True)]
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self._optimizer_tensors(),
            "lanes": {"state": torch.cat(states, dim=1)},
        }
        plain = {
            stem: {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}
            for stem, group in tensors.items()
        }
        return Checkpoint(plain, {**state, "step": self.step})

    def restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.average.load_state_dict(checkpoint.tensors["ema"])
        state = checkpoint.tensors["lanes"]["state"][:, self.lanes.start : self.lanes.stop]
        self.state_LBH = state.contiguous().to(self.device)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                field: checkpoint.tensors["optimizer"][f"{field}/{name}"].to(self.device).clone()
                for field in ("step", "exp_avg", "exp_avg_sq")
            }

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{field}/{name}": self.optimizer.state[parameter][field]
            for name, parameter in self.model.named_parameters()
            for field in ("step", "exp_avg", "exp_avg_sq")
        }
