"""The records of CSV and TSV, read in blocks. This module does not know where a file is cut."""

import io
import re
from collections.abc import Generator, Iterator
from functools import partial
from itertools import dropwhile
from typing import IO

from gru.corpus.csv_dialect import Dialect, dialect_of
from gru.corpus.lines import BYTE_ORDER_MARK, Data
from gru.corpus.report import ProblemLog
from gru.errors import UserError

_BLOCK = 1 << 18  # bytes that are read at a time

_CONTROL_CHARACTER = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")  # text in any encoding but UTF-16 and UTF-32 has none
_RECORD = "the record at byte %d"

Record = tuple[int, bytes, bool]  # byte at which it begins; it without its line end; whether its quotes are closed


def read_csv(data: Data, start: int, file: IO[bytes] | None, problems: ProblemLog) -> Iterator[dict[str, str]]:
    """Yield each record as a dictionary; one with another number of fields than the header is left out and counted.

    file: the file that `data` is a span of, for its header; None if `data` is the whole file.
    All of a file is left out if its header cannot be used. Raises UserError if it is in another encoding, which is then
    to be set for all files of the source.
    """
    dialect, options = dialect_of(problems.span.file), problems.options
    block = -1 if isinstance(data, io.BytesIO) else _BLOCK  # what is in memory is not copied
    records = _records(iter(partial(data.read1, block), b""), start, dialect)
    names = [*options.header] if options.header else []
    if not names:
        if start and file is not None:
            file.seek(0)
            header = next(_records(iter(partial(file.read, _BLOCK), b""), 0, dialect), None)
        else:
            header = next(records, None)
        if header is None:
            return
        names, mistake = _header_names(header, dialect, problems)
        if mistake:  # of the whole file, which the span with its first byte counts
            size = data.getbuffer().nbytes if isinstance(data, io.BytesIO) else problems.span.file.size
            problems.drop("unreadable", mistake, size, count=0 if start else 1)
            return
        header_at = header[0]
        records = dropwhile(lambda record: record[0] <= header_at, records)
    for position, record, closed in records:
        problems.place = (_RECORD, (position,), len(record))
        if not closed:
            remedy = f"set {options.key_of('quoting')} = false, if a quote is an ordinary character"
            problems.drop_record("bad_record", f"has a quote that is never closed: {remedy}")
        elif (text := problems.decode(record, position)) is not None:
            fields = dialect.fields(text)
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True))
            else:
                problems.drop_record("bad_record", _describe_length(len(fields), len(names), text, dialect, problems))


def _describe_length(count: int, expected: int, text: str, dialect: Dialect, problems: ProblemLog) -> str:
    """Return what is wrong with a record that has `count` fields, and the option that may mend it."""
    key_of = problems.options.key_of
    if '"' not in text:
        remedy = f"set {key_of('delimiter')}, if {dialect.delimiter!r} is not what separates fields"
    elif dialect.quoting:
        remedy = f"set {key_of('quoting')} = false, if a quote is an ordinary character"
    else:
        remedy = f"set {key_of('quoting')} = true, if fields are enclosed in quotes"
    return f"has {count} field{'s' * (count != 1)}, not {expected}: {remedy}"


def _header_names(header: Record, dialect: Dialect, problems: ProblemLog) -> tuple[list[str], str]:
    """Return the names of the fields, without spaces around them, and why they cannot be used, if so.

    Raises UserError if the header is in another encoding.
    """
    key_of = problems.options.key_of
    _, line, closed = header
    if not closed:
        remedy = f"set {key_of('quoting')} = false, if a quote is an ordinary character"
        return [], f"the header line has a quote that is never closed: {remedy}"
    try:
        text = line.decode()
    except UnicodeDecodeError:
        mistake = f'the header line is not valid UTF-8: set {key_of("encoding")}, as in encoding = "latin-1"'
        if dialect.delimiter.encode() in line and not _CONTROL_CHARACTER.search(line):  # else it is hardly a table
            raise UserError(f"{problems.span.file.path}: {mistake}") from None
        return [], mistake
    if re.search("\r(?!\n)", text):
        return [], "its lines end with carriage returns only: write line feeds instead"
    names = [name.strip() for name in dialect.fields(text)]
    for name in {name for name in names if names.count(name) > 1}:
        if re.search(rf"[{{|]\s*{re.escape(name)}\s*[}}|]", problems.options.template):
            return [], f"the header names the field {name!r} of {key_of('template')} more than once"
    return names, ""


def _records(blocks: Iterator[bytes], position: int, dialect: Dialect) -> Iterator[Record]:
    """Yield the records of a stream of blocks that begins at byte `position` of the file, without empty lines."""
    data, error, final = b"", None, False
    while not final:
        more, error = _read_on(blocks, len(data))
        final = not more and error is None
        data += more
        if not position and data.startswith(BYTE_ORDER_MARK):
            data, position = data[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
        done = yield from _complete_records(data, position, final, dialect)
        data, position = data[done:], position + done
        if error:
            raise error


def _read_on(blocks: Iterator[bytes], size: int) -> tuple[bytes, Exception | None]:
    """Return about `size` bytes or a block; at the end of the file fewer, and before a damaged place its error.

    A record that is longer than what was read so far is searched again, so twice as much is read each time.
    """
    found: list[bytes] = []
    try:
        for block in blocks:
            found.append(block)
            size -= len(block)
            if size <= 0:
                break
    except Exception as error:  # what precedes the damaged place is used first
        return b"".join(found), error
    return b"".join(found), None


def _complete_records(data: bytes, position: int, final: bool, dialect: Dialect) -> Generator[Record, None, int]:
    """Yield each record that ends in `data`, which begins at byte `position`, and return how many bytes they have."""
    start, size = 0, len(data)
    while start < size:
        quote = data.find(b'"', start) if dialect.quoting else -1
        plain = data.rfind(b"\n", start, quote if quote >= 0 else size) + 1
        if quote < 0 and final:
            plain = size
        while start < plain:
            end = data.find(b"\n", start) + 1 or plain
            if record := data[start:end].rstrip(b"\r\n"):
                yield position + start, record, True
            start = end
        if quote < 0:
            break
        record_end, closed = dialect.record_end(data, start, final)
        if record_end is None:
            break
        yield position + start, data[start:record_end].rstrip(b"\r\n"), closed
        start = record_end
    return start
