import math
from collections import Counter

import numpy as np
import pytest

from gru.evaluation.ngram import NGramModel

V, END = 6, 0


def corpus(length: int) -> np.ndarray:
    """Return tokens of a skewed distribution that depend on the token before, so that small and large counts occur."""
    generator = np.random.default_rng(0)
    tokens = [END]
    for _ in range(length):
        follower = (2 * tokens[-1] + 1) % (V - 1)
        tokens.append(int(follower if generator.random() < 0.6 else min(V - 2, generator.geometric(0.4) - 1)))
    return np.array(tokens, dtype=np.uint16)


@pytest.mark.parametrize("length", [3, 40, 2000])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one_after_any_context(length: int, order: int) -> None:
    model = NGramModel(corpus(length), V, END, order)
    generator = np.random.default_rng(1)
    contexts = [corpus(50)[-7:], np.array([V - 1] * 5), np.array([2]), *generator.integers(0, V, (20, 6))]
    for context in contexts:
        probabilities = [math.exp(-model.losses(np.append(context, word))[-1]) for word in range(V)]
        assert sum(probabilities) == pytest.approx(1)
        assert min(probabilities) > 0  # also of the last id, which never occurs in the corpus


def test_losses_equal_those_of_a_plain_implementation() -> None:
    """The reference is Chen and Goodman's recursion over dictionaries, context by context."""
    order, tokens = 3, corpus(500).tolist()
    padded = [END] * (order - 1) + tokens
    counts = [Counter(tuple(padded[i - order + 1 : i + 1]) for i in range(order - 1, len(padded)))]
    for _ in range(order - 1):
        counts.insert(0, Counter(gram[1:] for gram in counts[0]))

    def discount(table: Counter[tuple[int, ...]], count: int) -> float:
        n = [max(1, list(table.values()).count(k)) for k in range(5)]
        k = min(count, 3)
        return min(k, max(0.1, k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k])) if k else 0.0

    def probability(context: tuple[int, ...], word: int) -> float:
        shorter = probability(context[1:], word) if context else 1 / V
        table = counts[len(context)]
        followers = [count for gram, count in table.items() if gram[:-1] == context]
        if not followers:
            return shorter
        count = table[(*context, word)]
        discounted = sum(discount(table, c) for c in followers)
        return (count - discount(table, count) + discounted * shorter) / sum(followers)

    heldout = [1, 3, 2, V - 1, 1, 0, 2, 2, 4]
    before = [END] * (order - 1) + heldout
    expected = [-math.log(probability(tuple(before[i : i + order - 1]), word)) for i, word in enumerate(heldout)]
    model = NGramModel(np.array(tokens), V, END, order)
    assert {1, 2, 3, 4} <= set(counts[-1].values()), "the formula uses all of these counts"
    assert model.losses(np.array(heldout)) == pytest.approx(expected)


def test_frequent_tokens_have_a_low_loss() -> None:
    text = np.tile(np.arange(5), 200)
    model = NGramModel(text, V, END)
    assert model.losses(text)[10:].max() < 0.05
    assert model.losses(np.array([0, 1, 2, 3, V - 1]))[-1] > 5
