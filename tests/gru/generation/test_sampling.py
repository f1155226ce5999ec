import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from gru.generation import sampling
from gru.generation.sampling import (
    Draw,
    History,
    SamplingParams,
    choice_seed,
    draw_native,
    draw_numpy,
    exclude_unlikely,
    gumbel_noise,
    logprobs,
    mix,
    sample,
)

V = 37


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 2


def draws(params: Sequence[SamplingParams], positions: Iterable[int]) -> list[Draw]:
    return [Draw(each, position) for each, position in zip(params, positions, strict=True)]


def kept_tokens(scores: np.ndarray, **limits: float) -> set[int]:
    scores = scores.astype(np.float64)
    exclude_unlikely(scores, SamplingParams(0, **limits))
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def test_zero_temperature_takes_the_likeliest() -> None:
    rows = logits(5)
    params = [SamplingParams(seed=i, temperature=0, top_k=3, top_p=0.5) for i in range(5)]
    assert sample(rows, draws(params, range(5))).tolist() == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("top_k", [1, 5, V, V + 1])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    row = logits(1)[0]
    assert kept_tokens(row, top_k=top_k) == set(np.argsort(-row)[:top_k].tolist())


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("top_k", [0, 8])
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, top_k: int) -> None:
    row = logits(1)[0].astype(np.float64)
    order = np.argsort(-row)[: top_k or V]
    probabilities = np.exp(row[order]) / np.exp(row[order]).sum()
    expected, mass = set(), 0.0
    for token, probability in zip(order.tolist(), probabilities, strict=True):
        expected.add(token)
        mass += probability
        if mass >= top_p:
            break
    assert kept_tokens(row, top_k=top_k, top_p=top_p) == expected


def test_tokens_with_equal_logits_are_kept_together() -> None:
    row = np.array([0.0, 1.0, 1.0, 1.0])
    assert kept_tokens(row, top_k=1) == kept_tokens(row, top_p=0.1) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    count = 60_000
    row = logits(1)[0]
    scaled = row.astype(np.float64) / temperature
    expected = np.exp(scaled) / np.exp(scaled).sum()
    params = [SamplingParams(seed=7, temperature=temperature)] * count
    tokens = sample(np.tile(row, (count, 1)), draws(params, range(count)))
    frequencies = np.bincount(tokens, minlength=V) / count
    assert np.all(np.abs(frequencies - expected) < 5 * np.sqrt(expected / count) + 1e-4)


def test_a_row_is_drawn_the_same_in_any_batch() -> None:
    rows = logits(64)
    settings = [(1.0, 0, 1.0), (0.5, 5, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0), (1.0, 9, 0.9)]
    params = [SamplingParams(i, *settings[i % len(settings)]) for i in range(64)]
    positions = list(range(100, 164))
    together = sample(rows, draws(params, positions))
    for i in range(64):
        assert sample(rows[i : i + 1], [Draw(params[i], positions[i])]).tolist() == [together[i]]
    order = np.random.default_rng(1).permutation(64)[:33]
    shuffled = sample(rows[order], [Draw(params[i], positions[i]) for i in order])
    assert shuffled.tolist() == together[order].tolist()


def test_noise_does_not_repeat_between_positions_seeds_and_choices() -> None:
    keys = {mix(mix(seed) + position) for seed in range(100) for position in range(100)}
    assert len(keys) == 10_000
    noise = np.stack([gumbel_noise(key, V) for key in sorted(keys)[:1000]])
    assert noise.shape == (1000, V) and np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.03
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(seed, i) for seed in range(50) for i in range(50)}) == 2500


@pytest.mark.parametrize("vocab_size", [1, 2, 37, 5000])
@pytest.mark.parametrize("scale", [0.0, 2.0, 50.0])
def test_the_compiled_draw_equals_the_numpy_one(vocab_size: int, scale: float) -> None:
    chance = np.random.default_rng(0)
    wider = (chance.normal(size=(300, vocab_size + 3)) * scale).astype(np.float32)
    rows = wider[:, :vocab_size]  # not contiguous, like the logits of the native model
    rows[:, ::5] = -np.inf
    rows[:, vocab_size // 2] = 0
    seeds, positions = (chance.integers(0, 1 << 63, 300).tolist() for _ in range(2))
    temperatures = chance.uniform(0.01, 3, 300).tolist()
    library = sampling._library()
    assert library is not None, "this machine has a compiler"
    arguments = rows, temperatures, seeds, positions
    assert draw_native(library, *arguments).tolist() == draw_numpy(*arguments).tolist()


def test_any_integer_is_a_seed() -> None:
    row = logits(1)
    for seed in (-1, 0, 2**64, 2**100):
        assert 0 <= sample(row, [Draw(SamplingParams(seed), 0)])[0] < V


def test_min_p_keeps_tokens_that_are_probable_enough() -> None:
    row = logits(1)[0].astype(np.float64)
    share = np.exp(row - row.max())
    for min_p in (1e-6, 0.1, 0.5, 1.0):
        assert kept_tokens(row, min_p=min_p) == set(np.flatnonzero(share >= min_p * (1 - 1e-12)).tolist())
    assert kept_tokens(row, min_p=0.3, top_k=2) == kept_tokens(row, min_p=0.3) & kept_tokens(row, top_k=2)


def greedy(row: np.ndarray, generated: Sequence[int], prompt: Sequence[int] = (), **penalties: float) -> int:
    history = History(prompt, V)
    for token in generated:
        history.add(token)
    before = row.copy()
    [token] = sample(row[None], [Draw(SamplingParams(0, temperature=0, **penalties), 0, history)]).tolist()
    assert np.array_equal(row, before), "sample must not change the logits of the model"
    return token


def test_penalties_change_the_logits_as_their_definitions_say() -> None:
    row = np.full(V, -5, np.float32)
    row[[3, 7]] = 2.0, 1.5
    assert greedy(row, [3, 3], frequency_penalty=0.2) == 3  # 2 - 2 * 0.2 > 1.5
    assert greedy(row, [3, 3], frequency_penalty=0.3) == 7
    assert greedy(row, [3, 3], presence_penalty=0.4) == 3
    assert greedy(row, [3, 3], presence_penalty=0.6) == 7
    assert greedy(row, [], [3], presence_penalty=2, frequency_penalty=2) == 3  # these penalties ignore the prompt
    assert greedy(row, [], [3], repetition_penalty=1.5) == 7  # this one does not: 2 / 1.5 < 1.5
    assert greedy(-row - 5, [3], repetition_penalty=2.0, presence_penalty=-2) != 3
    negative = np.full(V, -9, np.float32)
    negative[[3, 7]] = -1.0, -1.5
    assert greedy(negative, [3], repetition_penalty=2.0) == 7  # -1 * 2 < -1.5
    assert greedy(negative, [3], presence_penalty=-2, frequency_penalty=-2) == 3


def test_logit_bias_decides() -> None:
    row = logits(1)
    for token in (0, V - 1):
        [drawn] = sample(row, [Draw(SamplingParams(1, logit_bias={token: 100.0}), 0)]).tolist()
        assert drawn == token
    never = SamplingParams(1, logit_bias={int(row[0].argmax()): -100.0})
    tokens = sample(np.tile(row, (500, 1)), draws([never] * 500, range(500)))
    assert int(row[0].argmax()) not in tokens


def test_penalties_of_one_row_do_not_change_the_others() -> None:
    rows = logits(3)
    plain = [Draw(SamplingParams(i), i) for i in range(3)]
    history = History([int(rows[1].argmax())], V)
    mixed = [plain[0], Draw(SamplingParams(1, repetition_penalty=5.0), 1, history), plain[2]]
    assert sample(rows, mixed)[[0, 2]].tolist() == sample(rows, plain)[[0, 2]].tolist()


def test_logprobs_are_the_models_own() -> None:
    row = logits(1)[0]
    exact = row.astype(np.float64) - math.log(np.exp(row.astype(np.float64)).sum())
    reported = logprobs(row, 5, 3)
    assert reported.token == pytest.approx(exact[5])
    assert [token for token, _ in reported.top] == np.argsort(-exact)[:3].tolist()
    assert [value for _, value in reported.top] == pytest.approx(sorted(exact, reverse=True)[:3])
    assert logprobs(row, 5, 0).top == () and len(logprobs(row, 5, 99).top) == V
