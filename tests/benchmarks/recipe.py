"""An ablation of the training recipe: the held-out loss after the same number of steps, with one change at a time.

python -m tests.benchmarks.recipe CONFIG DATASET [--set K=V ...] [--seeds N] [--only NAME ...]

DATASET is the dataset directory of CONFIG, which the result of `jobs.prepare` names. Each training has one thread, and
one runs on each core: the losses do not depend on speed.
T time, B lanes, E embedding.
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru.config import ModelConfig, PipelineConfig, changed, load
from gru.corpus.batches import LaneOrder, LaneReader, stream_batches
from gru.corpus.dataset import Dataset, open_dataset
from gru.model.language_model import GRULanguageModel
from gru.model.loss import cross_entropy, stream_loss
from gru.training.learner import Learner


@dataclass(frozen=True)
class Variant:
    """A change to the recipe: to the configuration, the built model, the model's class, or the order of text."""

    overrides: tuple[str, ...] = ()
    alter: Callable[[GRULanguageModel], None] = lambda model: None
    build: type[GRULanguageModel] = GRULanguageModel
    order: type[LaneOrder] = LaneOrder
    batch_scale: float = 1
    """Factor of the batch size; the sequence length is divided by it."""


class Untied(GRULanguageModel):
    """A model whose output layer does not share the embedding's weights."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.output = nn.Parameter(torch.randn_like(self.embedding.weight) * 0.02)

    def loss(self, tokens_TB: Tensor, targets_TB: Tensor, state: Tensor, *rest: Any, **named: Any) -> Any:
        (masks,) = rest or (None,)
        x_TBE, state = self.features(tokens_TB, state, masks)
        weights_TB = named.get("weights_TB")
        weights_N = None if weights_TB is None else weights_TB.flatten()
        x_NE, targets_N = x_TBE.flatten(0, 1), targets_TB.flatten()
        return cross_entropy(x_NE, self.output, self.output_bias, targets_N, weights_N, self.matmul_dtype), state


class Resetting(GRULanguageModel):
    """A model whose state is reset at the start of each document, which follows the last id of the vocabulary."""

    def features(self, tokens_TB: Tensor, state_LBH: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ends_TB = tokens_TB == self.vocab_size - 1
        starts = sorted({0, *ends_TB.any(1).nonzero().flatten().tolist()})
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(tokens_TB)], strict=True):
            state_LBH = state_LBH * ~ends_TB[start, :, None]
            x_TBE, state_LBH = super().features(tokens_TB[start:stop], state_LBH, masks)
            parts.append(x_TBE)
        return torch.cat(parts), state_LBH


class Shifted(LaneOrder):
    """An order in which each epoch starts at another position and wraps around."""

    def slices(self, epoch: int, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        stretch = self.epoch(epoch).stretch
        total = stretch * self.lanes
        first = (lane * stretch + start + epoch * 0x9E3779B97F4A7C15) % total
        last = first + stop - start
        parts = super().slices(epoch, 0, first, min(last, total))
        return parts + (super().slices(epoch, 0, 0, last - total) if last > total else [])


class WeightDropped(nn.GRU):
    """A GRU with dropout on its recurrent matrix (Merity et al. 2017, arXiv:1708.02182)."""

    share = 0.2

    @property
    def all_weights(self) -> list[list[Tensor]]:
        [[weight_ih, weight_hh, *biases]] = super().all_weights
        return [[weight_ih, F.dropout(weight_hh, self.share, self.training), *biases]]


def without_residual(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: (outputs[0] - inputs[0], outputs[1]))


def without_norm(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.norm = nn.Identity()


def update_gate_bias(value: float) -> Callable[[GRULanguageModel], None]:
    def alter(model: GRULanguageModel) -> None:
        for block in model.blocks:
            with torch.no_grad():
                block.cell.gru.bias_ih_l0.chunk(3)[1].fill_(value)

    return alter


def dropout_of_each_token(share: float) -> Callable[[GRULanguageModel], None]:
    def drop(module: nn.Module, inputs: Any, x_TBE: Tensor) -> Tensor:
        return F.dropout(x_TBE, share, module.training)

    def alter(model: GRULanguageModel) -> None:
        for norm in [model.norm, *(block.norm for block in model.blocks)]:
            norm.register_forward_hook(drop)

    return alter


def weight_drop(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.cell.gru.__class__ = WeightDropped


def embedding_dropout(share: float) -> Callable[[GRULanguageModel], None]:
    """Drop all occurrences, within a batch, of a share of the vocabulary (Gal & Ghahramani 2016, arXiv:1512.05287)."""

    def drop(module: nn.Module, inputs: Any, x_TBE: Tensor) -> Tensor:
        mask_V1 = F.dropout(torch.ones(module.num_embeddings, 1), share, module.training)
        return x_TBE * mask_V1[inputs[0]]

    return lambda model: model.embedding.register_forward_hook(drop) and None


AS_CONFIGURED = "as configured"
VARIANTS = {
    AS_CONFIGURED: Variant(),
    "no residual connection": Variant(alter=without_residual),
    "no norm before the cell": Variant(alter=without_norm),
    "untied output": Variant(build=Untied),
    "update gate's bias 0": Variant(alter=update_gate_bias(0.0)),
    "update gate's bias 2": Variant(alter=update_gate_bias(2.0)),
    "no dropout": Variant(("model.dropout=0.0",)),
    "dropout 0.15 drawn for each token": Variant(("model.dropout=0.0",), dropout_of_each_token(0.15)),
    "weight drop 0.2": Variant(alter=weight_drop),
    "embedding dropout 0.1": Variant(alter=embedding_dropout(0.1)),
    "half the batch size, twice the sequence length": Variant(batch_scale=0.5),
    "twice the batch size, half the sequence length": Variant(batch_scale=2),
    "weight decay 0.05": Variant(("train.weight_decay=0.05",)),
    "learning rate 4e-3": Variant(("train.learning_rate=4e-3",)),
    "beta2 0.999": Variant(("train.beta2=0.999",)),
    "constant learning rate": Variant(("train.final_learning_rate=1.0",)),
    "no moving average": Variant(("train.ema_decay=0.0",)),
    "each epoch starts at another position": Variant(order=Shifted),
    "state reset at document starts": Variant(build=Resetting),
}


def apply_overrides(variant: Variant, config: PipelineConfig, seed: int) -> PipelineConfig:
    """Return the configuration with a variant's overrides and a seed."""
    sizes = [
        f"train.batch_size={int(config.train.batch_size * variant.batch_scale)}",
        f"train.sequence_length={int(config.train.sequence_length / variant.batch_scale)}",
    ]
    return changed(config, [*variant.overrides, *sizes, f"train.seed={seed}"], "variant ")


def train_variant(name: str, config: PipelineConfig, dataset: str, seed: int) -> float:
    """Train a variant and return its held-out loss, in nats per token."""
    torch.set_num_threads(1)
    variant, data = VARIANTS[name], open_dataset(dataset)
    manifest, config = data.manifest, apply_overrides(variant, config, seed)

    def build(model: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype) -> GRULanguageModel:
        built = variant.build(model, vocab_size, matmul_dtype)
        variant.alter(built)
        return built

    learner = Learner(config.model, config.train, manifest.vocab_size, manifest.end_of_text, build=build)
    learner.average.eval()
    train(learner, data, variant.order)
    tokens = data.first_tokens("heldout", manifest.heldout.tokens)
    lanes = config.evaluate.batch_size
    return stream_loss(learner.average, stream_batches(tokens, lanes, 256, manifest.end_of_text), lanes) / len(tokens)


def train(learner: Learner, dataset: Dataset, build_order: type[LaneOrder]) -> None:
    config, segments = learner.config, dataset.segments("train")
    order = build_order(
        [segment.tokens for segment in segments],
        config.seed,
        config.batch_size,
        config.sequence_length,
        dataset.segment_weights("train"),
    )
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), learner.end_of_text, learner.lanes) as reader:
        train_steps(learner, reader.batch)


def train_steps(
    learner: Learner,
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]],
    measure: Callable[[], object] = lambda: None,
    measurements: int = 1,
) -> None:
    """Train for `train.steps` steps, and call `measure` this many times, evenly spread, the last time at the end.

    batch: returns the inputs and targets of a step. Raises Diverged.
    """
    steps = learner.config.steps
    for step in range(steps):
        learner.train_step(*batch(step))
        if (step + 1) * measurements // steps > step * measurements // steps:
            learner.confirm()
            measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="TOML file")
    parser.add_argument("dataset", metavar="DATASET", help="directory of its dataset")
    parser.add_argument("--set", metavar="K=V", action="append", default=[], help="override a key of CONFIG")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of each variant")
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help=f"variants to train, instead of all: {', '.join(VARIANTS)}",
    )
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.set)
    print(f"| after {config.train.steps:,} steps | {' | '.join(f'seed {s}' for s in range(arguments.seeds))} | mean |")
    print("|---|" + "---:|" * (arguments.seeds + 1), flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, max_tasks_per_child=1) as pool:
        losses = {
            name: [pool.submit(train_variant, name, config, arguments.dataset, seed) for seed in range(arguments.seeds)]
            for name in arguments.only
        }
        for name, pending in losses.items():
            try:
                results = [future.result() for future in pending]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the pending results are not needed
                raise
            columns = " | ".join(f"{loss:.4f}" for loss in [*results, statistics.mean(results)])
            print(f"| {name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
