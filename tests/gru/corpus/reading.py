"""What the tests of the corpus share: files to read, and all the documents of a config in this process."""

from pathlib import Path
from typing import Any

from gru.config import CorpusConfig
from gru.corpus import sources
from gru.corpus.documents import Report, documents


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def spans(corpus: CorpusConfig) -> list[sources.Span]:
    return [span for partition in sources.plan(sources.list_files(corpus), corpus) for span in partition]


def read(*paths: str, **settings: Any) -> tuple[list[str], Report]:
    """The documents of the sources, and what became of the others."""
    corpus, report = CorpusConfig(sources=[*paths], **settings), Report()
    return [text for span in spans(corpus) for text in documents(span, corpus, report)], report


def texts(*paths: str, **settings: Any) -> list[str]:
    found, report = read(*paths, **settings)
    assert not report.dropped, report.examples
    return found
