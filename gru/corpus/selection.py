"""The selection among the drafts: which documents do not stay, and what is held out if no document's hash says so.

A document does not stay if it is equal or similar to an earlier one. The result depends on the drafts only, in source
order, so it is the same for any number of workers.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gru.corpus import duplicates
from gru.corpus.dataset import HeldoutBy
from gru.corpus.duplicates import Array
from gru.corpus.partitions import Partition
from gru.corpus.rewrite import HoldOut
from gru.corpus.shards import PartitionResult, ShardContext, read_fingerprints
from gru.terminal import counted

Masks = dict[int, Array]


@dataclass
class Selection:
    """What is to be changed in the drafts, by partition; the others stay as they are."""

    removed: dict[int, dict[str, Array]] = field(default_factory=dict)
    """Masks [documents] of the documents to remove, by partition and reason; a document is in at most one mask."""
    hold_out: dict[int, HoldOut] = field(default_factory=dict)
    heldout_by: HeldoutBy = "hash"
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of documents that do not stay, by reason, to be added to those of the drafts."""

    @property
    def changed(self) -> list[int]:
        """The partitions that must be rewritten."""
        return sorted({*self.removed, *self.hold_out})

    def remove(self, reason: str, masks: Masks) -> None:
        """Add the masks of documents that do not stay for this reason."""
        for index, mask in masks.items():
            self.removed.setdefault(index, {})[reason] = mask
            self.dropped[reason] += int(mask.sum())

    def masks(self) -> Masks:
        """Return the masks of all documents that do not stay."""
        return {index: np.logical_or.reduce([*masks.values()]) for index, masks in self.removed.items()}


def select(
    context: ShardContext,
    drafts: list[PartitionResult],
    partitions: list[Partition],
    progress: Callable[[str], None],
) -> Selection:
    """Choose the documents to remove from the drafts, and what to hold out if no remaining document is held out."""
    selection = Selection(heldout_by=context.corpus.heldout)
    _find_repeated(context, drafts, selection, progress)
    _hold_out(context, drafts, partitions, selection, progress)
    return selection


def _find_repeated(
    context: ShardContext, drafts: list[PartitionResult], selection: Selection, progress: Callable[[str], None]
) -> None:
    """Remove the documents that equal, or are similar to, an earlier one that stays."""
    if context.corpus.deduplicate == "none":
        return
    counts = [part.documents for part in drafts]
    progress(f"looking for duplicates among {counted(sum(counts), 'document')}")
    selection.remove(
        "duplicate",
        duplicates.find_equal(counts, lambda index: read_fingerprints(context, index).hashes, selection.masks()),
    )
    if context.corpus.deduplicate == "near":
        similar = duplicates.find_similar(
            counts,
            lambda index: read_fingerprints(context, index).signatures,
            selection.masks(),
            context.corpus.near_similarity,
        )
        selection.remove("near_duplicate", similar)


def _hold_out(
    context: ShardContext,
    drafts: list[PartitionResult],
    partitions: list[Partition],
    selection: Selection,
    progress: Callable[[str], None],
) -> None:
    """Choose what is held out if none of the documents that stay is.

    Of text files without a separator, and of a single document, it is the end; of records the one with the lowest hash.
    """
    removed = selection.masks()
    stays = [
        ~removed[index] if index in removed else np.ones(d.documents, dtype=bool) for index, d in enumerate(drafts)
    ]
    heldout = sum(
        int((read_fingerprints(context, index).heldout & stays[index]).sum()) if index in removed else _heldout(draft)
        for index, draft in enumerate(drafts)
    )
    documents = sum(int(mask.sum()) for mask in stays)
    if (heldout and documents > 1) or not documents:
        return
    characters = sum(
        int(read_fingerprints(context, index).characters[mask].sum()) for index, mask in enumerate(stays) if mask.any()
    )
    if characters < 2:
        return
    share = context.corpus.heldout_share
    files = [span.file for partition in partitions for span in partition]
    one_text = all(file.kind == "text" and not file.options.separator for file in files)
    why = f"none of the {documents:,} documents is held out by corpus.heldout_share = {share}"
    if documents == 1:
        why = f"there is one document, and corpus.heldout_share = {share}"
    if documents == 1 or one_text or context.corpus.heldout == "tail":
        index = max(index for index, mask in enumerate(stays) if mask.any())
        last = int(np.flatnonzero(stays[index])[-1])
        selection.hold_out[index] = HoldOut(last, math.ceil(characters * share))
        selection.heldout_by = "tail"
        progress(f"{why}: holding out the end of the last document")
    else:
        index, document = _lowest_hash(context, stays)
        selection.hold_out[index] = HoldOut(document, None)
        selection.heldout_by = "lowest_hash"
        progress(f"{why}: holding out the document with the lowest hash")


def _heldout(draft: PartitionResult) -> int:
    """Return the number of held-out documents in a draft."""
    return sum(shard.counts.documents for shard in draft.shards if shard.split == "heldout")


def _lowest_hash(context: ShardContext, stays: list[Array]) -> tuple[int, int]:
    """Return (partition, document) of the document with the lowest hash among those that stay.

    One that is there once is preferred, so that no copy of it stays in the text to train on.
    """
    places = [(index, document) for index, mask in enumerate(stays) for document in np.flatnonzero(mask).tolist()]
    hashes = [read_fingerprints(context, index).hashes[mask] for index, mask in enumerate(stays) if mask.any()]
    _, first, counts = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
    once = first[counts == 1]
    return places[int((once if len(once) else first)[0])]
