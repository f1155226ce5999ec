"""The grammar of CSV: the delimiter of a file's fields, and where a field in double quotes begins and ends.

A quote opens a field only at the field's beginning; elsewhere it is an ordinary character. The first quote after it
that is not doubled closes the field; what follows up to the next delimiter belongs to the field, as in Python's `csv`.
An opening quote is never closed, and costs its line, if there is no such quote, or if that one stands on a later line
and is followed by something else than a delimiter, a line end or the end of the file, so that it rather opens a field.
That depends on the bytes after the opening quote only, not on how the file is cut. This module reads no file.
"""

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from gru.corpus.listing import SourceFile

csv.field_size_limit(sys.maxsize)

REACH = 1 << 28  # bytes after which a field that spans lines counts as never closed, which bounds the memory

_LONG = 1 << 20  # characters of a record that is long

_INSIDE = rb'[^"]*+(?:""[^"]*+)*+'  # what stands between the quotes of a field


@dataclass(frozen=True)
class Dialect:
    """How the records of a CSV file are written. Lines end at a line feed only; carriage returns before it are cut."""

    delimiter: str
    quoting: bool
    reach: int

    def fields(self, text: str) -> list[str]:
        """Return the fields of a record without its line end, whose quotes are all closed."""
        if not self.quoting or '"' not in text:
            return text.split(self.delimiter)
        # Python's `csv` is fast, but ends a record at a carriage return, and needs 5 bytes for each one of a field.
        if len(text) <= _LONG and "\r" not in text:
            self._reader[0].append(text)
            return next(self._reader[1])
        found = self._field.findall(text)
        return [quoted.replace('""', '"') + rest if quoted else rest for quoted, rest in found]

    def record_end(self, data: bytes, start: int, final: bool) -> tuple[int | None, bool]:
        """Return the end of the record that begins at `start`, and whether its quotes are closed.

        final: whether the file ends with `data`; if not, the end is None where it depends on what follows.
        """
        record = self._record.match(data, start)
        if record and record.end() - start <= self.reach:
            return record.end(), True
        line_end: int | None = None
        while True:
            if line_end is None or 0 < line_end <= start:  # a line of many fields is searched once
                line_end = data.find(b"\n", start) + 1
            opening = self.find_opening(data, start, line_end or len(data))
            if opening is None:
                return line_end or (len(data) if final else None), True
            closing = self.find_closing(data, opening + 1)
            if not final and (closing is None or closing + 1 == len(data)):
                line_end = data.find(b"\n", opening) + 1
                return (line_end, False) if line_end and len(data) - 1 - opening > self.reach else (None, True)
            if closing is None or not self.is_closed(data, opening, closing):
                return data.find(b"\n", opening) + 1 or len(data), False
            start = closing + 1

    def find_opening(self, data: bytes, start: int, end: int) -> int | None:
        """Return the first quote in [start, end) that opens a field; `start` is not inside quotes."""
        match = self._opening.search(data, start, end)
        return match and match.start()

    def find_closing(self, data: bytes, start: int) -> int | None:
        """Return the first quote from `start`, inside quotes, that is not doubled."""
        match = _INSIDE_PATTERN.match(data, start)
        end = match.end() if match else start
        return end if end < len(data) else None

    def is_closed(self, data: bytes, opening: int, closing: int) -> bool:
        """Whether the first quote that is not doubled closes the field that begins with the quote `opening`."""
        if data.find(b"\n", opening, closing) < 0:
            return True
        return self.is_field_end(data, closing + 1) and closing - opening <= self.reach

    def is_field_end(self, data: bytes, position: int) -> bool:
        """Whether a delimiter, a line end or the end of the file is at `position`."""
        return position == len(data) or data[position] in self._ends

    def skip_fields(self, data: bytes, opening: int) -> int:
        """Return `opening`, or a later byte, up to which all quoted fields from there on end as they should."""
        match = self._quoted_fields.match(data, opening) if len(data) <= self.reach else None
        return match.end() if match else opening

    @cached_property
    def _reader(self) -> tuple[deque[str], Iterator[list[str]]]:
        """A queue, and Python's reader of the records in it, since making a reader takes longer than using it."""
        queue: deque[str] = deque()
        return queue, csv.reader(iter(queue.popleft, None), delimiter=self.delimiter)

    @cached_property
    def _ends(self) -> bytes:
        """The bytes after a closing quote; the first byte of the delimiter is enough to tell."""
        return self.delimiter.encode()[:1] + b"\r\n"

    @cached_property
    def _opening(self) -> re.Pattern[bytes]:
        return re.compile(self._opening_pattern)

    @cached_property
    def _quoted_fields(self) -> re.Pattern[bytes]:
        field = self._opening_pattern + self._rest_pattern + rb'[^"]*+'
        return re.compile(rb"%b(?:%b)*+" % (field, field))

    @cached_property
    def _record(self) -> re.Pattern[bytes]:
        """A record up to its line feed, whose quoted fields all end as they should."""
        delimiter = re.escape(self.delimiter.encode())
        plain = rb"[^\n%b]*+" % delimiter if len(self.delimiter.encode()) == 1 else rb"(?:(?!%b)[^\n])*+" % delimiter
        field = rb'(?:"%b|(?!"))%b' % (self._rest_pattern, plain)
        return re.compile(rb"%b(?:%b%b)*+\n" % (field, delimiter, field))

    @cached_property
    def _field(self) -> re.Pattern[str]:
        delimiter = re.escape(self.delimiter)
        return re.compile(rf'(?:\A|{delimiter})(?:"({_INSIDE.decode()})")?+([^{delimiter}]*+)')

    @property
    def _opening_pattern(self) -> bytes:
        """A quote at the beginning of a field; written so that a search for it first searches for a quote."""
        return rb'"(?:(?<=%b")|(?<=\n")|(?<![\s\S]"))' % re.escape(self.delimiter.encode())

    @property
    def _rest_pattern(self) -> bytes:
        """What follows an opening quote, up to a closing one and the end of the field."""
        return rb'%b"(?=[%b]|\Z)' % (_INSIDE, re.escape(self._ends))


_INSIDE_PATTERN = re.compile(_INSIDE)


def dialect_of(file: SourceFile) -> Dialect:
    """Return the dialect of a file: that of its source's options, else the one of its name."""
    name = PurePosixPath(file.name.lower()).name
    if file.path.startswith(("http://", "https://")):
        name = name.partition("?")[0]
    tabs = ".tsv" in PurePosixPath(name).suffixes
    options = file.options
    return Dialect(
        delimiter=options.delimiter or ("\t" if tabs else ","),
        quoting=not tabs if options.quoting is None else options.quoting,
        reach=REACH,
    )
