"""A finished dataset: the manifest, and the reader of segments, documents and texts.

A row of a shard is a document, or a piece of a long one; a row group is a segment, and its flat buffer of tokens is
the stream that is trained on. This module does not know how a dataset is prepared or what it is used for.

Parquet is read with use_threads=False: a thread of Arrow's pool that still holds a Python file while the interpreter
finalizes aborts the process.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from gru import storage
from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus import tokenizer as tokenizers
from gru.corpus.tokenizer import Tokenizer
from gru.errors import UserError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

_DECODE_TOKENS = 1 << 16  # tokens decoded at a time: as Python integers they take 40 times the memory

Split = Literal["train", "heldout"]
HeldoutBy = Literal["hash", "tail", "lowest_hash"]
Tokens = np.ndarray[Any, np.dtype[Any]]


class ManifestRecord(BaseModel):
    """The base of all records in a manifest: immutable, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(ManifestRecord):
    """The size of a split or a shard."""

    documents: int = 0
    bytes: int = 0  # of the text as UTF-8
    characters: int = 0
    tokens: int = 0  # including one end of text per document

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) - getattr(other, name) for name in Counts.model_fields})


class Source(ManifestRecord):
    """A source file that the dataset was prepared from."""

    name: str
    size: int  # in bytes
    digest: str  # SHA-256 of the file, or of the part that a limit asks for; if it was cut, that of those of its spans


class Shard(ManifestRecord):
    """A Parquet file of tokens."""

    name: str
    split: Split
    source: int  # index in `CorpusConfig.source_options()` of the source of its documents
    counts: Counts
    lengths: list[int]  # histogram: number of documents of up to 2^0, 2^1, 2^2 ... tokens
    file_bytes: int
    digest: str  # SHA-256 of the file
    segments: list[int]  # number of tokens in each row group


# Where the inputs are is not part of the content, nor are the files that were not read.
_LOCATIONS: Any = {
    "digest": True,
    "passed_over": True,
    "corpus": {"sources": True, "source": {"__all__": {"path"}}, "dropped": True},
    "tokenizer": {"path"},
}


class Manifest(ManifestRecord):
    """The description of a dataset, written last: the dataset exists when this file exists."""

    format_version: int
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    sources: list[Source]
    train: Counts
    heldout: Counts
    heldout_by: HeldoutBy  # how the held-out text was chosen: `corpus.heldout`, unless no document would be held out
    dropped: dict[str, int]  # number of documents left out, by reason
    dropped_bytes: dict[str, int]  # bytes of the sources that were lost with them, by reason, as far as known
    passed_over: dict[str, int]  # number of files in the sources' directories that are not read, by extension
    replaced: int  # number of documents in which U+FFFD replaces invalid bytes
    examples: dict[str, list[str]]  # the first problems by reason: file, place and what is wrong
    vocab_size: int
    end_of_text: int
    tokenizer_digest: str
    heldout_digest: str  # digest of the held-out texts; independent of their order, the partitions and the tokenizer
    shards: list[Shard]
    digest: str = ""  # digest of all other fields except `passed_over` and the paths of the inputs

    @property
    def counts(self) -> Counts:
        return self.train + self.heldout

    def content_digest(self) -> str:
        """Return what `digest` must be."""
        content = self.model_dump(mode="json", exclude=_LOCATIONS)
        return storage.sha256(json.dumps(content, sort_keys=True).encode())


class Segment(NamedTuple):
    """A row group of a shard."""

    shard: str
    row_group: int
    tokens: int  # number of tokens


class Dataset:
    """A finished dataset. Its methods raise UserError if a file is absent or is not the one in the manifest."""

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._shards = {shard.name: shard for shard in manifest.shards}
        self._footers: dict[str, pq.FileMetaData] = {}

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory, self.manifest.tokenizer_digest)

    def segments(self, split: Split) -> list[Segment]:
        """Return all segments of a split, in order."""
        return [
            Segment(shard.name, index, tokens)
            for shard in self.manifest.shards
            if shard.split == split
            for index, tokens in enumerate(shard.segments)
        ]

    def segment_weights(self, split: Split) -> list[float]:
        """Return how often an epoch reads each segment of a split: its source's weight; held-out text has none."""
        weights = [options.weight for options in self.manifest.corpus.source_options()]
        return [
            weights[shard.source] if split == "train" else 1.0
            for shard in self.manifest.shards
            if shard.split == split
            for _ in shard.segments
        ]

    def read_segment(self, segment: Segment) -> Tokens:
        """Return the tokens [tokens] of a segment, its documents end to end."""
        return self._tokens(segment).values.to_numpy()

    def first_tokens(self, split: Split, limit: int) -> Tokens:
        """Return the first tokens of a split's stream, at most `limit`."""
        parts: list[Tokens] = []
        for segment in self.segments(split):
            parts.append(self.read_segment(segment))
            if sum(map(len, parts)) >= limit:
                break
        return np.concatenate(parts)[:limit]

    def documents(self, segment: Segment, start: int, stop: int) -> list[int]:
        """Return the hashes of the documents that tokens [start, stop) of a segment belong to, in order."""
        rows = self._read(segment, ["document", "tokens"])
        ends = np.cumsum(pc.list_value_length(rows["tokens"]).to_numpy())
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return rows["document"].to_pylist()[first : last + 1]

    def texts(self, split: Split) -> Iterator[str]:
        """Yield the text of each document of a split."""
        tokenizer = self.tokenizer()
        pieces: list[Tokens] = []
        for segment in self.segments(split):
            for row in self._tokens(segment):
                pieces.append(row.values.to_numpy())
                if pieces[-1][-1] == self.manifest.end_of_text:
                    yield decode(tokenizer, np.concatenate(pieces)).decode()
                    pieces = []

    def document(self, document_hash: int) -> tuple[str, str] | None:
        """Return (source, text) of the document with that hash, or None if there is none."""
        rows = pc.field("document") == pa.scalar(document_hash, pa.uint64())
        for shard in self.manifest.shards:
            path = storage.join(self.directory, shard.name)
            with _readable(path), fsspec.open(path, "rb") as file:
                table = pq.read_table(file, filters=rows, use_threads=False, pre_buffer=False)
            if table.num_rows:
                tokens = table["tokens"].combine_chunks().flatten().to_numpy()
                # With corpus.deduplicate = "none" the shard may have the same document several times.
                end = int(np.argmax(tokens == self.manifest.end_of_text))
                return table["source"][0].as_py(), decode(self.tokenizer(), tokens[:end]).decode()
        return None

    def verify(self) -> None:
        """Read every shard and compare its digest with the manifest's."""
        self.tokenizer()
        for shard in self.manifest.shards:
            path = storage.join(self.directory, shard.name)
            with _readable(path):
                if storage.file_digest(path) != shard.digest:
                    raise UserError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")

    def _tokens(self, segment: Segment) -> pa.ListArray:
        """Return the tokens of a segment by row."""
        rows = self._read(segment, ["tokens"])["tokens"].combine_chunks()
        if len(rows.values) != segment.tokens:
            path = storage.join(self.directory, segment.shard)
            raise UserError(f"{path}: damaged: its number of tokens differs from the one in {MANIFEST}")
        return rows

    def _read(self, segment: Segment, columns: list[str]) -> pa.Table:
        path = storage.join(self.directory, segment.shard)
        with _readable(path), fsspec.open(path, "rb") as file:
            if segment.shard not in self._footers and file.seek(0, 2) != self._shards[segment.shard].file_bytes:
                raise UserError(f"{path}: damaged: its size differs from the one in {MANIFEST}")
            reader = pq.ParquetFile(file, metadata=self._footers.get(segment.shard))
            self._footers[segment.shard] = reader.metadata
            return reader.read_row_group(segment.row_group, columns=columns, use_threads=False)


def decode(tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """Return the text of a document of any length, as UTF-8."""
    starts = range(0, len(tokens), _DECODE_TOKENS)
    return b"".join(tokenizer.decode_bytes(tokens[start : start + _DECODE_TOKENS]) for start in starts)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Raise UserError with the path for the errors of a file system or of Arrow."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def open_dataset(directory: str) -> Dataset:
    """Open a finished dataset. Raises UserError if there is none, or if its manifest or tokenizer is damaged."""
    path = storage.join(directory, MANIFEST)
    try:
        manifest = Manifest.model_validate(storage.read_json(path))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a dataset: it has no {MANIFEST}") from None
    except (ValidationError, ValueError):
        raise UserError(f"{path}: damaged, or written by another version of this program") from None
    if manifest.format_version != FORMAT_VERSION or manifest.digest != manifest.content_digest():
        raise UserError(f"{path}: damaged, or written by another version of this program")
    dataset = Dataset(directory, manifest)
    dataset.tokenizer()
    return dataset


def load_tokenizer(directory: str, digest: str) -> Tokenizer:
    """Return the tokenizer of a dataset. Raises UserError if its digest is another one."""
    path = storage.join(directory, TOKENIZER)
    tokenizer = tokenizers.read(path)
    if tokenizer.digest != digest:
        raise UserError(f"{path}: damaged: its SHA-256 differs from the one in {MANIFEST}")
    return tokenizer


def first_texts(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """Yield the first texts, which have at most `most_bytes` of UTF-8 together. The last one may be cut."""
    left = most_bytes
    for text in texts:
        data = text.encode()
        yield text if len(data) <= left else data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return
