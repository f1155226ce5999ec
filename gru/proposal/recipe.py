"""The proposed tokenizer, model and training, by what is known about the text and by the speed of this machine.

Pure functions. Their numbers are those of the presets, between which they interpolate: `shakespeare` (1.1 MB read eight
times), `quickstart` (8.8 MB read once) and `poetry` (64 MB read once), and for GPUs `gpu`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gru.config import ModelConfig, TrainConfig
from gru.proposal.settings import Setting
from gru.proposal.speed import Speed
from gru.terminal import counted

_CJK_RANGES = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_CHARACTER_BYTES = 2_000_000  # of text, up to which an alphabet is tokenized by character
_ALPHABET = 512  # characters at most of an alphabet
_VOCABULARIES = ((4e6, 1024), (16e6, 2048), (64e6, 4096), (512e6, 8192), (math.inf, 16_384))
"""(bytes of text below which, tokens of BPE)."""
_BYTES_PER_TOKEN = 3.5  # about, of BPE
_MOST_EPOCHS = 40  # more were not tried
_START_SECONDS = 15  # until Ray Train's workers do the first step
_CPU_SHARE, _GPU_SHARE = 0.8, 0.9  # of the measured speed, beside held-out losses, checkpoints and Ray's processes
_HELDOUT_BYTES = 350_000  # as much as gives a score to two digits
_FEW_DOCUMENTS = 50  # of which a hash would hold out too few
_LEAST_STEPS = 100
_MEASURED_SHARE = 0.15  # of the tokens that are trained, so that measurements take a twentieth of the time
_TOKENS_PER_PARAMETER = 15  # that a larger model must read in the time to be better than a smaller one
_TOKENS_OF_TEXT_PER_PARAMETER = 0.5  # below it, the model of the presets is too large
_LEAST_TOKENS_PER_PARAMETER = 1.5  # below it, a narrower model reads so much more in the time that it is better
_LEAST_LANE = 650  # tokens of a lane in an epoch


@dataclass(frozen=True)
class TextFacts:
    """What a sample tells about the text."""

    characters: int  # distinct ones
    frequent: int  # distinct ones that occur more than once
    cjk_share: float  # of the letters

    @staticmethod
    def of(texts: Iterable[str]) -> "TextFacts":
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        letters = sum(count for character, count in counts.items() if character.isalpha())
        cjk = sum(count for character, count in counts.items() if _is_cjk(character))
        return TextFacts(len(counts), sum(count > 1 for count in counts.values()), cjk / max(1, letters))


class Machine(NamedTuple):
    """What trains, and for how long."""

    cores: int
    has_gpu: Callable[[], bool]  # asked late, since importing torch takes seconds
    speed: Speed
    minutes: float

    @property
    def gpu(self) -> bool:
        return self.has_gpu()

    @property
    def name(self) -> str:
        return "this GPU" if self.gpu else f"{self.cores} core{'s' * (self.cores != 1)}"

    @property
    def seconds(self) -> float:
        """The seconds of the time in which steps run."""
        given = self.minutes * 60
        return max(given - _START_SECONDS, given / 2)

    def tokens(self, model: ModelConfig, train: TrainConfig, vocab_size: int) -> float:
        """Return the tokens that a training reads in the time."""
        return self.speed(model, train, vocab_size) * (_GPU_SHARE if self.gpu else _CPU_SHARE) * self.seconds


class Training(NamedTuple):
    """The proposed model and its training."""

    model: list[Setting]
    train: list[Setting]
    resources: list[Setting]
    tokens_per_second: float
    minutes: float  # expected, at most those given
    epochs: float


def propose_heldout(size: float, documents: float, plain: bool) -> list[Setting]:
    """Return the settings of [corpus] for the held-out text, for so many bytes of text and documents.

    plain: whether all files are text that can be cut anywhere.
    """
    share = min(0.1, max(0.01, round(_HELDOUT_BYTES / max(size, 1), 2)))
    tail = plain and documents < _FEW_DOCUMENTS
    settings = []
    if tail:
        settings.append(Setting("heldout", "tail", f"the end of the text, since {_about_documents(documents)}"))
    if tail or share > 0.01:
        about = f"about {_amount(share * size, 'B')}, enough for a score"
        settings.append(Setting("heldout_share", share, about if share < 0.1 else "a tenth: there is little text"))
    return settings


def propose_tokenizer(facts: TextFacts, size: float, machine: Machine) -> list[Setting]:
    """Return the settings of [tokenizer] for so many bytes of text."""
    if facts.cjk_share > 0.3:
        vocab = min(8192, max(1024, 2 ** math.ceil(math.log2(facts.frequent + 257))))
        reason = f"{counted(facts.frequent, 'character')} seen more than once, and bytes for the others"
        return [
            Setting("kind", "char", f"{facts.cjk_share:.0%} of the letters are Chinese or Japanese"),
            Setting("vocab_size", vocab, reason),
        ]
    if size < _CHARACTER_BYTES and facts.characters <= _ALPHABET:
        reason = f"{facts.characters} different characters, and too little text to learn longer tokens"
        return [Setting("kind", "char", reason)]
    read, what = size, f"for {_amount(size, 'B')} of text"
    if size > _VOCABULARIES[2][0]:
        model = ModelConfig(embedding=256, hidden=512)
        read = min(size, machine.tokens(model, TrainConfig(), 4096) * _BYTES_PER_TOKEN)
        what = f"for {_amount(read, 'B')} of text, as much as training reads in {machine.minutes:g} min"
    vocab = next(tokens for limit, tokens in _VOCABULARIES if read < limit)
    return [Setting("kind", "bpe", "parts of words, for an alphabet"), Setting("vocab_size", vocab, what)]


def propose_training(tokens: float, vocab_size: int, machine: Machine) -> Training:
    """Return the model and training for so many tokens of text that is not held out."""
    batch = TrainConfig(batch_size=32 if tokens > 32 * _LEAST_LANE else 8)
    model = _model(tokens, vocab_size)
    reason = "suits the text" if model.hidden == 512 else "suits so little text"
    available = machine.tokens(model, batch, vocab_size)
    if model.hidden == 512 and available < _LEAST_TOKENS_PER_PARAMETER * parameters(model, vocab_size):
        model, reason = model.model_copy(update={"hidden": 384}), "suits the short time"
        available = machine.tokens(model, batch, vocab_size)
    for larger in _larger_models(vocab_size, machine.gpu):
        trial = batch
        if larger.layers > 1 and machine.gpu:
            trial = TrainConfig(batch_size=256, sequence_length=256)
        size = parameters(larger, vocab_size)
        enough = min(available, tokens * _MOST_EPOCHS) >= _TOKENS_PER_PARAMETER * size
        if not enough or tokens < size:  # it would learn the text by heart
            break
        if (of_larger := machine.tokens(larger, trial, vocab_size)) < _TOKENS_PER_PARAMETER * size:
            break
        model, batch, available, reason = larger, trial, of_larger, f"{machine.name} can train it in the time"
    epochs = min(available / tokens, _MOST_EPOCHS)
    window = batch.batch_size * batch.sequence_length
    steps = max(_LEAST_STEPS, _rounded_down(int(epochs * tokens / window)))
    epochs = steps * window / tokens
    rate = _learning_rate(model, epochs)
    speed = available / machine.seconds
    minutes = machine.minutes * steps * window / available
    settings = _batch_settings(batch, tokens)
    settings = [
        Setting("steps", steps, _steps_reason(epochs, minutes, speed, machine)),
        *settings,
        *_optimizer_settings(rate, steps, epochs, tokens / window),
        *_measurement_settings(steps, window),
    ]
    if model.layers > 1:
        settings.append(Setting("ema_decay", 0.999, "an average over more steps, as there are many"))
    resources = []
    if machine.gpu:
        resources = [Setting(stage, {"gpus": 1}, "this machine has a GPU") for stage in ("train", "evaluate")]
    return Training(_model_settings(model, vocab_size, epochs, reason), settings, resources, speed, minutes, epochs)


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a model of GRUs."""
    embedding, hidden = model.embedding, model.hidden
    project = hidden * embedding if hidden != embedding else 0
    block = 3 * hidden * (embedding + hidden + 2) + project + embedding
    return vocab_size * (embedding + 1) + embedding + model.layers * block


def _model(tokens: float, vocab_size: int) -> ModelConfig:
    """Return the model of the presets, or a narrower one if there is too little text for it."""
    embedding = 128 if vocab_size <= _ALPHABET + 257 else 256
    model = ModelConfig(embedding=embedding, hidden=512)
    if tokens < _TOKENS_OF_TEXT_PER_PARAMETER * parameters(model, vocab_size):
        return ModelConfig(embedding=128, hidden=256)
    return model


def _larger_models(vocab_size: int, gpu: bool) -> list[ModelConfig]:
    embedding = 256 if vocab_size <= _ALPHABET + 257 else 512
    models = [ModelConfig(embedding=embedding, hidden=1024)]
    return [*models, ModelConfig(embedding=1024, hidden=1024, layers=3)] if gpu else models


def _model_settings(model: ModelConfig, vocab_size: int, epochs: float, reason: str) -> list[Setting]:
    size = _amount(parameters(model, vocab_size), "")
    settings = [
        Setting("embedding", model.embedding, f"width of a token, for a vocabulary of at most {vocab_size:,}"),
        Setting("hidden", model.hidden, f"width of the hidden state: {size} parameters in all, which {reason}"),
    ]
    if model.layers > 1:
        settings.append(Setting("layers", model.layers, reason))
    dropout = min(0.3, round(math.log2(max(1.0, epochs))) * 0.05)
    if dropout:
        settings.append(Setting("dropout", round(dropout, 2), f"the text is read {_times(epochs)}"))
    return settings


def _optimizer_settings(rate: float, steps: int, epochs: float, steps_per_epoch: float) -> list[Setting]:
    settings = [Setting("learning_rate", rate, _rate_reason(rate, epochs))]
    # AdamW's weights are a moving average of its updates (arXiv:2405.13698), then with the memory of an epoch.
    memory = min(steps, steps_per_epoch)
    decay = float(_rounded(min(0.5, max(0.05, 1 / (rate * memory))), 1))
    if decay > 0.05:
        what = "an epoch" if memory < steps else "a run"
        settings.append(Setting("weight_decay", decay, f"forgets in {what} of {counted(round(memory), 'step')}"))
    if steps < 500:
        settings.append(Setting("warmup_steps", steps // 10, "a tenth of the steps"))
    return settings


def _measurement_settings(steps: int, window: int) -> list[Setting]:
    """Return the settings for the held-out loss. window: tokens of a step."""
    settings = []
    if steps < 500:
        every = max(10, steps // 5)
        settings.append(Setting("heldout_steps", every, "five measurements"))
        tokens = int(_rounded(_MEASURED_SHARE * every * window, 1))
        if tokens < TrainConfig().heldout_tokens:
            settings.append(Setting("heldout_tokens", tokens, "read by each of them, which take little time then"))
    return settings


def _batch_settings(batch: TrainConfig, tokens: float) -> list[Setting]:
    settings = []
    if batch.batch_size != TrainConfig().batch_size:
        reason = "lanes: a GPU computes many at once" if batch.batch_size > 32 else f"lanes, for {tokens:,.0f} tokens"
        settings.append(Setting("batch_size", batch.batch_size, reason))
    if batch.sequence_length != TrainConfig().sequence_length:
        settings.append(Setting("sequence_length", batch.sequence_length, "tokens that a lane reads per step"))
    return settings


def _learning_rate(model: ModelConfig, epochs: float) -> float:
    return 2e-3 if model.hidden > 512 or epochs > 5 else 3e-3


def _rate_reason(rate: float, epochs: float) -> str:
    if rate == 2e-3:
        return "low, for a text that is read often" if epochs > 5 else "low, for a wide model"
    return "for a text that is read a few times at most"


def _steps_reason(epochs: float, minutes: float, speed: float, machine: Machine) -> str:
    read = f"reads the text {_times(epochs)}"
    rate = f"{_rounded(speed, 2):,.0f} tokens/s on {machine.name}"
    if minutes < 0.9 * machine.minutes:
        return f"{read}, and more often teaches little; {max(1, round(minutes))} min at {rate}"
    return f"{read}: {max(1, round(minutes))} min at {rate}"


def _times(epochs: float) -> str:
    if epochs < 0.95:
        return f"in part ({epochs:.0%})" if epochs >= 0.01 else "in part (less than 1%)"
    return "once" if round(epochs, 1) == 1 else f"{epochs:.1f} times" if epochs < 10 else f"{epochs:.0f} times"


def _about_documents(documents: float) -> str:
    count = max(1, round(documents))
    return "there is one document" if count == 1 else f"there are only {count} documents"


def _is_cjk(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CJK_RANGES)


def _rounded_down(number: int) -> int:
    """Return a round number of about two digits that is not greater."""
    unit = max(1, 10 ** max(0, len(str(number)) - 2) // 2)
    return number // unit * unit


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits - 1}e}")


def _amount(number: float, unit: str) -> str:
    for prefix, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return (
                f"{number / size:.1f} {prefix}{unit}" if number < 10 * size else f"{number / size:.0f} {prefix}{unit}"
            )
    return f"{number:.0f} {unit}".rstrip()
