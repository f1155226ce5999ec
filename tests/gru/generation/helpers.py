"""A small model, models that misbehave, and a receiver that records, for tests of the engine."""

import threading
import time

import numpy as np
import torch

from gru.config import ModelConfig
from gru.generation.engine import Engine
from gru.generation.request import Finish, Request
from gru.generation.sampling import Logprobs, SamplingParams
from gru.model.language_model import GRULanguageModel

END = 0
VOCAB = 301


class Recorder:
    """A receiver that records its calls. It ends the text after `stop_after` tokens."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs | None] = []
        self.notified = 0
        self.end: object = None
        self._stop_after = stop_after
        self._done = threading.Event()

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        self.tokens.append(token)
        self.logprobs.append(logprobs)
        return len(self.tokens) == self._stop_after

    def notify(self, end: Finish | Exception | None) -> None:
        self.notified += 1
        if end is not None:
            self.end = end
            self._done.set()

    def wait(self) -> "Recorder":
        assert self._done.wait(60), "the request did not end"
        return self


class SlowModel(torch.nn.Module):
    """The model with a pause in each call; it fails on request, and records the shapes of its inputs."""

    def __init__(self, model: GRULanguageModel) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = model.vocab_size
        self.initial_state = model.initial_state
        self.shapes: list[tuple[int, ...]] = []
        self.pause = 0.0
        self.failing = False

    def features(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes.append(tuple(tokens.shape))
        time.sleep(self.pause)
        if self.failing:
            raise RuntimeError("out of luck")
        return self.model.features(tokens, state)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.logits(x)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, state = self.features(tokens, state)
        return self.logits(x), state


def make_model(
    embedding: int = 24, hidden: int = 37, layers: int = 2, vocab_size: int = VOCAB, end_of_text: int = END
) -> GRULanguageModel:
    """Return a random model whose documents do not end by chance."""
    torch.manual_seed(0)
    model = GRULanguageModel(ModelConfig(embedding=embedding, hidden=hidden, layers=layers), vocab_size).eval()
    with torch.no_grad():
        model.output_bias[end_of_text] = -100
    return model


def prompts(count: int) -> list[list[int]]:
    """Return random prompts of 0 to 199 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 200, count)
    return [generator.integers(1, VOCAB, length).tolist() for length in lengths]


def params(i: int) -> SamplingParams:
    """Return one of four kinds of sampling parameters, with the seed i."""
    return SamplingParams(i, *[(1.0, 0, 1.0), (0.8, 20, 1.0), (1.2, 0, 0.9), (0.0, 0, 1.0)][i % 4])


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams, int]]) -> list[list[int]]:
    """Submit all requests at once and return their tokens."""
    recorders = [Recorder() for _ in requests]
    for request, recorder in zip(requests, recorders, strict=True):
        engine.submit(Request(*request, recorder))
    return [recorder.wait().tokens for recorder in recorders]
