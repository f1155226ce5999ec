"""The sample of the corpus that a tokenizer is trained on: from all over, also from within long documents.

It is a pure function of the plan and the corpus config. This module does not know how a tokenizer is trained.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from gru.config import CorpusConfig
from gru.corpus.documents import document_hash, documents, is_heldout
from gru.corpus.listing import SourceFile
from gru.corpus.parquet_records import RowGroup, row_groups
from gru.corpus.partitions import Partition, Span, cut_finer
from gru.corpus.report import Report
from gru.corpus.unpacking import EXPANSION, unreadable_is_user_error

_SPAN_BYTES = 1 << 20  # size of the spans that the sample consists of
_SLICE = 1 << 12  # characters of a slice of a document that is sampled in part
_LONG = 1 << 16  # characters of a document from which it is sampled in slices, not whole or not at all


def sample(corpus: CorpusConfig, sample_bytes: int, partitions: list[Partition]) -> Iterator[str]:
    """Yield about `sample_bytes` of training text: spans of the whole corpus, in the order of a hash.

    Of a file that cannot be cut only a share is sampled, from all over it, so that no single file is the whole sample.
    """
    span_bytes = min(_SPAN_BYTES, corpus.partition_bytes)
    whole = [span for partition in partitions for span in partition]
    pieces = [piece for span in whole for piece in _pieces(span, span_bytes)]
    total, taken = sum(piece.size for piece in pieces), 0.0
    for index in sorted(range(len(pieces)), key=lambda index: document_hash(str(index).encode())):
        span, size, exact = pieces[index]
        if span.heldout or not size:
            continue
        share = min(1.0, sample_bytes * max(1 / 8, size / total) / size)
        yield from _sample_span(span, exact, share, corpus)
        taken += size * share
        if taken >= sample_bytes:
            return


class _Piece(NamedTuple):
    """A part of the corpus that is sampled or not."""

    span: Span
    size: int  # bytes of its text, roughly
    exact: bool = True  # whether its documents are those of the corpus, not parts of them


def _pieces(span: Span, size: int) -> Iterator[_Piece]:
    """Yield the pieces of a span, each of which has text: about `size` bytes where the file can be read anywhere."""
    file = span.file
    if span.documents:
        yield _Piece(span, span.documents.bytes)
    elif not file.divisible:
        yield _Piece(span, span.size * EXPANSION)
    elif file.kind == "parquet":
        if span.whole:
            yield _Piece(span, span.size)
            return
        for group in _row_groups(file):
            if span.start <= group.start < span.end:
                yield _Piece(replace(span, start=group.start, end=group.start + 1), group.size)
    else:
        for piece in cut_finer(span, size):
            yield _Piece(piece, piece.size, piece == span)


@lru_cache(maxsize=1)  # the spans of a file follow each other
def _row_groups(file: SourceFile) -> list[RowGroup]:
    with unreadable_is_user_error(file.path), file.open() as opened:
        return row_groups(opened, file.size)


def _sample_span(span: Span, exact: bool, share: float, corpus: CorpusConfig) -> Iterator[str]:
    """Yield a share of a span's text. exact: as in `_Piece`."""
    one_text = span.file.kind == "text" and not span.file.options.separator
    for text in documents(span, corpus, Report()):
        document = document_hash(text.encode())
        if (exact or not one_text) and is_heldout(span, document, corpus):
            continue
        if one_text or len(text) > _LONG:
            yield from _slices(text, share)
        elif document >= (1 - share) * 2**64:
            yield text


def _slices(text: str, share: float) -> Iterator[str]:
    """Yield slices of a text, at equal distances, that are together a share of it."""
    if share == 1:
        yield text
        return
    wanted = math.ceil(len(text) * share)
    count = math.ceil(wanted / _SLICE)
    for i in range(count):
        start = len(text) * i // count
        yield text[start : start + math.ceil(wanted / count)]
