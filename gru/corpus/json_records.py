"""The records of JSON: those of JSON Lines, and the elements of an array, with one notion of what a record is.

A record is an object, or a string that is the text of a document. What is damaged costs one record.
"""

import io
from collections.abc import Iterator
from typing import Any

import orjson

from gru.corpus.json_elements import ElementReader
from gru.corpus.json_values import Flawed, parse, parse_leniently
from gru.corpus.lines import BYTE_ORDER_MARK, Data, read_lines
from gru.corpus.report import ProblemLog
from gru.corpus.unpacking import BLOCK

_LINE = "the line at byte %d"
_ITEM = "item %d of the array, at byte %d,"
_OBJECT = "what begins at byte %d"
_SHOWN = 20  # bytes of a file in a message


def read_json_lines(file: Data, start: int, problems: ProblemLog) -> Iterator[Any]:
    """Yield the value of each line; one that has none is left out and counted.

    start: the byte of the (unpacked) file at which the data starts.
    """
    loads = orjson.loads
    for position, line in read_lines(file, start):
        try:
            record = loads(line)
        except orjson.JSONDecodeError:
            if line.isspace():
                continue
            record = parse_leniently(line)
        problems.place = (_LINE, (position,), len(line))
        if type(record) is Flawed and (record := _mended(record, position, problems)) is None:
            continue
        yield record


def read_json(file: Data, problems: ProblemLog) -> Iterator[Any]:
    """Yield the value of each element of an array, of each line of JSON Lines, or of the only object of a file.

    What has no value is left out and counted.
    """
    head = _head(file).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not head.startswith(b"[") and _has_lines(head):
        yield from read_json_lines(file, 0, problems)
        return
    if not head.startswith((b"[", b"{", b'"')):
        message = "is empty"
        if head:
            begins = f"begins with {head[:_SHOWN].decode(errors='replace')!r}"
            message = f"{begins}, not with JSON: an array of objects or strings, JSON Lines, or an object"
        problems.drop("unreadable", message, 0 if problems.span.file.compression else problems.span.file.size)
        return
    for number, position, size, record in ElementReader(file):
        problems.place = (_ITEM, (number, position), size) if number else (_OBJECT, (position,), size)
        if type(record) is Flawed and (record := _mended(record, position, problems)) is None:
            continue
        yield record


def _head(file: Data) -> bytes:
    """Return the beginning of a file, which is not moved."""
    return file.getvalue()[:BLOCK] if isinstance(file, io.BytesIO) else file.peek(BLOCK)


def _has_lines(head: bytes) -> bool:
    """Whether one of the first two lines, of which one may be damaged, is an object."""
    lines = [line for line in head.split(b"\n", 2)[:-1] if line.startswith(b"{")]
    values = [value.value if isinstance(value := parse(line), Flawed) else value for line in lines]
    return any(isinstance(value, dict) and value for value in values)


def _mended(record: Flawed, position: int, problems: ProblemLog) -> Any:
    """Return the value of the record at `problems.place`, which begins at byte `position`; None if it is left out."""
    pattern, numbers, size = problems.place
    if record.error:
        problems.drop_record(record.reason, record.error)
        return None
    if record.invalid_byte is not None:
        replaces = problems.replaces_invalid_utf8(position + record.invalid_byte, size)
    else:
        what = (
            f"has half of a surrogate pair, {record.surrogate}, which is not a character: "
            'corpus.on_bad = "replace" puts U+FFFD in its place'
        )
        replaces = problems.replaces("bad_record", f"{pattern % numbers} {what}", size)
    return record.value if replaces else None
