"""Where plain text is cut into documents: at separators, or in long text behind lines.

The cuts depend on the bytes of the file only, not on where a reader begins. This module does not know encodings other
than UTF-8.
"""

import re
from collections.abc import Iterator
from typing import IO

from gru.corpus.lines import Data
from gru.corpus.unpacking import BLOCK

LONGEST_LINE = 1 << 12  # bytes; a longer line, or a text without line ends, may be cut within the line

_CHUNK = 1 << 16  # bytes that are searched at a time


def cut_length(data: bytes) -> int:
    """Return the number of bytes before the first place in `data` where text may be cut.

    This is the end of the line, of a long line the end of the word, and of a long word the end of the character.
    data: `LONGEST_LINE` bytes, fewer at the end of the text. The place in the file never decreases with that of `data`,
    so that all who cut near one place agree.
    """
    for end in (b"\n", b" "):
        if (index := data.find(end)) >= 0:
            return index + 1
        if len(data) < LONGEST_LINE:
            return len(data)
    return next((index for index, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)


def next_cut(file: IO[bytes], position: int) -> int:
    """Return the first byte from `position` on where text without a separator may be cut."""
    file.seek(position)
    return position + cut_length(file.read(LONGEST_LINE))


class Separator:
    """The text between two documents; each of its line ends may be LF or CRLF in the file."""

    def __init__(self, text: str) -> None:
        lf = text.replace("\r\n", "\n")
        self._lf = lf.encode()
        self._crlf = re.compile(b"(" + re.escape(self._lf).replace(b"\\\n", b"\r?\n") + b")") if "\n" in lf else None
        self._bytes = self._lf + b"\r"
        self.longest = len(self._lf) + self._lf.count(b"\n")
        """Length of its longest form in bytes."""

    def split(self, file: Data) -> Iterator[tuple[bytes, int]]:
        """Yield (what lies between the separators, length of the one behind it); nothing if the last part is empty."""
        parts: list[bytes] = []
        tail = b""  # may be the beginning of a separator
        while block := file.read1(BLOCK):
            *pieces, rest = self._pieces(tail + block)
            for piece, length in pieces:
                if parts:
                    piece, parts = b"".join([*parts, piece]), []
                yield piece, length
            keep = max(0, len(rest[0]) - self.longest + 1)
            if keep:
                parts.append(rest[0][:keep])
            tail = rest[0][keep:]
        if last := b"".join([*parts, tail]):
            yield last, 0

    def next_end(self, file: IO[bytes], position: int) -> int:
        """Return the end of the first separator that ends after `position`; the end of the file if there is none."""
        limit, position = position, self._scan_start(file, position)
        file.seek(position)
        data = b""
        while chunk := file.read(_CHUNK):
            data += chunk
            find = self._find_any if self._crlf and b"\r\n" in data else self._find_lf
            end = 0
            while (match := find(data, end)) is not None:
                end = match
                if position + end > limit:
                    return position + end
            keep = max(end, len(data) - self.longest + 1)
            position, data = position + keep, data[keep:]
        return position + len(data)

    def _pieces(self, data: bytes) -> list[tuple[bytes, int]]:
        """Return (what lies between the separators, length of the one behind it); the last part has none."""
        if self._crlf is None or b"\r\n" not in data:
            return [(piece, len(self._lf)) for piece in data.split(self._lf)]
        found = [*self._crlf.split(data), b""]
        return [(piece, len(separator)) for piece, separator in zip(found[::2], found[1::2], strict=True)]

    def _find_lf(self, data: bytes, start: int) -> int | None:
        """Return the end of the first separator in `data` from `start` on, if its line ends are LF."""
        index = data.find(self._lf, start)
        return None if index < 0 else index + len(self._lf)

    def _find_any(self, data: bytes, start: int) -> int | None:
        assert self._crlf
        match = self._crlf.search(data, start)
        return match and match.end()

    def _scan_start(self, file: IO[bytes], position: int) -> int:
        """Return a byte up to `position` that lies inside no separator: the one behind a byte that none of them has.

        From there, separators that overlap (such as empty lines) are recognized as from the beginning of the file.
        """
        while position and self.longest > 1:
            start = max(0, position - _CHUNK)
            file.seek(start)
            before = file.read(position - start).rstrip(self._bytes)
            position = start + len(before)
            if before:
                break
        return position
