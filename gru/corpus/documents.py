"""From a span of a file to its documents: unpacks, decodes, fills in the template, and cleans.

What is left out is counted by reason in a `Report`, with the first places. This module does not know where the
spans come from, nor what a token is.
"""

import bz2
import codecs
import csv
import hashlib
import io
import json
import lzma
import re
import string
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import ijson
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from gru.config import CorpusConfig
from gru.corpus.sources import Span, borders
from gru.errors import UserError

_EXAMPLES = 5  # places that a report remembers
_BLOCK = 1 << 20
_STEP = 1 << 12  # of what is unpacked at a time; what is lost before a damaged place is less
_BOM = b"\xef\xbb\xbf"
_MARK = "\ufdd0\ufdef\ufdd0"  # noncharacters, which no text should hold
# What the readers of a format say of a file that is damaged. OSError too, which Arrow raises without an errno.
_DAMAGE = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, ijson.JSONError)

_Data = io.BytesIO | io.BufferedReader

csv.field_size_limit(sys.maxsize)


@dataclass
class Report:
    """What became of the spans that were read."""

    dropped: Counter[str] = field(default_factory=Counter)  # documents left out, by reason
    replaced: int = 0  # documents in which U+FFFD stands for invalid bytes
    examples: list[str] = field(default_factory=list)  # the first bad ones: reason, file and place
    digests: list[str] = field(default_factory=list)  # SHA-256 of the bytes of each span


def text_digest(text: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(text).digest()


def document_hash(text: bytes) -> int:
    """The 64-bit name of a document: what its SHA-256 begins with."""
    return int.from_bytes(text_digest(text)[:8], "big")


def is_heldout(span: Span, document: int, corpus: CorpusConfig) -> bool:
    return document / 2.0**64 < corpus.heldout_share if span.heldout is None else span.heldout


def documents(span: Span, corpus: CorpusConfig, report: Report) -> Iterator[str]:
    """Yield the text of each document.

    A text file, or a piece of one between separators, is a document; without a separator a large one is cut at line
    ends about every `partition_bytes`. A record of JSON, CSV or Parquet is another.
    Raises UserError naming the file, and the place in it, if it cannot be read, is bad where `on_bad` is "fail", or
    has changed since it was listed.
    """
    most = corpus.max_characters or sys.maxsize
    try:
        for text in _Reader(span, corpus, report).texts():
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
            raise  # each remote file system has errors of its own
        raise UserError(f"{span.file.path}: cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What it says, in one line."""
    said = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return (text.splitlines() or [repr(error)])[0]


class _Hashing(io.RawIOBase):
    """A file read from here on, with the SHA-256 of all that was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def digest_of_all(self) -> str:
        """Of the whole file, the rest of which is read, whether or not those who read this have closed it."""
        while data := self._file.read(_BLOCK):
            self._sha256.update(data)
        return self._sha256.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._sha256.update(data)
        buffer[: len(data)] = data
        return len(data)


class _Reader:
    """The texts of one span, as they are in the file."""

    def __init__(self, span: Span, corpus: CorpusConfig, report: Report) -> None:
        self._span, self._corpus, self._report = span, corpus, report
        self._template = parse_template(corpus.template) if span.file.kind != "text" else []
        self._separator = (corpus.separator or "").encode() if span.file.kind == "text" else b""

    def texts(self) -> Iterator[str]:
        kind = self._span.file.kind
        with self._span.file.open() as file:
            if self._span.file.divisible and kind != "parquet":
                start, end = borders(file, self._span, self._separator or b"\n")
                file.seek(start)
                data = file.read(end - start)
                self._report.digests.append(hashlib.sha256(data).hexdigest())
                yield from self._from(io.BytesIO(data), start, file)
            elif kind == "parquet" and self._span.file.seekable and not self._span.file.compression:
                digest = hashlib.sha256()
                file.seek(self._span.start)
                for size in _blocks(self._span.size):
                    digest.update(file.read(size))
                self._report.digests.append(digest.hexdigest())
                yield from self._unless_damaged(self._fill(self._rows(file)))
            else:
                raw = _Hashing(file)
                buffered = io.BufferedReader(raw, _BLOCK)
                yield from self._unless_damaged(self._from(_unpack(buffered, self._span.file.compression), 0, None))
                self._report.digests.append(raw.digest_of_all())
            if self._span.file.changed(file):
                raise UserError(f"{self._span.file.path}: changed while it was read; run the same again")

    def _from(self, data: _Data, start: int, file: IO[bytes] | None) -> Iterator[str]:
        """The texts in `data`, which starts at byte `start` of the (unpacked) file."""
        match self._span.file.kind:
            case "text":
                return self._pieces(data, start)
            case "jsonl":
                return self._fill(self._json_lines(data, start))
            case "json":
                return self._fill(self._json_array(data))
            case "csv":
                return self._fill(self._csv(data, start, file))
            case "parquet":  # is read from its end, so all of it is unpacked first
                return self._fill(self._rows(io.BytesIO(data.read())))

    def _unless_damaged(self, texts: Iterator[str]) -> Iterator[str]:
        try:
            yield from texts
        except _DAMAGE as error:
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise  # of the disk or the network, not of the file
            self._bad("unreadable", f"cannot be read to its end: {_reason(error)}")

    def _bad(self, reason: str, message: str) -> None:
        """Count a document that is left out; stop if that is what to do with it."""
        where = f"{self._span.file.path}: {message}"
        if self._corpus.on_bad == "fail":
            raise UserError(where)
        self._report.dropped[reason] += 1
        self._example(message)

    def _example(self, message: str) -> None:
        if len(self._report.examples) < _EXAMPLES:
            self._report.examples.append(f"{self._span.file.name}: {message}")

    def _decode(self, data: bytes, start: int) -> str | None:
        """None if it is not UTF-8, and so left out."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data.decode(errors="replace") if self._is_mended(start + error.start) else None

    def _is_mended(self, place: int) -> bool:
        """Whether a document that is not UTF-8 at that byte gets U+FFFD there; else it is left out."""
        where = " of the unpacked text" if self._span.file.compression else ""
        message = f"not valid UTF-8 at byte {place}{where}"
        if self._corpus.on_bad == "replace":
            self._report.replaced += 1
            self._example(message)
            return True
        self._bad("invalid_utf8", message)
        return False

    def _decode_lines(self, data: bytes, start: int) -> str | None:
        """As `_decode`, of a piece that is a document by its size only: what is left out is a line of it."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            lines = [self._decode(line, place) for place, line in _lines(io.BytesIO(data), start)]
            return "".join(filter(None, lines)) or None

    # Text

    def _pieces(self, file: _Data, start: int) -> Iterator[str]:
        if self._separator:
            pieces, decode = _split(file, self._separator), self._decode
        else:
            pieces = self._chunks(file)
            decode = self._decode if self._span.whole and not self._span.file.compression else self._decode_lines
        for data in pieces:
            if (text := decode(data, start)) is not None:
                yield text
            start += len(data) + len(self._separator)

    def _chunks(self, file: _Data) -> Iterator[bytes]:
        """The file, or pieces of it that need not all fit in memory."""
        first = True
        size = self._corpus.partition_bytes if self._span.file.compression else -1
        while (data := file.read(size) + file.readline()) or (first and self._span.whole):
            yield data
            first = False

    # Records

    def _json_lines(self, file: _Data, start: int) -> Iterator[Any]:
        for place, line in _lines(file, start):
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                if line.isspace() or (text := self._decode(line, place)) is None:
                    continue
                try:
                    record = orjson.loads(text)
                except orjson.JSONDecodeError:
                    self._bad("bad_record", f"the line at byte {place} is not valid JSON: {error.msg}")
                    continue
            if isinstance(record, dict):
                yield record
            else:
                self._bad("bad_record", f"the line at byte {place} is not a JSON object")

    def _json_array(self, file: _Data) -> Iterator[Any]:
        valid = _Marked(file)
        head = valid.read1(_BLOCK).removeprefix(_BOM).lstrip()
        if not head.startswith(b"["):
            self._bad("unreadable", "is not a JSON array of records")
            return
        for number, record in enumerate(ijson.items(_After(head, valid), "item", use_float=True), 1):
            # Looked for only if there are marks in what has been read, which is little more than this record.
            if valid.places and (marks := (text := json.dumps(record, ensure_ascii=False)).count(_MARK)):
                places = [valid.places.popleft() for _ in range(marks)]
                if not self._is_mended(places[0]):
                    continue
                record = json.loads(text.replace(_MARK, "\ufffd"))
            if isinstance(record, dict):
                yield record
            else:
                self._bad("bad_record", f"item {number} of the array is not a JSON object")

    def _csv(self, data: _Data, start: int, file: IO[bytes] | None) -> Iterator[Any]:
        header: list[str] | None = None
        if start and file is not None:
            file.seek(0)
            header = next((row for _, row in self._csv_rows(file, 0)), [])
        for place, row in self._csv_rows(data, start):
            if header is None:
                header = row
            elif len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                self._bad("bad_record", f"the record at byte {place} has {len(row)} fields, not {len(header)}")

    def _csv_rows(self, file: IO[bytes], start: int) -> Iterator[tuple[int, list[str]]]:
        """Records as RFC 4180 has them: a field with quotes, separators or line ends in it is quoted."""
        delimiter = "\t" if ".tsv" in self._span.file.path.lower() else ","
        lines: list[bytes] = []
        begin, quotes = start, 0
        for place, line in _lines(file, start):
            begin = begin if lines else place
            lines.append(line)
            quotes += line.count(b'"')
            if quotes % 2:
                continue
            record, lines = b"".join(lines), []
            if record.strip(b"\r\n") and (text := self._decode(record, begin)) is not None:
                try:
                    yield begin, next(csv.reader([text], delimiter=delimiter, strict=True))
                except csv.Error as error:
                    self._bad("bad_record", f"the record at byte {begin} is not valid CSV: {error}")
        if lines:
            self._bad("bad_record", f"the record at byte {begin} has a quote that is never closed")

    def _rows(self, file: IO[bytes]) -> Iterator[Any]:
        """Rows of the row groups that start in the span."""
        table = pq.ParquetFile(file)
        named = {name for _, name in self._template}
        columns = [name for name in table.schema_arrow.names if name in named]
        whole = self._span.whole
        number = 0
        for group in range(table.num_row_groups):
            first = table.metadata.row_group(group).column(0)
            place = min(filter(None, (first.dictionary_page_offset, first.data_page_offset)))
            if whole or self._span.start <= place < self._span.end:
                row = number
                for batch in table.iter_batches(1024, row_groups=[group], columns=columns):
                    try:
                        yield from batch.to_pylist() if columns else ({} for _ in range(batch.num_rows))
                    except UnicodeDecodeError:
                        yield from self._checked_rows(batch, row)
                    row += batch.num_rows
            number += table.metadata.row_group(group).num_rows

    def _checked_rows(self, batch: pa.RecordBatch, first: int) -> Iterator[Any]:
        """Rows of a batch that has strings which are not UTF-8; `first` is the number of its first."""
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as error:
                message = f"row {first + i} is not valid UTF-8 at byte {error.start} of a field"
                if self._corpus.on_bad == "replace":
                    self._report.replaced += 1
                    self._example(message)
                    yield {name: _replaced(batch[name][i]) for name in batch.schema.names}
                else:
                    self._bad("invalid_utf8", message)

    def _fill(self, records: Iterable[dict[str, Any]]) -> Iterator[str]:
        names = [name for _, name in self._template if name is not None]
        filled = "".join(
            literal.replace("%", "%%") + ("" if name is None else "%s") for literal, name in self._template
        )
        for record in records:
            values = [record.get(name) for name in names]
            for place, value in enumerate(values):
                if type(value) is not str:
                    if value is None:
                        self._report.dropped["missing_field"] += 1
                        break
                    if (text := _plain(value)) is None:
                        kind = type(value).__name__
                        self._bad("bad_record", f"field {names[place]!r} is {kind}, not a string or a list of strings")
                        break
                    values[place] = text
            else:
                yield filled % tuple(values)


class _Marked:
    """A file with a mark in place of each invalid byte, so that a parser does not stop there."""

    def __init__(self, file: _Data) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._done = 0  # bytes before the next
        self.places: deque[int] = deque()
        """The byte at which each mark stands."""

    def read1(self, size: int) -> bytes:
        text = ""
        while not text and (data := self._file.read1(size)):
            text = self._decoder.decode(data)
        text = text or self._decoder.decode(b"", final=True)
        try:
            valid = text.encode()
            self._done += len(valid)
        except UnicodeEncodeError:
            valid = re.sub("[\udc80-\udcff]+|[^\udc80-\udcff]+", self._mark, text).encode()
        return valid

    def _mark(self, match: re.Match[str]) -> str:
        data = match[0].encode(errors="surrogateescape")
        start, self._done = self._done, self._done + len(data)
        if not "\udc80" <= match[0][0] <= "\udcff":
            return match[0]
        count = len(data.decode(errors="replace"))
        self.places.extend([start] * count)
        return _MARK * count


class _After:
    """A file that goes on after a part of it that was read."""

    def __init__(self, head: bytes, file: _Marked) -> None:
        self._head, self._file = head, file

    def read(self, size: int = -1) -> bytes:
        if not size:  # asked by ijson to see whether it is bytes
            return b""
        head, self._head = self._head, b""
        return head or self._file.read1(size)


def _lines(file: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Lines with the byte at which each one begins; without the byte order mark that a file may begin with."""
    for line in file:
        yield start, line.removeprefix(_BOM) if not start else line
        start += len(line)


def _blocks(size: int) -> Iterator[int]:
    while size > 0:
        yield min(size, _BLOCK)
        size -= _BLOCK


class _UntilDamage(io.RawIOBase):
    """Gives all that comes before the place at which a file is damaged, and only then complains."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error:
            raise self._error
        view, done = memoryview(buffer), 0
        try:
            while done < len(view) and (count := self._stream.readinto(view[done : done + _STEP])):
                done += count
        except _DAMAGE as error:
            if not done:
                raise
            self._error = error
        return done


def _unpack(file: IO[bytes], compression: str) -> io.BufferedReader:
    """All the frames of a file, which complains if it is truncated."""
    stream: Any = file
    match compression:
        case ".gz" | ".zst":
            stream = pa.CompressedInputStream(file, "gzip" if compression == ".gz" else "zstd")
        case ".bz2":
            stream = bz2.BZ2File(file)
        case ".xz":
            stream = lzma.LZMAFile(file)  # noqa: SIM115
    return io.BufferedReader(_UntilDamage(stream), _BLOCK)


def _split(file: _Data, separator: bytes) -> Iterator[bytes]:
    """What lies between the separators; nothing after one that ends the file."""
    rest = b""
    while block := file.read1(max(_BLOCK, len(rest))):  # more each time, so that a long one is not joined too often
        *pieces, rest = (rest + block).split(separator)
        yield from pieces
    if rest:
        yield rest


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The template as pairs of literal text and the name of the field after it, if any.

    Raises UserError if it is not one.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"corpus.template: {error}; a brace itself is written {{{{ or }}}}") from None
    if any(spec or conversion for _, _, spec, conversion in parts) or not any(name for _, name, _, _ in parts):
        raise UserError(
            f"corpus.template = {template!r}: expected names of fields in braces, as in '{{title}}: {{text}}'"
        )
    return [(literal, name) for literal, name, _, _ in parts]


def _plain(value: Any) -> str | None:
    """A list of strings, or a number, as text."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return str(value) if isinstance(value, int | float) else None


def _replaced(value: pa.Scalar) -> Any:
    """A value of Parquet, with U+FFFD in place of what is not UTF-8 in its strings."""
    if value.is_valid and isinstance(value, pa.StringScalar | pa.LargeStringScalar):
        return value.as_buffer().to_pybytes().decode(errors="replace")
    if value.is_valid and isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return [_replaced(item) for item in value]
    return value.as_py()
