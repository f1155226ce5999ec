"""A finished dataset: its manifest, and reading it back.

A row of a shard is a document, or a part of a long one; a row group is a segment, and its flat buffer of tokens is
the stream that is trained on. This module does not know how a dataset is made, nor how it is used.
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

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

_DECODED_AT_ONCE = 1 << 16  # tokens; as Python's integers they take 40 times the memory

Split = Literal["train", "heldout"]
Tokens = np.ndarray[Any, np.dtype[Any]]


class ManifestRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Counts(ManifestRecord):
    documents: int = 0
    bytes: int = 0  # of text, as UTF-8
    characters: int = 0
    tokens: int = 0  # with one end of text for each document

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) - getattr(other, name) for name in Counts.model_fields})


class Source(ManifestRecord):
    name: str
    size: int
    digest: str  # SHA-256 of the file; of the SHA-256s of its spans if it was cut


class Shard(ManifestRecord):
    name: str
    split: Split
    counts: Counts
    lengths: list[int]  # documents of up to 2^0, 2^1, 2^2 ... tokens
    file_bytes: int
    digest: str  # SHA-256 of the file
    segments: list[int]  # tokens in each row group


class Manifest(ManifestRecord):
    format_version: int
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    sources: list[Source]
    train: Counts
    heldout: Counts
    dropped: dict[str, int]  # documents left out, by reason
    replaced: int  # documents in which U+FFFD stands for invalid bytes
    examples: list[str]  # the first places in the sources where something was wrong
    vocab_size: int
    end_of_text: int
    tokenizer_digest: str
    heldout_digest: str  # of the held-out texts, whatever their order, their partitions or the tokenizer
    shards: list[Shard]
    digest: str = ""  # of all the rest but where the sources and the tokenizer lay

    @property
    def counts(self) -> Counts:
        return self.train + self.heldout

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
        return load_tokenizer(self.directory, self.manifest.tokenizer_digest)

    def segments(self, split: Split) -> list[Segment]:
        return [
            Segment(shard.name, index, tokens)
            for shard in self.manifest.shards
            if shard.split == split
            for index, tokens in enumerate(shard.segments)
        ]

    def read_segment(self, segment: Segment) -> Tokens:
        """Its tokens [tokens], documents end to end."""
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
        """Hashes of the documents that tokens [start, stop) of a segment belong to, in order."""
        rows = self._read(segment, ["document", "tokens"])
        ends = np.cumsum(pc.list_value_length(rows["tokens"]).to_numpy())
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return rows["document"].to_pylist()[first : last + 1]

    def texts(self, split: Split) -> Iterator[str]:
        """The documents of a split, decoded."""
        tokenizer = self.tokenizer()
        parts: list[Tokens] = []
        for segment in self.segments(split):
            for row in self._tokens(segment):
                parts.append(row.values.to_numpy())
                if parts[-1][-1] == self.manifest.end_of_text:
                    yield decode(tokenizer, np.concatenate(parts)).decode()
                    parts = []

    def document(self, name: int) -> tuple[str, str] | None:
        """(source, text) of the document of that hash; None if there is none."""
        for shard in self.manifest.shards:
            path = storage.join(self.directory, shard.name)
            with _readable(path), fsspec.open(path, "rb") as file:
                table = pq.read_table(file, filters=pc.field("document") == pa.scalar(name, pa.uint64()))
            if table.num_rows:
                tokens = table["tokens"].combine_chunks().flatten().to_numpy()
                # The same document may be there several times if duplicates were kept.
                end = int(np.argmax(tokens == self.manifest.end_of_text))
                return table["source"][0].as_py(), decode(self.tokenizer(), tokens[:end]).decode()
        return None

    def verify(self) -> None:
        """Read every shard and compare its digest."""
        self.tokenizer()
        for shard in self.manifest.shards:
            path = storage.join(self.directory, shard.name)
            with _readable(path):
                if storage.file_digest(path) != shard.digest:
                    raise UserError(f"{path}: damaged: not what {MANIFEST} says")

    def _tokens(self, segment: Segment) -> pa.ListArray:
        rows = self._read(segment, ["tokens"])["tokens"].combine_chunks()
        if len(rows.values) != segment.tokens:
            path = storage.join(self.directory, segment.shard)
            raise UserError(f"{path}: damaged: not the tokens that {MANIFEST} says")
        return rows

    def _read(self, segment: Segment, columns: list[str]) -> pa.Table:
        path = storage.join(self.directory, segment.shard)
        with _readable(path), fsspec.open(path, "rb") as file:
            if segment.shard not in self._footers and file.seek(0, 2) != self._shards[segment.shard].file_bytes:
                raise UserError(f"{path}: damaged: not of the size that {MANIFEST} says")
            reader = pq.ParquetFile(file, metadata=self._footers.get(segment.shard))
            self._footers[segment.shard] = reader.metadata
            return reader.read_row_group(segment.row_group, columns=columns)


def decode(tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """The text of a document of whatever length, as UTF-8."""
    starts = range(0, len(tokens), _DECODED_AT_ONCE)
    return b"".join(tokenizer.decode_bytes(tokens[start : start + _DECODED_AT_ONCE]) for start in starts)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


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


def load_tokenizer(directory: str, digest: str) -> Tokenizer:
    """The tokenizer of a dataset. Raises UserError if it is not the one of that digest."""
    path = storage.join(directory, TOKENIZER)
    tokenizer = tokenizers.load(path)
    if tokenizer.digest != digest:
        raise UserError(f"{path}: damaged: not what {MANIFEST} says")
    return tokenizer


def first_texts(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """Whole texts, in order, until there are `most_bytes`."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= most_bytes:
            return
