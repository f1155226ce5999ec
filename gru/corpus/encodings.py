"""Character encodings: what a file is encoded in, and its text as UTF-8.

All readers of text read UTF-8. This module does not know what the text contains.
"""

import codecs
import io
import re
from typing import Any

from gru.config_corpus import SourceOptions
from gru.corpus.unpacking import BLOCK, Damage, error_reason
from gru.errors import UserError

HEAD_BYTES = 1 << 10  # bytes at the beginning of a file that tell its encoding

INVALID = b"\xff"  # stands in the UTF-8 for each sequence of bytes that is invalid in the file's encoding

UTF8 = "utf-8"
_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: UTF8,
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_ERRORS = "gru-invalid"  # the name of our error handler among Python's


def check_encoding(options: SourceOptions) -> None:
    """Raise UserError if the encoding of a source is not one that text can be read in."""
    try:
        b"a".decode(options.encoding, "ignore")  # refuses encodings that are not of text, such as hex
        _decoder(options.encoding).decode(b"a")
    except (LookupError, UnicodeError, TypeError, ValueError):
        raise UserError(
            f"{options.key_of('encoding')} = {options.encoding!r}: is not an encoding of text that Python knows, such "
            "as utf-8, utf-16, latin-1, cp1252, gb18030, shift_jis or koi8-r"
        ) from None


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    """Return a decoder that puts U+DCFF in place of what is invalid. Raises LookupError."""
    codecs.register_error(_ERRORS, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]
    return codecs.getincrementaldecoder(encoding)(_ERRORS)


def detect_encoding(head: bytes, encoding: str) -> tuple[str, int]:
    """Return the encoding of a file that begins with `head`, and the length of its byte order mark.

    encoding: that of files without a mark; UTF-8 in all its spellings is returned as "utf-8".
    """
    for mark, marked in _MARKS.items():
        if head.startswith(mark):
            return marked, len(mark)
    name = codecs.lookup(encoding).name
    return (UTF8 if name in (UTF8, "utf-8-sig") else encoding), 0


def unmarked_encoding(head: bytes) -> str | None:
    """Return the encoding, UTF-16 or UTF-32, that NULs betray in a file without a byte order mark; None for others."""
    if len(head) < 4 or b"\0" not in head:
        return None
    if len(head) >= 8 and not any(head[2::4].strip(b"\0") + head[3::4].strip(b"\0")):
        return "utf-32-le"
    if len(head) >= 8 and not any(head[0::4].strip(b"\0") + head[1::4].strip(b"\0")):
        return "utf-32-be"
    even, odd = (part.count(0) / len(part) for part in (head[::2], head[1::2]))
    if max(even, odd) > 0.5 and min(even, odd) < 0.05:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def is_transcoded(head: bytes, encoding: str) -> bool:
    """Whether a file that begins with `head` is read as a whole, since it is not in UTF-8.

    encoding: of the source. What looks like UTF-16 without a byte order mark is counted once, and not in each span.
    """
    return detect_encoding(head, encoding)[0] != UTF8 or unmarked_encoding(head) is not None


class TranscodedFile(io.RawIOBase):
    """The text of a file as UTF-8, with `INVALID` in place of what is invalid in its encoding.

    file: a file in the encoding, behind its byte order mark.
    """

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file = file
        self._encoding = encoding
        self._decoder = _decoder(encoding)
        self._text = memoryview(b"")
        self._position = 0
        self._damage: Damage | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._text:
            self._text = memoryview(self._transcode())
        data = self._text[: len(buffer)]
        buffer[: len(data)] = data
        self._text = self._text[len(data) :]
        return len(data)

    def _transcode(self) -> bytes:
        """Return the next part of the text as UTF-8; nothing at its end."""
        text, data = "", b"-"
        while not text and data:
            data = self._file.read1(BLOCK)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeError as error:  # UTF-16 and UTF-32 of either order need a mark
                little, big = f"{self._encoding}-le", f"{self._encoding}-be"
                raise Damage(f"{error_reason(error)}; set `encoding` to {little} or {big}", self._position) from None
            self._position += len(data)
        try:
            return text.encode()
        except UnicodeEncodeError:
            return re.sub("[\ud800-\udfff]", "\udcff", text).encode(errors="surrogateescape")
