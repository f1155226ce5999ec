"""Training on one GPU, each figure beside an alternative that is measured in the same run (make bench-gpu).

It needs torch, numpy, pydantic and safetensors, and a card with bf16 products.
"""

import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.model.gru_layer import GRU
from gru.training import checkpoint as checkpoints
from gru.training.learner import Learner

DEVICE = torch.device("cuda", 0)
GPU_PRESET = ModelConfig(embedding=1024, hidden=1024, layers=3, dropout=0.1), (256, 256), 16_384
MEDIUM = ModelConfig(embedding=1024, hidden=1024, layers=2), (64, 128), 8_192
SHAKESPEARE = ModelConfig(embedding=128, hidden=512, dropout=0.15), (32, 64), 322
COMPARED_STEPS = 300
Work = Callable[[], object]


def seconds(work: Work, least: float = 1.0, rounds: int = 3) -> float:
    """Return the shortest mean time of a call, over rounds of many calls."""
    for _ in range(4):  # compiles, records
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    calls = max(3, int(least / rounds / (time.perf_counter() - started)))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return min(times)


def product_rate() -> float:
    """Return the FLOP/s of a large product in bf16."""
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: torch.mm(left, right))


class EagerModel(nn.Module):
    """The same model as PyTorch's documentation would have it: torch.nn.GRU under autocast, F.cross_entropy."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.embedding)
        self.norms = nn.ModuleList(nn.LayerNorm(config.embedding, bias=False) for _ in range(config.layers + 1))
        self.grus = nn.ModuleList(nn.GRU(config.embedding, config.hidden) for _ in range(config.layers))
        same = config.embedding == config.hidden
        self.projects = nn.ModuleList(
            nn.Identity() if same else nn.Linear(config.hidden, config.embedding, bias=False)
            for _ in range(config.layers)
        )
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, inputs_TB: Tensor, targets_TB: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x_TBE, after = self.embedding(inputs_TB), []
        for norm, gru, project, state in zip(self.norms, self.grus, self.projects, states, strict=False):
            out_TBH, last = gru(self.dropout(norm(x_TBE)), state)
            x_TBE = x_TBE + project(out_TBH)
            after.append(last.detach())
        logits_TBV = F.linear(self.dropout(self.norms[-1](x_TBE)), self.embedding.weight, self.bias)
        return F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten()), after


def eager_step(config: ModelConfig, batch: tuple[int, int], vocab_size: int) -> Work:
    """Return a training step of `EagerModel`."""
    lanes, time_steps = batch
    model = EagerModel(config, vocab_size).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(vocab_size, (time_steps + 1, lanes), device=DEVICE)
    states = [torch.zeros(1, lanes, config.hidden, device=DEVICE) for _ in range(config.layers)]

    def step() -> None:
        nonlocal states
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss, states = model(tokens[:-1], tokens[1:], states)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_learner(config: ModelConfig, batch: tuple[int, int], vocab_size: int) -> Learner:
    lanes, time_steps = batch
    return Learner(config, TrainConfig(batch_size=lanes, sequence_length=time_steps), vocab_size, 0, device=DEVICE)


def our_step(learner: Learner) -> Work:
    lanes, time_steps, vocab_size = learner.config.batch_size, learner.config.sequence_length, learner.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (time_steps + 1, lanes))
    return lambda: learner.train_step(tokens[:-1], tokens[1:])


def training_step(name: str, config: ModelConfig, batch: tuple[int, int], vocab_size: int, peak: float) -> Learner:
    """Print the time of a whole step, ours and that of `EagerModel`."""
    learner = our_learner(config, batch, vocab_size)
    ours, theirs = seconds(our_step(learner)), seconds(eager_step(config, batch, vocab_size))
    matrices = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.dim() > 1)
    tokens = batch[0] * batch[1]
    print(
        f"{name}: {ours * 1e3:.2f} ms, {tokens / ours:,.0f} tokens/s, "
        f"{6 * matrices * tokens / ours / peak:.1%} of a bf16 product; "
        f"eager cuDNN {theirs * 1e3:.2f} ms: {theirs / ours:.2f} x"
    )
    return learner


def recurrence(lanes: int, time_steps: int, hidden: int) -> None:
    """Print the time of one layer, forward and backward, ours and cuDNN's in bf16."""
    ours = GRU(hidden, hidden, torch.bfloat16).to(DEVICE)
    theirs = nn.GRU(hidden, hidden).to(DEVICE, torch.bfloat16)
    theirs.flatten_parameters()
    x_TBE = torch.randn(time_steps, lanes, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    h_BH = torch.zeros(lanes, hidden, device=DEVICE)
    d_out_TBH = torch.randn_like(x_TBE)

    def our_pass() -> None:
        out_TBH, _ = ours(x_TBE, h_BH)
        torch.autograd.grad(out_TBH, [x_TBE, *ours.parameters()], d_out_TBH)

    def their_pass() -> None:
        out_TBH, _ = theirs(x_TBE, h_BH.bfloat16().unsqueeze(0))
        torch.autograd.grad(out_TBH, [x_TBE, *theirs.parameters()], d_out_TBH)

    mine, other = seconds(our_pass), seconds(their_pass)
    print(
        f"recurrence, H {hidden}, B {lanes}, T {time_steps}: {mine * 1e3:.2f} ms, "
        f"cuDNN {other * 1e3:.2f} ms: {other / mine:.2f} x"
    )


def waits(learner: Learner) -> None:
    """Print the shares of time that training waits for data, and for checkpoints at one every 30 s."""
    lanes, time_steps = learner.config.batch_size, learner.config.sequence_length
    tokens = np.random.default_rng(0).integers(1, learner.model.vocab_size, 1 << 22).astype(np.uint16)
    order = LaneOrder([len(tokens)], 0, lanes, time_steps)
    waited = 0.0
    with LaneReader(order, lambda index: tokens, 0, learner.lanes) as reader:
        started = time.perf_counter()
        while time.perf_counter() - started < 5:
            begun = time.perf_counter()
            batch = reader.batch(learner.step)
            waited += time.perf_counter() - begun
            learner.train_step(*batch)
            if learner.step % learner.config.log_steps == 0:
                learner.confirm()
        learner.confirm()
        data = waited / (time.perf_counter() - started)
    started = time.perf_counter()
    checkpoint = learner.checkpoint({})
    took = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        checkpoints.save(checkpoint, directory)
        written = time.perf_counter() - started
    print(f"waiting for data {data:.2%}, for checkpoints {took / 30:.2%} ({took:.2f} s; written in {written:.1f} s)")


def loss_after_equal_steps() -> None:
    """Print the mean loss of the last 20 of equal steps on the standard library's source, byte by byte."""
    source = b"\0".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    tokens = np.frombuffer(source, np.uint8).astype(np.uint16)
    config = TrainConfig(steps=COMPARED_STEPS)
    losses = {}
    for name, device in (("ours", DEVICE), ("fp32 on the CPU", torch.device("cpu"))):
        precision = "bf16" if device is DEVICE else "fp32"
        model = ModelConfig(embedding=128, hidden=256, dropout=0.15, precision=precision)
        learner = Learner(model, config, 257, 256, device=device)
        order = LaneOrder([len(tokens)], config.seed, config.batch_size, config.sequence_length)
        with LaneReader(order, lambda index: tokens, 256, learner.lanes) as reader:
            every = [learner.train_step(*reader.batch(step)) for step in range(config.steps)]
        losses[name] = float(torch.stack(every[-20:]).mean())
    print(f"loss after {COMPARED_STEPS} equal steps: " + ", ".join(f"{name} {x:.4f}" for name, x in losses.items()))


def main() -> None:
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    peak = product_rate()
    print(f"bf16 product: {peak / 1e12:.0f} TFLOP/s")
    for lanes, time_steps, hidden in ((64, 128, 1024), (256, 256, 1024), (64, 128, 512), (64, 128, 2048)):
        recurrence(lanes, time_steps, hidden)
    training_step("shakespeare", *SHAKESPEARE, peak)
    training_step("2 x 1024, 64 x 128, V 8,192", *MEDIUM, peak)
    waits(training_step("gpu preset", *GPU_PRESET, peak))
    loss_after_equal_steps()


if __name__ == "__main__":
    main()
