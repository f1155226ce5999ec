"""The learner: a model with its optimizer, its moving average and the states of the worker's own lanes.

Plain PyTorch in one process of a group. It knows neither Ray nor where tokens come from. A step is the same sequence of
operations on the same tensors each time and decides nothing on the host, so that it can be a CUDA graph.
T time steps, B own lanes, G all lanes, L layers, H state width, P all parameters, flattened.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import splitmix64, stream_batches
from gru.errors import UserError
from gru.machine import available_cpus
from gru.model.interface import LanguageModel
from gru.model.language_model import GRULanguageModel
from gru.model.loss import stream_loss
from gru.model.precision import MATMUL_DTYPES, resolve
from gru.training.checkpoint import Checkpoint
from gru.training.flat_parameters import ParameterLayout
from gru.training.optimizer import Optimizer
from gru.training.reduction import tree_sum
from gru.training.step_graph import StepGraph
from gru.training.step_inputs import StepInputs


class Diverged(Exception):
    """The gradient of a step is not finite. The learner has the values that it had before that step."""

    def __init__(self, step: int, norm: float) -> None:
        super().__init__(f"the gradient's norm is {norm} at step {step}")


def diverged(reason: str) -> UserError:
    """Return the error that tells people why a training has diverged, and what to do."""
    return UserError(f"training diverged: {reason}: lower train.learning_rate or train.clip")


def threads(config: TrainConfig, local_workers: int) -> int:
    """Return the number of CPU threads of each of the workers on this machine."""
    if config.threads or config.bitwise_elastic:
        return config.threads or 1
    return max(1, available_cpus() // local_workers)


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


class Learner:
    """The state of training in one worker, and its steps.

    Every random number is a function of (seed, step, lane), so that those of a lane do not depend on the number of
    workers. build: constructs the model from (config, vocab_size, matmul_dtype).
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
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # on which our kernels are loaded; Ray shows a worker all of its node's
        self.lanes_by_rank = [own_lanes(config, other, world) for other in range(world)]
        self.lanes = self.lanes_by_rank[rank]
        self.step = 0
        self.warm_start = False
        torch.manual_seed(config.seed)
        self.precision = resolve(model, self.device)
        self.model = build(model, vocab_size, MATMUL_DTYPES[self.precision]).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self._layout = ParameterLayout(self.model)
        self._weights_P, self._average_P = self._layout.flatten(self.model), self._layout.flatten(self.average)
        self._gradient_P = torch.zeros_like(self._weights_P)
        self.state_LBH = self.model.initial_state(len(self.lanes))
        self._inputs = StepInputs(config.sequence_length, len(self.lanes), self.device)
        # The results of the last step, and 1 after a gradient that is not finite.
        self._loss, self._norm, self._diverged = self._weights_P.new_zeros(3).unbind()
        self._done = torch.zeros((), dtype=torch.int64, device=self.device)
        rate, skip = self._inputs.learning_rate, self._diverged
        self._optimizer = Optimizer(self._layout, self._weights_P, self._gradient_P, config, rate, skip)
        # With `bitwise_elastic`, workers send each other one part after another, which no graph records.
        self._run = StepGraph(self._compute, self.device, record=not config.bitwise_elastic)

    def train_step(self, inputs_TB: np.ndarray, targets_TB: np.ndarray, elapsed: float | None = None) -> Tensor:
        """Do one optimizer step on a window of the own lanes, without waiting for the device.

        Returns this worker's summand of the mean loss over all lanes, in nats per token. `elapsed` is for
        `learning_rate`. If the gradient is not finite, this step and those after it change nothing and return 0, and
        `confirm` raises Diverged.
        """
        rate = learning_rate(self.config, self.step, elapsed)
        decay = self.config.ema_decay
        if not self.warm_start:  # the average soon forgets the random weights
            decay = min(decay, (1 + self.step) / (10 + self.step))
        self._inputs.set(inputs_TB, targets_TB, rate, 1 - decay, self._key())
        self._run(len(inputs_TB))
        self.step += 1
        return self._loss.clone()

    def confirm(self) -> float:
        """Wait for all steps so far, and return the norm of the last one's gradient before clipping.

        Raises Diverged, in all workers alike, if the gradient of a step since the last call is not finite. The learner
        is then where it was before that step.
        """
        norm, diverged, done = torch.stack([self._norm.double(), self._diverged.double(), self._done.double()]).tolist()
        if diverged:
            self.step = int(done)
            self._diverged.zero_()
            raise Diverged(self.step + 1, norm)
        return norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self._inputs.learning_rate)

    def _compute(self, time_steps: int) -> None:
        """Compute a step on `_inputs`. If its gradient is not finite or an earlier one was not, it changes nothing."""
        compute_gradient = self._gradient_in_parts if self.config.bitwise_elastic else self._gradient_at_once
        loss, state_LBH = compute_gradient(*self._inputs.tokens(time_steps), self._dropout_masks())
        norm = torch.linalg.vector_norm(self._gradient_P)
        self._norm.copy_(torch.where(self._diverged > 0, self._norm, norm))
        torch.maximum(self._diverged, (~norm.isfinite()).float(), out=self._diverged)
        # Between the parameters there are zeros, which must not become NaN.
        self._gradient_P *= (self.config.clip / (norm + 1e-6)).clamp(max=1).nan_to_num(0)
        self._optimizer.step()
        self._average_P.lerp_(self._weights_P, self._inputs.average_weight * (1 - self._diverged))
        self.state_LBH.copy_(torch.where(self._diverged > 0, self.state_LBH, state_LBH))
        self._loss.copy_(loss.masked_fill(self._diverged > 0, 0))
        self._done += self._diverged == 0

    def _gradient_at_once(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Write the gradient of the mean loss over all lanes, summed over workers.

        Returns this worker's summand of that loss, and the next states of its lanes.
        """
        total, state_LBH = self.model.loss(inputs_TB, targets_TB, self.state_LBH, masks)
        loss = total / (len(inputs_TB) * self.config.batch_size)
        self._layout.pack(torch.autograd.grad(loss, self._layout.parameters(self.model)), self._gradient_P)
        if self.world > 1:
            dist.all_reduce(self._gradient_P)
        return loss.detach(), state_LBH.detach()

    def _gradient_in_parts(self, inputs_TB: Tensor, targets_TB: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Do what `_gradient_at_once` does, with bits that do not depend on the number of workers.

        Matrix products have the shape of a part of `bitwise_elastic`, and sums follow one order.
        """
        parts = self.config.bitwise_elastic
        owners = [rank for rank in range(self.world) for _ in share(parts, rank, self.world)]
        parameters = self._layout.parameters(self.model)
        losses, states = [], []

        def gradient_of(part: int) -> Tensor:
            lanes = share(self.config.batch_size, part, parts)
            own = slice(lanes.start - self.lanes.start, lanes.stop - self.lanes.start)
            total, state_LBH = self.model.loss(
                inputs_TB[:, own],
                targets_TB[:, own],
                self.state_LBH[:, own],
                None if masks is None else masks[:, own],
            )
            loss = total / (len(inputs_TB) * self.config.batch_size)
            losses.append(loss.detach())
            states.append(state_LBH.detach())
            return self._layout.pack(torch.autograd.grad(loss, parameters), torch.zeros_like(self._gradient_P))

        tree_sum(gradient_of, owners, self.rank, self._gradient_P)
        return torch.stack(losses).sum(), torch.cat(states, dim=1)

    def _dropout_masks(self) -> Tensor | None:
        return self.model.dropout_masks(self.lanes, self.config.batch_size, self._inputs.key)

    def _key(self) -> int:
        """Return the key of the dropout masks of the next step."""
        seed = splitmix64(np.array([self.config.seed], dtype=np.uint64))
        return int(splitmix64(seed ^ np.uint64(self.step))[0])

    def suspects(self, inputs_TB: np.ndarray, targets_TB: np.ndarray, heartbeat: Callable[[], None]) -> list[int]:
        """Return, after Diverged, the own lanes whose window alone gives a gradient that is not finite."""
        self._inputs.set(inputs_TB, targets_TB, 0.0, 0.0, self._key())
        inputs, targets = self._inputs.tokens(len(inputs_TB))
        masks, parameters = self._dropout_masks(), self._layout.parameters(self.model)
        suspects = []
        for index, lane in enumerate(self.lanes):
            heartbeat()
            own = slice(index, index + 1)
            mask = None if masks is None else masks[:, own]
            total, _ = self.model.loss(inputs[:, own], targets[:, own], self.state_LBH[:, own], mask)
            if not all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(total, parameters)):
                suspects.append(lane)
        return suspects

    @property
    def _all_heldout_lanes(self) -> int:
        return max(self.world, min(16, self.config.batch_size))

    @property
    def heldout_lanes(self) -> range:
        """The lanes in which this worker reads held-out text."""
        return share(self._all_heldout_lanes, self.rank, self.world)

    def heldout_loss(self, tokens: np.ndarray, heartbeat: Callable[[], None] = lambda: None) -> float:
        """Return the mean loss of the averaged weights over a stream of tokens, in nats per token.

        Each worker reads a part of the stream. heartbeat: called before each batch.
        """
        own = self.heldout_lanes

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            for batch in stream_batches(tokens, self._all_heldout_lanes, 256, self.end_of_text):
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
        state = {**state, "step": self.step, "warm_start": self.warm_start}
        if self.rank:
            return Checkpoint({}, state)
        tensors = {
            "model": self._layout.views(_copied(self._weights_P)),
            "ema": self._layout.views(_copied(self._average_P)),
            "optimizer": self._optimizer.tensors(_copied),
            "lanes": {"state": _copied(torch.cat(states, dim=1))},
        }
        return Checkpoint(tensors, state)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Start from these weights and the same average instead of random ones; all else is new.

        The average then moves with `ema_decay` from the first step: it has something to lose while the weights adapt.
        """
        self.warm_start = True
        self.model.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, written by any number of workers."""
        self.step = checkpoint.step
        self.warm_start = checkpoint.state.get("warm_start", False)
        self._done.fill_(self.step)
        self.model.load_state_dict(checkpoint.tensors["model"])
        self.average.load_state_dict(checkpoint.tensors["ema"])
        self.state_LBH.copy_(checkpoint.tensors["lanes"]["state"][:, self.lanes.start : self.lanes.stop])
        self._optimizer.restore(checkpoint.tensors["optimizer"])


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()
