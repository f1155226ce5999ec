"""The shards of one partition, in two steps: a draft with all its documents, and a rewrite without duplicates.

Both are pure functions of the partition, the tokenizer and the corpus config (and of the duplicates): the same bytes
in every process, order and retry. This module does not know other partitions, or who processes them.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow.parquet as pq

from gru import storage
from gru.config import CorpusConfig
from gru.corpus.dataset import Counts, ManifestRecord, Shard, Split, decode, load_tokenizer
from gru.corpus.documents import documents, text_digest
from gru.corpus.duplicates import Array, Fingerprints, signature
from gru.corpus.report import Report
from gru.corpus.shard_writer import EncodedDocuments, ShardWriter, token_type
from gru.corpus.sources import Partition, Span
from gru.corpus.tokenizer import Tokenizer

WORK_DIRECTORY = "parts"  # below a dataset's directory, until the dataset is finished

_BATCH_CHARACTERS = 1 << 20  # characters of text that are encoded together
_CHECK_EVERY = 64  # of so many documents, one is decoded again and compared
_CHECK_TOKENS = 1 << 16  # tokens at the start of a document that are compared
_SPLITS: tuple[Split, Split] = ("train", "heldout")
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
    documents: int
    dropped: dict[str, int]
    replaced: int
    examples: list[str]
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

    def work_file(self, name: str) -> str:
        """Return the path of a file in the work directory."""
        return storage.join(self.directory, WORK_DIRECTORY, name)

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
    writers = {
        split: ShardWriter(context.work_file(shard_name(split, index)), tokenizer, corpus.segment_tokens)
        for split in _SPLITS
    }
    sizes = {split: np.zeros(2, dtype=np.int64) for split in _SPLITS}  # bytes and characters
    report = Report()
    fingerprints: list[Fingerprints] = []
    heldout_sum = seen = 0
    try:
        for texts in _prefetch(_read(partition, corpus, report)):
            hashes, mask = texts.hashes(), texts.heldout(corpus)
            heldout_sum += sum(int.from_bytes(texts.digests[i], "big") for i in np.flatnonzero(mask))
            lengths = np.array([[len(data) for data in texts.encoded], [len(text) for text in texts.texts]])
            ids, ends = tokenizer.encode_batch(texts.texts, context.parallel)
            for i in range(-seen % _CHECK_EVERY, len(hashes), _CHECK_EVERY):
                _check_round_trip(
                    tokenizer, texts.spans[i].file.name, texts.encoded[i], ids[ends[i - 1] if i else 0 : ends[i]]
                )
            seen += len(hashes)
            batch = EncodedDocuments(
                hashes, [span.file.name for span in texts.spans], *_append_end_of_text(ids, ends, tokenizer)
            )
            del ids  # for one long document they take much memory, twice as much as the shard's type
            for split, chosen in zip(_SPLITS, (~mask, mask), strict=True):
                sizes[split] += lengths[:, chosen].sum(axis=1)
                writers[split].add(batch.select(chosen))
            signatures = [signature(text) for text in texts.texts] if corpus.deduplicate == "near" else []
            stacked = np.stack(signatures) if signatures else np.zeros((len(hashes), 0), dtype=np.uint32)
            fingerprints.append(Fingerprints(mask, hashes, stacked))
        shards = [shard for split, writer in writers.items() if (shard := writer.close(split, *sizes[split].tolist()))]
    finally:
        for writer in writers.values():
            writer.abandon()
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
        examples=report.examples,
        heldout=f"{heldout_sum % 2**256:064x}",
    )


class _TextBatch(NamedTuple):
    """A batch of documents that are encoded together."""

    spans: list[Span]
    texts: list[str]
    encoded: list[bytes]
    digests: list[bytes]

    def hashes(self) -> Array:
        """Return the `document_hash` of each document [documents]."""
        return np.frombuffer(b"".join([digest[:8] for digest in self.digests]), dtype=">u8").astype(np.uint64)

    def heldout(self, corpus: CorpusConfig) -> Array:
        """Return `is_heldout` of each document [documents]."""
        if corpus.heldout == "hash":
            return self.hashes() / 2.0**64 < corpus.heldout_share
        return np.array([bool(span.heldout) for span in self.spans])


def _read(partition: Partition, corpus: CorpusConfig, report: Report) -> Iterator[_TextBatch]:
    """Yield a partition's documents in batches, without those that equal an earlier one of the partition."""
    batch, characters = _TextBatch([], [], [], []), 0
    seen: set[bytes] = set()
    for span in partition:
        for text in documents(span, corpus, report):
            data = text.encode()
            digest = text_digest(data)
            if corpus.deduplicate != "none":
                if (prefix := digest[:8]) in seen:
                    report.dropped["duplicate"] += 1
                    continue
                seen.add(prefix)
            batch.spans.append(span)
            batch.texts.append(text)
            batch.encoded.append(data)
            batch.digests.append(digest)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = _TextBatch([], [], [], []), 0
    if batch.texts:
        yield batch


def _prefetch(batches: Iterator[_TextBatch]) -> Iterator[_TextBatch]:
    """Yield the batches, each of which is read while the one before it is processed."""
    thread = _prefetch_thread()
    upcoming = thread.submit(next, batches, None)
    while (batch := upcoming.result()) is not None:
        upcoming = thread.submit(next, batches, None)
        yield batch


@lru_cache(maxsize=1)
def _prefetch_thread() -> ThreadPoolExecutor:
    """Return the one thread for all partitions: malloc may hold a partition's memory per thread, up to 8 per core."""
    return ThreadPoolExecutor(1, "reading")


def _append_end_of_text(ids: Array, ends: Array, tokenizer: Tokenizer) -> tuple[Array, Array]:
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


# The rewrite without duplicates


def rewrite_without(context: ShardContext, index: int, part: PartitionResult, repeated: Array) -> PartitionResult:
    """Write the shards of a draft without the documents of the mask `repeated` [documents], in source order."""
    tokenizer = context.tokenizer()
    heldout = read_fingerprints(context, index).heldout
    heldout_sum = int(part.heldout, 16)
    shards = []
    for shard in part.shards:
        removed = repeated[heldout == (shard.split == "heldout")]
        counts, first = shard.counts, 0
        writer = ShardWriter(storage.join(context.directory, shard.name), tokenizer, context.corpus.segment_tokens)
        try:
            for batch in _read_shard(context.work_file(shard.name), tokenizer.end_of_text):
                mask = removed[first : first + len(batch.ends)]
                first += len(mask)
                for i in np.flatnonzero(mask).tolist():
                    ids = batch.tokens[batch.ends[i - 1] if i else 0 : batch.ends[i]]
                    data = decode(tokenizer, ids)
                    counts -= Counts(documents=1, bytes=len(data), characters=len(data.decode()), tokens=len(ids))
                    if shard.split == "heldout":
                        heldout_sum -= int.from_bytes(text_digest(data), "big")
                writer.add(batch.select(~mask))
            if rewritten := writer.close(shard.split, counts.bytes, counts.characters):
                assert rewritten.counts == counts, f"{shard.name}: {rewritten.counts} remain, not {counts}"
                shards.append(rewritten)
        finally:
            writer.abandon()
    return part.model_copy(update={"shards": shards, "heldout": f"{heldout_sum % 2**256:064x}"})


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
