"""A pool of large buffers: the first access to memory from the system costs more than much of the work on it."""

from collections import defaultdict

import torch
from torch import Tensor


class Workspace:
    """Free buffers in CPU memory. One that is never given back is freed like any other tensor."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype, torch.device], list[Tensor]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a buffer with arbitrary content, of the type and on the device of `like`."""
        try:
            return self._free[shape, like.dtype, like.device].pop()
        except IndexError:
            with torch.inference_mode(False):  # a later caller may use it for training
                return torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, *buffers: Tensor) -> None:
        """Return buffers to the pool; their content may change from now on."""
        for buffer in buffers:
            if buffer.device.type != "cpu":
                continue  # torch's allocator for GPUs is such a pool
            self._free[tuple(buffer.shape), buffer.dtype, buffer.device].append(buffer)


workspace = Workspace()
