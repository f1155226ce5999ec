"""Deduplication: finds the documents that equal, or are similar to, an earlier one of the whole corpus.

The first in source order is kept. This module sees only fingerprints, computed when a partition is read, so the
result does not depend on how the work was distributed.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_SORTED_DOCUMENTS = 1 << 24  # documents sorted in one pass, which needs about 1 GB
_PERMUTATIONS = 128
_SHINGLE = 5  # characters in a shingle
_SHINGLE_BATCH = 1 << 14  # shingles in one update of MinHash


class Fingerprints(NamedTuple):
    """The fingerprints of a partition's documents, in source order."""

    heldout: Array
    """bool [documents]: whether each document is held out."""
    hashes: Array
    """uint64 [documents]: equal for equal documents."""
    signatures: Array
    """uint32 [documents, permutations]: MinHash (Broder 1997); [documents, 0] without near deduplication."""
    characters: Array
    """int64 [documents]: length of each document."""


def signature(text: str) -> Array:
    """Return the MinHash [permutations] of the set of 5-character shingles of a text."""
    from datasketch import MinHash

    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    hashes = np.zeros(max(1, len(codes) - _SHINGLE + 1), dtype=np.uint32)
    for start in range(min(_SHINGLE, len(codes))):
        hashes *= np.uint32(0x01000193)  # the prime of FNV: the hash is a polynomial of the codes
        hashes += codes[start : start + len(hashes)]
    hashes = np.unique(hashes)
    sketch = MinHash(_PERMUTATIONS, hashfunc=int)
    for start in range(0, len(hashes), _SHINGLE_BATCH):
        sketch.update_batch(hashes[start : start + _SHINGLE_BATCH])
    return sketch.hashvalues


def find_equal(
    counts: Sequence[int], hashes: Callable[[int], Array], removed: Mapping[int, Array] = MappingProxyType({})
) -> dict[int, Array]:
    """Return, for each partition that has any, the mask [documents] of those that equal an earlier document.

    counts: number of documents in each partition. hashes: partition -> hashes of its documents; called several times
    per partition if the corpus is large, so that memory stays bounded. removed: masks of documents that are left out
    for other reasons, and so equal to none.
    """
    masks: dict[int, Array] = {}
    nonempty = [index for index, count in enumerate(counts) if count]
    buckets = -(-sum(counts) // _SORTED_DOCUMENTS)
    for bucket in range(buckets):
        chosen, positions = [], []
        for index in nonempty:
            own = hashes(index)
            chosen_here = own % np.uint64(buckets) == bucket
            inside = np.flatnonzero(chosen_here & ~removed[index] if index in removed else chosen_here)
            chosen.append(own[inside])
            positions.append(inside)
        _, first = np.unique(np.concatenate(chosen), return_index=True)  # the first of equal ones: the sort is stable
        repeated = np.ones(sum(map(len, chosen)), dtype=bool)
        repeated[first] = False
        start = 0
        for index, inside in zip(nonempty, positions, strict=True):
            own = repeated[start : start + len(inside)]
            start += len(inside)
            if own.any():
                masks.setdefault(index, np.zeros(counts[index], dtype=bool))[inside[own]] = True
    return masks


def find_similar(
    counts: Sequence[int], signatures: Callable[[int], Array], removed: Mapping[int, Array], similarity: float
) -> dict[int, Array]:
    """As `find_equal`, for documents whose estimated Jaccard similarity to an earlier, kept one is >= `similarity`.

    All signatures are held in memory: about 3 KB per document.
    """
    from datasketch import MinHash, MinHashLSH

    # The index gives candidates only; above this threshold the library has no choice of bands.
    index_of_kept = MinHashLSH(threshold=min(similarity, 0.98), num_perm=_PERMUTATIONS)
    sketches: dict[tuple[int, int], MinHash] = {}
    masks: dict[int, Array] = {}
    permutations = MinHash(_PERMUTATIONS).permutations
    for index, count in enumerate(counts):
        for ordinal, values in enumerate(signatures(index) if count else ()):
            if index in removed and removed[index][ordinal]:
                continue
            sketch = MinHash(hashvalues=values, permutations=permutations, scheme="affine32")
            if any(sketches[other].jaccard(sketch) >= similarity for other in index_of_kept.query(sketch)):
                masks.setdefault(index, np.zeros(count, dtype=bool))[ordinal] = True
            else:
                sketches[index, ordinal] = sketch
                index_of_kept.insert((index, ordinal), sketch)
    return masks
