"""The learner: a model with its optimizer, its moving average and the states of the worker's own lanes.

Plain PyTorch in one process of a group. It knows neither Ray nor where tokens come from.
T time steps, B own lanes, G all lanes, L layers, H state width, P all parameters, flattened.
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
from gru.model.interface import LanguageModel
from gru.model.language_model import GRULanguageModel
from gru.model.loss import stream_loss
from gru.model.precision import MATMUL_DTYPES, resolve
from gru.training.checkpoint import Checkpoint
from gru.training.reduction import tree_sum

OPTIMIZER_FIELDS = ("step", "exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


class Diverged(Exception):
    """The gradient of a step is not finite. The learner has the values that it had before that step."""

    def __init__(self, step: int, norm: float) -> None:
        super().__init__(f"the gradient's norm is {norm} at step {step}")


def share(total: int, rank: int, world: int) -> range:
    """Return the part of range(total) that worker `rank` of `world` owns."""
    return range(rank * total // world, (rank + 1) * total // world)


def own_lanes(config: TrainConfig, rank: int, world: int) -> range:
    """Return the lanes of a worker; with `bitwise_elastic`, these are whole parts of it."""
    if not config.bitwise_elastic:
        return share(config.batch_size, rank, world)
    parts = share(config.bitwise_elastic, rank, world)
    ends = (share(config.batch_size, part, config.bitwise_elastic) for part in (parts[0], parts[-1]))
    return range(next(ends).start, next(ends).stop)


def learning_rate(config: TrainConfig, step: int, elapsed: float | None = None) -> float:
    """Return the learning rate: linear warm-up, then a cosine from the peak to `final_learning_rate` times the peak.

    The cosine is that of arXiv:1608.03983. elapsed: the share of the run before this step; by default step / steps.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + math.cos(math.pi * (step / config.steps if elapsed is None else elapsed)))
    return config.learning_rate * warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


class Objective(nn.Module):
    """A model's loss as the `forward` of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_TB: Tensor, targets_TB: Tensor, state_LBH: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss in nats, and the next state."""
        return self.model.loss(inputs_TB, targets_TB, state_LBH, masks)


class Learner:
    """The state of training in one worker, and its steps.

    Every random number is drawn from (seed, step) for all G lanes at once and then sliced, so that the random numbers
    of a lane do not depend on the number of workers. build: constructs the model from (config, vocab_size,
    matmul_dtype).
    """

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
        self.lanes_by_rank = [own_lanes(config, other, world) for other in range(world)]
        self.lanes = self.lanes_by_rank[rank]
        self.step = 0
        torch.manual_seed(config.seed)
        self.precision = resolve(model, self.device)
        self.model = build(model, vocab_size, MATMUL_DTYPES[self.precision]).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        objective = Objective(self.model)
        with_ddp = world > 1 and not config.bitwise_elastic
        self.objective = DistributedDataParallel(objective) if with_ddp else objective
        self.state_LBH = self.model.initial_state(len(self.lanes))
        self.optimizer = _optimizer(self.model, config)
        if with_ddp:
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Run two backward passes and discard the gradients, so that DDP has its final buckets from the start.

        After its first backward, DDP rebuilds its buckets by the order in which gradients arrived. With more than two
        workers this changes the bits of a sum, and the first step after a resume would differ from the same step of an
        undisturbed run.
        """
        tokens_TB = torch.zeros(self.config.sequence_length, len(self.lanes), dtype=torch.int64, device=self.device)
        for _ in range(2):
            total, _ = self.objective(tokens_TB, tokens_TB, self.state_LBH, self._dropout_masks())
            total.backward()
        self.optimizer.zero_grad()

    def train_step(
        self, inputs_TB: np.ndarray, targets_TB: np.ndarray, elapsed: float | None = None
    ) -> tuple[Tensor, float]:
        """Do one optimizer step on a window of the own lanes.

        Returns this worker's summand of the mean loss over all lanes, in nats per token, and the norm of the gradient
        before clipping. `elapsed` is for `learning_rate`. Raises Diverged, in all workers alike, if the gradient is not
        finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, elapsed)
        self.optimizer.zero_grad()
        compute_gradients = self._gradients_in_parts if self.config.bitwise_elastic else self._gradients_at_once
        loss, state_LBH = compute_gradients(self._tensor(inputs_TB), self._tensor(targets_TB), self._dropout_masks())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise Diverged(self.step + 1, norm)
        self.state_LBH = state_LBH
        self.optimizer.step()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss, norm

    def _gradients_at_once(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the mean loss over all lanes, summed over workers by DDP.

        Returns this worker's summand of that loss, and the next states of its lanes.
        """
        total, state_LBH = self.objective(inputs_TB, targets_TB, self.state_LBH, masks)
        loss = total / (len(inputs_TB) * self.config.batch_size)
        (loss * self.world).backward()  # DDP divides the sum of gradients by the number of workers
        return loss.detach(), state_LBH.detach()

    def _gradients_in_parts(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do what `_gradients_at_once` does, with bits that do not depend on the number of workers.

        Matrix products have the shape of a part of `bitwise_elastic`, and sums follow one order.
        """
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
        """Return, after Diverged, the own lanes whose window alone gives a gradient that is not finite."""
        inputs, targets, masks = self._tensor(inputs_TB), self._tensor(targets_TB), self._dropout_masks()
        suspects = []
        for index, lane in enumerate(self.lanes):
            heartbeat()
            own = slice(index, index + 1)
            state_LBH, mask = self.state_LBH[:, own], None if masks is None else masks[:, own]
            total, _ = self.model.loss(inputs[:, own], targets[:, own], state_LBH, mask)
            gradients = torch.autograd.grad(total, list(self.model.parameters()))
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                suspects.append(lane)
        return suspects

    def _dropout_masks(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        masks = self.model.dropout_masks(self.config.batch_size, generator)
        return None if masks is None else masks[:, self.lanes.start : self.lanes.stop]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def heldout_loss(self, tokens: np.ndarray, heartbeat: Callable[[], None] = lambda: None) -> float:
        """Return the mean loss of the averaged weights over a stream of tokens, in nats per token.

        Each worker reads a part of the stream. heartbeat: called before each batch.
        """
        lanes = max(self.world, min(16, self.config.batch_size))
        own = share(lanes, self.rank, self.world)

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            for batch in stream_batches(tokens, lanes, 256, self.end_of_text):
                heartbeat()
                yield tuple(part[:, own.start : own.stop] for part in batch)

        return self.sum_over_workers([stream_loss(self.average, batches(), len(own))])[0] / len(tokens)

    def sum_over_workers(self, values: list[float]) -> list[float]:
        """Return the sum of each value over all workers. All workers must call it together."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def agree(self, value: int) -> int:
        """Return rank 0's value in all workers. All workers must call it together."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value])
        dist.broadcast(tensor, 0)
        return int(tensor)

    def checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """Return all that an exact resume needs, with the states of all workers' lanes, and `state` as given.

        All workers must call it together; only rank 0's result has the tensors.
        """
        states = [self.state_LBH]
        if self.world > 1:
            widths = [len(lanes) for lanes in self.lanes_by_rank]
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
        copies = {
            stem: {name: tensor.detach().cpu().contiguous().clone() for name, tensor in group.items()}
            for stem, group in tensors.items()
        }
        return Checkpoint(copies, {**state, "step": self.step})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, written by any number of workers."""
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
        """Return the optimizer's state by field and parameter; empty before the first step."""
        return {
            f"{field}/{name}": tensor
            for name, parameter in self.model.named_parameters()
            for field, tensor in self.optimizer.state.get(parameter, {}).items()
        }


def _optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, config.beta2),
        fused=True,
    )
