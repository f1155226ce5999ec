"""How fast training is: each number next to another way of doing the same, measured in the same run.

python -m tests.benchmarks.model [--text PATH]
"""

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.model.gru_layer import GRU
from gru.model.language_model import GRULanguageModel
from gru.model.loss import cross_entropy
from gru.model.precision import MATMUL_DTYPES, Precision, bf16_advantage, resolve
from gru.training.learner import Learner

AUTO = resolve(ModelConfig(), torch.device("cpu"))
STEPS = 150
Work = Callable[[], object]


def best(repeats: int, **sides: Work) -> dict[str, float]:
    """The shortest time of each side in seconds; they take turns, so that both meet the same machine."""
    times: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if turn:  # the first one warms up
                times[name] = min(times.get(name, float("inf")), time.perf_counter() - started)
    return times


def plain(learner: Learner) -> Learner:
    """The same model as PyTorch's word_language_model example computes it: torch.nn.GRU in fp32, all logits,
    F.cross_entropy."""

    def recur(gru: GRU, x_TBE: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        out_TBH, last_1BH = gru.gru(x_TBE, h_BH.unsqueeze(0))
        return out_TBH, last_1BH[0]

    def loss(
        model: GRULanguageModel, inputs_TB: Tensor, targets_TB: Tensor, state: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_TBE, state = model.features(inputs_TB, state, masks)
        logits_TBV = F.linear(x_TBE, model.embedding.weight, model.output_bias)
        return F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten(), reduction="sum"), state

    for block in learner.model.blocks:
        block.cell.forward = MethodType(recur, block.cell)
    learner.model.loss = MethodType(loss, learner.model)
    return learner


def training_step(width: int, layers: int, vocabulary: int, lanes: int, window: int) -> None:
    def side(precision: Precision) -> Learner:
        config = ModelConfig(embedding=width, hidden=width, layers=layers, precision=precision)
        return Learner(config, TrainConfig(batch_size=lanes, sequence_length=window), vocabulary, 0)

    tokens = np.random.default_rng(0).integers(0, vocabulary, (window + 1, lanes))
    ours, theirs = side(AUTO), plain(side("fp32"))
    times = best(
        4 if lanes * window > 4000 else 20,
        ours=lambda: ours.train_step(tokens[:-1], tokens[1:]),
        theirs=lambda: theirs.train_step(tokens[:-1], tokens[1:]),
    )
    rates = {name: lanes * window / seconds for name, seconds in times.items()}
    show(
        f"training step, tokens/s: E = H = {width}, {layers} x, V = {vocabulary}, {lanes} x {window}",
        f"ours ({AUTO}) {rates['ours']:,.0f}, torch.nn.GRU {rates['theirs']:,.0f}",
        rates["ours"] / rates["theirs"],
    )


def loss_after_equal_steps(text: Path | None) -> None:
    if text is None or not text.is_file():
        print(f"loss after equal steps: skipped, {'no --text' if text is None else f'no file {text}'}")
        return
    vocabulary, tokens = np.unique(np.frombuffer(text.read_bytes(), np.uint8), return_inverse=True)
    config = TrainConfig(steps=STEPS)
    sides: dict[str, Learner] = {}
    for precision in MATMUL_DTYPES:
        sides[precision] = Learner(ModelConfig(precision=precision), config, len(vocabulary) + 1, len(vocabulary))
    sides["torch.nn.GRU"] = plain(Learner(ModelConfig(precision="fp32"), config, len(vocabulary) + 1, len(vocabulary)))
    order = LaneOrder([len(tokens)], config.seed, config.batch_size, config.sequence_length)
    losses = {}
    for name, learner in sides.items():
        with LaneReader(order, lambda index: tokens, len(vocabulary), learner.lanes) as reader:
            losses[name] = np.mean([float(learner.train_step(*reader.batch(step))[0]) for step in range(STEPS)][-20:])
    print(f"loss after {STEPS} steps: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def recurrence(width: int, lanes: int, window: int) -> None:
    """Against one product of all the window's inputs with the input matrix: [T B, H] x [H, 3 H]."""
    x_TBE = torch.randn(window, lanes, width, requires_grad=True)
    h_BH, d_out_TBH = torch.zeros(lanes, width), torch.randn(window, lanes, width)
    layer = GRU(width, width, MATMUL_DTYPES[AUTO])
    rows = torch.randn(window * lanes, width)
    factors = {name: (rows.to(dtype), torch.randn(width, 3 * width).to(dtype)) for name, dtype in MATMUL_DTYPES.items()}
    times = best(
        4,
        ours=lambda: layer(x_TBE, h_BH)[0].backward(d_out_TBH),
        fp32=lambda: torch.mm(*factors["fp32"]),
        bf16=lambda: torch.mm(*factors["bf16"]),
    )
    product = 2 * window * lanes * width * 3 * width  # of the inputs; of the states as many; backward, twice both
    rates = {name: (6 if name == "ours" else 1) * product / seconds / 1e9 for name, seconds in times.items()}
    show(
        f"recurrence, GFLOP/s: E = H = {width}, {lanes} x {window}",
        f"ours ({AUTO}) {rates['ours']:.0f}, product in bf16 {rates['bf16']:.0f}, in fp32 {rates['fp32']:.0f}",
        rates["ours"] / rates["bf16"],
    )


def loss_side(name: str) -> Work:
    """The loss of 2,048 tokens over a vocabulary of 32,768, and its gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(2048, 512), torch.randn(32768, 512) / 20, torch.zeros(32768)]
    x_NE, weight_VE, bias_V = (tensor.requires_grad_() for tensor in inputs)
    targets_N = torch.randint(32768, (2048,))

    def ours() -> None:
        cross_entropy(x_NE, weight_VE, bias_V, targets_N, None, MATMUL_DTYPES[AUTO]).backward()

    def theirs() -> None:
        F.cross_entropy(F.linear(x_NE, weight_VE, bias_V), targets_N, reduction="sum").backward()

    def torchs_chunked() -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        F.linear_cross_entropy(
            x_NE, weight_VE, targets_N, linear_bias=bias_V, reduction="sum", options=options
        ).backward()

    return {"ours": ours, "theirs": theirs, "chunked": torchs_chunked}[name]


def added_memory(name: str) -> float:
    """MiB that one loss adds to the peak of a process of its own."""
    work = loss_side(name)
    before = peak()
    work()
    return peak() - before


def peak() -> float:
    """Most memory that this process has had, in MiB. (getrusage would count that of the process that started it.)"""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def loss() -> None:
    names = ("ours", "theirs", "chunked")
    times = best(2, **{name: loss_side(name) for name in names})
    memory = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(added_memory, (name,))
    for other, words in (("theirs", "F.cross_entropy"), ("chunked", "F.linear_cross_entropy, chunked")):
        show(
            "loss, V = 32768",
            f"ours ({AUTO}) {times['ours']:.2f} s, {memory['ours']:,.0f} MiB, "
            f"{words} {times[other]:.2f} s, {memory[other]:,.0f} MiB",
            times[other] / times["ours"],
        )


def show(what: str, sides: str, ratio: float) -> None:
    print(f"{what}: {sides}: {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="text to compare losses on, such as tinyshakespeare.txt")
    arguments = parser.parse_args()
    print(f"bf16 products are {bf16_advantage():.2f} x as fast as fp32 here: training takes {AUTO}", flush=True)
    training_step(512, 2, 65, 64, 128)
    training_step(512, 2, 8192, 64, 128)
    training_step(384, 1, 322, 32, 64)
    recurrence(512, 64, 128)
    recurrence(1024, 64, 64)
    loss()
    loss_after_equal_steps(arguments.text)
