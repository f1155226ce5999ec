"""Memorization and repetition: how much of a text is copied verbatim from other texts, and from itself.

This module needs only numpy: it knows no model and no dataset.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SPAN_LENGTH = 32  # characters; a power of two
GRAM_LENGTH = 4  # tokens

_CHUNK_CHARACTERS = 1 << 20  # searched at a time
_SEPARATOR = "\ud800"  # stands between texts; it is no character, so no span contains it
_TABLE_BITS = 22
_HASH_BASE = 0x9E3779B97F4A7C15  # odd

Tokens = np.ndarray[Any, np.dtype[Any]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def copied_spans(texts: Sequence[str], others: Iterable[str]) -> set[str]:
    """Return the spans of SPAN_LENGTH characters of `texts` that occur verbatim in one of `others`.

    A span may begin at any character. `others` are read once, and are never all in memory.
    """
    pending = {span for text in texts for span in spans(text)}
    copied: set[str] = set()
    hashes, table = _hash_table(pending)
    for chunk in _chunks(others):
        if not pending:
            break
        chunk_hashes = _hashes(chunk)
        candidates = np.flatnonzero(table[_slots(chunk_hashes)])
        candidates = candidates[np.isin(chunk_hashes[candidates], hashes)]
        _, first = np.unique(chunk_hashes[candidates], return_index=True)
        # Comparing the spans themselves excludes hash collisions.
        matches = {chunk[start : start + SPAN_LENGTH] for start in candidates[first].tolist()} & pending
        if matches:
            copied |= matches
            pending -= matches
            hashes, table = _hash_table(pending)
    return copied


def copied_share(texts: Sequence[str], copied: set[str]) -> float | None:
    """Return the share of all spans of the texts that are in `copied`; None if no text is as long as a span."""
    flags = [span in copied for text in texts for span in spans(text)]
    return sum(flags) / len(flags) if flags else None


def spans(text: str) -> Iterator[str]:
    """Return the spans of SPAN_LENGTH characters of a text, one from each character."""
    return (text[start : start + SPAN_LENGTH] for start in range(len(text) - SPAN_LENGTH + 1))


def repetition(samples: Iterable[Sequence[int] | Tokens]) -> float | None:
    """Return the share of a sample's 4-grams of tokens that occur earlier in the sample, averaged over the samples.

    This is seq-rep-4 of Welleck et al. (2019, arXiv:1908.04319). None if every sample is shorter than a 4-gram.
    """
    shares = []
    for sample in samples:
        if len(sample) >= GRAM_LENGTH:
            grams = sliding_window_view(np.asarray(sample), GRAM_LENGTH)
            shares.append(1 - len(np.unique(grams, axis=0)) / len(grams))
    return float(np.mean(shares)) if shares else None


def _hash_table(pending: set[str]) -> tuple[Hashes, Flags]:
    """Return the hashes of spans, and a table of their first bits, which excludes most other spans with one look-up."""
    hashes = _hashes("".join(pending))[::SPAN_LENGTH]
    table = np.zeros(1 << _TABLE_BITS, dtype=np.bool_)
    table[_slots(hashes)] = True
    return hashes, table


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Join the texts and yield chunks of about _CHUNK_CHARACTERS, so that each span of a text is whole in one chunk."""
    parts: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, max(len(text) - SPAN_LENGTH + 1, 0), _CHUNK_CHARACTERS):
            parts.append(text[start : start + _CHUNK_CHARACTERS + SPAN_LENGTH - 1])
            size += len(parts[-1])
            if size >= _CHUNK_CHARACTERS:
                yield _SEPARATOR.join(parts)
                parts, size = [], 0
    if parts:
        yield _SEPARATOR.join(parts)


def _hashes(text: str) -> Hashes:
    """Return a hash of each span: a polynomial of its code points modulo 2^64, computed from those of its halves."""
    hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = 1
    while width < SPAN_LENGTH:
        hashes = hashes[:-width] * np.uint64(pow(_HASH_BASE, width, 1 << 64)) + hashes[width:]
        width *= 2
    return hashes


def _slots(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - _TABLE_BITS)
