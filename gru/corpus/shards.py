"""From one partition to its Parquet shards, in two steps: a draft with all of its documents, and what is left of it
when it is known which of them repeat others.

Both are functions of the partition, the tokenizer and the corpus config (and of those repeats): the same bytes
whoever makes them, when and how often. This module does not know of other partitions, nor who works through them.
"""

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gru import storage
from gru.config import CorpusConfig
from gru.corpus.dataset import Counts, ManifestRecord, Shard, Split, Tokens, decode, load_tokenizer
from gru.corpus.documents import documents, text_digest
from gru.corpus.duplicates import Fingerprints, signature
from gru.corpus.report import Report
from gru.corpus.sources import Partition, Span
from gru.corpus.tokenizer import Tokenizer

PARTS = "parts"  # below a dataset's directory, until it is finished

_BATCH_CHARACTERS = 1 << 20  # encoded together
_CHECK_EVERY = 64  # documents, of which one is decoded again
_CHECK_TOKENS = 1 << 16
_SPLITS: tuple[Split, Split] = ("train", "heldout")
_kept_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # between the tasks of one worker process


class SpanSource(NamedTuple):
    path: str
    name: str
    size: int
    digest: str


class PartitionResult(ManifestRecord):
    """What came of a partition."""

    shards: list[Shard]
    sources: list[SpanSource]
    documents: int
    dropped: dict[str, int]
    replaced: int
    examples: list[str]
    heldout: str  # sum of the SHA-256s of the held-out texts

    @property
    def counts(self) -> Counts:
        return sum((shard.counts for shard in self.shards), Counts())


@dataclass(frozen=True)
class ShardContext:
    """What all the partitions of a dataset have in common."""

    directory: str
    corpus: CorpusConfig
    tokenizer_digest: str
    parallel: bool = False  # whether one task may encode with several threads

    def part_file(self, name: str) -> str:
        return storage.join(self.directory, PARTS, name)

    def tokenizer(self) -> Tokenizer:
        return _kept_tokenizer(self.directory, self.tokenizer_digest)


class _Batch(NamedTuple):
    """Documents, encoded."""

    hashes: Tokens  # uint64 [documents]
    sources: list[str]
    tokens: Tokens  # [tokens]: each document's and one end of text
    ends: Tokens  # [documents]: where in `tokens` each one ends

    def where(self, mask: Tokens) -> "_Batch":
        """The documents of the mask [documents]."""
        if mask.all():
            return self
        lengths = np.diff(self.ends, prepend=0)
        sources = [source for source, chosen in zip(self.sources, mask, strict=True) if chosen]
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))  # where runs of chosen ones start and stop
        borders = np.concatenate([[0], self.ends])[edges].reshape(-1, 2)
        tokens = [self.tokens[:0], *(self.tokens[start:stop] for start, stop in borders.tolist())]
        return _Batch(self.hashes[mask], sources, np.concatenate(tokens), np.cumsum(lengths[mask], dtype=np.int64))


def _fingerprints_file(index: int) -> str:
    return f"{index:05d}.npz"


def shard_name(split: Split, index: int) -> str:
    return f"{split}-{index:05d}.parquet"


# The draft


def draft(context: ShardContext, index: int, partition: Partition) -> PartitionResult:
    """Write the partition's draft shards and fingerprints. Raises UserError as `documents` does."""
    corpus, tokenizer = context.corpus, context.tokenizer()
    writers = {
        split: _ShardWriter(context.part_file(shard_name(split, index)), tokenizer, corpus.segment_tokens)
        for split in _SPLITS
    }
    sizes = {split: np.zeros(2, dtype=np.int64) for split in _SPLITS}  # bytes and characters
    report = Report()
    fingerprints: list[Fingerprints] = []
    heldout_sum = seen = 0
    try:
        for texts in _ahead(_read(partition, corpus, report)):
            names, mask = texts.names(), texts.heldout(corpus)
            heldout_sum += sum(int.from_bytes(texts.digests[i], "big") for i in np.flatnonzero(mask))
            lengths = np.array([[len(data) for data in texts.encoded], [len(text) for text in texts.texts]])
            ids, ends = tokenizer.encode_batch(texts.texts, context.parallel)
            for i in range(-seen % _CHECK_EVERY, len(names), _CHECK_EVERY):
                _check(tokenizer, texts.spans[i].file.name, texts.encoded[i], ids[ends[i - 1] if i else 0 : ends[i]])
            seen += len(names)
            batch = _Batch(names, [span.file.name for span in texts.spans], *_closed(ids, ends, tokenizer))
            del ids  # of one long document they are large, and twice what the shard takes of them
            for split, chosen in zip(_SPLITS, (~mask, mask), strict=True):
                sizes[split] += lengths[:, chosen].sum(axis=1)
                writers[split].add(batch.where(chosen))
            signatures = [signature(text) for text in texts.texts] if corpus.deduplicate == "near" else []
            stacked = np.stack(signatures) if signatures else np.zeros((len(names), 0), dtype=np.uint32)
            fingerprints.append(Fingerprints(mask, names, stacked))
        shards = [shard for split, writer in writers.items() if (shard := writer.close(split, *sizes[split].tolist()))]
    finally:
        for writer in writers.values():
            writer.abandon()
    if fingerprints:
        together = Fingerprints(*(np.concatenate(arrays) for arrays in zip(*fingerprints, strict=True)))
        _write_fingerprints(context.part_file(_fingerprints_file(index)), together)
    files = zip(partition, report.digests, strict=True)
    return PartitionResult(
        shards=shards,
        sources=[SpanSource(span.file.path, span.file.name, span.file.size, digest) for span, digest in files],
        documents=seen,
        dropped=dict(report.dropped),
        replaced=report.replaced,
        examples=report.examples,
        heldout=f"{heldout_sum % 2**256:064x}",
    )


class _Texts(NamedTuple):
    """Documents, as many as encode well together."""

    spans: list[Span]
    texts: list[str]
    encoded: list[bytes]
    digests: list[bytes]

    def names(self) -> Tokens:
        """`document_hash` of each one."""
        return np.frombuffer(b"".join([digest[:8] for digest in self.digests]), dtype=">u8").astype(np.uint64)

    def heldout(self, corpus: CorpusConfig) -> Tokens:
        """`is_heldout` of each one."""
        if corpus.heldout == "hash":
            return self.names() / 2.0**64 < corpus.heldout_share
        return np.array([bool(span.heldout) for span in self.spans])


def _read(partition: Partition, corpus: CorpusConfig, report: Report) -> Iterator[_Texts]:
    """The partition's documents, without those that repeat an earlier one of it."""
    batch, characters = _Texts([], [], [], []), 0
    seen: set[bytes] = set()
    for span in partition:
        for text in documents(span, corpus, report):
            data = text.encode()
            digest = text_digest(data)
            if corpus.deduplicate != "none":
                if (name := digest[:8]) in seen:
                    report.dropped["duplicate"] += 1
                    continue
                seen.add(name)
            batch.spans.append(span)
            batch.texts.append(text)
            batch.encoded.append(data)
            batch.digests.append(digest)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = _Texts([], [], [], []), 0
    if batch.texts:
        yield batch


def _ahead(items: Iterator[_Texts]) -> Iterator[_Texts]:
    """The same, each read while the one before is worked on."""
    thread = _reading_thread()
    coming = thread.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = thread.submit(next, items, None)
        yield item


@lru_cache(maxsize=1)
def _reading_thread() -> ThreadPoolExecutor:
    """One for all partitions: for each new thread malloc may keep another partition in memory, up to 8 a core."""
    return ThreadPoolExecutor(1, "reading")


def _closed(ids: Tokens, ends: Tokens, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """The tokens with an end of text behind each document, in the type of the shards; and where each one ends."""
    ends = ends + np.arange(1, len(ends) + 1)
    tokens = np.empty(len(ids) + len(ends), dtype=_token_type(tokenizer))
    inner = np.ones(len(tokens), dtype=bool)
    inner[ends - 1] = False
    tokens[inner] = ids
    tokens[ends - 1] = tokenizer.end_of_text
    return tokens, ends


def _token_type(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _check(tokenizer: Tokenizer, source: str, data: bytes, ids: Tokens) -> None:
    again = tokenizer.decode_bytes(ids[:_CHECK_TOKENS])
    same = data.startswith(again) and (len(data) == len(again) or len(ids) > _CHECK_TOKENS)
    assert same, f"{source}: the tokenizer did not give back the text it was given"


def _write_fingerprints(path: str, fingerprints: Fingerprints) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **fingerprints._asdict())
    storage.write_bytes(path, buffer.getvalue())


def read_fingerprints(context: ShardContext, index: int) -> Fingerprints:
    with np.load(io.BytesIO(storage.read_bytes(context.part_file(_fingerprints_file(index))))) as arrays:
        return Fingerprints(**arrays)


# What is left of it


def rewrite_without(context: ShardContext, index: int, part: PartitionResult, repeated: Tokens) -> PartitionResult:
    """Write the shards of a draft without the documents of the mask [documents], which is in source order."""
    tokenizer = context.tokenizer()
    heldout = read_fingerprints(context, index).heldout
    heldout_sum = int(part.heldout, 16)
    shards = []
    for shard in part.shards:
        goes = repeated[heldout == (shard.split == "heldout")]
        counts, first = shard.counts, 0
        writer = _ShardWriter(storage.join(context.directory, shard.name), tokenizer, context.corpus.segment_tokens)
        try:
            for batch in _stored(context.part_file(shard.name), tokenizer.end_of_text):
                mask = goes[first : first + len(batch.ends)]
                first += len(mask)
                for i in np.flatnonzero(mask).tolist():
                    ids = batch.tokens[batch.ends[i - 1] if i else 0 : batch.ends[i]]
                    data = decode(tokenizer, ids)
                    counts -= Counts(documents=1, bytes=len(data), characters=len(data.decode()), tokens=len(ids))
                    if shard.split == "heldout":
                        heldout_sum -= int.from_bytes(text_digest(data), "big")
                writer.add(batch.where(~mask))
            if left := writer.close(shard.split, counts.bytes, counts.characters):
                assert left.counts == counts, f"{shard.name}: {left.counts} left, not {counts}"
                shards.append(left)
        finally:
            writer.abandon()
    return part.model_copy(update={"shards": shards, "heldout": f"{heldout_sum % 2**256:064x}"})


def _stored(path: str, end_of_text: int) -> Iterator[_Batch]:
    """The documents of a shard, put together again where they are in several rows."""
    with fsspec.open(path, "rb") as file:
        reader = pq.ParquetFile(file)
        begun: list[Tokens] = []  # of a document that goes on
        for group in range(reader.num_row_groups):
            table = reader.read_row_group(group).combine_chunks()
            rows = table["tokens"].chunk(0)
            tokens = rows.values.to_numpy()
            ends = rows.offsets.to_numpy()[1:].astype(np.int64)
            last = tokens[ends - 1] == end_of_text
            sources = [source for source, is_last in zip(table["source"].to_pylist(), last, strict=True) if is_last]
            ends = ends[last]
            if not len(ends):
                begun.append(tokens)
                continue
            border = int(ends[-1])
            whole = np.concatenate([*begun, tokens[:border]])
            begun = [tokens[border:]]
            yield _Batch(table["document"].to_numpy()[last], sources, whole, ends + len(whole) - border)


# Writing


class _ShardWriter:
    """Documents to the row groups of one Parquet file, which exists once it is closed, and only if it has rows.

    A row group is closed at the end of the document that makes it `segment_tokens` long; a document that is longer
    than that goes on in another row of the next one.
    """

    def __init__(self, path: str, tokenizer: Tokenizer, segment_tokens: int) -> None:
        self._path, self._segment_tokens = path, segment_tokens
        kind = _token_type(tokenizer)
        columns = [("document", pa.uint64()), ("source", pa.string()), ("tokens", pa.list_(pa.from_numpy_dtype(kind)))]
        self._schema = pa.schema(columns)
        self._file: storage.NewFile | None = None
        self._writer: Any = None
        empty = np.zeros(0, dtype=np.int64)
        self._held = _Batch(np.zeros(0, dtype=np.uint64), [], np.zeros(0, dtype=kind), empty)
        self._held_lengths = empty  # of whole documents, the first of which may be held in part
        self._segments: list[int] = []
        self._lengths: Counter[int] = Counter()

    def add(self, batch: _Batch) -> None:
        lengths = np.diff(batch.ends, prepend=0)
        self._lengths.update(lengths.tolist())
        held = self._held
        self._held = _Batch(
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
        self._held = _Batch(held.hashes[first:], held.sources[first:], held.tokens[begin:], held.ends[first:] - begin)
        self._held_lengths = self._held_lengths[first:]

    def _write(self, first: int, after: int, begin: int, stop: int) -> None:
        """Documents [first, after) of those held, or what of them is in tokens [begin, stop), as a row group."""
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
        """The shard's entry in the manifest, of that many bytes and characters; none if there was nothing to write."""
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
            counts=Counts(
                documents=self._lengths.total(), bytes=size, characters=characters, tokens=sum(self._segments)
            ),
            lengths=_histogram(self._lengths),
            file_bytes=file.size,
            digest=file.digest,
            segments=self._segments,
        )

    def abandon(self) -> None:
        """Leave nothing of a file that was not closed."""
        if self._file is not None:
            self._file.abandon()


def _histogram(lengths: Counter[int]) -> list[int]:
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[max(length - 1, 0).bit_length()] += count
    return [bins[i] for i in range(max(bins) + 1)]
