"""Logits to token ids, reproducibly. Pure functions; no model, no text.

A token is drawn with the Gumbel-max trick: the argmax of logits / temperature plus noise that is a hash of
(seed, position, token id). So it depends on its own row only, alone or in any row of any batch.
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

SOURCE = Path(__file__).with_name("sampling.c")

GREEDY = 1e-5  # temperatures below this one are taken as 0
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
MASK = (1 << 64) - 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Logits are first changed by what has been said: those of tokens in the prompt or the text are divided by
    repetition_penalty where positive, multiplied where negative (Keskar et al. 2019, arXiv:1909.05858); for each time
    that the text has a token, frequency_penalty is taken from its logit, and presence_penalty once. Then logit_bias is
    added to those that it names.

    They are divided by temperature (0 takes the likeliest token). Then only those at least min_p times as probable as
    the likeliest stay (Nguyen et al. 2024, arXiv:2407.01082); of these the top_k likeliest (0: all); of these the
    fewest likeliest whose probability reaches top_p. Those that equal the last one stay too.
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

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1
        assert 0 <= self.min_p <= 1 and self.repetition_penalty > 0

    @property
    def remembers(self) -> bool:
        """Whether a token depends on which others were read and made, beyond what the model makes of them."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def excludes(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1


class History:
    """Which tokens a request has read and made, for the penalties."""

    def __init__(self, prompt: Iterable[int], vocab_size: int) -> None:
        self.made_V = np.zeros(vocab_size, np.int32)
        self.seen_V = np.zeros(vocab_size, bool)
        self.seen_V[list(prompt)] = True

    def add(self, token: int) -> None:
        self.made_V[token] += 1
        self.seen_V[token] = True


class Draw(NamedTuple):
    """What decides a row's token besides its logits."""

    params: SamplingParams
    position: int
    """Of the token in its stream."""
    history: History | None = None
    """Needed if the params remember."""


class Logprobs(NamedTuple):
    """Log-probabilities under the model alone, whatever the sampling: of the token, and of the likeliest, in order."""

    token: float
    top: tuple[tuple[int, float], ...]


def changes_logits(params: SamplingParams) -> bool:
    return params.remembers or params.excludes or bool(params.logit_bias)


def sample(logits_SV: NDArray[np.float32], draws: Sequence[Draw]) -> NDArray[np.int64]:
    """Token ids [S]."""
    changed = [row for row, draw in enumerate(draws) if changes_logits(draw.params)]
    if changed:
        logits_SV = logits_SV.copy()
        for row in changed:
            penalize(logits_SV[row], draws[row])
            exclude_unlikely(logits_SV[row], draws[row].params)
    if all(draw.params.temperature < GREEDY for draw in draws):
        return logits_SV.argmax(axis=1)
    temperatures = np.array([max(draw.params.temperature, GREEDY) for draw in draws])
    seeds = np.array([draw.params.seed & MASK for draw in draws], np.uint64)
    positions = np.array([draw.position for draw in draws], np.uint64)
    library = _library()
    draw_rows = partial(draw_native, library) if library else draw_numpy
    tokens_S = draw_rows(logits_SV, temperatures, seeds, positions)
    for row, draw in enumerate(draws):
        if draw.params.temperature < GREEDY:
            tokens_S[row] = logits_SV[row].argmax()
    return tokens_S


def penalize(logits_V: NDArray[np.float32], draw: Draw) -> None:
    """Change logits, in place, by what was said before and by logit_bias."""
    params, history = draw.params, draw.history
    if params.remembers:
        assert history is not None
        if params.repetition_penalty != 1:
            seen = logits_V[history.seen_V]
            penalty = np.float32(params.repetition_penalty)
            logits_V[history.seen_V] = np.where(seen > 0, seen / penalty, seen * penalty)
        logits_V -= np.float32(params.frequency_penalty) * history.made_V
        logits_V -= np.float32(params.presence_penalty) * (history.made_V > 0)
    for token, bias in params.logit_bias.items():
        logits_V[token] += np.float32(bias)


def exclude_unlikely(logits_V: NDArray[np.floating], params: SamplingParams) -> None:
    """Put -inf, in place, where min_p, then top_k, then top_p leave a token out."""
    if not params.excludes or params.temperature < GREEDY:
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
    """Of the token, and of the `top` likeliest."""
    exact_V = logits_V.astype(np.float64)
    exact_V -= exact_V.max()
    exact_V -= math.log(np.exp(exact_V).sum())
    top = min(top, len(exact_V))
    likeliest = np.argpartition(-exact_V, top - 1)[:top] if top else np.zeros(0, np.int64)
    likeliest = likeliest[np.lexsort((likeliest, -exact_V[likeliest]))]
    return Logprobs(float(exact_V[token]), tuple((int(each), float(exact_V[each])) for each in likeliest))


def draw_numpy(
    logits_SV: NDArray[np.float32],
    temperatures_S: NDArray[np.float64],
    seeds_S: NDArray[np.uint64],
    positions_S: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """The argmax of each row's logits / temperature + noise, where the noise is that of (seed, position)."""
    tokens = np.zeros(len(logits_SV), np.int64)
    for row, (seed, position) in enumerate(zip(seeds_S.tolist(), positions_S.tolist(), strict=True)):
        noise_V = gumbel_noise(mix(mix(seed) + position), logits_SV.shape[1])
        tokens[row] = (logits_SV[row] / temperatures_S[row] + noise_V).argmax()
    return tokens


def gumbel_noise(key: int, vocab_size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [V], a function of the key.

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
    temperatures_S: NDArray[np.float64],
    seeds_S: NDArray[np.uint64],
    positions_S: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """What `draw_plainly` gives, by sampling.c: ten times as fast, and with one release of Python's lock."""
    rows, vocab_size = logits_SV.shape
    stride, element = logits_SV.strides
    assert element == logits_SV.itemsize and logits_SV.dtype == np.float32
    tokens = np.zeros(rows, np.int64)
    pointers = (
        ctypes.c_void_p(array.ctypes.data) for array in (logits_SV, temperatures_S, seeds_S, positions_S, tokens)
    )
    library.draw(ctypes.c_int64(rows), ctypes.c_int64(vocab_size), ctypes.c_int64(stride // element), *pointers)
    return tokens


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return native.library(SOURCE)
    except OSError as reason:
        log.info("numpy draws the tokens, which is slower than sampling.c: %s", reason)
        return None


def mix(value: int) -> int:
    """splitmix64's output for the state `value`, taken modulo 2**64."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the n-th text asked for with one seed; the first has the seed itself."""
    return mix(seed + mix(choice)) if choice else seed
