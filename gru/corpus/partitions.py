"""The partitions: groups the input files, or pieces of them, into units of work.

A file is cut at any byte; the reader of a span moves both ends forward to the next boundary between documents. This
module does not know what the files contain, or who processes the partitions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

from gru.config import CorpusConfig
from gru.corpus.csv_dialect import dialect_of
from gru.corpus.csv_quotes import SpanQuotes, find_records, read_quotes
from gru.corpus.encodings import HEAD_BYTES, is_transcoded
from gru.corpus.listing import SourceFile
from gru.corpus.unpacking import unreadable_is_user_error
from gru.errors import UserError

Mapper = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; where the file is cut, both ends move forward to the next document boundary."""

    file: SourceFile
    start: int
    end: int
    heldout: bool | None  # None: each document's hash decides
    records: tuple[int, int] | None = None  # CSV with quotes that is cut: the bytes of the records that it has

    @property
    def whole(self) -> bool:
        """Whether the span is the whole file."""
        return self.start == 0 and self.end == self.file.size

    @property
    def size(self) -> int:
        return self.end - self.start


Partition = tuple[Span, ...]


def plan(files: list[SourceFile], corpus: CorpusConfig, mapper: Mapper = map) -> list[Partition]:
    """Group the files of each source, in order, into partitions of about `partition_bytes`; larger files are cut.

    mapper: a `map`, possibly parallel, that reads the quotes in the spans of large CSV files.
    Raises UserError if the corpus has a held-out tail but cannot be cut in two.
    """
    groups: list[list[Span]] = []
    free_bytes = 0
    for span in _with_quotes(list(_spans(files, corpus)), mapper):
        if not groups or span.size > free_bytes or span.file.options.index != groups[-1][0].file.options.index:
            groups.append([])
            free_bytes = corpus.partition_bytes
        groups[-1].append(span)
        free_bytes -= span.size
    return [tuple(group) for group in groups]


def describe_plan(partitions: list[Partition]) -> str:
    """Return the plan in one line: number of files, bytes, partitions, and files that cannot be cut."""
    files = {span.file.path: span.file for partition in partitions for span in partition}
    whole = [file for file in files.values() if not file.divisible]
    size = sum(file.size for file in files.values())
    text = f"{counted(len(files), 'file')}, {size / 1e6:,.1f} MB, {counted(len(partitions), 'partition')}"
    if whole:
        text += f"; {counted(len(whole), 'file')} cannot be cut "
        text += "(compressed, .json, .html, archives, or from a server without ranges)"
    return text


def counted(number: int, noun: str) -> str:
    """Return a number of things: `1 file`, `2 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _spans(files: list[SourceFile], corpus: CorpusConfig) -> Iterator[Span]:
    """Yield the spans of all files, cut where the held-out tail begins and about every `partition_bytes`."""
    if corpus.heldout == "hash":
        for file in files:
            yield from _cut(file, 0, file.size, None, corpus.partition_bytes)
        return
    total = sum(file.size for file in files)
    tail_start = total - math.ceil(total * corpus.heldout_share)
    heldout = trained = before = 0
    for file in files:
        cut = min(max(tail_start - before, 0), file.size)
        if not file.divisible:
            cut = file.size if cut * 2 > file.size else 0  # the larger part of the file decides
        if cut or not file.size:
            yield from _cut(file, 0, cut, False, corpus.partition_bytes)
        if cut < file.size:
            yield from _cut(file, cut, file.size, True, corpus.partition_bytes)
        before, trained, heldout = before + file.size, trained + cut, heldout + file.size - cut
    if total and not (trained and heldout):
        raise UserError(
            'corpus.heldout = "tail": the files cannot be cut, so all or none would be held out; use "hash"'
        )


def _cut(file: SourceFile, start: int, end: int, heldout: bool | None, size: int) -> Iterator[Span]:
    """Yield spans of equal size, at most `size` bytes each, for bytes [start, end) of a file; one if it is not cut."""
    pieces = max(math.ceil((end - start) / size), 1) if file.divisible else 1
    if pieces > 1 and file.kind != "parquet" and _is_transcoded(file):
        pieces = 1  # each of them would read all of the file
    cuts = [start + (end - start) * i // pieces for i in range(pieces + 1)]
    for left, right in pairwise(cuts):
        yield Span(file, left, right, heldout)


@lru_cache(maxsize=1)  # the spans of a file follow each other
def _is_transcoded(file: SourceFile) -> bool:
    """Whether a file is not in UTF-8."""
    with unreadable_is_user_error(file.path), file.open() as opened:
        return is_transcoded(opened.read(HEAD_BYTES), file.options.encoding)


def cut_finer(span: Span, size: int) -> list[Span]:
    """Return the span cut into spans of about `size` bytes; one of CSV is not, since lines may end inside quotes."""
    return [span] if span.file.kind == "csv" else list(_cut(span.file, span.start, span.end, span.heldout, size))


def first_span(file: SourceFile, size: int) -> Span:
    """Return the span of the first bytes of a file."""
    cuts = [0, min(size, file.size), min(2 * size, file.size)]  # the next ones may tell what a quote is
    return next(_with_quotes([Span(file, left, right, None) for left, right in pairwise(cuts)], map))


def _with_quotes(spans: list[Span], mapper: Mapper) -> Iterator[Span]:
    """Set `records` of the spans of CSV files that are cut, where a line end may be inside quotes."""
    cut = [span for span in spans if span.file.kind == "csv" and not span.whole and dialect_of(span.file).quoting]
    read = zip(cut, mapper(_read_quotes, cut), strict=True)
    records: dict[Span, tuple[int, int]] = {}
    for file, pairs in groupby(read, key=lambda pair: pair[0].file):
        pieces, quotes = zip(*pairs, strict=True)
        records |= zip(pieces, find_records([*quotes], file.size, dialect_of(file).reach), strict=True)
    for span in spans:
        yield replace(span, records=records[span]) if span in records else span


def _read_quotes(span: Span) -> SpanQuotes:
    with unreadable_is_user_error(span.file.path):
        return read_quotes(span.file, span.start, span.end)
