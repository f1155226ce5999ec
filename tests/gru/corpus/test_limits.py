"""Sources with a limit: what is behind their first documents is not read, and the held-out tail is that of the rest."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.config_corpus import SourceConfig
from gru.corpus.documents import documents
from gru.corpus.limits import find_used
from gru.corpus.listing import list_files
from gru.corpus.partitions import Mapper, Span, plan
from gru.corpus.prepare import prepare, recorded_sources
from gru.corpus.report import Report
from gru.corpus.tokenizer_sample import sample
from tests.gru.corpus.reading import write

BYTES = TokenizerConfig(kind="byte")
BAD = b'{"text": "not closed\n' + b"\xff" * 2_000_000
LINES = [f"line {i}" for i in range(60)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def array(data: bytes) -> bytes:
    return b"[" + data.replace(b"\n", b",", len(LINES)) + b"]"


def cut_gzip(data: bytes) -> bytes:
    """Return compressed data that is damaged behind what a reader of the first lines needs."""
    packed = gzip.compress(data, 0)
    return packed[:1_500_000]


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", data)
        archive.writestr("b.jsonl", BAD)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()[:1_500_000]


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.json": array,
    "a.jsonl.gz": cut_gzip,
    "a.zip": zipped,
    "a.tar": tarred,
}


def corpus_of(limit: int, *paths: str, **settings: Any) -> CorpusConfig:
    return CorpusConfig(source=[SourceConfig(path=[*paths], limit=limit)], **settings)


def planned(corpus: CorpusConfig, mapper: Mapper = map) -> list[Span]:
    files = list_files(corpus).files
    return [span for partition in plan(files, corpus, mapper, find_used(files, corpus, mapper)) for span in partition]


def split(corpus: CorpusConfig, mapper: Mapper = map) -> tuple[list[str], list[str]]:
    """Return the documents to train on, and those of the held-out tail."""
    report = Report()
    read = [(span.heldout, list(documents(span, corpus, report))) for span in planned(corpus, mapper)]
    assert len(report.digests) == len(read)
    return [t for held, part in read for t in part if not held], [t for held, part in read for t in part if held]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [300, 32 << 20])
def test_what_is_behind_the_limit_is_not_read(tmp_path: Path, name: str, size: int) -> None:
    path = write(tmp_path / name, FORMS[name](json_lines(LINES) + BAD))
    other = write(tmp_path / "b" / "b.jsonl", BAD)
    # Reading one byte of what is bad would be an error.
    corpus = corpus_of(len(LINES), path, other, partition_bytes=size, on_bad="fail")
    assert split(corpus) == (LINES, [])
    partitions = plan(list_files(corpus).files, corpus, used=used(corpus))
    assert {*sample(corpus, 10**9, partitions)} <= {*LINES}, "nor by the tokenizer"
    directory = str(tmp_path / "datasets" / "d")
    once = corpus.model_copy(update={"partition_bytes": 32 << 20, "heldout_share": 0.1})
    dataset = prepare(once, BYTES, directory, lambda _: None)
    assert {*dataset.texts("train"), *dataset.texts("heldout")} == {*LINES}
    assert (dataset.manifest.dropped, [source.name for source in dataset.manifest.sources]) == ({}, [name])
    assert recorded_sources(once, directory) == dataset.manifest.sources


def used(corpus: CorpusConfig) -> Any:
    return find_used(list_files(corpus).files, corpus)


def in_threads(function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
    with ThreadPoolExecutor(4) as pool:
        return [*pool.map(function, items)]


@pytest.mark.parametrize("limit", [1, 59, 60, 61, 100, 179, 180, 10**6])
def test_the_tail_is_that_of_the_documents_in_use(tmp_path: Path, limit: int) -> None:
    texts = [f"text {i:04d}" for i in range(180)]
    write(tmp_path / "a.jsonl", json_lines(texts[:60]))
    write(tmp_path / "b.jsonl.gz", gzip.compress(json_lines(texts[60:120])))
    write(tmp_path / "c.jsonl", json_lines(texts[120:]) + b'{"bad\n')
    first = texts[:limit]
    for size in (200, 1000, 10**6):
        corpus = corpus_of(limit, str(tmp_path), partition_bytes=size, heldout="tail", heldout_share=0.1)
        train, heldout = split(corpus)
        assert train + heldout == first
        assert abs(len(heldout) - len(first) / 10) < 1, "a single document is cut when it has been read"
        assert planned(corpus, in_threads) == planned(corpus), "the plan depends on the number of threads"
        report = Report()
        for span in planned(corpus):
            assert all(documents(span, corpus, report))
        assert report.dropped == ({"bad_record": 1} if limit > 180 else {}), "what is bad is counted once"


def test_the_tail_of_several_sources_is_that_of_the_last(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", json_lines([f"a {i:06d}" for i in range(50_000)]))
    b = write(tmp_path / "b.jsonl", json_lines([f"b {i:06d}" for i in range(1000)]))
    limited, unlimited = SourceConfig(path=a, limit=100), SourceConfig(path=b)
    for sources, last in (([limited, unlimited], "b"), ([unlimited, limited], "a")):
        corpus = CorpusConfig(source=sources, heldout="tail", heldout_share=0.01, partition_bytes=2000)
        train, heldout = split(corpus)
        assert len(train) + len(heldout) == 1100
        assert 5 < len(heldout) < 40 and {text[0] for text in heldout} == {last}


def test_quotes_of_csv_count_up_to_the_limit(tmp_path: Path) -> None:
    texts = [f'one "quoted"\nline {i}' for i in range(50)]
    rows = "".join('"{}"\n'.format(text.replace('"', '""')) for text in texts)
    path = write(tmp_path / "a.csv", f"text\n{rows}".encode())
    for size in (40, 300, 10**6):
        corpus = corpus_of(33, path, heldout="tail", heldout_share=0.2, partition_bytes=size)
        train, heldout = split(corpus)
        assert train + heldout == texts[:33] and len(heldout) in (6, 7)
