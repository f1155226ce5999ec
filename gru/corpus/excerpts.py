"""Excerpts of source files: pieces from all over them, read within limits of bytes and time.

A preview reads these instead of the files, with the readers that a preparation uses. This module does not know what
is done with the documents.
"""

import io
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import IO, Any, NamedTuple, cast

from gru.config import CorpusConfig
from gru.corpus.documents import document_hash, documents
from gru.corpus.encodings import HEAD_BYTES, is_transcoded
from gru.corpus.listing import SourceFile
from gru.corpus.parquet_records import row_groups
from gru.corpus.partitions import Span, first_span
from gru.corpus.report import Report
from gru.corpus.unpacking import EXPANSION

PIECE_BYTES = 1 << 18
"""Bytes in a piece of a large file, which is one of more than two pieces."""

_MOST_PIECES = 256  # of the files of one group
_MOST_READ = 1 << 26  # bytes that the reader of a piece may read, such as to find the end of a document
_MOST_READ_IN_ALL = 1 << 28
_MOST_ROWS = 1 << 14  # of a Parquet file in one piece
_STREAM_READ = 1 << 14  # bytes of a compressed file that are read at a time, so that its position tells what was used


class Group(NamedTuple):
    """The files whose text is found in the same way, so that a sample of some tells about the others."""

    kind: str
    compression: str
    undivided: bool  # text without a separator, where a file or `partition_bytes` of it is a document


@dataclass
class Excerpt:
    """The documents of a piece of a file."""

    file: SourceFile
    texts: list[str]
    covered: float = 0.0  # bytes of the file whose content `documents` and `bytes` are
    documents: int = 0
    bytes: int = 0  # of the text as UTF-8
    read_bytes: int = 0  # of all of its text, also of what was read beyond `covered`
    seconds: float = 0.0  # that its reading took


class _LimitReached(BaseException):
    """The limit of a piece. Readers let it pass, since the file is not at fault."""


def group_of(file: SourceFile) -> Group:
    """Return the group of a file."""
    return Group(file.kind, file.compression, file.kind == "text" and not file.options.separator)


class Excerpts:
    """The excerpts of some files in an order such that even the first few are from all over them.

    most_bytes: bytes of text after which there are no more. deadline: time.monotonic() at which reading ends.
    """

    def __init__(self, files: list[SourceFile], corpus: CorpusConfig, most_bytes: int, deadline: float) -> None:
        # Compressed text without a separator is cut when it is read; smaller documents show as much.
        self._corpus = corpus.model_copy(update={"partition_bytes": min(PIECE_BYTES, corpus.partition_bytes)})
        self._files, self._most_bytes, self._deadline = files, most_bytes, deadline
        self._piece: _Piece | None = None
        self._file_bytes = 0  # that were read
        self._begun: set[tuple[SourceFile, int]] = set()
        self.report = Report(on_record=self._count_record)
        self.records = 0
        self.filled: Counter[str] = Counter()
        """Number of records that have something in a field, by its name."""
        self.complete = True
        """Whether the excerpts are all of the files."""

    def __iter__(self) -> Iterator[Excerpt]:
        """Yield the excerpts. Raises UserError as `documents` does."""
        groups: dict[Group, list[SourceFile]] = {}
        for file in self._files:
            groups.setdefault(group_of(file), []).append(file)
        pending = [iter(self._places(files)) for files in groups.values()]
        read = 0
        while pending:
            for places in [*pending]:
                if (place := next(places, None)) is None:
                    pending.remove(places)
                elif (
                    read >= self._most_bytes
                    or self._file_bytes >= _MOST_READ_IN_ALL
                    or time.monotonic() > self._deadline
                ):
                    self.complete = False
                    return
                elif excerpt := self._read(*place):
                    read += excerpt.bytes
                    yield excerpt

    def _places(self, files: list[SourceFile]) -> list[tuple[SourceFile, int, int]]:
        """Return (file, place, limit) of the pieces of a group of files, in the order of a hash.

        These are the files themselves if they are small. Otherwise the places are at equal distances; a file that
        cannot be read from there is read from its beginning. limit: bytes of text after which the piece ends.
        """
        ends = [*accumulate(file.size for file in files)]
        if ends[-1] <= self._most_bytes:
            places = [(file, 0) for file in files]
        else:
            self.complete = False
            count = min(_MOST_PIECES, max(1, round(self._most_bytes / min(PIECE_BYTES, ends[-1] / len(files)))))
            at = [index * ends[-1] // count for index in range(count)]
            indices = [bisect_right(ends, place) for place in at]
            places = [(files[i], place - ends[i] + files[i].size) for i, place in zip(indices, at, strict=True)]
            places = [*dict.fromkeys((file, place if _has_places(file) else 0) for file, place in places)]
        # A Parquet file may have few row groups, so that several places are in one.
        pieces = min(len(places), 8) if files[0].kind == "parquet" else len(places)
        limit = max(PIECE_BYTES, self._most_bytes // pieces)
        places.sort(key=lambda place: document_hash(f"{place[0].path}:{place[1]}".encode()))
        return [(file, place, limit) for file, place in places]

    def _read(self, file: SourceFile, place: int, limit: int) -> Excerpt | None:
        """Return the documents of a piece; None if it has been read already, as a row group with several places."""
        started = time.monotonic()
        whole = file.size <= self._most_bytes and not place
        self._piece = piece = _Piece(file, limit, self._deadline)
        span = piece.span(place, whole)
        if (file, span.start) in self._begun:
            return None
        self._begun.add((file, span.start))
        texts = cast(Generator[str, None, None], documents(span, self._corpus, self.report))
        try:
            for text in texts:
                piece.add(text)
            piece.end(span)
        except _LimitReached:
            self.complete = False
            piece.end(None)
        finally:
            texts.close()
        self._file_bytes += piece.bytes_read
        piece.excerpt.read_bytes = piece.text_bytes
        piece.excerpt.seconds = time.monotonic() - started
        return piece.excerpt

    def _count_record(self, record: Any) -> None:
        """Count the fields of a record that are not empty."""
        self.records += 1
        if isinstance(record, dict):
            for name, value in record.items():
                fields = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {}
                for field, content in (fields or {name: value}).items():
                    self.filled[field] += content not in (None, "", [], {})
        assert self._piece
        self._piece.add_record()


class _Piece:
    """The piece that is being read. What is read after a limit raises _LimitReached."""

    def __init__(self, file: SourceFile, limit: int, deadline: float) -> None:
        self.excerpt = Excerpt(file, [])
        self._meter = _Meter(deadline)
        values = {each.name: getattr(file, each.name) for each in fields(file)}
        self._file = _MeteredSource(**values, meter=self._meter)
        self._is_stream = not file.divisible  # whether it is read from its beginning
        self._limit, self._rows, self._records, self._bytes, self._position = limit, 0, 0, 0, 0

    def span(self, place: int, whole: bool) -> Span:
        """Return the span of the file to read: all of it, what is at the place, or its beginning."""
        file = self._file
        if file.kind == "parquet" and file.divisible:
            self._rows, start = _row_group_at(file, place)
            return Span(file, 0, file.size, None) if whole or start is None else Span(file, start, start + 1, None)
        if whole or self._is_stream:
            return Span(file, 0, file.size, None)
        if not _is_utf8(file):  # its first span has all of it
            self._is_stream = True
            return Span(file, 0, 1, None)
        if file.kind == "csv":  # whether another place is inside quotes is known only from all before it
            return first_span(file, self._limit)
        if file.size <= 2 * PIECE_BYTES:
            return Span(file, 0, file.size, None)
        return Span(file, place, min(place + PIECE_BYTES, file.size), None)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that were read."""
        return self._meter.bytes_read

    @property
    def text_bytes(self) -> int:
        """Bytes of the text that was read, as UTF-8."""
        return self._bytes

    def add(self, text: str) -> None:
        self._check()
        self.excerpt.texts.append(text)
        self._bytes += len(text.encode())

    def add_record(self) -> None:
        self._check()
        self._records += 1

    def _check(self) -> None:
        """Note what has been read where the file's next part is. Raises _LimitReached."""
        file, excerpt = self.excerpt.file, self.excerpt
        if file.kind == "parquet" and file.divisible:
            if self._bytes >= self._limit or self._records >= _MOST_ROWS:
                raise _LimitReached
            return
        if not self._is_stream:
            return
        if (position := self._meter.bytes_read) != self._position:
            # A reader unpacks much at a time: only now all before the position is in the documents.
            excerpt.covered, excerpt.documents, excerpt.bytes = self._position, len(excerpt.texts), self._bytes
            self._position = position
        unpacked = position * (EXPANSION if file.compression else 1)
        if excerpt.covered and max(self._bytes, unpacked) >= self._limit:
            raise _LimitReached

    def end(self, span: Span | None) -> None:
        """Note what has been read in all, at the end of the span, or at a limit before that."""
        excerpt = self.excerpt
        if self._rows and not (span and span.whole):
            excerpt.covered = excerpt.file.size * self._records / self._rows
        elif span:
            excerpt.covered = excerpt.file.size if self._is_stream else span.size
        elif not excerpt.covered:  # an estimate, if there was no more
            excerpt.covered = min(self._meter.bytes_read, excerpt.file.size)
        else:
            return
        excerpt.documents, excerpt.bytes = len(excerpt.texts), self._bytes


@dataclass
class _Meter:
    """What has been read of a file, and until when more may be."""

    deadline: float
    bytes_read: int = 0


@dataclass(frozen=True)
class _MeteredSource(SourceFile):
    """A source file of which a limited number of bytes can be read."""

    meter: _Meter = field(default_factory=lambda: _Meter(0.0), compare=False)

    def open(self) -> IO[bytes]:
        stream = _MeteredStream(super().open(), _STREAM_READ if self.compression else _MOST_READ, self.meter)
        return cast(IO[bytes], stream if self.compression else io.BufferedReader(stream))


class _MeteredStream(io.RawIOBase):
    """An open file that counts what is read of it, and raises _LimitReached if that is too much or takes too long.

    most: bytes that one call reads at most.
    """

    def __init__(self, file: IO[bytes], most: int, meter: _Meter) -> None:
        self._file, self._most, self._meter = file, most, meter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if self._meter.bytes_read > _MOST_READ or time.monotonic() > self._meter.deadline:
            raise _LimitReached
        data = self._file.read(min(len(buffer), self._most))
        buffer[: len(data)] = data
        self._meter.bytes_read += len(data)
        return len(data)


def _has_places(file: SourceFile) -> bool:
    """Whether a file can be read from another place than its beginning."""
    return file.divisible and file.kind != "csv"


def _is_utf8(file: SourceFile) -> bool:
    """Whether a file that may be divided is read from any place, and not, as other encodings, as a whole."""
    if file.kind == "parquet":
        return True
    try:
        with file.open() as opened:
            return not is_transcoded(opened.read(HEAD_BYTES), file.options.encoding)
    except OSError:  # what is wrong, the reader tells
        return True


def _row_group_at(file: SourceFile, place: int) -> tuple[int, int | None]:
    """Return (rows of the file, byte at which its row group at `place` starts, None if it has none)."""
    try:
        with file.open() as opened:
            groups = row_groups(opened, file.size)
    except OSError:  # what is wrong with it, the reader tells
        return 0, None
    starts = [group.start for group in groups]
    return sum(group.rows for group in groups), starts[max(bisect_right(starts, place) - 1, 0)] if starts else None
