"""The rows of Parquet, row group by row group; a damaged row group costs only its own rows."""

from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gru.corpus.report import ProblemLog
from gru.corpus.unpacking import error_reason, is_damage

_MOST_COLUMNS = 20  # names of columns in a message
_ROWS = 1024  # rows that are read at a time

# What turning a value into a Python object raises: a date after the year 9999, or of an unknown time zone.
_NO_OBJECT = (ValueError, OverflowError, pa.ArrowException)


def read_parquet(file: IO[bytes], names: set[str], problems: ProblemLog) -> Iterator[dict[str, Any]]:
    """Yield the rows of the row groups that start in the span, with the columns of these names.

    Binary columns and dictionaries are text; what is not UTF-8 in a row is treated as `corpus.on_bad` says.
    """
    span = problems.span
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
    except Exception as error:
        if not is_damage(error):
            raise
        if not span.start:  # the other spans of the file find the same
            problems.drop("unreadable", f"cannot be read as Parquet: {error_reason(error)}", span.file.size)
        return
    columns = [name for name in table.schema_arrow.names if name in names]
    problems.fields = table.schema_arrow.names
    of_path = names & {name for name, _ in span.file.columns}
    first_row = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if rows and span.start <= _position(table, group, span.file.size) < max(span.end, 1):
            if columns or of_path:
                yield from _group_rows(table, group, columns, first_row, problems)
            else:
                _drop_without_columns(table, group, names, problems)
        first_row += rows


class RowGroup(NamedTuple):
    """The place of a row group in a file."""

    start: int  # the byte at which it starts, which decides which span has it
    size: int  # in bytes, unpacked
    rows: int


def row_groups(file: IO[bytes], size: int) -> list[RowGroup]:
    """Return the row groups of a file of `size` bytes; none if it cannot be read, which `read_parquet` reports."""
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException):
        return []
    groups = [(group, table.metadata.row_group(group)) for group in range(table.num_row_groups)]
    return [
        RowGroup(_position(table, group, size), max(data.total_byte_size, _group_bytes(table, group)), data.num_rows)
        for group, data in groups
    ]


def _position(table: pq.ParquetFile, group: int, size: int) -> int:
    """Return the byte of the file at which a row group starts, for a file of `size` bytes."""
    metadata = table.metadata.row_group(group)
    if not metadata.num_columns:
        return 0
    first = metadata.column(0)
    offsets = [offset for offset in (first.dictionary_page_offset, first.data_page_offset) if offset]
    return min(max(min(offsets, default=0), 0), size - 1)


def _group_bytes(table: pq.ParquetFile, group: int) -> int:
    """Return the size of a row group in the file, in bytes."""
    metadata = table.metadata.row_group(group)
    return sum(metadata.column(index).total_compressed_size for index in range(metadata.num_columns))


def _drop_without_columns(table: pq.ParquetFile, group: int, names: set[str], problems: ProblemLog) -> None:
    """Count the rows of a row group of a file that has none of the template's columns."""
    present = table.schema_arrow.names
    shown = ", ".join(map(repr, present[:_MOST_COLUMNS])) + (", ..." if len(present) > _MOST_COLUMNS else "")
    wanted = " or ".join(map(repr, sorted(names)))
    problems.drop(
        "missing_field",
        f"has no column {wanted} of the template; its columns: {shown}",
        _group_bytes(table, group),
        table.metadata.row_group(group).num_rows,
    )


def _group_rows(
    table: pq.ParquetFile, group: int, columns: list[str], first_row: int, problems: ProblemLog
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group up to the place where it is damaged, and count those that are lost.

    first_row: the number of its first row in the file.
    """
    row, rows = 0, table.metadata.row_group(group).num_rows
    batches = table.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False)
    while row < rows:
        try:
            batch = _as_text(next(batches))
        except StopIteration:
            error: Exception = EOFError("it has fewer rows than its metadata says")
        except Exception as caught:
            if not is_damage(caught):
                raise
            error = caught
        else:
            yield from _batch_rows(batch, first_row + row, problems)
            row += batch.num_rows
            continue
        lost = rows - row
        place = f"row group {group} cannot be read from row {first_row + row} on"
        message = f"{place}: {error_reason(error)}; {lost:,} rows are lost"
        problems.drop("unreadable", message, _group_bytes(table, group) * lost // rows, lost)
        return


def _as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch with strings in place of dictionaries and bytes, which need not be valid UTF-8."""
    columns = []
    if not batch.num_columns:
        return batch
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_binary_view(column.type):
            column = column.cast(pa.large_binary())
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = column.view(pa.string() if pa.types.is_binary(column.type) else pa.large_string())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _batch_rows(batch: pa.RecordBatch, first_row: int, problems: ProblemLog) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch; `first_row` is the number of its first row."""
    try:
        rows = batch.to_pylist() if batch.num_columns else [{} for _ in range(batch.num_rows)]
    except _NO_OBJECT:  # of which UnicodeDecodeError is one
        rows = (_checked_row(batch.slice(index, 1), first_row + index, problems) for index in range(batch.num_rows))
    for number, row in enumerate(rows, first_row):
        problems.place = ("row %d", (number,), 0)
        if row is not None:
            yield row


def _checked_row(row: pa.RecordBatch, number: int, problems: ProblemLog) -> dict[str, Any] | None:
    """Return a row that may have values that are no Python objects, such as strings that are not UTF-8."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        message = f"row {number} is not valid UTF-8 at byte {error.start} of a field"
        if problems.replaces("invalid_utf8", message):
            return {
                name: _replace_invalid(column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)
            }
    except _NO_OBJECT as error:
        problems.drop("bad_record", f"row {number} has a value that is not text: {error_reason(error)}")
    return None


def _replace_invalid(value: pa.Scalar) -> Any:
    """Return a Parquet value as a Python object, with U+FFFD in place of what is not UTF-8 in its strings."""
    match value:
        case pa.StringScalar() | pa.LargeStringScalar() | pa.StringViewScalar() if value.is_valid:
            return value.as_buffer().to_pybytes().decode(errors="replace")
        case pa.ListScalar() | pa.LargeListScalar() if value.is_valid:
            return [_replace_invalid(item) for item in value]
        case pa.StructScalar() if value.is_valid:
            return {name: _replace_invalid(value[name]) for name in value}
    try:
        return value.as_py()
    except _NO_OBJECT:
        return None
