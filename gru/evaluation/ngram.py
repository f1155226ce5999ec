"""An n-gram model of token ids: what a model that counts makes of a text, as the scale for one that learns.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128). numpy alone: it knows
nothing of tokenizers, datasets or networks.

A context is the tokens before one, and has the number of its place in a sorted table of (context that is one token
shorter, token before that): numbers stay small, whatever the order and the vocabulary.
"""

from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[Any]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_LEAST_DISCOUNT = 0.1  # so that a context which saw each of its tokens twice leaves something for the others


class NGramModel:
    """Counted on a stream of tokens [N], documents end to end, each with its end of text.

    Memory: some 100 bytes a token while it counts.
    """

    def __init__(self, tokens: Tokens, vocab_size: int, end_of_text: int, order: int = 5) -> None:
        self._vocab_size, self._end_of_text = vocab_size, end_of_text
        self._contexts: list[Numbers] = []  # of each length from 1: (number of the shorter, token before) as one key
        context = np.zeros(len(tokens), dtype=np.int64)
        for length in range(1, order):
            keys = context * vocab_size + self._before(tokens, length)
            table, context = np.unique(keys, return_inverse=True)
            self._contexts.append(table)
        grams, counts = np.unique(context * vocab_size + tokens, return_counts=True)
        tables = [_Table(grams, counts, vocab_size)]
        for contexts in reversed(self._contexts):
            # A shorter n-gram counts as often as there are different tokens before it.
            holders, words = np.divmod(grams, vocab_size)
            grams, counts = np.unique(contexts[holders] // vocab_size * vocab_size + words, return_counts=True)
            tables.append(_Table(grams, counts, vocab_size))
        self._tables = tables[::-1]  # by order, from 1

    def losses(self, tokens: Tokens) -> Floats:
        """-log of the probability of each token [N] after all before it, in nats; ends of text come before the first.

        Over the vocabulary the probabilities sum to one.
        """
        chances = np.full(len(tokens), 1 / self._vocab_size)
        context = np.zeros(len(tokens), dtype=np.int64)
        known = np.arange(len(tokens))  # places whose context was seen
        for length, table in enumerate(self._tables):
            if length:
                keys = context * self._vocab_size + self._before(tokens, length)[known]
                context, seen = _find(self._contexts[length - 1], keys)
                context, known = context[seen], known[seen]
            chances[known] = table.interpolate(context, tokens[known], chances[known])
        return -np.log(chances)

    def _before(self, tokens: Tokens, distance: int) -> Numbers:
        """The token that is `distance` before each one [N]."""
        shifted = np.full(len(tokens), self._end_of_text, dtype=np.int64)
        shifted[distance:] = tokens[:-distance]
        return shifted


class _Table:
    """n-grams of one order. grams: sorted context * V + token."""

    def __init__(self, grams: Numbers, counts: Numbers, vocab_size: int) -> None:
        self._grams, self._counts, self._vocab_size = grams, counts.astype(np.int32), vocab_size
        # n1 to n4: n-grams that occur once to four times; of none there counts as one, or small texts had no discounts.
        n = np.maximum(np.bincount(np.minimum(counts, 5), minlength=6)[1:5], 1)
        share = n[0] / (n[0] + 2 * n[1])
        k = np.arange(1, 4)
        self._discounts = np.concatenate([[0], np.clip(k - (k + 1) * share * n[1:] / n[:-1], _LEAST_DISCOUNT, k)])
        holders = grams // vocab_size
        self._totals = np.bincount(holders, counts)
        self._left = np.bincount(holders, self._discounts[np.minimum(counts, 3)])

    def interpolate(self, context: Numbers, tokens: Tokens, shorter: Floats) -> Floats:
        """Probabilities of tokens after contexts that were seen, from those after the contexts one token shorter."""
        place, seen = _find(self._grams, context * self._vocab_size + tokens)
        counts = np.where(seen, self._counts[place], 0)
        own = counts - self._discounts[np.minimum(counts, 3)]
        return (own + self._left[context] * shorter) / self._totals[context]


def _find(table: Numbers, keys: Numbers) -> tuple[Numbers, np.ndarray[Any, np.dtype[np.bool_]]]:
    """The place of each key in a sorted table, and whether it is there."""
    order = np.argsort(keys)  # neighbours are near each other in the table: many times as fast where that is large
    place = np.empty_like(order)
    place[order] = np.searchsorted(table, keys[order])
    place = np.minimum(place, len(table) - 1)
    return place, table[place] == keys
