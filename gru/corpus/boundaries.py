"""The boundaries between documents: where the documents of a span begin and end in the file."""

from functools import partial
from typing import IO

from gru.corpus.partitions import Span
from gru.corpus.text_cuts import Separator, next_cut


def document_bounds(file: IO[bytes], span: Span) -> tuple[int, int]:
    """Return the bytes [start, end) of the documents of a span.

    Each end of the span moves behind the first separator that ends after it; the ends of the file stay. In CSV a line
    end inside quotes does not count, so `plan` finds the ends; a Parquet span has the row groups that start in it, so
    its ends stay too. Text without a separator is cut as `text_cuts` says.
    """
    if span.file.kind == "parquet":
        return span.start, span.end
    if span.records is not None:
        return span.records
    separator = span.file.options.separator if span.file.kind == "text" else "\n"
    find = partial(Separator(separator).next_end if separator else next_cut, file)
    start, end = (edge if edge in (0, span.file.size) else find(edge) for edge in (span.start, span.end))
    return start, end
