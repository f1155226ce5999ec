"""Where the records of a CSV file begin that is cut anywhere, also within quotes.

Each span tells how it is read if it begins outside quotes, and where it closes them if it begins inside; which of both
is true follows from the spans before it, and for a quote that is never closed from those after it. So the spans can be
read in parallel, each once. This module does not know what becomes of the records.
"""

from dataclasses import dataclass
from typing import IO

from gru.corpus.csv_dialect import Dialect, dialect_of
from gru.corpus.lines import BYTE_ORDER_MARK
from gru.corpus.listing import SourceFile

_CHUNK = 1 << 16  # bytes that are searched at a time


@dataclass(frozen=True)
class Reading:
    """What is found from a place outside quotes to the end of a span. Positions are bytes of the file."""

    first_record: int | None = None  # where the first record begins after that place
    opening: int | None = None  # the quote that is still open at the end
    next_line: int | None = None  # where the first line after that quote begins


@dataclass(frozen=True)
class SpanQuotes:
    """The two ways to read a span: as beginning outside quotes, and as beginning inside."""

    outside: Reading
    closing: int | None = None  # inside: the first quote that is not doubled
    ends_field: bool = False  # whether a delimiter or line end follows it
    next_line: int | None = None  # where the first line after the beginning of the span begins
    after: Reading = Reading()  # after the closing quote


def read_quotes(file: SourceFile, start: int, end: int) -> SpanQuotes:
    """Return what the quotes of bytes [start, end) of a file say."""
    dialect = dialect_of(file)
    with file.open() as stream:
        start, end = (_behind_quotes(stream, position, file.size) for position in (start, end))
        # Whether a field begins at `start` shows in what precedes it: a delimiter, a line end or a byte order mark.
        base = max(0, start - max(len(dialect.delimiter.encode()), len(BYTE_ORDER_MARK)))
        stream.seek(base)
        data = stream.read(end - base)
    start -= base
    if not base and data.startswith(BYTE_ORDER_MARK):
        data, base = data[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
        start = max(0, start - base)
    return _span_quotes(dialect, data, start, base)


def find_records(spans: list[SpanQuotes], size: int, reach: int) -> list[tuple[int, int]]:
    """Return the bytes [start, end) of the records of each span of a file, which the spans cover in order.

    size: bytes of the file; reach: `Dialect.reach`.
    """
    first: list[int | None] = []  # where the first record begins after the beginning of each span
    reading, since = Reading(), 0  # how the last span with a place outside quotes is read, and its index
    next_line: int | None = None  # where the first line after the open quote begins
    for index, span in enumerate(spans):
        if reading.opening is None:
            reading, since = span.outside, index
        elif span.closing is None:
            first.append(None)
            next_line = next_line or span.next_line
            continue
        else:
            line_ends = next_line or (span.next_line is not None and span.next_line <= span.closing)
            if not line_ends or (span.ends_field and span.closing - reading.opening <= reach):
                reading, since = span.after, index
            else:
                _read_as_outside(first, spans, reading, since)
                reading, since = span.outside, index
        first.append(reading.first_record)
        next_line = reading.next_line
    if reading.opening is not None:
        _read_as_outside(first, spans, reading, since)
    starts = [size]
    for position in reversed(first[1:]):
        starts.append(starts[-1] if position is None else position)
    starts = [*reversed(starts)]
    return [*zip([0, *starts], starts, strict=False)]


def _read_as_outside(first: list[int | None], spans: list[SpanQuotes], reading: Reading, since: int) -> None:
    """Mend `first` from span `since` on, which is read as `reading`: the quote that it leaves open is never closed.

    All other quotes up to the end of `first` stand in pairs, so that none of them stays open instead.
    """
    first[since] = reading.next_line if first[since] is None else first[since]
    for index in range(since + 1, len(first)):
        first[index] = spans[index].outside.first_record


def _behind_quotes(stream: IO[bytes], position: int, size: int) -> int:
    """Return the first place from `position` on that no quote precedes: what a quote is shows in the next byte."""
    if position in (0, size):
        return position
    stream.seek(position - 1)
    if stream.read(1) != b'"':
        return position
    while chunk := stream.read(_CHUNK):
        if rest := chunk.lstrip(b'"'):
            return position + len(chunk) - len(rest) + 1
        position += len(chunk)
    return size


def _span_quotes(dialect: Dialect, data: bytes, start: int, base: int) -> SpanQuotes:
    """Return the two ways to read `data` from `start` on; it begins at byte `base` of the file."""
    next_line = data.find(b"\n", start) + 1
    next_line_at = base + next_line if next_line else None
    if data.find(b'"', start) < 0:
        return SpanQuotes(Reading(next_line_at), next_line=next_line_at)
    outside = _read_outside(dialect, data, start, base)
    closing = dialect.find_closing(data, start)
    if closing is None:
        return SpanQuotes(outside, next_line=next_line_at)
    after = _read_outside(dialect, data, closing + 1, base)
    return SpanQuotes(outside, base + closing, dialect.is_field_end(data, closing + 1), next_line_at, after)


def _read_outside(dialect: Dialect, data: bytes, start: int, base: int) -> Reading:
    """Return how `data` is read from `start` on, which is outside quotes."""
    first: int | None = None
    line_end = data.find(b"\n", start) + 1
    while True:
        if first is not None:
            line_end = 0
        elif 0 < line_end <= start:  # a line of many fields is searched once
            line_end = data.find(b"\n", start) + 1
        opening = dialect.find_opening(data, start, line_end or len(data))
        if opening is None and not line_end:
            return Reading(first)
        if opening is None:
            first, start = base + line_end, line_end
        elif first is not None and (end := dialect.skip_fields(data, opening)) > opening:
            start = end
        elif (closing := dialect.find_closing(data, opening + 1)) is None:
            next_line = data.find(b"\n", opening) + 1
            return Reading(first, base + opening, base + next_line if next_line else None)
        elif dialect.is_closed(data, opening, closing):
            start = closing + 1
        else:
            start = data.find(b"\n", opening) + 1
            first = first or base + start
