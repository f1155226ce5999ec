"""Who is compared: recurrent cells and a Transformer with about as many parameters, each with its own settings."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from gru.config import Cell, ModelConfig, PipelineConfig, Section, TrainConfig, changed, content_key
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
"""nanoGPT's for a corpus of this size (config/train_shakespeare_char.py)."""
CONTEXT = 256
"""Fewest tokens that the Transformer sees: its window, whose number of lanes gives a step the tokens of the others'."""
ONE_PROCESS: dict[str, Any] = {"workers": 1, "min_workers": None, "bitwise_elastic": 0}
WIDTHS = 8
"""Hidden widths that are not small are multiples of this."""


@dataclass(frozen=True)
class Contender:
    """What is trained: a recurrent model as `model` has it, or the Transformer."""

    name: str
    model: ModelConfig
    train: TrainConfig
    transformer: TransformerConfig | None = None

    @property
    def key(self) -> str:
        """Names what decides the outcome."""
        train = self.train.model_dump(exclude=set(TrainConfig.PLACEMENT) | {"seed", "steps"})
        transformer = self.transformer and asdict(self.transformer)
        return content_key(self.model, train, transformer)

    def lane_order(self, dataset: Dataset, seed: int) -> LaneOrder:
        """Raises UserError if the corpus is too small."""
        sizes = [segment.tokens for segment in dataset.segments("train")]
        return LaneOrder(sizes, seed, self.train.batch_size, self.train.sequence_length)

    def build(self, model: ModelConfig, vocab_size: int, matmul_dtype: torch.dtype) -> LanguageModel:
        if self.transformer:
            return Transformer(self.transformer, vocab_size, matmul_dtype)
        return GRULanguageModel(model, vocab_size, matmul_dtype)


def parse_contender(told: str, config: PipelineConfig, vocab_size: int) -> Contender:
    """The contender that `NAME` or `NAME:key=value,key=value` means. A name of `DEFAULTS`, alone or before a hyphen
    (lstm-wide), says what the overrides begin with: that cell or the Transformer, with about as many parameters as the
    model of `config`. With any other name they begin with `config`.

    Raises UserError.
    """
    name, _, rest = told.partition(":")
    overrides = [part.strip() for part in rest.split(",") if part.strip()]
    kind = name if name in DEFAULTS else name.partition("-")[0]
    option = f"--contender {name}: "
    if not name or (name not in DEFAULTS and not overrides):
        raise UserError(
            f"--contender {told}: unknown: expected one of {', '.join(DEFAULTS)}, or a name with overrides, as in "
            "careful:train.learning_rate=0.002"
        )
    for override in overrides:
        _check_override(override, kind, option)
    config = _with(config, "train", ONE_PROCESS)
    base, transformer = config, None
    if kind == TRANSFORMER:
        base = _for_transformer(config)
    elif kind in DEFAULTS and kind != config.model.cell:
        base = _with(config, "model", match_parameters(config.model, kind, vocab_size).model_dump())
    made = changed(base, overrides, option)
    if kind == TRANSFORMER:
        transformer = nearest(parameters(config.model, vocab_size), vocab_size, made.model.dropout)
    return Contender(name, made.model, made.train, transformer)


def _check_override(override: str, kind: str, option: str) -> None:
    key = override.partition("=")[0].strip()
    if key.partition(".")[0] not in ("model", "train"):
        raise UserError(f"{option}{override}: a contender differs in [model] and [train] alone")
    idle = {f"train.{field}" for field in ("steps", "seed", *ONE_PROCESS, *TrainConfig.PLACEMENT)}
    if kind == TRANSFORMER:
        idle |= {f"model.{field}" for field in ModelConfig.model_fields if field not in ("dropout", "precision")}
    if key in idle:
        raise UserError(f"{option}{override}: {key} has no effect on this contender")


def _with(config: PipelineConfig, section: str, values: dict[str, Any]) -> PipelineConfig:
    record: Section = getattr(config, section)
    return config.model_copy(update={section: record.model_copy(update=values)})


def _for_transformer(config: PipelineConfig) -> PipelineConfig:
    context = max(CONTEXT, config.train.sequence_length)
    lanes = max(1, round(config.train.batch_size * config.train.sequence_length / context))
    return _with(config, "train", {**TRANSFORMER_TRAINING, "sequence_length": context, "batch_size": lanes})


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Of a recurrent model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GRULanguageModel(model, vocab_size).parameters())


def match_parameters(model: ModelConfig, cell: str, vocab_size: int) -> ModelConfig:
    """The model with another cell, as wide as gives it about as many parameters, within 5 %. Where the embedding is as
    wide as the hidden state, it stays so."""
    wanted = parameters(model, vocab_size)
    stride = WIDTHS if model.hidden >= 32 * WIDTHS else 1

    def of(hidden: int) -> ModelConfig:
        embedding = hidden if model.embedding == model.hidden else model.embedding
        return model.model_copy(update={"cell": cell, "hidden": hidden, "embedding": embedding})

    low, high = 1, 8 * model.hidden // stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(of(middle * stride), vocab_size) <= wanted else (low, middle)

    def error(found: ModelConfig) -> float:
        return abs(parameters(found, vocab_size) / wanted - 1)

    best = min((of(width * stride) for width in (low, high)), key=error)
    assert error(best) < 0.05, f"no {cell} of about {wanted:,} parameters"
    return best
