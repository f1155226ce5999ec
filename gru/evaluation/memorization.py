"""How much of a text is copied: verbatim from other texts, and from itself.

numpy alone: it knows no model and no dataset.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SPAN = 32  # characters; a power of two
GRAM = 4  # tokens

_PIECE = 1 << 20  # characters that are searched at a time
_BETWEEN = "\ud800"  # texts; no character, so that no span has it
_TABLE_BITS = 22
_BASE = 0x9E3779B97F4A7C15  # odd

Tokens = np.ndarray[Any, np.dtype[Any]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def copied_spans(texts: Sequence[str], others: Iterable[str]) -> set[str]:
    """The spans of SPAN characters in `texts`, from any character on, that stand verbatim in one of the others.

    The others are read once, and never held all at once.
    """
    left = {span for text in texts for span in spans(text)}
    found: set[str] = set()
    known, likely = _lookup(left)
    for piece in _pieces(others):
        if not left:
            break
        hashes = _hashes(piece)
        places = np.flatnonzero(likely[_slot(hashes)])
        places = places[np.isin(hashes[places], known)]
        _, first = np.unique(hashes[places], return_index=True)
        here = {piece[place : place + SPAN] for place in places[first].tolist()} & left  # a hash alone proves nothing
        if here:
            found |= here
            left -= here
            known, likely = _lookup(left)
    return found


def copied_share(texts: Sequence[str], found: set[str]) -> float | None:
    """The share of all spans of the texts that are among the found ones; None where no text is that long."""
    copied = [span in found for text in texts for span in spans(text)]
    return sum(copied) / len(copied) if copied else None


def spans(text: str) -> Iterator[str]:
    return (text[start : start + SPAN] for start in range(len(text) - SPAN + 1))


def repetition(samples: Iterable[Sequence[int] | Tokens]) -> float | None:
    """The share of a sample's 4-grams of tokens that stand earlier in the same sample, on average over the samples:
    seq-rep-4 of Welleck et al. (2019, arXiv:1908.04319). None where no sample is that long."""
    shares = []
    for sample in samples:
        if len(sample) >= GRAM:
            grams = sliding_window_view(np.asarray(sample), GRAM)
            shares.append(1 - len(np.unique(grams, axis=0)) / len(grams))
    return float(np.mean(shares)) if shares else None


def _lookup(wanted: set[str]) -> tuple[Hashes, Flags]:
    """The hashes of spans, and a table of their first bits that rules out most others at one look."""
    known = _hashes("".join(wanted))[::SPAN]
    likely = np.zeros(1 << _TABLE_BITS, dtype=np.bool_)
    likely[_slot(known)] = True
    return known, likely


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts joined and cut into pieces of about _PIECE characters, so that each span of a text is in one."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, max(len(text) - SPAN + 1, 0), _PIECE):
            waiting.append(text[start : start + _PIECE + SPAN - 1])
            size += len(waiting[-1])
            if size >= _PIECE:
                yield _BETWEEN.join(waiting)
                waiting, size = [], 0
    if waiting:
        yield _BETWEEN.join(waiting)


def _hashes(text: str) -> Hashes:
    """A hash of each span: a polynomial of its code points modulo 2^64, made from those of its halves."""
    hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    width = 1
    while width < SPAN:
        hashes = hashes[:-width] * np.uint64(pow(_BASE, width, 1 << 64)) + hashes[width:]
        width *= 2
    return hashes


def _slot(hashes: Hashes) -> Hashes:
    return hashes >> np.uint64(64 - _TABLE_BITS)
