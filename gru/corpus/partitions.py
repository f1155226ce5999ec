"""The partitions: groups the input files, or pieces of them, into units of work.

A file is cut at any byte; the reader of a span moves both ends forward to the next boundary between documents. This
module does not know what the files contain, or who processes the partitions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

from gru.config import CorpusConfig
from gru.corpus.csv_dialect import dialect_of
from gru.corpus.csv_quotes import SpanQuotes, find_records, read_quotes
from gru.corpus.encodings import HEAD_BYTES, is_transcoded
from gru.corpus.listing import SourceFile
from gru.corpus.unpacking import unreadable_is_user_error
from gru.errors import UserError
from gru.terminal import counted

Sizes = np.ndarray[Any, np.dtype[np.int64]]
Mapper = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


class DocumentRange(NamedTuple):
    """Documents [first, end) of a span."""

    first: int
    end: int | None  # None: to its end
    bytes: int  # of their text as UTF-8


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file; where the file is cut, both ends move forward to the next document boundary."""

    file: SourceFile
    start: int
    end: int
    heldout: bool | None  # None: each document's hash decides
    records: tuple[int, int] | None = None  # CSV with quotes that is cut: the bytes of the records that it has
    documents: DocumentRange | None = None  # those to read, for a limit of the source; None: all

    @property
    def whole(self) -> bool:
        """Whether the span is the whole file."""
        return self.start == 0 and self.end == self.file.size

    @property
    def size(self) -> int:
        return self.end - self.start


Partition = tuple[Span, ...]


class UsedSpan(NamedTuple):
    """A span of a limited source that has some of its first documents."""

    span: Span
    sizes: Sizes  # bytes of each of them as UTF-8 [documents]


UsedSpans = Mapping[int, list[UsedSpan]]
"""The used spans of each limited source in order, by its index."""


def plan(
    files: list[SourceFile], corpus: CorpusConfig, mapper: Mapper = map, used: UsedSpans | None = None
) -> list[Partition]:
    """Group the files of each source, in order, into partitions of about `partition_bytes`; larger files are cut.

    mapper: a `map`, possibly parallel, that reads the quotes in the spans of large CSV files. used: what is read of
    the sources that have a limit, as `limits` finds it; None: all.
    Raises UserError if the corpus has a held-out tail but cannot be cut in two.
    """
    return [*_grouped(_with_quotes(list(_spans(files, corpus, used or {})), mapper), corpus.partition_bytes)]


def partitions_of(files: list[SourceFile], corpus: CorpusConfig, mapper: Mapper = map) -> Iterator[Partition]:
    """Yield the partitions of one source, planning file by file; no tail is held out."""
    pieces = (list(_cut(file, 0, file.size, None, corpus.partition_bytes)) for file in files)
    return _grouped((span for spans in pieces for span in _with_quotes(spans, mapper)), corpus.partition_bytes)


def _grouped(spans: Iterable[Span], size: int) -> Iterator[Partition]:
    """Yield groups of about `size` bytes of spans, each of one source."""
    group: list[Span] = []
    free_bytes = size
    for span in spans:
        if group and (span.size > free_bytes or span.file.options.index != group[0].file.options.index):
            yield tuple(group)
            group, free_bytes = [], size
        group.append(span)
        free_bytes -= span.size
    if group:
        yield tuple(group)


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


def _spans(files: list[SourceFile], corpus: CorpusConfig, used: UsedSpans) -> Iterator[Span]:
    """Yield the spans of all files, cut where the held-out tail begins and about every `partition_bytes`."""
    limited: dict[SourceFile, list[UsedSpan]] = {file: [] for file in files if file.options.index in used}
    for spans in used.values():
        for each in spans:
            limited[each.span.file].append(each)
    if corpus.heldout == "hash":
        for file in files:
            if file in limited:
                yield from (each.span for each in limited[file])
            else:
                yield from _cut(file, 0, file.size, None, corpus.partition_bytes)
        return
    sizes = {file: sum(int(each.sizes.sum()) for each in limited[file]) for file in limited}
    total = sum(sizes.get(file, file.size) for file in files)
    tail_start = total - math.ceil(total * corpus.heldout_share)
    heldout = trained = before = 0
    for file in files:
        if file in limited:
            yield from _cut_used(limited[file], tail_start - before)
            before += sizes[file]
            continue
        cut = min(max(tail_start - before, 0), file.size)
        if not file.divisible:
            cut = file.size if cut * 2 > file.size else 0  # the larger part of the file decides
        if cut or not file.size:
            yield from _cut(file, 0, cut, False, corpus.partition_bytes)
        if cut < file.size:
            yield from _cut(file, cut, file.size, True, corpus.partition_bytes)
        before, trained, heldout = before + file.size, trained + cut, heldout + file.size - cut
    if total and not limited and not (trained and heldout):
        raise UserError(
            'corpus.heldout = "tail": the files cannot be cut, so all or none would be held out; use "hash"'
        )


def _cut_used(spans: list[UsedSpan], cut: int) -> Iterator[Span]:
    """Yield the used spans of a file, cut between documents where the tail begins: behind `cut` bytes of their text.

    As elsewhere, a document that begins before the tail is not in it, unless it is the last of several of the span.
    """
    for span, sizes in spans:
        size, count = int(sizes.sum()), len(sizes)
        trained = int((np.cumsum(sizes) - sizes < cut).sum())
        if cut < size and trained == count > 1:
            trained -= 1
        if 0 < trained < count:
            head, end = int(sizes[:trained].sum()), span.documents.end if span.documents else None
            yield replace(span, heldout=False, documents=DocumentRange(0, trained, head))
            yield replace(span, heldout=True, documents=DocumentRange(trained, end, size - head))
        else:
            yield replace(span, heldout=not trained and cut <= 0)
        cut -= size


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
    """Return the span cut into spans of about `size` bytes.

    One of CSV is not, since lines may end inside quotes, nor one of which not all documents are read.
    """
    if span.file.kind == "csv" or span.documents:
        return [span]
    return list(_cut(span.file, span.start, span.end, span.heldout, size))


def first_span(file: SourceFile, size: int) -> Span:
    """Return the span of the first bytes of a file."""
    cuts = [0, min(size, file.size), min(2 * size, file.size)]  # the next ones may tell what a quote is
    return next(_with_quotes([Span(file, left, right, None) for left, right in pairwise(cuts)], map))


def _with_quotes(spans: list[Span], mapper: Mapper) -> Iterator[Span]:
    """Set `records` of the spans of CSV files that are cut, where a line end may be inside quotes."""
    cut = [span for span in spans if span.file.kind == "csv" and not span.whole and span.records is None]
    cut = [span for span in cut if dialect_of(span.file).quoting]
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
