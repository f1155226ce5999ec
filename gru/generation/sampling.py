"""Logits to token ids, reproducibly. Pure functions that know no model and no text.

A token is drawn with the Gumbel-max trick: it is the argmax of logits / temperature plus noise, where the noise is a
hash of (seed, position, token id). So a token depends on its own row only, alone or in any row of any batch.
S rows, V vocabulary.
"""

import ctypes
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gru import native
from gru.errors import UserError

SOURCE = Path(__file__).with_name("sampling.c")

GREEDY = 1e-5  # temperatures below this are treated as 0
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
MASK = (1 << 64) - 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen.

    First the penalties change the logits. Those of tokens in the prompt or the text are divided by repetition_penalty
    if positive, and multiplied by it if negative (Keskar et al. 2019, arXiv:1909.05858). Each occurrence of a token in
    the text lowers its logit by frequency_penalty; the first one lowers it by presence_penalty, too. Then logit_bias is
    added to the logits of the tokens it names, and end_of_text is excluded until the request has generated min_tokens
    tokens.

    The logits are divided by temperature (0 takes the likeliest token). Then min_p keeps the tokens that are at least
    min_p times as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082); of these top_k keeps the k
    likeliest (0 keeps all); of these top_p keeps the smallest set of likeliest tokens whose probability reaches top_p.
    Tokens as probable as the last one kept are kept, too.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    end_of_text: int | None = None
    """Token that ends a document; required with min_tokens."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that is out of range."""
        assert self.min_tokens == 0 or self.end_of_text is not None
        for name, holds, requirement in (
            ("temperature", 0 <= self.temperature < math.inf, "a number >= 0"),
            ("top_k", self.top_k >= 0, "an integer >= 0"),
            ("top_p", 0 < self.top_p <= 1, "a number > 0 and <= 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0"),
        ):
            if not holds:
                raise UserError(f"{name}: must be {requirement}, not {getattr(self, name)}")

    @property
    def has_penalties(self) -> bool:
        """Whether sampling needs the History of tokens read and generated."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def excludes_unlikely(self) -> bool:
        """Whether unlikely tokens are excluded."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1


class History:
    """For the penalties: which tokens a request has read or generated (`seen_V`), and how often it generated each."""

    def __init__(self, prompt: Iterable[int], vocab_size: int, earlier: "SavedHistory | None" = None) -> None:
        """`earlier`: the history of the text before the prompt."""
        self.generated_V = np.zeros(vocab_size, np.int32)
        self.seen_V = np.zeros(vocab_size, bool)
        if earlier:
            self.generated_V[earlier.tokens] = earlier.generated
            self.seen_V[earlier.tokens] = True
        self.seen_V[list(prompt)] = True

    def save(self) -> "SavedHistory":
        """Return a copy that takes memory for the tokens of the text only, not for the whole vocabulary."""
        tokens = np.flatnonzero(self.seen_V).astype(np.uint32)
        return SavedHistory(tokens, self.generated_V[tokens])

    def add(self, token: int) -> None:
        self.generated_V[token] += 1
        self.seen_V[token] = True


class SavedHistory(NamedTuple):
    """A History that is kept between two requests of a session."""

    tokens: NDArray[np.uint32]
    """Tokens read or generated, each once."""
    generated: NDArray[np.int32]
    """How often each of them was generated."""

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.generated.nbytes


class Draw(NamedTuple):
    """What determines a row's token besides its logits."""

    params: SamplingParams
    position: int
    """Number of tokens of the text generated before this one, those of earlier requests of a session included."""
    history: History | None = None
    """Required if the params have penalties."""
    earlier: int = 0
    """Number of tokens of the text that earlier requests of the session generated, which min_tokens does not count."""

    @property
    def is_too_short(self) -> bool:
        """Whether the text must not end here."""
        return self.position - self.earlier < self.params.min_tokens


class Logprobs(NamedTuple):
    """Log-probabilities under the model itself, before any sampling parameter, in nats."""

    token: float
    """Log-probability of the token that was chosen."""
    top: tuple[tuple[int, float], ...]
    """Likeliest tokens with their log-probabilities, in descending order."""


def changes_logits(draw: Draw) -> bool:
    """Return whether this draw needs a changed copy of the logits."""
    params = draw.params
    return params.has_penalties or params.excludes_unlikely or bool(params.logit_bias) or draw.is_too_short


def sample(logits_SV: NDArray[np.float32], draws: Sequence[Draw]) -> NDArray[np.int64]:
    """Return the token ids [S] drawn from the rows."""
    changed = [row for row, draw in enumerate(draws) if changes_logits(draw)]
    if changed:
        logits_SV = logits_SV.copy()
        for row in changed:
            penalize(logits_SV[row], draws[row])
            exclude_unlikely(logits_SV[row], draws[row].params)
    if all(draw.params.temperature < GREEDY for draw in draws):
        return logits_SV.argmax(axis=1)
    temperatures = [max(draw.params.temperature, GREEDY) for draw in draws]
    seeds = [draw.params.seed & MASK for draw in draws]
    positions = [draw.position for draw in draws]
    library = _library()
    draw_rows = partial(draw_native, library) if library else draw_numpy
    tokens_S = draw_rows(logits_SV, temperatures, seeds, positions)
    for row, draw in enumerate(draws):
        if draw.params.temperature < GREEDY:
            tokens_S[row] = logits_SV[row].argmax()
    return tokens_S


def penalize(logits_V: NDArray[np.float32], draw: Draw) -> None:
    """Apply the penalties, logit_bias and min_tokens to the logits, in place."""
    params, history = draw.params, draw.history
    if params.has_penalties:
        assert history is not None
        if params.repetition_penalty != 1:
            seen = logits_V[history.seen_V]
            penalty = np.float32(params.repetition_penalty)
            logits_V[history.seen_V] = np.where(seen > 0, seen / penalty, seen * penalty)
        logits_V -= np.float32(params.frequency_penalty) * history.generated_V
        logits_V -= np.float32(params.presence_penalty) * (history.generated_V > 0)
    for token, bias in params.logit_bias.items():
        logits_V[token] += np.float32(bias)
    if draw.is_too_short:
        logits_V[params.end_of_text] = -np.inf


def exclude_unlikely(logits_V: NDArray[np.floating], params: SamplingParams) -> None:
    """Set the logits of tokens that min_p, then top_k, then top_p exclude to -inf, in place."""
    if not params.excludes_unlikely or params.temperature < GREEDY:
        return
    scores_V = logits_V / np.float64(params.temperature)
    if params.min_p > 0:
        scores_V[scores_V < scores_V.max() + math.log(params.min_p)] = -np.inf
    if 0 < params.top_k < len(scores_V):
        scores_V[scores_V < np.partition(scores_V, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        descending = np.sort(scores_V)[::-1]
        reached = np.exp(descending - descending[0]).cumsum()
        last = np.searchsorted(reached, params.top_p * reached[-1])
        scores_V[scores_V < descending[last]] = -np.inf
    logits_V[scores_V == -np.inf] = -np.inf


def logprobs(logits_V: NDArray[np.float32], token: int, top: int) -> Logprobs:
    """Return the log-probability of the token, and those of the `top` likeliest tokens."""
    exact_V = logits_V.astype(np.float64)
    exact_V -= exact_V.max()
    exact_V -= math.log(np.exp(exact_V).sum())
    top = min(top, len(exact_V))
    likeliest = np.argpartition(-exact_V, top - 1)[:top] if top else np.zeros(0, np.int64)
    likeliest = likeliest[np.lexsort((likeliest, -exact_V[likeliest]))]
    return Logprobs(float(exact_V[token]), tuple((int(each), float(exact_V[each])) for each in likeliest))


def draw_numpy(
    logits_SV: NDArray[np.float32], temperatures: Sequence[float], seeds: Sequence[int], positions: Sequence[int]
) -> NDArray[np.int64]:
    """Return the argmax [S] of each row's logits / temperature + the noise of (seed, position)."""
    tokens = np.zeros(len(logits_SV), np.int64)
    for row, (temperature, seed, position) in enumerate(zip(temperatures, seeds, positions, strict=True)):
        noise_V = gumbel_noise(mix(mix(seed) + position), logits_SV.shape[1])
        tokens[row] = (logits_SV[row] / np.float64(temperature) + noise_V).argmax()
    return tokens


def gumbel_noise(key: int, vocab_size: int) -> NDArray[np.float64]:
    """Return standard Gumbel noise [V], a function of the key.

    Each 64-bit output of splitmix64 (Steele et al. 2014) gives the noise of two tokens.
    """
    counters = np.arange(1, (vocab_size + 1) // 2 + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = np.uint64(key) + counters
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    uniform = (words.view(np.uint32)[:vocab_size] + 0.5) * 2.0**-32
    return -np.log(-np.log(uniform))


def draw_native(
    library: ctypes.CDLL,
    logits_SV: NDArray[np.float32],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> NDArray[np.int64]:
    """Return what `draw_numpy` returns, computed by sampling.c: ten times as fast, with one release of the GIL."""
    rows, vocab_size = logits_SV.shape
    stride, element = logits_SV.strides
    assert element == logits_SV.itemsize and logits_SV.dtype == np.float32
    tokens = np.zeros(rows, np.int64)
    library.draw(
        ctypes.c_int64(rows),
        ctypes.c_int64(vocab_size),
        ctypes.c_int64(stride // element),
        ctypes.c_void_p(logits_SV.ctypes.data),
        (ctypes.c_double * rows)(*temperatures),  # for few rows faster than arrays of numpy
        (ctypes.c_uint64 * rows)(*seeds),
        (ctypes.c_uint64 * rows)(*positions),
        ctypes.c_void_p(tokens.ctypes.data),
    )
    return tokens


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return native.library(SOURCE)
    except OSError as reason:
        log.info("sampling.c cannot be compiled; numpy draws the tokens instead, which is slower: %s", reason)
        return None


def mix(value: int) -> int:
    """Return splitmix64's output for the state `value` modulo 2**64."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of a choice, by its index among those of one request; the first has the request's seed."""
    return mix(seed + mix(choice)) if choice else seed
