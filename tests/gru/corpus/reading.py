"""Shared by the tests of the corpus: sample text, compression by extension, and the documents of a config."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from gru.config import CorpusConfig
from gru.corpus.documents import documents
from gru.corpus.listing import list_files
from gru.corpus.partitions import Span, plan
from gru.corpus.report import Report

AWKWARD = "one\r\ntwo\u2028still two\x0cand\n\n\n😀 emoji\n黃河入海流\r\n\u2029x\ry\n\x00NUL\x00\nno end of line"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, compresslevel=1),
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
}


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def spans(corpus: CorpusConfig) -> list[Span]:
    return [span for partition in plan(list_files(corpus).files, corpus) for span in partition]


def read(*paths: str, **settings: Any) -> tuple[list[str], Report]:
    """Return the documents of the sources, and the report on what was left out."""
    corpus, report = CorpusConfig(sources=[*paths], **settings), Report()
    return [text for span in spans(corpus) for text in documents(span, corpus, report)], report


def texts(*paths: str, **settings: Any) -> list[str]:
    """Return the documents of the sources; none may be left out."""
    found, report = read(*paths, **settings)
    assert not report.dropped, examples(report)
    return found


def examples(report: Report) -> list[str]:
    """Return the examples of all problems, by the reason that came first."""
    return [example for found in report.examples.values() for example in found]
