"""Tests of training on a GPU: graphs change nothing, a resume is exact, the loss is that of fp32 on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from gru.config import ModelConfig, TrainConfig
from gru.corpus.batches import LaneOrder, LaneReader
from gru.model.language_model import GRULanguageModel
from gru.model.transformer import Transformer, TransformerConfig
from gru.training import checkpoint as checkpoints
from gru.training.learner import Diverged, Learner
from gru.training.sampler import sample_ids
from gru.training.step_graph import StepGraph

VOCAB, END = 96, 0
MODEL = ModelConfig(embedding=128, hidden=256, layers=2, dropout=0.2)
CONFIG = TrainConfig(steps=30, batch_size=12, sequence_length=16, warmup_steps=2, seed=3)
TOKENS = 12 * (16 * 7 + 5)
"""An epoch of 7 whole windows and a short one in each lane."""


def corpus() -> np.ndarray:
    """Return text in which each token depends on the two before it."""
    chance = np.random.default_rng(0)
    table = chance.integers(1, VOCAB, (VOCAB, VOCAB))
    tokens = [1, 2]
    for surprise in chance.random(TOKENS - 2) < 0.05:
        tokens.append(int(chance.integers(1, VOCAB)) if surprise else int(table[tokens[-1] % 4, tokens[-2] % 4]))
    return np.array(tokens, dtype=np.uint16)


def learner(device: torch.device, model: ModelConfig = MODEL, config: TrainConfig = CONFIG, **others: Any) -> Learner:
    return Learner(model, config, VOCAB, END, device=device, **others)


def train(learner: Learner, steps: int) -> list[float]:
    tokens = corpus()
    order = LaneOrder([len(tokens)], CONFIG.seed, CONFIG.batch_size, CONFIG.sequence_length)
    with LaneReader(order, lambda index: tokens, END, learner.lanes) as reader:
        losses = [learner.train_step(*reader.batch(learner.step)) for _ in range(steps - learner.step)]
    learner.confirm()
    return torch.stack(losses).tolist()


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    tensors = learner.checkpoint({}).tensors
    return {f"{stem}/{name}": tensor for stem, group in tensors.items() for name, tensor in group.items()}


def assert_same(one: Learner, other: Learner) -> None:
    expected = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_graph_computes_what_its_operations_compute(device: torch.device) -> None:
    """The epoch ends at steps 8, 16 and 24 with a short window, which has a graph of its own."""
    graphs, plain = learner(device), learner(device)
    plain._run = StepGraph(plain._compute, device, record=False)
    assert train(graphs, 30) == train(plain, 30)
    assert_same(graphs, plain)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_training_has_the_same_bits_with_samples(device: torch.device, cell: str) -> None:
    model = MODEL.model_copy(update={"cell": cell})
    without, with_samples = learner(device, model), learner(device, model)
    train(without, 30)
    samples = []
    for step in range(1, 31):
        train(with_samples, step)
        assert isinstance(with_samples.average, GRULanguageModel)
        samples.append(sample_ids(with_samples.average, [1, 2], END, len(with_samples.heldout_lanes)))
    assert_same(with_samples, without)
    assert samples[0] != samples[-1]


@pytest.mark.parametrize("stop", [1, 11, 17])
def test_resuming_from_a_checkpoint_is_bit_identical(tmp_path: Path, device: torch.device, stop: int) -> None:
    undisturbed = learner(device)
    losses = train(undisturbed, 30)
    first = learner(device)
    train(first, stop)
    checkpoints.save(first.checkpoint({"identity": {}}), str(tmp_path))
    second = learner(device)
    second.restore(checkpoints.load(str(tmp_path)))
    assert train(second, 30) == losses[stop:]
    assert_same(second, undisturbed)


def test_a_checkpoint_moves_between_cpu_and_gpu(tmp_path: Path, device: torch.device) -> None:
    first = learner(device)
    train(first, 5)
    checkpoints.save(first.checkpoint({"identity": {}}), str(tmp_path))
    second = learner(torch.device("cpu"), MODEL.model_copy(update={"precision": "fp32"}))
    second.restore(checkpoints.load(str(tmp_path)))
    assert train(second, 20) == pytest.approx(train(first, 20), abs=0.02)


def test_divergence_is_noticed_late_and_ends_before_its_step(device: torch.device) -> None:
    worker = learner(device)
    train(worker, 12)
    worker.state_LBH[:, 4] = float("inf")
    before = weights(worker)
    window = np.full((16, 12), 3), np.ones((16, 12), dtype=np.int64)
    for _ in range(5):
        worker.train_step(*window)
    with pytest.raises(Diverged, match=r"the gradient's norm is (nan|inf) at step 13"):
        worker.confirm()
    assert worker.step == 12
    for name, tensor in weights(worker).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert worker.suspects(*window, lambda: None) == [4]


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mingru"])
def test_the_loss_is_that_of_fp32_on_the_cpu(device: torch.device, cell: str) -> None:
    """60 equal steps, dropout included, with the same masks."""
    config = CONFIG.model_copy(update={"steps": 60})
    on_gpu = learner(device, MODEL.model_copy(update={"cell": cell}), config)
    on_cpu = learner(torch.device("cpu"), MODEL.model_copy(update={"cell": cell, "precision": "fp32"}), config)
    actual, expected = train(on_gpu, 60), train(on_cpu, 60)
    assert np.mean(actual[-10:]) == pytest.approx(np.mean(expected[-10:]), abs=0.01)
    heldout = corpus()[:501]
    assert on_gpu.heldout_loss(heldout) == pytest.approx(on_cpu.heldout_loss(heldout), abs=0.01)


def test_a_transformer_trains_in_a_graph_too(device: torch.device) -> None:
    def build(config: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype) -> Transformer:
        return Transformer(TransformerConfig(width=64, layers=2, heads=2, feed_forward=128), vocab_size, matmul_dtype)

    losses = train(learner(device, build=build), 30)
    assert losses[-1] < losses[0]


def start(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    multiprocessing.start_processes(function, arguments, processes, start_method="spawn")


def _train_with_nccl(rank: int, world: int, rendezvous: str, results: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=world, device_id=device
    )
    total = torch.ones(1000, device=device)

    def double(time_steps: int) -> None:
        dist.all_reduce(total)
        total.mul_(2)

    graph = StepGraph(double, device)
    for _ in range(5):  # once as it is, then recorded and replayed
        graph(1)
    assert total.unique().tolist() == [(2 * world) ** 5]
    worker = Learner(MODEL, CONFIG, VOCAB, END, rank, world, device)
    totals = worker.sum_over_workers(train(worker, 20))
    checkpoint = worker.checkpoint({"identity": {}, "losses": totals})
    if rank == 0:
        checkpoints.save(checkpoint, results)
    dist.barrier()
    os._exit(0)


def test_all_cards_train_together_through_nccl(tmp_path: Path, device: torch.device) -> None:
    """With one card, its sums over workers are still those of NCCL inside a graph."""
    world = min(torch.cuda.device_count(), CONFIG.batch_size)
    results = tmp_path / "results"
    results.mkdir()
    start(_train_with_nccl, (world, str(tmp_path / "rendezvous"), str(results)), world)
    losses = train(learner(device), 20)
    assert checkpoints.load(str(results)).state["losses"] == pytest.approx(losses, abs=0.01)
