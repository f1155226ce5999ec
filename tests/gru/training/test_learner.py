"""Tests of training without Ray: it learns, a resume is exact, and the number of workers does not change results."""

import copy
import itertools
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
from gru.model.precision import Precision
from gru.training import checkpoint as checkpoints
from gru.training.learner import Diverged, Learner, learning_rate, own_lanes

MODEL = ModelConfig(embedding=16, hidden=24, layers=2, dropout=0.2, precision="fp32")
PRECISIONS: list[Precision] = ["fp32", "bf16"]
CONFIG = TrainConfig(steps=12, batch_size=6, sequence_length=8, warmup_steps=2, seed=3)
VOCAB, END = 20, 0


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, 800).astype(np.uint16)


def train(learner: Learner, steps: int) -> list[float]:
    """Train up to step `steps`, and return the losses of the learner's own lanes."""
    corpus, losses = tokens(), []
    order = LaneOrder([400, 400], CONFIG.seed, CONFIG.batch_size, CONFIG.sequence_length)
    with LaneReader(order, lambda i: corpus[400 * i : 400 * (i + 1)], END, learner.lanes) as reader:
        while learner.step < steps:
            losses.append(float(learner.train_step(*reader.batch(learner.step))))
    return losses


def learner(rank: int = 0, world: int = 1, precision: Precision = "fp32", config: TrainConfig = CONFIG) -> Learner:
    return Learner(MODEL.model_copy(update={"precision": precision}), config, VOCAB, END, rank, world)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    parts = {"model": learner.model, "ema": learner.average}
    return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resuming_from_a_checkpoint_is_bit_identical(tmp_path: Path, precision: Precision) -> None:
    undisturbed = learner(precision=precision)
    losses = train(undisturbed, 12)
    first = learner(precision=precision)
    train(first, 5)
    checkpoints.save(first.checkpoint({"identity": {}}), str(tmp_path))
    torch.manual_seed(99)  # nothing may depend on the global generator
    second = learner(precision=precision)
    second.restore(checkpoints.load(str(tmp_path)))
    assert second.step == 5
    assert train(second, 12) == losses[5:]
    expected = weights(undisturbed)
    for name, tensor in weights(second).items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(second.state_LBH, undisturbed.state_LBH)


def test_a_run_that_starts_from_given_weights_resumes_bit_identically(tmp_path: Path) -> None:
    """All but the weights starts anew; a resume needs the checkpoint alone."""
    earlier = learner()
    train(earlier, 12)
    given = {name: tensor.clone() for name, tensor in earlier.average.state_dict().items()}
    undisturbed, first = learner(), learner()
    for each in (undisturbed, first):
        each.start_from(given)
        tensors = each.checkpoint({}).tensors
        for part in ("model", "ema"):
            assert all(torch.equal(tensors[part][name], tensor) for name, tensor in given.items())
        assert each.step == 0 and not any(map(torch.any, [*tensors["optimizer"].values(), *tensors["lanes"].values()]))
    losses = train(undisturbed, 12)
    train(first, 5)
    checkpoints.save(first.checkpoint({"identity": {}}), str(tmp_path))
    second = learner()
    second.restore(checkpoints.load(str(tmp_path)))
    assert train(second, 12) == losses[5:]
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())
    assert losses[0] < train(learner(), 1)[0], "it has learned before"


def test_precisions_agree_on_the_loss() -> None:
    exact, rounded = learner(), learner(precision="bf16")
    assert train(rounded, 12) == pytest.approx(train(exact, 12), rel=5e-3)
    assert rounded.heldout_loss(tokens()[:301]) == pytest.approx(exact.heldout_loss(tokens()[:301]), rel=5e-3)
    assert all(tensor.dtype == torch.float32 for tensor in weights(rounded).values())


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_step_computes_what_a_plain_one_does(clip: float) -> None:
    """Bit for bit: flat buffers, and decisions on the device, change nothing. Sizes without padding, for the norm."""
    model = ModelConfig(embedding=32, hidden=64, layers=2, dropout=0.2, precision="fp32")
    config = CONFIG.model_copy(update={"clip": clip})
    worker = Learner(model, config, 64, END)
    plain = Learner(model, config, 64, END).model
    average = copy.deepcopy(plain)
    matrices = {name: p for name, p in plain.named_parameters() if p.dim() > 1}
    vectors = {name: p for name, p in plain.named_parameters() if p.dim() == 1}
    ordered = [*matrices.values(), *vectors.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(matrices.values()), "weight_decay": config.weight_decay},
            {"params": list(vectors.values()), "weight_decay": 0.0},
        ],
        betas=(0.9, config.beta2),
        fused=True,
    )
    state_LBH = plain.initial_state(6)
    for step in range(6):
        window = np.random.default_rng(step).integers(1, 64, (9, 6))
        loss = worker.train_step(window[:-1], window[1:])
        masks = plain.dropout_masks(range(6), 6, worker._inputs.key)
        total, state_LBH = plain.loss(*map(torch.from_numpy, (window[:-1], window[1:])), state_LBH.detach(), masks)
        optimizer.zero_grad()
        (total / 48).backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in ordered]))
        for parameter in ordered:
            parameter.grad *= (clip / (norm + 1e-6)).clamp(max=1)
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(learning_rate(config, step)))
        optimizer.step()
        weight = 1 - min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), plain.parameters(), strict=True):
                mean.lerp_(parameter, torch.tensor(weight))
        assert loss == total / 48 and worker.confirm() == norm and torch.equal(worker.state_LBH, state_LBH)
    assert (norm > clip) == (clip < 1)
    for one, other in ((worker.model, plain), (worker.average, average)):
        for (name, actual), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(actual, expected), name


def test_after_divergence_training_goes_on_as_if_the_step_had_not_been(tmp_path: Path) -> None:
    undisturbed, disturbed = learner(), learner()
    train(undisturbed, 12)
    train(disturbed, 5)
    state_LBH = disturbed.state_LBH.clone()
    disturbed.state_LBH[0, 2] = float("nan")
    for _ in range(4):
        disturbed.train_step(np.ones((8, 6), dtype=np.int64), np.ones((8, 6), dtype=np.int64))
    with pytest.raises(Diverged):
        disturbed.confirm()
    disturbed.state_LBH.copy_(state_LBH)
    train(disturbed, 12)
    assert disturbed.confirm() == undisturbed.confirm()
    expected = undisturbed.checkpoint({}).tensors
    for stem, tensors in disturbed.checkpoint({}).tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[stem][name]), (stem, name)


def test_it_learns() -> None:
    config = TrainConfig(steps=150, batch_size=4, sequence_length=16, warmup_steps=5)
    worker = Learner(ModelConfig(embedding=32, hidden=32), config, VOCAB, END)
    corpus = np.tile(np.arange(1, 11, dtype=np.uint16), 200)
    order = LaneOrder([len(corpus)], 0, config.batch_size, config.sequence_length)
    with LaneReader(order, lambda i: corpus, END, worker.lanes) as reader:
        losses = [float(worker.train_step(*reader.batch(step))) for step in range(150)]
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.1)
    assert losses[-1] < 0.1
    assert worker.heldout_loss(corpus[:500]) < 0.2


def start(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Run `function(rank, *arguments)` in that many processes, all forked from one that has imported torch."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


def _train_worker(
    rank: int, world: int, rendezvous: str, results: str, precision: Precision, config: TrainConfig = CONFIG
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    worker = learner(rank, world, precision, config)
    losses = train(worker, 8)
    totals = worker.sum_over_workers(losses)
    heldout = worker.heldout_loss(tokens()[:301])
    checkpoint = worker.checkpoint({"identity": {}, "losses": totals, "heldout": heldout})
    if rank == 0:
        checkpoints.save(checkpoint, results)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while another is still connected


@pytest.mark.slow
@pytest.mark.parametrize(("world", "precision", "rounding"), [(2, "fp32", 1e-5), (4, "fp32", 1e-5), (2, "bf16", 1e-3)])
def test_workers_share_the_lanes_and_compute_the_same(
    tmp_path: Path, world: int, precision: Precision, rounding: float
) -> None:
    """6 lanes on 4 workers are not shared equally, and each lane's carried state still moves with it."""
    alone = learner(precision=precision)
    losses = train(alone, 8)
    results = tmp_path / "results"
    results.mkdir()
    start(_train_worker, (world, str(tmp_path / "rendezvous"), str(results), precision), world)
    together = checkpoints.load(str(results))
    assert together.state["losses"] == pytest.approx(losses, rel=rounding)
    assert together.state["heldout"] == pytest.approx(alone.heldout_loss(tokens()[:301]), rel=rounding)
    lanes = together.tensors["lanes"]["state"]
    # The largest single difference depends on the seed: AdamW makes whole steps of gradients near 0.
    assert (lanes - alone.state_LBH).norm() < 10 * rounding * alone.state_LBH.norm()
    rest = learner(precision=precision)
    rest.restore(together)
    assert train(rest, 12) == pytest.approx(train(alone, 12), rel=10 * rounding)


def _resume_worker(rank: int, world: int, rendezvous: str, first: str, last: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    worker = learner(rank, world)
    if first == last:
        train(worker, 9)
    elif Path(first).exists():
        worker.restore(checkpoints.load(first))
        train(worker, 9)
    else:
        train(worker, 4)
    checkpoint = worker.checkpoint({"identity": {}})
    if rank == 0:
        checkpoints.save(checkpoint, last if Path(first).exists() or first == last else first)
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
def test_three_workers_resume_bit_identically(tmp_path: Path) -> None:
    """The order of a sum of more than two numbers matters, and must not depend on when the workers started."""
    undisturbed, half, resumed = (str(tmp_path / name) for name in ("undisturbed", "half", "resumed"))
    for turn, (first, last) in enumerate([(undisturbed, undisturbed), (half, resumed), (half, resumed)]):
        start(_resume_worker, (3, str(tmp_path / f"rendezvous{turn}"), first, last), 3)
    expected, actual = checkpoints.load(undisturbed), checkpoints.load(resumed)
    assert checkpoints.load(half).step == 4
    for stem, tensors in expected.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(actual.tensors[stem][name], tensor), (stem, name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_bitwise_elastic_any_number_of_workers_gives_the_same_bits(tmp_path: Path, precision: Precision) -> None:
    """6 lanes in 4 parts of unequal size, on 1, 2, 3 and 4 workers; the middle part of the tree crosses workers."""
    config = CONFIG.model_copy(update={"bitwise_elastic": 4})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = learner(precision=precision, config=config)
    losses = train(alone, 8)
    torch.set_num_threads(threads)
    assert losses == pytest.approx(train(learner(precision=precision), 8), rel=1e-5 if precision == "fp32" else 1e-3)
    expected = alone.checkpoint({})
    for world in (2, 3, 4):
        results = tmp_path / f"results{world}"
        arguments = (world, str(tmp_path / f"rendezvous{world}"), str(results), precision, config)
        start(_train_worker, arguments, world)
        together = checkpoints.load(str(results))
        assert together.state["losses"] == pytest.approx(losses, rel=1e-6)
        for stem, tensors in expected.tensors.items():
            for name, tensor in tensors.items():
                assert torch.equal(together.tensors[stem][name], tensor), (world, stem, name)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.model_copy(update={"bitwise_elastic": 3})])
def test_a_gradient_that_is_not_finite_changes_nothing_and_names_its_lanes(config: TrainConfig) -> None:
    worker = learner(config=config)
    train(worker, 3)
    worker.state_LBH[:, 4] = float("inf")
    before = worker.checkpoint({})
    window = (np.full((8, 6), 3, dtype=np.int64), np.ones((8, 6), dtype=np.int64))
    losses = [float(worker.train_step(*window)) for _ in range(3)]  # noticed some steps late
    with pytest.raises(Diverged, match=r"the gradient's norm is (nan|inf) at step 4"):
        worker.confirm()
    assert losses == [0, 0, 0] and worker.step == 3
    assert worker.suspects(*window, lambda: None) == [4]
    for stem, tensors in worker.checkpoint({}).tensors.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, before.tensors[stem][name], rtol=0, atol=0, equal_nan=True)


def test_every_lane_has_one_owner() -> None:
    for lanes, world, parts in [(6, 4, 0), (32, 3, 0), (5, 5, 0), (64, 1, 0), (6, 3, 4), (32, 4, 8), (7, 1, 3)]:
        config = TrainConfig(batch_size=lanes, workers=world, bitwise_elastic=parts)
        owned = [lane for rank in range(world) for lane in own_lanes(config, rank, world)]
        assert owned == list(range(lanes))


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] < 0.1 < rates[5] < rates[10]
    assert max(rates) == max(rates[9:12]) <= 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[11:]))
