"""The loss and rates of training between two logged points, and the memory it takes."""

import resource
import time
from typing import Any

import torch

from gru.training.learner import Learner


class Meter:
    """Sums since the last logged point, from which its metrics are computed."""

    def __init__(self, loss: float = 0.0, steps: int = 0) -> None:
        self.started = time.monotonic()
        self.data_wait = self.checkpoint_wait = 0.0
        self.loss: torch.Tensor | float = loss
        self.steps = steps
        self.tokens = 0

    @classmethod
    def resumed(cls, since_point: dict[str, Any], learner: Learner) -> "Meter":
        """Return the meter of a checkpoint that was saved between two points. Rank 0 gets the loss of all workers."""
        return cls(since_point["loss"] if learner.rank == 0 else 0.0, since_point["steps"])

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """Add a step: this worker's summand of the mean loss, and the tokens of all workers."""
        self.loss = self.loss + loss
        self.steps += 1
        self.tokens += tokens

    def discard(self, steps: int) -> None:
        """Take back the last steps, which diverged and whose loss is 0."""
        self.steps -= steps

    def mean_loss(self) -> float:
        """Return this worker's summand of the mean loss, in nats per token."""
        return float(self.loss) / self.steps

    def rates(self) -> dict[str, float]:
        """Return tokens per second, and the shares of time spent waiting for data and for checkpoints."""
        elapsed = time.monotonic() - self.started
        return {
            "train/tokens_per_second": self.tokens / elapsed,
            "train/data_wait_share": self.data_wait / elapsed,
            "train/checkpoint_wait_share": self.checkpoint_wait / elapsed,
        }


def memory_gigabytes(device: torch.device) -> float:
    """Return the most memory that this process has had at a time: the device's if that is a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # in KiB on Linux
