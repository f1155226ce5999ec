"""Speed and memory of training, each number beside an alternative that is measured in the same run.

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
    """Return the shortest time of each side in seconds.

    The sides take turns, so that the load of the machine affects all of them.
    """
    times: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if turn:  # the first turn warms up
                times[name] = min(times.get(name, float("inf")), time.perf_counter() - started)
    return times


def as_pytorch_example(learner: Learner) -> Learner:
    """Make a learner compute as PyTorch's word_language_model example does: torch.nn.GRU in fp32, all logits at once,
    F.cross_entropy."""

    def forward(gru: GRU, x_TBE: Tensor, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        out_TBH, last_1BH = gru.gru(x_TBE, h_BH.unsqueeze(0))
        return out_TBH, last_1BH[0]

    def loss(
        model: GRULanguageModel, inputs_TB: Tensor, targets_TB: Tensor, state: Tensor, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x_TBE, state = model.features(inputs_TB, state, masks)
        logits_TBV = F.linear(x_TBE, model.embedding.weight, model.output_bias)
        return F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten(), reduction="sum"), state

    for block in learner.model.blocks:
        block.cell.forward = MethodType(forward, block.cell)
    learner.model.loss = MethodType(loss, learner.model)
    return learner


def training_step(width: int, layers: int, vocabulary: int, batch_size: int, sequence_length: int) -> None:
    def side(precision: Precision) -> Learner:
        config = ModelConfig(embedding=width, hidden=width, layers=layers, precision=precision)
        return Learner(config, TrainConfig(batch_size=batch_size, sequence_length=sequence_length), vocabulary, 0)

    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequence_length + 1, batch_size))
    ours, theirs = side(AUTO), as_pytorch_example(side("fp32"))
    times = best(
        4 if batch_size * sequence_length > 4000 else 20,
        ours=lambda: ours.train_step(tokens[:-1], tokens[1:]),
        theirs=lambda: theirs.train_step(tokens[:-1], tokens[1:]),
    )
    rates = {name: batch_size * sequence_length / seconds for name, seconds in times.items()}
    show(
        f"training step, tokens/s: E = H = {width}, {layers} x, V = {vocabulary}, {batch_size} x {sequence_length}",
        f"ours ({AUTO}) {rates['ours']:,.0f}, torch.nn.GRU {rates['theirs']:,.0f}",
        rates["ours"] / rates["theirs"],
    )


def loss_after_equal_steps(text: Path | None) -> None:
    if text is None or not text.is_file():
        print(f"loss after equal steps: skipped: {'--text is not given' if text is None else f'{text} does not exist'}")
        return
    vocabulary, tokens = np.unique(np.frombuffer(text.read_bytes(), np.uint8), return_inverse=True)
    config = TrainConfig(steps=STEPS)
    sides: dict[str, Learner] = {}
    for precision in MATMUL_DTYPES:
        sides[precision] = Learner(ModelConfig(precision=precision), config, len(vocabulary) + 1, len(vocabulary))
    sides["torch.nn.GRU"] = as_pytorch_example(
        Learner(ModelConfig(precision="fp32"), config, len(vocabulary) + 1, len(vocabulary))
    )
    order = LaneOrder([len(tokens)], config.seed, config.batch_size, config.sequence_length)
    losses = {}
    for name, learner in sides.items():
        with LaneReader(order, lambda index: tokens, len(vocabulary), learner.lanes) as reader:
            losses[name] = np.mean([float(learner.train_step(*reader.batch(step))) for step in range(STEPS)][-20:])
    print(f"loss after {STEPS} steps: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def gru_layer(width: int, batch_size: int, sequence_length: int) -> None:
    """Compare a GRU layer, forward and backward, with the product of all its inputs and a matrix [H, 3 H]."""
    x_TBE = torch.randn(sequence_length, batch_size, width, requires_grad=True)
    h_BH, d_out_TBH = torch.zeros(batch_size, width), torch.randn(sequence_length, batch_size, width)
    layer = GRU(width, width, MATMUL_DTYPES[AUTO])
    rows = torch.randn(sequence_length * batch_size, width)
    factors = {name: (rows.to(dtype), torch.randn(width, 3 * width).to(dtype)) for name, dtype in MATMUL_DTYPES.items()}
    times = best(
        4,
        ours=lambda: layer(x_TBE, h_BH)[0].backward(d_out_TBH),
        fp32=lambda: torch.mm(*factors["fp32"]),
        bf16=lambda: torch.mm(*factors["bf16"]),
    )
    # The layer has this product for its inputs and once more for its states; backward has twice as many as forward.
    operations = 2 * sequence_length * batch_size * width * 3 * width
    rates = {name: (6 if name == "ours" else 1) * operations / seconds / 1e9 for name, seconds in times.items()}
    show(
        f"GRU layer, GFLOP/s: E = H = {width}, {batch_size} x {sequence_length}",
        f"ours ({AUTO}) {rates['ours']:.0f}, matrix product in bf16 {rates['bf16']:.0f}, in fp32 {rates['fp32']:.0f}",
        rates["ours"] / rates["bf16"],
    )


def loss_side(name: str) -> Work:
    """Return a function that computes the loss of 2,048 tokens over a vocabulary of 32,768, and its gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(2048, 512), torch.randn(32768, 512) / 20, torch.zeros(32768)]
    x_NE, weight_VE, bias_V = (tensor.requires_grad_() for tensor in inputs)
    targets_N = torch.randint(32768, (2048,))

    def ours() -> None:
        cross_entropy(x_NE, weight_VE, bias_V, targets_N, None, MATMUL_DTYPES[AUTO]).backward()

    def theirs() -> None:
        F.cross_entropy(F.linear(x_NE, weight_VE, bias_V), targets_N, reduction="sum").backward()

    def chunked() -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        F.linear_cross_entropy(
            x_NE, weight_VE, targets_N, linear_bias=bias_V, reduction="sum", options=options
        ).backward()

    return {"ours": ours, "theirs": theirs, "chunked": chunked}[name]


def added_memory(name: str) -> float:
    """Return the MiB that one computation of the loss adds to the peak memory of this process."""
    work = loss_side(name)
    before = peak_memory()
    work()
    return peak_memory() - before


def peak_memory() -> float:
    """Return the peak memory of this process in MiB. (getrusage would include that of the process that started it.)"""
    match = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024


def loss() -> None:
    names = ("ours", "theirs", "chunked")
    times = best(2, **{name: loss_side(name) for name in names})
    memory = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(added_memory, (name,))
    for other, label in (("theirs", "F.cross_entropy"), ("chunked", "F.linear_cross_entropy, chunked")):
        show(
            "loss, V = 32768",
            f"ours ({AUTO}) {times['ours']:.2f} s, {memory['ours']:,.0f} MiB, "
            f"{label} {times[other]:.2f} s, {memory[other]:,.0f} MiB",
            times[other] / times["ours"],
        )


def show(what: str, sides: str, ratio: float) -> None:
    """Print the numbers of two or more sides and a ratio."""
    print(f"{what}: {sides}: {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text file to compare losses on, such as tinyshakespeare.txt")
    arguments = parser.parse_args()
    print(f"bf16 matrix products are {bf16_advantage():.2f} x as fast as fp32 here: training uses {AUTO}", flush=True)
    training_step(512, 2, 65, 64, 128)
    training_step(512, 2, 8192, 64, 128)
    training_step(384, 1, 322, 32, 64)
    gru_layer(512, 64, 128)
    gru_layer(1024, 64, 64)
    loss()
    loss_after_equal_steps(arguments.text)
