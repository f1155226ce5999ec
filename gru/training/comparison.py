"""Different models on the same text for equal time: who trains, for how long, and what is measured on the way.

A contender is trained by one process, with no Ray: `Learner` on the lanes of a dataset. Its clock runs while it trains
and stands still while it is measured; learning rates follow the share of the time that is over.
T time, B lanes, E embedding.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor

from gru.config import Cell, ModelConfig, PipelineConfig, Section, TrainConfig, changed, content_key
from gru.corpus.dataset import Dataset, decode
from gru.corpus.lanes import LaneOrder, LaneReader, sliding_batches, stream_batches
from gru.errors import UserError
from gru.evaluation import LanguageModel, stream_loss
from gru.evaluation import read as read_heldout
from gru.model.language_model import GRULanguageModel
from gru.model.transformer import Transformer, TransformerConfig, nearest
from gru.tracking import LOSS, Point
from gru.training.learner import Diverged, Learner

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
MEASUREMENTS = 16
"""Of the held-out loss, spread evenly over the time."""
POINTS = 128
"""Logged of the training loss, at most."""
REACH = 512
"""Tokens into the past to which gradients are followed."""
REACH_LANES = 32
STREAMS = (1_000, 10_000)
"""Lengths in tokens at which the memory of a stream is told."""
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
        return LaneOrder(sizes, seed, self.train.lanes, self.train.window)

    def build(self, model: ModelConfig, vocab_size: int, products: torch.dtype) -> LanguageModel:
        if self.transformer:
            return Transformer(self.transformer, vocab_size, products)
        return GRULanguageModel(model, vocab_size, products)


def contender(told: str, config: PipelineConfig, vocab_size: int) -> Contender:
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
        base = _with(config, "model", matched(config.model, kind, vocab_size).model_dump())
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
    context = max(CONTEXT, config.train.window)
    lanes = max(1, round(config.train.lanes * config.train.window / context))
    return _with(config, "train", {**TRANSFORMER_TRAINING, "window": context, "lanes": lanes})


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Of a recurrent model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GRULanguageModel(model, vocab_size).parameters())


def matched(model: ModelConfig, cell: str, vocab_size: int) -> ModelConfig:
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


class Record(TypedDict):
    """What came of one contender and seed; plain JSON."""

    name: str
    seed: int
    settings: dict[str, Any]
    parameters: int
    precision: str
    device: str
    seconds: float
    steps: int
    tokens_per_second: float
    points: list[Point]  # `time` in training seconds
    heldout: list[float]  # nats per token at the end of each `MEASUREMENTS`-th of the time; fewer if it diverged
    characters_per_token: float  # of the text that those are measured on
    bytes_per_token: float
    nats_per_character: float | None  # at the end, on all held-out text; None if it diverged
    bits_per_byte: float | None
    reach: list[float]  # see gradient_reach
    state_bytes: dict[str, int]  # by length of the stream
    diverged: str | None


def train(
    contender: Contender,
    seed: int,
    dataset: Dataset,
    heldout: np.ndarray,
    seconds: float,
    lanes: int,
    most_bytes: int,
    device: torch.device,
    show: Callable[[str], None],
) -> tuple[Record, LanguageModel]:
    """Train one contender for so many seconds, measured on the tokens `heldout` on the way and at its end on all
    held-out text, `most_bytes` at most, read in `lanes` stretches. Raises UserError if the corpus is too small."""
    manifest, config = dataset.manifest, contender.train.model_copy(update={"seed": seed})
    learner = Learner(
        contender.model, config, manifest.vocab_size, manifest.end_of_text, device=device, build=contender.build
    )
    # What carries no state is scored on windows that overlap.
    cut, window = (sliding_batches, config.window) if contender.transformer else (stream_batches, 256)

    def measure() -> float:
        batches = cut(heldout, lanes, window, manifest.end_of_text)
        loss = stream_loss(learner.average, batches, lanes) / len(heldout)
        show(f"step {learner.step:,}, held-out loss {loss:.4f}")
        return loss

    diverged: str | None = None
    points: list[Point] = []
    losses: list[float] = []
    segments = dataset.segments("train")

    def read(index: int) -> np.ndarray:
        return dataset.read_segment(segments[index])

    order = contender.lane_order(dataset, seed)
    with LaneReader(order, read, manifest.end_of_text, learner.lanes) as reader:
        try:
            train_for(learner, reader.batch, seconds, measure, points, losses)
        except Diverged as divergence:
            diverged = str(divergence)
    if diverged is None and not math.isfinite(losses[-1]):
        diverged = f"the held-out loss is {losses.pop()} at step {learner.step}"
    tokenizer = dataset.tokenizer()
    model = contender.build(contender.model, manifest.vocab_size, torch.float32).to(device)  # as it would be served
    model.load_state_dict(learner.average.state_dict())
    text = decode(tokenizer, heldout[heldout != manifest.end_of_text])
    scores = None
    if diverged is None:
        whole = read_heldout(tokenizer, dataset.texts("heldout"), most_bytes)
        scores = whole.scores(stream_loss(model, cut(whole.tokens, lanes, window, manifest.end_of_text), lanes), lanes)
    distance = min(REACH, config.window) if contender.transformer else REACH
    record: Record = {
        "name": contender.name,
        "seed": seed,
        "settings": {
            "model": contender.model.model_dump(),
            "train": config.model_dump(),
            "transformer": contender.transformer and asdict(contender.transformer),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": learner.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": points[-1]["time"] if points else 0.0,
        "steps": learner.step,
        "tokens_per_second": float(np.median([point["metrics"]["train/tokens_per_second"] for point in points] or [0])),
        "points": points,
        "heldout": losses,
        "characters_per_token": len(text.decode(errors="replace")) / len(heldout),
        "bytes_per_token": len(text) / len(heldout),
        "nats_per_character": scores.nats_per_character if scores else None,
        "bits_per_byte": scores.bits_per_byte if scores else None,
        "reach": [] if diverged else gradient_reach(model, heldout, distance, REACH_LANES, manifest.end_of_text),
        "state_bytes": {str(tokens): stream_bytes(model, tokens) for tokens in STREAMS},
        "diverged": diverged,
    }
    return record, model


def stream_bytes(model: LanguageModel, tokens: int) -> int:
    """Memory of one stream that has read so many tokens, in fp32 as it is served: its state, or all keys and values."""
    return model.cache_bytes(tokens) if isinstance(model, Transformer) else model.initial_state(1).nbytes


def train_for(
    learner: Learner,
    batch: Callable[[int], tuple[np.ndarray, np.ndarray]],
    seconds: float,
    measure: Callable[[], float],
    points: list[Point],
    losses: list[float],
) -> None:
    """Train until so many seconds of training are over.

    `measure` is called at the end of each `MEASUREMENTS`-th of them, off the clock, and its values go to `losses`;
    what happened goes to `points`. A measurement that a long step reached past belongs to every mark before it; one
    that is not finite is the last. Raises Diverged.
    """
    spent = since_spent = 0.0
    since: list[Tensor] = []
    tokens = 0
    marks = [seconds * (mark + 1) / MEASUREMENTS for mark in range(MEASUREMENTS)]
    while spent < seconds and all(map(math.isfinite, losses)):
        started = time.perf_counter()
        inputs_TB, targets_TB = batch(learner.step)
        loss, norm = learner.train_step(inputs_TB, targets_TB, done=spent / seconds)
        spent += time.perf_counter() - started
        since.append(loss)
        tokens += inputs_TB.size
        due = sum(mark <= spent for mark in marks) - len(losses)
        if not due and spent - since_spent < seconds / POINTS:
            continue
        metrics = {
            LOSS: float(torch.stack(since).mean()),
            "train/gradient_norm": norm,
            "train/learning_rate": learner.optimizer.param_groups[0]["lr"],
            "train/tokens_per_second": tokens / (spent - since_spent),
            "train/seconds": spent,
        }
        if due:
            metrics["heldout/loss"] = measured = measure()
            losses += [measured] * (due if math.isfinite(measured) else 1)
        points.append({"step": learner.step, "time": spent, "metrics": metrics})
        since, tokens, since_spent = [], 0, spent


def gradient_reach(
    model: LanguageModel, tokens: np.ndarray, distance: int, lanes: int, end_of_text: int
) -> list[float]:
    """|d loss_T / d x_{T-k}| for k = 0, 1, ... below `distance`, as shares of that for k = 0: how much the loss at one
    token depends on the embedded input k tokens before. Norms are averaged over `lanes` places in the tokens; each is
    read from a state of zeros."""
    distance = min(distance, len(tokens))
    inputs_N = np.concatenate([[end_of_text], tokens[:-1].astype(np.int64)])
    starts_B = np.linspace(0, len(tokens) - distance, lanes).astype(np.int64)
    places_TB = starts_B + np.arange(distance)[:, None]
    device = model.output_bias.device
    inputs_TB, targets_TB = (
        torch.from_numpy(array[places_TB]).to(device) for array in (inputs_N, tokens.astype(np.int64))
    )
    weights_TB = torch.zeros(distance, lanes, device=device)
    weights_TB[-1] = 1
    embedded: list[Tensor] = []

    def keep(module: Any, given: Any, x_TBE: Tensor) -> Tensor:
        embedded.append(x_TBE.detach().requires_grad_())
        return embedded[0]

    hook = model.embedding.register_forward_hook(keep)
    try:
        total, _ = model.loss(inputs_TB, targets_TB, model.initial_state(lanes), weights_TB=weights_TB)
        [d_x_TBE] = torch.autograd.grad(total, embedded)
    finally:
        hook.remove()
    norms_T = d_x_TBE.double().norm(dim=2).mean(1).flip(0)
    return (norms_T / norms_T[0]).tolist()
