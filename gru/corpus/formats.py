"""The readers of the formats: text, JSON Lines, CSV and Parquet (JSON arrays are in `json_array`).

A reader gets the bytes of a span and yields its texts or records; what it cannot read goes to the `ProblemLog`.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from gru.corpus.json_array import BYTE_ORDER_MARK
from gru.corpus.report import ProblemLog
from gru.corpus.unpacking import BLOCK

Data = io.BytesIO | io.BufferedReader

csv.field_size_limit(sys.maxsize)


def read_text(file: Data, start: int, separator: bytes, problems: ProblemLog) -> Iterator[str]:
    """Yield what lies between the separators; without a separator the whole file, or pieces of it cut at line ends.

    start: the byte of the (unpacked) file at which the data starts.
    """
    decode: Callable[[bytes, int], str | None] = problems.decode
    if separator:
        pieces = _split(file, separator)
    else:
        pieces = _chunks(file, problems)
        if not problems.span.whole or problems.span.file.compression:
            decode = partial(_decode_lines, problems=problems)
    for data in pieces:
        if (text := decode(data, start)) is not None:
            yield text
        start += len(data) + len(separator)


def _split(file: Data, separator: bytes) -> Iterator[bytes]:
    """Yield what lies between the separators; nothing after a separator that ends the file."""
    rest = b""
    while block := file.read1(max(BLOCK, len(rest))):  # growing reads, so that a long document is not joined too often
        *pieces, rest = (rest + block).split(separator)
        yield from pieces
    if rest:
        yield rest


def _chunks(file: Data, problems: ProblemLog) -> Iterator[bytes]:
    """Yield the file whole, or if it is compressed in pieces, which need not all fit in memory."""
    first = True
    size = problems.corpus.partition_bytes if problems.span.file.compression else -1
    while (data := file.read(size) + file.readline()) or (first and problems.span.whole):
        yield data
        first = False


def _decode_lines(data: bytes, start: int, problems: ProblemLog) -> str | None:
    """Return the text of a piece that was cut only for its size, where an invalid line is left out alone."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        lines = [problems.decode(line, position) for position, line in _lines(io.BytesIO(data), start)]
        return "".join(filter(None, lines)) or None


def read_json_lines(file: Data, start: int, problems: ProblemLog) -> Iterator[Any]:
    """Yield the object in each line; what is not a JSON object is left out and counted."""
    for position, line in _lines(file, start):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            if line.isspace() or (text := problems.decode(line, position)) is None:
                continue
            try:
                record = orjson.loads(text)
            except orjson.JSONDecodeError:
                problems.drop("bad_record", f"the line at byte {position} is not valid JSON: {error.msg}")
                continue
        if isinstance(record, dict):
            yield record
        else:
            problems.drop("bad_record", f"the line at byte {position} is not a JSON object")


def read_csv(data: Data, start: int, file: IO[bytes] | None, problems: ProblemLog) -> Iterator[Any]:
    """Yield each record after the header as a dictionary; a record of another length is left out and counted.

    file: the file that `data` is a span of, for its header; None if `data` is the whole file.
    """
    header: list[str] | None = None
    if start and file is not None:
        file.seek(0)
        header = next((row for _, row in _csv_rows(file, 0, problems)), [])
    for position, row in _csv_rows(data, start, problems):
        if header is None:
            header = row
        elif len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        else:
            problems.drop("bad_record", f"the record at byte {position} has {len(row)} fields, not {len(header)}")


def _csv_rows(file: IO[bytes], start: int, problems: ProblemLog) -> Iterator[tuple[int, list[str]]]:
    """Yield (byte, fields) of each record, as in RFC 4180: fields with quotes, separators or line ends are quoted."""
    delimiter = "\t" if ".tsv" in problems.span.file.path.lower() else ","
    lines: list[bytes] = []
    begin, quotes = start, 0
    for position, line in _lines(file, start):
        begin = begin if lines else position
        lines.append(line)
        quotes += line.count(b'"')
        if quotes % 2:
            continue
        record, lines = b"".join(lines), []
        if record.strip(b"\r\n") and (text := problems.decode(record, begin)) is not None:
            try:
                yield begin, next(csv.reader([text], delimiter=delimiter, strict=True))
            except csv.Error as error:
                problems.drop("bad_record", f"the record at byte {begin} is not valid CSV: {error}")
    if lines:
        problems.drop("bad_record", f"the record at byte {begin} has a quote that is never closed")


def read_parquet(file: IO[bytes], names: set[str | None], problems: ProblemLog) -> Iterator[Any]:
    """Yield the rows of the row groups that start in the span, with the columns of these names."""
    table = pq.ParquetFile(file)
    columns = [name for name in table.schema_arrow.names if name in names]
    span = problems.span
    group_row = 0  # number of the row group's first row
    for group in range(table.num_row_groups):
        first = table.metadata.row_group(group).column(0)
        position = min(filter(None, (first.dictionary_page_offset, first.data_page_offset)))
        if span.whole or span.start <= position < span.end:
            row = group_row
            for batch in table.iter_batches(1024, row_groups=[group], columns=columns, use_threads=False):
                try:
                    yield from batch.to_pylist() if columns else ({} for _ in range(batch.num_rows))
                except UnicodeDecodeError:
                    yield from _checked_rows(batch, row, problems)
                row += batch.num_rows
        group_row += table.metadata.row_group(group).num_rows


def _checked_rows(batch: pa.RecordBatch, first_row: int, problems: ProblemLog) -> Iterator[Any]:
    """Yield the rows of a batch some of whose strings are not UTF-8; `first_row` is the number of its first row."""
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            message = f"row {first_row + index} is not valid UTF-8 at byte {error.start} of a field"
            if problems.replaces("invalid_utf8", message):
                yield {name: _replace_invalid(batch[name][index]) for name in batch.schema.names}


def _replace_invalid(value: pa.Scalar) -> Any:
    """Return a Parquet value as a Python object, with U+FFFD in place of what is not UTF-8 in its strings."""
    if value.is_valid and isinstance(value, pa.StringScalar | pa.LargeStringScalar):
        return value.as_buffer().to_pybytes().decode(errors="replace")
    if value.is_valid and isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return [_replace_invalid(item) for item in value]
    return value.as_py()


def _lines(file: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte at which it begins, line) for each line, without the byte order mark that a file may begin with."""
    for line in file:
        yield start, line.removeprefix(BYTE_ORDER_MARK) if not start else line
        start += len(line)
