"""The documents of a text file: the whole file, pieces of it, or what lies between two separators."""

import io
from collections.abc import Callable, Iterator
from functools import partial

from gru.corpus.lines import Data, read_lines
from gru.corpus.report import ProblemLog
from gru.corpus.text_cuts import LONGEST_LINE, Separator, cut_length
from gru.corpus.unpacking import BLOCK, Damage

_MARK = "\ufeff"  # a byte order mark as text


def read_text(file: Data, start: int, streamed: bool, problems: ProblemLog) -> Iterator[str]:
    """Yield what lies between the separators; without a separator the whole text, or pieces of it cut at line ends.

    start: the byte of the (unpacked) file at which the data starts.
    streamed: whether the data is read bit by bit, and need not fit in memory.
    """
    if separator := problems.options.separator:
        for data, length in Separator(separator).split(file):
            if (text := problems.decode(data, start)) is not None:
                yield text.removeprefix(_MARK)
            start += len(data) + length
        return
    decode: Callable[[bytes, int], str | None] = problems.decode
    span, piece = problems.span, problems.corpus.partition_bytes
    if not span.whole or span.file.compression or span.file.size > piece:  # else it is one document
        decode = partial(_decode_lines, problems=problems)
    for data in _pieces(file, piece) if streamed else _whole(file, problems):
        if (text := decode(data, start)) is not None:
            yield text if start else text.removeprefix(_MARK)
        start += len(data)


def _whole(file: Data, problems: ProblemLog) -> Iterator[bytes]:
    data = file.read()
    if data or problems.span.whole:
        yield data


def _pieces(file: Data, size: int) -> Iterator[bytes]:
    """Yield pieces of at least `size` bytes, cut where text may be cut; up to the place where the file is damaged."""
    rest, damage, ended, first = b"", None, False, True
    while not ended:
        parts, missing = [rest], size + LONGEST_LINE - len(rest)
        try:
            while missing > 0 and not ended:
                block = file.read1(min(missing, BLOCK))
                parts.append(block)
                missing -= len(block)
                ended = not block
        except Damage as error:
            damage, ended = error, True
        data, start = b"".join(parts), 0
        parts.clear()
        while len(data) - start > size and (ended or not start):
            cut = start + size + cut_length(data[start + size : start + size + LONGEST_LINE])
            yield data[start:cut]
            start, first = cut, False
        rest = data[start:]
    if rest or (first and not damage):
        yield rest
    if damage:
        raise damage


def _decode_lines(data: bytes, start: int, problems: ProblemLog) -> str | None:
    """Return the text of a piece that was cut only for its size, where an invalid line is left out alone."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        lines = [problems.decode(line, position) for position, line in read_lines(io.BytesIO(data), start)]
        return "".join(filter(None, lines)) or None
