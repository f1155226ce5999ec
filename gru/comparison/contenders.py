"""The models that a comparison trains: recurrent cells and a Transformer with about as many parameters."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from gru.config import ModelConfig, PipelineConfig, TrainConfig, changed, content_key
from gru.config_fields import Section
from gru.config_stages import Cell
from gru.corpus.batches import LaneOrder
from gru.corpus.dataset import Dataset
from gru.errors import UserError
from gru.model.interface import LanguageModel
from gru.model.language_model import GRULanguageModel
from gru.model.transformer import Transformer, TransformerConfig, nearest

TRANSFORMER = "transformer"
DEFAULTS: tuple[str, ...] = (*get_args(Cell), TRANSFORMER)
TRANSFORMER_TRAINING = {
    "learning_rate": 1e-3,
    "final_learning_rate": 0.1,
    "warmup_steps": 100,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "clip": 1.0,
}
"""nanoGPT's settings for a corpus of this size (config/train_shakespeare_char.py)."""
MIN_CONTEXT = 256
"""Shortest sequence length of the Transformer, which sees nothing before its sequence. Its batch size is chosen so that
a step has as many tokens as the other contenders' steps."""
ONE_PROCESS: dict[str, Any] = {"workers": 1, "min_workers": None, "bitwise_elastic": 0}
ONE_PROCESS |= dict.fromkeys(TrainConfig.INITIAL)  # and random weights
WIDTH_MULTIPLE = 8
"""Hidden widths are multiples of this, except small ones."""


@dataclass(frozen=True)
class Contender:
    """A model to train and its settings: the recurrent model of `model`, or the Transformer."""

    name: str
    model: ModelConfig
    train: TrainConfig
    transformer: TransformerConfig | None = None

    @property
    def key(self) -> str:
        """A key of all settings that the result depends on."""
        train = self.train.model_dump(exclude={*TrainConfig.PLACEMENT, *TrainConfig.INITIAL, "seed", "steps"})
        transformer = self.transformer and asdict(self.transformer)
        return content_key(self.model, train, transformer)

    def lane_order(self, dataset: Dataset, seed: int) -> LaneOrder:
        """Return the order in which the training text is read. Raises UserError if the corpus is too small."""
        sizes = [segment.tokens for segment in dataset.segments("train")]
        weights = dataset.segment_weights("train")
        return LaneOrder(sizes, seed, self.train.batch_size, self.train.sequence_length, weights)

    def build(self, model: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype) -> LanguageModel:
        """Return a new model with initial weights."""
        if self.transformer:
            return Transformer(self.transformer, vocab_size, matmul_dtype)
        return GRULanguageModel(model, vocab_size, matmul_dtype)


def parse_contenders(specs: Sequence[str], config: PipelineConfig, vocab_size: int) -> list[Contender]:
    """Return a contender for each spec, as `parse_contender` does. Raises UserError, also if two have the same name."""
    contenders = [parse_contender(spec, config, vocab_size) for spec in specs]
    names = [contender.name for contender in contenders]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--contender {duplicates.pop()}: given twice: each contender needs a name of its own")
    return contenders


def parse_contender(spec: str, config: PipelineConfig, vocab_size: int) -> Contender:
    """Return the contender that `spec` means: `NAME`, or `NAME:key=value,key=value` with overrides.

    If the name, or its part before a hyphen (lstm-wide), is one of `DEFAULTS`, the overrides apply to that cell or to
    the Transformer, with about as many parameters as the model of `config`. With any other name they apply to
    `config`. Raises UserError.
    """
    name, _, rest = spec.partition(":")
    overrides = [part.strip() for part in rest.split(",") if part.strip()]
    kind = name if name in DEFAULTS else name.partition("-")[0]
    option = f"--contender {name}: "
    if not name or (name not in DEFAULTS and not overrides):
        raise UserError(
            f"--contender {spec}: unknown: expected one of {', '.join(DEFAULTS)}, or a name with overrides, as in "
            "careful:train.learning_rate=0.002"
        )
    for override in overrides:
        _check_override(override, kind, option)
    config = _replace(config, "train", ONE_PROCESS)
    base, transformer = config, None
    if kind == TRANSFORMER:
        base = _for_transformer(config)
    elif kind in DEFAULTS and kind != config.model.cell:
        base = _replace(config, "model", match_parameters(config.model, kind, vocab_size).model_dump())
    final = changed(base, overrides, option)
    if kind == TRANSFORMER:
        transformer = nearest(count_parameters(config.model, vocab_size), vocab_size, final.model.dropout)
    return Contender(name, final.model, final.train, transformer)


def _check_override(override: str, kind: str, option: str) -> None:
    key = override.partition("=")[0].strip()
    if key.partition(".")[0] not in ("model", "train"):
        raise UserError(f"{option}{override}: a contender can override keys of [model] and [train] only")
    unused = {f"train.{field}" for field in ("steps", "seed", *ONE_PROCESS, *TrainConfig.PLACEMENT)}
    if kind == TRANSFORMER:
        unused |= {f"model.{field}" for field in ModelConfig.model_fields if field not in ("dropout", "precision")}
    if key in unused:
        raise UserError(f"{option}{override}: {key} has no effect on this contender")


def _replace(config: PipelineConfig, section: str, values: dict[str, Any]) -> PipelineConfig:
    record: Section = getattr(config, section)
    return config.model_copy(update={section: record.model_copy(update=values)})


def _for_transformer(config: PipelineConfig) -> PipelineConfig:
    sequence_length = max(MIN_CONTEXT, config.train.sequence_length)
    batch_size = max(1, round(config.train.batch_size * config.train.sequence_length / sequence_length))
    sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
    return _replace(config, "train", {**TRANSFORMER_TRAINING, **sizes})


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a recurrent model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GRULanguageModel(model, vocab_size).parameters())


def match_parameters(model: ModelConfig, cell: str, vocab_size: int) -> ModelConfig:
    """Return the model with another cell, and a width that gives it the same number of parameters within 5 %.

    An embedding as wide as the hidden state stays as wide as the hidden state.
    """
    target = count_parameters(model, vocab_size)
    stride = WIDTH_MULTIPLE if model.hidden >= 32 * WIDTH_MULTIPLE else 1

    def with_width(hidden: int) -> ModelConfig:
        embedding = hidden if model.embedding == model.hidden else model.embedding
        return model.model_copy(update={"cell": cell, "hidden": hidden, "embedding": embedding})

    low, high = 1, 8 * model.hidden // stride
    while high - low > 1:
        middle = (low + high) // 2
        fits = count_parameters(with_width(middle * stride), vocab_size) <= target
        low, high = (middle, high) if fits else (low, middle)

    def error(candidate: ModelConfig) -> float:
        return abs(count_parameters(candidate, vocab_size) / target - 1)

    best = min((with_width(width * stride) for width in (low, high)), key=error)
    assert error(best) < 0.05, f"no {cell} of about {target:,} parameters"
    return best
