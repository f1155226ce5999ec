"""The rewrite of a partition's draft: without the documents that do not stay, and with one held out if none was.

It is a pure function of the draft and of what is to change. This module does not know how that was decided.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow.parquet as pq

from gru import storage
from gru.corpus.dataset import Counts, Shard, Split, decode
from gru.corpus.documents import document_hash, text_digest
from gru.corpus.dropped import DroppedWriter
from gru.corpus.duplicates import Array
from gru.corpus.shard_writer import EncodedDocuments, ShardWriter
from gru.corpus.shards import (
    PartitionResult,
    ShardContext,
    append_end_of_text,
    read_fingerprints,
    shard_name,
)

_NEAR = 1000  # characters before the wanted end within which a text is rather cut at a line end, or else at a space


class HoldOut(NamedTuple):
    """A document of a partition that is to be held out, or the end of it."""

    document: int  # its index among the partition's documents
    characters: int | None  # about how many at its end; None: all of it


class _Document(NamedTuple):
    source: str
    text: bytes


def rewrite(
    context: ShardContext,
    index: int,
    part: PartitionResult,
    removed: Mapping[str, Array],
    hold_out: HoldOut | None = None,
) -> PartitionResult:
    """Write the shards of a draft without the documents of the masks [documents], in source order.

    removed: masks by reason, of which each document is in at most one. hold_out: a document that stays, the last one if
    only its end is held out; no other document that stays may be held out.
    """
    rewriting = _Rewriting(context, index, part, removed, hold_out)
    try:
        shards = [shard for draft in part.shards if (shard := rewriting.rewritten(draft))]
        shards += rewriting.write_held()
        rewriting.dropped.close()
    finally:
        rewriting.dropped.abandon()
    return part.model_copy(update={"shards": shards, "heldout": f"{rewriting.heldout_sum % 2**256:064x}"})


class _Rewriting:
    """The state of one rewrite."""

    def __init__(
        self,
        context: ShardContext,
        index: int,
        part: PartitionResult,
        removed: Mapping[str, Array],
        hold_out: HoldOut | None,
    ) -> None:
        self._context, self._index, self._hold_out = context, index, hold_out
        self._tokenizer = context.tokenizer()
        self._is_heldout = read_fingerprints(context, index).heldout
        reasons = np.full(len(self._is_heldout), "", dtype=object)
        for reason, mask in removed.items():
            reasons[mask] = reason
        self._reasons = reasons
        self._held: _Document | None = None
        self._source = part.shards[0].source if part.shards else 0
        self.heldout_sum = int(part.heldout, 16)
        self.dropped = DroppedWriter(context.dropped_file(f"{index:05d}-duplicates.jsonl"))

    def rewritten(self, draft: Shard) -> Shard | None:
        """Write a shard of the draft again, and return its entry in the manifest, or None if nothing of it stays."""
        documents = np.flatnonzero(self._is_heldout == (draft.split == "heldout"))
        counts, first = draft.counts, 0
        with self._writer(draft.name, draft.source) as writer:
            for batch in _read_shard(self._context.work_file(draft.name), self._tokenizer.end_of_text):
                own = documents[first : first + len(batch.ends)]
                first += len(own)
                stays = self._reasons[own] == ""
                if self._hold_out:
                    stays &= own != self._hold_out.document
                for i in np.flatnonzero(~stays).tolist():
                    ids = batch.tokens[batch.ends[i - 1] if i else 0 : batch.ends[i]]
                    document = _Document(batch.sources[i], decode(self._tokenizer, ids))
                    counts -= _counts(document.text, len(ids))
                    self._take(int(own[i]), document, draft)
                writer.add(batch.select(stays))
            if draft.split == "train" and (head := self._split_held()):
                encoded = self._encode(*head)
                writer.add(encoded)
                counts += _counts(head.text, len(encoded.tokens))
            shard = writer.close(draft.split, counts.bytes, counts.characters)
        assert shard is None or shard.counts == counts, f"{draft.name}: {shard} remains, not {counts}"
        return shard

    def _take(self, index: int, document: _Document, shard: Shard) -> None:
        """Record a document that does not stay in its shard."""
        if shard.split == "heldout":
            self.heldout_sum -= int.from_bytes(text_digest(document.text), "big")
        if self._hold_out and index == self._hold_out.document:
            self._held = document
        else:
            self.dropped.write(document.source, {"reason": self._reasons[index], "text": document.text.decode()})

    def _split_held(self) -> _Document | None:
        """Return the beginning of the document of which only the end is held out, and keep the end, once."""
        if self._held is None or self._hold_out is None or self._hold_out.characters is None:
            return None
        source, text = self._held
        head, tail = split_end(text.decode(), self._hold_out.characters)
        self._held, self._hold_out = _Document(source, tail.encode()), self._hold_out._replace(characters=None)
        return _Document(source, head.encode()) if head else None

    def write_held(self) -> Iterator[Shard]:
        """Write the shard with what is held out, if anything, and yield its entry in the manifest."""
        if head := self._split_held():  # of a document that its hash held out, though there is no other
            yield self._write_alone("train", head)
        if self._held is not None:
            self.heldout_sum += int.from_bytes(text_digest(self._held.text), "big")
            yield self._write_alone("heldout", self._held)

    def _write_alone(self, split: Split, document: _Document) -> Shard:
        with self._writer(shard_name(split, self._index), self._source) as writer:
            writer.add(self._encode(*document))
            shard = writer.close(split, len(document.text), len(document.text.decode()))
        assert shard is not None
        return shard

    def _writer(self, name: str, source: int) -> ShardWriter:
        path = storage.join(self._context.directory, name)
        return ShardWriter(path, self._tokenizer, self._context.corpus.segment_tokens, source)

    def _encode(self, source: str, text: bytes) -> EncodedDocuments:
        ids, ends = self._tokenizer.encode_batch([text.decode()], self._context.parallel)
        hashes = np.array([document_hash(text)], dtype=np.uint64)
        return EncodedDocuments(hashes, [source], *append_end_of_text(ids, ends, self._tokenizer))


def _counts(text: bytes, tokens: int) -> Counts:
    """Return the counts of one document. tokens: with its end of text."""
    return Counts(documents=1, bytes=len(text), characters=len(text.decode()), tokens=tokens)


def split_end(text: str, characters: int) -> tuple[str, str]:
    """Return a text in two parts, of which the second has about `characters`, and at most half of the text."""
    if len(text) < 2:
        return "", text
    wanted = len(text) - min(characters, len(text) // 2)
    first = max(len(text) // 2, wanted - max(characters, _NEAR), 1)
    for end in ("\n", " "):
        if (found := text.rfind(end, first - 1, wanted) + 1) > 0:
            return text[:found], text[found:]
    return text[:wanted], text[wanted:]


def _read_shard(path: str, end_of_text: int) -> Iterator[EncodedDocuments]:
    """Yield the documents of a shard by row group; a document in several rows is joined."""
    with fsspec.open(path, "rb") as file:
        reader = pq.ParquetFile(file)
        begun: list[Array] = []  # tokens of a document that continues in the next row group
        for group in range(reader.num_row_groups):
            table = reader.read_row_group(group, use_threads=False).combine_chunks()
            rows = table["tokens"].chunk(0)
            tokens = rows.values.to_numpy()
            ends = rows.offsets.to_numpy()[1:].astype(np.int64)
            last = tokens[ends - 1] == end_of_text
            sources = [source for source, is_last in zip(table["source"].to_pylist(), last, strict=True) if is_last]
            ends = ends[last]
            if not len(ends):
                begun.append(tokens)
                continue
            end = int(ends[-1])
            whole = np.concatenate([*begun, tokens[:end]])
            begun = [tokens[end:]]
            yield EncodedDocuments(table["document"].to_numpy()[last], sources, whole, ends + len(whole) - end)
