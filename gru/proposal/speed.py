"""The speed of training on this machine, as measured by a few real steps on random tokens."""

import statistics
import time
from collections.abc import Callable

from gru.config import ModelConfig, TrainConfig

Speed = Callable[[ModelConfig, TrainConfig, int], float]
"""From (model, training, vocabulary size) to tokens per second."""

_SECONDS = 1.0
_STEPS = 2  # between two looks at the clock


def measure_speed(model: ModelConfig, train: TrainConfig, vocab_size: int, cores: int, gpu: bool) -> float:
    """Return the tokens per second that a worker trains, on the GPU or on so many cores."""
    import numpy as np
    import torch

    from gru.training.learner import Learner

    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        learner = Learner(model, train, vocab_size, vocab_size - 1, device=torch.device("cuda" if gpu else "cpu"))
        shape = (train.sequence_length, train.batch_size)
        tokens_TB = np.random.default_rng(0).integers(0, vocab_size, shape)
        for _ in range(_STEPS):  # the first one compiles
            learner.train_step(tokens_TB, tokens_TB)
        learner.confirm()
        seconds: list[float] = []
        while sum(seconds) < _SECONDS:
            started = time.perf_counter()
            for _ in range(_STEPS):
                learner.train_step(tokens_TB, tokens_TB)
            learner.confirm()
            seconds.append(time.perf_counter() - started)
        return _STEPS * tokens_TB.size / statistics.median(seconds)  # not the mean: other processes come and go
    finally:
        torch.set_num_threads(threads)


def has_gpu() -> bool:
    """Whether this machine has a GPU that training can use."""
    import torch

    return torch.cuda.is_available()
