"""The limits of sources: which spans the first documents of a limited source are in, without reading what follows.

The result depends on the files and the corpus config only: any number of workers counts the spans in their order. This
module does not know what becomes of the documents.
"""

import math
from array import array
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.listing import SourceFile
from gru.corpus.partitions import DocumentRange, Mapper, Partition, Sizes, UsedSpan, UsedSpans, partitions_of
from gru.corpus.report import Report
from gru.errors import UserError

_MOST_PARTITIONS = 256  # that are counted together


def find_used(files: list[SourceFile], corpus: CorpusConfig, mapper: Mapper = map) -> UsedSpans:
    """Return the spans of each limited source that have its first documents; equal documents count.

    mapper: a `map`, possibly parallel, that counts the documents of partitions. Raises UserError as `documents` does.
    """
    return {
        options.index: _first_spans(
            [file for file in files if file.options.index == options.index], corpus, options.limit, mapper
        )
        for options in corpus.source_options()
        if options.limit
    }


def _first_spans(files: list[SourceFile], corpus: CorpusConfig, limit: int, mapper: Mapper) -> list[UsedSpan]:
    """Return the spans with the first documents of a source, whose last one may be used in part."""
    pending = partitions_of(files, corpus, mapper)
    used: list[UsedSpan] = []
    left, read, wanted = limit, 0, 1
    while left and (batch := [*islice(pending, wanted)]):
        counted = mapper(partial(_count, corpus=corpus, limit=limit), batch)
        for partition, (sizes, error) in zip(batch, counted, strict=True):
            for span, of_span in zip(partition, sizes, strict=False):
                if left and len(of_span) >= left:
                    of_span = of_span[:left]
                    span = replace(span, documents=DocumentRange(0, left, int(of_span.sum())))
                if left:
                    used.append(UsedSpan(span, of_span))
                    left -= len(of_span)
            if left and error:
                raise error
        read += len(batch)
        found = limit - left
        wanted = min(_MOST_PARTITIONS, math.ceil(left * read / found) if found else read)
    return used


def _count(partition: Partition, corpus: CorpusConfig, limit: int) -> tuple[list[Sizes], UserError | None]:
    """Return the bytes of each document as UTF-8 [documents], by span, up to the limit of the source.

    With an error that ended this, if any: it is none if the documents before it are enough.
    """
    found: list[array[int]] = []
    error: UserError | None = None
    count = 0
    try:
        for span in partition:
            if left := limit - count:
                found.append(array("q"))
                for text in documents(replace(span, documents=DocumentRange(0, left, 0)), corpus, Report()):
                    found[-1].append(len(text.encode()))
                count += len(found[-1])
    except UserError as raised:
        error = raised
    return [np.array(sizes, dtype=np.int64) for sizes in found], error
