"""The dataset: partitions of the corpus made into Parquet shards by Ray Data, and the manifest that completes them.

A shard is a function of its partition, the tokenizer and the corpus config: the same bytes whoever makes it, when
and how often. A shard's row is a document, or a part of a long one; a row group is a segment, and its flat buffer
of tokens is the stream that is trained on. This module does not know how a dataset is used.
"""

import hashlib
import json
import logging
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig, content_key
from gru.corpus import sources
from gru.corpus import tokenizer as tokenizers
from gru.corpus.sources import Partition, SourceFile, Span
from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError, find_user_error

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "heldout"]
Tokens = np.ndarray[Any, np.dtype[Any]]

_PIECE_BYTES = 1 << 20  # the tokenizer's sample is made of pieces of this size
_EXPANSION = 4  # of compressed text, roughly: it only decides how much is sampled
_BATCH_CHARACTERS = 1 << 20  # encoded together
_CHECK_EVERY = 64  # documents, of which one is decoded again
_CHECK_TOKENS = 1 << 16


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(_Record):
    documents: int = 0
    bytes: int = 0  # of text, as UTF-8
    characters: int = 0
    tokens: int = 0  # with one end of text for each document

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})


class Source(_Record):
    name: str
    size: int
    digest: str  # SHA-256 of the file; of the SHA-256s of its spans if it was cut


class Shard(Counts):
    name: str
    split: Split
    file_bytes: int
    digest: str  # SHA-256 of the file
    segments: list[int]  # tokens in each row group


class Manifest(_Record):
    format_version: int
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    sources: list[Source]
    train: Counts
    heldout: Counts
    dropped: dict[str, int]
    vocab_size: int
    end_of_text: int
    tokenizer_digest: str
    heldout_digest: str  # of the held-out texts, whatever their order, their partitions or the tokenizer
    shards: list[Shard]
    digest: str = ""  # of all the rest but where the sources and the tokenizer lay

    @property
    def documents(self) -> int:
        return self.train.documents + self.heldout.documents

    @property
    def bytes(self) -> int:
        return self.train.bytes + self.heldout.bytes

    @property
    def characters(self) -> int:
        return self.train.characters + self.heldout.characters

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.heldout.tokens

    def content_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest": True, "corpus": {"sources"}, "tokenizer": {"path"}})
        return storage.sha256(json.dumps(content, sort_keys=True).encode())


class Segment(NamedTuple):
    shard: str
    row_group: int
    tokens: int


class Dataset:
    """A finished dataset. Raises UserError where a file is not what the manifest says."""

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._shards = {shard.name: shard for shard in manifest.shards}
        self._footers: dict[str, pq.FileMetaData] = {}

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self.directory, self.manifest.tokenizer_digest)

    def segments(self, split: Split) -> list[Segment]:
        return [
            Segment(shard.name, index, tokens)
            for shard in self.manifest.shards
            if shard.split == split
            for index, tokens in enumerate(shard.segments)
        ]

    def read_segment(self, segment: Segment) -> Tokens:
        """Its tokens [tokens], documents end to end."""
        return self._read(segment).values.to_numpy()

    def texts(self, split: Split) -> Iterator[str]:
        """The documents of a split, decoded."""
        tokenizer = self.tokenizer()
        parts: list[Tokens] = []
        for segment in self.segments(split):
            for row in self._read(segment):
                parts.append(row.values.to_numpy())
                if parts[-1][-1] == self.manifest.end_of_text:
                    yield tokenizer.decode(np.concatenate(parts))
                    parts = []

    def verify(self) -> None:
        """Read every shard and compare its digest."""
        self.tokenizer()
        for shard in self.manifest.shards:
            if _file_digest(storage.join(self.directory, shard.name)) != shard.digest:
                raise UserError(f"{storage.join(self.directory, shard.name)}: damaged: not what {MANIFEST} says")

    def _read(self, segment: Segment) -> pa.ListArray:
        path = storage.join(self.directory, segment.shard)
        try:
            with fsspec.open(path, "rb") as file:
                if segment.shard not in self._footers and file.seek(0, 2) != self._shards[segment.shard].file_bytes:
                    raise UserError(f"{path}: damaged: not of the size that {MANIFEST} says")
                reader = pq.ParquetFile(file, metadata=self._footers.get(segment.shard))
                self._footers[segment.shard] = reader.metadata
                rows = reader.read_row_group(segment.row_group, columns=["tokens"])["tokens"].combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if len(rows.values) != segment.tokens:
            raise UserError(f"{path}: damaged: not the tokens that {MANIFEST} says")
        return rows


def open_dataset(directory: str) -> Dataset:
    """Raises UserError if there is no whole dataset, or its manifest or tokenizer is damaged."""
    path = storage.join(directory, MANIFEST)
    try:
        manifest = Manifest.model_validate(storage.read_json(path))
    except FileNotFoundError:
        raise UserError(f"{directory}: no dataset here: there is no {MANIFEST}") from None
    except (ValidationError, ValueError):
        raise UserError(f"{path}: damaged, or of another version of this program") from None
    if manifest.format_version != FORMAT_VERSION or manifest.digest != manifest.content_digest():
        raise UserError(f"{path}: damaged, or of another version of this program")
    dataset = Dataset(directory, manifest)
    dataset.tokenizer()
    return dataset


def dataset_key(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> str:
    """The name of the dataset that these would make of the sources as they are now."""
    listing = [[file.path, file.size, file.modified] for file in sources.list_files(corpus)]
    given = tokenizers.load(tokenizer.path).digest if tokenizer.path else None
    return content_key(corpus, tokenizer, FORMAT_VERSION, listing, given)


def prepare(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, directory: str, progress: Callable[[str], None]
) -> Dataset:
    """Make the dataset, or what is still missing of it, with the Ray that is running.

    Raises UserError if the sources cannot be read, or hold nothing to train on or to hold out.
    """
    if storage.exists(storage.join(directory, MANIFEST)):
        storage.remove(storage.join(directory, "parts"))
        return open_dataset(directory)
    try:
        manifest = _make(corpus, tokenizer, directory, progress)
        storage.write_json(storage.join(directory, MANIFEST), manifest.model_dump(mode="json"))
    except Exception as error:
        if storage.exists(storage.join(directory, MANIFEST)):
            return open_dataset(directory)  # somebody else made the same, and cleared our unfinished files away
        if user_error := find_user_error(error):
            raise user_error from None
        raise
    storage.remove(storage.join(directory, "parts"))
    return open_dataset(directory)


def _make(corpus: CorpusConfig, config: TokenizerConfig, directory: str, progress: Callable[[str], None]) -> Manifest:
    partitions = sources.plan(sources.list_files(corpus), corpus)
    key = dataset_key(corpus, config)
    tokenizer = _make_tokenizer(corpus, config, directory, key, progress)
    key = content_key(key, tokenizer.digest)
    parts = _finished(directory, key)
    earlier = sum((_count(part["shards"]) for part in parts.values()), Counts())
    begun, made = time.monotonic(), Counts()
    for index, part in _run(partitions, parts, corpus, directory, key, tokenizer.digest):
        parts[index] = part
        made += _count(part["shards"])
        done = earlier + made
        progress(
            f"{len(parts)}/{len(partitions)} partitions, {done.documents:,} documents, "
            f"{done.bytes / 1e6:.1f} MB, {made.bytes / 1e6 / (time.monotonic() - begun):.1f} MB/s"
        )
    return _manifest([parts[index] for index in range(len(partitions))], corpus, config, tokenizer)


def _manifest(
    parts: list[dict[str, Any]], corpus: CorpusConfig, config: TokenizerConfig, tokenizer: Tokenizer
) -> Manifest:
    dropped: Counter[str] = Counter()
    digests: dict[tuple[str, str, int], list[str]] = {}
    for part in parts:
        dropped.update(part["dropped"])
        for path, name, size, digest in part["sources"]:
            digests.setdefault((path, name, size), []).append(digest)
    shards = [Shard.model_validate(shard) for part in parts for shard in part["shards"]]
    train, heldout = (_count([s for s in shards if s.split == split]) for split in ("train", "heldout"))
    if not train.documents:
        left = "".join(f"; {count:,} dropped: {reason}" for reason, count in sorted(dropped.items()))
        raise UserError(f"corpus.sources: no document to train on in {', '.join(corpus.sources)}{left}")
    if not heldout.documents:
        raise UserError(
            f"corpus.heldout_share = {corpus.heldout_share}: none of the {train.documents:,} documents is held out; "
            "raise the share, or cut the corpus finer with corpus.partition_bytes"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        corpus=corpus,
        tokenizer=config,
        sources=[
            Source(name=name, size=size, digest=d[0] if len(d) == 1 else storage.sha256(bytes.fromhex("".join(d))))
            for (_, name, size), d in digests.items()
        ],
        train=train,
        heldout=heldout,
        dropped=dict(sorted(dropped.items())),
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer_digest=tokenizer.digest,
        heldout_digest=f"{sum(int(part['heldout'], 16) for part in parts) % 2**256:064x}",
        shards=shards,
    )
    return manifest.model_copy(update={"digest": manifest.content_digest()})


def _count(shards: list[Any]) -> Counts:
    counts = (Counts(**{name: dict(shard)[name] for name in Counts.model_fields}) for shard in shards)
    return sum(counts, Counts())


# The tokenizer


def _make_tokenizer(
    corpus: CorpusConfig, config: TokenizerConfig, directory: str, key: str, progress: Callable[[str], None]
) -> Tokenizer:
    """Load or train the tokenizer, and write it to the dataset; an earlier try's is used again."""
    import ray

    marker = storage.join(directory, "parts", TOKENIZER)
    if storage.exists(marker) and (made := storage.read_json(marker))["key"] == key:
        return _tokenizer(directory, made["digest"])
    if config.path:
        tokenizer = tokenizers.load(config.path)
    else:
        progress(f"making a {config.kind} tokenizer")
        tokenizer = Tokenizer(ray.get(ray.remote(num_cpus=1, max_retries=3)(_train).remote(corpus, config)))
    storage.write_bytes(storage.join(directory, TOKENIZER), tokenizer.json)
    storage.write_json(marker, {"key": key, "digest": tokenizer.digest})
    return tokenizer


def _train(corpus: CorpusConfig, config: TokenizerConfig) -> bytes:
    return tokenizers.train(config, _sample(corpus, config.sample_bytes)).json


def _sample(corpus: CorpusConfig, sample_bytes: int) -> Iterator[str]:
    """About `sample_bytes` of training text from all over the corpus: pieces of it, in the order of a hash.

    A file that cannot be cut gives only a share of its documents, so that no one file is the whole sample.
    """
    fine = corpus.model_copy(update={"partition_bytes": min(_PIECE_BYTES, corpus.partition_bytes)})
    spans = [span for partition in sources.plan(sources.list_files(corpus), fine) for span in partition]
    sizes = [(span.end - span.start) * (1 if span.file.divisible else _EXPANSION) for span in spans]
    total, taken = sum(sizes), 0.0
    for index in sorted(range(len(spans)), key=lambda index: sources.document_hash(str(index).encode())):
        span, size = spans[index], sizes[index]
        if span.heldout or not size:
            continue
        share = min(1.0, sample_bytes * max(1 / 8, size / total) / size)
        for _, text in sources.documents(span, corpus, Counter()):
            document = sources.document_hash(text.encode())
            if span.file.kind == "text":
                yield text[: int(len(text) * share)]
            elif document >= (1 - share) * 2**64 and not sources.is_heldout(span, document, corpus):
                yield text
        taken += size * share
        if taken >= sample_bytes:
            return


def _tokenizer(directory: str, digest: str) -> Tokenizer:
    path = storage.join(directory, TOKENIZER)
    tokenizer = tokenizers.load(path)
    if tokenizer.digest != digest:
        raise UserError(f"{path}: damaged: not what {MANIFEST} says")
    return tokenizer


_kept_tokenizer = lru_cache(maxsize=1)(_tokenizer)  # between the tasks of one worker process


# The partitions


def _marker(directory: str, index: int) -> str:
    return storage.join(directory, "parts", f"{index:05d}.json")


def _finished(directory: str, key: str) -> dict[int, dict[str, Any]]:
    """What earlier tries of the same dataset have finished."""
    parts = {}
    for name in storage.names(storage.join(directory, "parts")):
        if name.endswith(".json") and name[:-5].isdecimal():
            part = storage.read_json(storage.join(directory, "parts", name))
            if part["key"] == key:
                parts[int(name[:-5])] = part
    return parts


def _run(
    partitions: list[Partition],
    finished: dict[int, dict[str, Any]],
    corpus: CorpusConfig,
    directory: str,
    key: str,
    tokenizer_digest: str,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Make the shards of the partitions that are not finished; yield (index, what came of it) as each one is."""
    import ray.data

    items = [
        {"index": index, "partition": json.dumps([asdict(span) for span in partition])}
        for index, partition in enumerate(partitions)
        if index not in finished
    ]
    if not items:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        task = partial(_task, corpus=corpus, directory=directory, key=key, digest=tokenizer_digest)
        rows = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings():
            # Ray 2.60 calls this way to set max_retries deprecated, and has no other; its default is for ever.
            warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
            results = rows.map(task, num_cpus=1, max_retries=3)
        for row in results.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["index"], json.loads(row["part"])


def _task(row: dict[str, Any], corpus: CorpusConfig, directory: str, key: str, digest: str) -> dict[str, Any]:
    index = row["index"]
    try:
        spans = (Span(**fields | {"file": SourceFile(**fields["file"])}) for fields in json.loads(row["partition"]))
        part = _make_part(index, tuple(spans), corpus, directory, digest)
    except UserError as error:  # a value, since Ray would log and retry what is raised
        return {"index": index, "part": "", "error": str(error)}
    storage.write_json(_marker(directory, index), part | {"key": key})
    return {"index": index, "part": json.dumps(part), "error": ""}


def _make_part(
    index: int, partition: Partition, corpus: CorpusConfig, directory: str, tokenizer_digest: str
) -> dict[str, Any]:
    """Write the shards of a partition."""
    tokenizer = _kept_tokenizer(directory, tokenizer_digest)
    writers = {split: _ShardWriter(directory, split, index, corpus, tokenizer) for split in ("train", "heldout")}
    dropped: Counter[str] = Counter()
    heldout_sum = seen = 0
    for batch in _batches(partition, corpus, dropped):
        all_ids = tokenizer.encode_documents([text for _, _, text in batch])
        for (span, source, text), ids in zip(batch, all_ids, strict=True):
            data = text.encode()
            document = sources.document_hash(data)
            heldout = sources.is_heldout(span, document, corpus)
            if heldout:
                heldout_sum += int.from_bytes(hashlib.sha256(data).digest(), "big")
            if seen % _CHECK_EVERY == 0:
                again = tokenizer.decode_bytes(ids[:_CHECK_TOKENS])
                same = data.startswith(again) and (len(data) == len(again) or len(ids) > _CHECK_TOKENS)
                assert same, f"{source}: the tokenizer did not give back the text it was given"
            seen += 1
            writers["heldout" if heldout else "train"].add(document, source, ids, len(data), len(text))
    files = [(span.file, sources.span_digest(span).hex()) for span in partition]
    return {
        "shards": [shard for writer in writers.values() if (shard := writer.close())],
        "sources": [[file.path, file.name, file.size, digest] for file, digest in files],
        "dropped": dict(dropped),
        "heldout": f"{heldout_sum % 2**256:064x}",
    }


def _batches(
    partition: Partition, corpus: CorpusConfig, dropped: Counter[str]
) -> Iterator[list[tuple[sources.Span, str, str]]]:
    """Documents, as many at a time as encode well together."""
    batch, characters = [], 0
    for span in partition:
        for source, text in sources.documents(span, corpus, dropped):
            batch.append((span, source, text))
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Rows to the row groups of one Parquet file, which exists once it is closed, and only if it has rows."""

    def __init__(self, directory: str, split: Split, index: int, corpus: CorpusConfig, tokenizer: Tokenizer) -> None:
        self._directory, self._split, self._name = directory, split, f"{split}-{index:05d}.parquet"
        self._segment_tokens, self._end_of_text = corpus.segment_tokens, tokenizer.end_of_text
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        tokens = pa.list_(pa.from_numpy_dtype(self._dtype))
        self._schema = pa.schema([("document", pa.uint64()), ("source", pa.string()), ("tokens", tokens)])
        self._temporary = storage.join(directory, "parts", f".{self._name}.{uuid.uuid4().hex}")
        self._file: Any = None
        self._writer: Any = None
        self._rows: list[tuple[int, str, Tokens]] = []
        self._held = 0
        self._segments: list[int] = []
        self._counts: Counter[str] = Counter()

    def add(self, document: int, source: str, ids: Tokens, size: int, characters: int) -> None:
        row = np.full(len(ids) + 1, self._end_of_text, dtype=self._dtype)
        row[:-1] = ids
        for name, count in zip(Counts.model_fields, (1, size, characters, len(row)), strict=True):
            self._counts[name] += count
        borders: range | list[int] = []
        if len(row) > self._segment_tokens:  # fill up this row group, and cut the rest into whole ones
            borders = range(self._segment_tokens - self._held, len(row), self._segment_tokens)
        for part in np.split(row, borders):
            self._rows.append((document, source, part))
            self._held += len(part)
            if self._held >= self._segment_tokens:
                self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            filesystem, path = fsspec.core.url_to_fs(self._temporary)
            filesystem.makedirs(filesystem._parent(path), exist_ok=True)
            self._file = filesystem.open(path, "wb")
            self._writer = pq.ParquetWriter(
                self._file, self._schema, compression="zstd", use_dictionary=["source"], write_statistics=False
            )
        hashes, names, tokens = zip(*self._rows, strict=True)
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
        lists = pa.ListArray.from_arrays(offsets, np.concatenate(tokens))
        columns = [pa.array(hashes, pa.uint64()), pa.array(names, pa.string()), lists]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(hashes))
        self._segments.append(self._held)
        self._rows, self._held = [], 0

    def close(self) -> dict[str, Any] | None:
        """The shard's entry in the manifest; none if there was nothing to write."""
        if self._rows:
            self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        self._file.close()
        filesystem, path = fsspec.core.url_to_fs(self._temporary)
        entry = dict(self._counts) | {
            "name": self._name,
            "split": self._split,
            "file_bytes": filesystem.size(path),
            "digest": _file_digest(self._temporary),
            "segments": self._segments,
        }
        filesystem.mv(path, fsspec.core.url_to_fs(storage.join(self._directory, self._name))[1])
        return entry


def _file_digest(path: str) -> str:
    with fsspec.open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()
