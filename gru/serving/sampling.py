"""Logits to token ids, reproducibly. Pure functions; no model, no text.

A token is drawn with the Gumbel-max trick: the argmax of logits / temperature plus noise that is a hash of
(seed, position, token id). So it depends on its own row only, alone or in any row of any batch.
S rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GREEDY = 1e-5  # temperatures below this one are taken as 0
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
BLOCK = 1 << 14  # scores worked on together: few enough to stay in the cache
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen.

    Logits are divided by temperature (0 takes the likeliest token); then only the top_k likeliest stay
    (0: all); then, of these, the fewest likeliest whose probability reaches top_p. Those that equal the
    last one stay too.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1


def sample(
    logits_SV: NDArray[np.float32], params: Sequence[SamplingParams], positions: Sequence[int]
) -> NDArray[np.int64]:
    """Token ids [S]; positions are the indices of these tokens in their own streams."""
    tokens_S = logits_SV.argmax(axis=1)
    drawn = [row for row, p in enumerate(params) if p.temperature >= GREEDY]
    size = max(1, BLOCK // logits_SV.shape[1])
    for start in range(0, len(drawn), size):
        rows = drawn[start : start + size]
        scores_SV = logits_SV[rows] / np.array([[params[row].temperature] for row in rows])
        for scores_V, row in zip(scores_SV, rows, strict=True):
            if params[row].top_k or params[row].top_p < 1:
                exclude_unlikely(scores_V, params[row].top_k, params[row].top_p)
        scores_SV += gumbel_noise([mix(mix(params[row].seed) + positions[row]) for row in rows], logits_SV.shape[1])
        tokens_S[rows] = scores_SV.argmax(axis=1)
    return tokens_S


def exclude_unlikely(scores_V: NDArray[np.float64], top_k: int, top_p: float) -> None:
    """Put -inf, in place, where top_k, then top_p, leave a token out."""
    if 0 < top_k < len(scores_V):
        scores_V[scores_V < np.partition(scores_V, -top_k)[-top_k]] = -np.inf
    if top_p < 1:
        descending = np.sort(scores_V)[::-1]
        reached = np.exp(descending - descending[0]).cumsum()
        last = np.searchsorted(reached, top_p * reached[-1])
        scores_V[scores_V < descending[last]] = -np.inf


def gumbel_noise(keys: Sequence[int], vocab_size: int) -> NDArray[np.float64]:
    """Standard Gumbel noise [keys, V]: row i is a function of keys[i] alone.

    Each 64-bit output of splitmix64 (Steele et al. 2014) gives the noise of two tokens.
    """
    counters = np.arange(1, (vocab_size + 1) // 2 + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = np.array(keys, dtype=np.uint64)[:, None] + counters
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    uniform = (words.view(np.uint32)[:, :vocab_size] + 0.5) * 2.0**-32
    return -np.log(-np.log(uniform))


def mix(value: int) -> int:
    """splitmix64's output for the state `value`, taken modulo 2**64."""
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the n-th text asked for with one seed; the first has the seed itself."""
    return mix(seed + mix(choice)) if choice else seed
