"""A CUDA graph of a training step: the host launches one graph instead of hundreds of kernels."""

from collections.abc import Callable

import torch


class StepGraph:
    """A function whose kernels are recorded on a GPU and replayed.

    The function gets the number of time steps, and works on tensors whose addresses do not change. The first call for
    each number runs it as it is, which also loads what it needs; the second records it. On a CPU, or if `record` is
    False, every call runs it.
    """

    def __init__(self, function: Callable[[int], None], device: torch.device, record: bool = True) -> None:
        self._function, self._record = function, record and device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, time_steps: int) -> None:
        if not self._record or time_steps not in self._graphs:
            self._graphs[time_steps] = None
            self._function(time_steps)
            return
        graph = self._graphs[time_steps]
        if graph is None:
            graph = self._graphs[time_steps] = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may use the GPU during the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._function(time_steps)
        graph.replay()
