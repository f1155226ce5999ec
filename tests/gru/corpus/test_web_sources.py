import gzip
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.config import CorpusConfig
from gru.corpus import web
from gru.corpus.listing import SourceFile, list_files
from gru.errors import GaveUp, UserError
from tests.gru.corpus.reading import read, spans, texts, write, zstd
from tests.gru.corpus.web_servers import (
    BreaksOff,
    Chunks,
    Compresses,
    CompressesWholeFiles,
    FailsTwice,
    Grows,
    NamesCompressedFiles,
    Protected,
    Ranges,
    Redirects,
    Resets,
    Silent,
    Slow,
    Status,
    UnknownEncoding,
    Whole,
    WithoutHead,
    serve,
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "RETRY_SECONDS", (0.0, 0.0))


def listed(url: str, **settings: Any) -> SourceFile:
    [file] = list_files(CorpusConfig(sources=[url], **settings)).files
    return file


# Files as those of a disk


@pytest.mark.parametrize("handler", [Ranges, Whole])
def test_files_of_a_web_server_read_as_those_of_a_disk(tmp_path: Path, handler: Any) -> None:
    lines = "".join(f'{{"text": "{i} 黃河"}}\n' for i in range(3000))
    write(tmp_path / "a.jsonl", lines.encode())
    write(tmp_path / "b c é.txt", b"ein Text\r\n" * 3000)
    write(tmp_path / "d.txt.gz", gzip.compress("packed 😀\n".encode() * 100))
    write(tmp_path / "e.csv", ("text,n\n" + '"a ""quoted""\nline",1\n' * 2000).encode())
    with serve(handler, tmp_path) as url:
        local = [str(tmp_path / name) for name in ("a.jsonl", "b c é.txt", "d.txt.gz", "e.csv")]
        remote = [f"{url}/{name}" for name in ("a.jsonl?download=1", "b%20c%20%C3%A9.txt", "d.txt.gz", "e.csv")]
        corpus = CorpusConfig(sources=remote, partition_bytes=10_000)
        assert len(spans(corpus)) == (
            4 if handler is Whole else len(spans(corpus.model_copy(update={"sources": local})))
        )
        for mine, yours in zip(local, remote, strict=True):
            one, other = texts(mine, partition_bytes=10_000), texts(yours, partition_bytes=10_000)
            assert "".join(one) == "".join(other) and (handler is Whole or one == other)
        with pytest.raises(UserError, match=r"no such file: .*absent.txt"):
            listed(f"{url}/absent.txt")


def test_another_version_on_a_web_server_is_another_corpus(tmp_path: Path) -> None:
    for handler in (Ranges, Whole):
        path = Path(write(tmp_path / "a.txt", b"one"))
        with serve(handler, tmp_path) as url:
            before = listed(f"{url}/a.txt")
            assert listed(f"{url}/a.txt") == before
            path.write_bytes(b"two")
            os.utime(path, (1, 1))
            assert listed(f"{url}/a.txt") != before
            assert before.changed(before.open())


def test_names_come_from_the_path_of_the_url(tmp_path: Path) -> None:
    write(tmp_path / "year=2024/a b.tsv", b"text\nx\n")
    with serve(Ranges, tmp_path) as url:
        file = listed(f"{url}/year=2024/a%20b.tsv?sign=x/y.json&k=[1]*#part")
        assert (file.name, file.kind, file.columns) == ("a b.tsv", "csv", (("year", "2024"),))
        with pytest.raises(UserError, match=r"year=2024/\?x: unknown format: set corpus\.format"):
            listed(f"{url}/year=2024/?x")


def test_empty_files_and_parquet_are_read(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt", b"")
    table = pa.table({"text": [f"{i} text" * 50 for i in range(3000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    with serve(Ranges, tmp_path) as url:
        assert listed(f"{url}/empty.txt").size == 0
        assert texts(f"{url}/a.parquet", partition_bytes=100_000) == table["text"].to_pylist()


@pytest.mark.parametrize("handler", [Redirects, Protected, WithoutHead])
def test_redirects_and_names_in_urls_work(tmp_path: Path, handler: Any) -> None:
    write(tmp_path / "a.txt", b"one\n" * 1000)
    with serve(handler, tmp_path) as url:
        path = "/to/a.txt?x=1" if handler is Redirects else "/a.txt"
        if handler is Protected:
            with pytest.raises(UserError, match="401 Unauthorized"):
                listed(f"{url}{path}")
            url = url.replace("://", "://me:se%40cret@")
        assert "".join(texts(f"{url}{path}", partition_bytes=500)) == "one\n" * 1000


# Servers that compress, or know no sizes


@pytest.mark.parametrize("handler", [Compresses, CompressesWholeFiles])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_text_that_the_server_compresses_is_whole(tmp_path: Path, handler: Any, size: int) -> None:
    text = "".join(f"line {i} 黃河\n" for i in range(20_000))
    write(tmp_path / "a.txt", text.encode())
    write(tmp_path / "b.txt.zst", zstd(text.encode()))
    with serve(handler, tmp_path) as url:
        file = listed(f"{url}/a.txt")
        assert not file.divisible and file.size == len(gzip.compress(text.encode()))
        for name in ("a.txt", "b.txt.zst"):
            assert "".join(texts(f"{url}/{name}", partition_bytes=size)) == text


def test_an_unknown_compression_of_the_server_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    with serve(UnknownEncoding, tmp_path) as url, pytest.raises(UserError, match="Content-Encoding: compress; downl"):
        texts(f"{url}/a.txt")


def test_a_compressed_file_may_be_described_as_such(tmp_path: Path) -> None:
    write(tmp_path / "a.txt.gz", gzip.compress(b"one\n"))
    with serve(NamesCompressedFiles, tmp_path) as url:
        assert texts(f"{url}/a.txt.gz") == ["one\n"]


def test_a_size_may_be_in_the_answer_to_head(tmp_path: Path) -> None:
    with serve(Chunks, tmp_path) as url:
        assert texts(f"{url}/a.txt") == [Chunks.data]
        with pytest.raises(UserError, match=r"silent.txt: the server does not tell its size; copy it"):
            listed(f"{url}/silent.txt")


# Failures


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("404/a.txt", UserError, r"corpus\.sources: no such file: .*/404/a.txt \(404 Not Found\)"),
        ("403/a.txt", UserError, r"corpus\.sources: cannot read .*/403/a.txt: 403 Forbidden"),
        ("500/a.txt", GaveUp, r"corpus\.sources: cannot read .*a.txt: 500 Internal Server Error in each of 3 attempts"),
        ("429/a.txt", GaveUp, "429 Too Many Requests in each of 3 attempts"),
    ],
)
def test_each_status_is_told_as_what_it_is(tmp_path: Path, path: str, error: type[Exception], message: str) -> None:
    with serve(Status, tmp_path) as url, pytest.raises(error, match=message) as caught:
        listed(f"{url}/{path}")
    assert "\n" not in str(caught.value)


def test_servers_that_cannot_be_reached_are_told_as_such() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(GaveUp, match=r"a.txt: Connection refused in each of 3 attempts$"):
        listed(f"http://me:secret@127.0.0.1:{port}/a.txt")
    # Without a network the name may be found later, so that is tried again.
    with pytest.raises((UserError, GaveUp), match=r"no-such-host.invalid/a.txt: (its host is not known|Temporary)"):
        listed("http://no-such-host.invalid/a.txt")
    for url in ("http:///a.txt", "http://[/a.txt", "http://a b/c.txt"):
        with pytest.raises(UserError, match=r"corpus\.sources: cannot read "):
            listed(url)


def test_a_loop_of_redirects_is_told(tmp_path: Path) -> None:
    with serve(Redirects, tmp_path) as url:
        with pytest.raises(UserError, match=r"loop/a.txt: the server redirects in a loop"):
            listed(f"{url}/loop/a.txt")
        with pytest.raises(UserError, match=r"ftp/a.txt: .*ftp://"):
            listed(f"{url}/ftp/a.txt")


def test_failures_that_pass_are_tried_again(tmp_path: Path) -> None:
    FailsTwice.seen = {}
    write(tmp_path / "a.txt", b"one\n" * 10_000)
    with serve(FailsTwice, tmp_path) as url:
        assert "".join(texts(f"{url}/a.txt", partition_bytes=9000)) == "one\n" * 10_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_reading_continues_where_a_connection_breaks(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i**7) for i in range(20_000))
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "a.jsonl.gz", gzip.compress(lines))
    pq.write_table(pa.table({"text": [f"{i} {i**7}" for i in range(20_000)]}), tmp_path / "a.parquet")
    with serve(Resets, tmp_path) as url:
        assert texts(f"{url}/{name}", partition_bytes=200_000) == [f"{i} {i**7}" for i in range(20_000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_connection_that_breaks_is_no_damaged_file(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i**7) for i in range(20_000))
    write(tmp_path / name, gzip.compress(lines) if name.endswith(".gz") else lines)
    with (
        serve(BreaksOff, tmp_path) as url,
        pytest.raises(GaveUp, match=f"{name}: cannot be read: .*broke at byte") as e,
    ):
        read(f"{url}/{name}")
    assert "\n" not in str(e.value)


def test_silence_counts_but_not_the_time_of_a_whole_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", b"twenty characters or so")
    monkeypatch.setattr(web, "READ_SECONDS", 1.0)
    with serve(Slow, tmp_path) as url:
        assert texts(f"{url}/a.txt") == ["twenty characters or so"]
    monkeypatch.setattr(web, "READ_SECONDS", 0.1)
    Silent.ended = threading.Event()
    with serve(Silent, tmp_path) as url:
        try:
            with pytest.raises(GaveUp, match=r"a.txt: cannot be read: .*no answer within 0.1 seconds"):
                texts(f"{url}/a.txt")
        finally:
            Silent.ended.set()


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    Grows.requests = 0
    write(tmp_path / "a.txt", b"one\n" * 10_000)
    with serve(Grows, tmp_path) as url, pytest.raises(UserError, match=r"a.txt: changed while it was read; run the"):
        read(f"{url}/a.txt", partition_bytes=9000)
