"""What learns: a model, its optimizer, its moving average and the states of the lanes it owns.

Plain PyTorch over one process of a group. It knows neither Ray nor where tokens come from.
T time, B own lanes, G all lanes, L layers, H state, P parameters end to end.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import stream_batches
from gru.model.language_model import GRULanguageModel
from gru.model.precision import MATMUL_DTYPES, resolve
from gru.model.stream_loss import LanguageModel, stream_loss
from gru.training.checkpoint import Checkpoint
from gru.training.reduction import tree_sum

OPTIMIZER_FIELDS = ("step", "exp_avg", "exp_avg_sq")


class Diverged(Exception):
    """A step's gradient is not finite. The learner is as it was before that step."""

    def __init__(self, step: int, norm: float) -> None:
        super().__init__(f"the gradient's norm is {norm} at step {step}")


def share(total: int, rank: int, world: int) -> range:
    """What worker `rank` of `world` has of `total` things in a row."""
    return range(rank * total // world, (rank + 1) * total // world)


def own_lanes(config: TrainConfig, rank: int, world: int) -> range:
    """The lanes of a worker: whole parts of `bitwise_elastic` if there are such."""
    if not config.bitwise_elastic:
        return share(config.batch_size, rank, world)
    parts = share(config.bitwise_elastic, rank, world)
    ends = (share(config.batch_size, part, config.bitwise_elastic) for part in (parts[0], parts[-1]))
    return range(next(ends).start, next(ends).stop)


def learning_rate(config: TrainConfig, step: int, done: float | None = None) -> float:
    """Linear warm-up, then a cosine from the peak to `final_learning_rate` of it (arXiv:1608.03983).

    done: the share of the run that is; that of its steps where absent."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step / config.steps if done is None else done)))
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


class Objective(nn.Module):
    """A model's loss as the call that DistributedDataParallel wraps."""

    def __init__(self, model: LanguageModel) -> None:
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
        build: Callable[[ModelConfig, int, torch.dtype], LanguageModel] = GRULanguageModel,
    ) -> None:
        self.config = config
        self.end_of_text = end_of_text
        self.rank, self.world = rank, world
        self.device = device or torch.device("cpu")
        self.shares = [own_lanes(config, other, world) for other in range(world)]
        self.lanes = self.shares[rank]
        self.step = 0
        torch.manual_seed(config.seed)
        self.precision = resolve(model, self.device)
        self.model = build(model, vocab_size, MATMUL_DTYPES[self.precision]).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        objective = Objective(self.model)
        reduced = world > 1 and not config.bitwise_elastic
        self.objective = DistributedDataParallel(objective) if reduced else objective
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
        if reduced:
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """A step whose gradients are thrown away. After its first backward, DDP lays out its buckets anew, by the order
        in which gradients came; where more than two workers sum, that changes bits, and the first step after a resume
        would differ from the same step of an undisturbed run."""
        tokens_TB = torch.zeros(self.config.sequence_length, len(self.lanes), dtype=torch.int64, device=self.device)
        for _ in range(2):
            total, _ = self.objective(tokens_TB, tokens_TB, self.state_LBH, self._dropout_masks())
            total.backward()
        self.optimizer.zero_grad()

    def train_step(
        self, inputs_TB: np.ndarray, targets_TB: np.ndarray, done: float | None = None
    ) -> tuple[Tensor, float]:
        """One optimizer step on the own lanes' window. Returns this worker's part of the mean loss over all lanes
        (nats per token; the parts of all workers add up) and the norm of the gradient before clipping. `done` is for
        `learning_rate`.

        Raises Diverged, in all workers at once, if the gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, done)
        self.optimizer.zero_grad()
        step = self._step_in_parts if self.config.bitwise_elastic else self._step_at_once
        part, state_LBH = step(self._tensor(inputs_TB), self._tensor(targets_TB), self._dropout_masks())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise Diverged(self.step + 1, norm)
        self.state_LBH = state_LBH
        self.optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return part, norm

    def _step_at_once(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over all lanes, summed by DDP; the own part of that loss, and the next states."""
        total, state_LBH = self.objective(inputs_TB, targets_TB, self.state_LBH, masks)
        part = total / (len(inputs_TB) * self.config.batch_size)
        (part * self.world).backward()  # DDP divides the sum of gradients by the number of workers
        return part.detach(), state_LBH.detach()

    def _step_in_parts(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `_step_at_once`, from products of one shape and sums of one order, whatever the workers."""
        parts = self.config.bitwise_elastic
        owners = [rank for rank in range(self.world) for _ in share(parts, rank, self.world)]
        parameters = list(self.model.parameters())
        losses, states = [], []

        def gradient_of(part: int) -> Tensor:
            lanes = share(self.config.batch_size, part, parts)
            own = slice(lanes.start - self.lanes.start, lanes.stop - self.lanes.start)
            total, state_LBH = self.objective(
                inputs_TB[:, own],
                targets_TB[:, own],
                self.state_LBH[:, own],
                None if masks is None else masks[:, own],
            )
            loss = total / (len(inputs_TB) * self.config.batch_size)
            losses.append(loss.detach())
            states.append(state_LBH.detach())
            return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])

        out_P = parameters[0].new_empty(sum(parameter.numel() for parameter in parameters))
        gradient_P = tree_sum(gradient_of, owners, self.rank, out_P)
        for parameter, gradient in zip(parameters, gradient_P.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        return torch.stack(losses).sum(), torch.cat(states, dim=1)

    def suspects(self, inputs_TB: np.ndarray, targets_TB: np.ndarray, heartbeat: Callable[[], None]) -> list[int]:
        """After Diverged: the own lanes whose window alone gives a gradient that is not finite."""
        inputs, targets, masks = self._tensor(inputs_TB), self._tensor(targets_TB), self._dropout_masks()
        found = []
        for index, lane in enumerate(self.lanes):
            heartbeat()
            own = slice(index, index + 1)
            state_LBH, mask = self.state_LBH[:, own], None if masks is None else masks[:, own]
            total, _ = self.model.loss(inputs[:, own], targets[:, own], state_LBH, mask)
            gradients = torch.autograd.grad(total, list(self.model.parameters()))
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                found.append(lane)
        return found

    def _dropout_masks(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        masks = self.model.dropout_masks(self.config.batch_size, generator)
        return None if masks is None else masks[:, self.lanes.start : self.lanes.stop]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def heldout_loss(self, tokens: np.ndarray, heartbeat: Callable[[], None] = lambda: None) -> float:
        """Mean loss of the averaged weights over a stream of tokens, in nats per token; each worker reads a part.

        beat: called before each batch."""
        lanes = max(self.world, min(16, self.config.batch_size))
        own = share(lanes, self.rank, self.world)

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            for batch in stream_batches(tokens, lanes, 256, self.end_of_text):
                heartbeat()
                yield tuple(part[:, own.start : own.stop] for part in batch)

        return self.sum_over_workers([stream_loss(self.average, batches(), len(own))])[0] / len(tokens)

    def sum_over_workers(self, values: list[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def agree(self, value: int) -> int:
        """Rank 0's value, in all workers."""
        if self.world == 1:
            return value
        box = torch.tensor([value])
        dist.broadcast(box, 0)
        return int(box)

    def checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """All that is needed to go on exactly, the states of all workers' lanes included. Called by all at once;
        rank 0's has the tensors."""
        states = [self.state_LBH]
        if self.world > 1:
            widths = [len(lanes) for lanes in self.shares]
            layers, _, hidden = self.state_LBH.shape
            states = [self.state_LBH.new_empty(layers, max(widths), hidden) for _ in widths]
            padded = F.pad(self.state_LBH, (0, 0, 0, max(widths) - len(self.lanes)))
            dist.all_gather(states, padded.contiguous())
            states = [part[:, :width] for part, width in zip(states, widths, strict=True)]
        if self.rank:
            return Checkpoint({}, {**state, "step": self.step})
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
        moments = checkpoint.tensors["optimizer"]
        for name, parameter in self.model.named_parameters():
            fields = [field for field in OPTIMIZER_FIELDS if f"{field}/{name}" in moments]
            if fields:
                self.optimizer.state[parameter] = {
                    field: moments[f"{field}/{name}"].to(self.device).clone() for field in fields
                }

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """None before the first step."""
        return {
            f"{field}/{name}": tensor
            for name, parameter in self.model.named_parameters()
            for field, tensor in self.optimizer.state.get(parameter, {}).items()
        }
