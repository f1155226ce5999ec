"""The writer of a shard: encoded documents to the row groups of one Parquet file.

The same documents give the same bytes, however they are batched. This module does not know where the documents come
from.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gru import storage
from gru.corpus.dataset import Counts, Shard, Split
from gru.corpus.duplicates import Array
from gru.corpus.tokenizer import Tokenizer


class EncodedDocuments(NamedTuple):
    """A batch of encoded documents."""

    hashes: Array  # uint64 [documents]
    sources: list[str]  # name of each document's source file
    tokens: Array  # [tokens]: the documents end to end, each with its end of text
    ends: Array  # [documents]: the position in `tokens` where each document ends

    def select(self, mask: Array) -> "EncodedDocuments":
        """Return the documents of the mask [documents]."""
        if mask.all():
            return self
        lengths = np.diff(self.ends, prepend=0)
        sources = [source for source, chosen in zip(self.sources, mask, strict=True) if chosen]
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))  # starts and stops of runs of documents
        bounds = np.concatenate([[0], self.ends])[edges].reshape(-1, 2)
        tokens = [self.tokens[:0], *(self.tokens[start:stop] for start, stop in bounds.tolist())]
        return EncodedDocuments(
            self.hashes[mask], sources, np.concatenate(tokens), np.cumsum(lengths[mask], dtype=np.int64)
        )


def token_type(tokenizer: Tokenizer) -> Any:
    """Return the numpy type of the tokens in a shard."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


class ShardWriter:
    """The writer of one Parquet file, which exists once `close` has been called, and only if it has rows.

    A row group ends with the document that brings it to `segment_tokens`; a document longer than that continues as
    another row in the next row group.
    """

    def __init__(self, path: str, tokenizer: Tokenizer, segment_tokens: int, source: int = 0) -> None:
        self._source = source
        self._path, self._segment_tokens = path, segment_tokens
        kind = token_type(tokenizer)
        columns = [("document", pa.uint64()), ("source", pa.string()), ("tokens", pa.list_(pa.from_numpy_dtype(kind)))]
        self._schema = pa.schema(columns)
        self._file: storage.NewFile | None = None
        self._writer: Any = None
        empty = np.zeros(0, dtype=np.int64)
        self._held = EncodedDocuments(np.zeros(0, dtype=np.uint64), [], np.zeros(0, dtype=kind), empty)
        self._held_lengths = empty  # of the whole documents; the first may be held in part
        self._segments: list[int] = []
        self._lengths: Counter[int] = Counter()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.abandon()

    def add(self, batch: EncodedDocuments) -> None:
        """Append documents, and write the row groups that they complete."""
        lengths = np.diff(batch.ends, prepend=0)
        self._lengths.update(lengths.tolist())
        held = self._held
        self._held = EncodedDocuments(
            np.concatenate([held.hashes, batch.hashes]),
            held.sources + batch.sources,
            np.concatenate([held.tokens, batch.tokens]) if len(held.tokens) else batch.tokens,
            np.concatenate([held.ends, batch.ends + len(held.tokens)]),
        )
        self._held_lengths = np.concatenate([self._held_lengths, lengths])
        self._write_segments()

    def _write_segments(self) -> None:
        held, first, begin = self._held, 0, 0
        while (target := begin + self._segment_tokens) <= len(held.tokens):
            last = int(np.searchsorted(held.ends, target))
            stop = target if self._held_lengths[last] > self._segment_tokens else int(held.ends[last])
            self._write(first, last + 1, begin, stop)
            first, begin = last + (stop == held.ends[last]), stop
        self._held = EncodedDocuments(
            held.hashes[first:], held.sources[first:], held.tokens[begin:], held.ends[first:] - begin
        )
        self._held_lengths = self._held_lengths[first:]

    def _write(self, first: int, after: int, begin: int, stop: int) -> None:
        """Write a row group: the held documents [first, after), or their part in tokens [begin, stop)."""
        if self._writer is None:
            self._file = storage.NewFile(self._path)
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._file, "w"),
                self._schema,
                compression="lz4",
                use_dictionary=["source"],
                write_statistics=False,
            )
        offsets = np.minimum(self._held.ends[first:after], stop) - begin
        lists = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], offsets]), pa.int32()), pa.array(self._held.tokens[begin:stop])
        )
        columns = [
            pa.array(self._held.hashes[first:after], pa.uint64()),
            pa.array(self._held.sources[first:after], pa.string()),
            lists,
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=after - first)
        self._segments.append(stop - begin)

    def close(self, split: Split, size: int, characters: int) -> Shard | None:
        """Complete the file and return its entry in the manifest, or None if there were no documents.

        size, characters: number of UTF-8 bytes and of characters in all documents.
        """
        if len(self._held.tokens):
            self._write(0, len(self._held.ends), 0, len(self._held.tokens))
        if self._file is None:
            return None
        self._writer.close()
        self._file.commit()
        file, self._file = self._file, None
        return Shard(
            name=self._path.rsplit("/", 1)[1],
            split=split,
            source=self._source,
            counts=Counts(
                documents=self._lengths.total(), bytes=size, characters=characters, tokens=sum(self._segments)
            ),
            lengths=_histogram(self._lengths),
            file_bytes=file.size,
            digest=file.digest,
            segments=self._segments,
        )

    def abandon(self) -> None:
        """Remove the file if it was not closed."""
        if self._file is not None:
            self._file.abandon()


def _histogram(lengths: Counter[int]) -> list[int]:
    """Return the number of documents of up to 2^0, 2^1, 2^2 ... tokens."""
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[max(length - 1, 0).bit_length()] += count
    return [bins[i] for i in range(max(bins) + 1)]
