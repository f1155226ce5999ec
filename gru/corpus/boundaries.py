"""The boundaries between documents: where the documents of a span begin and end in the file."""

from typing import IO

from gru.corpus.sources import Span

_CHUNK = 1 << 16  # bytes that are searched at a time


def document_bounds(file: IO[bytes], span: Span, separator: bytes = b"\n") -> tuple[int, int]:
    """Return the bytes [start, end) of the documents of a span.

    Each end of the span moves behind the first separator that ends after it; the ends of the file stay. In CSV a
    separator inside quotes does not count; a Parquet span has the row groups that start in it, so its ends stay too.
    """
    if span.file.kind == "parquet":
        return span.start, span.end
    quoted = span.quoted if span.file.kind == "csv" else (None, None)
    start, end = (
        position if position in (0, span.file.size) else _next_boundary(file, position, separator, inside)
        for position, inside in zip((span.start, span.end), quoted, strict=True)
    )
    return start, end


def _next_boundary(file: IO[bytes], position: int, separator: bytes, quoted: bool | None) -> int:
    """Return the end of the first separator that ends after `position`; the end of the file if there is none.

    quoted: whether `position` is inside quotes; None for formats without quotes.
    """
    limit = position
    position = _scan_start(file, max(0, position - len(separator) + 1), separator)
    file.seek(position)
    data = b""
    while chunk := file.read(_CHUNK):
        data += chunk
        done = 0
        while (index := data.find(separator, done)) >= 0:
            if quoted is not None:
                quoted ^= data.count(b'"', done, index) % 2 == 1
            done = index + len(separator)
            if not quoted and position + done > limit:
                return position + done
        keep = max(done, len(data) - len(separator) + 1)
        if quoted is not None:
            quoted ^= data.count(b'"', done, keep) % 2 == 1
        position, data = position + keep, data[keep:]
    return position + len(data)


def _scan_start(file: IO[bytes], position: int, separator: bytes) -> int:
    """Return `position`, or an earlier byte that lies inside no separator.

    From there, separators that overlap (such as empty lines) are recognized as from the beginning of the file.
    """
    reach = len(separator) - 1
    while position and reach:
        start = max(0, position - reach)
        file.seek(start)
        index = file.read(position - start + reach).find(separator)
        if index < 0:
            break
        position = start + index
    return position
