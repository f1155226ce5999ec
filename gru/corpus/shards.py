"""The draft of one partition: the shards with all its documents, and what is needed to decide which of them stay.

It is a pure function of the partition, the tokenizer and the corpus config: the same bytes in every process, order and
retry. This module does not know other partitions, or who processes them.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from gru import storage
from gru.config import CorpusConfig
from gru.corpus.dataset import Counts, ManifestRecord, Shard, Split, load_tokenizer
from gru.corpus.documents import documents, text_digest
from gru.corpus.dropped import DroppedWriter
from gru.corpus.duplicates import Array, Fingerprints, signature
from gru.corpus.partitions import Partition, Span
from gru.corpus.report import Report
from gru.corpus.shard_writer import EncodedDocuments, ShardWriter, token_type
from gru.corpus.tokenizer import Tokenizer

WORK_DIRECTORY = "parts"  # below a dataset's directory, until the dataset is finished

_BATCH_CHARACTERS = 1 << 20  # characters of text that are encoded together
_CHECK_EVERY = 64  # of so many documents, one is decoded again and compared
_CHECK_TOKENS = 1 << 16  # tokens at the start of a document that are compared
SPLITS: tuple[Split, Split] = ("train", "heldout")
_Item = TypeVar("_Item")
_cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # the tasks of one worker process share it


class SpanSource(NamedTuple):
    """The source of a span: a file, and the SHA-256 of the span's bytes."""

    path: str
    name: str
    size: int
    digest: str


class PartitionResult(ManifestRecord):
    """The result of a partition: its shards, and the counts for the manifest."""

    shards: list[Shard]
    sources: list[SpanSource]
    documents: int  # without those that equal an earlier one of the partition
    dropped: dict[str, int]
    replaced: int
    dropped_bytes: dict[str, int]
    passed_over: dict[str, int]
    examples: dict[str, list[str]]
    heldout: str  # sum of the SHA-256s of the held-out texts, modulo 2^256

    @property
    def counts(self) -> Counts:
        return sum((shard.counts for shard in self.shards), Counts())


@dataclass(frozen=True)
class ShardContext:
    """The settings that all partitions of a dataset share."""

    directory: str
    corpus: CorpusConfig
    tokenizer_digest: str
    parallel: bool = False  # whether one task may encode with several threads
    dropped: str | None = None  # directory for the files with what is left out

    def work_file(self, name: str) -> str:
        """Return the path of a file in the work directory."""
        return storage.join(self.directory, WORK_DIRECTORY, name)

    def dropped_file(self, name: str) -> str | None:
        """Return the path of a file with what is left out, or None if none is to be written."""
        return self.dropped and storage.join(self.dropped, name)

    def tokenizer(self) -> Tokenizer:
        return _cached_tokenizer(self.directory, self.tokenizer_digest)


def _fingerprints_file(index: int) -> str:
    return f"{index:05d}.npz"


def shard_name(split: Split, index: int) -> str:
    """Return the file name of the shard of a split and a partition."""
    return f"{split}-{index:05d}.parquet"


# The draft


def draft(context: ShardContext, index: int, partition: Partition) -> PartitionResult:
    """Write a partition's draft shards and fingerprints. Raises UserError as `documents` does."""
    corpus, tokenizer = context.corpus, context.tokenizer()
    source = partition[0].file.options
    writers = {
        split: ShardWriter(context.work_file(shard_name(split, index)), tokenizer, corpus.segment_tokens, source.index)
        for split in SPLITS
    }
    sizes = {split: np.zeros(2, dtype=np.int64) for split in SPLITS}  # bytes and characters
    report, dropped = Report(), DroppedWriter(context.dropped_file(f"{index:05d}.jsonl"))
    fingerprints: list[Fingerprints] = []
    heldout_sum = seen = 0
    try:
        read_ahead = _ahead(_text_batches(partition, corpus, report, dropped), _thread("reading"))
        for texts, batch in _ahead(_encoded(read_ahead, tokenizer, context.parallel), _thread("encoding")):
            mask = texts.heldout(corpus)
            heldout_sum += sum(int.from_bytes(texts.digests[i], "big") for i in np.flatnonzero(mask))
            lengths = np.array([[len(data) for data in texts.encoded], [len(text) for text in texts.texts]])
            seen += len(mask)
            for split, chosen in zip(SPLITS, (~mask, mask), strict=True):
                sizes[split] += lengths[:, chosen].sum(axis=1)
                writers[split].add(batch.select(chosen))
            signatures = [signature(text) for text in texts.texts] if corpus.deduplicate == "near" else []
            stacked = np.stack(signatures) if signatures else np.zeros((len(mask), 0), dtype=np.uint32)
            fingerprints.append(Fingerprints(mask, batch.hashes, stacked, lengths[1]))
        shards = [shard for split, writer in writers.items() if (shard := writer.close(split, *sizes[split].tolist()))]
        dropped.close()
    finally:
        for writer in writers.values():
            writer.abandon()
        dropped.abandon()
    if fingerprints:
        all_fingerprints = Fingerprints(*(np.concatenate(arrays) for arrays in zip(*fingerprints, strict=True)))
        _write_fingerprints(context.work_file(_fingerprints_file(index)), all_fingerprints)
    files = zip(partition, report.digests, strict=True)
    return PartitionResult(
        shards=shards,
        sources=[SpanSource(span.file.path, span.file.name, span.file.size, digest) for span, digest in files],
        documents=seen,
        dropped=dict(report.dropped),
        replaced=report.replaced,
        dropped_bytes=dict(report.dropped_bytes),
        passed_over=dict(report.passed_over),
        examples=report.examples,
        heldout=f"{heldout_sum % 2**256:064x}",
    )


def _encoded(
    batches: Iterator["_TextBatch"], tokenizer: Tokenizer, parallel: bool
) -> "Iterator[tuple[_TextBatch, EncodedDocuments]]":
    """Yield each batch of a partition with its documents encoded."""
    before = 0
    for texts in batches:
        ids, ends = tokenizer.encode_batch(texts.texts, parallel)
        for i in range(-before % _CHECK_EVERY, len(ends), _CHECK_EVERY):
            _check_round_trip(tokenizer, texts.sources[i], texts.encoded[i], ids[ends[i - 1] if i else 0 : ends[i]])
        before += len(ends)
        encoded = EncodedDocuments(texts.hashes(), texts.sources, *append_end_of_text(ids, ends, tokenizer))
        del ids  # for one long document they take much memory, twice as much as the shard's type
        yield texts, encoded


class _TextBatch(NamedTuple):
    """A batch of documents that are encoded together."""

    spans: list[Span]
    texts: list[str]
    encoded: list[bytes]
    digests: list[bytes]

    def add(self, span: Span, text: str, data: bytes, digest: bytes) -> None:
        self.spans.append(span)
        self.texts.append(text)
        self.encoded.append(data)
        self.digests.append(digest)

    @property
    def sources(self) -> list[str]:
        return [span.file.name for span in self.spans]

    def hashes(self) -> Array:
        """Return the `document_hash` of each document [documents]."""
        return np.frombuffer(b"".join([digest[:8] for digest in self.digests]), dtype=">u8").astype(np.uint64)

    def heldout(self, corpus: CorpusConfig) -> Array:
        """Return `is_heldout` of each document [documents]."""
        if corpus.heldout == "hash":
            return self.hashes() / 2.0**64 < corpus.heldout_share
        return np.array([bool(span.heldout) for span in self.spans])


def _text_batches(
    partition: Partition, corpus: CorpusConfig, report: Report, dropped: DroppedWriter
) -> Iterator[_TextBatch]:
    """Yield a partition's documents, in batches, without those that equal an earlier one of the partition."""
    batch, characters = _TextBatch([], [], [], []), 0
    seen: set[bytes] = set()
    for span in partition:
        dropped.follow(report, span.file.name)
        for text in documents(span, corpus, report):
            data = text.encode()
            digest = text_digest(data)
            if corpus.deduplicate != "none":
                if (prefix := digest[:8]) in seen:
                    report.drop_document("duplicate", text)
                    continue
                seen.add(prefix)
            batch.add(span, text, data, digest)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = _TextBatch([], [], [], []), 0
    if batch.texts:
        yield batch


def _ahead(items: Iterator[_Item], thread: ThreadPoolExecutor) -> Iterator[_Item]:
    """Yield the items, each of which is made in the thread while the one before it is processed."""
    upcoming = thread.submit(next, items, None)
    while (item := upcoming.result()) is not None:
        upcoming = thread.submit(next, items, None)
        yield item
        del item  # so that a long document is not held while the next one is made


@lru_cache(maxsize=2)
def _thread(name: str) -> ThreadPoolExecutor:
    """Return the one thread of that name for all partitions: malloc may hold a partition's memory per thread."""
    return ThreadPoolExecutor(1, name)


def append_end_of_text(ids: Array, ends: Array, tokenizer: Tokenizer) -> tuple[Array, Array]:
    """Return the tokens with an end of text after each document, in the shards' type, and the end of each document."""
    ends = ends + np.arange(1, len(ends) + 1)
    tokens = np.empty(len(ids) + len(ends), dtype=token_type(tokenizer))
    inner = np.ones(len(tokens), dtype=bool)
    inner[ends - 1] = False
    tokens[inner] = ids
    tokens[ends - 1] = tokenizer.end_of_text
    return tokens, ends


def _check_round_trip(tokenizer: Tokenizer, source: str, data: bytes, ids: Array) -> None:
    """Assert that a document's tokens decode to its text."""
    decoded = tokenizer.decode_bytes(ids[:_CHECK_TOKENS])
    same = data.startswith(decoded) and (len(data) == len(decoded) or len(ids) > _CHECK_TOKENS)
    assert same, f"{source}: decoding does not return the text that was encoded"


def _write_fingerprints(path: str, fingerprints: Fingerprints) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **fingerprints._asdict())
    storage.write_bytes(path, buffer.getvalue())


def read_fingerprints(context: ShardContext, index: int) -> Fingerprints:
    """Read the fingerprints of a partition's documents."""
    with np.load(io.BytesIO(storage.read_bytes(context.work_file(_fingerprints_file(index))))) as arrays:
        return Fingerprints(**arrays)
