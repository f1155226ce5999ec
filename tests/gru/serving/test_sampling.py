import numpy as np
import pytest

from gru.serving.sampling import SamplingParams, choice_seed, exclude_unlikely, gumbel_noise, mix, sample

V = 37


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 2


def kept(scores: np.ndarray, top_k: int, top_p: float) -> set[int]:
    scores = scores.astype(np.float64)
    exclude_unlikely(scores, top_k, top_p)
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def test_zero_temperature_takes_the_likeliest() -> None:
    rows = logits(5)
    params = [SamplingParams(seed=i, temperature=0, top_k=3, top_p=0.5) for i in range(5)]
    assert sample(rows, params, range(5)).tolist() == rows.argmax(axis=1).tolist()


@pytest.mark.parametrize("top_k", [1, 5, V, V + 1])
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    row = logits(1)[0]
    assert kept(row, top_k, 1.0) == set(np.argsort(-row)[:top_k].tolist())


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
    assert kept(row, top_k, top_p) == expected


def test_equal_logits_stay_together() -> None:
    row = np.array([0.0, 1.0, 1.0, 1.0])
    assert kept(row, 1, 1.0) == kept(row, 0, 0.1) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    draws = 60_000
    row = logits(1)[0]
    scaled = row.astype(np.float64) / temperature
    expected = np.exp(scaled) / np.exp(scaled).sum()
    params = [SamplingParams(seed=7, temperature=temperature)] * draws
    tokens = sample(np.tile(row, (draws, 1)), params, range(draws))
    frequencies = np.bincount(tokens, minlength=V) / draws
    assert np.all(np.abs(frequencies - expected) < 5 * np.sqrt(expected / draws) + 1e-4)


def test_a_row_is_drawn_the_same_in_any_batch() -> None:
    rows = logits(64)
    settings = [(1.0, 0, 1.0), (0.5, 5, 1.0), (1.3, 0, 0.8), (0.0, 0, 1.0), (1.0, 9, 0.9)]
    params = [SamplingParams(i, *settings[i % len(settings)]) for i in range(64)]
    positions = list(range(100, 164))
    together = sample(rows, params, positions)
    for i in range(64):
        assert sample(rows[i : i + 1], [params[i]], [positions[i]]).tolist() == [together[i]]
    order = np.random.default_rng(1).permutation(64)[:33]
    shuffled = sample(rows[order], [params[i] for i in order], [positions[i] for i in order])
    assert shuffled.tolist() == together[order].tolist()


def test_noise_does_not_repeat_between_positions_seeds_and_choices() -> None:
    keys = {mix(mix(seed) + position) for seed in range(100) for position in range(100)}
    assert len(keys) == 10_000
    noise = gumbel_noise(sorted(keys)[:1000], V)
    assert noise.shape == (1000, V) and np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.03
    assert choice_seed(5, 0) == 5
    assert len({choice_seed(seed, i) for seed in range(50) for i in range(50)}) == 2500


def test_any_integer_is_a_seed() -> None:
    row = logits(1)
    for seed in (-1, 0, 2**64, 2**100):
        assert 0 <= sample(row, [SamplingParams(seed)], [0])[0] < V
