"""What a training step reads, in one buffer on the device, so that a step needs one transfer.

T time steps, B own lanes.
"""

import numpy as np
import torch
from torch import Tensor

SCALARS = 2  # learning rate and weight of the average side by side, and the key


class StepInputs:
    """The tokens of a step, its learning rate, the weight of the moving average, and the key of its dropout masks."""

    def __init__(self, sequence_length: int, lanes: int, device: torch.device) -> None:
        self._lanes = lanes
        self._buffer = torch.zeros(SCALARS + 2 * sequence_length * lanes, dtype=torch.int64, device=device)
        self.learning_rate, self.average_weight = self._buffer[:1].view(torch.float32).unbind()
        self.key = self._buffer[1]

    def tokens(self, time_steps: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the targets [T, B] of a window of this many time steps."""
        size = time_steps * self._lanes
        inputs_N, targets_N = self._buffer[SCALARS : SCALARS + 2 * size].split(size)
        return inputs_N.view(time_steps, self._lanes), targets_N.view(time_steps, self._lanes)

    def set(
        self, inputs_TB: np.ndarray, targets_TB: np.ndarray, learning_rate: float, average_weight: float, key: int
    ) -> None:
        """Begin to copy the inputs of a step to the device; on a GPU, the host does not wait for it."""
        rates = np.array([learning_rate, average_weight], dtype=np.float32).view(np.int64)
        keys = np.array([key], dtype=np.uint64).view(np.int64)
        values = torch.from_numpy(np.concatenate([rates, keys, inputs_TB.reshape(-1), targets_TB.reshape(-1)]))
        if self._buffer.device.type == "cuda":
            values = values.pin_memory()  # of a pool, which reuses it only after the transfer
        self._buffer[: len(values)].copy_(values, non_blocking=True)
