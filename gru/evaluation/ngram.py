"""An n-gram model of token ids: the score of a model that only counts, as a baseline for one that learns.

Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128). This module
needs only numpy: it knows no tokenizer, dataset or network.

A context is the tokens before a token. Its id is its position in a sorted table of keys (id of the context that is one
token shorter, token before that), so ids stay small for every order and vocabulary.
"""

from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[Any]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_MIN_DISCOUNT = 0.1  # so that a context in which each token occurred twice leaves probability for other tokens


class NGramModel:
    """An n-gram model of a stream of tokens [N]: documents end to end, each followed by its end-of-text token.

    Counting needs about 100 bytes of memory per token.
    """

    def __init__(self, tokens: Tokens, vocab_size: int, end_of_text: int, order: int = 5) -> None:
        self._vocab_size, self._end_of_text = vocab_size, end_of_text
        self._contexts: list[Integers] = []  # sorted keys of the contexts of each length, from 1
        context = np.zeros(len(tokens), dtype=np.int64)
        for length in range(1, order):
            keys = context * vocab_size + self._tokens_before(tokens, length)
            table, context = np.unique(keys, return_inverse=True)
            self._contexts.append(table)
        grams, counts = np.unique(context * vocab_size + tokens, return_counts=True)
        tables = [_CountTable(grams, counts, vocab_size)]
        for contexts in reversed(self._contexts):
            # The count of a shorter n-gram is the number of different tokens that precede it.
            ids, words = np.divmod(grams, vocab_size)
            grams, counts = np.unique(contexts[ids] // vocab_size * vocab_size + words, return_counts=True)
            tables.append(_CountTable(grams, counts, vocab_size))
        self._tables = tables[::-1]  # by order, from 1

    def losses(self, tokens: Tokens) -> Floats:
        """Return -log of the probability of each token [N] after all tokens before it, in nats.

        The first token is preceded by end-of-text tokens. The probabilities of a vocabulary sum to one.
        """
        probabilities = np.full(len(tokens), 1 / self._vocab_size)
        context = np.zeros(len(tokens), dtype=np.int64)
        positions = np.arange(len(tokens))  # of the tokens whose context occurs in the counts
        for length, table in enumerate(self._tables):
            if length:
                keys = context * self._vocab_size + self._tokens_before(tokens, length)[positions]
                context, seen = _find(self._contexts[length - 1], keys)
                context, positions = context[seen], positions[seen]
            probabilities[positions] = table.interpolate(context, tokens[positions], probabilities[positions])
        return -np.log(probabilities)

    def _tokens_before(self, tokens: Tokens, distance: int) -> Integers:
        """Return the token `distance` before each token [N]."""
        shifted = np.full(len(tokens), self._end_of_text, dtype=np.int64)
        shifted[distance:] = tokens[:-distance]
        return shifted


class _CountTable:
    """The counts of n-grams of one order. grams: sorted keys context * V + token."""

    def __init__(self, grams: Integers, counts: Integers, vocab_size: int) -> None:
        self._grams, self._counts, self._vocab_size = grams, counts.astype(np.int32), vocab_size
        # n1 to n4: numbers of n-grams that occur once to four times; at least 1, so that small texts have discounts.
        n = np.maximum(np.bincount(np.minimum(counts, 5), minlength=6)[1:5], 1)
        share = n[0] / (n[0] + 2 * n[1])
        k = np.arange(1, 4)
        self._discounts = np.concatenate([[0], np.clip(k - (k + 1) * share * n[1:] / n[:-1], _MIN_DISCOUNT, k)])
        contexts = grams // vocab_size
        self._totals = np.bincount(contexts, counts)
        self._discounted = np.bincount(contexts, self._discounts[np.minimum(counts, 3)])

    def interpolate(self, context: Integers, tokens: Tokens, shorter: Floats) -> Floats:
        """Return the probabilities of tokens after contexts that occur in the counts.

        shorter: the probabilities of the same tokens after the contexts that are one token shorter.
        """
        position, seen = _find(self._grams, context * self._vocab_size + tokens)
        counts = np.where(seen, self._counts[position], 0)
        discounted_counts = counts - self._discounts[np.minimum(counts, 3)]
        return (discounted_counts + self._discounted[context] * shorter) / self._totals[context]


def _find(table: Integers, keys: Integers) -> tuple[Integers, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Return the position of each key in a sorted table, and whether the table has it."""
    order = np.argsort(keys)  # sorted keys are near each other in the table: many times as fast if the table is large
    position = np.empty_like(order)
    position[order] = np.searchsorted(table, keys[order])
    position = np.minimum(position, len(table) - 1)
    return position, table[position] == keys
