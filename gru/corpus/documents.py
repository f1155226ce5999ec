"""The documents of a span of a file: unpacked, decoded, put into the template, normalized and filtered by length.

What is left out is counted by reason in a `Report`, with examples. This module does not know where the spans come
from, or what a token is.
"""

import hashlib
import io
import sys
import unicodedata
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from gru.config import CorpusConfig
from gru.corpus.boundaries import document_bounds
from gru.corpus.formats import Data, read_csv, read_json_lines, read_parquet, read_text
from gru.corpus.json_array import read_json_array
from gru.corpus.report import ProblemLog, Report
from gru.corpus.sources import Span
from gru.corpus.template import Template, fill_template, parse_template
from gru.corpus.unpacking import BLOCK, DAMAGE, HashingFile, error_reason, is_damage, unpack
from gru.errors import UserError


def text_digest(text: bytes) -> bytes:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text).digest()


def document_hash(text: bytes) -> int:
    """Return the 64-bit hash that names a document: the first 8 bytes of its SHA-256, big-endian."""
    return int.from_bytes(text_digest(text)[:8], "big")


def is_heldout(span: Span, document: int, corpus: CorpusConfig) -> bool:
    """Whether the document with this hash is held out."""
    return document / 2.0**64 < corpus.heldout_share if span.heldout is None else span.heldout


def documents(span: Span, corpus: CorpusConfig, report: Report) -> Iterator[str]:
    """Yield the text of each document.

    A document is a record of JSON, CSV or Parquet, a text file, or the text between two separators; without a
    separator a large text file is cut at line ends about every `partition_bytes`.
    Raises UserError naming the file, and the place in it, if it cannot be read, if it is bad and `on_bad` is "fail",
    or if it has changed since it was listed.
    """
    most = corpus.max_characters or sys.maxsize
    try:
        for text in _texts(span, corpus, report):
            if corpus.normalization != "none" and not text.isascii():
                text = unicodedata.normalize(corpus.normalization, text)
            if corpus.min_characters <= len(text) <= most:
                yield text
            else:
                report.dropped["too_long" if len(text) > most else "too_short" if text else "empty"] += 1
    except Exception as error:
        if isinstance(error, UserError):
            raise
        if "://" not in span.file.path and not isinstance(error, OSError | pa.ArrowException):
            raise  # a defect; a remote file system may raise errors of its own types
        raise UserError(f"{span.file.path}: cannot be read: {error_reason(error)}") from None


def _texts(span: Span, corpus: CorpusConfig, report: Report) -> Iterator[str]:
    """Yield the texts of a span as they are in the file, and add the digest of its bytes to the report."""
    problems = ProblemLog(span, corpus, report)
    template = parse_template(corpus.template) if span.file.kind != "text" else []
    with span.file.open() as file:
        if span.file.divisible and span.file.kind != "parquet":
            start, end = document_bounds(file, span, _separator(problems) or b"\n")
            file.seek(start)
            data = file.read(end - start)
            report.digests.append(hashlib.sha256(data).hexdigest())
            yield from _parsed(io.BytesIO(data), start, file, template, problems)
        elif span.file.kind == "parquet" and span.file.seekable and not span.file.compression:
            report.digests.append(_span_digest(file, span))
            yield from _until_damage(_parquet_texts(file, template, problems), problems)
        else:
            raw = HashingFile(file)
            unpacked = unpack(io.BufferedReader(raw, BLOCK), span.file.compression)
            yield from _until_damage(_parsed(unpacked, 0, None, template, problems), problems)
            report.digests.append(raw.digest_of_all())
        if span.file.changed(file):
            raise UserError(f"{span.file.path}: changed while it was read; run the same command again")


def _parsed(data: Data, start: int, file: IO[bytes] | None, template: Template, problems: ProblemLog) -> Iterator[str]:
    """Return the texts in `data`, which starts at byte `start` of the (unpacked) file."""
    match problems.span.file.kind:
        case "text":
            return read_text(data, start, _separator(problems), problems)
        case "jsonl":
            return fill_template(template, read_json_lines(data, start, problems), problems)
        case "json":
            return fill_template(template, read_json_array(data, problems), problems)
        case "csv":
            return fill_template(template, read_csv(data, start, file, problems), problems)
        case "parquet":  # a reader starts at the end of the file, so all of it is unpacked first
            return _parquet_texts(io.BytesIO(data.read()), template, problems)


def _parquet_texts(file: IO[bytes], template: Template, problems: ProblemLog) -> Iterator[str]:
    names = {name for _, name in template}
    return fill_template(template, read_parquet(file, names, problems), problems)


def _separator(problems: ProblemLog) -> bytes:
    """Return the separator of a text file's documents; empty if there is none."""
    return (problems.corpus.separator or "").encode() if problems.span.file.kind == "text" else b""


def _span_digest(file: IO[bytes], span: Span) -> str:
    """Return the SHA-256 of the bytes of a span."""
    digest = hashlib.sha256()
    file.seek(span.start)
    for start in range(0, span.size, BLOCK):
        digest.update(file.read(min(BLOCK, span.size - start)))
    return digest.hexdigest()


def _until_damage(texts: Iterator[str], problems: ProblemLog) -> Iterator[str]:
    """Yield the texts before the place where the file is damaged, and count the file as unreadable there."""
    try:
        yield from texts
    except DAMAGE as error:
        if not is_damage(error):
            raise
        problems.drop("unreadable", f"cannot be read to its end: {error_reason(error)}")
