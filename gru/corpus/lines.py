"""The lines of a file with their positions; a line ends at a line feed only."""

import io
from collections.abc import Iterator
from typing import IO

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Data = io.BytesIO | io.BufferedReader


def read_lines(file: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte at which it begins, line) for each line, without the byte order mark that a file may begin with."""
    for line in file:
        yield start, line.removeprefix(BYTE_ORDER_MARK) if not start else line
        start += len(line)
