"""Where text comes from: finds the input files, cuts them into partitions, yields their documents.

Files are read as bytes and decoded exactly; only a `\\n` ends a line. This module does not know what a
token is, nor who works through the partitions.
"""

import hashlib
import io
import json
import math
import os
import re
import string
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gru.config import BUILT_IN_SOURCES, CorpusConfig
from gru.errors import UserError

_KINDS = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# Text as well, but found beside a corpus as often as in one: read only if asked for.
_ALSO_TEXT = dict.fromkeys(
    [".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".rs", ".go"], "text"
)
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_VERSION_KEYS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "created")
_STDLIB_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "ensurepip", "lib-dynload"),
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    path: str  # absolute, or a URL
    size: int
    modified: str  # whatever names this version of the file: its time of change or ETag
    kind: Literal["text", "jsonl", "parquet"]
    compressed: bool
    name: str  # what a dataset's rows call it: its path below the source it was found by

    @property
    def divisible(self) -> bool:
        return self.kind != "parquet" and not self.compressed


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; where it is cut, both ends move on to behind the next `\\n`."""

    file: SourceFile
    start: int
    end: int
    heldout: bool | None  # None: each document's hash decides

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end == self.file.size


Partition = tuple[Span, ...]


def list_files(corpus: CorpusConfig) -> list[SourceFile]:
    """The files that the sources name, in the order of the sources and sorted within each.

    Raises UserError if a source is absent, holds nothing, or is of an unknown format.
    """
    found: dict[str, SourceFile] = {}
    for source in corpus.sources:
        files = _standard_library() if source in BUILT_IN_SOURCES else _find(source, corpus.format)
        for file in files:
            found.setdefault(file.path, file)
    return list(found.values())


def _find(source: str, format: str) -> list[SourceFile]:
    url = source if "://" in source else str(Path(source).expanduser().absolute())
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if filesystem.isfile(path):
            entries, root, explicit = {path: filesystem.info(path)}, str(PurePosixPath(path).parent), True
        elif filesystem.isdir(path):
            entries, root, explicit = filesystem.find(path, detail=True), path, False
        else:
            matches = filesystem.glob(path, detail=True) if re.search(r"[*?[]", path) else {}
            entries = {name: info for name, info in matches.items() if info["type"] == "file"}
            root, explicit = re.split(r"[^/]*[*?[]", path, maxsplit=1)[0], True
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"corpus.sources: cannot read {source}: {error}") from None
    if explicit and not entries:
        raise UserError(f"corpus.sources: no such file: {source}")
    files = []
    for name in sorted(entries):
        kind, compressed = _kind(name, format, explicit)
        label = name.removeprefix(root).lstrip("/")
        if kind is None and explicit:
            raise UserError(
                f"corpus.sources: {name}: its name does not tell the format: "
                "set corpus.format to text, jsonl or parquet"
            )
        if kind is None or (not explicit and any(part.startswith(".") for part in label.split("/"))):
            continue
        info = entries[name]
        if info.get("size") is None:
            raise UserError(f"corpus.sources: {name}: its size is unknown; copy it to a disk or bucket first")
        version = str(next((info[key] for key in _VERSION_KEYS if info.get(key)), ""))
        full = filesystem.unstrip_protocol(name) if "://" in url else name
        files.append(SourceFile(full, info["size"], version, kind, compressed, label))
    if not files:
        raise UserError(
            f"corpus.sources: nothing to read in {source}: files are known by {', '.join(_KINDS)} "
            "(.gz, .zst); others must be named or matched by a glob"
        )
    return files


def _kind(name: str, format: str, explicit: bool) -> tuple[Any, bool]:
    """(kind or None, compressed) of a file; one that is named has the format set, whatever its extension."""
    suffixes = PurePosixPath(name).suffixes
    compressed = bool(suffixes) and suffixes[-1].lower() in _COMPRESSION
    extension = (suffixes[-2:-1] if compressed else suffixes[-1:]) or [""]
    kinds = _KINDS if format == "auto" and not explicit else _KINDS | _ALSO_TEXT
    kind = kinds.get(extension[0].lower())
    if format == "auto":
        return kind, compressed
    return (format if explicit or kind == format else None), compressed


def _standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - _STDLIB_SKIPPED
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"corpus.sources: python-stdlib: this interpreter has no Python source code in {root}")
    stats = [(path, path.relative_to(root).as_posix(), path.stat()) for path in sorted(paths)]
    return [SourceFile(str(p), s.st_size, str(s.st_mtime), "text", False, name) for p, name, s in stats]


def plan(files: list[SourceFile], corpus: CorpusConfig) -> list[Partition]:
    """Group the files, in order, into partitions of about `partition_bytes`, cutting those that are larger.

    Raises UserError if the corpus has a held-out tail but cannot be cut into two.
    """
    groups: list[list[Span]] = []
    room = 0
    for span in _spans(files, corpus):
        size = span.end - span.start
        if not groups or size > room:
            groups.append([])
            room = corpus.partition_bytes
        groups[-1].append(span)
        room -= size
    return [tuple(group) for group in groups]


def _spans(files: list[SourceFile], corpus: CorpusConfig) -> Iterator[Span]:
    if corpus.heldout == "hash":
        for file in files:
            yield from _cut(file, 0, file.size, None, corpus.partition_bytes)
        return
    total = sum(file.size for file in files)
    border = total - math.ceil(total * corpus.heldout_share)
    heldout = trained = before = 0
    for file in files:
        cut = min(max(border - before, 0), file.size)
        if not file.divisible:
            cut = file.size if cut * 2 > file.size else 0  # it belongs to where the larger part of it lies
        if cut or not file.size:
            yield from _cut(file, 0, cut, False, corpus.partition_bytes)
        if cut < file.size:
            yield from _cut(file, cut, file.size, True, corpus.partition_bytes)
        before, trained, heldout = before + file.size, trained + cut, heldout + file.size - cut
    if not trained or not heldout:
        raise UserError(
            'corpus.heldout = "tail": the files cannot be cut, so all or none would be held out; use "hash"'
        )


def _cut(file: SourceFile, start: int, end: int, heldout: bool | None, size: int) -> Iterator[Span]:
    pieces = max(math.ceil((end - start) / size), 1) if file.divisible else 1
    borders = [start + (end - start) * i // pieces for i in range(pieces + 1)]
    for left, right in pairwise(borders):
        yield Span(file, left, right, heldout)


def document_hash(text: bytes) -> int:
    """The 64-bit name of a document."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_heldout(span: Span, document: int, corpus: CorpusConfig) -> bool:
    return document / 2**64 < corpus.heldout_share if span.heldout is None else span.heldout


def span_digest(span: Span) -> bytes:
    """SHA-256 of the bytes between the span's real ends."""
    digest = hashlib.sha256()
    with fsspec.open(span.file.path, "rb") as file:
        start, end = _border(file, span.start, span.file.size), _border(file, span.end, span.file.size)
        file.seek(start)
        left = end - start
        while left and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def _border(file: IO[bytes], position: int, size: int) -> int:
    """Behind the first `\\n` at or after `position`; the two ends of a file stay where they are."""
    if position in (0, size):
        return position
    file.seek(position)
    while chunk := file.read(_CHUNK):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return size


def documents(span: Span, corpus: CorpusConfig, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield (source name, text) of each document; count in `dropped` what is left out, by reason.

    A text file, or a span of one, is one document; a compressed one is cut as if it were not. A line of JSON
    Lines or a row of Parquet is another.
    Raises UserError naming the file, and the place in it, if it cannot be read.
    """
    try:
        with fsspec.open(span.file.path, "rb") as file:
            for text in _texts(file, span, corpus, dropped):
                if text:
                    yield span.file.name, text
                else:
                    dropped["empty"] += 1
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{span.file.path}: cannot be read: {reason}") from None


def _texts(file: IO[bytes], span: Span, corpus: CorpusConfig, dropped: Counter[str]) -> Iterator[str]:
    start, end = _border(file, span.start, span.file.size), _border(file, span.end, span.file.size)
    file.seek(start)
    if span.file.compressed:
        codec = _COMPRESSION[PurePosixPath(span.file.path).suffix.lower()]
        # pyarrow's stream reads all the frames of a file, and complains of one that is truncated.
        file, end = (
            cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(file, codec), 1 << 20)),
            sys.maxsize,
        )
    if span.file.kind == "parquet":
        whole = io.BytesIO(file.read()) if span.file.compressed else file  # Parquet is read from its end
        yield from _fill(corpus.template, _rows(whole, span, corpus.template), span, dropped)
    elif span.file.kind == "jsonl":
        yield from _fill(corpus.template, _lines(file, start, end, span), span, dropped)
    elif span.file.compressed:  # cut while it is read, so that it need not fit in memory
        while (data := file.read(corpus.partition_bytes) + file.readline()) or start == 0:
            yield _decode(data, start, span)
            start += max(1, len(data))
    elif (data := file.read(end - start)) or span.whole:
        yield _decode(data, start, span)


def _decode(data: bytes, start: int, span: Span) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = " of the decompressed text" if span.file.compressed else ""
        raise UserError(f"{span.file.path}: not valid UTF-8 at byte {start + error.start}{where}") from None


def _lines(file: IO[bytes], start: int, end: int, span: Span) -> Iterator[dict[str, Any]]:
    while start < end and (line := file.readline()):
        text = _decode(line, start, span)
        if not text.isspace():
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = f"not valid JSON: {getattr(error, 'msg', 'nested too deeply')}"
                raise UserError(f"{span.file.path}: the line at byte {start} is {reason}") from None
            if not isinstance(record, dict):
                raise UserError(f"{span.file.path}: the line at byte {start} is not a JSON object")
            yield record
        start += len(line)


def _rows(file: IO[bytes], span: Span, template: str) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(file)
    columns = sorted({field for _, field in _parse(template) if field is not None})
    if missing := set(columns) - set(table.schema_arrow.names):
        raise UserError(f"{span.file.path}: has no column {min(missing)!r}, which corpus.template names")
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def _parse(template: str) -> list[tuple[str, str | None]]:
    """The template as pairs of literal text and the name of the field after it, if any."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"corpus.template: {error}; a brace itself is written {{{{ or }}}}") from None
    if any(spec or conversion for _, _, spec, conversion in parts) or not any(field for _, field, _, _ in parts):
        raise UserError(
            f"corpus.template = {template!r}: expected names of fields in braces, as in '{{title}}: {{text}}'"
        )
    return [(literal, field) for literal, field, _, _ in parts]


def _fill(template: str, records: Iterable[dict[str, Any]], span: Span, dropped: Counter[str]) -> Iterator[str]:
    parts = _parse(template)
    for record in records:
        values = [record.get(field) for _, field in parts if field is not None]
        if None in values:
            dropped["missing_field"] += 1
            continue
        text = "".join(
            literal + (_plain(record[field], field, span) if field is not None else "") for literal, field in parts
        )
        # JSON can escape half of a surrogate pair, which no UTF-8 file can hold.
        if not text.isascii() and _SURROGATE.search(text):
            raise UserError(f"{span.file.path}: a record has a lone surrogate (\\ud800 to \\udfff): {text[:40]!r}")
        yield text


def _plain(value: Any, field: str, span: Span) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, int | float):
        return str(value)
    raise UserError(f"{span.file.path}: field {field!r} is {type(value).__name__}, not a string or a list of strings")
