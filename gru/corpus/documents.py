"""The documents of a span of a file: unpacked, decoded, put into the template, normalized, masked and filtered.

What is left out is counted by reason in a `Report`, with examples. This module does not know where the spans come
from, or what a token is.
"""

import hashlib
import io
import sys
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any

from gru.config import CorpusConfig
from gru.corpus.archives import EndsInMember, Gap, Member, seekable_copy, tar_members, zip_members
from gru.corpus.boundaries import document_bounds
from gru.corpus.csv_records import read_csv
from gru.corpus.encodings import HEAD_BYTES, UTF8, TranscodedFile, detect_encoding, is_transcoded, unmarked_encoding
from gru.corpus.filters import DocumentFilter
from gru.corpus.json_records import read_json, read_json_lines
from gru.corpus.lines import Data
from gru.corpus.members import MemberChoice
from gru.corpus.parquet_records import read_parquet
from gru.corpus.partitions import Span
from gru.corpus.plain_text import read_text
from gru.corpus.report import ProblemLog, Report
from gru.corpus.template import Template, column_names, fill_template, parse_template
from gru.corpus.unpacking import BLOCK, Damage, HashingFile, UnpackedFile, unreadable_is_user_error
from gru.corpus.web_pages import read_page
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

    A document is a record of JSON, CSV or Parquet, a web page, a text file, or the text between two separators; without
    a separator a large text file is cut at line ends about every `partition_bytes`.
    Raises UserError naming the file, and the place in it, if it cannot be read, if it is bad and `on_bad` is "fail",
    or if it has changed since it was listed.
    """
    if span.documents is None:
        yield from _all_documents(span, corpus, report)
        return
    first, end, _ = span.documents
    own = Report(left_out=report.left_out if not first else None)
    with closing(_all_documents(span, corpus, own)) as texts:
        for _ in islice(texts, first):
            pass
        if first:  # another span has what comes before
            own.clear()
            own.left_out = report.left_out
        yield from islice(texts, None if end is None else end - first)
    with unreadable_is_user_error(span.file.path), span.file.open() as file:
        _require_unchanged(span, file)
    report.add(own)


def _all_documents(span: Span, corpus: CorpusConfig, report: Report) -> Generator[str, None, None]:
    """Yield the text of each document of a span."""
    most = corpus.max_characters or sys.maxsize
    filters = DocumentFilter(corpus.filter)
    with unreadable_is_user_error(span.file.path):
        for text in _texts(span, corpus, report):
            if corpus.normalization != "none" and not text.isascii():
                text = unicodedata.normalize(corpus.normalization, text)
            text = filters.mask(text)
            if not corpus.min_characters <= len(text) <= most:
                report.drop_document("too_long" if len(text) > most else "too_short" if text else "empty", text)
            elif reason := filters.reason(text):
                report.drop_document(reason, text)
            else:
                yield text


def _texts(span: Span, corpus: CorpusConfig, report: Report) -> Iterator[str]:
    """Yield the texts of a span as they are in the file, and add the digest of its bytes to the report."""
    problems = ProblemLog(span, corpus, report)
    with span.file.open() as file:
        if span.file.kind == "archive":
            yield from _archive_texts(file, problems, report)
        elif not span.file.divisible:
            raw = HashingFile(file)
            try:
                yield from _stream_texts(_buffered(raw), problems)
            except GeneratorExit:  # no more documents are needed
                report.digests.append(raw.digest())
                raise
            report.digests.append(raw.digest_of_all())
        elif span.file.kind == "parquet":
            report.digests.append(_span_digest(file, span))
            yield from _parquet_texts(file, problems)
        elif is_transcoded(file.read(HEAD_BYTES), problems.options.encoding):
            report.digests.append(_span_digest(file, span))
            yield from _transcoded_texts(file, problems, report)
        else:
            start, end = document_bounds(file, span)
            file.seek(start)
            data = file.read(end - start)
            report.digests.append(hashlib.sha256(data).hexdigest())
            yield from _parsed(io.BytesIO(data), start, file, problems)
        _require_unchanged(span, file)


def _require_unchanged(span: Span, file: IO[bytes]) -> None:
    if span.file.changed(file):
        raise UserError(f"{span.file.path}: changed while it was read; run the same command again")


def _transcoded_texts(file: IO[bytes], problems: ProblemLog, report: Report) -> Iterator[str]:
    """Yield the texts of a file that is not UTF-8, which `plan` cuts only where the held-out tail begins.

    Then a span has its part of the whole text, which must fit in memory.
    """
    span = problems.span
    file.seek(0)
    stream = _buffered(HashingFile(file))
    if span.heldout is None or span.whole:
        yield from _stream_texts(stream, problems)
        return
    if span.file.kind == "csv":
        raise UserError(
            f'{span.file.path}: a held-out tail needs CSV in UTF-8; convert the file, or set corpus.heldout = "hash"'
        )
    if (decoded := _as_utf8(stream, problems)) is not None:
        try:
            text = decoded.read()
        except Damage as error:
            if not span.start:  # the other spans of the file find the same
                _drop_rest(error, problems)
            return
        start, end = (edge * len(text) // span.file.size for edge in (span.start, span.end))
        part = replace(span, file=replace(span.file, size=len(text)), start=start, end=end)
        part_problems = ProblemLog(part, problems.corpus, report)
        part_problems.encoding = problems.encoding
        start, end = document_bounds(io.BytesIO(text), part)
        yield from _parsed(io.BytesIO(text[start:end]), start, io.BytesIO(text), part_problems)


def _stream_texts(stream: io.BufferedReader, problems: ProblemLog) -> Iterator[str]:
    """Yield the texts of a file that is read from its beginning, up to the place where it is damaged."""
    source = problems.span.file
    unpacked = UnpackedFile(stream, source.compression) if source.compression else None
    data = _buffered(unpacked) if unpacked else stream
    try:
        if source.kind == "parquet":  # a reader starts at the end of the file, so all of it is unpacked first
            yield from _parquet_texts(io.BytesIO(data.read()), problems)
        elif source.kind == "html":
            yield from read_page(data, problems)
        elif (text := _as_utf8(data, problems)) is not None:
            yield from _parsed(text, 0, None, problems)
    except Damage as error:
        _drop_rest(error, problems)
    if unpacked:
        _drop_garbage(unpacked, problems)


def _drop_rest(error: Damage, problems: ProblemLog) -> None:
    """Count the rest of a file that is damaged."""
    size = max(0, problems.span.file.size - error.position)
    problems.drop("unreadable", f"cannot be read to its end: at byte {error.position:,}: {error}", size)


def _drop_garbage(unpacked: UnpackedFile, problems: ProblemLog) -> None:
    """Count what is behind the end of compressed data, if anything."""
    if size := unpacked.garbage:
        problems.drop("unreadable", f"has {size:,} bytes behind the end of the compressed data", size, count=0)


def _buffered(file: Any) -> io.BufferedReader:
    return io.BufferedReader(file, BLOCK)


def _as_utf8(data: io.BufferedReader, problems: ProblemLog) -> io.BufferedReader | None:
    """Return the data as UTF-8; None if it has no byte order mark and looks like UTF-16, which is counted."""
    head = data.peek(HEAD_BYTES)[:HEAD_BYTES]
    problems.encoding, mark = detect_encoding(head, problems.options.encoding)
    if problems.encoding != UTF8:
        data.read(mark)
        return _buffered(TranscodedFile(data, problems.encoding))
    if (name := unmarked_encoding(head)) is None or "\0" in (problems.options.separator or ""):
        return data
    if not problems.span.start:  # the other spans of the file find the same
        message = f"looks like {name.upper()} without a byte order mark"
        remedy = f'set {problems.options.key_of("encoding")} = "{name}"'
        problems.drop("unreadable", f"{message}: {remedy}", problems.span.file.size)
    return None


def _parsed(data: Data, start: int, file: IO[bytes] | None, problems: ProblemLog) -> Iterator[str]:
    """Return the texts in `data`, which is UTF-8 and starts at byte `start` of the (unpacked) file."""
    if problems.span.file.kind == "text":
        return read_text(data, start, file is None, problems)
    return _filled(_records(data, start, file, problems), _template(problems), problems)


def _records(data: Data, start: int, file: IO[bytes] | None, problems: ProblemLog) -> Iterator[Any]:
    match problems.span.file.kind:
        case "jsonl":
            return read_json_lines(data, start, problems)
        case "json":
            return read_json(data, problems)
        case "csv":
            return read_csv(data, start, file, problems)
    raise AssertionError(problems.span.file.kind)


def _parquet_texts(file: IO[bytes], problems: ProblemLog) -> Iterator[str]:
    template = _template(problems)
    return _filled(read_parquet(file, column_names(template), problems), template, problems)


def _template(problems: ProblemLog) -> Template:
    return parse_template(problems.options.template, problems.options.key_of("template"))


def _filled(records: Iterator[Any], template: Template, problems: ProblemLog) -> Iterator[str]:
    """Return the texts of the records, which also have the columns that the file's directories are named after."""
    if columns := dict(problems.span.file.columns):
        records = (columns | record if isinstance(record, dict) else record for record in records)
    return fill_template(template, records, problems)


def _archive_texts(file: IO[bytes], problems: ProblemLog, report: Report) -> Iterator[str]:
    """Yield the texts of the members of an archive."""
    source = problems.span.file
    raw = HashingFile(file)
    stream = _buffered(raw)
    is_zip = PurePosixPath(source.path.split("?")[0]).suffix.lower() == ".zip"
    in_place = is_zip and "://" not in source.path
    try:
        if not is_zip:
            unpacked = UnpackedFile(stream, source.compression) if source.compression else None
            content = _buffered(unpacked) if unpacked else stream
            yield from _member_texts(tar_members(content), problems, report)
            if unpacked:
                _drop_garbage(unpacked, problems)
        elif in_place:
            yield from _member_texts(zip_members(file), problems, report)
        else:
            with seekable_copy(stream) as copy:
                yield from _member_texts(zip_members(copy), problems, report)
    except GeneratorExit:  # no more documents are needed
        report.digests.append(_span_digest(file, replace(problems.span, end=file.tell())) if in_place else raw.digest())
        raise
    except Damage as error:
        message = f"is an archive that cannot be read to its end: {error}"
        counted = isinstance(error, EndsInMember)  # as the rest of that member
        size = 0 if counted else max(0, source.size - error.position)
        problems.drop("unreadable", message, size, count=0 if counted else 1)
    if in_place:
        file.seek(0)
    report.digests.append(raw.digest_of_all())


def _member_texts(members: Iterator[Member | Gap], problems: ProblemLog, report: Report) -> Iterator[str]:
    """Yield the texts of those members that would be read as files of a directory."""
    choice = MemberChoice(problems.options)
    for member in members:
        if isinstance(member, Gap):
            message = f"is an archive with a damaged header; {member.size:,} bytes of its members are lost"
            problems.drop("unreadable", message, member.size)
        elif (file := choice.source_file(problems.span.file, member)) is None:
            report.passed_over[PurePosixPath(member.name.lower()).suffix] += 1
        else:
            span = Span(file, 0, file.size, problems.span.heldout)
            yield from _stream_texts(member.content, ProblemLog(span, problems.corpus, report))


def _span_digest(file: IO[bytes], span: Span) -> str:
    """Return the SHA-256 of the bytes of a span."""
    digest = hashlib.sha256()
    file.seek(span.start)
    for start in range(0, span.size, BLOCK):
        digest.update(file.read(min(BLOCK, span.size - start)))
    return digest.hexdigest()
