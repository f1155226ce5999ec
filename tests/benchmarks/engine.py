"""Speed of the engine alone, compared with its matrix products, in bf16 with fp32, and with an earlier version.

python tests/benchmarks/engine.py STREAMS TOKENS

prints the tokens/s of the engine of whichever `gru` is imported: so an earlier version, which may lack packages that
its own benchmarks import, is measured by the same code. Hence nothing of `tests` is imported here.
"""

import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from gru.config import ModelConfig
from gru.generation.engine import Engine
from gru.generation.generate import Collector
from gru.generation.request import Request
from gru.generation.sampling import Logprobs, SamplingParams
from gru.model.inference import inference_model
from gru.model.language_model import GRULanguageModel

MODEL = ModelConfig(embedding=512, hidden=512, layers=2)
VOCABULARY = 2048
END = VOCABULARY - 1
STREAMS = 64
TRIALS = 4
THREADS = 1  # of torch, as in a replica


def show(what: str, sides: str, ratio: float | None = None) -> None:
    """Print the numbers of two or more sides, and a ratio."""
    print(f"{what:34} {sides}" + ("" if ratio is None else f": {ratio:.2f} x"), flush=True)


def model() -> GRULanguageModel:
    """Return a model that never generates the end-of-text id."""
    torch.manual_seed(0)
    endless = GRULanguageModel(MODEL, VOCABULARY).eval().requires_grad_(False)
    endless.output_bias[END] = -100
    return endless


def engine_rate(streams: int, tokens: int, receiver: type[Collector] = Collector, **options: Any) -> float:
    """Return the tokens/s of `streams` concurrent streams. options: those of `inference_model`."""
    torch.set_num_threads(THREADS)
    engine = Engine(inference_model(model(), **options), END, streams, streams)
    collectors = [receiver() for _ in range(streams)]
    started = time.perf_counter()
    for seed, collector in enumerate(collectors):
        engine.submit(Request([1], SamplingParams(seed), tokens, collector))
    for collector in collectors:
        collector.wait()
    rate = streams * tokens / (time.perf_counter() - started)
    engine.close()
    engine.join()
    return rate


class Discard(Collector):
    """A receiver that forgets the tokens."""

    def token(self, token: int, logprobs: Logprobs | None) -> bool:
        return False


def engine_memory(streams: int, tokens: int) -> int:
    """Return the resident bytes of a process in which an engine has generated `tokens` for each of its streams."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_engine_memory, (streams, tokens))


def _engine_memory(streams: int, tokens: int) -> int:
    engine_rate(streams, tokens, Discard)
    return psutil.Process().memory_info().rss


def products_rate(streams: int) -> float:
    """Return the tokens/s of the matrix products of a step alone."""
    width, hidden = MODEL.embedding, MODEL.hidden
    x, h = torch.randn(streams, width), torch.randn(streams, hidden)
    matrices = [(torch.randn(width, 3 * hidden), torch.randn(hidden, 3 * hidden)) for _ in range(MODEL.layers)]
    output = torch.randn(width, VOCABULARY)
    best = math.inf
    for _ in range(200):
        started = time.perf_counter()
        for from_x, from_h in matrices:
            torch.mm(x, from_x)
            torch.mm(h, from_h)
        torch.mm(x, output)
        best = min(best, time.perf_counter() - started)
    return streams / best


def rate_of(checkout: Path, streams: int, tokens: int) -> float:
    """Return the tokens/s of the engine in another checkout of this repository."""
    command = [sys.executable, "-P", __file__, str(streams), str(tokens)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def engine(against: Path | None) -> float:
    """Print the tokens/s of the engine, the best of several alternating trials. Return those of many streams."""
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        bound = products_rate(STREAMS)
    best: dict[int, float] = {}
    for streams, tokens in ((STREAMS, 150), (1, 500)):
        sides: dict[str, Callable[[], float]] = {
            "engine": partial(engine_rate, streams, tokens),
            "products in bf16": partial(engine_rate, streams, tokens, products="bf16"),
            "products in fp32": partial(engine_rate, streams, tokens, products="fp32"),
        }
        if against:
            sides["earlier version"] = partial(rate_of, against, streams, tokens)
        rates = [{side: measure() for side, measure in sides.items()} for _ in range(TRIALS)]
        fastest = {side: max(trial[side] for trial in rates) for side in sides}
        best[streams] = fastest.pop("engine")
        for side, rate in fastest.items():
            what = f"engine, 2 x 512, streams: {streams}"
            show(what, f"tokens/s {best[streams]:,.0f}, {side} {rate:,.0f}", best[streams] / rate)
    many, one = best[STREAMS], best[1]
    show("", f"{STREAMS} streams {many:,.0f}, 1 stream {one:,.0f}", many / one)
    show("", f"{STREAMS} streams {many:,.0f}, matrix products alone {bound:,.0f}", many / bound)
    return many


if __name__ == "__main__":
    print(max(engine_rate(*map(int, sys.argv[1:])) for _ in range(2)))  # the first run warms up
