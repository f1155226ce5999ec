"""What each part of the recipe gives: held-out loss after equal steps, with one thing changed at a time.

python -m tests.benchmarks.recipe CONFIG DATASET [--set K=V ...] [--seeds N] [--only NAME ...]

DATASET is the directory that `jobs.prepare` names in its result, of CONFIG. Each training has one thread, and as many
run side by side as there are cores: what is compared does not depend on time.
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
    """What differs from the configuration: keys of it, the model once it is made, its class, or the order of text."""

    overrides: tuple[str, ...] = ()
    alter: Callable[[GRULanguageModel], None] = lambda model: None
    build: type[GRULanguageModel] = GRULanguageModel
    order: type[LaneOrder] = LaneOrder


class Untied(GRULanguageModel):
    """The output layer has weights of its own."""

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
    """The state is zero again wherever a document begins: after an end of text, the last id of the vocabulary."""

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
    """Each epoch begins at another place, and goes round."""

    def slices(self, epoch: int, lane: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        total = self.stretch * self.lanes
        first = (lane * self.stretch + start + epoch * 0x9E3779B97F4A7C15) % total
        last = first + stop - start
        parts = super().slices(epoch, 0, first, min(last, total))
        return parts + (super().slices(epoch, 0, 0, last - total) if last > total else [])


class WeightDropped(nn.GRU):
    """A share of the recurrent matrix is left out in training (Merity et al. 2017, arXiv:1708.02182)."""

    share = 0.2

    @property
    def all_weights(self) -> list[list[Tensor]]:
        [[weight_ih, weight_hh, *biases]] = super().all_weights
        return [[weight_ih, F.dropout(weight_hh, self.share, self.training), *biases]]


def without_residual(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, made: (made[0] - given[0], made[1]))


def without_norm(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.norm = nn.Identity()


def update_gate_bias(value: float) -> Callable[[GRULanguageModel], None]:
    def alter(model: GRULanguageModel) -> None:
        for block in model.blocks:
            with torch.no_grad():
                block.gru.gru.bias_ih_l0.chunk(3)[1].fill_(value)

    return alter


def dropout_of_each_token(share: float) -> Callable[[GRULanguageModel], None]:
    def drop(module: nn.Module, given: Any, x_TBE: Tensor) -> Tensor:
        return F.dropout(x_TBE, share, module.training)

    def alter(model: GRULanguageModel) -> None:
        for norm in [model.norm, *(block.norm for block in model.blocks)]:
            norm.register_forward_hook(drop)

    return alter


def weight_drop(model: GRULanguageModel) -> None:
    for block in model.blocks:
        block.gru.gru.__class__ = WeightDropped


def embedding_dropout(share: float) -> Callable[[GRULanguageModel], None]:
    """Of a share of the vocabulary, all occurrences in a window (Gal & Ghahramani 2016, arXiv:1512.05287)."""

    def drop(module: nn.Module, given: Any, x_TBE: Tensor) -> Tensor:
        kept_V1 = F.dropout(torch.ones(module.num_embeddings, 1), share, module.training)
        return x_TBE * kept_V1[given[0]]

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
    "half the lanes, twice the window": Variant(("lanes / 2",)),
    "twice the lanes, half the window": Variant(("lanes * 2",)),
    "weight decay 0.05": Variant(("train.weight_decay=0.05",)),
    "learning rate 4e-3": Variant(("train.learning_rate=4e-3",)),
    "beta2 0.999": Variant(("train.beta2=0.999",)),
    "constant learning rate": Variant(("train.final_learning_rate=1.0",)),
    "no moving average": Variant(("train.ema_decay=0.0",)),
    "another beginning for each epoch": Variant(order=Shifted),
    "state reset at document starts": Variant(build=Resetting),
}


def configured(variant: Variant, config: PipelineConfig, seed: int) -> PipelineConfig:
    overrides = [override for override in variant.overrides if "=" in override]
    train = config.train
    for override in set(variant.overrides) - set(overrides):
        lanes, window = (2, 0.5) if override == "lanes * 2" else (0.5, 2)
        overrides += [
            f"train.batch_size={int(train.batch_size * lanes)}",
            f"train.sequence_length={int(train.sequence_length * window)}",
        ]
    return changed(config, [*overrides, f"train.seed={seed}"], "variant ")


def trained(name: str, config: PipelineConfig, dataset: str, seed: int) -> float:
    """Held-out loss at the end, in nats per token."""
    torch.set_num_threads(1)
    variant, opened = VARIANTS[name], open_dataset(dataset)
    manifest, config = opened.manifest, configured(variant, config, seed)

    def build(model: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype) -> GRULanguageModel:
        made = variant.build(model, vocab_size, matmul_dtype)
        variant.alter(made)
        return made

    learner = Learner(config.model, config.train, manifest.vocab_size, manifest.end_of_text, build=build)
    learner.average.eval()
    train(learner, opened, variant.order)
    tokens = opened.first_tokens("heldout", opened.manifest.heldout.tokens)
    lanes = config.evaluate.batch_size
    return stream_loss(learner.average, stream_batches(tokens, lanes, 256, manifest.end_of_text), lanes) / len(tokens)


def train(learner: Learner, dataset: Dataset, build_order: type[LaneOrder]) -> None:
    config, segments = learner.config, dataset.segments("train")
    order = build_order(
        [segment.tokens for segment in segments], config.seed, config.batch_size, config.sequence_length
    )
    with LaneReader(order, lambda i: dataset.read_segment(segments[i]), learner.end_of_text, learner.lanes) as reader:
        for step in range(config.steps):
            learner.train_step(*reader.batch(step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("dataset")
    parser.add_argument("--set", metavar="K=V", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.set)
    print(f"| after {config.train.steps:,} steps | {' | '.join(f'seed {s}' for s in range(arguments.seeds))} | mean |")
    print("|---|" + "---:|" * (arguments.seeds + 1), flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, max_tasks_per_child=1) as pool:
        losses = {
            name: [pool.submit(trained, name, config, arguments.dataset, seed) for seed in range(arguments.seeds)]
            for name in arguments.only
        }
        for name, pending in losses.items():
            try:
                found = [each.result() for each in pending]
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is left would be computed for nothing
                raise
            columns = " | ".join(f"{loss:.4f}" for loss in [*found, statistics.mean(found)])
            print(f"| {name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
