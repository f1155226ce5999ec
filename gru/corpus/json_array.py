"""A JSON array of records, parsed one record at a time, also where its text is not valid UTF-8."""

import codecs
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import ijson

from gru.corpus.report import ProblemLog
from gru.corpus.unpacking import BLOCK

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_MARK = "\ufdd0\ufdef\ufdd0"  # noncharacters, which text does not contain


def read_json_array(file: io.BytesIO | io.BufferedReader, problems: ProblemLog) -> Iterator[Any]:
    """Yield each record of the array; what is not a JSON object is left out and counted."""
    valid = _MarkedFile(file)
    head = valid.read1(BLOCK).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not head.startswith(b"["):
        problems.drop("unreadable", "is not a JSON array of records")
        return
    for number, record in enumerate(ijson.items(_Concatenated(head, valid), "item", use_float=True), 1):
        # Search a record only if the bytes read so far, which end shortly after this record, contain marks.
        if valid.positions and (marks := (text := json.dumps(record, ensure_ascii=False)).count(_MARK)):
            positions = [valid.positions.popleft() for _ in range(marks)]
            if not problems.replaces_invalid_utf8(positions[0]):
                continue
            record = json.loads(text.replace(_MARK, "\ufffd"))
        if isinstance(record, dict):
            yield record
        else:
            problems.drop("bad_record", f"item {number} of the array is not a JSON object")


class _MarkedFile:
    """A file with a mark in place of each invalid byte, so that a parser does not stop there."""

    def __init__(self, file: io.BytesIO | io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._position = 0  # number of bytes decoded
        self.positions: deque[int] = deque()
        """The byte at which each mark stands."""

    def read1(self, size: int) -> bytes:
        text = ""
        while not text and (data := self._file.read1(size)):
            text = self._decoder.decode(data)
        text = text or self._decoder.decode(b"", final=True)
        try:
            valid = text.encode()
            self._position += len(valid)
        except UnicodeEncodeError:
            valid = re.sub("[\udc80-\udcff]+|[^\udc80-\udcff]+", self._mark, text).encode()
        return valid

    def _mark(self, match: re.Match[str]) -> str:
        data = match[0].encode(errors="surrogateescape")
        start, self._position = self._position, self._position + len(data)
        if not "\udc80" <= match[0][0] <= "\udcff":
            return match[0]
        count = len(data.decode(errors="replace"))
        self.positions.extend([start] * count)
        return _MARK * count


class _Concatenated:
    """A file of bytes that were read already, followed by the rest of the file."""

    def __init__(self, head: bytes, file: _MarkedFile) -> None:
        self._head, self._file = head, file

    def read(self, size: int = -1) -> bytes:
        if not size:  # ijson reads 0 bytes to see whether the file is binary
            return b""
        head, self._head = self._head, b""
        return head or self._file.read1(size)
