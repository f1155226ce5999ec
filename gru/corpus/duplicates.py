"""Which documents of the whole corpus repeat an earlier one. The first in source order stays.

Knows documents by their fingerprints only, which whoever reads a partition takes; so the answer is the same
however the work was shared out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_AT_ONCE = 1 << 24  # documents that are sorted together: about 1 GB
_PERMUTATIONS = 128
_SHINGLE = 5
_SHINGLES_AT_ONCE = 1 << 14


class Fingerprints(NamedTuple):
    """Of the documents of a partition, in source order."""

    heldout: Array
    """bool [documents]."""
    hashes: Array
    """uint64 [documents]: equal for equal documents."""
    signatures: Array
    """uint32 [documents, permutations]: MinHash (Broder 1997); [documents, 0] if similarity is of no interest."""


def signature(text: str) -> Array:
    """MinHash [permutations] of the set of 5-character shingles."""
    from datasketch import MinHash

    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    hashes = np.zeros(max(1, len(codes) - _SHINGLE + 1), dtype=np.uint32)
    for start in range(min(_SHINGLE, len(codes))):
        hashes *= np.uint32(0x01000193)  # FNV's prime: a polynomial of the codes
        hashes += codes[start : start + len(hashes)]
    hashes = np.unique(hashes)
    sketch = MinHash(_PERMUTATIONS, hashfunc=int)
    for start in range(0, len(hashes), _SHINGLES_AT_ONCE):
        sketch.update_batch(hashes[start : start + _SHINGLES_AT_ONCE])
    return sketch.hashvalues


def find_equal(counts: Sequence[int], hashes: Callable[[int], Array]) -> dict[int, Array]:
    """Masks [documents] of those that repeat an earlier one, for each partition that has any.

    counts: documents of each partition. hashes: partition with documents -> its hashes; asked for again and again if
    the corpus is large, so that memory stays bounded.
    """
    masks: dict[int, Array] = {}
    filled = [index for index, count in enumerate(counts) if count]
    buckets = -(-sum(counts) // _AT_ONCE)
    for bucket in range(buckets):
        chosen, places = [], []
        for index in filled:
            own = hashes(index)
            inside = np.flatnonzero(own % np.uint64(buckets) == bucket)
            chosen.append(own[inside])
            places.append(inside)
        _, first = np.unique(np.concatenate(chosen), return_index=True)  # the first of equals: its sort is stable
        repeated = np.ones(sum(map(len, chosen)), dtype=bool)
        repeated[first] = False
        start = 0
        for index, inside in zip(filled, places, strict=True):
            own = repeated[start : start + len(inside)]
            start += len(inside)
            if own.any():
                masks.setdefault(index, np.zeros(counts[index], dtype=bool))[inside[own]] = True
    return masks


def find_similar(
    counts: Sequence[int], signatures: Callable[[int], Array], equal: dict[int, Array], similarity: float
) -> dict[int, Array]:
    """As `find_equal`, of those whose estimated Jaccard similarity to a document that stays is at least `similarity`.

    All of the signatures are kept in memory: about 3 KB a document.
    """
    from datasketch import MinHash, MinHashLSH

    # For candidates only; beyond this threshold the library has no bands to offer.
    kept = MinHashLSH(threshold=min(similarity, 0.98), num_perm=_PERMUTATIONS)
    sketches: dict[tuple[int, int], MinHash] = {}
    masks: dict[int, Array] = {}
    permutations = MinHash(_PERMUTATIONS).permutations
    for index, count in enumerate(counts):
        for ordinal, values in enumerate(signatures(index) if count else ()):
            if index in equal and equal[index][ordinal]:
                continue
            sketch = MinHash(hashvalues=values, permutations=permutations, scheme="affine32")
            if any(sketches[other].jaccard(sketch) >= similarity for other in kept.query(sketch)):
                masks.setdefault(index, np.zeros(count, dtype=bool))[ordinal] = True
            else:
                sketches[index, ordinal] = sketch
                kept.insert((index, ordinal), sketch)
    return masks
