"""Large buffers that are used again: memory new from the system costs more to touch than much work on it."""

from collections import defaultdict

import torch
from torch import Tensor


class Workspace:
    """A buffer that is not given back, because no backward came, is freed as any tensor is."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype, torch.device], list[Tensor]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer with any content, of the type and on the device of `like`."""
        try:
            return self._free[shape, like.dtype, like.device].pop()
        except IndexError:
            with torch.inference_mode(False):  # it may be used for training next
                return torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, *buffers: Tensor) -> None:
        for buffer in buffers:
            self._free[tuple(buffer.shape), buffer.dtype, buffer.device].append(buffer)


workspace = Workspace()
